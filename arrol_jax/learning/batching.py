"""Survivors of a step -> micro-batches of a few fixed shapes, and examples for the head (paper Algorithm 1, re-batching).

A micro-batch holds bins, one a shard of the mesh, of U tokens each without padding between them. A group's prompt stands in
its bin once, all but its last token; behind it come the group's rollouts, each as [last prompt token, response]. So matrix
products see each token once. Attention alone works on rows, one a rollout: [prompt, response, padding], gathered from
the bin (models/sharing.py). Rows without an advantage cannot change the policy and are left out where the loss has no KL term;
means are over all survivors all the same.
"""

from typing import NamedTuple

import jax
from jax.sharding import Mesh
import numpy as np

from arrol_jax.learning.losses import GRPO, LossConfig, group_advantages, overlong_penalty, started_levels
from arrol_jax.models import sharding
from arrol_jax.models.sharing import Layout
from arrol_jax.pruning.head import empty_features, is_linear
from arrol_jax.types import Batch, Examples, Rollout


class BinShape(NamedTuple):
  """tokens: of a bin; rows: attention rows of a bin; length: columns of a row."""
  tokens: int
  rows: int
  length: int


class PackShape(NamedTuple):
  """Shapes of the update: rows of at most `length` tokens in `buckets` lengths, about `micro_tokens` tokens a micro-batch."""
  length: int
  micro_tokens: int
  buckets: int = 2
  tails: int = 2  # smaller sizes for the last micro-batch, evenly below the whole one: with 2 a third and two thirds of it

  def lengths(self) -> list[int]:
    """Row lengths, ascending."""
    return sorted({-(-self.length * (b + 1) // self.buckets // 16) * 16 for b in range(self.buckets)})

  def bins(self, unit: int, length: int) -> list[BinShape]:
    """The shapes of a bin for rows of `length`, smallest first; `unit` bins make a micro-batch. A whole one holds at least the
    longest row, and has few rows or many; part-filled micro-batches take a smaller size where that holds one too."""
    longest = self.lengths()[-1]
    whole = _up(max(self.micro_tokens // unit, longest), 16)
    tails = [_up(whole * n // (self.tails + 1), 16) for n in range(1, self.tails + 1)]
    sizes = sorted({(max(size, longest), many) for size, many in (*((size, 8) for size in tails), (whole, 5), (whole, 8))})
    return [BinShape(n, max(1, -(-many * n // (4 * length))), length) for n, many in sizes]


class _Bin:
  """A bin being filled: rollouts by group."""

  def __init__(self, shape: BinShape):
    self.shape, self.tokens, self.rows, self.groups = shape, 0, 0, {}

  def takes(self, i: int, r: Rollout) -> bool:
    """Whether rollout number i went in."""
    shared = 0 if r.prompt in self.groups else len(r.prompt_tokens) - 1
    need = shared + 1 + len(r.tokens)
    if self.tokens + need > self.shape.tokens or self.rows == self.shape.rows:
      return False
    self.groups.setdefault(r.prompt, []).append(i)
    self.tokens, self.rows = self.tokens + need, self.rows + 1
    return True


def pack(rollouts: list[Rollout], shape: PackShape, mesh, loss: LossConfig = GRPO, weigh: tuple[str, ...] = (),
         started: list[Rollout] = ()) -> tuple[list[Batch], dict]:
  """Survivors -> micro-batches, longest rows first, and counts: {"tokens", "rows"} that means are over, {"trained",
  "rows_trained"} that are in.

  Advantages are taken over a group's survivors, from rewards with the loss's overlong penalty; with loss.baseline "started" over
  all of `started`, the step's rollouts, that are of the group. weigh holding "policy": a
  survivor counts 1 / keep probability times (METHOD 9.1), scaled to mean 1, in group means, in the loss with its KL term, and in
  the tokens and rows that means are over: each mean is sum w x / sum w. Old and reference log-probs are the update's to fill.
  """
  kept = [r for r in rollouts if not r.pruned]
  weights = np.array([1.0 / r.keep_probability if "policy" in weigh else 1.0 for r in kept])
  weights = weights / weights.mean() if kept else weights
  levels = levels_of(started, loss) if loss.baseline == "started" else None
  advantages = group_advantages(_shaped(kept, loss), np.array([r.prompt for r in kept], int), loss.normalize_std,
                                weights=weights, levels=levels)
  rows = [i for i in range(len(kept)) if advantages[i] or loss.kl_weight]
  counted = float(sum(w * len(r.tokens) for w, r in zip(weights, kept, strict=True)))
  totals = {"tokens": counted, "rows": len(kept), "trained": sum(len(kept[i].tokens) for i in rows),
            "rows_trained": len(rows)}
  unit = mesh.shape["data"] * mesh.shape["fsdp"]
  batches = []
  for bins in _bins(kept, rows, shape, unit):
    for start in range(0, len(bins), unit):
      part = bins[start:start + unit]
      fits = next(s for s in shape.bins(unit, part[0].shape.length)
                  if all(b.tokens <= s.tokens and b.rows <= s.rows for b in part))
      batches.append(_micro_batch(kept, np.stack([advantages, weights]), part, fits, unit))
  return [sharding.put(batch, sharding.rows(mesh)) for batch in batches], totals


def _shaped(rollouts: list[Rollout], loss: LossConfig) -> np.ndarray:
  """Rewards with the loss's overlong penalty, f[B]; NaN of the pruned."""
  rewards = np.array([r.reward for r in rollouts], float)
  return rewards + overlong_penalty(np.array([len(r.tokens) for r in rollouts]), loss.longest, loss.overlong)


def levels_of(started: list[Rollout], loss: LossConfig = GRPO) -> dict[int, tuple[float, float]]:
  """`started_levels` of a step's rollouts, by their prompt."""
  column = lambda name: np.array([getattr(r, name) for r in started], float)
  return started_levels(_shaped(started, loss), column("success"), column("posterior"), column("prompt").astype(int))


def _bins(kept: list[Rollout], rows: list[int], shape: PackShape, unit: int) -> list[list[_Bin]]:
  """Bins by row length, longest first; members of a group stay together, and shorter rows fill up a longer bin."""
  total = lambda i: len(kept[i].prompt_tokens) + len(kept[i].tokens)
  bucket = {i: next(n for n in shape.lengths() if n >= total(i)) for i in rows}
  left, out = sorted(rows, key=lambda i: (-bucket[i], kept[i].prompt, i)), []
  while left:
    length, bins = bucket[left[0]], []
    while left and (bucket[left[0]] == length or len(bins) % unit):
      one = _Bin(shape.bins(unit, length)[-1])
      left = [i for i in left if not one.takes(i, kept[i])]
      bins.append(one)
    out.append(bins)
  return out


def _micro_batch(kept: list[Rollout], numbers: np.ndarray, bins: list[_Bin], shape: BinShape, unit: int) -> Batch:
  """`unit` bins, those that are missing empty; numbers f[2,B]: each rollout's advantage and its weight."""
  u, r, s = shape
  tokens, positions, back, count = (np.full((unit, u), x, np.int32) for x in (0, 0, -1, 0))
  take, read = np.full((2, unit, r, s), -1, np.int32)
  (mask, sampled), number = np.zeros((2, unit, r, s), np.float32), np.zeros((2, unit, r), np.float32)
  for b, one in enumerate(bins):
    at = row = 0
    for members in one.groups.values():
      text = kept[members[0]].prompt_tokens
      pieces = [(text[:-1], 0, row)]  # tokens, their first position, the row where they are read
      for i in members:
        pieces.append((np.concatenate([text[-1:], kept[i].tokens]), len(text) - 1, row))
        start, end = len(text), len(text) + len(kept[i].tokens)
        take[b, row, :start - 1] = at + np.arange(start - 1)
        number[:, b, row] = numbers[:, i]
        mask[b, row, start:end], sampled[b, row, start:end] = 1.0, kept[i].logprobs
        row += 1
      for n, (values, position, where) in enumerate(pieces):
        here, columns = slice(at, at + len(values)), position + np.arange(len(values))
        tokens[b, here], positions[b, here], back[b, here] = values, columns, where * s + columns
        take[b, where, columns] = read[b, where, columns] = np.arange(here.start, here.stop)
        count[b, here] = 1 if n else len(members)
        at += len(values)
  flat = lambda x: x.reshape(unit * r, *x.shape[2:])
  nothing = np.zeros((unit * r, s), np.float32)
  used = np.array([one.tokens for one in bins] + [0] * (unit - len(bins)), np.int32)
  return Batch(tokens=tokens, positions=positions, used=used, layout=Layout(take, read, back, count), response_mask=flat(mask),
               sampler_logprobs=flat(sampled), old_logprobs=nothing, ref_logprobs=nothing, advantages=flat(number[0]),
               weights=flat(number[1]))


def _up(n: int, unit: int) -> int:
  return -(-n // unit) * unit


def empty_batches(shape: PackShape, mesh) -> list[Batch]:
  """A micro-batch of each size with no rollout in it: for compiling ahead."""
  unit = mesh.shape["data"] * mesh.shape["fsdp"]
  sizes = dict.fromkeys(size for length in shape.lengths() for size in shape.bins(unit, length))
  return [sharding.put(_micro_batch([], np.zeros((2, 0)), [], size, unit), sharding.rows(mesh)) for size in sizes]


def abstract_batches(shape: PackShape, mesh: Mesh) -> list[Batch]:
  """`empty_batches` as shapes with shardings."""
  unit, by_row = mesh.shape["data"] * mesh.shape["fsdp"], sharding.rows(mesh)
  sizes = dict.fromkeys(size for length in shape.lengths() for size in shape.bins(unit, length))
  place = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_row)
  return [jax.tree.map(place, _micro_batch([], np.zeros((2, 0)), [], size, unit)) for size in sizes]


def linear_examples(rollouts: list[Rollout], decisions: int, width: int, weigh: tuple[str, ...] = ()) -> tuple:
  """What all graded survivors teach a linear head at each decision and at their last token (METHOD 10.4), C = decisions + 1.

  Returns features f32[C,M,F], reward f32[M] (success, 0 or 1), weight f32[C,M] (0 where a rollout did not get there)
  and prompt i32[M]; M is the rollouts' number up to a power of two.
  """
  size = 1 << max(0, len(rollouts) - 1).bit_length()
  features, weight = np.zeros((decisions + 1, size, width), np.float32), np.zeros((decisions + 1, size), np.float32)
  reward, prompt = np.zeros(size, np.float32), np.full(size, -1, np.int32)
  for i, r in enumerate(r for r in rollouts if not r.pruned):
    reward[i], prompt[i] = r.success, r.prompt
    share = 1.0 / r.keep_probability if "head" in weigh else 1.0
    for c, seen in [*enumerate(r.features), *([(decisions, r.final_features)] if r.final_features is not None else [])]:
      features[c, i], weight[c, i] = seen, share
  return features, reward, weight, prompt


def empty_examples(head: dict, width: int, count: int) -> Examples:
  """Examples that teach nothing, `count` of them up to the next power of two: few shapes."""
  if is_linear(head):  # is fitted in closed form
    return Examples((), np.zeros(1, np.float32), np.zeros(1, np.float32))
  size = 1 << max(0, count - 1).bit_length()
  features = jax.eval_shape(lambda head: empty_features(head, width, size), head)
  return Examples(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), features), *np.zeros((2, size), np.float32))


def head_examples(rollouts: list[Rollout], head: dict, width: int, weigh: tuple[str, ...] = (), balance: bool = False,
                  short: str = "skip", decisions: int = 1) -> Examples:
  """What all graded survivors teach the head: one example a decision, of which a rollout has `decisions` at most.

  short: what a rollout that ended before the first decision teaches: "skip" nothing (the head learns the question it will be
  asked), "last" its features at its last token (the paper leaves this open). weigh, balance: `head_weights`.
  """
  taught = []
  if is_linear(head):
    return empty_examples(head, width, 0)
  for r in rollouts:
    if not r.pruned:  # a rollout that ended before the first decision stands for it
      seen = r.features or ((r.final_features,) if short == "last" and r.final_features is not None else ())
      taught += [(features, r, c) for c, features in enumerate(seen)]
  out = empty_examples(head, width, max(len(taught), len(rollouts) * decisions))
  if taught:
    jax.tree.map(lambda out, *x: np.stack(x, out=out[:len(x)], casting="same_kind"), out.features, *(x for x, _, _ in taught))
    out.reward[:len(taught)] = [r.success for _, r, _ in taught]
    out.weight[:len(taught)] = head_weights([r for _, r, _ in taught], weigh, balance, [c for _, _, c in taught])
  return out


def head_weights(rollouts: list[Rollout], weigh: tuple[str, ...], balance: bool,
                 decisions: list[int] | None = None) -> np.ndarray:
  """What each example counts in the head's loss, f32[N]: its rollout, and the decision where it was seen (None: all at one).

  weigh holding "head": 1 / keep probability times as much (METHOD 9.1). balance: right and wrong rollouts then weigh half of a
  decision's whole each, so the head learns what tells them apart and leaves their shares to the table's prior; without it
  Adam's first steps, each as large as any, go into the shares alone. A decision that saw one kind alone has nothing to tell
  apart and counts nothing beside decisions that saw both; where none did, that kind keeps its half.
  """
  weight = np.array([1.0 / r.keep_probability if "head" in weigh else 1.0 for r in rollouts], np.float32)
  if not balance:
    return weight
  right, place = np.array([r.success for r in rollouts], bool), np.zeros(len(rollouts), int)
  if decisions is not None:
    place = np.array(decisions, int)
  both = {c for c in set(place) if len(set(right[place == c])) == 2}
  out = np.zeros_like(weight)
  for c in both or set(place):
    for kind in (right, ~right):
      rows = kind & (place == c)
      if rows.any():
        out[rows] = weight[rows] / weight[rows].sum() * weight[place == c].sum() / 2
  return out


def minibatches(rollouts: list[Rollout], count: int, seed: tuple[int, ...]) -> list[list[Rollout]]:
  """`count` parts of whole groups, as even as they go, by chance that `seed` decides."""
  if count == 1:
    return [rollouts]
  prompts = np.random.default_rng(seed).permutation(sorted({r.prompt for r in rollouts}))
  part = {p: i for i, some in enumerate(np.array_split(prompts, count)) for p in some}
  return [[r for r in rollouts if part[r.prompt] == i] for i in range(count)]
