"""Steps whose rollouts run ahead of the update: the same rollouts as one step after another, by the policies that they say."""

import math
from types import SimpleNamespace
from unittest import mock

from helpers_train import arguments, assert_refused, command, read, run, timeless
import jax
import numpy as np
import pytest

from arrol_jax import config
from arrol_jax.data.problems import Problem, Prompt
from arrol_jax.engine import scheduler
from arrol_jax.engine.sampling import Sampling
from arrol_jax.engine.scheduler import Engine, Run
from arrol_jax.learning.ahead import Ahead
from arrol_jax.learning.generation import Grading, Wanted
from arrol_jax.models import sharding, transformer
from arrol_jax.models.attention import causal_attention
from arrol_jax.models.transformer import PolicyConfig
from arrol_jax.preflight import remarks
from arrol_jax.pruning.decision import make_decide
from arrol_jax.pruning.rule import PruneRule
from arrol_jax.rewards import Graded

C = PolicyConfig("qwen3", 31, 32, 2, 4, 2, 8, 40, qk_norm=True)
OLD, NEW = (jax.jit(lambda k: jax.tree.map(lambda x: x * 3.0, transformer.init_params(C, k)))(jax.random.key(i)) for i in (0, 1))
SAMPLING, KEY = Sampling(1.0, (7, 13), "float32"), jax.random.key(12)
RULE = PruneRule((8,), keep=0.6, target=0.4, strength=0.7, p_min=0.2, p_max=0.85)
PROMPTS, GROUP, STEPS, LONGEST = 3, 4, 4, 24
SIZE = PROMPTS * GROUP


class Words:
  def decode(self, tokens, skip_special_tokens):
    return " ".join(map(str, tokens))


class Sums:
  """A grader that knows at once: the answer is right where the sum of the tokens is even."""

  def grade_async(self, items):
    self.text = items[0][0]
    right = sum(map(int, self.text.split())) % 2 == 0
    grade = Graded(float(right), "correct" if right else "wrong")
    return SimpleNamespace(wait=lambda _: True, result=lambda: [grade])


def prompts_of(step):
  rng = np.random.default_rng(step)
  return {p: Prompt(Problem(f"{step}.{p}", "?", "0", "test"), "?", rng.integers(0, 31, 2 + p).astype(np.int32))
          for p in range(PROMPTS)}


def wanted(step):
  return Wanted(prompts_of(step), GROUP, LONGEST, Grading(Words(), Sums()), step * SIZE)


def engine(mesh, rows):
  e = Engine(C, mesh, rows, max_prompt=8, max_new=LONGEST, segment=4, row_buckets=2, length_buckets=1, prefill_rows=2)
  e.load(OLD, "float32")
  return e


@pytest.fixture(scope="module")
def one_after_another(mesh, head, table):
  """Each step by itself, all with one policy."""
  with jax.set_mesh(mesh):
    e, out = engine(mesh, SIZE), []
    for step in range(STEPS):
      w = wanted(step)
      out.append(w.graded(e.run(w.requests, KEY, SAMPLING, decide=make_decide(head, table, RULE, True), on_done=w.ended))[0])
  return out


@pytest.fixture(scope="module", params=[(SIZE, (), 1), (SIZE, (), 3), (5, (), 2), (8, (2, 2), 1), (SIZE, (), 2, True)],
                ids=["one ahead", "three ahead", "5 slots", "4 devices", "a device beside the host"])
def ahead(request, head, table):
  """The same steps on so many slots, each begun while the one before ends."""
  rows, devices, most, *beside = request.param
  with mock.patch.object(scheduler, "runs_ahead", lambda: bool(beside)), jax.set_mesh(mesh := sharding.make_mesh(*devices)):
    steps = Ahead(engine(mesh, rows), SAMPLING, KEY, wanted, STEPS, most)
    return [steps.generate(step, make_decide(head, table, RULE, True))[0] for step in range(STEPS)]


def test_a_policy_that_stays_gives_the_same_rollouts(one_after_another, ahead):
  for alone, together in zip(one_after_another, ahead, strict=True):
    assert [(r.request, r.prompt) for r in together] == [(i, i // GROUP) for i in range(SIZE)]
    for a, b in zip(alone, together, strict=True):
      np.testing.assert_array_equal(a.tokens, b.tokens)
      np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
      assert (a.pruned, a.stopped, a.reason, a.text, a.problem.id) == (b.pruned, b.stopped, b.reason, b.text, b.problem.id)
      assert a.reward == pytest.approx(b.reward, nan_ok=True)
  assert {math.isnan(r.reward) for step in ahead for r in step} == {True, False}  # some were pruned


def test_who_is_stale(ahead):
  """Nobody in the first step; later some who began in slots that were free, by part of their tokens or all of them."""
  assert all(r.stale == 0 for r in ahead[0])
  later = [r for step in ahead[1:] for r in step]
  assert all(0 <= r.stale <= len(r.tokens) for r in later) and 0 < sum(r.stale for r in later) < sum(len(r.tokens) for r in later)
  assert any(0 < r.stale < len(r.tokens) for r in later)


def test_stale_tokens_are_the_old_policys_and_say_so(mesh):
  """The log-probs of a step's first `stale` tokens are those of the policy before the update, the next one's are not."""
  logprobs = jax.jit(lambda params, tokens: jax.nn.log_softmax(transformer.unembed(params, transformer.forward(
    C, params, tokens, transformer.default_positions(tokens), causal_attention("xla"))[0])))
  with jax.set_mesh(mesh):
    e = engine(mesh, 5)
    steps = Ahead(e, SAMPLING, KEY, wanted, 2, 1)
    steps.generate(0)
    e.load(NEW, "float32")
    rollouts, _, _ = steps.generate(1)
    across = [r for r in rollouts if 0 < r.stale < len(r.tokens)]
    assert across and any(r.stale == 0 for r in rollouts if r.prompt == PROMPTS - 1)
    for r in rollouts:
      tokens, start = np.zeros((1, 32), np.int32), len(r.prompt_tokens)
      tokens[0, :start + len(r.tokens)] = np.r_[r.prompt_tokens, r.tokens]
      old, new = (np.asarray(logprobs(params, tokens))[0, np.arange(start - 1, start - 1 + len(r.tokens)), r.tokens]
                  for params in (OLD, NEW))
      np.testing.assert_allclose(r.logprobs[:r.stale], old[:r.stale], atol=2e-4)
      if r.prompt > max(x.prompt for x in rollouts if x.stale):  # a group that the new policy began
        np.testing.assert_allclose(r.logprobs, new, atol=2e-4)
      elif r in across:  # keys and values before it are the old policy's, the weights that draw it are not
        assert abs(r.logprobs[r.stale] - old[r.stale]) > 1e-3


def test_rows_of_a_group_have_one_prompt(mesh):
  """Kernels read a group's prompt once: whoever joins a group under way has its keys and values bit for bit, also in a step after
  the one that is waited for."""
  joined = []

  def advance(run, *args):
    going, groups = plain(run, *args), {}
    for row, sequence in enumerate(run.slot_to_request):
      if sequence:
        groups.setdefault(sequence.request.prompt, []).append(row)
    for prompt, rows in groups.items():
      length = len(prompts_of(prompt // PROMPTS)[prompt % PROMPTS].tokens) - 1  # the last token's are each row's own
      joined.append(len({run.slot_to_request[row] in before for row in rows}) > 1 and prompt // PROMPTS > step)
      for keys in (columns.k[:, :, :length] for columns in run.slots.cache):
        assert all(np.array_equal(keys[:, row], keys[:, rows[0]]) for row in rows)
    return going

  plain = Run.advance
  with jax.set_mesh(mesh), mock.patch.object(Run, "advance", advance):
    e = engine(mesh, SIZE)
    steps = Ahead(e, SAMPLING, KEY, wanted, STEPS, 3)
    for step in range(STEPS):
      e.load((OLD, NEW)[step % 2], "float32")
      before = {x for x in steps.run.slot_to_request if x} if step else set()
      steps.generate(step)
  assert any(joined)  # under a new policy, a group of a later step


def test_dropping_begins_the_next_step_anew(mesh, one_after_another, head, table):
  """As an evaluation in between does: the rollouts are the same, none is stale."""
  with jax.set_mesh(mesh):
    steps = Ahead(engine(mesh, SIZE), SAMPLING, KEY, wanted, STEPS, 1)
    decide = make_decide(head, table, RULE, True)
    steps.generate(0, decide)
    assert steps.under_way
    steps.drop()
    again = steps.generate(1, decide)[0]
  for a, b in zip(one_after_another[1], again, strict=True):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    assert b.stale == 0


@pytest.mark.parametrize("most", [1, 2])
def test_no_step_begins_too_early(mesh, most):
  """With slots for all steps at once: so many begin beside the one that is waited for, and none beyond the last. (Of which all
  ended while others were waited for, begins none.)"""
  with jax.set_mesh(mesh):
    steps = Ahead(engine(mesh, STEPS * SIZE), SAMPLING, KEY, wanted, STEPS, most)
    for step in range(STEPS):
      steps.generate(step)
      allowed = set(range(step + 1, min(step + most + 1, STEPS)))
      assert set(steps.under_way) <= allowed and (step > 0 or set(steps.under_way) == allowed)
      assert (steps.run is None) == (not steps.under_way)  # its slots are given back
  assert steps.run is None


# ---- a run

RUN = {"steps": 4, "rollout__ahead": 1, "rollout__candidates": 6, "prune__rule": "budget", "loss__correction": "truncate",
       "loss__kl_weight": 0.0, "prune__cold_start": 1, "optim__lr": 1e-4, "eval__every": 2,
       "checkpoint__every": 3, "checkpoint__export": False}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
  folder = tmp_path_factory.mktemp("ahead")
  run(folder, **RUN)
  return folder


def test_a_run_that_runs_ahead(ran):
  """With chosen prompts, the batch's budget and evaluations in between, before which what ran ahead is given up."""
  lines = read(ran / "metrics.jsonl")
  assert [line["step"] for line in lines] == [1, 2, 3, 4]
  assert lines[0]["stale"] == lines[2]["stale"] == 0 and lines[1]["stale"] > 0 and lines[3]["stale"] > 0
  assert all(line["rollouts_started"] == 16 for line in lines)
  # The second step's prompts were chosen while the first was rolled out, when nothing was known.
  assert [line["prompt_variance"] > 0 for line in lines] == [False, False, True, True]
  assert all(line["sec_compile"] == 0 for line in lines)
  assert lines[3]["logprob_gap"] > 10 * lines[0]["logprob_gap"]  # the sampler was another policy


def test_it_is_repeated_and_goes_on(tmp_path, ran):
  """The same command gives the same run; one that was stopped goes on, from a step that begins anew."""
  run(tmp_path, **RUN | {"steps": 3})
  assert timeless(read(tmp_path / "metrics.jsonl")) == timeless(read(ran / "metrics.jsonl"))[:3]
  result = run(tmp_path, **RUN)
  lines = read(tmp_path / "metrics.jsonl")
  assert "going on after step 3" in result.out and [line["step"] for line in lines] == [1, 2, 3, 4]
  assert lines[3]["stale"] == 0 and lines[3]["rollouts_started"] == 16


def test_what_does_not_go_together(tmp_path):
  assert_refused(command(*arguments(tmp_path, rollout__ahead=1, rollout__resampling=2)), "rollout.resampling", "rollout.ahead")


def test_stale_tokens_that_nobody_weighs_are_remarked_on():
  parse = lambda *more: config.parse(["x", "--config=configs/quickstart.py", *more])[0]
  said = remarks.of(parse("--config.rollout.ahead=1"))
  assert any("loss.correction=truncate" in line for line in said)
  assert not remarks.of(parse("--config.rollout.ahead=1", "--config.loss.correction=truncate"))
