"""What a whole training step teaches the head where the policy learns from a part: the true share of right answers."""

import math
from unittest import mock

from helpers_rollouts import rollout_of
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_rollout import PARAMS, SAMPLING, C, engine

from arrol_jax import step
from arrol_jax.learning import batching, update
from arrol_jax.learning.batching import PackShape
from arrol_jax.learning.losses import GRPO
from arrol_jax.learning.resampling import until_mixed
from arrol_jax.prune import Calibration
from arrol_jax.pruning.baselines import down_sample
from arrol_jax.pruning.head import Features
from arrol_jax.pruning.rule import PruneRule
from arrol_jax.types import TrainState


def group(prompt, right, size=8):
  """A group with so many right of eight; the last of each was pruned."""
  state = Features(np.zeros(C.width, np.float32))
  return [rollout_of(prompt * size + i, prompt, 2, 4, decided=True, features=(state,), pruned=i == size - 1,
                     reward=math.nan if i == size - 1 else float(i < right)) for i in range(size)]


@pytest.mark.parametrize("chosen, right", [("dynamic sampling", (0, 0, 3, 4)), ("max_variance", (1, 1, 1, 4))])
def test_the_head_and_the_table_see_all_graded_survivors(mesh, head, chosen, right):
  """Of 28 survivors 7 are right, 0.25; of those that the policy learns from more are."""
  everything = [r for prompt, count in enumerate(right) for r in group(prompt, count)]
  if chosen == "dynamic sampling":
    learned, everything, _ = until_mixed(lambda n, count: everything, 2, 1)
  else:
    learned = down_sample(everything, 0.5)
  optimizer = optax.sgd(1e-3)
  how = update.UpdateConfig(C, GRPO, update.Compute("float32", "xla", remat="none"))
  config = step.StepConfig("float32", SAMPLING, temperature=1.0, rule=PruneRule((4,)), shape=PackShape(32, 128, 1), update=how,
                           optimizer=optimizer)
  params = jax.tree.map(jnp.copy, {"policy": PARAMS, "head": head})
  state = TrainState(params, optimizer.init(params), jax.tree.map(lambda x: x[None], Calibration.empty(8)), jnp.int32(0))
  seen = []

  def watched(*args):
    seen.append(batching_head_examples(*args))
    return seen[-1]

  batching_head_examples = batching.head_examples
  with jax.set_mesh(mesh), mock.patch.object(batching, "head_examples", watched):
    one = step.TrainingStep(engine(mesh), config)
    state, _ = one.learn(state, step.RolledOut(everything, learned), step.Clock())
  share = lambda rewards: np.mean([r for r in rewards if r == r])
  assert share([r.reward for r in learned]) > 0.3
  examples, = seen
  assert np.sum(examples.weight) == 28 and np.sum(examples.weight * examples.reward) / 28 == 0.25
  assert (float(state.calibration.positive.sum()), float(state.calibration.negative.sum())) == (7.0, 21.0)
