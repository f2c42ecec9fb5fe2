"""The closed-form head: ridge regression of the reward on features, from running sums with forgetting (METHOD 10.3).

The reward here is 0 or 1: Rollout.success. `add` takes in a step's graded survivors, `solve` gives the head
(pruning/linear_head.py) with one factorisation; there is no learning rate, and nothing to warm up. One `Ridge` per boundary:
with a leading axis [C] under jax.vmap, or jax.lax.map where F is large.

Numbers. Hidden states have dimensions whose mean is a thousand times their deviation: sums of raw products would lose the latter
in float32. Kept are therefore the means and the products of differences from them, merged with a step's own by the formula of
Chan, Golub and LeVeque (1979), which is exact and cancels nothing. `solve` divides by standard deviations, so features may have
any scale, and adds to the correlation matrix's diagonal: `strength` rollouts for each feature that varies, a prior that fades
as more are seen. What is best depends neither on their number nor on the width (experiments/ridge_strength.py), whereas a fixed
share of the diagonal is too weak in the first steps by a factor of ten.

With `center` there are two fits of disjoint parts: one of differences from the group's mean in its step, features and labels, and
one of the groups' means. A feature that does not vary within prompts (a prompt's own state) gets no weight in the first, and its
part in the second. The fit of all rows in place of the means is a compromise of both slopes: on data made so that these differ,
it has an overall AUC of 0.85 where the means' has 0.87, and less where little has been seen.

Left out: survival weights (pass 1 / keep probability as `weight`), and the choice of features.
"""

import functools

import flax.struct
import jax
import jax.numpy as jnp

from arrol_jax.pruning.linear_head import LinearHead

STRENGTH = 8.0
# Below this share of its mean square a feature's variance is rounding: it does not vary.
_CONSTANT = 1e-10


@flax.struct.dataclass
class Ridge:
  """Running weighted moments of features x and reward y. With `center`, x and y in xx and xy are their group's means; without,
  the last two are None."""
  weight: jax.Array      # f32[]     sum of weights, forgetting included
  mean: jax.Array        # f32[F]
  level: jax.Array       # f32[]     mean reward
  xx: jax.Array          # f32[F,F]  sum of weighted (x - mean) (x - mean)'
  xy: jax.Array          # f32[F]    sum of weighted (x - mean) (y - level)
  xx_within: jax.Array | None  # f32[F,F]  the same of x less its group's mean
  xy_within: jax.Array | None  # f32[F]


def empty(width: int, center: bool = True) -> Ridge:
  """Nothing seen yet, of `width` features; center: two fits (twice the memory: 4 F^2 bytes each)."""
  f, ff, one = (lambda: jnp.zeros((width,), jnp.float32)), (lambda: jnp.zeros((width, width), jnp.float32)), jnp.float32(0.0)
  return Ridge(one, f(), one, ff(), f(), ff() if center else None, f() if center else None)


@functools.partial(jax.jit, static_argnames=("half_life",))
def add(ridge: Ridge, features: jax.Array, reward: jax.Array, weight: jax.Array, group: jax.Array,
        half_life: float | None = None, started: jax.Array | None = None) -> Ridge:
  """The ridge with M more rollouts.

  Args:
    features: [M,F], any float dtype; reward f32[M]; group i32[M], the prompt in this step.
    weight: f32[M] >= 0. Rows with 0 (padding, whatever they hold) leave no trace, nor do rows with a NaN.
    half_life: in rollouts: what is there first counts 0.5 ** (n / half_life), n the rollouts `started` f32[], pruned ones among
      them (None: the rows added).
  """
  counted = (weight > 0) & ~jnp.isnan(reward) & jnp.all(jnp.isfinite(features), axis=1)
  w = jnp.where(counted, weight, 0.0)
  x = jnp.where(counted[:, None], features.astype(jnp.float32), 0.0)
  y = jnp.where(counted, reward, 0.0).astype(jnp.float32)
  passed = jnp.sum(counted, dtype=jnp.float32) if started is None else started
  decay = 1.0 if half_life is None else jnp.exp2(-passed / half_life)

  here, before = jnp.sum(w), decay * ridge.weight
  total = here + before
  share = here / jnp.where(total > 0, total, 1.0)  # of the new rows
  over_rows = lambda x: _dot(w, x) / jnp.where(here > 0, here, 1.0)
  # Twice: the mean of differences from a rounded mean corrects it.
  mean, level = over_rows(x), over_rows(y)
  mean += over_rows(x - mean[None, :])
  dx, dy = jnp.where(counted[:, None], x - mean[None, :], 0.0), jnp.where(counted, y - level, 0.0)
  if ridge.xx_within is not None:  # of differences already: a group's mean is then small, and no digits are lost
    inside = _within(jnp.concatenate([dx, dy[:, None]], axis=1), w, group)
    xx_within, xy_within = _products(w, inside[:, :-1], inside[:, -1])
    dx, dy = dx - inside[:, :-1], dy - inside[:, -1]
  xx, xy = _products(w, dx, dy)
  apart_x, apart_y, both = mean - ridge.mean, level - ridge.level, before * share
  out = ridge.replace(weight=total, mean=ridge.mean + share * apart_x, level=ridge.level + share * apart_y,
                      xx=decay * ridge.xx + xx + both * apart_x[:, None] * apart_x[None, :],
                      xy=decay * ridge.xy + xy + both * apart_x * apart_y)
  if ridge.xx_within is None:
    return out
  return out.replace(xx_within=decay * ridge.xx_within + xx_within, xy_within=decay * ridge.xy_within + xy_within)


@jax.jit
def solve(ridge: Ridge, strength: float | jax.Array = STRENGTH) -> LinearHead:
  """The head of least weighted squared error plus strength * F * |w|^2, w on the F standardised features that vary (not the
  intercept).

  Both fits by the same strength, each standardised by its own deviations. Nothing seen gives a head that says 0 of everything.
  """
  size = jnp.where(ridge.weight > 0, ridge.weight, 1.0)
  least = _CONSTANT * (ridge.mean * ridge.mean + jnp.diagonal(ridge.xx) / size)
  between = _fit(ridge.xx / size, ridge.xy / size, least, strength / size)
  variance = lambda w, xx: jnp.maximum(_dot(w, _dot(xx, w)), 0.0) / size
  if ridge.xx_within is None:
    return LinearHead(ridge.mean, ridge.level, between, None, jnp.sqrt(variance(between, ridge.xx)))
  within = _fit(ridge.xx_within / size, ridge.xy_within / size, least, strength / size)
  spread = jnp.sqrt(variance(within, ridge.xx_within) + variance(between, ridge.xx))
  return LinearHead(ridge.mean, ridge.level, between, within, spread)


def _fit(xx, xy, least, strength):
  """Weights f32[F] on raw features, from covariances xx f32[F,F], xy f32[F]; those of variance `least` f32[F] or less get 0."""
  variance = jnp.diagonal(xx)
  varies = variance > least
  scale = jnp.where(varies, jax.lax.rsqrt(jnp.where(varies, variance, 1.0)), 0.0)
  prior = strength * jnp.maximum(jnp.sum(varies), 1)
  correlation = xx * scale[:, None] * scale[None, :] + prior * jnp.eye(xx.shape[0], dtype=xx.dtype)
  return scale * jax.scipy.linalg.cho_solve(jax.scipy.linalg.cho_factor(correlation, lower=True), scale * xy)


def _within(x, w, group):
  """x f32[M,K] less its weighted mean over the row's group, 0 where w f32[M] is 0. Dense: the same bits in every run."""
  same = jnp.where(group[:, None] == group[None, :], w[None, :], 0.0)
  size = jnp.sum(same, axis=1, keepdims=True)
  means = _dot(same, x) / jnp.where(size > 0, size, 1.0)
  return jnp.where(w[:, None] > 0, x - means, 0.0)


def _products(w, x, y):
  """Weighted x'x f32[K,K] and x'y f32[K]."""
  weighed = w[:, None] * x
  return _dot(weighed.T, x), _dot(weighed.T, y)


_dot = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
