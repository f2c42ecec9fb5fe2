"""The linear quality head: from a rollout's features to a score, for the decision (METHOD 10.3). Its fit: learning/ridge.py.

Two linear functions of the same features: one fitted within prompts (features and labels less their group's mean), which tells
a prompt's rollouts apart, and one fitted on groups' means, which tells prompts apart. A row's score is

  score = level + (x - mean) w_between, of the group's mean x,  +  x w_within, less the group's mean of that.

So rows of a group are ranked by the within fit alone, and a group's mean score is what the other predicts of the group's mean
features. Both are linear, so groups average one number a row and no feature. A row without siblings has what the second fit says
of it. Where rows are on their own in use, fit without groups instead: there is then one function, fitted on all rows.

Left out: which features there are (head.py), and what becomes of the score (table.py).
"""

import flax.struct
import jax
import jax.numpy as jnp

# Of a normal score this logit's sigmoid is close to its rank's share (within 0.01): every bin of the table is used alike.
_PROBIT = 1.702


@flax.struct.dataclass
class LinearHead:
  """Weights on raw features. A leading axis where there are several boundaries."""
  mean: jax.Array           # f32[F]  of the features: taken off first, so that large ones do not cost digits
  level: jax.Array          # f32[]   mean reward
  between: jax.Array        # f32[F]  fitted on groups' means, or on all rows where `within` is None
  within: jax.Array | None  # f32[F]  fitted within prompts; None: there is one function
  spread: jax.Array         # f32[]   standard deviation of the scores of the rollouts that it was fitted on


def empty_head(width: int, within: bool = True) -> LinearHead:
  """A head that says 0 of everything, for `width` features."""
  zeros = jnp.zeros((width,), jnp.float32)
  return LinearHead(zeros, jnp.float32(0.0), zeros, zeros if within else None, jnp.float32(0.0))


def score(head: LinearHead, x: jax.Array, group: jax.Array | None = None, standing: jax.Array | None = None) -> jax.Array:
  """The predicted reward of each row, f32[B], not clipped to [0, 1].

  x [B,F] features, any float dtype; group i32[B] labels; standing bool[B]: over which rows a group's means go (all, if None; a
  row that does not stand has its standing siblings' means). group None: each row as if it had no siblings.
  """
  x = x.astype(jnp.float32) - head.mean[None, :]
  dot = lambda w: jnp.dot(x, w, precision=jax.lax.Precision.HIGHEST)
  between = dot(head.between)
  if head.within is None or group is None:
    return head.level + between
  within = dot(head.within)
  averaged = group_means(jnp.stack([between - within, jnp.ones_like(within)], axis=1), group, standing)
  # Nobody stands: a row speaks for itself.
  return head.level + within + jnp.where(averaged[:, 1] > 0, averaged[:, 0], between - within)


def group_means(x: jax.Array, group: jax.Array, standing: jax.Array | None = None) -> jax.Array:
  """Mean of x f32[B,K] over the rows of each row's group that stand, f32[B,K]; 0 where none does."""
  same = group[:, None] == group[None, :]
  same = (same if standing is None else same & standing[None, :]).astype(jnp.float32)
  count = jnp.maximum(jnp.sum(same, axis=1, keepdims=True), 1.0)
  return jnp.dot(same, x, precision=jax.lax.Precision.HIGHEST) / count


def to_logit(head: LinearHead, score: jax.Array) -> jax.Array:
  """The score on the logit scale on which the calibration table has its bins, f32[B].

  1.702 standard deviations from the mean: a normal score then fills all bins alike, at any share of right answers. The mean and
  the deviation are those of the rollouts that the head was fitted on, with its forgetting; as they drift, so does what a bin
  means, which the table's own half-life has to follow. A head that knows nothing gives 0.
  """
  return jnp.where(head.spread > 0, _PROBIT * (score - head.level) / jnp.where(head.spread > 0, head.spread, 1.0), 0.0)


NAMES = ("mean", "level", "between", "within", "spread")  # a head's arrays, where several are kept as a dict


def alone(head: LinearHead, x: jax.Array) -> jax.Array:
  """The logit f32[B] of rows x [B,F] that are ranked within their group whatever its mean: the within fit of the row alone."""
  weights = head.between if head.within is None else head.within
  part = jnp.dot(x.astype(jnp.float32) - head.mean[None, :], weights, precision=jax.lax.Precision.HIGHEST)
  return to_logit(head, part + head.level)
