"""Budget over the batch: which rollouts, and which prompts, promise the most learning signal (METHOD 10.1 and 10.2).

A group of K rows with posteriors q has the expected signal E[sum of squared centred rewards] = (K s - s^2 - v) / K, where s = sum
of q and v = sum of q (1 - q). Without row i it is less by

  loss_i = (K - 1) / K  ( q_i (1 - q_i)  +  v' / (K - 1)^2  +  (q_i - s' / (K - 1))^2 ),    s', v' without row i,

which is never negative: what row i differs from the others' mean, squared, in expectation. The greedy rule drops, one by one,
the row of least loss in the whole batch. A group's losses depend on that group alone, so all groups are peeled at once: step t
drops the cheapest row of every group. The greedy rule takes from such queues always the least head, and that is the order of the
losses' running maxima, ties by group and then by step; sorted once, it gives every budget. So the loop is as long as the largest
group. On a GPU it should have a length that the compiler knows (group_size): in a loop of unknown length each turn asks the host,
which then starts no segment ahead.

Sums are in fixed point: integers add up to the same whatever the order, so the choice does not depend on where rows lie or on how
many devices hold them, and equal losses are equal. Left out: looking ahead (a group's last two rows are worth something only
together; how far greedy is from the best set: tests/test_budget.py), and what a posterior is worth (table.py).

Shared arguments. q f32[B]: P(reward 1), reward 1 being a success (reward.success), or that label itself, in [0, 1]. group
i32[B]: labels, whichever. decided bool[B]: rows that stand at a boundary. settled bool[B]: other rows of a group that count and
are never dropped: finished, or between boundaries. Rows that are neither do not exist. identity i32[B]: what breaks ties within
a group, lowest dropped first (the index if None; give the request's number and the choice is independent of slots). A row's
price: the dearest loss that its group paid on the way to dropping it. Axes: B rows, P prompts, R a ring of past prices.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

# Binary places: of a posterior in sums, of q (1 - q) and of a loss. 4,096 rows of one group fit into 31 bits.
_Q_BITS, _V_BITS = 18, 20
_NEVER = jnp.iinfo(jnp.int32).max
_MAKE_UP = 64  # decisions within which a share that was missed is made up for


def carried_threshold(losses, kappa):
  """The threshold above which the share `kappa` of past decisions would have been kept, and with those that tie there: f32[], and
  which share of these is to be kept, f32[].

  losses f32[R]: prices of decided rows; NaN where the ring is still empty. -inf, which keeps all, where there is none, or where
  kappa is 1.
  """
  ordered, known = jnp.sort(losses), jnp.sum(~jnp.isnan(losses)).astype(jnp.float32)  # NaN last
  dropped = (1.0 - kappa) * known
  threshold = jnp.where(dropped > 0, ordered[jnp.maximum(jnp.ceil(dropped).astype(jnp.int32) - 1, 0)], -jnp.inf)
  below, tied = (jnp.sum(x).astype(jnp.float32) for x in (losses < threshold, losses == threshold))
  return threshold, jnp.clip(1.0 - (dropped - below) / jnp.maximum(tied, 1.0), 0.0, 1.0)


def budget_probability(q, group, decided, settled, *, kappa, p_min, p_max, identity=None):
  """Keep probabilities whose mean over the decided rows is kappa: p_max for those that the greedy rule would drop last, p_min for
  the rest, one row between. f32[B]; kappa where not decided.

  For unbiased estimates (METHOD 9.1): the probabilities are known, so survivors can weigh 1 / p. draws.draw with "systematic" and
  no groups keeps kappa of the batch exactly. A floor is the draw's (rule.lift, rule.at_least).
  """
  return _by_rank(_peel(q, group, decided, settled, identity), group, decided, kappa, p_min, p_max)


def _by_rank(peel, group, decided, kappa, p_min, p_max):
  """`budget_probability` of rows that have been peeled."""
  size = jnp.sum(decided)
  from_top = size - 1 - _rank(peel, group)
  share = jnp.clip(size * (kappa - p_min) / max(p_max - p_min, 1e-6) - from_top, 0.0, 1.0)
  return jnp.where(decided, p_min + (p_max - p_min) * share, kappa)


def carried_probability(q, group, decided, settled, which, past, limits, identity=None):
  """`budget_probability` where rows may decide at different times: p_max for those whose price is above the threshold of past and
  present prices together, p_min for the rest, between them for those that tie. The share that the threshold is for makes up for
  what earlier decisions kept too many or too few, so the mean stays near kappa. Where no decided row's boundary has a past it is
  `budget_probability` itself.

  which i32[B]: the boundary at which a row stands. limits: kappa, p_min and p_max, and group_size where it is known: rows of a
  group at most. past f32[2,C,R]: prices and probabilities of
  the last decisions at each boundary, the latest first and NaN behind them. Returns: (f32[B], past with these rows).
  """
  kappa, p_min, p_max = (limits[name] for name in ("kappa", "p_min", "p_max"))
  peel = _peel(q, group, decided, settled, identity, limits.get("group_size"))
  by_batch, price = _by_rank(peel, group, decided, kappa, p_min, p_max), _as_loss(peel.cost)
  here = decided[None, :] & (which[None, :] == jnp.arange(past.shape[1])[:, None])  # bool[C,B]
  known = jnp.concatenate([jnp.where(here, price[None, :], jnp.nan), past[0]], axis=1)
  owed = jnp.nansum(kappa - past[1], axis=1) / jnp.maximum(jnp.sum(here, axis=1), _MAKE_UP).astype(jnp.float32)
  sure = (jnp.clip(kappa + owed, p_min, p_max) - p_min) / max(p_max - p_min, 1e-6)  # share of the rows that have p_max
  threshold, tied = jax.vmap(carried_threshold)(known, sure)
  share = jnp.where(price == threshold[which], tied[which], (price > threshold[which]).astype(price.dtype))
  carried = jnp.any(decided & ~jnp.isnan(past[0, which, 0]))
  p = jnp.where(decided & carried, p_min + (p_max - p_min) * share, by_batch)
  order = jnp.argsort(jnp.isnan(known), axis=1, stable=True)[:, :past.shape[2]]
  chances = jnp.concatenate([jnp.where(here, p[None, :], jnp.nan), past[1]], axis=1)
  return p, jnp.stack([jnp.take_along_axis(x, order, axis=1) for x in (known, chances)])


def choose_prompts(q, count, explore, key):
  """Which of P prompts to roll out (METHOD 10.2): bool[P], `count` i32[] of them (all, where there are fewer).

  Those of the largest expected variance q (1 - q), q f32[P] as their own states predict it, ties by index; but a share
  `explore` of them is drawn with `key` among the rest, so that what the predictor thinks hopeless is looked at too. Where that
  share is no whole number of prompts, `key` draws which of the two next to it, with that share as the mean.
  """
  explored = explore * count
  whole = jnp.floor(explored + 1e-4)  # 0.1 * 30 is not quite 3
  explored = whole + (jax.random.uniform(jax.random.fold_in(key, 1)) < explored - whole)

  rank = lambda *order: jnp.zeros(q.shape, jnp.int32).at[jnp.lexsort(order)].set(jnp.arange(q.shape[0], dtype=jnp.int32))
  best = rank(-q * (1.0 - q)) < count - explored.astype(jnp.int32)
  return rank(jax.random.bits(key, q.shape, jnp.uint32), ~best) < count


# ---- peeling -------------------------------------------------------------------------------------------------


class _Peel(NamedTuple):
  """For each row: at which step its group drops it, and the dearest loss until then (_V_BITS binary places)."""
  turn: jax.Array  # i32[B]
  cost: jax.Array  # i32[B]  _NEVER where not decided


def _peel(q, group, decided, settled, identity, group_size: int | None = None) -> _Peel:
  """Drops the cheapest row of every group, step by step, until only settled rows are left. group_size: so many steps at most;
  those that find nothing to drop change nothing."""
  rows = group.shape[0]
  index = jnp.arange(rows, dtype=jnp.int32)
  order = jnp.lexsort((index if identity is None else identity, group))
  first = _first(group[order])
  alive, stands = decided[order], (decided | settled)[order]
  per_group = lambda x: jax.ops.segment_sum(jnp.where(stands, x, 0), first, rows, indices_are_sorted=True)  # i32[B], at `first`
  least_of = lambda x: jax.ops.segment_min(x, first, rows, indices_are_sorted=True)
  q, u = (x[order] for x in _fixed_point(q))
  k, s, v = per_group(jnp.ones_like(q)), per_group(q), per_group(u)
  can_go = jax.ops.segment_sum(alive.astype(jnp.int32), first, rows, indices_are_sorted=True)

  def drop(step, carry):
    alive, (k, s, v), peak, peel = carry
    loss = jnp.where(alive, _loss(q, u, k[first], s[first] - q, v[first] - u), _NEVER)
    cheapest = (loss == least_of(loss)[first]) & (loss < _NEVER)
    chosen = least_of(jnp.where(cheapest, index, rows))
    some, at = chosen < rows, jnp.minimum(chosen, rows - 1)
    taken = lambda x: jnp.where(some, x[at], 0)
    peak = jnp.maximum(peak, taken(loss))
    gone = chosen[first] == index
    peel = _Peel(jnp.where(gone, step, peel.turn), jnp.where(gone, peak[first], peel.cost))
    return alive & ~gone, (k - some.astype(jnp.int32), s - taken(q), v - taken(u)), peak, peel

  none = jnp.zeros((rows,), jnp.int32)
  steps = jnp.max(can_go) if group_size is None else min(group_size, rows)
  start = alive, (k, s, v), none, _Peel(none, jnp.full((rows,), _NEVER))
  peel = jax.lax.fori_loop(0, steps, drop, start)[-1]
  return _Peel(*(none.at[order].set(x) for x in peel))


def _loss(q, u, k, s, v):
  """A row's loss in _V_BITS binary places, i32[B], from integers: its q and u = q (1 - q), its group's rows k with it, and s, v
  without it. A sum of squares, so nothing cancels; a row alone has no signal to lose."""
  others = jnp.maximum(k - 1, 1).astype(jnp.float32)
  real = lambda x, bits: x.astype(jnp.float32) * 2.0**-bits
  apart = real(q, _Q_BITS) - real(s, _Q_BITS) / others
  loss = others / (others + 1.0) * (real(u, _V_BITS) + real(v, _V_BITS) / (others * others) + apart * apart)
  return jnp.where(k > 1, jnp.round(loss * 2.0**_V_BITS).astype(jnp.int32), 0)


def _rank(peel, group):
  """Place of each row in the batch's order of dropping, i32[B]; rows that are never dropped come last."""
  order = jnp.lexsort((peel.turn, group, peel.cost))
  return jnp.zeros_like(peel.turn).at[order].set(jnp.arange(order.shape[0], dtype=jnp.int32))


def _as_loss(cost):
  """f32[...] of i32[...] in _V_BITS binary places."""
  return jnp.where(cost < _NEVER, cost.astype(jnp.float32) * 2.0**-_V_BITS, jnp.inf)


# ---- sums of groups ------------------------------------------------------------------------------------------


def _fixed_point(q):
  """q and q (1 - q) as integers, i32[B] each."""
  q = jnp.clip(jnp.asarray(q, jnp.float32), 0.0, 1.0)
  whole = lambda x, bits: jnp.round(x * 2.0**bits).astype(jnp.int32)
  return whole(q, _Q_BITS), whole(q * (1.0 - q), _V_BITS)


def _first(labels):
  """Where each row's group begins in sorted labels i32[B]: i32[B]."""
  new = jnp.concatenate([jnp.ones((1,), bool), labels[1:] != labels[:-1]])
  return jax.lax.cummax(jnp.where(new, jnp.arange(labels.shape[0], dtype=jnp.int32), 0))
