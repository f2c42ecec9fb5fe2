"""The serving command and the parts under the server: limits, draws of rows that choose, what waits, votes without answers."""

import contextlib
import http.client
import json
import signal
import subprocess
import sys
from types import SimpleNamespace

from helpers_serve import OPTIONS, PROMPT, ROOT, ROWS, ask, export
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrol_jax import assemble, assemble_state, config as configuration, serve
from arrol_jax.engine.sampling import Sampling, SamplingParams, sample
from arrol_jax.running.checkpoint import Checkpoints
from arrol_jax.serving import votes
from arrol_jax.serving.calls import Call, Piece
from arrol_jax.serving.trace import Text, Trace
from arrol_jax.types import Rollout, UserError


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  return export(tmp_path_factory.mktemp("served"))


def test_rows_that_choose_draw_as_if_all_had_chosen_so():
  logits = jax.random.normal(jax.random.key(0), (6, 300)) * 2
  keys = jax.random.split(jax.random.key(1), 6)
  temperature, top_p = jnp.array([0.0, 0.5, 1.0, 1.0, 1.7, 0.5]), jnp.array([1.0, 1.0, 1.0, 0.3, 0.9, 0.2])
  mixed = sample(Sampling(None, (), "float32", confidence=5), keys, logits, SamplingParams(temperature, top_p, jnp.zeros(6)))
  for i in range(6):
    p = None if top_p[i] == 1 else float(top_p[i])
    own = sample(Sampling(float(temperature[i]), (), "float32", top_p=p, confidence=5), keys, logits)
    for a, b in zip(mixed, own, strict=True):
      np.testing.assert_allclose(a[i], b[i], rtol=1e-6)
  warm = SamplingParams(temperature, jnp.full(6, 0.1), jnp.zeros(6))
  for top_p in (1.0, 0.4):  # one top_p for all: the rows' own is not asked
    shared = sample(Sampling(None, (), "float32", top_p=top_p), keys, logits, warm)
    for i in range(6):
      own = sample(Sampling(float(temperature[i]), (), "float32", top_p=top_p), keys, logits)
      for a, b in zip(shared, own, strict=True):
        np.testing.assert_allclose(a[i], b[i], rtol=1e-6)


def test_half_characters_and_halves_of_stop_strings_wait():
  class Bytes:
    def decode(self, tokens, skip_special_tokens):
      return bytes(tokens).decode("utf-8", errors="replace")

  said = "aé#b##c€".encode()
  for stop, wanted in [((), "aé#b##c€"), (("##",), "aé#b")]:
    sequence = SimpleNamespace(tokens=[], logprobs=[], confidences=[], rollout=Rollout(0, 0, None, None, None))
    trace = Trace(SimpleNamespace(call=Call(None, 99, stop=stop)), 0, sequence, Bytes())
    texts, piece = [], None
    for i, byte in enumerate(said):
      for kept in (sequence.tokens, sequence.logprobs, sequence.confidences):
        kept.append(np.array([byte]))
      piece = trace.read(ended=i == len(said) - 1)
      texts.append(piece.text)
      assert "\ufffd" not in piece.text
      if piece.finish:
        break
    assert "".join(texts) == wanted and piece.finish == ("stop" if stop else "length")
    assert bytes(trace.tokens).decode() == (wanted + "##" if stop else wanted)


def test_what_was_decided_behind_a_stop_string_goes():
  """Two decisions, of which one read sees both: what is left is that of the tokens before the stop string."""
  decode = lambda tokens, skip_special_tokens: bytes(tokens).decode()
  rollout = Rollout(0, 0, None, None, None, scores=(-1.0, 2.0), posteriors=(0.3, 0.8), keep_probabilities=(1.0, 1.0))
  kept = [np.array(list(b"abcd#fgh"))]
  sequence = SimpleNamespace(tokens=kept, logprobs=kept, confidences=kept, rollout=rollout)
  ticket = SimpleNamespace(call=Call(None, 99, stop=("#",)))
  piece = Trace(ticket, 0, sequence, SimpleNamespace(decode=decode), (4, 8)).read(False)
  assert piece.text == "abcd" and piece.rollout.scores == (-1.0,) and piece.rollout.posterior == 0.3


@pytest.mark.parametrize("said, stop, wanted, tokens", [
  ("aé€b".encode(), "\ufffd", "aé€b", 7), ("aé€".encode()[:-1], "\ufffd", "aé\ufffd", 5),  # ended within a character
  ("aé\ufffdbc".encode(), "\ufffd", "aé", 7), ("aé\ufffdbc".encode(), "\ufffdb", "aé", 7), (b"a\xffbc", "\ufffd", "a", 3),
  ("aé".encode() + b"\xf0", "é\ufffd", "aé\ufffd", 4), ("aé€bc".encode(), "€", "aé", 6)])
@pytest.mark.parametrize("at_once", [1, 2, 100])
def test_half_a_character_is_no_stop_string(said, stop, wanted, tokens, at_once):
  decode = lambda tokens, skip_special_tokens: bytes(tokens).decode("utf-8", errors="replace")
  sequence = SimpleNamespace(tokens=[], logprobs=[], confidences=[], rollout=Rollout(0, 0, None, None, None))
  trace = Trace(SimpleNamespace(call=Call(None, 99, stop=(stop,))), 0, sequence, SimpleNamespace(decode=decode))
  text = ""
  for i in range(0, len(said), at_once):
    for kept in (sequence.tokens, sequence.logprobs, sequence.confidences):
      kept.append(np.array(list(said[i:i + at_once])))
    piece = trace.read(ended=i + at_once >= len(said))
    text += piece.text
    if piece.finish:
      break
  assert (text, len(trace.tokens), piece.finish) == (wanted, tokens, "length" if wanted == decode(said, True) else "stop")


@pytest.mark.parametrize("step", [1, 3, 16])
def test_text_piece_by_piece_is_the_text_of_all_tokens(step):
  """With a tokenizer whose tokens end within characters, and one that drops a space at the start."""
  class Spaces:
    def decode(self, tokens, skip_special_tokens):
      return "".join(f" {token}" for token in tokens if token != 7).removeprefix(" ")

  class Bytes:
    def decode(self, tokens, skip_special_tokens):
      return bytes(tokens).decode("utf-8", errors="replace")

  rng = np.random.default_rng(step)
  for tokenizer, tokens in [(Spaces(), rng.integers(0, 10, 40).tolist()), (Bytes(), list("né – 日本 🙂🙂 x\ufffdy".encode())),
                            (Bytes(), rng.integers(0, 256, 60).tolist() + [65])]:
    text, decoded = Text(tokenizer), []
    tokenizer.decode = lambda x, decode=tokenizer.decode, log=decoded, **kw: log.append(len(x)) or decode(x, **kw)
    for end in range(step, len(tokens) + step, step):
      said = text.of(tokens[:end])
    assert said == tokenizer.decode(tokens, skip_special_tokens=True)
    assert isinstance(tokenizer, Bytes) or max(decoded[:-1]) <= 2 * step + 4  # not all of it again


def test_a_vote_without_answers_gives_the_best_trace_that_was_not_stopped():
  pieces = [Piece(i, "", [1], [-1.0], finish, Rollout(0, 0, None, None, None, final=score))
            for i, (finish, score) in enumerate([("length", 0.1), ("length", 0.5), ("hopeless", 2.0)])]
  vote = votes.tally("quality", ["no", "no", r"\boxed{3}"], pieces, None, 8)
  assert vote.answer is None and vote.chosen == 1 and vote.weights == [0, 0, 0]
  ended = [piece._replace(finish="stop") for piece in pieces]
  sameness = votes.Sameness()
  vote = votes.tally("majority", [r"\boxed{1/2}", r"\boxed{3}", r"\boxed{0.5}"], ended, None, 8, sameness.ask)
  sameness.close()
  assert vote.answer == "1/2" and vote.chosen == 0 and abs(vote.weight - 2 / 3) < 1e-9


@pytest.mark.slow
def test_the_command_serves_an_exported_policy_and_drains(exported):
  """SIGTERM while a call streams: the call ends as it should, no new one is taken, and the exit status is 0."""
  process = subprocess.Popen([sys.executable, "-m", "arrol_jax.serve", *OPTIONS, f"--config.model.path={exported}", "--port=0"],
                             cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
  line = process.stdout.readline()
  assert line.startswith("serving run at http://127.0.0.1:"), line + process.stderr.read()
  port = int(line.rsplit(":", 1)[1])
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
  connection.request("POST", "/v1/completions", json.dumps({"prompt": PROMPT, "n": ROWS + 4, "stream": True, "temperature": 0}))
  answer = connection.getresponse()
  first = answer.readline()
  process.send_signal(signal.SIGTERM)
  rest = answer.read().decode()
  connection.close()
  out, err = process.communicate(timeout=60)
  assert first.startswith(b"data: ") and rest.count('"finish_reason": "stop"') == ROWS + 4 and rest.endswith("[DONE]\n\n")
  assert process.returncode == 0 and out == "drained\n" and "Traceback" not in err
  with pytest.raises(ConnectionRefusedError):
    ask(port, {"prompt": PROMPT})


@pytest.mark.parametrize("options, word", [(["--port=x"], "--port"), (["--port=99999"], "--port"), (["--queue=-1"], "--queue"),
                                           (["--workdir=nowhere"], "no checkpoint"), (["--host=999.1.1.1"], "cannot listen")])
def test_mistakes_on_the_command_line_end_in_one_line(monkeypatch, capsys, options, word):
  monkeypatch.setattr(sys, "argv", ["prog", *OPTIONS, "--port=0", *options])
  with pytest.raises(SystemExit) as e:
    configuration.run(serve.main)
  err = capsys.readouterr().err
  assert e.value.code == 2 and word in err and len(err.splitlines()) == 1


def test_limits_follow_the_config(exported):
  c, _ = configuration.parse(["prog", *OPTIONS, f"--config.model.path={exported}", "--config.eval.max_new=40"])
  _, limits = serve.load(c, None, 3)
  assert (limits.max_prompt, limits.max_new, limits.max_traces, limits.vocab) == (16, 40, ROWS + 3, 19)
  assert limits.scored and limits.calibrated and limits.pattern == c.reward.pattern
  assert assemble.sampling(c, SimpleNamespace(eos_ids=(18,), config=SimpleNamespace(layers=2))).temperature is None


def test_a_checkpoint_is_served_with_its_head(tmp_path):
  c, _ = configuration.parse(["prog", *OPTIONS])
  mesh, workdir = assemble.make_mesh(c), str(tmp_path / "trained")
  state = assemble_state.init_state(c, assemble.load(c, mesh), assemble.optimizer(c), mesh, keep_params=False)
  state.params["policy"]["final_norm"] = jnp.zeros_like(state.params["policy"]["final_norm"])
  checkpoints = Checkpoints(workdir, 1)
  checkpoints.save(3, state)
  checkpoints.close()
  service, limits = serve.load(c, workdir, 3)
  assert limits.model == "trained" and limits.scored and limits.calibrated
  assert not service.engine.params["final_norm"].any()


@pytest.mark.parametrize("flags, words", [
  (["--host="], "--host is empty"), (["--name=\udcff"], "--name is"), (["--config.reward.pattern=("], "reward.pattern: "),
  (["--prefix_cache=1"], "rollout.max_prompt is 16"),
  (["--prefix_cache=1000000", "--config.rollout.max_prompt=40", "--config.rollout.max_new=24"], "no room for so many MiB")])
def test_flags_that_cannot_be_are_told_before_anything_is_served(monkeypatch, flags, words):
  monkeypatch.setattr(serve, "Front", lambda listener, _: contextlib.closing(listener))
  monkeypatch.setattr(sys, "argv", ["serve", "--config=quickstart", "--port=0", "--config.rollout.slots=2", *flags])
  with pytest.raises(UserError, match=words.replace(".", "[.]")):
    serve.main()


def test_a_run_without_its_config_is_told_from_no_run(tmp_path):
  (tmp_path / "checkpoints" / "3").mkdir(parents=True)
  with pytest.raises(UserError, match="has checkpoints and no config.json"):
    configuration.parse(["serve", f"--workdir={tmp_path}"])
