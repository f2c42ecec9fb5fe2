"""Departures from the published rule (METHOD section 9): each does what it says, and all together train and resume."""

import dataclasses
import math
import re

from helpers_rollouts import found, rollout_of
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rollout import KEY, PLAIN, SAMPLING, C, engine, requests
from test_train import read, run

from arrol_jax.engine import programs
from arrol_jax.learning.batching import PackShape, head_examples, pack
from arrol_jax.learning.head_training import update_calibration
from arrol_jax.learning.losses import LossConfig
from arrol_jax.learning.resampling import until_mixed
from arrol_jax.prune import Calibration
from arrol_jax.pruning.baselines import down_sample
from arrol_jax.pruning.decision import decide, make_decide, nothing_decided
from arrol_jax.pruning.head import Features
from arrol_jax.pruning.rule import RULES, PruneRule


def test_several_decisions_multiply_and_each_has_its_table(mesh, head):
  """Cut at 4 and at 8: survival is the product, every score is kept, each table counts those that reached its length."""
  rule = PruneRule((4, 8), keep=0.49)
  tables = jax.tree.map(lambda x: jnp.stack([x, x]), Calibration.empty(8))
  with jax.set_mesh(mesh):
    out = engine(mesh).run(requests(), KEY, SAMPLING, decide=make_decide(head, tables, rule, True, features=True))
  for r in out:
    assert len(r.scores) == (len(r.tokens) >= 4) + (len(r.tokens) >= 8) or r.stopped
    if not r.pruned and len(r.tokens) > 8:
      assert r.keep_probability == pytest.approx(0.49, rel=1e-5) == r.rule_probability and len(r.scores) == 2
    elif r.pruned:
      assert len(r.tokens) in (4, 8) and r.keep_probability == pytest.approx(0.7**len(r.scores), rel=1e-5)
    r.reward = math.nan if r.pruned else 1.0
  after = update_calibration(tables, out, None)
  kept = [r for r in out if not r.pruned]
  assert after.positive.sum(1).tolist() == [sum(len(r.scores) > c for r in kept) for c in (0, 1)]
  examples = head_examples(out, head, C.width)
  assert max(len(r.scores) for r in kept) == 2 and float(examples.weight.sum()) == sum(len(r.scores) for r in kept)


def decide_once(head, table, rule, slots):
  """One decision on rows that all stand at the detection length, two groups of eight."""
  return make_decide(head, table, rule, True)(jax.tree.map(jnp.copy, slots))[1]


@pytest.fixture
def standing(mesh):
  with jax.set_mesh(mesh):
    slots = programs.init_slots(C, 16, 16, PLAIN)
  keys = jax.random.split(jax.random.key(5), 16)
  hidden = jax.random.normal(jax.random.key(3), (16, C.width))
  return slots.replace(generated=jnp.full(16, 8), active=jnp.ones(16, bool), key=keys, hidden=hidden,
                       group=jnp.repeat(jnp.arange(2, dtype=jnp.int32), 8))


def test_a_systematic_draw_keeps_the_same_number_in_each_group(head, table, standing):
  keep = decide_once(head, table, PruneRule((8,), kind="random", draw="systematic"), standing).keep
  assert np.asarray(keep).reshape(2, 8).sum(1).tolist() == [4, 4]


def test_confidence_keeps_a_groups_most_confident(head, table, standing):
  """Of eight with p in [0.1, 0.9] and a mean of 0.3: two at 0.9, six at 0.1, and the confidence that counts is a token's mean."""
  confident = np.random.default_rng(0).permutation(16).astype(np.float32)
  slots = standing.replace(confidence_sum=jnp.asarray(confident))
  decision = decide_once(head, table, PruneRule((8,), keep=0.3, kind="confidence"), slots)
  planned = np.asarray(decision.rule_probability).reshape(2, 8)
  for p, c in zip(planned, confident.reshape(2, 8), strict=True):
    assert p.mean() == pytest.approx(0.3, abs=1e-6)
    np.testing.assert_allclose(p[np.argsort(-c)], [0.9, 0.9] + [0.1] * 6, atol=1e-6)


def test_max_variance_cuts_nothing_in_generation_and_trains_on_the_most_varied(head, table, standing):
  assert np.asarray(decide_once(head, table, PruneRule((8,), kind="max_variance"), standing).keep).all()
  rewards = {0: [1, 0, 0, 0, 0, 0, 0, 1], 1: [1] * 8, 2: [0, 1, 1, 1]}
  rollouts = [rollout_of(10 * p + i, p, 2, 9, reward=float(r)) for p, group in rewards.items() for i, r in enumerate(group)]
  kept = down_sample(rollouts, 0.5)
  by_group = {p: [r.reward for r in kept if r.prompt == p] for p in rewards}
  assert sorted(by_group[0]) == [0, 0, 1, 1] and by_group[1] == [1] * 4 and sorted(by_group[2]) == [0, 1]


def test_a_floor_of_survivors(head, table, standing):
  rule = PruneRule((8,), keep=0.01, p_min=0.01, kind="random", floor=3)
  decision = decide_once(head, table, rule, standing)
  keep, survival = np.asarray(decision.keep), np.asarray(decision.keep_probability)
  assert keep.reshape(2, 8).sum(1).tolist() == [3, 3]
  assert survival.min() > 0.02 and np.allclose(decision.rule_probability, 0.01)  # three of eight survive, not one of a hundred
  fixed = decide_once(head, table, dataclasses.replace(rule, draw="systematic"), standing)
  assert np.asarray(fixed.keep).reshape(2, 8).sum(1).tolist() == [3, 3] and np.allclose(fixed.keep_probability, 3 / 8)


@pytest.mark.parametrize("draw", ["bernoulli", "systematic"])
def test_a_floor_counts_those_who_do_not_decide(head, table, standing, draw):
  """Where slots are refilled rows reach the length one by one. In the first group one decides, and one that has finished and two
  under way are enough; in the second two decide and one other is not cut; in the third two decide and nobody else is left."""
  decided, generated = jnp.array([0, 4, 5, 8, 9]), np.array([8, 4, 12, 4] + [8, 8, 12, 12] + [8, 8, 0, 0] + [0] * 4, np.int32)
  slots = standing.replace(group=jnp.repeat(jnp.arange(4, dtype=jnp.int32), 4), generated=jnp.asarray(generated),
                           active=jnp.asarray(generated > 0).at[jnp.array([1, 7])].set(False),
                           pruned=jnp.zeros(16, bool).at[7].set(True))
  decision = decide_once(head, table, PruneRule((8,), keep=0.01, p_min=0.01, kind="random", draw=draw, floor=3), slots)
  assert np.flatnonzero(decision.decided).tolist() == decided.tolist()
  np.testing.assert_allclose(decision.keep_probability[decided], [0.01, 1, 1, 1, 1], rtol=1e-5)
  assert decision.keep[decided].tolist() == [False, True, True, True, True]


def test_controls_are_never_cut_and_the_rules_probability_is_noted(head, table, standing):
  decision = decide_once(head, table, PruneRule((8,), keep=0.01, p_min=0.01, kind="random", holdout=0.5), standing)
  survival = np.asarray(decision.keep_probability)
  controls = survival == 1.0
  np.testing.assert_array_equal(decision.holdout, controls)
  assert 2 < controls.sum() < 14 and np.all(np.asarray(decision.keep)[controls])
  np.testing.assert_allclose(decision.rule_probability, 0.01, rtol=1e-5)


def test_rules_prefer_what_they_say(head, table, standing):
  p = {kind: np.asarray(decide_once(head, table, PruneRule((8,), kind=kind), standing).keep_probability)
       for kind in ("random", "lowest", "highest", "group", "published")}
  q = np.asarray(decide_once(head, table, PruneRule((8,)), standing).posterior)
  assert np.ptp(q) > 0.1 and np.allclose(p["random"], 0.5)
  assert np.corrcoef(p["lowest"], q)[0, 1] < -0.5 < 0.5 < np.corrcoef(p["highest"], q)[0, 1]
  np.testing.assert_allclose(p["group"].reshape(2, 8).mean(1), 0.5, atol=1e-3)


def seen(value):
  """Features of one decision, for a head that reads the last state."""
  return (Features(np.full(C.width, value, np.float32)),)


def test_inverse_propensity_weights_reach_table_head_and_advantages(mesh, head):
  rollouts = [rollout_of(1, 0, 3, 9, decided=True, score=0.0, reward=1.0, keep_probability=0.25, features=seen(1)),
              rollout_of(2, 0, 3, 9, decided=True, score=0.0, reward=0.0, keep_probability=0.5, features=seen(2))]
  table = update_calibration(Calibration.empty(2), rollouts, None, ("table",))
  assert (table.positive.tolist(), table.negative.tolist()) == ([0, 4], [0, 2])
  examples = head_examples(rollouts, head, C.width, ("head", "policy"))
  assert (examples.features.last[:, 0].tolist(), examples.weight.tolist()) == ([1, 2], [4, 2])
  (batch,), _ = pack(rollouts, PackShape(16, 32, 1), mesh, LossConfig(normalize_std=False), ("head", "policy"))
  rows = {i: row for i, (_, row) in found([batch]).items()}
  # The group's mean is 4/6; advantages 1/3 and -2/3 times 4 and 2 over the mean weight 3.
  assert [float(batch.advantages[rows[i]]) for i in (1, 2)] == pytest.approx([4 / 9, -4 / 9])


def test_dynamic_sampling_goes_on_until_enough_groups_are_mixed():
  """Rounds of two groups: none, one, two mixed; two are wanted. Pruned rollouts have no say, and a cap ends it."""
  rewards = [[(1, 1), (0, 0)], [(1, 0), (0, 0)], [(0, 1), (1, 0)]]

  def roll_out(n, count):
    assert count == 2
    return [rollout_of(10 * n + 4 * i + j, 2 * n + i, 2, 4, reward=float(r)) for i, pair in enumerate(rewards[n])
            for j, r in enumerate(pair)] + [rollout_of(10 * n + 9, 2 * n, 2, 4, reward=math.nan, pruned=True)]

  learned, everything, rounds = until_mixed(roll_out, 2, 5)
  assert rounds == 3 and len(everything) == 15 and {r.prompt for r in learned} == {2, 4}
  learned, everything, rounds = until_mixed(roll_out, 2, 2)
  assert rounds == 2 and {r.prompt for r in learned} == {2} and len(everything) == 10


@pytest.mark.parametrize("mixed, counts", [
  ([12, 3, 1], [16, 8, 4]),  # 4 missing: (4 + 2) / (12 / 16); 1 missing: (1 + 1) / (15 / 24)
  ([8, 8], [16, 16]),        # 8 missing: (8 + 2.8) / 0.5 = 22, at most 16
  ([0, 16], [16, 16]),
])
def test_later_rounds_take_the_prompts_that_the_missing_groups_should_need(mixed, counts):
  taken = []

  def roll_out(n, count):
    taken.append(count)
    return [rollout_of(0, 100 * n + i, 2, 4, reward=float(j and i < mixed[n])) for i in range(count) for j in (0, 1)]

  learned, everything, rounds = until_mixed(roll_out, 16, 5)
  assert taken == counts and rounds == len(counts) and len(everything) == 2 * sum(counts)
  assert len({r.prompt for r in learned}) == 16


def test_punished_rewards_shape_advantages_and_not_what_the_head_learns(mesh, head):
  """The last of 9 tokens is in the last eighth: half a point less for the first."""
  rollouts = [rollout_of(1, 0, 3, 9, reward=1.0, features=seen(1)), rollout_of(2, 0, 3, 5, reward=1.0, features=seen(2))]
  (batch,), _ = pack(rollouts, PackShape(16, 32, 1), mesh, LossConfig(normalize_std=False, overlong=0.125, longest=9))
  rows = {i: row for i, (_, row) in found([batch]).items()}
  assert [float(batch.advantages[rows[i]]) for i in (1, 2)] == [-0.25, 0.25]
  assert head_examples(rollouts, head, C.width).reward.tolist() == [1, 1]


def test_every_departure_at_once_trains_and_resumes_exactly(tmp_path):
  """Two decisions, group rule, fixed sizes, floor, controls, weights, dynamic sampling, DAPO, a head that reads all and goes over
  a buffer: stopped and resumed, or not."""
  every = dict(prune__detect="(8,16)", prune__rule="group", prune__draw="systematic", prune__floor=1, prune__holdout=0.2,
               prune__weigh="('table','head','policy')", prune__cold_start=1, rollout__rounds=2, loss__name="dapo",
               loss__kl_weight=0.0, data__eval="", steps=3, quality__inputs="('last','mean','logprobs')", quality__buffer=40,
               quality__passes=4, quality__balance=True)
  run(tmp_path / "whole", **every)
  run(tmp_path / "parts", **every | {"steps": 2})
  run(tmp_path / "parts", **every)
  timeless = lambda line: {k: v for k, v in line.items() if not k.startswith("sec_")}
  whole, parts = ([timeless(x) for x in read(tmp_path / name / "metrics.jsonl")] for name in ("whole", "parts"))
  assert whole == parts
  assert all(1 <= x["rounds"] <= 2 and x["groups_learned"] <= 4 for x in whole)
  assert all(x["rollouts_started"] <= 16 * x["rounds"] and x["rollouts_started"] % 4 == 0 for x in whole)
  assert sum(x["rollouts_pruned"] for x in whole) > 0
  assert any(x["false_prune"] is not None for x in whole)


@pytest.mark.parametrize("kind", (*RULES, "threshold"))
@pytest.mark.parametrize("draw, floor", [("systematic", 0), ("systematic", 2), ("bernoulli", 0), ("bernoulli", 2)])
def test_no_decision_asks_the_host(mesh, head, standing, kind, draw, floor):
  """On a GPU a loop of unknown length, or a branch, waits for the host, which then starts no segment ahead. The budget's loop was
  one: with it on, a segment's end cost milliseconds."""
  rule = PruneRule((8,), kind=kind, draw=draw, floor=floor, group_size=8)
  with jax.set_mesh(mesh):
    program = decide.lower(standing, head, Calibration(), rule, np.bool_(True), True, True, nothing_decided(rule)).compile()
  loops = [line for line in program.as_text().splitlines() if re.search(r"= .* (while|conditional)\(", line)]
  assert loops and all("known_trip_count" in line for line in loops)
