"""The chat command with piped lines: what it talks to, what it remembers, votes, the end of a reply, mistakes."""

import io
from pathlib import Path
import signal
import sys
import threading
from types import SimpleNamespace
from unittest import mock

from helpers_serve import PROMPT, export
import numpy as np
import pytest

from arrol_jax import chat, config as configuration
from arrol_jax.models.files.weights import load_policy
from arrol_jax.running.workdir import to_json
from arrol_jax.serving.conversation import Conversation, TooLong, printable
from arrol_jax.serving.service import Service

# One shape of everything: 56 tokens of prompt, 8 of a reply.
SMALL = ["--config.rollout.length_buckets=1", "--config.model.dtype=float32", "--max_new=8", "--context=64"]
TEMPLATE = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% else %};{{ m.content }};{% endif %}{% endfor %}"


def talk(monkeypatch, capsys, lines, *arguments):
  """The command with these lines on its standard input."""
  monkeypatch.setattr(sys, "argv", ["arrol-chat", *map(str, arguments)])
  monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines if isinstance(lines, bytes) else lines.encode())))
  try:
    configuration.run(chat.main)
    status = 0
  except SystemExit as e:
    status = e.code
  assert not [t for t in threading.enumerate() if t.name == "engine"]
  return SimpleNamespace(status=status, **dict(zip(("out", "err"), capsys.readouterr())))


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
  """The shipped model with a chat template, a head and a table."""
  path = export(tmp_path_factory.mktemp("chat"))
  loaded = load_policy(path)
  loaded.tokenizer.chat_template = TEMPLATE
  loaded.save(path)
  return path


@pytest.fixture(scope="module")
def trained(policy):
  """The run that has exported it, as far as the command looks at it."""
  folder = Path(policy).parent
  c, _ = configuration.parse(["x", "--config=configs/quickstart.py"])
  (folder / "config.json").write_text(to_json(c))
  (folder / "summary.json").write_text("{}")
  (folder / "checkpoints" / "2").mkdir(parents=True)
  return folder


def greedily(path, prompt, count):
  """The first tokens that a policy says, by whole forward passes."""
  loaded = load_policy(path)
  tokens = loaded.tokenizer.encode(prompt)
  start = len(tokens)
  for _ in range(count):
    logits = loaded.logits([tokens + [0] * (start + count - len(tokens))], [len(tokens)])
    tokens.append(int(logits[0, len(tokens) - 1].argmax()))
  return loaded.tokenizer.decode(tokens[start:])


def test_a_runs_policy_answers_each_line(trained, monkeypatch, capsys):
  """Greedily, as the exported policy does; unknown commands and bytes that are no text end nothing."""
  lines = f"{PROMPT}\n/what\n\n{PROMPT}\n".encode() + b"\xff\n/quit\n2+2>\n"
  done = talk(monkeypatch, capsys, lines, trained, "--temperature=0", *SMALL)
  first, what, again, *rest = done.out.splitlines()
  assert done.status == 0 and first == again and what == "(there are /reset and /quit)" and len(rest) == 1
  assert first == f"{greedily(trained, PROMPT, 8)} (cut off after 8 tokens: --max_new)"
  assert "at most 56 tokens of conversation and 8 of a reply; " in done.err and "each line is a prompt of its own" in done.err


def test_a_run_that_has_not_ended_answers_from_its_checkpoint(trained, monkeypatch):
  """Its policy/ may be older: that of a shorter run."""
  c = SimpleNamespace(model=SimpleNamespace(path="base"), checkpoint=SimpleNamespace(every=2))
  assert chat._weights_of(c, str(trained)) is None and c.model.path == f"{trained}/policy"
  (trained / "summary.json").rename(trained / "summary.away")
  c.model.path = "base"
  assert chat._weights_of(c, str(trained)) == str(trained) and c.model.path == "base"
  (trained / "summary.away").rename(trained / "summary.json")


def test_a_conversation_goes_on_until_it_is_reset(policy, monkeypatch, capsys):
  """What the engine is asked is the chat template of all that was said; it ends where the model has no room."""
  asked = []
  submit = Service.submit
  monkeypatch.setattr(Service, "submit", lambda self, call, told: (asked.append(call), submit(self, call, told))[1])
  done = talk(monkeypatch, capsys, "2+2>\n3+3>\n/reset\n2+2>\n" + "1+" * 60 + "1>\n", policy, "--temperature=0", *SMALL)
  tokenizer = load_policy(policy).tokenizer
  said = [tokenizer.decode(call.tokens) for call in asked]
  reply = done.out.splitlines()[0].removesuffix(" (cut off after 8 tokens: --max_new)")
  assert reply and said == ["2+2>", f"2+2>;{reply};3+3>", "2+2>"]
  assert done.out.splitlines()[2] == "(a new conversation)"
  assert "(the conversation has " in done.out.splitlines()[-1] and "at most 56 tokens fit; /reset" in done.out.splitlines()[-1]


def test_a_line_that_the_tokenizer_cannot_read_is_refused_and_named(policy, monkeypatch, capsys):
  done = talk(monkeypatch, capsys, "2+2 what>\n2+2>\n", policy, "--temperature=0", *SMALL)
  first, second = done.out.splitlines()
  assert first == "(the model's tokenizer has no token for ' ', 'w', 'h', 'a', 't' of messages)"
  assert second and not second.startswith("(")


def test_votes_show_what_the_head_thinks(policy, monkeypatch, capsys):
  """Each trace with its score and posterior, the chosen one marked, then its text."""
  done = talk(monkeypatch, capsys, "2+2>\n", policy, "--votes=4", r"--config.reward.pattern=(\d)", *SMALL)
  head, *rows, told, text = done.out.splitlines()
  assert head.split() == ["answer", "score", "posterior", "weight", "tokens"] and len(rows) == 4
  (chosen,) = [row for row in rows if row[0] == "*"]
  answer, score, posterior, _, tokens = chosen[1:].split()
  assert told.startswith(f"{answer} has ") and answer in text and int(tokens) <= 8
  # The table holds i successes and 127 - i failures in bin i of sigmoid(score).
  assert float(posterior) == pytest.approx(1 / (1 + np.exp(-float(score))), abs=0.02)


def test_ctrl_c_ends_a_reply_and_not_the_program(policy, monkeypatch, capsys):
  """The signal comes with the first piece; the next line is answered as ever. A suite in the background has it ignored."""
  real, pieces = chat.printable, []

  def first_piece(text):
    pieces.append(text)
    if len(pieces) == 1:
      signal.raise_signal(signal.SIGINT)
    return real(text)

  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    with mock.patch.object(chat, "printable", first_piece):
      done = talk(monkeypatch, capsys, "2+2>\n/reset\n3+3>\n", policy, "--temperature=0", *SMALL)
  finally:
    signal.signal(signal.SIGINT, before)
  stopped, reset, answered = done.out.splitlines()
  assert done.status == 0 and stopped.endswith(" (stopped)") and reset == "(a new conversation)" and "stopped" not in answered


@pytest.mark.parametrize("arguments, word", [
  ([], "give one run's folder or one model"), (["a", "b"], "give one run's folder or one model"),
  (["nowhere"], "model.path: nowhere does not exist"), (["{policy}", "--votes=0"], "--votes is '0'"),
  (["{policy}", "--temperature=warm"], "--temperature is 'warm'"), (["{policy}", "--max_new=4096"], "--max_new is '4096'"),
  (["{empty}"], "saved nothing yet")])
def test_mistakes_are_one_line(arguments, word, policy, tmp_path, monkeypatch, capsys):
  (tmp_path / "config.json").write_text('{"rollout": {"prompts": 1}}')
  done = talk(monkeypatch, capsys, "", *(a.format(policy=policy, empty=tmp_path) for a in arguments))
  assert done.status == 2 and word in done.err and len(done.err.splitlines()) == 1 and not done.out


@pytest.mark.parametrize("wanted, positions, sizes", [
  ((16, 48, 4096), 64, (16, 48)), ((512, 2048, 4096), 64, (32, 32)), ((512, 2048, 4096), 32768, (2048, 2048)),
  ((320, 512, 4096), 2048, (1536, 512))])
def test_a_conversation_has_the_room_that_the_model_has(wanted, positions, sizes):
  c = SimpleNamespace(rollout=SimpleNamespace())
  chat._resize(c, wanted, positions)
  assert (c.rollout.max_prompt, c.rollout.max_new) == sizes


def test_a_terminal_is_told_no_commands():
  assert printable("a\x1b[2Jb\n\tc\x9b\ud800") == "a␛[2Jb\n\tc\ufffd\ufffd"


def test_a_line_that_is_too_long_is_forgotten():
  tokenizer = mock.Mock(spec=["encode"], encode=lambda text: [0] * len(text))
  limits = SimpleNamespace(max_prompt=4, longest=2, vocab=9, tokenizer=tokenizer)
  one = Conversation(limits, False, "{problem}", None)
  with pytest.raises(TooLong, match="the line has 5 tokens and at most 4 tokens fit$"):
    one.ask("abcde")
  with pytest.raises(TooLong, match="9 characters"):
    one.ask("abcdefghi")
  assert one.messages == []
