"""Prefixes shared between calls: what prompts have in common from their beginning is prefilled once and kept.

A prompt's tokens are cut in blocks. A block's name is a hash of its tokens and of the name of the block before it, so it stands
for all of the prompt up to its end. Keys and values of so many blocks lie on the device, outside the slots, and the least
recently used makes room. A prompt takes the blocks that are there, copied into the columns that its slot will get, and only what
follows is prefilled (`_extend`). Slots know nothing of it: nothing has to be counted, and a row may go whenever it likes.

It costs the blocks' memory, a copy of a prompt's columns, and attention over all columns of a prompt instead of its own width.
Left out: blocks of answers (the next turn's prompt brings them), and parts of blocks.
"""

import collections
import functools
import hashlib

import jax
import jax.numpy as jnp
import numpy as np

from arrol_jax.engine import kv_cache
from arrol_jax.engine.decode_attention import attend_xla
from arrol_jax.engine.programs import Prefix
from arrol_jax.engine.sampling import Sampling
from arrol_jax.engine.scheduler import Engine
from arrol_jax.models import sharding, transformer
from arrol_jax.models.layers import split_qkv
from arrol_jax.models.transformer import PolicyConfig

BLOCK = 32       # tokens
_QUERIES = 128   # whose scores over a prompt's columns are there at once


@functools.lru_cache(maxsize=4096)
def names(tokens: bytes, size: int) -> tuple[bytes, ...]:
  """Of the whole blocks of a prompt (i32 tokens as bytes), `size` tokens each."""
  out, name = [], b""
  for end in range(4 * size, len(tokens) + 1, 4 * size):
    name = hashlib.blake2b(name + tokens[end - 4 * size:end], digest_size=16).digest()
    out.append(name)
  return tuple(out)


class PrefixCache:
  """At most `mib` MiB of blocks of a model's prompts; create it under the mesh. One thread uses it; any may read its counts.

  Raises ValueError where not even one block fits.
  """

  def __init__(self, config: PolicyConfig, dtype: str, mib: int, block: int | None = None):
    block = block or BLOCK
    token = kv_cache.bytes_per_token(config.layers, config.kv_heads, config.head_dim, dtype)
    self.block, self.size = block, (mib << 20) // (block * token)
    if not self.size:
      raise ValueError(f"{mib} MiB hold no block of {block} tokens, which has {block * token / 2**20:.1f} MiB")
    self.pool = _empty(config, self.size, block, dtype)
    self.numbers: collections.OrderedDict[bytes, int] = collections.OrderedDict()  # by name, the least recently used first
    self.asked, self.found = 0, 0  # prompt tokens so far: all of them, and those that were there

  @property
  def counts(self) -> tuple[int, int, int, int]:
    """Prompt tokens asked for and found, blocks that are taken, and their places."""
    return self.asked, self.found, len(self.numbers), self.size

  def clear(self) -> None:
    self.numbers.clear()
    self.asked = self.found = 0

  def known(self, tokens: np.ndarray) -> list[bytes]:
    """The leading blocks of a prompt i32[L] that are there; its last token is never in one, as its state is wanted."""
    out = []
    for name in names(tokens.tobytes(), self.block)[:(len(tokens) - 1) // self.block]:
      if name not in self.numbers:
        break
      out.append(name)
    return out

  def missing(self, tokens: np.ndarray) -> int:
    """Tokens of a prompt i32[L] that would have to be prefilled."""
    return len(tokens) - len(self.known(tokens)) * self.block

  def prefill(self, engine: Engine, sampling: Sampling, prompts: list[np.ndarray], rows: int, width: int) -> Prefix:
    """Prompts i32[L] of which at most `width` tokens each are missing, `rows` at once (as many, or more), as
    `programs.prefill` gives them, of engine.prefill_rows prompts. A width of one block goes on block by block: each is then
    computed by the same program from the same numbers, whatever was there."""
    known = [self.known(tokens) for tokens in prompts]
    self._use([name for chain in known for name in reversed(chain)])
    table = np.zeros((engine.prefill_rows, -(-engine.max_prompt // self.block)), np.int32)
    start, length = np.zeros(rows, np.int32), np.ones(rows, np.int32)
    for i, (tokens, chain) in enumerate(zip(prompts, known, strict=True)):
      table[i, :len(chain)] = [self.numbers[name] for name in chain]
      start[i], length[i] = len(chain) * self.block, len(tokens)
      self.asked, self.found = self.asked + len(tokens), self.found + len(chain) * self.block
    by_row = sharding.rows(engine.mesh)
    columns = _gather(self.pool, sharding.put(table, by_row))
    while True:
      tokens = np.zeros((rows, width), np.int32)
      for i, prompt in enumerate(prompts):
        part = prompt[start[i]:start[i] + width]
        tokens[i, :len(part)] = part
      columns, last, state = _extend(engine.config, engine.params, columns, *sharding.put((tokens, start, length), by_row),
                                     sampling=sampling)
      start = start + width
      if (start >= length).all():
        break
    self._keep(prompts, columns)
    more = lambda x: _pad(x, engine.prefill_rows)
    return Prefix(columns, more(last), more(sharding.put(length, by_row)), more(state))

  def _use(self, some: list[bytes]) -> None:
    """Makes blocks the most recently used, the last one most: a chain's first block goes last."""
    for name in some:
      self.numbers.move_to_end(name)

  def _keep(self, prompts: list[np.ndarray], columns: tuple) -> None:
    """Stores the blocks of prompts whose `columns` are known that are not there yet."""
    new = {}  # by number: where a block stands in `columns`
    for i, tokens in enumerate(prompts):
      chain = names(tokens.tobytes(), self.block)[:self.size]
      self._use([name for name in reversed(chain) if name in self.numbers])
      for at, name in enumerate(chain):
        if name not in self.numbers:
          free = self.numbers.popitem(last=False)[1] if len(self.numbers) == self.size else len(self.numbers)
          self.numbers[name], new[free] = free, (i, at)
      self._use(list(reversed(chain)))
    if new:
      most = columns[0].k.shape[1] * columns[0].k.shape[2] // self.block
      where = np.full((3, most), self.size, np.int32)  # what is too much has a number that there is not
      where[:, :len(new)] = [list(new), *zip(*new.values(), strict=True)]
      self.pool = _store(self.pool, columns, *where)


# ---- programs


def _pin(pool: kv_cache.Columns) -> kv_cache.Columns:
  """KV heads over `tensor`; every group of devices has all blocks."""
  return jax.tree.map(lambda x: sharding.constrain(x, "kv_heads", *(None,) * (x.ndim - 1), table=sharding.DECODE), pool)


@functools.partial(jax.jit, static_argnames=("c", "size", "block", "dtype"))
def _empty(c: PolicyConfig, size: int, block: int, dtype: str) -> tuple:
  """Layers' kv_cache.Columns of `size` blocks instead of rows."""
  zeros = jnp.zeros((c.kv_heads, size, block, c.head_dim), dtype)
  scale = jnp.zeros((c.kv_heads, size, block), jnp.float32) if dtype == "int8" else None
  return tuple(_pin(kv_cache.Columns(zeros, zeros, scale, scale)) for _ in range(c.layers))


@jax.jit
def _gather(pool: tuple, table: jax.Array) -> tuple:
  """Rows of the blocks table i32[P,L/T] says: kv_cache.Columns by layer, P rows of L columns."""
  rows, blocks = table.shape
  one = lambda x: x[:, table].reshape(x.shape[0], rows, blocks * x.shape[2], *x.shape[3:])
  return tuple(kv_cache.pin(jax.tree.map(one, layer)) for layer in pool)


@functools.partial(jax.jit, donate_argnames=("pool",))
def _store(pool: tuple, columns: tuple, number: jax.Array, row: jax.Array, place: jax.Array) -> tuple:
  """Puts block `place` of row `row` of the columns to block `number` of the pool, i32[K] each; where there is no such number,
  nothing."""
  def one(old, x):
    blocks = x.reshape(*x.shape[:2], -1, old.shape[2], *x.shape[3:])
    return old.at[:, number].set(blocks[:, row, place], mode="drop")
  return tuple(_pin(jax.tree.map(one, *pair)) for pair in zip(pool, columns, strict=True))


@functools.partial(jax.jit, static_argnames=("c", "sampling"), donate_argnames=("columns",))
def _extend(c: PolicyConfig, params: dict, columns: tuple, tokens: jax.Array, start: jax.Array, length: jax.Array, *,
            sampling: Sampling) -> tuple:
  """Goes on with the first P rows of the columns, tokens i32[P,W] at start i32[P] and behind, prompts of length i32[P].

  Returns (columns, the last of these tokens that are the prompt's i32[P], their states as Prefix has them).
  """
  rows = tokens.shape[0]
  place = start[:, None] + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :]

  def attend(columns, qkv, rotary):
    q, k, v = split_qkv(qkv)
    q, k = rotary(q, k)
    at = jnp.arange(rows, dtype=jnp.int32)[:, None], place  # columns past the end are nobody's
    write = lambda old, new: old.at[(slice(None), *at)].set(new, mode="drop")
    columns = jax.tree.map(write, columns, kv_cache.store(k, v, sampling.cache_dtype))
    mine = jax.tree.map(lambda x: x[:, :rows], columns)
    out = jax.lax.map(lambda x: attend_xla(x[0], mine, x[1]), (q.swapaxes(0, 1), place.T + 1), batch_size=_QUERIES)
    return out.swapaxes(0, 1), kv_cache.pin(columns)

  state = []
  tap = lambda layer, x: state.append(x) if layer == sampling.taps.prompt else None
  _, columns = transformer.unrolled(c, params, tokens, place, attend, columns, tap=tap)
  end = jnp.clip(length - 1 - start, 0, tokens.shape[1] - 1)
  state = jnp.take_along_axis(state[0], end[:, None, None], axis=1)[:, 0] if state else jnp.zeros((rows, 0), sampling.dtype)
  return tuple(columns), jnp.take_along_axis(tokens, end[:, None], axis=1)[:, 0], state


@functools.partial(jax.jit, static_argnames=("rows",))
def _pad(x: jax.Array, rows: int) -> jax.Array:
  """x [P,...] with zeros up to [rows,...]."""
  return jnp.pad(x, [(0, rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1))
