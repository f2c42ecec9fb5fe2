"""A linear head that reads all there is: its score where a stop string cut a trace is that of the last token kept, and only those
who ask for scores pay for it."""

import dataclasses

from helpers_serve import PROMPT, ask, serving, with_positions
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrol_jax.engine.compile_ahead import compile_ahead
from arrol_jax.engine.scheduler import Request
from arrol_jax.models.files.weights import load_policy
from arrol_jax.prune import Calibration
from arrol_jax.pruning import features
from arrol_jax.running import hosts
from arrol_jax.serving import pace, warming

INPUTS = ("last", "mean", "last@1/3", "mean@2/3", "prompt@2/3", "logprobs", "windows", "siblings")
DETECT = 16


@pytest.fixture(scope="module")
def server(tmp_path_factory):
  """The shipped model with a head of one boundary and the last token; siblings weigh nothing in the last token's part, as what
  they had said by then is not known afterwards."""
  policy = load_policy("experiments/arithmetic/signs")
  count = features.width(INPUTS, policy.config.width)
  weights = lambda seed: jax.random.normal(jax.random.key(seed), (2, count)).at[1, -1].set(0.0) / count**0.5
  ones = jnp.ones(2)
  policy.head = {"mean": 0.1 * weights(0), "level": 0.5 * ones, "between": weights(1), "within": weights(2), "spread": ones}
  policy.head_inputs, policy.detect = INPUTS, (DETECT,)
  policy.calibration = Calibration(*(jnp.broadcast_to(x, (2, 128)) for x in (jnp.arange(128.0), jnp.arange(128.0)[::-1])))
  path = tmp_path_factory.mktemp("ridge") / "policy"
  policy.save(path)
  with serving(with_positions(path)) as out:
    yield out


def test_the_score_is_that_of_the_last_token_kept(server):
  """With max_tokens so that the engine ends where the stop string does, the score must be the same."""
  assert server.service.voters.inputs == INPUTS and server.limits.calibrated
  base = {"prompt": PROMPT, "n": 8, "seed": 3, "temperature": 1.2, "vote": "quality"}
  _, whole = ask(server.port, base)
  for stop in (";", "=1"):
    _, cut = ask(server.port, base | {"stop": stop})
    traces = cut["vote"]["traces"]
    assert sum(t["finish_reason"] == "stop" and stop not in t["text"] for t in traces) >= 5
    for i, trace in enumerate(traces):
      _, same = ask(server.port, base | {"max_tokens": trace["tokens"]})
      assert trace["score"] == pytest.approx(same["vote"]["traces"][i]["score"], abs=1e-3)
    assert any(abs(a["score"] - b["score"]) > 0.01 for a, b in zip(traces, whole["vote"]["traces"], strict=True))


def test_a_vote_ranks_by_these_scores(server):
  base = {"prompt": PROMPT, "n": 8, "seed": 3, "temperature": 1.2, "vote": "quality", "stop": "Z"}
  _, answer = ask(server.port, base)
  voters = [t for t in answer["vote"]["traces"] if t["answer"] is not None]
  assert len(voters) > 2
  order = np.argsort([t["score"] for t in voters])
  weights = [voters[i]["weight"] for i in order]  # equal traces share theirs
  assert (np.diff(weights) >= 0).all() and weights[-1] > 0.5 > weights[0]


def test_hopeless_traces_end_at_the_decision(server):
  base = {"prompt": PROMPT, "n": 8, "seed": 3, "temperature": 1.2, "vote": "quality"}
  _, free = ask(server.port, base)
  posterior = [t["posterior"] for t in free["vote"]["traces"]]
  _, some = ask(server.port, base | {"stop_below": float(np.median(posterior))})
  ended = [t for t in some["vote"]["traces"] if t["finish_reason"] == "hopeless"]
  assert 0 < len(ended) < 8 and all(t["tokens"] == DETECT and t["answer"] is None for t in ended)


# ---- what it costs ------------------------------------------------------------------------------------------


def decode(run, decide, judged=()):
  """Twelve calls of 40 tokens, a few more before each of the first segments; those numbered in `judged` ask for scores. The
  segments' steps, after how many of them there was a decision, and the rollouts."""
  steps, decisions, sizes, rollouts, started = run.steps, [], [], [], iter(range(12))
  run.steps = lambda live: sizes.append(steps(live)) or sizes[-1]
  def decided(slots, lengths):
    decisions.append(len(sizes))
    return decide(slots, lengths)
  for count in (2, 0, 4, 1, 0, 3, 2):
    for i in (next(started) for _ in range(count)):
      rollouts.append(run.add(Request(i, i, np.arange(2, 6, dtype=np.int32), 40, ignore_stop=True, judged=i in judged)).rollout)
    run.advance(decided)
  while run.advance(decided):
    pass
  return sizes, decisions, rollouts


@pytest.fixture
def engine(server, monkeypatch):
  """Of 16 rows in two sizes, with segments as on a GPU."""
  monkeypatch.setattr(pace.programs, "asks_nobody", lambda: True)
  engine = dataclasses.replace(server.service.engine, rows=16, row_buckets=2, segment=16)
  with jax.set_mesh(engine.mesh):
    yield engine


def test_only_those_who_ask_for_scores_pay_for_the_head(server, engine, monkeypatch):
  monkeypatch.setattr(pace, "SOME", 8)  # beyond these, whole segments
  monkeypatch.setattr(pace, "MANY", 8)
  s = server.service
  make = lambda detect: pace.PacedRun(engine, s.sampling, detect)
  plain, none, texts = decode(make(()), None)
  same, decisions, _ = decode(make((DETECT,)), s.decide)
  assert same == plain and decisions == none == [] and plain.count(16) >= 2
  asked, decisions, rollouts = decode(make((DETECT,)), s.decide, judged={0, 1})
  assert asked != plain and 0 < len(decisions) < len(asked)
  assert [len(rollouts[i].scores) for i in (0, 1)] == [1, 1] and np.isfinite([rollouts[i].final for i in (0, 1)]).all()
  for mine, other in zip(rollouts, texts, strict=True):
    assert mine.tokens.tolist() == other.tokens.tolist() and len(mine.tokens) == 40


def test_what_is_compiled_side_by_side_is_all_that_serving_needs(server, engine):
  """Every program is in the list, with the very arguments that it is called with: else it would be compiled once more."""
  s, compiling = server.service, hosts.Compiling()
  make = lambda: pace.PacedRun(engine, s.sampling, s.detect)
  listed = warming.listed(make(), s.judging)
  assert len({program.name for program in listed}) == len(listed)
  compile_ahead(listed, engine.mesh)
  assert compiling.seconds() > 0
  warming.try_all(make, s.judging)
  for judged in ((), {3, 5}):
    run = make()
    decode(run, s.decide, judged)
  run.add(Request(0, 0, np.arange(2, 6, dtype=np.int32), 40, top_p=0.5))
  run.advance(s.decide)
  run.cancel([sequence for sequence in run.slot_to_request if sequence])
  assert compiling.seconds() == 0


@pytest.mark.parametrize("asks", [False, True])
def test_the_warm_up_says_how_far_it_is(server, engine, asks, monkeypatch):
  monkeypatch.setattr(pace.programs, "asks_nobody", lambda: not asks)
  said, s = [], server.service
  warming.warm_up(lambda: pace.PacedRun(engine, s.sampling, s.detect), s.judging, said.append)
  count = len(warming.listed(pace.PacedRun(engine, s.sampling, s.detect), s.judging))
  assert said[-1].startswith(f"compiling: {count} of {count} programs, ")
