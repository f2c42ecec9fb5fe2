"""Rollouts: who is decided and how, what table and evaluation learn from them."""

import dataclasses
import math

from helpers_rollouts import rollout_of
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrol_jax import prune
from arrol_jax.data.problems import Problem, Prompt
from arrol_jax.engine import programs
from arrol_jax.engine.sampling import Sampling
from arrol_jax.engine.scheduler import Engine, Request
from arrol_jax.learning.ahead import Ahead
from arrol_jax.learning.generation import Grading, Wanted, generate
from arrol_jax.learning.head_training import update_calibration
from arrol_jax.models import sharding, transformer
from arrol_jax.models.attention import causal_attention
from arrol_jax.models.transformer import PolicyConfig
from arrol_jax.prune import Calibration
from arrol_jax.pruning.decision import decide as decision_program, make_decide
from arrol_jax.pruning.head import Features, quality_logit
from arrol_jax.pruning.rule import PruneRule
from arrol_jax.rewards import Graded, Grader

C = PolicyConfig("qwen3", 31, 32, 2, 4, 2, 8, 40, qk_norm=True)
PARAMS = jax.jit(lambda k: jax.tree.map(lambda x: x * 3.0, transformer.init_params(C, k)))(jax.random.key(0))
SAMPLING = Sampling(1.0, (7, 13), "float32")
KEY = jax.random.key(12)
PLAIN = Sampling(dtype="float32")
RULE = PruneRule((8,), keep=0.6, target=0.4, strength=0.7, p_min=0.2, p_max=0.85)
GROUP = 4

# ---- calibration


def test_calibration_counts_graded_survivors_that_were_scored():
  """Logits -1.5, 0, 1.5 have sigmoids 0.18, 0.5, 0.82: bins 0, 2 and 3 of 4."""
  rollouts = [rollout_of(i, 0, 2, 9, decided=True, score=score, reward=reward)
              for i, (score, reward) in enumerate([(-1.5, 0.0), (1.5, 1.0), (1.5, 0.0), (0.0, 1.0)])]
  rollouts += [
    rollout_of(5, 0, 2, 8, decided=True, pruned=True, score=1.5, reward=0.0),  # half a text: its grade says nothing
    rollout_of(6, 0, 2, 4, score=0.0, reward=1.0),                             # ended before the decision
  ]
  table = update_calibration(Calibration.empty(4), rollouts, None)
  np.testing.assert_array_equal(table.positive, [0, 0, 1, 1])
  np.testing.assert_array_equal(table.negative, [1, 0, 0, 1])
  table = update_calibration(table, rollouts[:2], 2.0)  # two more, half-life two: what was there weighs half
  np.testing.assert_array_equal(table.positive, [0, 0, 0.5, 1.5])
  np.testing.assert_array_equal(table.negative, [1.5, 0, 0, 0.5])


def test_nothing_scored_adds_nothing_to_the_table():
  """What is there is forgotten with every rollout that was started."""
  table = Calibration(jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]))
  for rollouts in ([], [rollout_of(1, 0, 2, 4, reward=1.0)]):
    after = update_calibration(table, rollouts, 10.0)
    np.testing.assert_allclose(after.positive, 0.5 ** (len(rollouts) / 10.0) * table.positive, rtol=1e-6)
    np.testing.assert_allclose(after.negative, 0.5 ** (len(rollouts) / 10.0) * table.negative, rtol=1e-6)


# ---- the decision


def survival_by_hand(table, rule, score):
  """METHOD sections 3 and 4 in NumPy: posterior and survival probability of one logit; delta by trying them all."""
  positive, negative = np.asarray(table.positive, np.float64), np.asarray(table.negative, np.float64)
  bins = len(positive)
  right, wrong = (positive + 1) / (positive.sum() + bins), (negative + 1) / (negative.sum() + bins)
  prior = positive.sum() / (positive.sum() + negative.sum())
  q = prior * right / (prior * right + (1 - prior) * wrong)
  p = lambda delta, q: np.clip(rule.keep + delta + rule.strength * (rule.target - q), rule.p_min, rule.p_max)
  share = (positive + negative) / (positive + negative).sum()
  candidates = np.linspace(-2, 2, 40001)
  delta = candidates[np.argmin([abs(share @ p(d, q) - rule.keep) for d in candidates])]
  mine = q[min(bins - 1, int(bins / (1 + math.exp(-score))))]
  return mine, float(p(delta, mine))


def requests(prompts=5):
  rng = np.random.default_rng(0)
  texts = [rng.integers(0, 31, rng.integers(1, 9)).astype(np.int32) for _ in range(prompts)]
  return [Request(p * GROUP + g, p, texts[p], 20) for p in range(prompts) for g in range(GROUP)]


def engine(mesh, rows=8, max_new=20):
  e = Engine(C, mesh, rows, max_prompt=8, max_new=max_new, segment=4, row_buckets=2, length_buckets=1, prefill_rows=4)
  e.load(PARAMS, "float32")
  return e


@pytest.fixture(scope="module")
def unpruned(mesh):
  """The same requests without any decision."""
  with jax.set_mesh(mesh):
    return engine(mesh).run(requests(), KEY, SAMPLING)


@pytest.fixture(scope="module")
def decided(mesh, head, table):
  with jax.set_mesh(mesh):
    return engine(mesh).run(requests(), KEY, SAMPLING, decide=make_decide(head, table, RULE, True))


def test_only_active_rows_of_just_that_length_are_decided(mesh, head, table):
  """Kept rows that are not up for a decision stay active; rows that had ended stay ended."""
  generated = np.array([7, 8, 8, 9, 0, 8, 16, 8], np.int32)
  active = np.array([1, 1, 0, 1, 1, 1, 1, 0], bool)
  rule = dataclasses.replace(RULE, keep=1e-9, p_min=1e-9)  # as good as none survives
  with jax.set_mesh(mesh):
    slots = programs.init_slots(C, 8, 16, PLAIN).replace(generated=jnp.asarray(generated), active=jnp.asarray(active))
    slots, decision = make_decide(head, table, rule, True)(slots)
  up = active & (generated == 8)
  np.testing.assert_array_equal(decision.decided, up)
  np.testing.assert_array_equal(decision.keep, ~up)
  np.testing.assert_array_equal(slots.active, active & ~up)


def test_decisions_in_the_engine(decided, unpruned):
  """Who still writes after 8 tokens is decided then; the pruned stop there, the others never notice."""
  assert any(r.pruned for r in decided) and any(r.decided and not r.pruned for r in decided)
  assert any(not r.decided for r in decided)
  for a, b in zip(decided, unpruned, strict=True):
    assert a.decided == (len(b.tokens) > 8) and a.pruned <= a.decided
    assert len(a.tokens) == (8 if a.pruned else len(b.tokens))
    np.testing.assert_array_equal(a.tokens, b.tokens[:len(a.tokens)])
    if not a.decided:
      assert math.isnan(a.score) and math.isnan(a.posterior) and a.keep_probability == 1.0


def test_scores_are_the_heads_logits_of_a_plain_forward_pass(decided, head):
  """At the state that sampled response token number `detect`."""
  for r in decided:
    if r.decided:
      tokens = np.zeros((1, 28), np.int32)
      tokens[0, :len(r.prompt_tokens) + len(r.tokens)] = np.r_[r.prompt_tokens, r.tokens]
      hidden = plain_hidden(tokens)[0, len(r.prompt_tokens) + RULE.detect[0] - 2]
      assert r.score == pytest.approx(float(quality_logit(head, Features(hidden[None]))[0]), abs=1e-4)
  assert len({r.score for r in decided if r.decided}) > 5


@jax.jit
def plain_hidden(tokens):
  return transformer.forward(C, PARAMS, tokens, transformer.default_positions(tokens), causal_attention("xla"))[0]


def test_a_row_that_has_ended_counts_with_what_the_table_says_of_its_last_score(mesh, head, table):
  """Under the budget; not as if it were surely wrong."""
  generated, active = np.array([8, 8, 5, 12, 0, 8, 8, 8], np.int32), np.array([1, 1, 0, 0, 0, 1, 1, 1], bool)
  with jax.set_mesh(mesh):
    slots = programs.init_slots(C, 8, 16, PLAIN).replace(
      hidden=jax.random.normal(jax.random.key(3), (8, C.width)), generated=jnp.asarray(generated), active=jnp.asarray(active))
    _, decision = make_decide(head, table, dataclasses.replace(RULE, kind="budget"), True)(slots)
  for i in (2, 3):
    assert decision.posterior[i] == pytest.approx(survival_by_hand(table, RULE, float(decision.final[i]))[0], abs=1e-5)
  assert len({float(x) for x in decision.posterior}) > 3


def test_survival_is_the_published_rule(decided, table):
  seen = set()
  for r in decided:
    if r.decided:
      q, p = survival_by_hand(table, RULE, r.score)
      assert r.posterior == pytest.approx(q, abs=1e-5) and r.keep_probability == pytest.approx(p, abs=2e-4)
      assert RULE.p_min <= r.keep_probability <= RULE.p_max
      seen.add(round(r.keep_probability, 4))
  assert len(seen) > 2


def test_before_there_is_a_history_all_survive_alike(mesh, head):
  """An empty table: q = 1/2 and delta = 0, so p = kappa + lambda (rho - 1/2), whatever the scores."""
  with jax.set_mesh(mesh):
    slots = programs.init_slots(C, 8, 16, PLAIN).replace(
      hidden=jax.random.normal(jax.random.key(3), (8, C.width)), generated=jnp.full(8, 8), active=jnp.ones(8, bool))
    _, decision = make_decide(head, Calibration.empty(8), RULE, True)(slots)
  assert np.ptp(decision.score) > 0.1
  np.testing.assert_allclose(decision.posterior, 0.5)
  np.testing.assert_allclose(decision.keep_probability, 0.6 + 0.7 * (0.4 - 0.5), rtol=1e-6)


def test_draws_depend_on_the_request_alone(mesh, head, table, decided):
  """Other company, other slots: the same rollouts are pruned. Another step's key: others are."""
  with jax.set_mesh(mesh):
    rule = make_decide(head, table, RULE, True)
    again = engine(mesh, rows=3).run(requests(), KEY, SAMPLING, decide=rule)
    other = engine(mesh).run(requests(), jax.random.key(13), SAMPLING, decide=rule)
  assert [r.pruned for r in again] == [r.pruned for r in decided] != [r.pruned for r in other]


def test_draws_follow_the_survival_probability(mesh, head, table):
  """4000 rows with the same state: the share that survives is within four standard errors of p."""
  rows = 4000
  with jax.set_mesh(mesh):
    slots = programs.init_slots(C, rows, 1, PLAIN).replace(
      generated=jnp.full(rows, 8, jnp.int32), active=jnp.ones(rows, bool), hidden=jnp.ones((rows, C.width)))
    _, decision = make_decide(head, table, RULE, True)(slots)
  p = float(decision.keep_probability[0])
  assert 0.25 < p < 0.8 and np.all(np.asarray(decision.keep_probability) == decision.keep_probability[0])
  assert abs(np.mean(decision.keep) - p) < 4 * math.sqrt(p * (1 - p) / rows)


def test_pruning_off_scores_all_and_keeps_all(mesh, head, table, decided, unpruned):
  with jax.set_mesh(mesh):
    out = engine(mesh).run(requests(), KEY, SAMPLING, decide=make_decide(head, table, RULE, False))
  for a, b, c in zip(out, decided, unpruned, strict=True):
    np.testing.assert_array_equal(a.tokens, c.tokens)
    assert not a.pruned and a.keep_probability == 1.0 and a.decided == b.decided
    assert a.score == pytest.approx(b.score, abs=1e-6, nan_ok=True)
    assert a.posterior == pytest.approx(b.posterior, nan_ok=True)


@pytest.mark.parametrize("devices", [(), (2, 2)])
def test_the_budget_of_refilled_slots_is_carried_over(devices, head, table):
  """Eight slots for twenty rollouts: later decisions go by the prices of those before, with nothing compiled for it."""
  rule, seen = dataclasses.replace(RULE, kind="budget", keep=0.5, p_min=0.02, p_max=1.0, draw="systematic"), []
  with jax.set_mesh(mesh := sharding.make_mesh(*devices)):
    plain = make_decide(head, table, rule, True)
    e, programs_before = dataclasses.replace(engine(mesh), row_buckets=1), decision_program._cache_size()
    def decide(slots, lengths=None):
      slots, decision = plain(slots, lengths)
      seen.append(jax.device_get((decision.decided, decision.rule_probability)))
      return slots, decision
    out = e.run(requests(), KEY, SAMPLING, decide=decide)
  programs = decision_program._cache_size()
  assert devices or programs == programs_before + 2  # one at boundaries, one between them
  waves = [p[decided] for decided, p in seen if decided.any()]
  assert len(waves) > 2
  first, later = waves[0], np.concatenate(waves[1:])
  assert np.mean(first) == pytest.approx(0.5) and abs(np.mean(later) - 0.5) < 0.25
  assert any(r.pruned for r in out) and any(r.decided and not r.pruned for r in out)
  with jax.set_mesh(mesh):  # another step knows nothing of this one
    again = e.run(requests(), KEY, SAMPLING, decide=make_decide(head, table, rule, True))
  assert [(r.pruned, r.keep_probability) for r in out] == [(r.pruned, r.keep_probability) for r in again]
  assert decision_program._cache_size() == programs


# ---- generate and measure


class Words:
  """A tokenizer of which only `decode` is asked; the answer it writes is the sum of the tokens modulo 3."""

  def decode(self, tokens, skip_special_tokens):
    assert skip_special_tokens
    return f"{' '.join(map(str, tokens))} so \\boxed{{{int(np.sum(tokens)) % 3}}}"


def prompts():
  by_prompt = {r.prompt: r.tokens for r in requests()}
  return [Prompt(Problem(str(p), "?", str(p % 3), "test"), "?", tokens) for p, tokens in by_prompt.items()]


def numbered():
  return dict(enumerate(prompts()))


def test_generate_grades_the_survivors(mesh, head, table, decided):
  seen = []
  with jax.set_mesh(mesh), Grader(1) as grader:
    out, waited = generate(engine(mesh), numbered(), GROUP, KEY, SAMPLING, Grading(Words(), grader),
                           decide=make_decide(head, table, RULE, True), progress=seen.append)
    assert sum(grader.counts.values()) == sum(not r.pruned for r in out)  # nobody pays for grading what was cut
  assert waited >= 0 and sorted(r.request for r in seen) == list(range(5 * GROUP))
  assert [(r.request, r.prompt) for r in out] == [(i, i // GROUP) for i in range(5 * GROUP)]
  for r, alone in zip(out, decided, strict=True):
    np.testing.assert_array_equal(r.tokens, alone.tokens)
    assert r.pruned == alone.pruned and r.text == Words().decode(r.tokens, True)
    if r.pruned:
      assert math.isnan(r.reward) and r.reason == ""
    else:
      right = int(np.sum(r.tokens)) % 3 == r.prompt % 3
      assert (r.reward, r.reason) == ((1.0, "correct") if right else (0.0, "wrong"))
  assert {r.reward for r in out if not r.pruned} == {0.0, 1.0}


def test_grading_begins_while_others_decode_and_its_failures_are_told(mesh, caplog):
  log = []

  class Fails:
    """Grades nothing before it is asked for the result, and then not."""

    def grade_async(self, items):
      log.append("asked")
      return self

    def wait(self, seconds):
      return True

    def result(self):
      log.append("waited for")
      return [Graded(0.0, "timeout")]

  with jax.set_mesh(mesh):
    e = engine(mesh)
    e.watch = lambda: log.append("segment")
    out, _ = generate(e, numbered(), GROUP, KEY, SAMPLING, Grading(Words(), Fails()))
  count = 5 * GROUP
  assert log.count("asked") == count and log[-count:] == ["waited for"] * count
  assert "segment" in log[log.index("asked"):]
  assert {r.reason for r in out} == {"timeout"}
  assert [r.getMessage()[:62] for r in caplog.records if r.name == "arrol_jax.learning.generation"] == [
    "20 of 20 answers could not be graded (20 timeout) and count as wrong"[:62]]


class Told(Exception):
  """As hosts.Preempted."""


@pytest.mark.parametrize("ahead", [False, True])
def test_a_run_that_is_told_to_stop_waits_for_no_grades(mesh, ahead):
  """The grades never come; the watch hears of it once all tokens are there."""
  waits = []

  class Never:
    def grade_async(self, items):
      return self

    def wait(self, seconds):
      waits.append(seconds)
      return len(waits) > 100

  def watch():
    if len(waits) == 3:
      raise Told

  with jax.set_mesh(mesh):
    e, grading = engine(mesh), Grading(Words(), Never())
    e.watch = watch
    with pytest.raises(Told):
      if ahead:
        begin = lambda step: Wanted(numbered(), GROUP, e.max_new, grading)
        Ahead(e, SAMPLING, KEY, begin, steps=1, most=1).generate(0)
      else:
        generate(e, numbered(), GROUP, KEY, SAMPLING, grading)
  assert len(waits) == 3 and all(0 < seconds <= 1 for seconds in waits)


def test_generate_stops_at_the_engines_limit(mesh):
  with jax.set_mesh(mesh), Grader(1) as grader:
    out, _ = generate(engine(mesh, max_new=9), dict(enumerate(prompts()[:2])), 3, KEY, SAMPLING, Grading(Words(), grader))
  assert max(len(r.tokens) for r in out) == 9


def test_rule_constants_are_the_papers():
  assert PruneRule((512,)).constants() == {"kappa": 0.5, "rho": 0.5, "lam": 0.5, "p_min": 0.1, "p_max": 0.9}
  assert prune.BINS == 128
