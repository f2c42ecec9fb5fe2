"""What a step's graded survivors teach the calibration tables and the quality head.

Tables count scores and rewards (METHOD section 3). A reward is 0 or 1 in all of this file: Rollout.success. `Recent` holds the
last features whose rewards are known, for further passes of the head alone. The head's part in the training step's loss is
update.py's.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax

from arrol_jax.learning import ridge
from arrol_jax.learning.losses import binary_cross_entropy, weighted_mean
from arrol_jax.pruning import linear_head
from arrol_jax.pruning.head import Features, empty_features, quality_logit
from arrol_jax.pruning.table import Calibration, update
from arrol_jax.running import kept
from arrol_jax.types import Examples, Rollout, TrainState


def update_calibration(tables: Calibration, rollouts: list[Rollout], half_life: float | None, weigh: tuple[str, ...] = (),
                       decisions: int | None = None) -> Calibration:
  """The tables [C,Q] (or one, [Q]) with this step's graded survivors, each at every length where it was scored (METHOD 3).

  weigh holding "table": a survivor counts 1 / keep probability times. half_life: in rollouts started. decisions: where the
  tables are more, the last is that of the last token.
  """
  count = tables.positive.shape[0] if tables.positive.ndim == 2 else 1
  rows = table_rows(tables, [r for r in rollouts if not r.pruned], len(rollouts), weigh, decisions or count)
  return update_tables(tables, *rows, as_scalar(half_life))


def as_scalar(x: float | None) -> np.float32 | None:
  return None if x is None else np.float32(x)


def table_rows(tables: Calibration, kept: list[Rollout], started: int, weigh: tuple[str, ...], decisions: int) -> tuple:
  """score f32[C,M], reward f32[M], weight f32[C,M] of a step's survivors, and how many rollouts it started, f32[]; few shapes."""
  count = tables.positive.shape[0] if tables.positive.ndim == 2 else 1
  size = 1 << max(0, started - 1).bit_length()
  score, weight = np.zeros((2, count, size), np.float32)
  reward = np.zeros(size, np.float32)
  for i, r in enumerate(kept):
    score[:len(r.scores), i], reward[i] = r.scores, r.success
    share = 1.0 / r.keep_probability if "table" in weigh else 1.0
    weight[:len(r.scores), i] = share
    if count > decisions and r.final == r.final:  # a table for the last token
      score[decisions, i], weight[decisions, i] = r.final, share
  return score, reward, weight, np.float32(started)


@kept.jit
def update_tables(tables: Calibration, score: jax.Array, reward: jax.Array, weight: jax.Array, started: jax.Array,
                  half_life: jax.Array | None) -> Calibration:
  """The tables with `table_rows`; what is there first counts 0.5 ** (started / half_life)."""
  if half_life is not None:
    tables = jax.tree.map(lambda x: x * jnp.exp2(-started / half_life), tables)
  if tables.positive.ndim == 1:
    return update(tables, score[0], reward, weight[0])
  return jax.vmap(lambda t, s, w: update(t, s, reward, w))(tables, score, weight)


def no_linear(width: int, decisions: int, center: bool) -> tuple[dict, ridge.Ridge]:
  """A linear head that says 0 of everything and the empty sums behind it, one a decision and one for the last token."""
  stack = lambda tree: jax.tree.map(lambda x: jnp.stack([x] * (decisions + 1)), tree)
  head = stack(linear_head.empty_head(width, within=center))
  named = {name: getattr(head, name) for name in linear_head.NAMES if getattr(head, name) is not None}
  return {"within": named["between"]} | named, stack(ridge.empty(width, center))


@functools.partial(kept.jit, donate_argnames=("sums",), static_argnames=("half_life",))
def fit_linear(sums: ridge.Ridge, features: jax.Array, reward: jax.Array, weight: jax.Array, prompt: jax.Array,
               strength: jax.Array, half_life: float | None, started: jax.Array) -> tuple[dict, ridge.Ridge]:
  """The linear head after `batching.linear_examples`, and its sums: one closed-form fit a decision (METHOD 10.3).

  half_life: in rollouts started, of which this step had `started` f32[].
  """
  def one(x):
    new = ridge.add(x[0], x[1], reward, x[2], prompt, half_life, started)
    return new, ridge.solve(new, strength)

  sums, head = jax.lax.map(one, (sums, features, weight))
  within = head.between if head.within is None else head.within
  return {"mean": head.mean, "level": head.level, "between": head.between, "within": within, "spread": head.spread}, sums


def refit_head(state: TrainState, examples: Examples, *, passes: int, optimizer: optax.GradientTransformation) -> TrainState:
  """The state after `passes` more steps of the head alone, over its buffer and this step's examples."""
  if not np.any(examples.weight):
    return state
  head, recent = refit(state.params["head"], state.recent, *latest(state, examples), passes=passes, optimizer=optimizer)
  return state.replace(params=state.params | {"head": head}, recent=recent)


def latest(state: TrainState, examples: Examples) -> tuple:
  """Features, rewards and weights of the last examples that the buffer has room for; those that count come first."""
  room = state.recent.reward.shape[0]
  start = max(0, int(np.sum(examples.weight > 0)) - room)
  part = jax.tree.map(lambda x: np.concatenate([x[start:], x[:0]])[:room], examples)
  short = min(room, len(examples.reward)) - len(part.reward)
  part = jax.tree.map(lambda x: np.pad(x, ((0, short),) + ((0, 0),) * (x.ndim - 1)), part)
  return part.features, part.reward, part.weight


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


@functools.partial(kept.jit, static_argnames=("optimizer",), donate_argnames=("recent",))
def refit(head: dict, recent: Recent, features: Features, reward: jax.Array, weight: jax.Array, *, passes: int | jax.Array,
          optimizer: optax.GradientTransformation) -> tuple[dict, Recent]:
  """Adds n <= R features (reward, weight f32[n]; weight 0 adds nothing) and takes `passes` full-batch steps on the ring."""
  size, used = recent.reward.shape[0], weight > 0
  # Features that count come one after the other; the others fall off the ring's end.
  place = jnp.where(used, (recent.next + jnp.cumsum(used.astype(jnp.int32)) - 1) % size, size)
  put = lambda ring, new: ring.at[place].set(new.astype(ring.dtype), mode="drop")
  recent = recent.replace(features=jax.tree.map(put, recent.features, features), reward=put(recent.reward, reward),
                          weight=put(recent.weight, weight), next=(recent.next + jnp.sum(used, dtype=jnp.int32)) % size)

  def loss(head):
    bce = binary_cross_entropy(quality_logit(head, recent.features), recent.reward)
    return weighted_mean(bce, recent.weight)

  def one(_, carry):
    head, opt_state = carry
    updates, opt_state = optimizer.update(jax.grad(loss)(head), opt_state, head)
    return optax.apply_updates(head, updates), opt_state

  head, opt_state = jax.lax.fori_loop(0, passes, one, (head, recent.opt_state))
  return head, recent.replace(opt_state=opt_state)
