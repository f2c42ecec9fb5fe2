"""For user_cases.py: statistics that nobody sees go wrong, as figures beside those that are true."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from arrol_jax.engine import decode_attention, kv_cache
from arrol_jax.engine.decode_kernel import step_triton
from arrol_jax.learning import batching, head_training, resampling
from arrol_jax.learning.losses import group_advantages
from arrol_jax.models.layers import Rotary
from arrol_jax.pruning import decision
from arrol_jax.pruning.rule import PruneRule
from arrol_jax.types import Calibration, Rollout
from experiments.user_cases_commands import need


def rollout(i: int, prompt: int, reward: float, **fields) -> Rollout:
  return Rollout(i, prompt, np.arange(3, dtype=np.int32), np.arange(5, dtype=np.int32), np.zeros(5, np.float32), reward=reward,
                 **fields)


def statistics(_: Path) -> str:
  return "; ".join((balance(), sampled(), policy_weights(), half_life(), floor(), heads()))


def balance() -> str:
  """quality.balance at two lengths: right and wrong weigh alike at each, though one in five is right."""
  some = [rollout(i, 0, float(i % 5 == 0)) for i in range(40)] * 2
  place = [0] * 40 + [1] * 40
  weight = batching.head_weights(some, (), True, place)
  ratios = [float(sum(w for w, r, p in zip(weight, some, place, strict=True) if p == at and r.reward == 1)
                  / sum(w for w, r, p in zip(weight, some, place, strict=True) if p == at and r.reward == 0)) for at in (0, 1)]
  need(np.allclose(ratios, 1.0), f"right to wrong {ratios}")
  return f"balanced right to wrong 1:{1 / ratios[0]:.2f} and 1:{1 / ratios[1]:.2f}"


def sampled() -> str:
  """Dynamic sampling: the head learns from all rollouts, of which a quarter is right, not from the mixed groups."""
  rng = np.random.default_rng(0)

  def one(n: int, count: int) -> list:
    rate = np.where(rng.random(64) < 0.5, 0.5, 0.0)  # half of the prompts are hopeless
    return [rollout(64 * 8 * n + 8 * p + g, 64 * n + p, float(rng.random() < rate[p])) for p in range(count) for g in range(8)]

  learned, everything, _ = resampling.until_mixed(one, 64, 3)
  taught = batching.linear_examples(everything, 1, 2)[1]
  seen, true = float(taught[:len(everything)].mean()), float(np.mean([r.reward for r in everything]))
  picked = float(np.mean([r.reward for r in learned]))
  need(abs(seen - true) < 1e-6 and picked > seen, f"the head sees {seen} where {true} is true")
  return f"with dynamic sampling the head sees {seen:.3f} right where {true:.3f} is true (groups learned from: {picked:.3f})"


def policy_weights() -> str:
  """weigh=policy: over many draws the survivors' weighted mean is that of all; means are sum w x / sum w."""
  rng = np.random.default_rng(1)
  rewards, values = rng.integers(0, 2, 4096).astype(float), rng.normal(size=4096)
  values += rewards
  p = np.where(rewards > 0, 0.3, 0.8)
  whole = np.mean(group_advantages(rewards, np.zeros(4096, int), False) * values)
  kept = rng.random(4096) < p
  weights = 1 / p[kept]
  weighted = group_advantages(rewards[kept], np.zeros(kept.sum(), int), False, weights=weights) * values[kept]
  ratio = float(np.mean(weighted) / whole)  # the weight is a factor of the advantage, scaled to mean 1
  need(abs(ratio - 1) < 0.1, f"{ratio} of the full gradient")
  return f"weigh=policy gives {ratio:.2f} of the full gradient"


def half_life() -> str:
  """A table forgets by rollouts started, pruned or not."""
  left = []
  for pruned in (0, 24):
    some = [rollout(i, i // 8, 1.0, pruned=i < pruned, scores=(0.0,)) for i in range(32)]
    before = Calibration.empty(4)
    before = before.replace(negative=before.negative.at[2].set(100.0))
    left.append(float(head_training.update_calibration(before, some, 32.0).negative.sum()))
  need(np.allclose(left, 50.0), f"left of 100 {left}")
  return f"half_life leaves {left[0]:.0f} and, when 24 of 32 are pruned, {left[1]:.0f} of 100"


def floor() -> str:
  """A floor with every draw: probabilities are numbers in (0, 1], and so many survive."""
  posterior, group = jnp.linspace(0.0, 1.0, 16), jnp.repeat(jnp.arange(2), 8)
  fewest = 16
  for draw in ("bernoulli", "systematic"):
    for kind in ("published", "threshold", "group"):
      rule = PruneRule((8,), keep=0.3, kind=kind, draw=draw, floor=2)
      chance = (posterior >= rule.keep).astype(jnp.float32) if kind == "threshold" else jnp.full(16, 0.1)
      keys = jax.random.split(jax.random.key(0), 16)
      keep, probability = decision._draw(rule, keys, chance, posterior, group, jnp.ones(16, bool))
      fine = jnp.isfinite(probability) & (probability <= 1) & ((probability > 0) | ~keep)
      need(bool(jnp.all(fine)), f"{kind}, {draw}: {probability}")
      fewest = min(fewest, int(keep[:8].sum()), int(keep[8:].sum()))
  need(fewest >= 2, f"{fewest} survive")
  return f"with a floor of 2 at least {fewest} survive, probabilities are finite"


def heads() -> str:
  """More than 16 query heads a KV head in the kernel for NVIDIA GPUs (interpreted): every head as the plain way has it."""
  b, group, dim, length = 3, 24, 64, jnp.array([5, 17, 32], jnp.int32)
  rng = np.random.default_rng(0)
  array = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  q, k, v = array(b, group, dim), array(b, 1, dim), array(b, 1, dim)
  columns = kv_cache.store(array(b, 32, 1, dim), array(b, 32, 1, dim), "float32")
  at = lambda old, new: old.at[:, jnp.arange(b), length - 1].set(new.swapaxes(0, 1))
  want = decode_attention.attend_xla(q, columns.replace(k=at(columns.k, k), v=at(columns.v, v)), length)
  still = Rotary(jnp.ones((b, dim // 2)), jnp.zeros((b, dim // 2)), None, None, 1e-6)
  qkv = jnp.concatenate([q[:, None], k[:, :, None], v[:, :, None]], axis=2)
  _, got = step_triton(columns, qkv, length, still, interpret=True)
  worst = float(jnp.max(jnp.abs(got.reshape(want.shape) - want)))
  need(worst < 1e-5, f"{group} query heads a KV head: off by {worst}")
  return f"{group} query heads a KV head: within {worst:.0e} of plain attention"
