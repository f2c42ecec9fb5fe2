"""Tests run on the CPU with 8 forced devices, refuse silent rank promotion and turn warnings into errors."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"

import jax  # noqa: E402  (after the environment is set)
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session")
def mesh():
  """A mesh of one device."""
  from arrol_jax import sharding
  return sharding.make_mesh()
