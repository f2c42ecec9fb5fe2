"""Sources: whichever way problems come in, the batches are the same; faults name the place and end with status 2."""

import gzip
import inspect
import json
from pathlib import Path
import re
import shutil
import subprocess
import sys
import textwrap

from hypothesis import given, settings, strategies as st
import pytest

from arrol_jax import evaluate, train
from arrol_jax.data import sources
from arrol_jax.data.problems import Problem, Prompt, batch_at, encode_prompts, load_problems
from arrol_jax.rewards import Graded, Grader, extract_answer
from arrol_jax.types import UserError
from configs import base, templates

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"

RECORDS = [{"id": f"p{i}", "problem": f"Wie viel ist ${i}+1$? 多少\u2028", "answer": f"\\frac{{{i}}}{{7}}", "source": "toy"}
           for i in range(23)]


@pytest.fixture
def folder(tmp_path):
  """A data folder with two benchmarks: gsm8k with both its files, aime24 gzipped."""
  out = tmp_path / "data"
  out.mkdir()
  text = "".join(json.dumps(r) + "\n" for r in RECORDS)
  (out / "gsm8k_train.jsonl").write_text(text)
  (out / "gsm8k_test.jsonl").write_text("".join(json.dumps(r) + "\n" for r in RECORDS[:5]))
  (out / "aime24.jsonl.gz").write_bytes(gzip.compress(text.replace('"id": "p', '"id": "a').encode()))
  return out


class Letters:
  chat_template = None

  def __call__(self, texts, add_special_tokens, return_attention_mask):
    return {"input_ids": [[1] * add_special_tokens + [ord(c) % 99 for c in text] for text in texts]}


def batches(problems, hosts: int = 1):
  """Tokens and ids of seven steps of eight prompts, host by host."""
  prompts, _ = encode_prompts(problems, Letters(), "Q {problem} A", False, 999)
  return [[(p.problem, p.text, p.tokens.tolist()) for host in range(hosts) for p in batch_at(prompts, step, 3, 8, host, hosts)]
          for step in range(7)]


def test_a_name_chooses_the_file_by_use(folder):
  assert len(sources.load_problems("gsm8k", "train", str(folder))) == 23
  assert len(sources.load_problems("gsm8k", "test", str(folder))) == 5
  assert len(sources.load_problems("gsm8k_train", "test", str(folder))) == 23  # a file's own name
  both = sources.load_problems(f"aime24, {folder}/gsm8k_test.jsonl", "test", str(folder))
  assert [p.id for p in both] == [f"a{i}" for i in range(23)] + [f"p{i}" for i in range(5)]


def test_tfds_and_jsonl_give_the_same_batches(folder, tmp_path, capsys):
  pytest.importorskip("tensorflow_datasets")
  plain = sources.load_problems("gsm8k", "train", str(folder))
  copied = sources.load_problems("tfds:gsm8k", "train", str(folder), str(tmp_path / "tfds"))
  assert batches(plain) == batches(copied) == batches(copied, hosts=4)
  assert [vars(p) for p in copied] == RECORDS
  assert capsys.readouterr().out == ""  # stdout is the run's
  assert "tensorflow" not in sys.modules
  assert [p.suffix.startswith(".array_record") for p in (tmp_path / "tfds").rglob("*train*-of-*")] == [True]


def test_tfds_copies_again_when_the_file_changes(folder, tmp_path):
  pytest.importorskip("tensorflow_datasets")
  file, place = folder / "gsm8k_train.jsonl", str(tmp_path / "tfds")
  assert len(sources.load_problems(f"tfds:{file}", "train", tfds_dir=place)) == 23
  file.write_text(file.read_text().replace('"p22"', '"new"'))
  assert sources.load_problems(f"tfds:{file}", "train", tfds_dir=place)[-1].id == "new"
  file.write_text(file.read_text() + "{}\n")
  with pytest.raises(UserError, match=r"gsm8k_train\.jsonl, line 24: field 'id' is missing"):
    sources.load_problems(f"tfds:{file}", "train", tfds_dir=place)
  (tmp_path / "file").write_text("")
  with pytest.raises(UserError, match="no TFDS copy"):
    sources.load_problems("tfds:gsm8k", "test", str(folder), str(tmp_path / "file"))


def test_tfds_copies_made_at_once_become_one(folder, tmp_path, monkeypatch):
  pytest.importorskip("tensorflow_datasets")
  from arrol_jax.data.tfds import ArrolProblems
  alone = ArrolProblems._generate_examples

  def another_is_faster(builder):
    monkeypatch.setattr(ArrolProblems, "_generate_examples", alone)
    assert len(sources.load_problems("tfds:gsm8k", "train", str(folder), str(tmp_path / "tfds"))) == 23
    yield from alone(builder)

  monkeypatch.setattr(ArrolProblems, "_generate_examples", another_is_faster)
  assert [vars(p) for p in sources.load_problems("tfds:gsm8k", "train", str(folder), str(tmp_path / "tfds"))] == RECORDS


def test_a_damaged_tfds_copy_is_told_and_can_be_made_anew(folder, tmp_path):
  pytest.importorskip("tensorflow_datasets")
  read = lambda: sources.load_problems("tfds:gsm8k", "train", str(folder), str(tmp_path / "tfds"))
  read()
  (records,) = (tmp_path / "tfds").rglob("*array_record-*-of-*")
  whole = records.read_bytes()
  middle = len(whole) // 2
  for damaged in (whole[:middle], whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1:]):
    records.write_bytes(damaged)
    with pytest.raises(UserError, match=f"copy is damaged; delete {records.parent} ") as told:
      read()
    assert "\n" not in str(told.value)
  shutil.rmtree(records.parent)
  assert [vars(p) for p in read()] == RECORDS


def test_hugging_face_and_jsonl_give_the_same_batches(folder, tmp_path, monkeypatch):
  datasets = pytest.importorskip("datasets")
  datasets.disable_progress_bars()
  hf = tmp_path / "hf"
  hf.mkdir()
  datasets.Dataset.from_list(RECORDS).to_parquet(hf / "train.parquet")
  rows = [{"uid": r["id"], "messages": [{"content": r["problem"]}], "source": r["source"],
           "reward": {"truth": f"so\n#### {r['answer']}"}} for r in RECORDS]
  nested = tmp_path / "nested"
  nested.mkdir()
  datasets.Dataset.from_list(rows).to_parquet(nested / "test.parquet")
  plain = sources.load_problems("gsm8k", "train", str(folder))
  read = sources.load_problems(f"hf:{hf}?id=id&source=source", "train")
  other = sources.load_problems(
    f"hf:{nested}?split=test&id=uid&problem=messages.0.content&answer=reward.truth&pattern=hashes&source=source", "train")
  assert plain == read == other
  assert batches(plain) == batches(read) == batches(other, hosts=2)
  unnamed = sources.load_problems(f"hf:{hf}", "train")
  assert (unnamed[3].id, unnamed[3].source) == (f"{hf}-3", str(hf))
  for source, message in ((f"hf:{hf}?answer=gold", r"row 0: no column 'gold' \(there are: id, problem"),
                          (f"hf:{hf}?pattern=hashes", "row 0: field 'answer' must be text"),
                          (f"hf:{hf}?split=dev", "Unknown split"), (f"hf:{hf}/none", "hf:")):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message):
      sources.load_problems(source, "train")


def test_reasoning_gym_wants_the_whole_point():
  pytest.importorskip("reasoning_gym")
  from arrol_jax.rewards import gym
  source = "reasoning_gym:basic_arithmetic?size=5&seed=1&max_terms=3"
  problems = sources.load_problems(source, "train")
  assert problems == sources.load_problems(source, "train") and len(problems) == 5
  assert problems != sources.load_problems(source.replace("seed=1", "seed=2"), "train")
  truth = gym._dataset("basic_arithmetic", json.dumps({"max_terms": 3, "seed": 1, "size": 5}))[0]["answer"]
  said = [f"\\boxed{{{truth}}}", f"\\boxed{{it is {truth}}}", f"\\boxed{{{truth}9}}", f"it is {truth}", r"\boxed{}"]
  with Grader(1, timeout_s=60, reward_fn="arrol_jax.rewards.gym.score") as grader:
    items = [(text, problems[0].answer) for text in said] + [(r"\boxed{12}", "12"), (r"\boxed{13}", "12")]
    assert [g.reward for g in grader.grade_all(items)] == [1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0]
    moved = json.loads(problems[0].answer) | {"question": "another"}
    assert grader.grade_all([(said[0], json.dumps(moved))]) == [Graded(0.0, "error")]
  with Grader(1, "hashes", timeout_s=60, reward_fn="arrol_jax.rewards.gym.score") as grader:
    items = [(text, problems[0].answer) for text in (f"#### {truth}", said[0])]
    assert [g.reward for g in grader.grade_all(items)] == [1.0, 0.0]
  problems = sources.load_problems("reasoning_gym:ransom_note?size=4&seed=0", "train")  # draws in the order of a set
  assert problems == sources.load_problems("reasoning_gym:ransom_note?size=4&seed=0", "train")
  with Grader(1, timeout_s=60, reward_fn="arrol_jax.rewards.gym.score") as grader:
    grades = [grader.grade_all([(f"\\boxed{{{said}}}", p.answer) for said in ("True", "False")]) for p in problems]
    assert [sorted(g.reward for g in pair) for pair in grades] == [[0.0, 1.0]] * 4 and not grader.counts["error"]
  for bad in ("reasoning_gym:no_such_task?size=5&seed=1", "reasoning_gym:basic_arithmetic?size=5&seed=1&wheels=4"):
    with pytest.raises(UserError, match=bad.partition("?")[0]):
      sources.load_problems(bad, "train")


GYM = """
  import time
  time.sleep(2)  # a slow import: longer than an item may take

  class Sums:
    def __init__(self, size, seed):
      self.size, self.seed = size, seed

    def __len__(self):
      return self.size

    def __getitem__(self, i):
      return {"question": f"{self.seed}+{i}?", "answer": str(self.seed + i)}

    def score_answer(self, answer, entry):  # as the tasks do: some credit for the answer somewhere in a text
      return 1.0 if answer == entry["answer"] else 0.5 if entry["answer"] in answer else 0.01

  def create_dataset(task, size, seed):
    print("a task that prints")
    if task != "sums":
      raise ValueError(f"no task {task}")
    return Sums(size, seed)
"""


def test_a_task_is_read_and_graded_with_its_imports_before_the_deadline(tmp_path, monkeypatch):
  (tmp_path / "reasoning_gym.py").write_text(textwrap.dedent(GYM))
  monkeypatch.syspath_prepend(tmp_path)
  problems = sources.load_problems("reasoning_gym:sums?size=3&seed=40", "train")
  assert [(p.id, p.problem) for p in problems] == [(f"reasoning_gym:sums-40-{i}", f"40+{i}?") for i in range(3)]
  said = {r"\boxed{42}": 1.0, r"40 + 2 = 42": 0.0, r"\boxed{it is 42}": 0.0, r"\boxed{}": 0.0, r"\boxed{42} or \boxed{41}": 0.0}
  with Grader(1, timeout_s=1.5, reward_fn="arrol_jax.rewards.gym.score") as grader:
    grades = grader.grade_all([(text, problems[2].answer) for text in said])
    assert [g.reward for g in grades] == list(said.values()) and grader.counts == {"correct": 1, "wrong": 4}
  with pytest.raises(UserError, match="reasoning_gym:products.*no task products"):
    sources.load_problems("reasoning_gym:products?size=3&seed=40", "train")


@pytest.mark.parametrize("source, message", [
  ("nope", r"nope\.jsonl does not exist .*known: gsm8k, math"), ("no/file.jsonl", "no/file.jsonl does not exist"),
  ("hf:", "hf:: names nothing"), ("hf:?split=train", "names nothing"), ("tfds:", "names nothing"),
  ("tfds:nope", r"nope\.jsonl does not exist"), ("tfds:gsm8k?a=1", "no options"), ("hf:x/y?wheels=4", "unknown wheels"),
  ("reasoning_gym:basic_arithmetic", "how many entries"), ("gsm8k,gsm8k", "id 'p0' was used before, in .*line 1"),
  ("hf:x/y?pattern=(", "not a regular expression"), ("hf:x/y?pattern=abc", "has no group"),
])
def test_faults(folder, source, message):
  for module in {"tfds": "tensorflow_datasets", "hf": "datasets"}.keys() & {source.partition(":")[0]}:
    pytest.importorskip({"tfds": "tensorflow_datasets", "hf": "datasets"}[module])
  with pytest.raises(UserError, match=message):
    sources.load_problems(source, "train", str(folder))
  if source != "gsm8k,gsm8k":
    with pytest.raises(UserError, match=message):
      sources.check(source, "train", str(folder))


@pytest.mark.parametrize("source, folder, words", [
  ("data/gsm8k_train.jsonl", "", "; arrol-get gsm8k writes it"),
  ("there/math500.jsonl", "", "; arrol-get math500 --dir=there writes"),
  ("gsm8k", "data", "; arrol-get gsm8k writes it"), ("dapo_math_17k.jsonl", "", "; arrol-get dapo-math-17k --dir=. writes it")])
def test_a_file_that_arrol_get_writes(tmp_path, monkeypatch, source, folder, words):
  """Who trains before arrol-get is told of it."""
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match="does not exist.*" + words):
    sources.check(source, "train", folder)
  with pytest.raises(UserError, match=r"mine\.jsonl does not exist$"):
    sources.check("data/mine.jsonl", "train", folder)


def test_a_name_without_a_folder_and_a_missing_package(monkeypatch):
  with pytest.raises(UserError, match=r"gsm8k is no \.jsonl file; .*data\.folder"):
    sources.check("gsm8k", "train")
  monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
  for source in ("tfds:gsm8k", "hf:a/b", "reasoning_gym:x?size=1&seed=0"):
    with pytest.raises(UserError, match="is not installed: pip install"):
      sources.check(source, "train")


def test_training_from_jsonl_imports_none_of_the_extras(folder):
  code = f"""import sys
from arrol_jax import assemble, config
from arrol_jax.data import sources
assert len(sources.load_problems("gsm8k", "train", {str(folder)!r})) == 23
extras = "tensorflow_datasets", "importlib_resources", "datasets", "reasoning_gym", "tensorflow"
print([name for name in extras if name in sys.modules])"""
  done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
  assert done.stdout == "[]\n"


def test_tfds_is_imported_before_threads_begin(folder, tmp_path):
  """While it is, `import` is another function in all threads; what is read later leaves it alone."""
  pytest.importorskip("tensorflow_datasets")
  code = f"""import sys
from arrol_jax.data import sources
sources.import_early("gsm8k", "a.jsonl, b.jsonl")
assert "tensorflow_datasets" not in sys.modules
sources.import_early("gsm8k", "a.jsonl, tfds:gsm8k")
from etils.epy import lazy_imports_utils
lazy_imports_utils._lazy_import = None  # what stands in for `import`
assert len(sources.load_problems("tfds:gsm8k", "train", {str(folder)!r}, {str(tmp_path / "tfds")!r})) == 23"""
  subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
  for command in (train, evaluate):
    code = inspect.getsource(command.main)
    assert 0 < code.index("sources.import_early(") < code.index("tokenizers.import_early()")


# --- batches over hosts -------------------------------------------------------------------------------------

def numbered(count: int) -> list[Prompt]:
  return [Prompt(Problem(str(i), "q", "1", "s"), "q", None) for i in range(count)]


@given(st.integers(1, 30), st.integers(1, 4), st.lists(st.sampled_from([1, 2, 3, 4, 6, 12]), min_size=1, max_size=6),
       st.integers(0, 2**32))
@settings(max_examples=150, deadline=None)
def test_nothing_is_lost_or_repeated_when_hosts_come_and_go(count, factor, hosts_of_step, seed):
  prompts, size = numbered(count), 12 * factor
  seen = []
  for step, hosts in enumerate(hosts_of_step):  # each step may be another run's, on another number of hosts
    parts = [batch_at(prompts, step, seed, size, host, hosts) for host in range(hosts)]
    assert {len(part) for part in parts} == {size // hosts}
    assert sum(parts, []) == batch_at(prompts, step, seed, size)
    seen += [p.problem.id for part in parts for p in part]
  for epoch in range(len(seen) // count):
    assert sorted(seen[epoch * count:(epoch + 1) * count], key=int) == [str(i) for i in range(count)]
  assert len(set(seen[len(seen) // count * count:])) == len(seen) % count


@pytest.mark.parametrize("size, host, hosts", [(8, 0, 3), (8, 2, 2), (8, -1, 2), (8, 0, 0)])
def test_host_faults(size, host, hosts):
  with pytest.raises(ValueError, match="host"):
    batch_at(numbered(5), 0, 0, size, host, hosts)


# --- templates ----------------------------------------------------------------------------------------------

def test_templates_are_plain_config_strings():
  for template in (templates.BOXED, templates.BASE_BOXED, templates.ANSWER, templates.GSM8K_FEWSHOT):
    c = base.get_config()
    c.data.template = template
    prompts, _ = encode_prompts([Problem("1", "What is {x}?", "1", "s")], Letters(), c.data.template, False, 9999)
    assert prompts[0].text == template.replace("{problem}", "What is {x}?") and prompts[0].text.count("What is {x}?") == 1


def test_the_examples_of_the_few_shot_prompt_are_right_and_read_as_meant():
  shown = templates.GSM8K_FEWSHOT.split("\n\n")[:-1]
  assert [extract_answer(text, "hashes") for text in shown] == ["19", "126", "215", "9"]
  for text in shown:  # each equation in them holds
    for left, right in re.findall(r"([\d*/+ -]+\d) = (\d+)", text):
      assert eval(left) == int(right), (left, right)
  assert templates.GSM8K_FEWSHOT.count("{problem}") == 1 and templates.GSM8K_FEWSHOT.endswith("Answer:")
  went_on = " 2 + 2 = 4.\n#### 4\n\nQuestion: What is 3 + 3?\nAnswer: 6\n#### 6"
  assert extract_answer(went_on, "first_hashes") == "4" and extract_answer(went_on, "hashes") == "6"


# --- through the command ------------------------------------------------------------------------------------

GOOD = (json.dumps(RECORDS[0]) + "\n").encode()
CUT = gzip.compress(b"".join((json.dumps(r) + "\n").encode() for r in RECORDS))


@pytest.mark.parametrize("name, content, words", [
  ("a.jsonl", GOOD + b'{"id": 1,\n', ["a.jsonl, line 2", "not JSON"]),
  ("a.jsonl", GOOD + b'{"id": "q"}\n', ["a.jsonl, line 2", "'problem' is missing"]),
  ("a.jsonl", GOOD + GOOD, ["a.jsonl, line 2", "was used before", "line 1"]),
  ("a.jsonl", b"", ["a.jsonl", "empty"]),
  ("a.jsonl", GOOD + '{"id": "é"}\n'.encode("latin-1"), ["a.jsonl, line 2", "not UTF-8"]),
  ("a.jsonl.gz", CUT[:len(CUT) // 2], ["a.jsonl.gz, line", "truncated"]),
])
@pytest.mark.parametrize("prefix", ["", "tfds:"])
def test_broken_files_end_the_command_with_status_2(tmp_path, monkeypatch, capsys, prefix, name, content, words):
  from arrol_jax import config, train
  if prefix:
    pytest.importorskip("tensorflow_datasets")
  (tmp_path / name).write_bytes(content)
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(sys, "argv", ["train.py", "--config=configs/quickstart.py", f"--workdir={tmp_path}/run",
                                    f"--config.data.train={prefix}{tmp_path}/{name}"])
  with pytest.raises(SystemExit) as stopped:
    config.run(train.main)
  err = capsys.readouterr().err.splitlines()
  assert stopped.value.code == 2 and err[-1].startswith("error: ") and len(err) == 1
  assert all(word in err[0] for word in words), err[0]
  assert not (tmp_path / "run/config.json").exists()  # the folder is still free


@pytest.mark.parametrize("override, word", [
  ("data.train=gsm8k", "data.folder"), ("data.train=reasoning_gym:basic_arithmetic?size=9&seed=1", "reward.function"),
  ("reward.function=no.such.function", "no.such.function"), ("data.system=Be_brief", "chat template"),
])
def test_mistakes_in_the_config(tmp_path, monkeypatch, capsys, override, word):
  from arrol_jax import config, train
  if "reasoning_gym" in override:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
  monkeypatch.chdir(ROOT)
  monkeypatch.setattr(sys, "argv", ["train.py", "--config=configs/quickstart.py", f"--workdir={tmp_path}/run",
                                    f"--config.{override}"])
  with pytest.raises(SystemExit) as stopped:
    config.run(train.main)
  err = capsys.readouterr().err.splitlines()
  assert stopped.value.code == 2 and len(err) == 1 and word in err[0], err


@pytest.mark.parametrize("name", sorted(sources.BENCHMARKS))
def test_every_benchmark_is_there_by_name(name):
  if not DATA.exists():
    pytest.skip("no ../shared/data")
  for split, file in zip(("train", "test"), sources.BENCHMARKS[name]):
    assert sources.load_problems(name, split, str(DATA)) == load_problems(f"{DATA}/{file}.jsonl")
