"""The learning signal of a step's survivors, worked out by hand."""

import math

import numpy as np
import pytest

from arrol_jax.learning.metrics import rollout_metrics
from arrol_jax.types import Rollout


def group(prompt, *rewards):
  """Rollouts of one prompt; None was pruned."""
  none = np.zeros(1, np.int32)
  return [Rollout(0, prompt, none, none, np.zeros(1, np.float32), reward=math.nan if r is None else r, pruned=r is None)
          for r in rewards]


def test_by_hand():
  """K rho (1 - rho): 4 of which 1 is right, 2 with both, 3 alike, one alone, none. Every group that started counts."""
  step = group(0, 1, 0, 0, 0, None) + group(1, 1, 0) + group(2, 1, 1, 1) + group(3, 0, None) + group(4, None, None)
  assert rollout_metrics(step)["signal"] == pytest.approx((4 * 1 / 4 * 3 / 4 + 2 * 1 / 4 + 0 + 0 + 0) / 5)
  assert rollout_metrics(group(0, None))["signal"] == 0.0


def test_partial_rewards_count_by_their_squared_distance_from_the_mean():
  assert rollout_metrics(group(0, 0.0, 0.5, 1.0))["signal"] == pytest.approx(0.5)
