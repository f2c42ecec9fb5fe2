"""Advantages, the clipped policy surrogate with its GRPO and DAPO settings, KL and the quality head's loss.

An algorithm is a value of `LossConfig`, not a subclass: GRPO (Shao et al. 2024), DAPO (Yu et al. 2025), Dr. GRPO (Liu et al.
2025) and GSPO (Zheng et al. 2025) differ in a few numbers and in what is averaged over. Everything is float32. A
micro-batch's part is divided by the whole batch's denominator, so that micro-batches of any shape add up to its loss. DAPO's
dynamic sampling chooses batches and is resampling.py's.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from arrol_jax.types import UserError

LARGEST_ADVANTAGE = 1e15  # gradients are squared and summed in float32


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """One algorithm.

  aggregate: "token" = mean over all response tokens; "sequence" = mean over rows of row means; "constant" = sum over tokens
  by rows and `longest`, the longest response allowed in tokens. ratio: "token", or "sequence" = geometric mean over the row's
  tokens. overlong: share of the longest response over which a growing punishment is added to the reward
  (`overlong_penalty`), 0 none. baseline: whose mean and deviation advantages are taken from, the group's "survivors" (as
  published) or all that it "started" (`started_levels`). correction: what becomes of the difference between sampler and trainer
  (`correction_weights`).
  """
  clip_low: float = 0.2
  clip_high: float = 0.2
  aggregate: str = "sequence"
  kl_weight: float = 0.0
  normalize_std: bool = True
  head_weight: float = 1.0
  ratio: str = "token"
  overlong: float = 0.0
  longest: int = 1
  baseline: str = "survivors"
  correction: str = "none"
  correction_cap: float = 2.0

  @property
  def by_token(self) -> bool:
    """Whether a token's loss depends on its own log-prob alone, not on its row's: then update.py computes logits once."""
    return self.ratio == "token" and self.correction != "mask"


GRPO = LossConfig()
DAPO = LossConfig(clip_high=0.28, aggregate="token", overlong=0.2)  # 4,096 of 20,480 tokens
DR_GRPO = LossConfig(aggregate="constant", normalize_std=False)
GSPO = LossConfig(clip_low=3e-4, clip_high=4e-4, ratio="sequence")
ALGORITHMS = {"grpo": GRPO, "dapo": DAPO, "dr_grpo": DR_GRPO, "gspo": GSPO}
AGGREGATES, RATIOS = ("token", "sequence", "constant"), ("token", "sequence")
BASELINES = ("survivors", "started")


def overlong_penalty(length: np.ndarray, longest: int, share: float) -> np.ndarray:
  """DAPO's soft punishment in tokens: 0 up to longest - buffer, then linearly down to -1/2 at `longest`; buffer = share of it.

  DAPO (arXiv 2503.14476) goes down to -1, for rewards of -1 and 1: half of it is the same for rewards of 0 and 1.
  """
  buffer = round(share * longest)
  if not buffer:
    return np.zeros(len(length), np.float32)
  return 0.5 * np.clip((longest - buffer - np.asarray(length)) / buffer, -1.0, 0.0).astype(np.float32)


def group_advantages(rewards: np.ndarray, groups: np.ndarray, normalize_std: bool = True, eps: float = 1e-6,
                     weights: np.ndarray | None = None, levels: dict[int, tuple[float, float]] | None = None) -> np.ndarray:
  """A_i = (R_i - mean R) / (std R + eps) within each group (METHOD section 1), over the rollouts given: the survivors.

  rewards f[B], finite, of at most 1e150 (their squares are summed), groups i[B] -> f32[B]. A group of one, or without variance
  but for rounding (1e-12 of its rewards), gets 0. The standard deviation is the population's (over the group size). NumPy in
  double precision: it runs once a step on the host, where groups are ragged.
  weights f[B]: how many rollouts each stands for (1 / keep probability): in a group's mean and deviation, and as a factor of its
  advantage, scaled to mean 1 over the batch, so that the policy gradient estimates that of all rollouts started.
  levels: each group's mean and deviation where they are not those of the rollouts given (`started_levels`).
  Raises UserError for advantages above LARGEST_ADVANTAGE, which only normalize_std=False can give.
  """
  rewards, out = np.asarray(rewards, float), np.zeros(len(rewards), np.float32)
  share = np.ones(len(rewards)) if weights is None else np.asarray(weights, float)
  for g in np.unique(groups):
    rows = np.flatnonzero(groups == g)
    own, w = rewards[rows], share[rows] / share[rows].sum()
    if np.ptp(own) > 1e-12 * np.abs(own).max():
      mean = np.sum(w * own) if levels is None else levels[g][0]
      deviation = np.sqrt(np.sum(w * (own - mean)**2)) if levels is None else levels[g][1]
      advantage = (own - mean) / (deviation + eps) if normalize_std else own - mean
      if np.abs(advantage).max() > LARGEST_ADVANTAGE:
        raise UserError(f"rewards of one prompt lie {np.ptp(own):.3g} apart, and loss.normalize_std=False takes that for an "
                        "advantage, whose gradient float32 cannot hold: make the rewards smaller, or divide by their deviation")
      out[rows] = advantage
  return out if weights is None or not len(out) else (out * (share / share.mean())).astype(np.float32)


def started_levels(rewards: np.ndarray, success: np.ndarray, posterior: np.ndarray,
                   groups: np.ndarray) -> dict[int, tuple[float, float]]:
  """Mean and standard deviation of each group's rewards over all rollouts started (METHOD 10.7).

  Of a pruned rollout nothing is known but its posterior q: it counts as q of the batch's mean reward of a success and 1 - q of
  that of a failure; where the batch has none of these, of the highest or lowest reward there is. A rule that keeps by posteriors
  keeps rollouts whose mean is not the group's; measured from theirs, a prefix that is better than the policy's average counts as
  worse.
  rewards f[B], NaN where pruned; success f[B], 1 or 0; posterior f[B], of the pruned ones, NaN where there is none: then the
  share of successes; groups i[B].
  """
  known = ~np.isnan(rewards)
  most, least = (rewards[known].max(), rewards[known].min()) if known.any() else (1.0, 0.0)
  of = lambda rows, default: rewards[known & rows].mean() if np.any(known & rows) else default
  right, wrong = of(success == 1, most), of(success == 0, least)
  q = np.where(known, 0.0, np.where(np.isnan(posterior), success[known].mean() if known.any() else 0.5, posterior))
  mean = np.where(known, rewards, q * right + (1 - q) * wrong)
  out = {}
  for g in np.unique(groups):
    rows = groups == g
    level = mean[rows].mean()
    square = np.where(known, (rewards - level)**2, q * (right - level)**2 + (1 - q) * (wrong - level)**2)[rows]
    out[int(g)] = float(level), float(np.sqrt(square.mean()))
  return out


def surrogate(logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array, *,
              clip_low: float, clip_high: float, ratio: str = "token") -> tuple[jax.Array, jax.Array]:
  """Clipped surrogate per token, -min(r A, clip(r, 1 - low, 1 + high) A), and where the clip binds: both f32[B,S].

  logprobs, old_logprobs, mask f32[B,S], advantages f32[B]; r = exp(logprobs - old_logprobs), with ratio "sequence" (GSPO)
  the exponential of its mean over the row's tokens.
  """
  change = jnp.where(mask > 0, logprobs - old_logprobs, 0.0)
  if ratio == "sequence":
    mean = jnp.sum(change, axis=1, keepdims=True) / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1.0)
    change = jnp.broadcast_to(mean, change.shape)
  ratio = jnp.exp(change)
  a = advantages[:, None]
  plain, clipped = ratio * a, jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * a
  return -jnp.minimum(plain, clipped), (clipped < plain).astype(jnp.float32)


def kl_estimate(logprobs: jax.Array, ref_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
  """The k3 estimator of KL(policy || reference) per token, exp(d) - d - 1 with d = ref - policy: f32[B,S], >= 0."""
  d = jnp.where(mask > 0, ref_logprobs - logprobs, 0.0)
  return jnp.expm1(d) - d


def token_weights(mask: jax.Array, aggregate: str, num_tokens: jax.Array, num_rows: jax.Array, longest: int) -> jax.Array:
  """Weight of each token in the batch mean, f32[B,S]; num_tokens and num_rows are of the whole batch, f32[]; longest:
  response tokens at most."""
  if aggregate == "token":
    return mask / jnp.maximum(num_tokens, 1.0)
  if aggregate == "sequence":
    return mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1.0) / jnp.maximum(num_rows, 1.0)
  if aggregate == "constant":
    return mask / (jnp.maximum(num_rows, 1.0) * longest)
  raise ValueError(f"loss.aggregate is {aggregate!r}; it must be one of {', '.join(AGGREGATES)}")


CORRECTIONS = ("none", "truncate", "mask")


def correction_weights(old_logprobs: jax.Array, sampler_logprobs: jax.Array, mask: jax.Array, correction: str,
                       cap: float) -> jax.Array:
  """Importance weights f32[B,S], constants, of what another program than the trainer's, or a rounded cache, sampled.

  "none": 1. "truncate": min(r, cap) a token with r = exp(old - sampler) (truncated importance sampling, as in TRL and slime).
  "mask": a row's whole product of r, and 0 where that exceeds cap (masked importance sampling over the sequence).
  """
  gap = jax.lax.stop_gradient(jnp.where(mask > 0, old_logprobs - sampler_logprobs, 0.0))
  if correction == "truncate":
    return jnp.minimum(jnp.exp(gap), cap)
  if correction == "mask":
    row = jnp.sum(gap, axis=1, keepdims=True)
    return jnp.broadcast_to(jnp.where(row <= jnp.log(cap), jnp.exp(row), 0.0), gap.shape)
  return jnp.ones_like(gap)


def binary_cross_entropy(logit: jax.Array, label: jax.Array) -> jax.Array:
  """-log p(label) of a Bernoulli with the given logit, f32[B]."""
  return jax.nn.softplus(logit) - label * logit


def weighted_mean(values: jax.Array, weight: jax.Array) -> jax.Array:
  """The mean of values f32[N] with weights f32[N] >= 0, f32[]; 0 where all weights are 0."""
  return jnp.sum(weight * values) / jnp.maximum(jnp.sum(weight), 1e-6)
