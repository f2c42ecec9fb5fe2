"""Survivors of a step -> micro-batches of a few fixed shapes (paper Algorithm 1, re-batching).

Advantages are taken over a group's survivors. Rows are contiguous and right-padded: prompt, response, padding.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from arrol_jax.learning.head_training import head_weights
from arrol_jax.learning.losses import group_advantages
from arrol_jax.models import sharding
from arrol_jax.types import Batch, Rollout


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


def empty_batches(shape: PackShape, mesh, detect: tuple[int, ...]) -> list[Batch]:
  """A micro-batch of each size with no rollout in it: for compiling ahead."""
  unit = mesh.shape["data"] * mesh.shape["fsdp"]
  sizes = dict.fromkeys(shape.holding(rows, length, unit) for full, length in shape.sizes(unit) for rows in (full, 1))
  return [sharding.put(_micro_batch([], np.zeros(0), np.zeros(0), *size, detect), sharding.rows(mesh)) for size in sizes]


def pack(rollouts: list[Rollout], shape: PackShape, mesh, *, detect: tuple[int, ...], normalize_std: bool = True,
         short: str = "skip", weigh: tuple[str, ...] = (), balance: bool = False,
         overlong_penalty: Callable | None = None) -> list[Batch]:
  """Survivors -> micro-batches in at most `shape.buckets` row lengths, longest rows first: a part-filled one has the shortest.

  Advantages are taken over a group's survivors. `short` says what a rollout that ended before the detection length
  teaches the head: "skip" nothing (the head learns the question it will be asked), "last" its last hidden state (the
  paper leaves this open). weigh: where a survivor counts 1 / keep probability times (METHOD 9.1), "head" in the head's loss,
  "policy" in group means and advantages, scaled to mean 1. balance: `head_weights`. overlong_penalty(lengths): added to the
  rewards that advantages are taken from, not to those that the head learns. Old and reference log-probs are the
  update's to fill.
  """
  kept = [r for r in rollouts if not r.pruned]
  weights = np.array([1.0 / r.keep_probability for r in kept]) if "policy" in weigh else None
  shaped = np.array([r.reward for r in kept], np.float32)
  if overlong_penalty:
    shaped = shaped + overlong_penalty(np.array([len(r.tokens) for r in kept]))
  advantages = group_advantages(shaped, np.array([r.prompt for r in kept], int), normalize_std, weights=weights)
  teach = np.array([bool(r.scores) or short == "last" for r in kept], np.float32)
  sample_weight = head_weights(kept, teach, weigh, balance)
  unit = mesh.shape["data"] * mesh.shape["fsdp"]
  length_of = lambda i: len(kept[i].prompt_tokens) + len(kept[i].tokens)
  order, batches = sorted(range(len(kept)), key=length_of, reverse=True), []
  while order:
    rows, length = shape.holding(len(order), length_of(order[0]), unit)
    part, order = order[:rows], order[rows:]
    batches.append(_micro_batch([kept[i] for i in part], advantages[part], sample_weight[part], rows, length, detect))
  return [sharding.put(batch, sharding.rows(mesh)) for batch in batches]


def _micro_batch(rows: list[Rollout], advantages: np.ndarray, sample_weight: np.ndarray, count: int, length: int,
                 detect: tuple[int, ...]) -> Batch:
  grid = lambda dtype: np.zeros((count, length), dtype)
  tokens, mask, sampled = grid(np.int32), grid(np.float32), grid(np.float32)
  reward, advantage = np.zeros(count, np.float32), np.zeros(count, np.float32)
  position, weight = np.zeros((count, len(detect)), np.int32), np.zeros((count, len(detect)), np.float32)
  for i, r in enumerate(rows):
    start, end = len(r.prompt_tokens), len(r.prompt_tokens) + len(r.tokens)
    tokens[i, :start], tokens[i, start:end] = r.prompt_tokens, r.tokens
    mask[i, start:end], sampled[i, start:end] = 1.0, r.logprobs
    reward[i], advantage[i] = r.reward, advantages[i]
    # The state that sampled response token number n stands at start + n - 2.
    reads = detect[:len(r.scores)] or ((len(r.tokens),) if sample_weight[i] else ())
    position[i, :len(reads)] = start + np.array(reads, int) - 2
    weight[i, :len(reads)] = sample_weight[i]
  return Batch(tokens=tokens, response_mask=mask, sampler_logprobs=sampled, old_logprobs=np.zeros_like(sampled),
               ref_logprobs=np.zeros_like(sampled), advantages=advantage, rewards=reward, head_position=position,
               head_weight=weight)
