"""Every way of attending that runs here equals the plain softmax, in value and gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrol_jax.models import sharding
from arrol_jax.models.attention import causal_attention

SHAPES = {"odd": (2, 37, 6, 2, 20), "one group": (2, 16, 4, 4, 8), "one kv head": (1, 130, 3, 1, 16)}  # B, S, N, M, H


def plain(q, k, v):
  """Attention in float64 NumPy, one query at a time."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros(q.shape)
  for b, t, n in np.ndindex(q.shape[:3]):
    m = n // (q.shape[2] // k.shape[2])
    score = k[b, :t + 1, m] @ q[b, t, n] / np.sqrt(q.shape[3])
    weight = np.exp(score - score.max())
    out[b, t, n] = weight / weight.sum() @ v[b, :t + 1, m]
  return out


def inputs(shape):
  b, s, n, m, h = shape
  keys = jax.random.split(jax.random.key(s), 4)
  return (jax.random.normal(keys[0], (b, s, n, h)), jax.random.normal(keys[1], (b, s, m, h)),
          jax.random.normal(keys[2], (b, s, m, h)), jax.random.normal(keys[3], (b, s, n, h)))


@pytest.mark.parametrize("name", ["xla", "splash", "auto"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_equals_the_plain_softmax(name, shape):
  q, k, v, _ = inputs(shape)
  out = jax.jit(lambda *x: causal_attention(name)(*x)[0])(q, k, v)
  np.testing.assert_allclose(out, plain(q, k, v), atol=2e-5)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_gradients_equal(shape):
  q, k, v, w = inputs(shape)
  grad = lambda name: jax.jit(jax.grad(lambda *x: jnp.sum(causal_attention(name)(*x)[0] * w), (0, 1, 2)))(q, k, v)
  for a, b in zip(grad("splash"), grad("xla"), strict=True):
    np.testing.assert_allclose(a, b, atol=3e-5)


def test_what_comes_later_is_not_seen():
  """Padding on the right, even NaN, leaves the real tokens of a row alone."""
  q, k, v, _ = inputs((2, 24, 4, 2, 8))
  real = causal_attention("xla")(q[:, :15], k[:, :15], v[:, :15])[0]
  for name in ("xla", "splash"):
    other = [x.at[:, 15:].set(1e3) for x in (q, k, v)]
    np.testing.assert_allclose(causal_attention(name)(*other)[0][:, :15], real, atol=2e-5)


@pytest.mark.parametrize("axes", [(2, 2, 2), (1, 1, 8), (8, 1, 1)])
def test_the_kernel_on_a_mesh_equals_one_device(axes):
  """(1,1,8) has more devices than KV heads: heads are then replicated."""
  q, k, v, w = inputs((8, 20, 8, 4, 8))
  attend = lambda q, k, v: jnp.sum(causal_attention("splash")(q, k, v)[0] * w)
  want = jax.jit(jax.value_and_grad(attend, (0, 1, 2)))(q, k, v)
  with jax.set_mesh(sharding.make_mesh(*axes)):
    have = jax.jit(jax.value_and_grad(attend, (0, 1, 2)))(q, k, v)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-5), have, want)


def test_unknown_names_are_refused():
  with pytest.raises(ValueError, match="flash9"):
    causal_attention("flash9")
