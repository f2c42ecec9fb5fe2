"""Root-mean-square norm, rotary embedding, and the residual sum before a norm: the latter also as one kernel for NVIDIA GPUs.

In a decoding step the tensors between two matrix products are small and every extra program costs its launch: there the sum
and the norm run as one Pallas program a row. Everywhere else XLA's fusions do the same.
"""

import functools
from typing import NamedTuple

import jax
from jax.experimental import pallas as pl
import jax.numpy as jnp


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """Root-mean-square norm over the last axis, in float32."""
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
  return (y * jnp.expand_dims(scale.astype(jnp.float32), range(y.ndim - 1))).astype(x.dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
  """Rotary embedding of x [B,S,N,H] by f32[B,S,1,H/2], first half paired with second half (Hugging Face's convention)."""
  a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
  return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


class Rotary(NamedTuple):
  """What queries and keys go through between projection and attention: a norm a head (Qwen3 only) and rotation."""
  cos: jax.Array             # f32[B,S,1,H/2]
  sin: jax.Array             # f32[B,S,1,H/2]
  q_scale: jax.Array | None  # [H], None: no norm
  k_scale: jax.Array | None  # [H]
  eps: float

  def __call__(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """q [B,S,N,H], k [B,S,M,H], turned."""
    if self.q_scale is not None:
      q, k = rms_norm(q, self.q_scale, self.eps), rms_norm(k, self.k_scale, self.eps)
    return rotate(q, self.cos, self.sin), rotate(k, self.cos, self.sin)


def split_qkv(qkv: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """qkv [B,S,M,N/M+2,H] -> queries [B,S,N,H], keys and values [B,S,M,H]."""
  b, s, m, parts, h = qkv.shape
  return qkv[:, :, :, :-2].reshape(b, s, m * (parts - 2), h), qkv[:, :, :, -2], qkv[:, :, :, -1]


def add_norm(x: jax.Array, delta: jax.Array | None, scale: jax.Array, eps: float, *,
             fused: bool = False) -> tuple[jax.Array, jax.Array]:
  """(x + delta, its norm) for x and delta [...,D]; delta None adds nothing. fused: as one kernel (forward only)."""
  if fused:
    return add_norm_kernel(x, delta, scale, eps, interpret=jax.default_backend() == "cpu")
  x = x if delta is None else x + delta
  return x, rms_norm(x, scale, eps)


def add_norm_kernel(x: jax.Array, delta: jax.Array | None, scale: jax.Array, eps: float, *,
                    interpret: bool = False) -> tuple[jax.Array, jax.Array]:
  """`add_norm` as a Pallas program a row."""
  from jax.experimental.pallas import triton as plt
  shape, width = x.shape, x.shape[-1]
  padded = 1 << (width - 1).bit_length()
  rows = [t.reshape(-1, width) for t in (x, delta) if t is not None]
  row = pl.BlockSpec((None, padded), lambda i: (i, 0))
  out = jax.ShapeDtypeStruct(rows[0].shape, x.dtype)
  results = pl.pallas_call(
    functools.partial(_add_norm_program, width=width, padded=padded, eps=eps), grid=(rows[0].shape[0],),
    in_specs=[pl.BlockSpec((padded,), lambda i: (0,)), *[row] * len(rows)], out_specs=[row] * len(rows),
    out_shape=[out] * len(rows), compiler_params=plt.CompilerParams(num_warps=4), name="add_norm", interpret=interpret,
  )(scale, *rows)
  *total, norm = (y.reshape(shape) for y in results)
  return (total[0] if total else x), norm


def _add_norm_program(scale_ref, *refs, width: int, padded: int, eps: float):
  from jax.experimental.pallas import triton as plt
  inputs, outputs = refs[:len(refs) // 2], refs[len(refs) // 2:]
  mask = jnp.arange(padded) < width
  load = lambda ref: plt.load(ref.at[...], mask=mask, other=0.0).astype(jnp.float32)
  x = load(inputs[0])
  if len(inputs) == 2:
    rounded = (x + load(inputs[1])).astype(outputs[0].dtype)
    plt.store(outputs[0].at[...], rounded, mask=mask)
    x = rounded.astype(jnp.float32)
  norm = x * jax.lax.rsqrt(jnp.sum(x * x) / width + eps) * load(scale_ref)
  plt.store(outputs[-1].at[...], norm.astype(outputs[-1].dtype), mask=mask)
