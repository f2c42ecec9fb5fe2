"""Low-rank adapters (LoRA, Hu et al. 2021): beside a frozen matrix W a trained product, y = x W + (alpha / rank) (x A) B.

A policy with adapters is the base's tree with more leaves in `layers`: NAME_lora_a [layers, inputs of W, R] and NAME_lora_b
[layers, R, outputs of W]. B starts at zero, so the first step's policy is the base exactly. Training and decoding both compute
the two branches apart: rounded to bfloat16, a merged matrix would lose every change smaller than half its last bit, and the
sampler would stand still while the policy moves. Left out: dropout, adapters of embeddings, a scale by the root of the rank.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

MATRICES = {"q": 1, "k": 1, "v": 1, "o": 2, "gate": 1, "up": 1, "down": 1}  # how many of a weight's axes are inputs
MERGED = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}  # of the decoding layout (transformer.unstack)


@dataclasses.dataclass(frozen=True)
class Lora:
  """Which matrices have adapters, and of what rank."""
  rank: int
  alpha: float
  targets: tuple[str, ...] = tuple(MATRICES)

  @property
  def scale(self) -> float:
    return self.alpha / self.rank


def names(matrix: str) -> tuple[str, str]:
  """Of its two adapters."""
  return f"{matrix}_lora_a", f"{matrix}_lora_b"


_IN_MERGED = {name for parts in MERGED.values() for part in parts for name in names(part)}


def adapter_weights(lora: Lora, weights: dict) -> dict:
  """Of one layer: {name: transformer.Weight}, cut over the mesh as the matrices of `weights` are. A is drawn with the variance of
  PEFT's, 1 / (3 inputs)."""
  out = {}
  for matrix in lora.targets:
    w, n = weights[matrix], MATRICES[matrix]
    a, b = names(matrix)
    out[a] = w._replace(shape=(*w.shape[:n], lora.rank), axes=(*w.axes[:n], None), init=(3 * math.prod(w.shape[:n]))**-0.5)
    out[b] = w._replace(shape=(lora.rank, *w.shape[n:]), axes=(None, *w.axes[n:]), init="zeros")
  return out


def branch(x: jax.Array, equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
  """(x A) B, where `equation` is the einsum of x and the matrix that A and B stand beside."""
  (read, weight), out = equation.partition("->")[0].split(","), equation.partition("->")[2]
  inputs = "".join(axis for axis in weight if axis in read)
  outputs = "".join(axis for axis in weight if axis not in read)
  rows = "".join(axis for axis in read if axis not in inputs)
  return jnp.einsum(f"{rows}r,r{outputs}->{out}", jnp.einsum(f"{read},{inputs}r->{rows}r", x, a), b)


def product(a: jax.Array, b: jax.Array) -> jax.Array:
  """A B of one layer in float32: [inputs, R] and [R, outputs] -> [inputs, outputs]."""
  return jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), 1, precision="highest")


def merge_layer(w: dict) -> dict:
  """One layer's adapters in the decoding layout: those of matrices that are merged there become one, whose A reads for all of
  them and whose B writes to each of them from its own R."""
  d, m, h = w["k"].shape
  heads, ffn = w["q"].shape[1] // m, w["gate"].shape[1]
  shape = {"qkv": (m, heads + 2, h), "gate_up": (2, ffn)}
  place = {"q": (slice(None), slice(None), slice(0, heads)), "k": (slice(None), slice(None), heads),
           "v": (slice(None), slice(None), heads + 1), "gate": (slice(None), 0), "up": (slice(None), 1)}
  out = {}
  for whole, parts in MERGED.items():
    there = [part for part in parts if names(part)[0] in w]
    if not there:
      continue
    a, b = names(whole)
    out[a] = jnp.concatenate([w[names(part)[0]] for part in there], axis=-1)
    wide = []
    for part in there:
      own = w[names(part)[1]]
      own = own.reshape(len(own), m, heads, h) if part == "q" else own
      wide.append(jnp.zeros((len(own), *shape[whole]), own.dtype).at[place[part]].set(own))
    out[b] = jnp.concatenate(wide)
  return out | {name: x for name, x in w.items() if "_lora_" in name and name not in _IN_MERGED}


def merged_axes(axes: dict) -> dict:
  """Logical axes of `merge_layer`'s result, from those of one layer's adapters."""
  whole = {"qkv": (("embed", None), (None, "kv_heads", None, None)), "gate_up": (("embed", None), (None, None, "ffn"))}
  out = {}
  for name, parts in MERGED.items():
    if any(names(part)[0] in axes for part in parts):
      out |= dict(zip(names(name), whole[name], strict=True))
  return out | {name: x for name, x in axes.items() if name not in _IN_MERGED}
