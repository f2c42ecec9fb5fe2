"""Tokens that several rows share: matrix products see each once, attention alone sees rows.

A bin holds U tokens without padding between them; attention works on R rows of S columns gathered from it. A group's prompt
stands in its bin once and at the start of each of the group's rows, which follow one another. Everything here is one operation, a
gather of token vectors that may sum a few (`gather`), and its transposes are that with other indices: always the same
sum, which scattered additions on a GPU are not. On GPUs it is a Pallas program a token, elsewhere XLA.
"""

from collections.abc import Callable
import functools
import math

import flax.struct
import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from arrol_jax.models.attention import causal_attention
from arrol_jax.models.sharding import TRAIN, constrain, platform, rows_on_a_chip


@flax.struct.dataclass
class Layout:
  """Where the tokens of bins [I,U] stand in rows [I,R,S]; -1 where nothing stands."""
  take: jax.Array   # i32[I,R,S]  token at a row's column
  read: jax.Array   # i32[I,R,S]  the same where the token's output is read: of shared tokens in the group's first row alone
  back: jax.Array   # i32[I,U]    row * S + column where a token's output is read
  count: jax.Array  # i32[I,U]    rows from there on that hold the token; 0 for padding


def shared_attention(implementation: str, layout: Layout) -> Callable:
  """`causal_attention` for tokens in bins: attend(q [I,U,N,H], k [I,U,M,H], v [I,U,M,H]) -> ([I,U,N,H], None).

  Each row attends to its own tokens and its group's prompt.
  """
  attend = causal_attention(implementation)

  def in_bins(q, k, v):
    return collect(attend(spread(q, layout), spread_shared(k, layout), spread_shared(v, layout))[0], layout), None

  return in_bins


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
  """x [I,U,...] at index i32[I,R,S] -> [I*R,S,...]."""
  out = gather(x, index.reshape(index.shape[0], -1))
  out = out.reshape(-1, index.shape[2], *x.shape[2:])
  return constrain(out, "batch", None, *("heads",) * (x.ndim > 3), *(None,) * (x.ndim - 3))


def _tokens(rows: jax.Array, layout: Layout, count: jax.Array | None = None) -> jax.Array:
  """rows [I*R,S,...] -> [I,U,...] where each token is read; with `count` the sum over the rows that hold it."""
  bins, _, length = layout.take.shape
  out = gather(rows.reshape(bins, -1, *rows.shape[2:]), layout.back, count, length)
  return constrain(out, "batch", None, *("heads",) * (out.ndim > 3), *(None,) * (out.ndim - 3))


@jax.custom_vjp
def spread(x: jax.Array, layout: Layout) -> jax.Array:
  """Tokens [I,U,...] -> rows [I*R,S,...], 0 where nothing stands. For what is read once a token, as `collect` does."""
  return _rows(x, layout.take)


spread.defvjp(lambda x, layout: (_rows(x, layout.take), layout), lambda layout, slope: (_tokens(slope, layout), None))


@jax.custom_vjp
def spread_shared(x: jax.Array, layout: Layout) -> jax.Array:
  """`spread` for what every row of a group reads: a shared token's slopes are summed."""
  return _rows(x, layout.take)


spread_shared.defvjp(lambda x, layout: (_rows(x, layout.take), layout),
                     lambda layout, slope: (_tokens(slope, layout, layout.count), None))


@jax.custom_vjp
def collect(rows: jax.Array, layout: Layout) -> jax.Array:
  """Rows [I*R,S,...] -> tokens [I,U,...], each where `layout.back` says."""
  return _tokens(rows, layout)


collect.defvjp(lambda rows, layout: (_tokens(rows, layout), layout), lambda layout, slope: (_rows(slope, layout.read), None))


# ---- the gather


def gather(x: jax.Array, index: jax.Array, count: jax.Array | None = None, stride: int = 0) -> jax.Array:
  """x [I,M,...] at index i32[I,N] -> [I,N,...], 0 where the index is negative.

  With count i32[I,N] the sum, in float32, of count vectors that stand `stride` apart from there on.
  """
  wide = math.prod(x.shape[2:])
  if platform() != "gpu" or x.ndim < 3 or wide % 8:
    return _gather_xla(x, index, count, stride)
  batch = TRAIN["batch"] if rows_on_a_chip(x.shape[0]) < x.shape[0] else None
  mesh = jax.sharding.get_abstract_mesh()
  alone = mesh.empty or mesh.size == 1
  heads = "tensor" if not alone and x.ndim > 3 and x.shape[2] % mesh.shape["tensor"] == 0 else None
  count = jnp.ones_like(index) if count is None else count
  kernel = functools.partial(_gather_kernel, stride=stride)
  if not alone:
    vectors, places = PartitionSpec(batch, None, heads), PartitionSpec(batch)
    kernel = jax.shard_map(kernel, in_specs=(vectors, places, places), out_specs=vectors, check_vma=False)
  return kernel(x, index, count)


def _gather_xla(x: jax.Array, index: jax.Array, count: jax.Array | None, stride: int) -> jax.Array:
  last = x.shape[1] - 1
  def at(index):
    out = jax.vmap(lambda x, i: x.at[jnp.clip(i, 0, last)].get(mode="promise_in_bounds"))(x, index)
    return jnp.where((index >= 0).reshape(*index.shape, *(1,) * (x.ndim - 2)), out, 0)

  if count is None:
    return at(index)
  def more(j, total):
    return total + at(jnp.where((j < count) & (index >= 0), index + j * stride, -1)).astype(jnp.float32)
  return jax.lax.fori_loop(0, jnp.max(count), more, jnp.zeros((*index.shape, *x.shape[2:]), jnp.float32)).astype(x.dtype)


def _gather_kernel(x: jax.Array, index: jax.Array, count: jax.Array, stride: int, interpret: bool = False) -> jax.Array:
  """`gather` as a Pallas program a vector."""
  from jax.experimental.pallas import triton as plt
  bins, many, wide = x.shape[0], index.shape[1], math.prod(x.shape[2:])
  padded = 1 << (wide - 1).bit_length()

  def program(index_ref, count_ref, x_ref, out_ref):
    mask, first = jnp.arange(padded) < wide, index_ref[...]
    def more(j, total):
      return total + plt.load(x_ref.at[first + j * stride], mask=mask, other=0.0).astype(jnp.float32)
    total = jax.lax.fori_loop(0, jnp.where(first < 0, 0, count_ref[...]), more, jnp.zeros(padded, jnp.float32))
    plt.store(out_ref.at[...], total.astype(out_ref.dtype), mask=mask)

  one = pl.BlockSpec((None, None), lambda i, n: (i, n))
  out = pl.pallas_call(
    program, grid=(bins, many), in_specs=[one, one, pl.BlockSpec((None, x.shape[1], padded), lambda i, n: (i, 0, 0))],
    out_specs=pl.BlockSpec((None, None, padded), lambda i, n: (i, n, 0)),
    out_shape=jax.ShapeDtypeStruct((bins, many, wide), x.dtype), name="gather_tokens", interpret=interpret,
    compiler_params=plt.CompilerParams(num_warps=4))(index, count, x.reshape(bins, -1, wide))
  return out.reshape(bins, many, *x.shape[2:])
