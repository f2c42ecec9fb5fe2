"""How likely each rollout is to go on: the published rule and those that depart from it (METHOD sections 4 and 9).

`PruneRule` holds a run's constants. `survival` and `solve_delta` are the published rule; `group_survival` solves balance within
the group (METHOD 9.5); `at_least`, `survival_with_floor` and `lift` keep so many of a group. Pure jnp, under jit and vmap;
nothing here knows about a model, a prompt or a step. Axes: B rollouts, Q calibration bins.
"""

import dataclasses

import jax
import jax.numpy as jnp

from arrol_jax.pruning.table import bin_posterior, divide

RULES = ("published", "group", "budget", "random", "lowest", "highest", "confidence", "max_variance")


DRAWS = ("bernoulli", "systematic")


WEIGH = ("table", "head", "policy")


_STEEP = 50.0  # a strength at which the rule is as good as a threshold


@dataclasses.dataclass(frozen=True)
class PruneRule:
  """How rollouts are cut: constants of METHOD sections 3-4 and the departures of section 9.

  detect: response tokens at each decision; keep kappa, target rho, strength lambda. The keep ratios of several decisions
  multiply to `keep`, and so do the limits p_min and p_max. kind: "published"; "group" steers each group's expected ratio to
  rho; "budget" (METHOD 10.1) keeps, over the whole batch, the rollouts of largest expected signal; "random" ignores scores;
  "lowest" and "highest" keep the least and the most promising by the table; "confidence" those of a group whose tokens are most
  confident (DeepConf); "max_variance" (PODS) lets all run to the end, see `down_sample`; "threshold", for inference, stops those
  whose posterior is below `keep` or the row's own (sampling.SamplingParams); MODULE.FUNCTION is the user's (own_rule.py).
  draw: "bernoulli" or "systematic", a fixed number a group (the budget's: of the batch). floor: rows of a group that are left at
  least, finished ones and those between decisions counted (`missing`), but by a threshold. holdout: share of rollouts that are
  never cut.
  """
  detect: tuple[int, ...]
  keep: float = 0.5
  target: float = 0.5
  strength: float = 0.5
  p_min: float = 0.1
  p_max: float = 0.9
  kind: str = "published"
  draw: str = "bernoulli"
  floor: int = 0
  holdout: float = 0.0
  inputs: tuple[str, ...] = ()  # what a linear head reads (features.py); () for the published head
  group_size: int | None = None  # rollouts of a prompt at most; None: any number (slower on a GPU, see budget.py)

  def constants(self) -> dict:
    """Keyword arguments of prune.solve_delta and prune.survival for one of the decisions."""
    root = 1.0 / len(self.detect)
    strength = {"random": 0.0, "lowest": _STEEP, "highest": -_STEEP}.get(self.kind, self.strength)
    return dict(kappa=self.keep**root, rho=self.target, lam=strength, p_min=self.p_min**root, p_max=self.p_max**root)

  def limits(self) -> dict:
    """The keep ratio and its limits for one of the decisions."""
    constants = self.constants()
    return {name: constants[name] for name in ("kappa", "p_min", "p_max")}


# Halvings of a bracket about two wide: past the resolution of float32.
BISECTION_STEPS = 40


# Slack on both ends of the bracket, so that clipping and not rounding decides what happens there.
BRACKET_SLACK = 1e-3


def survival(q, *, delta, kappa=0.5, rho=0.5, lam=0.5, p_min=0.1, p_max=0.9):
  """p = clip(kappa + delta + lam (rho - q), p_min, p_max), the probability that a rollout goes on.

  Args: q f32[...] posterior; kappa target keep ratio; rho target positive ratio; lam strength; delta the
    offset of `solve_delta`. Defaults: the paper's.
  Returns: f32[...].
  """
  return jnp.clip(kappa + delta + lam * (rho - jnp.asarray(q, jnp.float32)), p_min, p_max)


def solve_delta(table, *, kappa=0.5, rho=0.5, lam=0.5, p_min=0.1, p_max=0.9):
  """The offset delta with which the mean of `survival` over the table's scores is kappa, by bisection.

  The mean is over bins, each weighted by its share of the table's counts. It never decreases in delta, and
  the bracket spans all of [p_min, p_max], so every kappa strictly between them is met (to about 1e-6).
  A kappa at or beyond an end gives that end to every score, also to scores not seen yet: kappa = p_max = 1
  turns pruning off exactly, whatever the table holds. Otherwise an empty table, having no scores, gives 0.

  Returns: f32[].
  """
  count = table.positive + table.negative
  total = jnp.sum(count)
  share = divide(count, total, 0.0)
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


TILT_MAX = 64.0  # steepness at which nearly every p is at p_min or p_max


def group_survival(q, group, decided, *, kappa, rho, p_min, p_max, tilt=None):
  """Survival probabilities that bring each group's expected positive ratio as near rho as kappa allows (METHOD 9.5).

  Within a group p_i = clip(kappa + delta + t (q_i - rho), p_min, p_max), with delta such that the group's mean p is kappa. The
  ratio sum p q / sum p never decreases in t, so t is found by bisection in [-TILT_MAX, TILT_MAX]; t above 0 keeps the promising
  ones. Only rows that are `decided` now take part, each group by itself. Where all q are equal every p is kappa.

  Args: q f32[B] posterior; group i32[B] labels; decided bool[B]; tilt a fixed t for every group instead (None: solved).
  Returns: f32[B]; kappa where not decided.
  """
  q, group, decided = jnp.asarray(q, jnp.float32), jnp.asarray(group), jnp.asarray(decided)
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


def missing(floor, group, others):
  """How many rows of its group must survive a decision for the group to have `floor`, the `others` bool[B] counted, which are not
  up for it: i32[B]. Those who have yet to decide count too, as the last of them will find that they are missing."""
  return jnp.maximum(floor - jnp.sum((group[:, None] == group[None, :]) & others[None, :], axis=1), 0)


def at_least(floor, order, group, decided):
  """The `floor` (one number, or i32[B], its group's) decided rows of each group that come first by `order` f32[B] (`nearness` to
  surviving): bool[B]."""
  ahead = comes_before(order) & (group[:, None] == group[None, :]) & decided[None, :]
  return decided & (jnp.sum(ahead, axis=1) < floor)


def survival_with_floor(floor, u, p, group, decided):
  """Probability with which each row survives where `at_least` adds `floor` of its group by u / p, given the others' u: f32[B].

  A row survives if its u / p is below 1 or below the floor-th lowest of the others, which does not depend on its own u: what
  is weighed 1 / keep probability stays unbiased. p f32[B] where not decided.
  """
  order = nearness(u, p)
  same = (group[:, None] == group[None, :]) & decided[None, :]
  rank = jnp.sum(comes_before(order) & same, axis=1)
  wanted = jnp.where(rank < floor, floor, floor - 1)  # the others' floor-th lowest, by its rank among all
  bar = jnp.min(jnp.where(same & (rank[None, :] == wanted[:, None]), order[None, :], jnp.inf), axis=1)
  bar = jnp.where(floor > 0, bar, 0.0)
  lifted = jnp.where(p > 0, jnp.minimum(1.0, p * jnp.maximum(1.0, bar)), (rank < floor).astype(p.dtype))
  return jnp.where(decided, lifted, p)


def nearness(u, p):
  """u / p f32[B], lowest for who is nearest to surviving a draw u of probability p; inf, which loses every tie, where p is 0."""
  return jnp.where(p > 0, u / jnp.where(p > 0, p, 1.0), jnp.inf)


def lift(floor, p, group, decided):
  """Survival p f32[B] raised by the same share of what each lacks to 1, until a group's sum over its decided rows is `floor`, or
  their number where that is less: a systematic draw then keeps so many. Groups that have it stay as they are."""
  same = (group[:, None] == group[None, :]) & decided[None, :]
  size, total = jnp.sum(same, axis=1), jnp.sum(jnp.where(same, p[None, :], 0.0), axis=1)
  missing = jnp.maximum(jnp.minimum(floor, size) - total, 0.0)
  share = jnp.minimum(missing / jnp.maximum(size - total, 1e-6), 1.0)
  return jnp.where(decided, p + share * (1.0 - p), p)


def comes_before(order):
  """bool[B,B]: whether column j comes before row i by `order` f32[B], lowest first, ties by index."""
  index = jnp.arange(order.shape[0])
  return (order[None, :] < order[:, None]) | ((order[None, :] == order[:, None]) & (index[None, :] < index[:, None]))
