"""The quality head: from what a rollout is like at a detection token to one logit s, trained while the policy trains.

A 2-layer MLP (ARRoL, section on the quality head; METHOD section 2). Published input: the hidden state after the final norm at
the detection token, the position whose forward pass samples response token number L_detect, so that one forward gives next-token
logits and quality logit. Further inputs (METHOD 9.6): the mean of these states over the response so far, and its tokens'
mean and lowest log-prob. States are scaled to unit root-mean-square, because their scale differs by an order of magnitude between
model families, and log-probs by a logarithm. The engine took them: the loss does not reach the backbone.

Left out: the loss (learning/update.py), further passes (learning/head_training.py) and what follows from the logit (rule.py).
"""


import functools
from typing import NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp

INPUTS = {"last": "w1", "mean": "w1_mean", "logprobs": "w1_logprobs"}  # input -> its weights in the first layer


STATISTICS = 2  # mean and lowest log-prob


_CENTRE = (-1.0, 1.5)  # of their logarithms, about; they spread by about a half


class Features(NamedTuple):
  """What a head may read of rollouts at one place; None where none does. Any float dtype, leading axes alike."""
  last: jax.Array | None = None      # [...,D] hidden state
  mean: jax.Array | None = None      # [...,D] mean hidden state since the first response token was sampled
  logprobs: jax.Array | None = None  # [...,2] mean and lowest log-prob of the response's tokens


class QualityHead(nnx.Module):
  """Features -> logit f32[...]. The last layer starts at zero: an untrained head says 0 (q = prior) of everything."""

  def __init__(self, width: int, hidden: int, key: jax.Array, inputs: tuple[str, ...] = ("last",)):
    for i, name in enumerate(inputs):
      fan = STATISTICS if name == "logprobs" else width
      weights = jax.random.normal(jax.random.fold_in(key, i) if i else key, (fan, hidden), jnp.float32)
      weights *= (fan * len(inputs))**-0.5
      setattr(self, INPUTS[name], nnx.Param(weights, axes=("embed" if fan == width else None, None)))
    self.b1 = nnx.Param(jnp.zeros((hidden,), jnp.float32), axes=(None,))
    self.w2 = nnx.Param(jnp.zeros((hidden,), jnp.float32), axes=(None,))
    self.b2 = nnx.Param(jnp.zeros((), jnp.float32), axes=())

  def __call__(self, features: Features) -> jax.Array:
    x = self.b1[...]
    for name, weights in INPUTS.items():
      if hasattr(self, weights):
        y = getattr(features, name).astype(jnp.float32)
        if name == "logprobs":  # models' differ by factors; with scores near 0 and 1 a unit learns from them as from states
          y = 2.0 * (jnp.log(0.01 - jnp.minimum(y, 0.0)) - jnp.broadcast_to(jnp.array(_CENTRE), y.shape))
        else:
          y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + 1e-6)
        x = jnp.expand_dims(x, tuple(range(y.ndim - x.ndim))) + y @ getattr(self, weights)[...]
    return jax.nn.gelu(x) @ self.w2[...] + self.b2[...]


def init_head(width: int, hidden: int, key: jax.Array, inputs: tuple[str, ...] = ("last",)) -> dict:
  """Parameters of a head with `hidden` units W, float32: a first layer an input ("w1" [D,W], "w1_mean" [D,W], "w1_logprobs"
  [2,W]; those present say what it reads), "b1" [W], "w2" [W], "b2" []. Raises ValueError for an unknown input."""
  unknown = set(inputs) - set(INPUTS)
  if unknown or not inputs:
    raise ValueError(f"a quality head reads some of {', '.join(INPUTS)}, not {inputs}")
  return nnx.to_pure_dict(nnx.state(QualityHead(width, hidden, key, inputs)))


def is_linear(head: dict) -> bool:
  """Whether a head is linear_head.py's, whose arrays have a leading axis: one a decision, then the last token's."""
  return "between" in head


def inputs_of(head: dict) -> tuple[str, ...]:
  """Which inputs a head reads."""
  return tuple(name for name, weights in INPUTS.items() if weights in head)


@functools.cache
def _structure(inputs: tuple[str, ...]):
  return nnx.split(nnx.eval_shape(lambda: QualityHead(2, 2, jax.random.key(0), inputs)))[0]


def quality_logit(head: dict, features: Features) -> jax.Array:
  """The head's logit s, f32[...], for features [...]."""
  return nnx.merge(_structure(inputs_of(head)), nnx.State(head))(features)


def empty_features(head: dict, width: int, count: int) -> Features:
  """Features of `count` places for a model of `width`, all 0, as `head` reads them."""
  wide = lambda name: jnp.zeros((count, STATISTICS if name == "logprobs" else width), jnp.float32)
  return Features(**{name: wide(name) for name in inputs_of(head)})
