"""The key-value cache of one layer, and the decoding step on it: add each row's new column, attend to all of the row's.

Layout [M,B,S,H]: the S columns of one row and head lie together, so a kernel streams them, and a row's own length says where
to stop. `step` has three ways: "xla" scatters the new column, reads all S columns of every row and masks; "triton" is our
Pallas kernel for NVIDIA GPUs, which reads each row's own columns only and writes the new one as it goes; "tpu" is JAX's
Pallas paged-attention kernel with the rows' columns as its pages. An int8 cache holds each column's values as integers with one
float32 scale a column and head.

Rows of a group hold equal copies of their prompt. The GPU kernel reads one of them for all (`Common`): the others find it in
the device's second-level cache instead of its memory, and nothing else changes, not a bit of the result.
"""

import functools
import math
from typing import NamedTuple

import flax.struct
import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from arrol_jax.norms import Turn, split_qkv
from arrol_jax.sharding import DECODE, constrain, platform, rows_on_a_chip

IMPLEMENTATIONS = ("auto", "xla", "triton", "tpu")
BLOCK = 64      # columns a kernel reads at once: a cache's length is a multiple of it where a kernel reads it
_QUERIES = 16   # rows of the smallest matrix product on a tensor core; query heads of a group are padded to it
_PROGRAMS = 512  # a row is split over several programs until there are about so many


@flax.struct.dataclass
class Columns:
  """Keys and values of B rows, [M,B,S,H]; scales f32[M,B,S] where the values are int8, else None."""
  k: jax.Array
  v: jax.Array
  k_scale: jax.Array | None = None
  v_scale: jax.Array | None = None


class Common(NamedTuple):
  """Leading columns that a row has in common with another one of its group, bit for bit."""
  row: jax.Array      # i32[B]  whose copy is read (its number within the shard of the mesh)
  columns: jax.Array  # i32[B]  how many


def common(group: jax.Array, active: jax.Array, columns: jax.Array) -> Common:
  """What rows share with the first active row of their group i32[B] (and shard): the first `columns` i32[B], all alike."""
  rows = jnp.arange(group.shape[0], dtype=jnp.int32)
  size = rows_on_a_chip(rows.size)
  alike = active[None, :] & (group[:, None] == group[None, :]) & (rows[:, None] // size == rows[None, :] // size)
  first = jnp.argmax(alike, axis=1).astype(jnp.int32)
  return Common(jnp.where(active, first, rows) % size, columns)


def pin(columns: Columns) -> Columns:
  """Pins the decode sharding: rows over the batch axes, KV heads over `tensor`."""
  return jax.tree.map(lambda x: constrain(x, "kv_heads", "batch", *(None,) * (x.ndim - 2), table=DECODE), columns)


def empty(kv_heads: int, rows: int, length: int, head_dim: int, dtype: str) -> Columns:
  zeros = jnp.zeros((kv_heads, rows, length, head_dim), dtype)
  scale = jnp.zeros((kv_heads, rows, length), jnp.float32) if dtype == "int8" else None
  return pin(Columns(zeros, zeros, scale, scale))


def bytes_per_token(layers: int, kv_heads: int, head_dim: int, dtype: str) -> int:
  """Cache bytes of one token over all layers."""
  return 2 * layers * kv_heads * (head_dim * jnp.dtype(dtype).itemsize + (4 if dtype == "int8" else 0))


def quantize(x: jax.Array) -> tuple[jax.Array, jax.Array]:
  """int8 values and f32 scales of [...,H] with x = values * scale[..., None] to within half a step."""
  x = x.astype(jnp.float32)
  scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1), 1e-30) / 127.0
  return jnp.floor(x / scale[..., None] + 0.5).astype(jnp.int8), scale


def store(k: jax.Array, v: jax.Array, dtype: str) -> Columns:
  """Columns of keys and values [B,S,M,H] (a prompt's) in the cache's layout and dtype."""
  k, v = k.transpose(2, 0, 1, 3), v.transpose(2, 0, 1, 3)
  if dtype != "int8":
    return pin(Columns(k.astype(dtype), v.astype(dtype)))
  (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
  return pin(Columns(k, v, k_scale, v_scale))


def write(columns: Columns, k: jax.Array, v: jax.Array, position: jax.Array) -> Columns:
  """Puts one column a row, k and v [B,M,H], at position i32[B]; in place where `columns` is donated."""
  def put(old, new, position):
    # Head, row and position are all indices of the scatter: as its batch dimensions they would make a TPU turn the whole
    # cache to another layout and back at every step.
    heads, rows = (jnp.arange(n, dtype=jnp.int32) for n in old.shape[:2])
    at = old.at[heads[:, None], rows[None, :], position[None, :]]
    return at.set(new[:, :, 0], mode="promise_in_bounds", unique_indices=True)

  cache, _, rows = _specs(columns, k.shape[0])
  run = _by_shard(lambda old, new, at: jax.tree.map(lambda x, y: put(x, y, at), old, new), (cache, cache, rows), cache)
  return run(columns, store(k[:, None], v[:, None], columns.k.dtype.name), position)


def take(columns: Columns, rows: jax.Array, length: int) -> Columns:
  """Rows i32[R] of the cache with `length` columns. Each shard of the batch takes rows of its own: a cache does not travel."""
  def local(columns, rows):
    def one(x):
      x = x[:, rows % x.shape[1], :length]
      return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2])) + ((0, 0),) * (x.ndim - 3))
    return jax.tree.map(one, columns)

  cache, _, by_row = _specs(columns, columns.k.shape[1])
  return pin(_by_shard(local, (cache, by_row), cache)(columns, rows))


def step(implementation: str, columns: Columns, qkv: jax.Array, turn: Turn, position: jax.Array, active: jax.Array,
         shared: Common | None = None) -> tuple[Columns, jax.Array]:
  """One decoding step: qkv [B,1,M,N/M+2,H] as projected (policy.unstack), turned, its key and value written at position
  i32[B], its queries' attention over columns 0..position -> (columns, [B,1,N,H]).

  A row that is not active bool[B] reads nothing and gives anything finite. shared: copies that need not be read twice; it never
  changes a result. Raises ValueError for another implementation's name.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"decode attention is {implementation!r}; it must be one of {', '.join(IMPLEMENTATIONS)}")
  choice = resolve(implementation, columns.k.shape[3], columns.k.dtype)
  length = jnp.where(active, position + 1, 0)
  interpret = platform() == "cpu"
  cache, heads, rows = _specs(columns, qkv.shape[0])
  if choice == "triton":
    def kernel(columns, qkv, length, cos, sin, scales, shared):
      return step_triton(columns, qkv, length, Turn(cos, sin, *scales, turn.eps), shared, interpret=interpret)
    run = _by_shard(kernel, (cache, heads, rows, rows, rows, PartitionSpec(), rows), (cache, heads))
    columns, out = run(columns, qkv[:, 0], length, turn.cos[:, 0, 0], turn.sin[:, 0, 0], turn[2:4], shared)
    return columns, out[:, None]
  q, k, v = split_qkv(qkv)
  q, k = turn(q, k)
  columns = write(columns, k[:, 0], v[:, 0], position)
  if choice == "xla":
    return columns, attend_xla(q[:, 0], columns, length)[:, None]
  run = _by_shard(functools.partial(attend_tpu, interpret=interpret), (heads, cache, rows), heads)
  return columns, run(q[:, 0], columns, length)[:, None]


def _specs(columns: Columns, rows: int) -> tuple:
  """How a kernel's arguments are split over the mesh: the cache, arrays of heads [B,N,...], arrays of rows [B,...]."""
  batch = DECODE["batch"] if rows_on_a_chip(rows) < rows else None
  heads = "tensor" if columns.k.shape[0] % jax.sharding.get_abstract_mesh().shape.get("tensor", 1) == 0 else None
  cache = jax.tree.map(lambda x: PartitionSpec(heads, batch, *(None,) * (x.ndim - 2)), columns)
  return cache, PartitionSpec(batch, heads), PartitionSpec(batch)


def _by_shard(kernel, in_specs: tuple, out_specs):
  """A kernel, which the partitioner cannot split, run by each device on its own rows and heads."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return kernel
  return jax.shard_map(kernel, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def resolve(implementation: str, head_dim: int, dtype) -> str:
  """What "auto" means for a cache here: the kernel that reads each row's own length where there is one."""
  if implementation != "auto":
    return implementation
  target = platform()
  if target == "gpu" and jnp.dtype(dtype) != jnp.float32 and head_dim & (head_dim - 1) == 0:
    return "triton"
  return "tpu" if target == "tpu" and head_dim % 128 == 0 and jnp.dtype(dtype) != jnp.int8 else "xla"


def attend_xla(q: jax.Array, columns: Columns, length: jax.Array) -> jax.Array:
  """The plain way: all columns, masked; softmax in float32."""
  b, n, h = q.shape
  m, s = columns.k.shape[0], columns.k.shape[2]
  q = q.reshape(b, m, n // m, h)
  score = jnp.einsum("bmgh,mbsh->bmgs", q, columns.k.astype(q.dtype), preferred_element_type=jnp.float32) * h**-0.5
  by_row = lambda scale: scale.swapaxes(0, 1)[:, :, None, :]
  if columns.k_scale is not None:
    score = score * by_row(columns.k_scale)
  seen = jnp.arange(s, dtype=jnp.int32)[None, :] < length[:, None]
  prob = jax.nn.softmax(jnp.where(seen[:, None, None, :], score, -1e30), axis=-1)
  if columns.v_scale is not None:
    prob = prob * by_row(columns.v_scale)
  return jnp.einsum("bmgs,mbsh->bmgh", prob.astype(q.dtype), columns.v.astype(q.dtype)).reshape(b, n, h)


def attend_tpu(q: jax.Array, columns: Columns, length: jax.Array, *, interpret: bool = False) -> jax.Array:
  """JAX's paged attention, a row's page i being its columns from i * BLOCK on."""
  from jax.experimental.pallas import tpu as pltpu
  from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention
  b, m, s, h = q.shape[0], *columns.k.shape[0::2], columns.k.shape[3]
  pages = s // BLOCK
  index = jnp.arange(b * pages, dtype=jnp.int32).reshape(b, pages)
  paged = lambda x: x.reshape(m, b * pages, BLOCK, h)
  block = next(n for n in (8, 4, 2, 1) if pages % n == 0)
  run = functools.partial(paged_attention, q * h**-0.5, paged(columns.k), paged(columns.v), jnp.maximum(length, 1), index,
                          pages_per_compute_block=block)
  if not interpret:
    return run()
  with pltpu.force_tpu_interpret_mode():
    return run()


def step_triton(columns: Columns, qkv: jax.Array, length: jax.Array, turn: Turn, shared: Common | None = None, *,
                interpret: bool = False, splits: int | None = None, block: int = 32, warps: int = 2,
                stages: int = 4) -> tuple[Columns, jax.Array]:
  """Flash decoding on qkv [B,M,N/M+2,H]: a program streams one row and KV head, `block` columns at a time, to the row's length.

  Queries and the new key are turned (`turn` with cos and sin [B,H/2]) in registers, in halves of the head dimension. The new
  column, number length - 1, starts the online softmax from registers and is stored in place. With few rows a row's
  columns are split over `splits` programs, whose partial softmaxes are joined afterwards. Blocks of columns that `shared` says
  another row has too are read there; programs of neighbouring rows run at the same time, so all but the first hit the L2 cache.
  """
  from jax.experimental.pallas import triton as plt
  b, m, parts, h = qkv.shape
  group, dtype = parts - 2, qkv.dtype
  splits = splits or max(1, min(8, _PROGRAMS // (b * m)))
  fields = [x for x in (columns.k, columns.v, columns.k_scale, columns.v_scale) if x is not None]
  scales = [x for x in turn[2:4] if x is not None]
  shared = shared or Common(jnp.arange(b, dtype=jnp.int32), jnp.zeros(b, jnp.int32))
  inputs = [length, *shared, qkv, turn.cos, turn.sin, *scales]
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
  kernel = functools.partial(_triton_kernel, fields=len(fields), norm=bool(scales), eps=turn.eps, group=group, splits=splits,
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
  """One (row, KV head, split): turn, then online softmax over its blocks of columns, in powers of two."""
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
