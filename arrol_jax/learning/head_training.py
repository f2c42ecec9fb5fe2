"""What a step's graded survivors teach the calibration tables and the quality head.

Tables count scores and rewards (METHOD section 3). `Recent` holds the last features whose rewards are known, for further passes
of the head alone. The head's part in the training step's loss is update.py's.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from arrol_jax.learning.losses import binary_cross_entropy
from arrol_jax.pruning.head import Features, empty_features, quality_logit
from arrol_jax.pruning.table import Calibration, update
from arrol_jax.types import Examples, Rollout, TrainState


def update_calibration(tables: Calibration, rollouts: list[Rollout], half_life: float | None,
                       weigh: tuple[str, ...] = ()) -> Calibration:
  """The tables [C,Q] (or one, [Q]) with this step's graded survivors, each at every length where it was scored (METHOD 3).

  weigh holding "table": a survivor counts 1 / keep probability times.
  """
  kept = [r for r in rollouts if not r.pruned]
  count = tables.positive.shape[0] if tables.positive.ndim == 2 else 1
  size = 1 << max(0, len(rollouts) - 1).bit_length()  # one compiled shape a step size
  score, weight = np.zeros((2, count, size), np.float32)
  reward = np.zeros(size, np.float32)
  for i, r in enumerate(kept):
    score[:len(r.scores), i], reward[i] = r.scores, r.reward
    weight[:len(r.scores), i] = 1.0 / r.keep_probability if "table" in weigh else 1.0
  return _update_tables(tables, score, reward, weight, half_life)


@functools.partial(jax.jit, static_argnames=("half_life",))
def _update_tables(tables, score, reward, weight, half_life):
  if tables.positive.ndim == 1:
    return update(tables, score[0], reward, weight[0], half_life=half_life)
  return jax.vmap(lambda t, s, w: update(t, s, reward, w, half_life=half_life))(tables, score, weight)


def head_loss(head: dict, examples: Examples) -> jax.Array:
  """Binary cross-entropy of the head's logits against the rewards (METHOD section 2), their weighted mean, f32[]."""
  bce = binary_cross_entropy(quality_logit(head, examples.features), examples.reward)
  return jnp.sum(examples.weight * bce) / jnp.maximum(jnp.sum(examples.weight), 1.0)


def refit_head(state: TrainState, examples: Examples, *, passes: int, optimizer: optax.GradientTransformation) -> TrainState:
  """The state after `passes` more steps of the head alone, over its buffer and this step's examples; without any, as it is."""
  if not np.any(examples.weight):
    return state
  room = state.recent.reward.shape[0]
  latest = jax.tree.map(lambda x: x[max(0, int(np.sum(examples.weight > 0)) - room):][:room], examples)
  head, recent = refit(state.params["head"], state.recent, latest.features, latest.reward, latest.weight, passes=passes,
                       optimizer=optimizer)
  return state.replace(params=state.params | {"head": head}, recent=recent)


@flax.struct.dataclass
class Recent:
  """A ring of the last R features with known reward, and the state of the optimizer that goes over them."""
  features: Features       # f32[R,...]
  reward: jax.Array      # f32[R]
  weight: jax.Array      # f32[R]  0 where the ring is still empty
  next: jax.Array        # i32[]   where the next ones go
  opt_state: object


def no_recent(head: dict, width: int, size: int, optimizer: optax.GradientTransformation) -> Recent:
  """An empty ring of `size` features for a model of `width`."""
  return Recent(empty_features(head, width, size),
                jnp.zeros(size, jnp.float32), jnp.zeros(size, jnp.float32), jnp.int32(0), optimizer.init(head))


@functools.partial(jax.jit, static_argnames=("optimizer",), donate_argnames=("recent",))
def refit(head: dict, recent: Recent, features: Features, reward: jax.Array, weight: jax.Array, *, passes: int | jax.Array,
          optimizer: optax.GradientTransformation) -> tuple[dict, Recent]:
  """Adds n <= R features (reward, weight f32[n]; weight 0 adds nothing) and takes `passes` full-batch steps on the ring."""
  size, used = recent.reward.shape[0], weight > 0
  # Readings that count come one after the other; the others fall off the ring's end.
  place = jnp.where(used, (recent.next + jnp.cumsum(used.astype(jnp.int32)) - 1) % size, size)
  put = lambda ring, new: ring.at[place].set(new.astype(ring.dtype), mode="drop")
  recent = recent.replace(features=jax.tree.map(put, recent.features, features), reward=put(recent.reward, reward),
                          weight=put(recent.weight, weight), next=(recent.next + jnp.sum(used, dtype=jnp.int32)) % size)

  def loss(head):
    bce = binary_cross_entropy(quality_logit(head, recent.features), recent.reward)
    return jnp.sum(recent.weight * bce) / jnp.maximum(jnp.sum(recent.weight), 1e-6)

  def one(_, carry):
    head, opt_state = carry
    updates, opt_state = optimizer.update(jax.grad(loss)(head), opt_state, head)
    return optax.apply_updates(head, updates), opt_state

  head, opt_state = jax.lax.fori_loop(0, passes, one, (head, recent.opt_state))
  return head, recent.replace(opt_state=opt_state)
