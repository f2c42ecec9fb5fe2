"""The examples of docs/extending.md do what is said of them. Left out: the model's, which is a sketch."""

from pathlib import Path
import re

import jax.numpy as jnp
import numpy as np
import pytest

TEXT = (Path(__file__).resolve().parents[1] / "docs/extending.md").read_text()


def example(section, **names):
  """The names that the section's code block defines, beside `names`."""
  block = re.search(r"```python\n(.*?)```", TEXT.partition(f"## {section}\n")[2], re.DOTALL)
  exec(block[1], names)
  return names


@pytest.mark.parametrize("response, reward", [("A5", 1.0), (f"{'x' * 1000} A5", 0.8), ("A6", 0.0), (f"{'x' * 1000} A6", 0.0)])
def test_the_reward(response, reward):
  assert example("A reward")["brief"](response, "5", r"A(-?\d+)$") == reward


def test_the_rule():
  """Doubt q (1 - q) is 0.25 at 1/2 and 0.09 at 0.1 and 0.9: around its mean, 0.17, and kappa; then the limits."""
  unsure, q = example("A rule", jnp=jnp)["unsure"], jnp.array([0.5, 0.1, 0.9, 0.5])
  np.testing.assert_allclose(unsure(q, 0.5, 0.1, 0.9), [0.58, 0.42, 0.42, 0.58], atol=1e-6)
  np.testing.assert_allclose(unsure(q, 0.5, 0.45, 0.55), [0.55, 0.45, 0.45, 0.55], atol=1e-6)
