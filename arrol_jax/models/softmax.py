"""The sums behind a softmax, in one pass over the logits where that pays.

A GPU reads a step's logits from memory for each reduction: maximum and sum in one pass halve that. Elsewhere, and where a mesh
splits the vocabulary, the plain two passes are used.
"""

import jax
import jax.numpy as jnp

from arrol_jax.models import sharding

_LOWEST = -1e38  # below any logit; not infinite, as its difference from itself must be 0


def sums(x: jax.Array, entropy: bool = False, one_pass: bool | None = None) -> tuple[jax.Array, ...]:
  """Over the last axis of x f32[...,V]: its maximum and sum exp(x - maximum), f32[...] each; with `entropy` also
  sum exp(x - maximum) (x - maximum), for which x must be finite. one_pass None: as suits the platform.
  """
  if one_pass is None:
    mesh = jax.sharding.get_abstract_mesh()
    one_pass = sharding.platform() == "gpu" and (mesh.empty or mesh.shape["tensor"] == 1)
  if one_pass:
    parts = (x, jnp.ones_like(x), jnp.zeros_like(x))[:2 + entropy]
    return jax.lax.reduce(parts, tuple(map(jnp.float32, (_LOWEST, 0, 0)))[:2 + entropy], _join, (x.ndim - 1,))
  top = jnp.max(x, axis=-1, initial=_LOWEST)
  below = x - top[..., None]
  weight = jnp.exp(below)
  return (top, jnp.sum(weight, axis=-1)) + ((jnp.sum(weight * below, axis=-1),) if entropy else ())


def _join(a: tuple, b: tuple) -> tuple:
  """`sums` of two parts from those of each."""
  top = jnp.maximum(a[0], b[0])
  below = [part[0] - top for part in (a, b)]
  lower = jnp.exp(below[0] + below[1])  # of the two differences one is 0, and so is known what its exponential is
  share = [jnp.where(y == 0, 1.0, lower) for y in below]
  out = top, a[1] * share[0] + b[1] * share[1]
  if len(a) == 2:
    return out
  return *out, sum(w * (part[2] + part[1] * y) for w, part, y in zip(share, (a, b), below, strict=True))
