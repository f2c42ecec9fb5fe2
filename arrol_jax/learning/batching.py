"""Survivors of a step -> micro-batches of a few fixed shapes, and examples for the head (paper Algorithm 1, re-batching).

Advantages are taken over a group's survivors. Rows are contiguous and right-padded: prompt, response, padding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np

from arrol_jax.learning.losses import GRPO, LossConfig, group_advantages, overlong_penalty
from arrol_jax.models import sharding
from arrol_jax.pruning.head import empty_features
from arrol_jax.types import Batch, Examples, Rollout


class PackShape(NamedTuple):
  """Shapes of the update: rows of at most `length` tokens in `buckets` lengths, about `micro_tokens` tokens a micro-batch."""
  length: int
  micro_tokens: int
  buckets: int = 3

  def sizes(self, unit: int) -> list[tuple[int, int]]:
    """(rows, row length) of each full micro-batch, shortest rows first; rows are a multiple of `unit`."""
    lengths = sorted({-(-self.length * (b + 1) // self.buckets // 16) * 16 for b in range(self.buckets)})
    return [(-(-max(1, self.micro_tokens // n) // unit) * unit, n) for n in lengths]

  def holding(self, rows: int, longest: int, unit: int) -> tuple[int, int]:
    """The compiled size that takes the most of so many rows, the longest of which has so many tokens; half of a full one's
    rows where they do."""
    full, length = next(size for size in self.sizes(unit) if size[1] >= longest)
    half = -(-full // 2 // unit) * unit
    return (half if rows <= half else full), length


def empty_batches(shape: PackShape, mesh) -> list[Batch]:
  """A micro-batch of each size with no rollout in it: for compiling ahead."""
  unit = mesh.shape["data"] * mesh.shape["fsdp"]
  sizes = dict.fromkeys(shape.holding(rows, length, unit) for full, length in shape.sizes(unit) for rows in (full, 1))
  return [sharding.put(_micro_batch([], np.zeros(0), *size), sharding.rows(mesh)) for size in sizes]


def abstract_batch(rows: int, length: int, mesh: Mesh) -> Batch:
  """A micro-batch as shapes with shardings."""
  array = lambda dtype, *shape: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding.rows(mesh))
  grid = array(jnp.float32, length)
  return Batch(tokens=array(jnp.int32, length), response_mask=grid, sampler_logprobs=grid, old_logprobs=grid, ref_logprobs=grid,
               advantages=array(jnp.float32))


def pack(rollouts: list[Rollout], shape: PackShape, mesh, loss: LossConfig = GRPO, weigh: tuple[str, ...] = ()) -> list[Batch]:
  """Survivors -> micro-batches in at most `shape.buckets` row lengths, longest rows first: a part-filled one has the shortest.

  Advantages are taken over a group's survivors, from rewards with the loss's overlong penalty. weigh holding "policy": a
  survivor counts 1 / keep probability times in group means and advantages (METHOD 9.1), scaled to mean 1. Old and
  reference log-probs are the update's to fill.
  """
  kept = [r for r in rollouts if not r.pruned]
  weights = np.array([1.0 / r.keep_probability for r in kept]) if "policy" in weigh else None
  shaped = np.array([r.reward for r in kept], np.float32)
  shaped = shaped + overlong_penalty(np.array([len(r.tokens) for r in kept]), loss.longest, loss.overlong)
  advantages = group_advantages(shaped, np.array([r.prompt for r in kept], int), loss.normalize_std, weights=weights)
  unit = mesh.shape["data"] * mesh.shape["fsdp"]
  length_of = lambda i: len(kept[i].prompt_tokens) + len(kept[i].tokens)
  order, batches = sorted(range(len(kept)), key=length_of, reverse=True), []
  while order:
    rows, length = shape.holding(len(order), length_of(order[0]), unit)
    part, order = order[:rows], order[rows:]
    batches.append(_micro_batch([kept[i] for i in part], advantages[part], rows, length))
  return [sharding.put(batch, sharding.rows(mesh)) for batch in batches]


def head_examples(rollouts: list[Rollout], head: dict, width: int, weigh: tuple[str, ...] = (), balance: bool = False,
                  short: str = "skip") -> Examples:
  """What all graded survivors teach the head, padded to a power of two: one example a decision, its features as scored.

  short: what a rollout that ended before the first decision teaches: "skip" nothing (the head learns the question it will be
  asked), "last" its features at its last token (the paper leaves this open). weigh, balance: `head_weights`.
  """
  taught = []
  for r in rollouts:
    if not r.pruned:
      seen = r.features or ((r.final_features,) if short == "last" and r.final_features is not None else ())
      taught += [(features, r) for features in seen]
  size = 1 << max(0, max(len(taught), len(rollouts)) - 1).bit_length()  # few shapes
  features = jax.tree.map(lambda x: np.zeros((size, *x.shape[1:]), x.dtype), empty_features(head, width, 1))
  reward, weight = np.zeros((2, size), np.float32)
  if taught:
    jax.tree.map(lambda out, *x: np.stack(x, out=out[:len(x)], casting="same_kind"), features, *(x for x, _ in taught))
    reward[:len(taught)] = [r.reward for _, r in taught]
    weight[:len(taught)] = head_weights([r for _, r in taught], weigh, balance)
  return Examples(features, reward, weight)


def head_weights(rollouts: list[Rollout], weigh: tuple[str, ...], balance: bool) -> np.ndarray:
  """What each rollout counts in the head's loss, f32[N].

  weigh holding "head": 1 / keep probability times as much (METHOD 9.1). balance: right and wrong rollouts then weigh half of
  the whole each, so the head learns what tells them apart and leaves their shares to the table's prior; without it Adam's
  first steps, each as large as any, go into the shares alone.
  """
  weight = np.array([1.0 / r.keep_probability if "head" in weigh else 1.0 for r in rollouts], np.float32)
  if balance:
    right = np.array([r.reward for r in rollouts], np.float32)
    half = lambda share: share / max(float(np.sum(weight * share)), 1e-6)
    weight = weight * np.sum(weight) / 2 * (half(right) + half(1.0 - right))
  return weight


def _micro_batch(rows: list[Rollout], advantages: np.ndarray, count: int, length: int) -> Batch:
  grid = lambda dtype: np.zeros((count, length), dtype)
  tokens, mask, sampled, advantage = grid(np.int32), grid(np.float32), grid(np.float32), np.zeros(count, np.float32)
  for i, r in enumerate(rows):
    start, end = len(r.prompt_tokens), len(r.prompt_tokens) + len(r.tokens)
    tokens[i, :start], tokens[i, start:end] = r.prompt_tokens, r.tokens
    mask[i, start:end], sampled[i, start:end], advantage[i] = 1.0, r.logprobs, advantages[i]
  return Batch(tokens=tokens, response_mask=mask, sampler_logprobs=sampled, old_logprobs=np.zeros_like(sampled),
               ref_logprobs=np.zeros_like(sampled), advantages=advantage)
