"""Half-lives are counted in rollouts started: they do not get longer when pruning starts. Tables and the closed-form head."""

import math

from helpers_rollouts import rollout_of
import numpy as np
import pytest

from arrol_jax.learning.batching import linear_examples
from arrol_jax.learning.head_training import fit_linear, no_linear, update_calibration
from arrol_jax.prune import Calibration

HALF_LIFE = 32.0


def step(pruned_share, count=32):
  """A step of 32 rollouts, of which a share is pruned; all that is left is right."""
  some = [rollout_of(i, i // 8, 2, 4, decided=True, reward=1.0, features=(np.full(3, float(i), np.float32),))
          for i in range(count)]
  for r in some[:round(pruned_share * count)]:
    r.pruned, r.reward = True, math.nan
  return some


@pytest.mark.parametrize("pruned", [0.0, 0.5, 0.75, 1.0])
def test_a_table_forgets_half_in_a_half_life_of_rollouts_started(pruned):
  before = Calibration.empty(4)
  before = before.replace(negative=before.negative.at[2].set(100.0))
  after = update_calibration(before, step(pruned), HALF_LIFE)
  assert float(after.negative.sum()) == pytest.approx(50.0)
  assert float(after.positive.sum()) == 32 * (1 - pruned)


@pytest.mark.parametrize("pruned", [0.0, 0.5, 0.75])
def test_the_ridge_forgets_half_in_a_half_life_of_rollouts_started(pruned):
  """The weight of what was seen: 32 of the first step, half of it after the second, and the second's survivors."""
  _, sums = no_linear(3, 1, True)
  fit = lambda sums, some: fit_linear(sums, *linear_examples(some, 1, 3), np.float32(0.5), HALF_LIFE,
                                      np.float32(len(some)))[1]
  sums = fit(fit(sums, step(0.0)), step(pruned))
  assert float(sums.weight[0]) == pytest.approx(16 + 32 * (1 - pruned))
