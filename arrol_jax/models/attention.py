"""Causal attention over whole rows, for training, log-probs and prefill; one plain way and two fast ones.

Rows are right-padded, so causality alone keeps real tokens from seeing padding: no lengths and no mask array are needed. What
padded positions compute is never read. Attention over a cache, one query a row, is engine/decode_attention.py's.
"""

from collections.abc import Callable
import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from arrol_jax.models import sharding

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
