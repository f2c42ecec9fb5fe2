"""Data: faults are told with file and line, prompts are what they should be, batches lose nothing."""

from collections import Counter
import gzip
import json
import os
from pathlib import Path

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest

from arrol_jax.data.problems import Problem, Prompt, batch_at, encode_prompts, load_problems
from arrol_jax.types import UserError

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


def line(number: int, **changes) -> bytes:
  record = {"id": f"p{number}", "problem": f"What is {number}+1?", "answer": f"{number + 1}"}
  record |= {"source": "test"} | changes
  return json.dumps({key: value for key, value in record.items() if value is not None}).encode() + b"\n"


def write(path: Path, content: bytes) -> str:
  path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
  return str(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_loads_in_order(tmp_path, name):
  path = write(tmp_path / name, line(3) + b"\n" + line(1, extra=1) + line(2, answer=3).strip())
  assert load_problems(path) == [Problem(f"p{i}", f"What is {i}+1?", f"{i + 1}", "test") for i in (3, 1, 2)]


@pytest.mark.parametrize("written", ["9007199254740993.0", "12345678901234567.5", "5e-400", "1.50", "-2.5E+3"])
def test_a_number_is_the_answer_that_the_file_writes(tmp_path, written):
  """A float would be another one."""
  path = write(tmp_path / "one.jsonl", line(1, answer="*").replace(b'"*"', written.encode()))
  assert load_problems(path)[0].answer == written


def test_line_ends_and_byte_order_mark(tmp_path):
  text = "x\u2028y\u0085z é 中"
  content = b"\xef\xbb\xbf" + line(1, problem=text).replace(b"\n", b"\r\n")
  record = {"id": "p2", "problem": text, "answer": "1", "source": "s"}
  content += json.dumps(record, ensure_ascii=False).encode()
  assert [problem.problem for problem in load_problems(write(tmp_path / "a.jsonl", content))] == [text, text]


def test_several_files_follow_each_other(tmp_path):
  first, second = write(tmp_path / "a.jsonl", line(1) + line(2)), write(tmp_path / "b.jsonl.gz", line(3))
  assert [problem.id for problem in load_problems(f"{second}, {first}")] == ["p3", "p1", "p2"]
  with pytest.raises(UserError, match=r"b2\.jsonl, line 2: id 'p2' was used before, in .*a\.jsonl, line 2"):
    load_problems(f"{first},{write(tmp_path / 'b2.jsonl', line(4) + line(2))}")


@pytest.mark.parametrize("content, message", [
  (b"", r"bad\.jsonl: .*empty"),
  (b"\n \n", r"bad\.jsonl: .*empty"),
  (line(1) + b'{"id": "p2", "problem"\n', r"bad\.jsonl, line 2: not JSON"),
  (line(1) + b"\n[1, 2]\n", r"bad\.jsonl, line 3: not a JSON object"),
  (line(1) + b"[" * 100_000 + b"\n", r"bad\.jsonl, line 2: not JSON"),
  (line(1) + b'{"answer": ' + b"1" * 5000 + b"}\n", r"bad\.jsonl, line 2: not JSON"),
  (line(1) + line(2, answer=None), r"bad\.jsonl, line 2: field 'answer' is missing"),
  (line(1) + line(2, source=None), r"bad\.jsonl, line 2: field 'source' is missing"),
  (line(1) + line(2, answer=" "), r"bad\.jsonl, line 2: field 'answer' must be text"),
  (line(1) + line(2, answer=["3"]), r"bad\.jsonl, line 2: field 'answer' must be text"),
  (line(1) + line(2, answer="*").replace(b'"*"', b"1e999"), r"bad\.jsonl, line 2: field 'answer' must be text .*, not inf"),
  (line(1) + line(2, problem="*").replace(b'"*"', b"1.5"), r"bad\.jsonl, line 2: field 'problem' must be text .*, not 1\.5"),
  (line(1) + line(2, answer=True), r"bad\.jsonl, line 2: field 'answer' must be text"),
  (line(1) + line(2, answer=float("nan")), r"bad\.jsonl, line 2: field 'answer' must be text that is not empty, not nan"),
  (line(1) + line(2, id=float("inf")), r"bad\.jsonl, line 2: field 'id' must be text"),
  (line(1) + line(2, problem=5), r"bad\.jsonl, line 2: field 'problem' must be text"),
  (line(1) + line(2, problem="\ud835"), r"bad\.jsonl, line 2: field 'problem' holds half a character"),
  (line(1) + line(2) + line(1), r"bad\.jsonl, line 3: id 'p1' was used before, in .*line 1"),
  (line(1) + b'{"id": "caf\xe9"}\n', r"bad\.jsonl, line 2: not UTF-8"),
  (line(1).decode().encode("utf-16"), r"bad\.jsonl, line 1: not UTF-8"),
  (gzip.compress(line(1), mtime=0), r"bad\.jsonl: compressed with gzip .* add \.gz"),
  (line(1) + b'{"id": "p2", "answer": "2", "answer": "3"}\n', r"bad\.jsonl, line 2: not JSON: the key 'answer' comes twice"),
])
def test_faults_name_file_and_line(tmp_path, content, message):
  with pytest.raises(UserError, match=message) as error:
    load_problems(write(tmp_path / "bad.jsonl", content))
  assert "\n" not in str(error.value)


def test_missing_unreadable_and_broken_files(tmp_path):
  with pytest.raises(UserError, match=r"none\.jsonl: no such"):
    load_problems(str(tmp_path / "none.jsonl"))
  with pytest.raises(UserError, match="no such"):
    load_problems("")
  with pytest.raises(UserError, match="cannot be read"):
    load_problems(str(tmp_path))
  (tmp_path / "plain.jsonl.gz").write_bytes(line(1))
  with pytest.raises(UserError, match=r"plain\.jsonl\.gz, line 1: cannot be read"):
    load_problems(str(tmp_path / "plain.jsonl.gz"))
  whole = gzip.compress(b"".join(line(i, problem=os.urandom(2000).hex()) for i in range(100)))
  half = len(whole) // 2
  flipped = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1:] for at in range(half, half + 40)]
  for kept in (whole[:half], whole[:-4], whole[:half] + bytes(100) + whole[half + 100:], *flipped):
    (tmp_path / "cut.jsonl.gz").write_bytes(kept)
    with pytest.raises(UserError, match=r"cut\.jsonl\.gz, line \d+: .*(truncated|cannot be read)"):
      load_problems(str(tmp_path / "cut.jsonl.gz"))


@pytest.mark.parametrize("name, rows", [
  ("gsm8k_train", 7473), ("gsm8k_test", 1319), ("dapo_math_17k_clean", 16181), ("math_train", 7498),
  ("math_test", 5000), ("math500", 500), ("aime24", 30), ("aime25", 30), ("amc23", 40), ("minerva_math", 272),
  ("olympiadbench", 675)])
def test_shared_files_load(name, rows):
  path = DATA / f"{name}.jsonl"
  if not path.exists():
    pytest.skip("no ../shared/data")
  assert len(load_problems(str(path))) == rows


class Letters:
  """A tokenizer whose tokens are characters: 1 is BOS, the rest ord(character) + 2."""
  chat_template = "a template"

  def __call__(self, texts, add_special_tokens, return_attention_mask):
    return {"input_ids": [[1] * add_special_tokens + [ord(character) + 2 for character in text] for text in texts]}

  def apply_chat_template(self, messages, tokenize, add_generation_prompt, enable_thinking):
    assert not tokenize and add_generation_prompt
    chat = "".join(f"<{message['role']}>{message['content']}" for message in messages)
    return chat + ("<assistant><think>" if enable_thinking else "<assistant>")


PROBLEMS = [Problem(str(i), "q" * i, "1", "s") for i in (3, 30, 2)]


def test_prompts_of_a_base_model():
  template = r"{problem} {problem} in \boxed{} {0} {"
  prompts, skipped = encode_prompts(PROBLEMS, Letters(), template, False, 60)
  assert [p.problem for p in skipped] == [PROBLEMS[1]]
  assert [prompt.problem for prompt in prompts] == [PROBLEMS[0], PROBLEMS[2]]
  assert prompts[0].text == r"qqq qqq in \boxed{} {0} {"
  assert prompts[0].tokens.dtype == np.int32
  expected = [1] + [ord(character) + 2 for character in prompts[0].text]
  np.testing.assert_array_equal(prompts[0].tokens, expected)


def test_thinking_reaches_the_chat_template():
  for thinking, end in ((True, "<assistant><think>"), (False, "<assistant>")):
    prompts, _ = encode_prompts(PROBLEMS, Letters(), "{problem}", True, 99, thinking=thinking)
    assert all(p.text.endswith(end) for p in prompts)


def test_prompts_of_a_chat_model():
  prompts, _ = encode_prompts(PROBLEMS, Letters(), "Solve {problem}", True, 100)
  assert prompts[2].text == "<user>Solve qq<assistant>"
  np.testing.assert_array_equal(prompts[2].tokens, [ord(character) + 2 for character in prompts[2].text])
  prompts, _ = encode_prompts(PROBLEMS, Letters(), "Solve {problem}", True, 100, system="Be brief.")
  assert prompts[2].text == "<system>Be brief.<user>Solve qq<assistant>"

  class Refusing(Letters):
    def apply_chat_template(self, messages, **_):
      raise ValueError("System role not supported")

  with pytest.raises(UserError, match=r"chat template refuses.*System role not supported"):
    encode_prompts(PROBLEMS, Refusing(), "Solve {problem}", True, 100, system="Be brief.")


def test_a_prompt_of_exactly_max_prompt_tokens_is_kept():
  prompts, skipped = encode_prompts(PROBLEMS, Letters(), "{problem}", False, 4)  # BOS and three letters
  assert ([len(prompt.tokens) for prompt in prompts], len(skipped)) == ([4, 3], 1)
  prompts, skipped = encode_prompts(PROBLEMS, Letters(), "{problem}", False, 3)
  assert ([len(prompt.tokens) for prompt in prompts], len(skipped)) == ([3], 2)


def test_prompt_faults():
  with pytest.raises(UserError, match="max_prompt"):
    encode_prompts(PROBLEMS, Letters(), "{problem}", False, 2)
  with pytest.raises(UserError, match="max_prompt"):
    encode_prompts([], Letters(), "{problem}", False, 2)
  with pytest.raises(UserError, match="no {problem}"):
    encode_prompts(PROBLEMS, Letters(), "{question}", False, 100)
  with pytest.raises(UserError, match="system"):
    encode_prompts(PROBLEMS, Letters(), "{problem}", False, 100, system="Be brief.")
  plain = Letters()
  plain.chat_template = None
  with pytest.raises(UserError, match="no chat template"):
    encode_prompts(PROBLEMS, plain, "{problem}", True, 100)


def numbered(count: int) -> list[Prompt]:
  return [Prompt(Problem(str(i), "q", "1", "s"), "q", np.zeros(1, np.int32)) for i in range(count)]


@given(st.integers(1, 12), st.integers(1, 30), st.integers(0, 2**32), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_every_epoch_has_every_problem_once(count, batch_size, seed, epochs):
  prompts = numbered(count)
  steps = -(-epochs * count // batch_size)
  order = [prompt.problem.id for step in range(steps) for prompt in batch_at(prompts, step, seed, batch_size)]
  assert len(order) == steps * batch_size
  for epoch in range(epochs):
    assert Counter(order[epoch * count:(epoch + 1) * count]) == Counter(str(i) for i in range(count))


def test_order_depends_on_seed_and_epoch_and_nothing_else():
  prompts = numbered(50)

  def ids(seed, size, steps):
    return [prompt.problem.id for step in steps for prompt in batch_at(prompts, step, seed, size)]

  assert ids(0, 10, range(10)) == ids(0, 20, range(5)) == ids(0, 100, range(1))
  assert ids(0, 7, reversed(range(5))) == [i for step in reversed(range(5)) for i in ids(0, 7, [step])]
  first, second = ids(0, 50, [0]), ids(0, 50, [1])
  assert first != second and first != ids(1, 50, [0]) and first != [str(i) for i in range(50)]
  # The documented rule, so that a run can be resumed by a later version.
  assert first == [str(i) for i in np.random.default_rng((0, 0)).permutation(50)]
  assert second == [str(i) for i in np.random.default_rng((0, 1)).permutation(50)]


@pytest.mark.parametrize("count, step, seed, batch_size",
                         [(0, 0, 0, 1), (5, -1, 0, 1), (5, 0, -1, 1), (5, 0, 0, 0)])
def test_batch_faults(count, step, seed, batch_size):
  with pytest.raises(ValueError, match="batch_at"):
    batch_at(numbered(count), step, seed, batch_size)


def test_a_pipe_is_not_waited_for(tmp_path):
  os.mkfifo(tmp_path / "pipe.jsonl")
  with pytest.raises(UserError, match="pipe.jsonl: a pipe or a device"):
    load_problems(str(tmp_path / "pipe.jsonl"))
