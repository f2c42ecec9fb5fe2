"""Calibration table, posterior, survival probability and pruning draws of ARRoL (arXiv 2603.24840).

A quality head gives each rollout one logit at its detection token. The table turns logits into calibrated
probabilities of success, those into survival probabilities, and a draw decides which rollouts go on:

  table = update(table, score, reward)            # past rollouts, once their rewards are known
  delta = solve_delta(table, kappa=...)           # once per step
  p     = survival(posterior(table, score), delta=delta, kappa=...)
  keep  = draw(key, p)                            # True = survives

Everything is pure jnp and works under jit and vmap; nothing here knows about a model, a prompt or a step.
The defaults are the published rule. Departures from it (METHOD section 9) are switches or functions of their own: `weight` and
`half_life` in `update` (inverse-propensity weights, forgetting), `group_survival` (balance solved within the group), in
`draw` `method="systematic"` (a fixed number of survivors), `at_least` and `lift` (never fewer than so many a group). Several
detection lengths are several tables, kept by the caller; `best_subset` is a baseline that chooses after the rewards are known.

Axes: B rollouts, Q calibration bins.
"""

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

BINS = 128
ALPHA = 1.0

# Halvings of a bracket about two wide: past the resolution of float32.
BISECTION_STEPS = 40
# Slack on both ends of the bracket, so that clipping and not rounding decides what happens there.
BRACKET_SLACK = 1e-3
# Distance that a systematic draw's random start keeps from the ends of [0, 1); see `draw`.
START_MARGIN = 1e-4


# ---- calibration table -------------------------------------------------------------------------------------


@flax.struct.dataclass
class Calibration:
  """Counts of past rollouts by score bin and reward (appendix on online calibration).

  `Calibration()` is the empty table of 128 bins. The fields count rollouts with reward 1 and 0, or sum their
  weights where `update` is given weights. In float32 a bin stops growing by ones at 2^24 (16.7 million).
  """

  positive: jax.Array = flax.struct.field(default_factory=lambda: jnp.zeros(BINS, jnp.float32))  # f32[Q]
  negative: jax.Array = flax.struct.field(default_factory=lambda: jnp.zeros(BINS, jnp.float32))  # f32[Q]

  @classmethod
  def empty(cls, bins=BINS):
    """The empty table with `bins` bins."""
    return cls(positive=jnp.zeros(bins, jnp.float32), negative=jnp.zeros(bins, jnp.float32))


def score_bin(score, bins=BINS):
  """Bin of a raw logit: min(bins - 1, floor(bins * sigmoid(score))).

  Args: score f32[...], the head's logit. Returns i32[...] in [0, bins); NaN goes to bin 0, callers mask it.
  """
  score = jnp.asarray(score, jnp.float32)
  unit = jnp.where(jnp.isnan(score), 0.0, jax.nn.sigmoid(score))
  return jnp.minimum(jnp.floor(unit * bins).astype(jnp.int32), bins - 1)


def update(table, score, reward, weight=1.0, *, half_life=None):
  """Adds rollouts to the table.

  The order of the rollouts within one call does not matter. Rows with weight 0 leave no trace, so a padded
  batch needs no mask. A row whose score, reward or weight is NaN is left out too: it would spoil the table.

  Args:
    table: Calibration with Q bins.
    score: f32[B] or f32[], raw logits (the sigmoid is inside).
    reward: [B] or scalar, 0 or 1, any dtype.
    weight: [B] or scalar, >= 0. 1 counts rollouts as published; 1 / p_i over the survivors makes the counts
      an unbiased estimate over all rollouts that were started (inverse propensity, not in the paper).
    half_life: in rollouts: existing counts are first multiplied by 0.5 ** (n / half_life), n the number of
      rows added. None forgets nothing, as published.
  Returns: the new Calibration.
  Raises: ValueError for a half_life that is not positive.
  """
  if isinstance(half_life, (int, float)) and half_life <= 0:
    raise ValueError(f"half_life must be positive (None forgets nothing), got {half_life}")
  score = jnp.atleast_1d(jnp.asarray(score, jnp.float32))
  reward = jnp.broadcast_to(jnp.asarray(reward, jnp.float32), score.shape)
  weight = jnp.broadcast_to(jnp.asarray(weight, jnp.float32), score.shape)
  counted = (weight > 0) & ~jnp.isnan(score) & ~jnp.isnan(reward)
  # `where` and not a product: a NaN times zero is a NaN.
  to_positive = jnp.where(counted, weight * reward, 0.0)
  to_negative = jnp.where(counted, weight * (1.0 - reward), 0.0)
  # A dense [B,Q] sum is small, and unlike a scatter-add it gives the same bits in every run on every device.
  bins = table.positive.shape[0]
  hit = score_bin(score, bins)[:, None] == jnp.arange(bins, dtype=jnp.int32)[None, :]  # bool[B,Q]
  decay = 1.0
  if half_life is not None:
    decay = jnp.exp2(-jnp.sum(counted, dtype=jnp.float32) / half_life)
  return Calibration(
    positive=table.positive * decay + jnp.sum(jnp.where(hit, to_positive[:, None], 0.0), axis=0),
    negative=table.negative * decay + jnp.sum(jnp.where(hit, to_negative[:, None], 0.0), axis=0),
  )


def _divide(numerator, denominator, otherwise):
  """numerator / denominator where the denominator is positive, `otherwise` elsewhere."""
  some = denominator > 0
  return jnp.where(some, numerator / jnp.where(some, denominator, 1.0), otherwise)


def prior(table):
  """Positive fraction pi of the table, f32[]; 0.5 for an empty table, which knows nothing either way."""
  positive, negative = jnp.sum(table.positive), jnp.sum(table.negative)
  return _divide(positive, positive + negative, 0.5)


def bin_posterior(table, alpha=ALPHA):
  """q_b = P(reward 1 | bin b) by Bayes' rule (appendix on online calibration).

  P(b|1) = (c+_b + alpha) / (sum c+ + alpha Q), P(b|0) the same with c-, and with the prior pi
  q_b = pi P(b|1) / (pi P(b|1) + (1 - pi) P(b|0)). The prior is not smoothed: a history of only successes
  gives 1 in every bin, of only failures 0, and an empty table gives 0.5.

  Args: alpha, Laplace smoothing (the paper's is 1); with 0, a bin that has no counts gets the prior.
  Returns: f32[Q] in [0, 1].
  """
  bins = table.positive.shape[0]
  in_positive = _divide(table.positive + alpha, jnp.sum(table.positive) + alpha * bins, 0.0)
  in_negative = _divide(table.negative + alpha, jnp.sum(table.negative) + alpha * bins, 0.0)
  pi = prior(table)
  return _divide(pi * in_positive, pi * in_positive + (1.0 - pi) * in_negative, pi)


def posterior(table, score, alpha=ALPHA):
  """q = P(reward 1 | score): `bin_posterior` at the score's bin.

  Args: score f32[...], raw logits. Returns f32[...] in [0, 1]; a NaN score says nothing and gets the prior.
  """
  score = jnp.asarray(score, jnp.float32)
  per_bin = bin_posterior(table, alpha)
  return jnp.where(jnp.isnan(score), prior(table), per_bin[score_bin(score, per_bin.shape[0])])


# ---- survival probability ----------------------------------------------------------------------------------


def survival(q, *, kappa, rho, lam, delta, p_min, p_max):
  """p = clip(kappa + delta + lam (rho - q), p_min, p_max), the probability that a rollout goes on.

  Args: q f32[...] posterior; kappa target keep ratio; rho target positive ratio; lam strength; delta the
    offset of `solve_delta`. The paper has kappa = rho = lam = 0.5, p_min = 0.1, p_max = 0.9.
  Returns: f32[...].
  """
  return jnp.clip(kappa + delta + lam * (rho - jnp.asarray(q, jnp.float32)), p_min, p_max)


def solve_delta(table, *, kappa, rho, lam, p_min, p_max):
  """The offset delta with which the mean of `survival` over the table's scores is kappa, by bisection.

  The mean is over bins, each weighted by its share of the table's counts. It never decreases in delta, and
  the bracket spans all of [p_min, p_max], so every kappa strictly between them is met (to about 1e-6).
  A kappa at or beyond an end gives that end to every score, also to scores not seen yet: kappa = p_max = 1
  turns pruning off exactly, whatever the table holds. Otherwise an empty table, having no scores, gives 0.

  Returns: f32[].
  """
  count = table.positive + table.negative
  total = jnp.sum(count)
  share = _divide(count, total, 0.0)
  q = bin_posterior(table)
  tilt = lam * (rho - q)
  bottom = p_min - kappa - jnp.max(tilt) - BRACKET_SLACK  # here every bin is at p_min,
  top = p_max - kappa - jnp.min(tilt) + BRACKET_SLACK  # and here at p_max

  def halve(_, bracket):
    low, high = bracket
    middle = 0.5 * (low + high)
    p = survival(q, kappa=kappa, rho=rho, lam=lam, delta=middle, p_min=p_min, p_max=p_max)
    short = jnp.sum(share * p) < kappa
    return jnp.where(short, middle, low), jnp.where(short, high, middle)

  low, high = jax.lax.fori_loop(0, BISECTION_STEPS, halve, (bottom, top))
  delta = jnp.where(total > 0, 0.5 * (low + high), 0.0)
  delta = jnp.where(kappa <= p_min, bottom, delta)
  return jnp.where(kappa >= p_max, top, delta)


# ---- within the group --------------------------------------------------------------------------------------

TILT_MAX = 64.0  # steepness at which nearly every p is at p_min or p_max


def group_survival(q, group, decided, *, kappa, rho, p_min, p_max, tilt=None):
  """Survival probabilities that bring each group's expected positive ratio as near rho as kappa allows (METHOD 9.5).

  Within a group p_i = clip(kappa + delta + t (q_i - rho), p_min, p_max), with delta such that the group's mean p is kappa. The
  ratio sum p q / sum p never decreases in t, so t is found by bisection in [-TILT_MAX, TILT_MAX]; t above 0 keeps the promising
  ones. Only rows that are `decided` now take part, each group by itself. Where all q are equal every p is kappa.

  Args: q f32[B] posterior; group i32[B] labels; decided bool[B]; tilt a fixed t for every group instead (None: solved).
  Returns: f32[B]; kappa where not decided.
  """
  q = jnp.asarray(q, jnp.float32)
  same = ((group[:, None] == group[None, :]) & decided[:, None] & decided[None, :]).astype(jnp.float32)
  size = jnp.maximum(jnp.sum(same, axis=1), 1.0)
  mean = lambda x: jnp.dot(same, x, precision=jax.lax.Precision.HIGHEST) / size  # of the row's group

  def solved(t):
    tilted = t * (q - rho)
    def halve(_, bracket):
      low, high = bracket
      middle = 0.5 * (low + high)
      enough = mean(jnp.clip(kappa + middle + tilted, p_min, p_max)) >= kappa
      return jnp.where(enough, low, middle), jnp.where(enough, middle, high)
    reach = jnp.full_like(q, 1.0 + BRACKET_SLACK) + jnp.abs(t)
    low, high = jax.lax.fori_loop(0, BISECTION_STEPS, halve, (-reach, reach))
    return jnp.clip(kappa + 0.5 * (low + high) + tilted, p_min, p_max)

  def steer(_, bracket):
    low, high = bracket
    middle = 0.5 * (low + high)
    p = solved(middle)
    above = mean(p * q) >= rho * mean(p)
    return jnp.where(above, low, middle), jnp.where(above, middle, high)

  if tilt is None:
    edge = jnp.full_like(q, TILT_MAX)
    low, high = jax.lax.fori_loop(0, BISECTION_STEPS // 2, steer, (-edge, edge))
    tilt = 0.5 * (low + high)
  return jnp.where(decided, solved(jnp.broadcast_to(jnp.asarray(tilt, jnp.float32), q.shape)), kappa)


def at_least(floor, order, group, decided):
  """The `floor` decided rows of each group that come first by `order` f32[B] (u / p: who was nearest to surviving): bool[B]."""
  ahead = _before(order) & (group[:, None] == group[None, :]) & decided[None, :]
  return decided & (jnp.sum(ahead, axis=1) < floor)


def survival_with_floor(floor, u, p, group, decided):
  """Probability with which each row survives where `at_least` adds `floor` of its group by u / p, given the others' u: f32[B].

  A row survives if its u / p is below 1 or below the floor-th lowest of the others, which does not depend on its own u: what
  is weighed 1 / survival stays unbiased. p f32[B] where not decided.
  """
  order = u / p
  same = (group[:, None] == group[None, :]) & decided[None, :]
  rank = jnp.sum(_before(order) & same, axis=1)
  wanted = jnp.where(rank < floor, floor, floor - 1)  # the others' floor-th lowest, by its rank among all
  bar = jnp.min(jnp.where(same & (rank[None, :] == wanted[:, None]), order[None, :], jnp.inf), axis=1)
  return jnp.where(decided, jnp.minimum(1.0, p * jnp.maximum(1.0, bar)), p)


def lift(floor, p, group, decided):
  """Survival p f32[B] raised by the same share of what each lacks to 1, until a group's sum over its decided rows is `floor`, or
  their number where that is less: a systematic draw then keeps so many. Groups that have it stay as they are."""
  same = (group[:, None] == group[None, :]) & decided[None, :]
  size, total = jnp.sum(same, axis=1), jnp.sum(jnp.where(same, p[None, :], 0.0), axis=1)
  missing = jnp.maximum(jnp.minimum(floor, size) - total, 0.0)
  share = jnp.minimum(missing / jnp.maximum(size - total, 1e-6), 1.0)
  return jnp.where(decided, p + share * (1.0 - p), p)


def _before(order):
  """bool[B,B]: whether column j comes before row i by `order` f32[B], lowest first, ties by index."""
  index = jnp.arange(order.shape[0])
  return (order[None, :] < order[:, None]) | ((order[None, :] == order[:, None]) & (index[None, :] < index[:, None]))


def top_share(order, group, decided, *, kappa, p_min, p_max):
  """Survival p_max for the first of each group by `order` f32[B], highest first, p_min for the rest, one between, mean kappa.

  The rule behind pruning by trace confidence (DeepConf, arXiv 2508.15260, keeps the most confident traces): f32[B]; kappa where
  not decided bool[B].
  """
  same = (group[:, None] == group[None, :]) & decided[None, :]
  size, rank = jnp.sum(same, axis=1), jnp.sum(_before(-order) & same, axis=1)
  share = jnp.clip(size * (kappa - p_min) / max(p_max - p_min, 1e-6) - rank, 0.0, 1.0)
  return jnp.where(decided, p_min + (p_max - p_min) * share, kappa)


def best_subset(reward, keep):
  """The `keep` rollouts of one group whose rewards vary most (PODS' max-variance rule, arXiv 2504.13818): bool[B], NumPy.

  They are the i lowest and the keep - i highest for some i; the first such i wins, ties among equal rewards go by position.
  """
  reward = np.asarray(reward, float)
  order = np.argsort(reward, kind="stable")
  picks = [np.r_[order[:i], order[len(reward) - (keep - i):]].astype(int) for i in range(keep + 1)]
  chosen = max(picks, key=lambda rows: np.var(reward[rows]) if len(rows) else 0.0)
  out = np.zeros(len(reward), bool)
  out[chosen] = True
  return out


# ---- draws -------------------------------------------------------------------------------------------------


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
