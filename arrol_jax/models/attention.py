"""Causal attention over whole rows, for training, log-probs and prefill; one plain way and two fast ones.

Rows are right-padded, so causality alone keeps real tokens from seeing padding: no lengths and no mask array are needed. What
padded positions compute is never read. Attention over a cache, one query a row, is decode.py's.
"""

from collections.abc import Callable
import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from arrol_jax.models import sharding
from arrol_jax.models.sharding import constrain

IMPLEMENTATIONS = ("auto", "xla", "cudnn", "splash")
_TILE = 128  # rows and lanes of the TPU kernel's blocks


def causal_attention(implementation: str) -> Callable:
  """attend(q [B,S,N,H], k [B,S,M,H], v [B,S,M,H]) -> ([B,S,N,H], None), softmax in float32, scale H**-0.5.

  "xla" runs everywhere and materialises the scores [B,N,S,S]; "cudnn" is flash attention on NVIDIA GPUs (bfloat16 or float16);
  "splash" is JAX's Pallas flash kernel for TPU (interpreted, slowly, elsewhere); "auto" takes the platform's fast one where it
  can run. Raises ValueError for another name.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"attention is {implementation!r}; it must be one of {', '.join(IMPLEMENTATIONS)}")

  def attend(q, k, v):
    platform, choice = sharding.platform(), implementation
    if choice == "auto":
      choice = {"tpu": "splash", "gpu": "cudnn" if q.dtype == jnp.bfloat16 else "xla"}.get(platform, "xla")
    if choice == "splash":
      return splash_attention(q, k, v, interpret=platform != "tpu"), None
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=choice), None

  return attend


# ---- rows that share tokens


@flax.struct.dataclass
class Layout:
  """Where the tokens of bins [I,U] stand in attention rows [I,R,S]. The first `shared` columns of a row are its group's prompt,
  the same tokens for all of the group; what attention makes of them is read in the group's first row."""
  take: jax.Array    # i32[I,R,S]  token at a row's column; 0 where there is none
  back: jax.Array    # i32[I,U]    row * S + column where a token's output is read; -1 for padding
  shared: jax.Array  # i32[I,R]    columns shared with the group
  leader: jax.Array  # i32[I,R]    the group's first row
  prompt: int = flax.struct.field(pytree_node=False)  # columns that may be shared, at most


def shared_attention(implementation: str, layout: Layout) -> Callable:
  """`causal_attention` for tokens in bins: attend(q [I,U,N,H], k [I,U,M,H], v [I,U,M,H]) -> ([I,U,N,H], None).

  Each row attends to its own tokens and its group's prompt. Only attention sees a shared token several times. The slopes of a
  shared token are summed by a matrix product: always the same sum, which scattered additions on a GPU are not.
  """
  attend = causal_attention(implementation)

  def in_bins(q, k, v):
    # Of a shared token's queries only one row's is read: nothing to sum.
    return collect(attend(spread(q, layout), _spread_shared(k, layout), _spread_shared(v, layout))[0], layout), None

  return in_bins


def _to_rows(x: jax.Array, layout: Layout) -> jax.Array:
  out = jax.vmap(lambda x, at: x.at[at].get(mode="promise_in_bounds"))(x, layout.take)
  return constrain(out.reshape(-1, *out.shape[2:]), "batch", None, *("heads",) * (x.ndim > 3), *(None,) * (x.ndim - 3))


@jax.custom_vjp
def spread(x: jax.Array, layout: Layout) -> jax.Array:
  """Tokens [I,U,...] -> rows [I*R,S,...]; padding holds some token's values. For what is read once a token (`Layout.back`)."""
  return _to_rows(x, layout)


def _spread_back(layout: Layout, slope: jax.Array) -> tuple:
  bins, rows, length = layout.take.shape
  return _read(slope.reshape(bins, rows, length, *slope.shape[2:]), layout.back), None


spread.defvjp(lambda x, layout: (_to_rows(x, layout), layout), _spread_back)


@jax.custom_vjp
def _spread_shared(x: jax.Array, layout: Layout) -> jax.Array:
  """`spread` for what every row of a group reads."""
  return _to_rows(x, layout)


def _spread_shared_back(layout: Layout, slope: jax.Array) -> tuple:
  bins, rows, length = layout.take.shape
  slope, most = slope.reshape(bins, rows, length, *slope.shape[2:]), min(length, layout.prompt)
  member = (layout.leader[:, None, :] == jnp.arange(rows, dtype=jnp.int32)[None, :, None]).astype(slope.dtype)  # [I,R,R]
  column = jnp.arange(most, dtype=jnp.int32)[None, None, :]
  shared = (column < layout.shared[:, :, None]).reshape(bins, rows, most, *(1,) * (slope.ndim - 3))
  early = slope[:, :, :most]
  summed = jnp.einsum("iab,ib...->ia...", member, jnp.where(shared, early, 0), preferred_element_type=jnp.float32)
  early = jnp.where(shared, summed.astype(slope.dtype), early)
  return _read(jnp.concatenate([early, slope[:, :, most:]], axis=2), layout.back), None


_spread_shared.defvjp(lambda x, layout: (_to_rows(x, layout), layout), _spread_shared_back)


@jax.custom_vjp
def collect(rows: jax.Array, layout: Layout) -> jax.Array:
  """Rows [I*R,S,...] -> tokens [I,U,...], each where `layout.back` says."""
  bins, count, length = layout.take.shape
  return _read(rows.reshape(bins, count, length, *rows.shape[2:]), layout.back)


def _collect_back(layout: Layout, slope: jax.Array) -> tuple:
  bins, rows, length = layout.take.shape
  out = _to_rows(slope, layout)
  place = jnp.arange(rows * length, dtype=jnp.int32).reshape(rows, length)
  read = jax.vmap(lambda back, take: back[take] == place)(layout.back, layout.take)  # only there is a token's output read
  return jnp.where(read.reshape(bins * rows, length, *(1,) * (out.ndim - 2)), out, 0), None


collect.defvjp(lambda rows, layout: (collect(rows, layout), layout), _collect_back)


def _read(rows: jax.Array, back: jax.Array) -> jax.Array:
  """rows [I,R,S,...] at back i32[I,U] -> [I,U,...], 0 for padding."""
  bins, count, length = rows.shape[:3]
  flat = rows.reshape(bins, count * length, *rows.shape[3:])
  out = jax.vmap(lambda x, at: x.at[jnp.maximum(at, 0)].get(mode="promise_in_bounds"))(flat, back)
  out = jnp.where((back >= 0).reshape(*back.shape, *(1,) * (out.ndim - 2)), out, 0)
  return constrain(out, "batch", None, *("heads",) * (out.ndim > 3), *(None,) * (out.ndim - 3))


# ---- TPU kernel


def splash_attention(q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool) -> jax.Array:
  """The Pallas kernel, which the partitioner cannot split: each device runs it on its own rows and heads of the mesh."""
  local = functools.partial(_splash_local, interpret=interpret)
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1:
    return local(q, k, v)
  rows = ("data", "fsdp") if q.shape[0] % math.prod(mesh.shape[a] for a in ("data", "fsdp")) == 0 else None
  heads = "tensor" if k.shape[2] % mesh.shape["tensor"] == 0 else None  # else every device does all heads
  spec = PartitionSpec(rows, None, heads, None)
  return jax.shard_map(local, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec, check_vma=False)(q, k, v)


def _splash_local(q: jax.Array, k: jax.Array, v: jax.Array, interpret: bool) -> jax.Array:
  from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
  b, s, n, h = q.shape
  m, rows, lanes = k.shape[2], s + -s % _TILE, h + -h % _TILE
  pad = lambda x: jnp.pad(x, ((0, 0), (0, rows - s), (0, 0), (0, lanes - h)))
  q = pad(q * h**-0.5).reshape(b, rows, m, n // m, lanes).transpose(0, 2, 3, 1, 4)  # [B,M,N/M,S,H]
  mask = splash_attention_mask.MultiHeadMask([splash_attention_mask.CausalMask((rows, rows))] * (n // m))
  kernel = splash_attention_kernel.make_splash_mqa_single_device(mask, interpret=interpret)
  out = jax.vmap(jax.vmap(kernel))(q, pad(k).swapaxes(1, 2), pad(v).swapaxes(1, 2))
  return out.transpose(0, 3, 1, 2, 4).reshape(b, rows, n, lanes)[:, :s, :, :h]
