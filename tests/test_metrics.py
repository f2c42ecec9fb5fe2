"""Metrics of a step: each figure from a few rollouts whose answer can be worked out by hand."""

import dataclasses
import itertools
import math

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest
from scipy import stats

from arrol_jax.learning.metrics import (
  auc,
  binomial,
  bootstrap_interval,
  calibration_error,
  expected_signals,
  mean,
  pass_at_k,
  ranks,
  rollout_metrics,
)
from arrol_jax.types import Rollout


def pairs(score, label):
  """The definition: over all pairs of a positive and a negative, 1 where the positive scores higher, 1/2 for a tie."""
  wins = [(p > n) + 0.5 * (p == n) for p, lp in zip(score, label, strict=True) if lp
          for n, ln in zip(score, label, strict=True) if not ln]
  return sum(wins) / len(wins)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=20))
def test_auc_is_the_share_of_pairs_won(rows):
  score, label = zip(*rows, strict=True)
  if len(set(label)) == 1:
    assert math.isnan(auc(score, label))
  else:
    assert auc(score, label) == pytest.approx(pairs(score, label))


def test_auc_by_hand():
  assert auc([3, 2, 1, 0], [1, 1, 0, 0]) == 1.0
  assert auc([0, 1, 2, 3], [1, 1, 0, 0]) == 0.0
  assert auc([5, 5, 5], [1, 0, 1]) == 0.5
  assert auc([1, 2, 2, 3], [0, 1, 0, 1]) == 3.5 / 4   # the tie of the twos counts half
  assert math.isnan(auc([], []))


def test_ranks_and_binomial_chances_are_scipys():
  values = np.random.default_rng(0).integers(-4, 5, 50) / 2
  np.testing.assert_array_equal(ranks(values), stats.rankdata(values))
  for n, p in [(0, 0.3), (1, 0.0), (5, 1.0), (64, 0.3), (1500, 0.6)]:
    np.testing.assert_allclose(binomial(n, p), stats.binom.pmf(np.arange(n + 1), n, p), rtol=1e-9, atol=1e-300)


def test_calibration_error_by_hand():
  """Bins [0, 0.1) and [0.7, 0.8): means 0.05 against 1/2, 0.75 against 1; and 1.0 belongs to the last bin."""
  assert calibration_error([0.04, 0.06, 0.72, 0.78], [0, 1, 1, 1]) == pytest.approx((2 * 0.45 + 2 * 0.25) / 4)
  assert calibration_error([1.0, 0.95], [1, 0]) == pytest.approx(0.475)
  assert calibration_error([0.2, 0.9], [0, 1], bins=1) == pytest.approx(0.05)
  assert calibration_error([0.0] * 3 + [1.0] * 2, [0] * 3 + [1] * 2) == 0.0
  assert math.isnan(calibration_error([], []))


def test_mean_of_nothing_is_nan():
  assert mean([1, 2, 6]) == 3.0 and mean(x for x in [True, False]) == 0.5 and math.isnan(mean([]))


def rollout(prompt, length=10, stopped=True, score=math.nan, posterior=0.5, **fields):
  return Rollout(0, prompt, np.zeros(3, np.int32), np.zeros(length, np.int32), np.zeros(length, np.float32), stopped,
                 scores=() if math.isnan(score) else (score,), posteriors=() if math.isnan(posterior) else (posterior,), **fields)


STEP = [
  # group 0: three survive, two of them right; one was pruned
  rollout(0, reward=1, length=20, score=2.0, posterior=0.8, keep_probability=0.5),
  rollout(0, reward=0, length=30, score=-1.0, posterior=0.3, keep_probability=0.25, stopped=False),
  rollout(0, reward=1, length=6),                                    # ended before detection
  rollout(0, length=8, score=-2.0, posterior=0.1, keep_probability=0.2, pruned=True),
  # group 1: all right
  rollout(1, reward=1, length=12, score=0.5, posterior=0.6, keep_probability=0.4),
  rollout(1, length=8, score=0.0, posterior=0.5, keep_probability=0.5, pruned=True),
  # group 2: nothing survives
  rollout(2, length=8, score=1.0, posterior=0.5, keep_probability=0.5, pruned=True),
  # group 3: one survives, wrong, scored higher than all
  rollout(3, reward=0, length=24, score=3.0, posterior=0.9, keep_probability=0.8),
]


def test_rollout_metrics_by_hand():
  out, expected = rollout_metrics(STEP), expected_signals([[r for r in STEP if r.prompt == p] for p in range(4)])
  assert out == {
    "reward": pytest.approx(3 / 5),
    "reward_ipw": pytest.approx((1 / 0.5 + 1 + 1 / 0.4) / 8),
    "rollouts_started": 8, "rollouts_pruned": 3, "rollouts_kept": 5, "rollouts_decided": 7, "keep_ratio": 5 / 8,
    "pos_ratio": pytest.approx((2 / 3 + 1 + 0) / 3), "pos_var": pytest.approx(2 / 9 / 3), "groups_mixed": 1,
    "baseline_shift": pytest.approx(2 / 3 - (2 + 0.1) / 4),  # of group 0, whose pruned one promised 0.1
    "signal": pytest.approx(3 * 2 / 9 / 4), "signal_per_1k_tokens": pytest.approx(1000 * 3 * 2 / 9 / 116), "stale": 0.0,
    "ungraded": 0.0,
    "tokens_generated": 20 + 30 + 6 + 8 + 12 + 8 + 8 + 24, "tokens_trained": 20 + 30 + 6 + 12 + 24,
    "tokens_saved": pytest.approx(20 / 0.5 + 30 / 0.25 + 6 + 12 / 0.4 + 24 / 0.8 - 116),
    "response_len": pytest.approx(92 / 5), "truncated": pytest.approx(1 / 5),
    # scored survivors: positives 2.0 and 0.5, negatives -1.0 and 3.0
    "head_auc": 0.5, "head_auc_within": 1.0,
    "head_ece": pytest.approx((abs(0.8 - 1) + abs(0.3 - 0) + abs(0.6 - 1) + abs(0.9 - 0)) / 4),
    "head_brier": pytest.approx((0.2**2 + 0.3**2 + 0.4**2 + 0.9**2) / 4),
    "head_spearman": pytest.approx(0, abs=1e-9),                    # ranks 3, 1, 2, 4 of right, wrong, right, wrong
    "signal_expected": expected["signal_expected"], "signal_expected_random": expected["signal_expected_random"],
    "false_prune": pytest.approx(math.nan, nan_ok=True), "survivors_fewest": 0,
    "survivors_histogram": [1, 2, 0, 1],
  }


def test_expected_signals_are_means_over_outcomes():
  """Kept rows: over all rewards that the posteriors allow. Random ones: over all subsets too, each row kept with that share."""
  q, pruned = [0.2, 0.5, 0.9, 0.4], [False, True, False, True]
  group = [rollout(0, reward=math.nan if cut else 1.0, score=0.0, posterior=p, pruned=cut)
           for p, cut in zip(q, pruned, strict=True)]
  group.append(rollout(0, reward=1.0))  # ended before the decision

  def signal(stays):
    total = 0.0
    for rewards in np.ndindex(2, 2, 2, 2):
      chance = math.prod(p if r else 1 - p for p, r in zip(q, rewards, strict=True))
      there = [r for r, s in zip(rewards, stays, strict=True) if s] + [1]
      total += chance * len(there) * np.var(there)
    return total

  out = expected_signals([group])
  for r in group:  # another reward for a right answer promises the same
    r.reward *= 3.0
  assert expected_signals([group]) == out
  assert out["signal_expected"] == pytest.approx(signal([not cut for cut in pruned]))
  assert out["signal_expected_random"] == pytest.approx(np.mean([signal(s) for s in np.ndindex(2, 2, 2, 2)]))


def test_tokens_trained_are_those_the_update_sees():
  assert rollout_metrics(STEP, STEP[1:4])["tokens_trained"] == 30 + 6


def test_false_prune_rate_is_that_of_the_right_controls():
  outcomes = (1, 0.3), (1, 0.7), (1, 1.0), (0, 0.1)
  step = [*(rollout(0, reward=r, score=0.0, rule_probability=p, holdout=True) for r, p in outcomes),
          rollout(0, reward=1, score=0.0, keep_probability=0.4, rule_probability=0.4),
          rollout(0, reward=1, score=0.0, rule_probability=0.4)]  # the floor's, no control
  assert rollout_metrics(step)["false_prune"] == pytest.approx((0.7 + 0.3 + 0.0) / 3)


def test_groups_of_one_reward_are_not_mixed_whatever_it_is():
  step = [rollout(p, reward=r) for p, rewards in enumerate(((0.5, 0.5), (0.5, 1.0), (0, 1), (1, 1))) for r in rewards]
  assert rollout_metrics(step)["groups_mixed"] == 2


def test_reward_ipw_is_unbiased():
  """Over all outcomes of the draws, by their probability, the estimate is the mean reward of all that started."""
  rewards, survival = [1, 0, 1], [0.3, 0.6, 0.9]
  expected = 0.0
  for outcome in np.ndindex(2, 2, 2):
    chance = math.prod(p if kept else 1 - p for p, kept in zip(survival, outcome, strict=True))
    group = [rollout(0, reward=r if kept else math.nan, score=0.0, keep_probability=p, pruned=not kept)
             for r, p, kept in zip(rewards, survival, outcome, strict=True)]
    expected += chance * rollout_metrics(group)["reward_ipw"]
  assert expected == pytest.approx(2 / 3)


def test_head_auc_within_leaves_the_prompts_difficulty_out():
  """Scores tell the easy prompt from the hard one and nothing else: high over all, 1/2 within."""
  easy = [rollout(0, reward=r, score=2.0) for r in (1, 1, 1, 0)]
  hard = [rollout(1, reward=r, score=-2.0) for r in (1, 0, 0, 0)]
  out = rollout_metrics(easy + hard)
  assert out["head_auc_within"] == 0.5 and out["head_auc"] == pytest.approx((3 * 3 + (3 * 1 + 1 * 3) / 2) / 16)


@pytest.mark.parametrize("step, undefined", [
  # nothing survived
  ([rollout(0, score=1.0, pruned=True)], {"reward", "baseline_shift", "pos_ratio", "pos_var", "ungraded", "response_len",
                                          "truncated", "head_auc", "head_auc_within", "head_ece", "head_brier", "head_spearman",
                                          "tokens_saved"}),
  ([rollout(0, reward=1), rollout(0, reward=0)], {"head_auc", "head_auc_within", "head_ece", "head_brier", "head_spearman",
                                                  "signal_expected", "signal_expected_random"}),  # nothing was scored
  ([rollout(0, reward=1, score=1.0), rollout(1, reward=0, score=0.0)], {"head_auc_within", "baseline_shift"}),
  # no mixed group, one label
  ([rollout(0, reward=1, score=1.0)], {"head_auc", "head_auc_within", "head_spearman", "baseline_shift"}),
])
def test_what_is_undefined_is_nan_and_nothing_else(step, undefined):
  out = rollout_metrics(step)
  numbers = {name: value for name, value in out.items() if name != "survivors_histogram"}
  assert {name for name, value in numbers.items() if math.isnan(value)} == undefined | {"false_prune"}  # no holdout
  assert out["rollouts_started"] == len(step)
  assert all(isinstance(v, (int, float)) and not isinstance(v, np.generic) for v in numbers.values())


def test_ungraded_counts_failures_of_the_grader_and_not_wrong_answers():
  reasons = ["correct", "wrong", "no_answer", "too_long", "timeout", "crashed", "error", "wrong"]
  step = [dataclasses.replace(rollout(0, reward=float(reason == "correct")), reason=reason) for reason in reasons]
  assert rollout_metrics(step)["ungraded"] == 3 / 8


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
  rewards = np.array([1, 0, 0, 1, 0, 0])
  for k in range(1, 7):
    draws = list(itertools.combinations(rewards, k))
    assert pass_at_k(rewards, k) == pytest.approx(np.mean([max(d) for d in draws]))


def test_bootstrap_interval_covers_and_narrows():
  values = np.random.default_rng(1).integers(0, 2, 400)
  low, high = bootstrap_interval(values)
  assert low < values.mean() < high and high - low == pytest.approx(2 * 1.96 * 0.5 / 20, rel=0.15)
  assert bootstrap_interval([0.5] * 9) == [0.5, 0.5]
