"""The calibration table: counts of past rollouts by score and reward, and the posterior they give (METHOD section 3).

A quality head gives each rollout one logit at its detection token; the table turns logits into calibrated probabilities of
success. Several detection lengths are several tables, kept by the caller. Pure jnp, under jit and vmap. Axes: B rollouts, Q bins.
"""

import jax
import jax.numpy as jnp

from arrol_jax.types import BINS, Calibration

ALPHA = 1.0


def score_bin(score, bins=BINS):
  """Bin of a raw logit: min(bins - 1, floor(bins * sigmoid(score))).

  Args: score f32[...], the head's logit. Returns i32[...] in [0, bins); NaN goes to bin 0, callers mask it.
  """
  score = jnp.asarray(score, jnp.float32)
  unit = jnp.where(jnp.isnan(score), 0.0, jax.nn.sigmoid(score))
  return jnp.minimum(jnp.floor(unit * bins).astype(jnp.int32), bins - 1)


def update(table, score, reward, weight=1.0):
  """Adds rollouts to the table.

  The order of the rollouts within one call does not matter. Rows with weight 0 leave no trace, so a padded
  batch needs no mask. A row whose score, reward or weight is NaN is left out too: it would spoil the table.

  Args:
    table: Calibration with Q bins.
    score: f32[B] or f32[], raw logits (the sigmoid is inside).
    reward: [B] or scalar, 0 or 1 (Rollout.success), any dtype.
    weight: [B] or scalar, >= 0. 1 counts rollouts as published; 1 / p_i over the survivors makes the counts
      an unbiased estimate over all rollouts that were started (inverse propensity, not in the paper).
  Returns: the new Calibration.
  """
  score = jnp.atleast_1d(jnp.asarray(score, jnp.float32))
  reward = jnp.broadcast_to(jnp.asarray(reward, jnp.float32), score.shape)
  weight = jnp.broadcast_to(jnp.asarray(weight, jnp.float32), score.shape)
  counted = (weight > 0) & ~jnp.isnan(score) & ~jnp.isnan(reward)
  # `where` and not a product: a NaN times zero is a NaN.
  to_positive = jnp.where(counted, weight * reward, 0.0)
  to_negative = jnp.where(counted, weight * (1.0 - reward), 0.0)
  # A dense [B,Q] sum is small, and unlike a scatter-add it gives the same bits in every run on every device.
  bins = table.positive.shape[0]
  hit = score_bin(score, bins)[:, None] == jnp.arange(bins, dtype=jnp.int32)[None, :]  # bool[B,Q]
  return Calibration(
    positive=table.positive + jnp.sum(jnp.where(hit, to_positive[:, None], 0.0), axis=0),
    negative=table.negative + jnp.sum(jnp.where(hit, to_negative[:, None], 0.0), axis=0),
  )


def divide(numerator, denominator, otherwise):
  """numerator / denominator where the denominator is positive, `otherwise` elsewhere."""
  some = denominator > 0
  return jnp.where(some, numerator / jnp.where(some, denominator, 1.0), otherwise)


def prior(table):
  """Positive fraction pi of the table, f32[]; 0.5 for an empty table, which knows nothing either way."""
  positive, negative = jnp.sum(table.positive), jnp.sum(table.negative)
  return divide(positive, positive + negative, 0.5)


def bin_posterior(table, alpha=ALPHA):
  """q_b = P(reward 1 | bin b) by Bayes' rule (appendix on online calibration).

  P(b|1) = (c+_b + alpha) / (sum c+ + alpha Q), P(b|0) the same with c-, and with the prior pi
  q_b = pi P(b|1) / (pi P(b|1) + (1 - pi) P(b|0)). The prior is not smoothed: a history of only successes
  gives 1 in every bin, of only failures 0, and an empty table gives 0.5.

  Args: alpha, Laplace smoothing (the paper's is 1); with 0, a bin that has no counts gets the prior.
  Returns: f32[Q] in [0, 1].
  """
  bins = table.positive.shape[0]
  in_positive = divide(table.positive + alpha, jnp.sum(table.positive) + alpha * bins, 0.0)
  in_negative = divide(table.negative + alpha, jnp.sum(table.negative) + alpha * bins, 0.0)
  pi = prior(table)
  return divide(pi * in_positive, pi * in_positive + (1.0 - pi) * in_negative, pi)


def posterior(table, score, alpha=ALPHA):
  """q = P(reward 1 | score): `bin_posterior` at the score's bin.

  Args: score f32[...], raw logits. Returns f32[...] in [0, 1]; a NaN score says nothing and gets the prior.
  """
  score = jnp.asarray(score, jnp.float32)
  per_bin = bin_posterior(table, alpha)
  return jnp.where(jnp.isnan(score), prior(table), per_bin[score_bin(score, per_bin.shape[0])])
