"""The fused sum and norm is the plain one; norm and rotation have their known values (rotation: test_policy.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrol_jax.models.layers import add_norm, add_norm_kernel, rms_norm


def test_norm_by_hand():
  got = rms_norm(jnp.array([[3.0, 4.0]]), jnp.array([1.0, 2.0]), 0.0)
  np.testing.assert_allclose(got, [[3 / 12.5**0.5, 8 / 12.5**0.5]], rtol=1e-6)


@pytest.mark.parametrize("dtype, width", [("float32", 48), ("bfloat16", 64)])
def test_the_kernel_is_the_plain_sum_and_norm(dtype, width):
  x, delta = (jax.random.normal(jax.random.key(i), (3, 1, width), jnp.float32).astype(dtype) for i in range(2))
  scale = jax.random.normal(jax.random.key(2), (width,)).astype(dtype)
  for branch in (delta, None):
    want = add_norm(x, branch, scale, 1e-5)
    got = add_norm_kernel(x, branch, scale, 1e-5, interpret=True)
    for a, b in zip(got, want, strict=True):
      assert a.dtype == b.dtype and a.shape == b.shape
      np.testing.assert_allclose(np.asarray(a, np.float32), np.asarray(b, np.float32), rtol=1e-2 if dtype == "bfloat16" else 1e-6)
