"""The key-value cache of one layer, and the decoding step on it: add each row's new column, attend to all of the row's.

Layout [M,B,S,H]: the S columns of one row and head lie together, so a kernel streams them, and a row's own length says where
to stop. `step` has three ways: "xla" scatters the new column, reads all S columns of every row and masks; "triton" is our
Pallas kernel for NVIDIA GPUs, which reads each row's own columns only and writes the new one as it goes; "tpu" is JAX's
Pallas paged-attention kernel with the rows' columns as its pages. An int8 cache holds each column's values as integers with one
float32 scale a column and head.
"""

import functools
import math

import flax.struct
import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from arrol_jax.sharding import DECODE, constrain

IMPLEMENTATIONS = ("auto", "xla", "triton", "tpu")
BLOCK = 64      # columns a kernel reads at once: a cache's length is a multiple of it where a kernel reads it
_QUERIES = 16   # rows of the smallest matrix product on a tensor core; query heads of a group are padded to it
_PROGRAMS = 1024  # a row is split over several programs until there are about so many


@flax.struct.dataclass
class Columns:
  """Keys and values of B rows, [M,B,S,H]; scales f32[M,B,S] where the values are int8, else None."""
  k: jax.Array
  v: jax.Array
  k_scale: jax.Array | None = None
  v_scale: jax.Array | None = None


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
  return jnp.round(x / scale[..., None]).astype(jnp.int8), scale


def store(k: jax.Array, v: jax.Array, dtype: str) -> Columns:
  """Columns of keys and values [B,S,M,H] (a prompt's) in the cache's layout and dtype."""
  k, v = k.transpose(2, 0, 1, 3), v.transpose(2, 0, 1, 3)
  if dtype != "int8":
    return pin(Columns(k.astype(dtype), v.astype(dtype)))
  (k, k_scale), (v, v_scale) = quantize(k), quantize(v)
  return pin(Columns(k, v, k_scale, v_scale))


def write(columns: Columns, k: jax.Array, v: jax.Array, position: jax.Array) -> Columns:
  """Puts one column a row, k and v [B,M,H], at position i32[B]; in place where `columns` is donated."""
  one = lambda old, new, at: old.at[at].set(new, mode="promise_in_bounds")
  put = jax.vmap(jax.vmap(one), in_axes=(0, 0, None))  # rows and heads are the scatter's batch dimensions: no shard leaves home
  new = store(k[:, None], v[:, None], columns.k.dtype.name)
  return pin(jax.tree.map(lambda old, x: put(old, x[:, :, 0], position), columns, new))


def step(implementation: str, columns: Columns, q: jax.Array, k: jax.Array, v: jax.Array, position: jax.Array,
         active: jax.Array) -> tuple[Columns, jax.Array]:
  """Writes k, v [B,M,H] at position i32[B] and lets q [B,N,H] attend to columns 0..position -> (columns, [B,N,H]).

  A row that is not active bool[B] reads nothing and gives anything finite. Raises ValueError for another implementation's name.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"decode attention is {implementation!r}; it must be one of {', '.join(IMPLEMENTATIONS)}")
  choice = resolve(implementation, columns.k.shape[3], columns.k.dtype)
  length = jnp.where(active, position + 1, 0)
  if choice == "xla":
    columns = write(columns, k, v, position)
    return columns, attend_xla(q, columns, length)
  interpret = jax.default_backend() == "cpu"
  if choice == "triton":
    kernel = functools.partial(step_triton, interpret=interpret)
  else:
    columns = write(columns, k, v, position)
    kernel = lambda columns, q, k, v, length: (columns, attend_tpu(q, columns, length, interpret=interpret))
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return kernel(columns, q, k, v, length)
  # The partitioner cannot split a kernel: each device runs it on its own rows and heads.
  batch = ("data", "fsdp") if q.shape[0] % math.prod(mesh.shape[a] for a in ("data", "fsdp")) == 0 else None
  heads = "tensor" if columns.k.shape[0] % mesh.shape["tensor"] == 0 else None
  cache = jax.tree.map(lambda x: PartitionSpec(heads, batch, *(None,) * (x.ndim - 2)), columns)
  spec = PartitionSpec(batch, heads, None)
  return jax.shard_map(kernel, in_specs=(cache, spec, spec, spec, PartitionSpec(batch)), out_specs=(cache, spec),
                       check_vma=False)(columns, q, k, v, length)


def resolve(implementation: str, head_dim: int, dtype) -> str:
  """What "auto" means for a cache here: the kernel that reads each row's own length where there is one."""
  if implementation != "auto":
    return implementation
  platform = jax.default_backend()
  if platform == "gpu" and jnp.dtype(dtype) != jnp.float32 and head_dim & (head_dim - 1) == 0:
    return "triton"
  return "tpu" if platform == "tpu" and head_dim % 128 == 0 and jnp.dtype(dtype) != jnp.int8 else "xla"


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


def step_triton(columns: Columns, q: jax.Array, k: jax.Array, v: jax.Array, length: jax.Array, *, interpret: bool = False,
                splits: int | None = None, block: int = BLOCK, warps: int = 4, stages: int = 3) -> tuple[Columns, jax.Array]:
  """Flash decoding: a program streams one row and KV head, `block` columns at a time, up to the row's own length.

  The new column, number length - 1, starts the online softmax from registers and is stored in place. With few rows a row's
  columns are split over `splits` programs, whose partial softmaxes are joined afterwards.
  """
  from jax.experimental.pallas import triton as plt
  b, n, h = q.shape
  m, _, s, _ = columns.k.shape
  group = n // m
  splits = splits or max(1, min(8, _PROGRAMS // (b * m)))
  new = store(k[:, None], v[:, None], columns.k.dtype.name)
  fields = [x for x in (columns.k, columns.v, columns.k_scale, columns.v_scale) if x is not None]
  added = [x[:, :, 0] for x in (new.k, new.v, new.k_scale, new.v_scale) if x is not None]  # [M,B,H] x 2, [M,B] x 2
  by_row = lambda *shape: pl.BlockSpec((None, None, *shape), lambda i, j, t: (i, j) + (0,) * len(shape))
  by_head = lambda *shape: pl.BlockSpec((None, None, *shape), lambda i, j, t: (j, i) + (0,) * len(shape))
  part = lambda *shape: pl.BlockSpec((None, None, None, *shape), lambda i, j, t: (i, j, t) + (0,) * len(shape))
  cache_specs = [by_head(*x.shape[2:]) for x in fields]
  out_shape = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in fields]
  out_shape += [jax.ShapeDtypeStruct((b, m, splits, group, h), q.dtype if splits == 1 else jnp.float32)]
  out_specs = cache_specs + [part(_QUERIES, h)]
  if splits > 1:
    out_shape += [jax.ShapeDtypeStruct((b, m, splits, group), jnp.float32)] * 2
    out_specs += [part(_QUERIES)] * 2
  out = pl.pallas_call(
    functools.partial(_triton_kernel, fields=len(fields), group=group, splits=splits, block=block),
    grid=(b, m, splits), out_shape=out_shape, out_specs=out_specs, name="decode_attention", interpret=interpret,
    in_specs=[pl.BlockSpec((None,), lambda i, j, t: (i,)), by_row(_QUERIES, h), *(by_head(*x.shape[2:]) for x in added), *cache_specs],
    input_output_aliases={2 + len(added) + i: i for i in range(len(fields))},
    compiler_params=plt.CompilerParams(num_warps=warps, num_stages=stages),
  )(length, q.reshape(b, m, group, h), *added, *fields)
  columns, (value, *parts) = Columns(*out[:len(fields)]), out[len(fields):]
  if splits > 1:
    top, total = parts
    weight = jnp.exp2(top - jnp.max(top, axis=2, keepdims=True))
    value = jnp.sum(value * weight[..., None], axis=2) / jnp.maximum(jnp.sum(total * weight, axis=2), 1e-30)[..., None]
  return columns, value.astype(q.dtype).reshape(b, n, h)


def _triton_kernel(length_ref, q_ref, *refs, fields: int, group: int, splits: int, block: int):
  """One (row, KV head, split): online softmax over its blocks of columns, in powers of two."""
  from jax.experimental.pallas import triton as plt
  new, cache, (*cache_out, out_ref), parts = refs[:fields], refs[fields:2 * fields], refs[2 * fields:3 * fields + 1], refs[3 * fields + 1:]
  h, split = q_ref.shape[1], pl.program_id(2)
  position = length_ref[...] - 1  # -1: an idle row
  real = jnp.arange(_QUERIES) < group
  wide = jnp.broadcast_to(real[:, None], (_QUERIES, h))
  q = plt.load(q_ref.at[...], mask=wide, other=0.0)
  unit = h**-0.5 * math.log2(math.e)
  mine = (split == 0) & (position >= 0)  # the program that has the new column

  k, v = (x[...].astype(jnp.float32) * (1.0 if scale is None else scale[...])
          for x, scale in zip(new[:2], new[2:] or (None, None), strict=True))
  score = jnp.sum(q.astype(jnp.float32) * k[None, :], axis=1) * unit
  top = jnp.where(mine, score, -1e30)
  total = jnp.where(mine, jnp.ones_like(score), 0.0)
  value = total[:, None] * v[None, :]
  at = jnp.maximum(position, 0)
  for ref, x in zip(cache_out, new, strict=True):
    if x.shape:
      plt.store(ref.at[at, :], x[...], mask=jnp.broadcast_to(mine, x.shape))
    else:
      plt.store(ref.at[at], x[...], mask=mine)

  def body(i, carry):
    value, top, total = carry
    here = pl.ds(i * block, block)
    score = plt.dot(q, cache[0][here, :].astype(q.dtype).T) * unit
    if fields == 4:
      score *= cache[2][here][None, :]
    seen = i * block + jnp.arange(block) < position
    score = jnp.where(seen[None, :], score, -1e30)
    new_top = jnp.maximum(top, jnp.max(score, axis=1))
    shrink, prob = jnp.exp2(top - new_top), jnp.exp2(score - new_top[:, None])
    total = total * shrink + jnp.sum(prob, axis=1)
    if fields == 4:
      prob *= cache[3][here][None, :]
    return value * shrink[:, None] + plt.dot(prob.astype(q.dtype), cache[1][here, :].astype(q.dtype)), new_top, total

  blocks = pl.cdiv(position, block)
  value, top, total = jax.lax.fori_loop(blocks * split // splits, blocks * (split + 1) // splits, body, (value, top, total))
  if splits == 1:
    value = value / jnp.maximum(total, 1e-30)[:, None]
  plt.store(out_ref.at[...], value.astype(out_ref.dtype), mask=wide)
  for ref, x in zip(parts, (top, total), strict=False):
    plt.store(ref.at[...], x, mask=real)
