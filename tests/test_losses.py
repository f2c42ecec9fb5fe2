"""Losses: every term equals a sum that a person could do by hand, and what is masked may hold anything."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrol_jax.learning.losses import (
  ALGORITHMS,
  DAPO,
  GRPO,
  LossConfig,
  binary_cross_entropy,
  correction_weights,
  group_advantages,
  kl_estimate,
  overlong_penalty,
  started_levels,
  surrogate,
  token_weights,
)
from arrol_jax.types import UserError

ROWS, LENGTH = 3, 7
# Prompt, response, padding: responses of 4, 1 and 3 tokens at different places.
MASK = np.array([[0, 0, 1, 1, 1, 1, 0], [0, 1, 0, 0, 0, 0, 0], [0, 0, 0, 0, 1, 1, 1]], np.float32)
ADVANTAGES = np.array([1.5, -0.5, -2.0], np.float32)


@pytest.fixture
def logprobs():
  """Log-probs under the policy, the old policy and the reference: ratios from 0.5 to 2, on both sides of every clip."""
  rng = np.random.default_rng(0)
  old, ref = (rng.uniform(-3, -0.5, (ROWS, LENGTH)).astype(np.float32) for _ in range(2))
  return (old + rng.uniform(-0.7, 0.7, old.shape)).astype(np.float32), old, ref


# ---- advantages


def test_advantages_of_a_mixed_group():
  """One right of four: mean 1/4, variance 3/16, so (3/4) / (sqrt(3)/4) = sqrt(3) and -1/sqrt(3)."""
  out = group_advantages([0, 1, 0, 0], np.zeros(4, int))
  np.testing.assert_allclose(out, [-1 / math.sqrt(3), math.sqrt(3), -1 / math.sqrt(3), -1 / math.sqrt(3)], rtol=1e-5)
  assert out.dtype == np.float32


def test_advantages_without_standard_deviation():
  np.testing.assert_allclose(group_advantages([0, 1, 0, 0], np.zeros(4, int), normalize_std=False),
                             [-0.25, 0.75, -0.25, -0.25], rtol=1e-6)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("rewards", [[0, 0, 0], [1, 1, 1], [0.1] * 7, [1], [0]])
def test_a_group_without_variance_or_of_one_teaches_nothing(rewards, normalize):
  """Exactly 0: over a standard deviation of rounding errors, a rounding error would be as large as a success."""
  np.testing.assert_array_equal(group_advantages(rewards, np.full(len(rewards), 5), normalize), 0.0)


def test_advantages_of_ragged_groups_in_any_order():
  """Survivors: two of group 9 (one right), three of group 2 (two right), one of group 4."""
  groups, rewards = np.array([2, 9, 2, 4, 9, 2]), [1, 0, 0, 1, 1, 1]
  third = 1 / 3 / math.sqrt(2 / 9)
  np.testing.assert_allclose(group_advantages(rewards, groups), [third, -1, -2 * third, 0, 1, third], rtol=1e-5)


NONE = math.nan


def test_levels_of_all_that_a_group_started():
  """Group 3: one right, two wrong, one pruned that is right with 1/2: mean 3/8, square of the deviation 3/8 - 9/64. Group 8 knows
  of one wrong and of one pruned without a posterior, which is as the batch is: right with 1/4."""
  rewards, success = np.array([1, 0, 0, NONE, 0, NONE]), np.array([1, 0, 0, NONE, 0, NONE])
  out = started_levels(rewards, success, np.array([0.9, 0.9, 0.9, 0.5, 0.9, NONE]), np.array([3, 3, 3, 3, 8, 8]))
  assert out == {3: pytest.approx((3 / 8, math.sqrt(3 / 8 - 9 / 64))), 8: pytest.approx((1 / 8, math.sqrt(1 / 8 - 1 / 64)))}
  # Other rewards: a success has 10 or 6, mean 8, a failure 2.
  out = started_levels(np.array([10, 6, 2, NONE]), np.array([1, 1, 0, NONE]), np.array([0, 0, 0, 0.25]), np.zeros(4, int))
  assert out[0] == pytest.approx((21.5 / 4, math.sqrt((4.625**2 + 0.625**2 + 3.375**2 + 2.625**2 / 4 + 3.375**2 * 3 / 4) / 4)))


@pytest.mark.parametrize("least", [2, 5, 9])  # of a success: all, some and none of those known are one
def test_levels_go_with_the_scale_of_rewards(least):
  """Rewards in another unit and from another zero give the same advantages, whoever of the batch is right."""
  rewards, groups = np.array([2, 4, 7, NONE, 3, NONE]), np.array([0, 0, 0, 0, 1, 1])
  success, posterior = np.where(np.isnan(rewards), NONE, rewards >= least), np.array([0, 0, 0, 0.3, 0, 0.6])
  (mean, deviation), (moved, wider) = (started_levels(r, success, posterior, groups)[0] for r in (rewards, 100 * rewards - 30))
  assert (moved, wider) == pytest.approx((100 * mean - 30, 100 * deviation))


def test_where_nothing_is_pruned_all_started_are_the_survivors():
  rewards, groups = np.array([1, 0, 0.5, 0, 1, 1]), np.array([0, 0, 0, 1, 1, 1])
  levels = started_levels(rewards, (rewards >= 1).astype(float), np.full(6, NONE), groups)
  np.testing.assert_allclose(group_advantages(rewards, groups, levels=levels), group_advantages(rewards, groups), rtol=1e-6)


def test_a_baseline_of_all_started_is_not_moved_by_whom_the_rule_keeps():
  """The half that promises most is kept: the survivors' mean is above the group's chance of success, that of all started is not,
  and a survivor whose chance is between the two has a positive expected advantage by it, a negative one by the survivors'."""
  rng = np.random.default_rng(0)
  chance = np.tile([0.1, 0.2, 0.4, 0.7], (4000, 1))
  rewards = np.where(np.arange(4) >= 2, rng.random(chance.shape) < chance, NONE)
  groups = np.repeat(np.arange(4000), 4)
  levels = started_levels(rewards.ravel(), rewards.ravel(), chance.ravel(), groups)
  means = np.array([mean for mean, _ in levels.values()])
  assert means.mean() == pytest.approx(chance.mean(), abs=0.01) and np.nanmean(rewards) == pytest.approx(0.55, abs=0.02)
  third = rewards[:, 2]
  assert (third - means).mean() == pytest.approx(0.4 - 0.35, abs=0.02)
  assert (third - np.nanmean(rewards, axis=1)).mean() == pytest.approx(0.4 - 0.55, abs=0.02)


def test_no_survivors_no_advantages():
  assert group_advantages([], np.zeros(0, int)).shape == (0,)
  assert group_advantages([], np.zeros(0, int), weights=np.zeros(0)).shape == (0,)


# ---- surrogate, KL, weights


@pytest.mark.parametrize("low, high", [(0.2, 0.2), (0.2, 0.28), (0.0, 0.0), (0.1, 5.0)])
def test_surrogate_is_the_loop(logprobs, low, high):
  new, old, _ = logprobs
  term, clipped = surrogate(new, old, ADVANTAGES, MASK, clip_low=low, clip_high=high)
  binds = 0
  for b in range(ROWS):
    for s in np.flatnonzero(MASK[b]):
      ratio, a = math.exp(float(new[b, s]) - float(old[b, s])), float(ADVANTAGES[b])
      inside = min(max(ratio, 1 - low), 1 + high)
      assert term[b, s] == pytest.approx(-min(ratio * a, inside * a), rel=1e-5)
      assert clipped[b, s] == (inside * a < ratio * a)
      binds += inside * a < ratio * a
  assert 0 < binds < MASK.sum()


@pytest.mark.parametrize("ratio, advantage, grpo, dapo", [
  (1.25, 1.0, 1.2, 1.25),    # a gain past 1.2 counts only up to the clip, which DAPO puts higher
  (1.5, 1.0, 1.2, 1.28),
  (0.7, 1.0, 0.7, 0.7),      # a good token that became less likely is never clipped
  (0.7, -1.0, -0.8, -0.8),   # a bad token need not fall below 0.8
  (1.5, -1.0, -1.5, -1.5),   # a bad token that became more likely is never clipped
])
def test_clip_and_clip_higher_by_hand(ratio, advantage, grpo, dapo):
  new, one = jnp.full((1, 1), math.log(ratio)), jnp.ones((1, 1))
  for loss, gain in ((GRPO, grpo), (DAPO, dapo)):
    f = lambda x, loss=loss: surrogate(x, jnp.zeros((1, 1)), jnp.full(1, advantage), one, clip_low=loss.clip_low,
                                       clip_high=loss.clip_high)[0][0, 0]
    value, slope = jax.value_and_grad(f)(new)
    assert value == pytest.approx(-gain, rel=1e-5)
    # Where the clip binds there is no gradient; elsewhere d(r A) / d(log r) is r A.
    assert slope[0, 0] == pytest.approx(-gain if gain == pytest.approx(ratio * advantage) else 0.0, rel=1e-5)


def test_gradient_at_the_old_policy_is_the_policy_gradient(logprobs):
  """At ratio 1 the surrogate's slope in a token's log-prob is minus its advantage, clipped or not."""
  old = logprobs[1]
  slope = jax.grad(lambda x: jnp.sum(MASK * surrogate(x, old, ADVANTAGES, MASK, clip_low=0.2, clip_high=0.2)[0]))(old)
  np.testing.assert_allclose(slope, -ADVANTAGES[:, None] * MASK, rtol=1e-6)


def test_kl_is_the_loop(logprobs):
  new, _, ref = logprobs
  out = kl_estimate(new, ref, MASK)
  for b, s in zip(*np.nonzero(MASK), strict=True):
    d = float(ref[b, s]) - float(new[b, s])
    assert out[b, s] == pytest.approx(math.exp(d) - d - 1, rel=1e-4)
  assert np.all(np.asarray(out) >= 0)


def test_kl_by_hand_and_unbiased():
  """Twice as likely under the reference: 2 - ln 2 - 1. Its mean under the policy is the KL divergence itself."""
  one = lambda x: jnp.full((1, 1), x, jnp.float32)
  assert kl_estimate(one(-1.0), one(-1.0 + math.log(2)), one(1.0))[0, 0] == pytest.approx(1 - math.log(2), rel=1e-5)
  p, r = np.array([[0.5, 0.3, 0.2]], np.float32), np.array([[0.2, 0.2, 0.6]], np.float32)
  mean = float(np.sum(p * np.asarray(kl_estimate(np.log(p), np.log(r), np.ones_like(p)))))
  assert mean == pytest.approx(0.5 * math.log(2.5) + 0.3 * math.log(1.5) + 0.2 * math.log(1 / 3), rel=1e-5)


def test_token_weights_are_the_loop():
  """8 response tokens in 3 rows of 4, 1 and 3, of a batch that has 20 tokens and 5 rows in all."""
  weights = lambda how: np.asarray(token_weights(MASK, how, jnp.float32(20), jnp.float32(5), 7))
  by_token, by_row = weights("token"), weights("sequence")
  for b in range(ROWS):
    for s in range(LENGTH):
      assert by_token[b, s] == pytest.approx(MASK[b, s] / 20)
      assert by_row[b, s] == pytest.approx(MASK[b, s] / sum(MASK[b]) / 5)


@pytest.mark.parametrize("how", ["token", "sequence"])
def test_weights_of_a_whole_batch_sum_to_one_and_empty_rows_weigh_nothing(how):
  mask = np.concatenate([MASK, np.zeros((2, LENGTH), np.float32)])
  weight = np.asarray(token_weights(mask, how, jnp.float32(8), jnp.float32(3), 7))
  assert weight.sum() == pytest.approx(1.0, rel=1e-6) and np.all(weight[3:] == 0)


def test_unknown_aggregate_is_refused():
  with pytest.raises(ValueError, match="loss.aggregate is 'mean'; it must be one of token, sequence, constant"):
    token_weights(MASK, "mean", jnp.float32(1), jnp.float32(1), 7)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 1e30])
def test_what_is_masked_may_hold_anything(logprobs, garbage):
  """Neither the value nor any gradient sees it; the same loss with zeros there is the same number."""
  def loss(new, old, ref):
    weight = token_weights(MASK, "sequence", jnp.float32(8), jnp.float32(3), 7)
    term = surrogate(new, old, ADVANTAGES, MASK, clip_low=0.2, clip_high=0.2)[0]
    return jnp.sum(weight * (term + 0.1 * kl_estimate(new, ref, MASK)))

  clean = [np.where(MASK > 0, x, 0).astype(np.float32) for x in logprobs]
  dirty = [np.where(MASK > 0, x, garbage).astype(np.float32) for x in logprobs]
  f = jax.value_and_grad(loss, argnums=(0, 1, 2))
  (value, slopes), (expected, expected_slopes) = f(*dirty), f(*clean)
  assert np.isfinite(value) and value == expected
  for got, want in zip(slopes, expected_slopes, strict=True):
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(np.asarray(got)[MASK == 0], 0.0)


# ---- algorithms


def test_grpo_and_dapo_differ_in_clip_and_average():
  assert ALGORITHMS["grpo"] == GRPO and ALGORITHMS["dapo"] == DAPO
  assert GRPO == LossConfig(0.2, 0.2, "sequence", kl_weight=0.0, normalize_std=True, head_weight=1.0)
  assert DAPO == LossConfig(0.2, 0.28, "token", kl_weight=0.0, normalize_std=True, head_weight=1.0, overlong=0.2)


def test_a_long_row_counts_more_under_dapo():
  """Rows of 1 and 3 tokens, loss 1 on each token of the first and 0 on the second: means 1/2 by rows, 1/4 by tokens."""
  mask = np.array([[1, 0, 0], [1, 1, 1]], np.float32)
  loss = np.array([[1, 1, 1], [0, 0, 0]], np.float32)
  for algorithm, expected in ((GRPO, 1 / 2), (DAPO, 1 / 4)):
    weight = token_weights(mask, algorithm.aggregate, jnp.float32(4), jnp.float32(2), 7)
    assert float(jnp.sum(weight * loss)) == pytest.approx(expected)


# ---- quality head's loss


def test_binary_cross_entropy_by_hand():
  logit = jnp.array([0.0, 0.0, 2.0, 2.0, -3.0])
  label = jnp.array([0.0, 1.0, 1.0, 0.0, 1.0])
  expected = [math.log(1 + math.exp(x)) for x in (0, 0, -2, 2, 3)]
  np.testing.assert_allclose(binary_cross_entropy(logit, label), expected, rtol=1e-5)


def test_binary_cross_entropy_far_out_and_its_slope():
  """Of extreme logits the loss is |logit| or 0, never infinite; the slope is probability minus label."""
  np.testing.assert_allclose(binary_cross_entropy(jnp.array([300.0, -300.0, 300.0]), jnp.array([0.0, 1.0, 1.0])),
                             [300.0, 300.0, 0.0], rtol=1e-6)
  logit, label = jnp.array([0.0, 1.2, -400.0, 400.0]), jnp.array([1.0, 0.0, 1.0, 0.0])
  slope = jax.grad(lambda x: jnp.sum(binary_cross_entropy(x, label)))(logit)
  np.testing.assert_allclose(slope, [-0.5, 1 / (1 + math.exp(-1.2)), -1.0, 1.0], rtol=1e-5)


# ---- Dr. GRPO, GSPO, overlong responses, weighted groups


def test_the_constant_aggregate_divides_by_rows_and_the_longest_response():
  np.testing.assert_allclose(token_weights(jnp.asarray(MASK), "constant", 8.0, 3.0, 10), MASK / 30, rtol=1e-6)


def test_the_sequence_ratio_is_one_number_a_row(logprobs):
  new, old, _ = logprobs
  term, clipped = surrogate(new, old, ADVANTAGES, MASK, clip_low=0.1, clip_high=0.2, ratio="sequence")
  for b in range(ROWS):
    tokens = MASK[b] > 0
    r = math.exp(np.mean((new - old)[b, tokens]))
    want = -min(r * ADVANTAGES[b], min(max(r, 0.9), 1.2) * ADVANTAGES[b])
    np.testing.assert_allclose(np.asarray(term)[b, tokens], want, rtol=1e-5)
    assert np.ptp(np.asarray(clipped)[b, tokens]) == 0


def test_overlong_punishment_counts_tokens():
  """A fifth of 100: from 80 tokens on, one twentieth a token."""
  punishment = overlong_penalty(np.array([10, 80, 81, 90, 100, 120]), 100, 0.2)
  np.testing.assert_allclose(punishment, [0, 0, -0.025, -0.25, -0.5, -0.5])
  right, group = np.array([1, 0, 1, 0, 1, 0.0]), np.zeros(6, int)
  theirs = 2 * right - 1 + np.array([0, 0, -0.05, -0.5, -1, -1])  # its rewards of -1 and 1, its punishment
  np.testing.assert_allclose(group_advantages(right + punishment, group), group_advantages(theirs, group), rtol=1e-4)
  assert not overlong_penalty(np.array([100]), 100, 0.0).any()


def test_weighted_advantages_estimate_the_whole_groups():
  """Two right kept with 1/4 and 1/2, one wrong kept for sure: weights 4, 2, 1 in mean and as factors, mean weight 7/3."""
  out = group_advantages([1, 1, 0], np.zeros(3, int), normalize_std=False, weights=np.array([4, 2, 1]))
  np.testing.assert_allclose(out, np.array([4 / 7, 2 / 7, -6 / 7]) / (7 / 3), rtol=1e-5)


def test_corrections_by_hand():
  """Ratios of trainer to sampler 1/2, 3, 1 in the first row (product 1.5) and 4, 2 in the second (product 8); the cap is 2."""
  ratio, mask = np.array([[0.5, 3.0, 1.0], [4.0, 2.0, 9.0]]), np.array([[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]])
  sampler = np.full((2, 3), -1.5)
  given = [jnp.asarray(x) for x in (sampler + np.log(ratio), sampler, mask)]
  weights = lambda kind: np.asarray(correction_weights(*given, kind, 2.0))
  np.testing.assert_allclose(weights("truncate") * mask, [[0.5, 2.0, 1.0], [2.0, 2.0, 0.0]], rtol=1e-5)
  np.testing.assert_allclose(weights("mask"), [[1.5] * 3, [0.0] * 3], rtol=1e-5)
  np.testing.assert_array_equal(weights("none"), np.ones((2, 3)))


@pytest.mark.parametrize("rewards", [[1.5, 1.0, 0.5, 0.0], [-1, -1, 1, 1], [0, 100, 0, 0], [1e8, 1e8 + 1, 1e8, 1e8],
                                     [3e38, 0, 0, 0], [1e39, -1e39, 1e39, 2e39], [1e150, -1e150, 0, 1e150],
                                     [1, 1 + 1e-9, 1, 1 + 2e-10], [1e6, 1e6 + 1e-4, 1e6, 1e6],
                                     [-3e-3, 2e-3, 0, 0]])
def test_rewards_of_any_size_are_taken_as_they_are(rewards):
  """(R - mean) / (std + 1e-6) in double precision; not clipped to [0, 1]."""
  rewards = np.array(rewards, float)
  want = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
  assert np.abs(want).max() > 1e-4
  np.testing.assert_allclose(group_advantages(rewards, np.zeros(4, int)), want, rtol=1e-6)


def test_advantages_that_no_gradient_can_hold_are_refused():
  """Not divided by their deviation; in the update they would be infinite."""
  assert group_advantages([1e14, 0], np.zeros(2, int), normalize_std=False)[0] == np.float32(5e13)
  with pytest.raises(UserError, match="rewards of one prompt lie 1e\\+39 apart, .*normalize_std=False"):
    group_advantages([1e39, 0], np.zeros(2, int), normalize_std=False)


def test_rewards_that_differ_by_rounding_alone_have_no_variance():
  np.testing.assert_array_equal(group_advantages([0.1 + 0.2, 0.3, 0.3], np.zeros(3, int)), 0.0)
