"""Draws of survivors from keep probabilities: independent (published) or a fixed number a group (METHOD 9.4).
"""


import jax
import jax.numpy as jnp

# Distance that a systematic draw's random start keeps from the ends of [0, 1); see `draw`.
START_MARGIN = 1e-4


def draw(key, p, *, method="bernoulli", groups=None):
  """Draws which rollouts survive.

  "bernoulli" draws each rollout independently (the paper's rule, Algorithm 1).
  "systematic" fixes the number of survivors (not in the paper): the rollouts of a group are laid end to end
  in random order, each p_i long, and the one under each point start + 0, start + 1, ... survives, with one
  random start. Every rollout still survives with probability p_i, and a group keeps floor or ceil of its sum
  of p: exactly that sum when it is an integer. The random order lets neighbours survive together.

  Rows with p = 1 always survive, rows with p = 0 never do, and neither changes the odds of the other rows:
  give p = 1 to rows that are not up for a decision. A NaN never survives.

  Args:
    key: PRNG key, or one a row (of p's shape): then what is drawn for a row or a group does not depend on where its rows lie.
    p: f32[B] survival probabilities.
    method: "bernoulli" or "systematic".
    groups: i32[B] labels in any order, each group drawn by itself; None is one group. Only "systematic"
      reads it.
  Returns: bool[B], True = survives.
  Raises: ValueError for an unknown method.
  """
  p = jnp.asarray(p, jnp.float32)
  one_a_row = jax.dtypes.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == p.shape
  if method == "bernoulli":
    return (jax.vmap(jax.random.uniform)(key) if one_a_row else jax.random.uniform(key, p.shape, jnp.float32)) < p
  if method == "systematic":
    labels = jnp.zeros(p.shape, jnp.int32) if groups is None else jnp.asarray(groups)
    return _draw_systematic(key if one_a_row else jax.random.split(key, p.shape[0]), p, labels)
  raise ValueError(f"unknown method {method!r}; expected 'bernoulli' or 'systematic'")


def _draw_systematic(keys, p, groups):
  """Systematic sampling within groups; see `draw`. keys [B], p f32[B], groups i32[B] -> bool[B].

  Positions on the line are fixed-point fractions, 2^32 to one: uint32 addition wraps around at each whole
  number, so it is exact at any length, and a rollout holds a sampling point just when its end has wrapped
  below its beginning. What is left is the rounding of each p to float32, which can put an integer sum (ten
  times 0.1) a hair off; starts keep START_MARGIN away from 0 and 1, so the hair cannot change the number of
  survivors. That moves a marginal by at most 2 START_MARGIN.
  """
  order_keys, start_keys = jnp.moveaxis(jax.vmap(jax.random.split)(keys), 1, 0)
  certain = p >= 1.0  # a whole turn: zero as a fraction, and always holds a point; last, as their keys must not matter
  bits = jax.vmap(lambda k: jax.random.bits(k, (), jnp.uint32))(order_keys)
  order = jnp.lexsort((bits, certain, groups))  # by group, random within it
  first = jnp.searchsorted(groups[order], groups[order])  # i32[B] where each row's group begins
  length = _fixed_point(jnp.where((p > 0.0) & ~certain, p, 0.0))[order]
  end = jnp.cumsum(length, dtype=jnp.uint32)
  begin = end - length
  start = _fixed_point(jax.vmap(
    lambda k: jax.random.uniform(k, (), jnp.float32, minval=START_MARGIN, maxval=1.0 - START_MARGIN))(start_keys))
  offset = (start[order] - begin)[first]  # one start per group: that of its first row
  crossed = end + offset < begin + offset
  return jnp.zeros(p.shape, bool).at[order].set(crossed) | certain


def _fixed_point(x):
  """Fractions f32[...] in [0, 1) as uint32[...], 2^32 to one; exact down to 2^-9, below that floored."""
  return (x * 2.0**32).astype(jnp.uint32)
