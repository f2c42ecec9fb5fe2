"""Advantages, the clipped policy surrogate with its GRPO and DAPO settings, KL and the quality head's loss.

An algorithm is a value of `LossConfig`, not a subclass: GRPO (Shao et al. 2024) and DAPO (Yu et al. 2025) differ in three
numbers and in what is averaged over. Everything is float32. Sums are returned with their denominators apart, so that
micro-batches of any shape add up to the loss of the whole batch. Left out: DAPO's dynamic sampling and overlong
punishment, which act on rewards and batches, not in the loss.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class LossConfig:
  """One algorithm. `aggregate`: "token" = mean over all response tokens; "sequence" = mean over rows of row means."""
  clip_low: float = 0.2
  clip_high: float = 0.2
  aggregate: str = "sequence"
  kl_weight: float = 0.0
  normalize_std: bool = True
  head_weight: float = 1.0


GRPO = LossConfig()
DAPO = LossConfig(clip_high=0.28, aggregate="token")
ALGORITHMS = {"grpo": GRPO, "dapo": DAPO}


def group_advantages(rewards: np.ndarray, groups: np.ndarray, normalize_std: bool = True, eps: float = 1e-6,
                     weights: np.ndarray | None = None) -> np.ndarray:
  """A_i = (R_i - mean R) / (std R + eps) within each group (METHOD section 1), over the rollouts given: the survivors.

  rewards f[B], groups i[B] -> f32[B]. A group of one, or without variance, gets 0. The standard deviation is the
  population's (divides by the group size). NumPy: it runs once a step on the host, where groups are ragged.
  weights f[B]: how many rollouts each stands for (1 / survival): in a group's mean and deviation, and as a factor of its
  advantage, scaled to mean 1 over the batch, so that the policy gradient estimates that of all rollouts started.
  """
  rewards, out = np.asarray(rewards, np.float32), np.zeros(len(rewards), np.float32)
  share = np.ones(len(rewards), np.float32) if weights is None else np.asarray(weights, np.float32)
  for g in np.unique(groups):
    rows = np.flatnonzero(groups == g)
    w = share[rows] / share[rows].sum()
    centred = rewards[rows] - np.sum(w * rewards[rows])
    out[rows] = centred / (np.sqrt(np.sum(w * centred**2)) + eps) if normalize_std else centred
    if np.all(rewards[rows] == rewards[rows[0]]):
      out[rows] = 0.0
  return out if weights is None else out * share / share.mean()


def surrogate(logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, mask: jax.Array, *,
              clip_low: float, clip_high: float) -> tuple[jax.Array, jax.Array]:
  """Clipped surrogate per token, -min(r A, clip(r, 1 - low, 1 + high) A), and where the clip binds: both f32[B,S].

  logprobs, old_logprobs, mask f32[B,S], advantages f32[B]; r = exp(logprobs - old_logprobs).
  """
  ratio = jnp.exp(jnp.where(mask > 0, logprobs - old_logprobs, 0.0))
  a = advantages[:, None]
  plain, clipped = ratio * a, jnp.clip(ratio, 1.0 - clip_low, 1.0 + clip_high) * a
  return -jnp.minimum(plain, clipped), (clipped < plain).astype(jnp.float32)


def kl_estimate(logprobs: jax.Array, ref_logprobs: jax.Array, mask: jax.Array) -> jax.Array:
  """The k3 estimator of KL(policy || reference) per token, exp(d) - d - 1 with d = ref - policy: f32[B,S], >= 0."""
  d = jnp.where(mask > 0, ref_logprobs - logprobs, 0.0)
  return jnp.exp(d) - d - 1.0


def token_weights(mask: jax.Array, aggregate: str, num_tokens: jax.Array, num_rows: jax.Array) -> jax.Array:
  """Weight of each token in the batch mean, f32[B,S]; num_tokens and num_rows are of the whole batch, f32[]."""
  if aggregate == "token":
    return mask / jnp.maximum(num_tokens, 1.0)
  if aggregate == "sequence":
    return mask / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1.0) / jnp.maximum(num_rows, 1.0)
  raise ValueError(f"loss.aggregate is {aggregate!r}; it must be 'token' or 'sequence'")


def binary_cross_entropy(logit: jax.Array, label: jax.Array) -> jax.Array:
  """-log p(label) of a Bernoulli with the given logit, f32[B]."""
  return jax.nn.softplus(logit) - label * logit
