"""Which prompts are rolled out: those whose own states promise most signal (METHOD 10.2).

A ridge of a group's share of successes (reward.success) on the state of its prompt's last token, from running sums as the
head's (ridge.py). More prompts are prefilled than are rolled out; compare GRESO and SPEED-RL, which choose per prompt outside
the engine.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from arrol_jax.learning import ridge
from arrol_jax.pruning import linear_head
from arrol_jax.pruning.budget import choose_prompts
from arrol_jax.running import kept
from arrol_jax.types import Rollout


@flax.struct.dataclass
class PromptModel:
  """What is known of prompts: running sums, and the fit that follows from them."""
  sums: ridge.Ridge
  head: linear_head.LinearHead


def nothing_known(width: int) -> PromptModel:
  """A model that says the same of every prompt, for states of `width`."""
  own = lambda tree: jax.tree.map(jnp.copy, tree)  # buffers that can be given away one by one
  return PromptModel(own(ridge.empty(width, False)), own(linear_head.empty_head(width, False)))


@kept.jit
def choose(model: PromptModel, states: jax.Array, count: jax.Array, explore: jax.Array, key: jax.Array) -> tuple:
  """Which of P prompts with states f32[P,D] to roll out, bool[P], `count` of them, and their predicted success f32[P].

  A share `explore` of the chosen is drawn among the rest, so that what the model thinks hopeless, or solved, comes back.
  """
  q = jnp.clip(linear_head.score(model.head, states), 0.0, 1.0)
  return choose_prompts(q, count, explore, key), q


@functools.partial(kept.jit, static_argnames=("half_life",))
def fit(model: PromptModel, states, reward, weight, strength, started, half_life: float | None) -> PromptModel:
  """`learn`, of each prompt's share of successes f32[P] and how many rollouts this stands for f32[P]."""
  sums = ridge.add(model.sums, states, reward, weight, jnp.arange(states.shape[0], dtype=jnp.int32), half_life, started)
  return PromptModel(sums, ridge.solve(sums, strength))


def learn(model: PromptModel, rollouts: list[Rollout], states: np.ndarray, strength: float,
          half_life: float | None = None) -> PromptModel:
  """The model after a step's groups; states f32[P,D] of the prompts in their order.

  half_life: rollouts started after which what was seen weighs half, as the head's; None: never. A survivor stands for
  1 / keep probability rollouts of its group, and a prompt for all of them: pruning by score must not make it look easier than
  it is.
  """
  place = {number: i for i, number in enumerate(sorted({r.prompt for r in rollouts}))}
  total, right = np.zeros((2, len(states)), np.float32)
  for r in rollouts:
    if not r.pruned:
      total[place[r.prompt]] += 1.0 / r.keep_probability
      right[place[r.prompt]] += r.success / r.keep_probability
  started = np.float32(len(rollouts))
  return fit(model, states, right / np.maximum(total, 1e-6), total, np.float32(strength), started, half_life)
