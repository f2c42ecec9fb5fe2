"""int8 weights for decoding: a matrix's values as integers with one float32 scale an output channel.

A decode step reads every weight for few tokens, so half the bytes take about half the time. The integers go into the product as
they are, in the activations' dtype (which holds -127..127 exactly), and the float32 sums are scaled once: what is computed is the
product with `dequantize`'s weights. Norms and biases stay as they are; so does an embedding that is only looked up.
"""

import flax.struct
import jax
import jax.numpy as jnp

# Axes that a product sums over, by the weight's name in the decoding layout (transformer.unstack); the others are its channels.
SUMMED = {"qkv": (0,), "o": (0, 1), "gate_up": (0,), "down": (0,), "embed": (1,), "unembed": (0,)}


@flax.struct.dataclass
class Int8:
  """A quantised weight."""
  values: jax.Array  # i8 in the weight's shape
  scale: jax.Array   # f32 in the channels' shape


def quantize(weight: jax.Array, summed: tuple[int, ...]) -> Int8:
  """The nearest integers in -127..127 and scales: each weight is off by half a scale at most."""
  weight = weight.astype(jnp.float32)
  scale = jnp.maximum(jnp.max(jnp.abs(weight), axis=summed, keepdims=True), 1e-30) / 127.0
  return Int8(jnp.round(weight / scale).astype(jnp.int8), jnp.squeeze(scale, summed))


def dequantize(weight: Int8, summed: tuple[int, ...]) -> jax.Array:
  """The weight that a quantised one stands for, f32."""
  return weight.values.astype(jnp.float32) * jnp.expand_dims(weight.scale, summed)


def quantize_all(params: dict) -> dict:
  """Parameters in the decoding layout with their matrices quantised; the rest as it is."""
  return _each(params, lambda name, x: quantize(x, SUMMED[name]))


def axes_of_all(axes: dict) -> dict:
  """Logical axes (transformer.decoding_axes) of `quantize_all`'s result."""
  return _each(axes, lambda name, a: Int8(a, tuple(x for i, x in enumerate(a) if i not in SUMMED[name])))


def _each(tree: dict, change) -> dict:
  one = lambda part, left: {name: change(name, x) if name in SUMMED and name not in left else x for name, x in part.items()}
  left = ("layers", "embed") if "unembed" in tree else ("layers",)
  return one(tree, left) | {"layers": tuple(one(layer, ()) for layer in tree["layers"])}


def product(equation: str, x: jax.Array, weight: jax.Array | Int8) -> jax.Array:
  """einsum(equation, x, weight) in x's dtype. An Int8's channels are the result's last axes, in their order."""
  if not isinstance(weight, Int8):
    return jnp.einsum(equation, x, weight.astype(x.dtype))
  return scaled_product(equation, x, weight).astype(x.dtype)


def scaled_product(equation: str, x: jax.Array, weight: Int8) -> jax.Array:
  """The same before it is rounded, f32."""
  sums = jnp.einsum(equation, x, weight.values.astype(x.dtype), preferred_element_type=jnp.float32)
  return sums * jnp.expand_dims(weight.scale, range(sums.ndim - weight.scale.ndim))


def is_int8(params: dict) -> bool:
  """Whether parameters in the decoding layout are quantised."""
  return isinstance(params["layers"][0]["qkv"], Int8)
