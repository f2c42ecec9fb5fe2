"""The key-value cache of one layer: its layout, int8 columns, writing and gathering rows, and how it is split over a mesh.

Layout [M,B,S,H]: the S columns of one row and head lie together, so a kernel streams them, and a row's own length says where
to stop. An int8 cache holds each column's values as integers with one float32 scale a column and head. Attention over it is
decode_attention.py's.
"""


from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from arrol_jax.models.sharding import DECODE, constrain, rows_on_a_chip

BLOCK = 64      # columns a kernel reads at once: a cache's length is a multiple of it where a kernel reads it


@flax.struct.dataclass
class Columns:
  """Keys and values of B rows, [M,B,S,H]; scales f32[M,B,S] where the values are int8, else None."""
  k: jax.Array
  v: jax.Array
  k_scale: jax.Array | None = None
  v_scale: jax.Array | None = None


class SharedPrefix(NamedTuple):
  """Leading columns that a row has in common with another one of its group, bit for bit."""
  row: jax.Array      # i32[B]  whose copy is read (its number within the shard of the mesh)
  columns: jax.Array  # i32[B]  how many


def shared_prefix(group: jax.Array, active: jax.Array, columns: jax.Array) -> SharedPrefix:
  """What rows share with the first active row of their group i32[B] (and shard): the first `columns` i32[B], all alike."""
  rows = jnp.arange(group.shape[0], dtype=jnp.int32)
  size = rows_on_a_chip(rows.size)
  alike = active[None, :] & (group[:, None] == group[None, :]) & (rows[:, None] // size == rows[None, :] // size)
  first = jnp.argmax(alike, axis=1).astype(jnp.int32)
  return SharedPrefix(jnp.where(active, first, rows) % size, columns)


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

  cache, _, rows = specs(columns, k.shape[0])
  run = by_shard(lambda old, new, at: jax.tree.map(lambda x, y: put(x, y, at), old, new), (cache, cache, rows), cache)
  return run(columns, store(k[:, None], v[:, None], columns.k.dtype.name), position)


def take(columns: Columns, rows: jax.Array, length: int) -> Columns:
  """Rows i32[R] of the cache with `length` columns. Each shard of the batch takes rows of its own: a cache does not travel."""
  def local(columns, rows):
    def one(x):
      x = x[:, rows % x.shape[1], :length]
      return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2])) + ((0, 0),) * (x.ndim - 3))
    return jax.tree.map(one, columns)

  cache, _, by_row = specs(columns, columns.k.shape[1])
  return pin(by_shard(local, (cache, by_row), cache)(columns, rows))


def specs(columns: Columns, rows: int) -> tuple:
  """How a kernel's arguments are split over the mesh: the cache, arrays of heads [B,N,...], arrays of rows [B,...]."""
  batch = DECODE["batch"] if rows_on_a_chip(rows) < rows else None
  heads = "tensor" if columns.k.shape[0] % jax.sharding.get_abstract_mesh().shape.get("tensor", 1) == 0 else None
  cache = jax.tree.map(lambda x: PartitionSpec(heads, batch, *(None,) * (x.ndim - 2)), columns)
  return cache, PartitionSpec(batch, heads), PartitionSpec(batch)


def by_shard(kernel, in_specs: tuple, out_specs):
  """A kernel, which the partitioner cannot split, run by each device on its own rows and heads."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return kernel
  return jax.shard_map(kernel, in_specs=in_specs, out_specs=out_specs, check_vma=False)
