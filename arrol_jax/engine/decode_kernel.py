"""Flash decoding for NVIDIA GPUs as one Pallas program a row, KV head and split.

Rows of a group hold equal copies of their prompt. The kernel reads one of them for all (`kv_cache.SharedPrefix`): the others find
it in the device's second-level cache instead of its memory, and nothing else changes, not a bit of the result.
"""

import functools
import math

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp

from arrol_jax.engine.kv_cache import Columns, SharedPrefix
from arrol_jax.models.layers import Rotary

_QUERIES = 16   # rows of the smallest matrix product on a tensor core; query heads of a group are padded to it


_PROGRAMS = 512  # a row is split over several programs until there are about so many


def step_triton(columns: Columns, qkv: jax.Array, length: jax.Array, rotary: Rotary, shared: SharedPrefix | None = None, *,
                interpret: bool = False, splits: int | None = None, block: int = 32, warps: int = 2,
                stages: int = 4) -> tuple[Columns, jax.Array]:
  """Flash decoding on qkv [B,M,N/M+2,H]: a program streams one row and KV head, `block` columns at a time, to the row's length.

  Queries and the new key are turned (`rotary` with cos and sin [B,H/2]) in registers, in halves of the head dimension. The new
  column, number length - 1, starts the online softmax from registers and is stored in place. With few rows a row's
  columns are split over `splits` programs, whose partial softmaxes are joined afterwards. Blocks of columns that `shared` says
  another row has too are read there; programs of neighbouring rows run at the same time, so all but the first hit the L2 cache.
  """
  from jax.experimental.pallas import triton as plt
  b, m, parts, h = qkv.shape
  group, dtype = parts - 2, qkv.dtype
  splits = splits or max(1, min(8, _PROGRAMS // (b * m)))
  fields = [x for x in (columns.k, columns.v, columns.k_scale, columns.v_scale) if x is not None]
  scales = [x for x in rotary[2:4] if x is not None]
  shared = shared or SharedPrefix(jnp.arange(b, dtype=jnp.int32), jnp.zeros(b, jnp.int32))
  inputs = [length, *shared, qkv, rotary.cos, rotary.sin, *scales]
  by_row = lambda *shape: pl.BlockSpec((None, *shape), lambda i, j, t: (i,) + (0,) * len(shape))
  by_head = lambda *shape: pl.BlockSpec((None, None, *shape), lambda i, j, t: (i, j) + (0,) * len(shape))
  whole_head = [pl.BlockSpec((None, *x.shape[1:]), lambda i, j, t, r=x.ndim: (j,) + (0,) * (r - 1)) for x in fields]
  own_row = [pl.BlockSpec((None, None, *x.shape[2:]), lambda i, j, t, r=x.ndim: (j, i) + (0,) * (r - 2)) for x in fields]
  part = lambda *shape: pl.BlockSpec((None, None, None, *shape), lambda i, j, t: (i, j, t) + (0,) * len(shape))
  in_specs = [by_row(), by_row(), by_row(), by_head(_QUERIES + 2, h), by_row(h // 2), by_row(h // 2)]
  in_specs += [pl.BlockSpec((h,), lambda i, j, t: (0,))] * len(scales)
  out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in fields]
  out_shape += [jax.ShapeDtypeStruct((b, m, splits, group, h), dtype if splits == 1 else jnp.float32)]
  out_specs = own_row + [part(_QUERIES, h)]
  if splits > 1:
    out_shape += [jax.ShapeDtypeStruct((b, m, splits, group), jnp.float32)] * 2
    out_specs += [part(_QUERIES)] * 2
  kernel = functools.partial(_triton_kernel, fields=len(fields), norm=bool(scales), eps=rotary.eps, group=group, splits=splits,
                             block=block)
  out = pl.pallas_call(
    kernel, grid=(b, m, splits), in_specs=in_specs + whole_head, out_shape=out_shape, out_specs=out_specs,
    input_output_aliases={len(inputs) + i: i for i in range(len(fields))}, name="decode_attention", interpret=interpret,
    compiler_params=plt.CompilerParams(num_warps=warps, num_stages=stages))(*inputs, *fields)
  columns, (value, *parts) = Columns(*out[:len(fields)]), out[len(fields):]
  if splits > 1:
    top, total = parts
    weight = jnp.exp2(top - jnp.max(top, axis=2, keepdims=True))
    value = jnp.sum(value * weight[..., None], axis=2) / jnp.maximum(jnp.sum(total * weight, axis=2), 1e-30)[..., None]
  return columns, value.astype(dtype).reshape(b, m * group, h)


def _triton_kernel(length_ref, shared_row_ref, shared_ref, qkv_ref, cos_ref, sin_ref, *refs, fields: int, norm: bool, eps: float,
                   group: int, splits: int, block: int):
  """One (row, KV head, split): rotary, then online softmax over its blocks of columns, in powers of two."""
  from jax.experimental.pallas import triton as plt
  scales, refs = (refs[:2], refs[2:]) if norm else ((None, None), refs)
  cache, stored, out_ref, parts = refs[:fields], refs[fields:2 * fields], refs[2 * fields], refs[2 * fields + 1:]
  h, dtype = qkv_ref.shape[1], qkv_ref.dtype
  halves = pl.ds(0, h // 2), pl.ds(h // 2, h // 2)
  own_row, split, position = pl.program_id(0), pl.program_id(2), length_ref[...] - 1  # -1: an idle row
  real = jnp.arange(_QUERIES) < group
  wide = lambda width: jnp.broadcast_to(real[:, None], (_QUERIES, width))
  cos, sin = cos_ref[...], sin_ref[...]

  def turned(x, scale):
    """A pair of halves f32[..., H/2], rounded as the plain way rounds them."""
    if norm:
      total = sum(jnp.sum(y * y, axis=-1, keepdims=True) for y in x)
      x = [(y * jax.lax.rsqrt(total / h + eps) * scale[half].astype(jnp.float32)[None, :]).astype(dtype).astype(jnp.float32)
           for y, half in zip(x, halves, strict=True)]
    return [y.astype(dtype) for y in (x[0] * cos[None, :] - x[1] * sin[None, :], x[1] * cos[None, :] + x[0] * sin[None, :])]

  read = lambda half: plt.load(qkv_ref.at[pl.ds(0, _QUERIES), half], mask=wide(h // 2), other=0.0)
  q = turned([read(half).astype(jnp.float32) for half in halves], scales[0])
  k = turned([qkv_ref[group, half].astype(jnp.float32)[None, :] for half in halves], scales[1])
  v, at = qkv_ref[group + 1, :], jnp.maximum(position, 0)
  mine = (split == 0) & (position >= 0)  # the program that has the new column
  whether = lambda x: jnp.broadcast_to(mine, x.shape)

  def put(ref, where, x):
    plt.store(ref.at[where], x.astype(ref.dtype), mask=whether(x))

  new_k, new_v = [y.astype(jnp.float32) for y in k], v.astype(jnp.float32)
  if fields == 4:  # what later steps will read is what this one reads
    step = jnp.maximum(jnp.maximum(jnp.max(jnp.abs(new_k[0])), jnp.max(jnp.abs(new_k[1]))), 1e-30) / 127.0
    v_step = jnp.maximum(jnp.max(jnp.abs(new_v)), 1e-30) / 127.0
    k = [jnp.floor(y / step + 0.5) for y in new_k]
    v = jnp.floor(new_v / v_step + 0.5)
    new_k, new_v = [y * step for y in k], v * v_step
    put(stored[2], at, step)
    put(stored[3], at, v_step)
  for half, y in zip(halves, k, strict=True):
    put(stored[0], (pl.ds(at, 1), half), y)
  put(stored[1], (at, slice(None)), v)

  unit = h**-0.5 * math.log2(math.e)
  score = sum(jnp.sum(x.astype(jnp.float32) * y, axis=1) for x, y in zip(q, new_k, strict=True)) * unit
  top = jnp.where(mine, score, -1e30)
  total = jnp.where(mine, jnp.ones_like(score), 0.0)
  value = total[:, None] * new_v[None, :]

  def body(i, carry):
    value, top, total = carry
    row, here = jnp.where(i < shared_blocks, shared_row, own_row), pl.ds(i * block, block)
    score = sum(plt.dot(x, cache[0][row, here, half].astype(dtype).T) for x, half in zip(q, halves, strict=True)) * unit
    if fields == 4:
      score *= cache[2][row, here][None, :]
    seen = i * block + jnp.arange(block) < position
    score = jnp.where(seen[None, :], score, -1e30)
    new_top = jnp.maximum(top, jnp.max(score, axis=1))
    shrink, prob = jnp.exp2(top - new_top), jnp.exp2(score - new_top[:, None])
    total = total * shrink + jnp.sum(prob, axis=1)
    if fields == 4:
      prob *= cache[3][row, here][None, :]
    return value * shrink[:, None] + plt.dot(prob.astype(dtype), cache[1][row, here, :].astype(dtype)), new_top, total

  shared_row, shared_blocks = shared_row_ref[...], shared_ref[...] // block
  blocks = pl.cdiv(jnp.maximum(position, 0), block)
  value, top, total = jax.lax.fori_loop(blocks * split // splits, blocks * (split + 1) // splits, body, (value, top, total))
  if splits == 1:
    value = value / jnp.maximum(total, 1e-30)[:, None]
  plt.store(out_ref.at[...], value.astype(out_ref.dtype), mask=wide(h))
  for ref, x in zip(parts, (top, total), strict=False):
    plt.store(ref.at[...], x, mask=real)
