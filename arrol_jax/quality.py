"""The quality head: a 2-layer MLP that reads one hidden state and gives one logit s (METHOD section 2; paper section 4.1).

Its input is the backbone's hidden state after the final norm at the detection token: the position whose forward pass
samples response token number L_detect, so that one forward gives next-token logits and quality logit. The hidden
state is detached by the caller's `stop_gradient` in the loss and scaled to unit root-mean-square here, because its scale
differs by an order of magnitude between model families. Left out: the loss (losses.py) and what follows from the logit
(prune.py).
"""

import functools

from flax import nnx
import jax
import jax.numpy as jnp


class QualityHead(nnx.Module):
  """hidden [B,D] -> logit f32[B]. The last layer starts at zero: an untrained head says 0 (q = prior) of everything."""

  def __init__(self, width: int, hidden: int, key: jax.Array):
    self.w1 = nnx.Param(jax.random.normal(key, (width, hidden), jnp.float32) * width**-0.5, axes=("embed", None))
    self.b1 = nnx.Param(jnp.zeros((hidden,), jnp.float32), axes=(None,))
    self.w2 = nnx.Param(jnp.zeros((hidden,), jnp.float32), axes=(None,))
    self.b2 = nnx.Param(jnp.zeros((), jnp.float32), axes=())

  def __call__(self, hidden: jax.Array) -> jax.Array:
    x = hidden.astype(jnp.float32)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    x = jax.nn.gelu(x @ self.w1[...] + self.b1[...][None])
    return x @ self.w2[...] + self.b2[...]


@functools.cache
def _structure():
  return nnx.split(nnx.eval_shape(lambda: QualityHead(2, 2, jax.random.key(0))))[0]


def init_head(width: int, hidden: int, key: jax.Array) -> dict:
  """Parameters {"w1" [D,W], "b1" [W], "w2" [W], "b2" []}, float32, of a head with `hidden` units."""
  return nnx.to_pure_dict(nnx.state(QualityHead(width, hidden, key)))


def quality_logit(head: dict, hidden: jax.Array) -> jax.Array:
  """The head's logit s, f32[B], for hidden states [B,D] of any float dtype."""
  return nnx.merge(_structure(), nnx.State(head))(hidden)
