"""Flash decoding for NVIDIA GPUs as one Pallas program a row, KV head and split.

Rows of a group hold equal copies of their prompt. The kernel reads one of them for all (`kv_cache.SharedPrefix`): the others find
it in the device's second-level cache instead of its memory, and nothing else changes, not a bit of the result.
"""

import functools
import math
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from arrol_jax.engine.kv_cache import Columns, SharedPrefix
from arrol_jax.models.layers import Rotary

_QUERIES = 16   # rows of the smallest matrix product on a tensor core; query heads of a group are padded to it (`_padded`)
_PROGRAMS = 512  # a row is split over several programs until there are about so many


class Tiling(NamedTuple):
  """How the work is cut: programs a row and KV head (None: as many as the device needs), columns a block, warps, stages."""
  splits: int | None = None
  block: int = 32
  warps: int = 2
  stages: int = 4


TILING = Tiling()


class _Inputs(NamedTuple):
  """What a program reads beside the cache."""
  length: jax.Array
  shared: SharedPrefix
  qkv: jax.Array
  cos: jax.Array
  sin: jax.Array
  q_scale: jax.Array | None
  k_scale: jax.Array | None


def step_triton(columns: Columns, qkv: jax.Array, length: jax.Array, rotary: Rotary, shared: SharedPrefix | None = None, *,
                interpret: bool = False, tiling: Tiling = TILING) -> tuple[Columns, jax.Array]:
  """Flash decoding on qkv [B,M,N/M+2,H]: a program streams one row and KV head, a block of columns at a time, to its length.

  Queries and the new key are turned (`rotary` with cos and sin [B,H/2]) in registers, in halves of the head dimension. The new
  column, number length - 1, starts the online softmax from registers and is stored in place. With few rows a row's
  columns are split over several programs, whose partial softmaxes are joined afterwards. Blocks of columns that `shared` says
  another row has too are read there; programs of neighbouring rows run at the same time, so all but the first hit the L2 cache.
  """
  from jax.experimental.pallas import triton as plt
  b, m, parts, h = qkv.shape
  group, dtype = parts - 2, qkv.dtype
  splits = tiling.splits or max(1, min(8, _PROGRAMS // (b * m)))
  shared = shared or SharedPrefix(jnp.arange(b, dtype=jnp.int32), jnp.zeros(b, jnp.int32))
  inputs = _Inputs(length, shared, qkv, *rotary[:4])
  value = jax.ShapeDtypeStruct((b, m, splits, group, h), dtype if splits == 1 else jnp.float32)
  partial = (jax.ShapeDtypeStruct((b, m, splits, group), jnp.float32),) * (2 * (splits > 1))
  first = len(jax.tree.leaves(inputs))
  columns, value, partial = pl.pallas_call(
    functools.partial(_program, group=group, tiling=tiling._replace(splits=splits), eps=rotary.eps), grid=(b, m, splits),
    in_specs=_in_specs(inputs, columns), out_specs=_out_specs(columns, group, h, len(partial)),
    out_shape=(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), columns), value, partial),
    input_output_aliases={first + i: i for i in range(len(jax.tree.leaves(columns)))}, name="decode_attention",
    interpret=interpret, compiler_params=plt.CompilerParams(num_warps=tiling.warps, num_stages=tiling.stages))(inputs, columns)
  if partial:
    top, total = partial
    weight = jnp.exp2(top - jnp.max(top, axis=2, keepdims=True))
    value = jnp.sum(value * weight[..., None], axis=2) / jnp.maximum(jnp.sum(total * weight, axis=2), 1e-30)[..., None]
  return columns, value.astype(dtype).reshape(b, m * group, h)


def _padded(group: int) -> int:
  """Rows of a program's products for `group` query heads a KV head, a power of two."""
  return max(_QUERIES, 1 << (group - 1).bit_length())


def _in_specs(inputs: _Inputs, columns: Columns) -> tuple[_Inputs, Columns]:
  """A program's view of what it reads: its row, its head of its row, all rows of its head of the cache."""
  by_row = lambda *shape: pl.BlockSpec((None, *shape), lambda i, j, t: (i,) + (0,) * len(shape))
  whole_head = lambda x: pl.BlockSpec((None, *x.shape[1:]), lambda i, j, t: (j,) + (0,) * (x.ndim - 1))
  h, whole = inputs.qkv.shape[3], lambda x: None if x is None else pl.BlockSpec((x.size,), lambda i, j, t: (0,))
  qkv = pl.BlockSpec((None, None, _padded(inputs.qkv.shape[2] - 2) + 2, h), lambda i, j, t: (i, j, 0, 0))
  scales = whole(inputs.q_scale), whole(inputs.k_scale)
  return (_Inputs(by_row(), SharedPrefix(by_row(), by_row()), qkv, by_row(h // 2), by_row(h // 2), *scales),
          jax.tree.map(whole_head, columns))


def _out_specs(columns: Columns, group: int, h: int, partial: int) -> tuple:
  """A program's view of what it writes: its head and row of the cache, its part of the value, and of `partial` sums."""
  own_row = lambda x: pl.BlockSpec((None, None, *x.shape[2:]), lambda i, j, t: (j, i) + (0,) * (x.ndim - 2))
  part = lambda *shape: pl.BlockSpec((None, None, None, *shape), lambda i, j, t: (i, j, t) + (0,) * len(shape))
  return jax.tree.map(own_row, columns), part(_padded(group), h), (part(_padded(group)),) * partial


# ---- a program; what it is given are references


def _program(inputs: _Inputs, cache: Columns, stored: Columns, out, partial: tuple, *, group: int, tiling: Tiling,
             eps: float):
  """One (row, KV head, split): rotary, then online softmax over its blocks of columns, in powers of two."""
  from jax.experimental.pallas import triton as plt
  qkv, h, dtype, (splits, block, *_) = inputs.qkv, inputs.qkv.shape[1], inputs.qkv.dtype, tiling
  own_row, split, position = pl.program_id(0), pl.program_id(2), inputs.length[...] - 1  # -1: an idle row
  queries = _padded(group)
  real = jnp.arange(queries) < group
  wide = lambda width: jnp.broadcast_to(real[:, None], (queries, width))
  turned = functools.partial(_turned, cos=inputs.cos[...], sin=inputs.sin[...], eps=eps, dtype=dtype)
  read = lambda half: plt.load(qkv.at[pl.ds(0, queries), half], mask=wide(h // 2), other=0.0)
  q = turned([read(half).astype(jnp.float32) for half in _halves(h)], inputs.q_scale)
  k = turned([qkv[group, half].astype(jnp.float32)[None, :] for half in _halves(h)], inputs.k_scale)
  mine = (split == 0) & (position >= 0)  # the program that has the new column
  new_k, new_v = _put_column(stored, jnp.maximum(position, 0), k, qkv[group + 1, :], mine)

  score = sum(jnp.sum(x.astype(jnp.float32) * y, axis=1) for x, y in zip(q, new_k, strict=True)) * _unit(h)
  top = jnp.where(mine, score, -1e30)
  total = jnp.where(mine, jnp.ones_like(score), 0.0)
  value = total[:, None] * new_v[None, :]

  shared_row, shared_blocks = inputs.shared.row[...], inputs.shared.columns[...] // block
  blocks = pl.cdiv(jnp.maximum(position, 0), block)

  def body(i, carry):
    row = jnp.where(i < shared_blocks, shared_row, own_row)
    return _add_block(carry, q, cache, row, i * block, block, position)

  value, top, total = jax.lax.fori_loop(blocks * split // splits, blocks * (split + 1) // splits, body, (value, top, total))
  if splits == 1:
    value = value / jnp.maximum(total, 1e-30)[:, None]
  plt.store(out.at[...], value.astype(out.dtype), mask=wide(h))
  for ref, x in zip(partial, (top, total), strict=False):
    plt.store(ref.at[...], x, mask=real)


def _halves(h: int) -> tuple:
  return pl.ds(0, h // 2), pl.ds(h // 2, h // 2)


def _unit(h: int) -> float:
  """What scores are multiplied by, for powers of two."""
  return h**-0.5 * math.log2(math.e)


def _turned(x: list, scale, cos: jax.Array, sin: jax.Array, eps: float, dtype) -> list:
  """A pair of halves f32[..., H/2], normed where there is a scale and turned, rounded as the plain way rounds them."""
  if scale is not None:
    h = scale.shape[0]
    total = sum(jnp.sum(y * y, axis=-1, keepdims=True) for y in x)
    x = [(y * jax.lax.rsqrt(total / h + eps) * scale[half].astype(jnp.float32)[None, :]).astype(dtype).astype(jnp.float32)
         for y, half in zip(x, _halves(h), strict=True)]
  return [y.astype(dtype) for y in (x[0] * cos[None, :] - x[1] * sin[None, :], x[1] * cos[None, :] + x[0] * sin[None, :])]


def _put_column(stored: Columns, at: jax.Array, k: list, v: jax.Array, mine: jax.Array) -> tuple[list, jax.Array]:
  """Stores key (halves) and value as column `at` where it is `mine`; both f32, as later steps will read them."""
  from jax.experimental.pallas import triton as plt

  def put(ref, where, x):
    plt.store(ref.at[where], x.astype(ref.dtype), mask=jnp.broadcast_to(mine, x.shape))

  new_k, new_v = [y.astype(jnp.float32) for y in k], v.astype(jnp.float32)
  if stored.k_scale is not None:
    step = jnp.maximum(jnp.maximum(jnp.max(jnp.abs(new_k[0])), jnp.max(jnp.abs(new_k[1]))), 1e-30) / 127.0
    v_step = jnp.maximum(jnp.max(jnp.abs(new_v)), 1e-30) / 127.0
    k = [jnp.floor(y / step + 0.5) for y in new_k]
    v = jnp.floor(new_v / v_step + 0.5)
    new_k, new_v = [y * step for y in k], v * v_step
    put(stored.k_scale, at, step)
    put(stored.v_scale, at, v_step)
  for half, y in zip(_halves(v.shape[0]), k, strict=True):
    put(stored.k, (pl.ds(at, 1), half), y)
  put(stored.v, (at, slice(None)), v)
  return new_k, new_v


def _add_block(carry: tuple, q: list, cache: Columns, row, start, block: int, position) -> tuple:
  """The online softmax (value, top, total) with `block` columns more of `row`, those before `position`."""
  from jax.experimental.pallas import triton as plt
  (value, top, total), here = carry, pl.ds(start, block)
  h, dtype = value.shape[1], q[0].dtype
  score = sum(plt.dot(x, cache.k[row, here, half].astype(dtype).T) for x, half in zip(q, _halves(h), strict=True)) * _unit(h)
  if cache.k_scale is not None:
    score *= cache.k_scale[row, here][None, :]
  seen = start + jnp.arange(block) < position
  score = jnp.where(seen[None, :], score, -1e30)
  new_top = jnp.maximum(top, jnp.max(score, axis=1))
  shrink, prob = jnp.exp2(top - new_top), jnp.exp2(score - new_top[:, None])
  total = total * shrink + jnp.sum(prob, axis=1)
  if cache.v_scale is not None:
    prob *= cache.v_scale[row, here][None, :]
  return value * shrink[:, None] + plt.dot(prob.astype(dtype), cache.v[row, here, :].astype(dtype)), new_top, total
