"""The rollout engine's host side: request pool, slots, segment boundaries, compaction.

Everything that costs device time happens in decode.py's programs; between two segments the host learns which rows
ended, hands their slots to waiting requests, and when none waits gathers the living rows into the next smaller compiled row
count. Cache columns come in a few compiled lengths and grow with the longest living row. Shapes therefore come from
two short lists (`row_sizes`, `lengths`), and each pair is compiled once.

The engine knows no quality head: `decide(slots)` is whatever the caller wants done at a boundary.
"""

import collections
from collections.abc import Callable
import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from arrol_jax import decode, policy, sharding
from arrol_jax.decode import Sampling, Slots
from arrol_jax.policy import PolicyConfig
from arrol_jax.types import Rollout


class Request(NamedTuple):
  """One response wanted. `index` names it in the step (and seeds its tokens), `prompt` its group."""
  index: int
  prompt: int
  tokens: np.ndarray   # i32[L]
  limit: int           # response tokens at most


class Decision(NamedTuple):
  """What a boundary decided, device arrays by row; rows not `decided` carry no meaning in the others."""
  decided: jax.Array    # bool[B]
  keep: jax.Array       # bool[B]
  score: jax.Array      # f32[B]
  posterior: jax.Array  # f32[B]
  survival: jax.Array   # f32[B]


@dataclasses.dataclass
class Engine:
  """`rows`: slots; `max_prompt`, `max_new`: tokens; `segment`: steps between two looks of the host."""
  config: PolicyConfig
  mesh: jax.sharding.Mesh
  rows: int
  max_prompt: int
  max_new: int
  segment: int
  row_buckets: int = 3        # rows, rows/2, rows/4, ...
  length_buckets: int = 4     # cache lengths, evenly spaced up to max_prompt + max_new
  prefill_rows: int = 16      # prompts a prefill program takes
  params: dict | None = None  # set by load()

  def __post_init__(self):
    unit = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
    up = lambda n, k: -(-n // k) * k
    self.row_sizes = sorted({up(max(1, self.rows >> i), unit) for i in range(self.row_buckets)})
    self.rows = self.row_sizes[-1]
    room = up(self.max_prompt + self.max_new + self.segment, 16)
    self.lengths = sorted({min(room, up(room * (i + 1) // self.length_buckets, 16)) for i in range(self.length_buckets)})
    self.prefill_rows = up(self.prefill_rows, unit)

  def load(self, params: dict, dtype: str) -> None:
    """Takes the training parameters: cast, unstacked and resharded for decoding in one program."""
    axes = policy.unstack_axes(policy.logical_axes(self.config), self.config.layers)
    shapes = jax.eval_shape(policy.unstack, params)
    out = sharding.shardings(axes, shapes, self.mesh, sharding.DECODE)
    self.params = _to_decode(jax.tree.structure(out), tuple(jax.tree.leaves(out)), dtype)(params)

  def run(self, requests: list[Request], key: jax.Array, sampling: Sampling, *, decide: Callable | None = None,
          on_done: Callable | None = None) -> list[Rollout]:
    """Generates every request; returns rollouts in the order of `requests`.

    key: the step's key; a request's own is fold_in(key, index), so its tokens do not depend on its slot or company.
    decide(slots) -> (slots, Decision), called after each segment, may end rows. on_done(rollout) is called while the next
    segment runs.
    """
    state = _Run(self, requests, key, sampling)
    finished = []
    while state.refill_and_fit():
      pending = state.segment(decide)
      for rollout in finished:  # the host works while the device does
        on_done and on_done(rollout)
      finished = state.retire(*jax.device_get(pending))
    for rollout in finished:
      on_done and on_done(rollout)
    return state.rollouts


@functools.lru_cache(maxsize=8)
def _to_decode(treedef, leaves: tuple, dtype: str):
  out = jax.tree.unflatten(treedef, leaves)
  return jax.jit(lambda p: jax.tree.map(lambda x: x.astype(dtype), policy.unstack(p)), out_shardings=out)


class _Run:
  """State of one `Engine.run`: which request sits in which slot."""

  def __init__(self, engine: Engine, requests: list[Request], key: jax.Array, sampling: Sampling):
    self.e, self.key, self.sampling = engine, key, sampling
    self.rollouts = [Rollout(r.index, r.prompt, r.tokens, np.zeros(0, np.int32), np.zeros(0, np.float32)) for r in requests]
    self.waiting = collections.deque((r, out) for r, out in zip(requests, self.rollouts, strict=True))
    self.slots: Slots | None = None
    self.at: list[tuple[Request, Rollout] | None] = []   # by slot
    self.length = 0                                      # cache columns
    self.prefixes: tuple[dict, decode.Prefix | None] = ({}, None)

  def refill_and_fit(self) -> bool:
    """Puts waiting requests into free slots and brings the batch to the smallest shape that holds it. False: all done."""
    live = [i for i, x in enumerate(self.at) if x]
    wanted = min(len(live) + len(self.waiting), self.e.rows)
    if not wanted:
      return False
    new = [self.waiting.popleft() for _ in range(wanted - len(live))]
    rows = next(n for n in self.e.row_sizes if n >= wanted)
    columns = [len(r.tokens) + len(out.tokens) for r, out in [self.at[i] for i in live] + new]
    length = next(n for n in self.e.lengths if n >= max(columns) + self.e.segment)
    if self.slots is None:
      self.slots = decode.init_slots(self.e.config, rows, length, self.sampling.dtype)
      self.at, self.length = [None] * rows, length
    elif rows < len(self.at) or length > self.length:
      self._take(live, rows, length)
    if new:
      self._insert(new)
    return True

  def _take(self, live: list[int], rows: int, length: int) -> None:
    index = np.zeros(rows, np.int32)
    index[:len(live)] = live
    self.slots = decode.take_rows(self.slots, index, np.arange(rows) < len(live), length=length)
    self.at = [self.at[i] for i in live] + [None] * (rows - len(live))
    self.length = length

  def _insert(self, new: list) -> None:
    free = iter([i for i, x in enumerate(self.at) if not x])
    while new:
      if new[0][0].prompt not in self.prefixes[0]:
        self._prefill(new)
      where, prefix = self.prefixes
      batch = []
      while new and new[0][0].prompt in where:
        batch.append((next(free), *new.pop(0)))
      rows = len(self.at)
      source, target, limit = np.zeros(rows, np.int32), np.full(rows, rows, np.int32), np.ones(rows, np.int32)
      index = np.zeros(rows, np.int32)
      for j, (slot, request, out) in enumerate(batch):
        source[j], target[j], limit[j], index[j] = where[request.prompt], slot, request.limit, request.index
        self.at[slot] = request, out
      self.slots = decode.insert(self.slots, prefix, source, target, _fold_all(self.key, index), limit)

  def _prefill(self, new: list) -> None:
    """Prefills the next distinct prompts of the pool, as many as one program takes."""
    prompts = {}
    for request, _ in [*new, *self.waiting]:
      prompts.setdefault(request.prompt, request.tokens)
      if len(prompts) == self.e.prefill_rows:
        break
    tokens = np.zeros((self.e.prefill_rows, self.e.max_prompt), np.int32)
    length = np.ones(self.e.prefill_rows, np.int32)
    for i, x in enumerate(prompts.values()):
      tokens[i, :len(x)], length[i] = x, len(x)
    tokens, length = jax.device_put((tokens, length), sharding.rows(self.e.mesh))
    prefix = decode.prefill(self.e.config, self.e.params, tokens, length, dtype=self.sampling.dtype)
    self.prefixes = ({p: i for i, p in enumerate(prompts)}, prefix)

  def segment(self, decide: Callable | None) -> tuple:
    """Starts the next segment and the decision after it; returns device arrays for `retire`, without waiting."""
    self.slots, tokens, logprobs = decode.generate_segment(
      self.e.config, self.e.params, self.slots, steps=self.e.segment, sampling=self.sampling)
    decision = None
    if decide:
      self.slots, decision = decide(self.slots)
    # Copies: the slots' own buffers are donated to the next program before the host may have read them.
    return tokens, logprobs, *_copy((self.slots.generated, self.slots.active)), decision

  def retire(self, tokens, logprobs, generated, active, decision) -> list[Rollout]:
    """Books a segment's tokens; returns the rollouts that ended in it and frees their slots."""
    done = []
    for i, entry in enumerate(self.at):
      if not entry:
        continue
      request, out = entry
      count = generated[i] - len(out.tokens)
      out.tokens = np.concatenate([out.tokens, tokens[i, :count]])
      out.logprobs = np.concatenate([out.logprobs, logprobs[i, :count]])
      if decision is not None and decision.decided[i]:
        out.decided, out.pruned = True, not decision.keep[i]
        out.score, out.posterior, out.survival = (
          float(x[i]) for x in (decision.score, decision.posterior, decision.survival))
      if not active[i]:
        out.stopped = not out.pruned and int(out.tokens[-1]) in self.sampling.stop_ids
        done.append(out)
        self.at[i] = None
    return done


@jax.jit
def _copy(tree):
  return jax.tree.map(jnp.copy, tree)


@jax.jit
def _fold_all(key: jax.Array, index: jax.Array) -> jax.Array:
  return jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
