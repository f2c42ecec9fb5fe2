"""The decision at a segment boundary, as one jitted program: features -> score -> posterior -> keep probability -> draw.

METHOD sections 2 to 4. Pruning off, and the cold start, are the same program with keep probability 1.
"""

from collections.abc import Callable
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from arrol_jax.engine.programs import Slots, pin
from arrol_jax.engine.scheduler import Decision
from arrol_jax.models import sharding
from arrol_jax.pruning import linear_head, table as tables_
from arrol_jax.pruning.baselines import top_share
from arrol_jax.pruning.budget import carried_probability
from arrol_jax.pruning.draws import draw
from arrol_jax.pruning.features import vector
from arrol_jax.pruning.head import Features, inputs_of, is_linear, quality_logit
from arrol_jax.pruning.own_rule import own_rule
from arrol_jax.pruning.rule import (
  PruneRule,
  at_least,
  group_survival,
  lift,
  missing,
  nearness,
  solve_delta,
  survival,
  survival_with_floor,
)
from arrol_jax.pruning.table import Calibration
from arrol_jax.running import kept

PAST = 512  # decisions at a boundary that are remembered
# Folded into a request's key for its draws (downward, one a decision) and for being held out; token n uses n.
_DRAW, _HOLDOUT = 0x7FFFFFFF, 0x7FFF0000


@dataclasses.dataclass(frozen=True)
class Voters:
  """What votes are weighed by: the quality head and its tables, [C,Q], one a detection length in `detect`. stop: posterior
  below which a trace ends there (a group's best always goes on); None lets all finish. window: tokens of DeepConf's groups.
  inputs: what a linear head reads."""
  head: dict | None = None
  tables: Calibration | None = None
  detect: tuple[int, ...] = ()
  stop: float | None = None
  window: int = 2048
  inputs: tuple[str, ...] = ()


NO_HEAD = Voters()


def make_decide(head: dict, tables: Calibration, rule: PruneRule, pruning: bool, features: bool = False) -> Callable:
  """decide(slots, lengths) for Engine.run; tables [C,Q], one a detection length. pruning False scores and keeps every rollout;
  features: rollouts bring home what the head read."""
  past = nothing_decided(rule)

  def one(slots: Slots, lengths: set[int] | None = None) -> tuple[Slots, Decision]:
    nonlocal past
    due = lengths is None or bool(lengths & set(rule.detect))
    slots, decision, after = decide(slots, head, tables, rule, np.bool_(pruning), features, due, past if due else None)
    past = after if due else past
    return slots, decision

  return one


def decider(given: tuple) -> Callable:
  """`make_decide` of what `decide` is given behind the slots: one program, whether or not a row stands at a detection length. Not
  for rules that remember earlier decisions."""
  return lambda slots, _=None: decide(slots, *given)[:2]


def nothing_decided(rule: PruneRule) -> jax.Array | None:
  """What `decide` knows of earlier decisions before the first, f32[2,C,R] (budget.carried_probability); None: no rule asks."""
  if rule.kind != "budget":
    return None
  mesh, nothing = jax.sharding.get_mesh(), np.full((2, len(rule.detect), PAST), np.nan, np.float32)
  return jnp.asarray(nothing) if mesh.empty else sharding.put(nothing, sharding.replicated(mesh))


def features_of(slots: Slots, head: dict) -> Features:
  """What `head` reads of each slot as it stands."""
  inputs, count = inputs_of(head), jnp.maximum(slots.generated, 1).astype(jnp.float32)
  return Features(slots.hidden if "last" in inputs else None, slots.hidden_sum / count[:, None] if "mean" in inputs else None,
                  jnp.stack([slots.logprob_sum / count, slots.logprob_min], axis=1) if "logprobs" in inputs else None)


@functools.partial(kept.jit, static_argnames=("rule", "features", "due"), donate_argnames=("slots",))
def decide(slots: Slots, head: dict, tables: Calibration, rule: PruneRule, pruning: jax.Array,
           features: bool, due: bool = True, past: jax.Array | None = None) -> tuple[Slots, Decision, jax.Array | None]:
  """The program behind `make_decide`: slots with the rows that go on, what was decided, and `past` with it. due False: no row
  stands at a detection length, as at most boundaries; all are scored. past: see `nothing_decided`."""
  tables = jax.tree.map(lambda x: jnp.atleast_2d(x)[:len(rule.detect)], tables)  # [C,Q]; the last token's is the votes'
  here = slots.generated[:, None] == jnp.asarray(rule.detect, jnp.int32)[None, :]  # bool[B,C]
  decided, which = slots.active & jnp.any(here, axis=1), jnp.argmax(here, axis=1)
  seen, score, final, settled = judge(slots, head, rule, decided, which)
  by_decision = jax.vmap(tables_.posterior, (0, None))(tables, score)  # [C,B]
  settled = by_decision[-1] if settled is None else settled
  posterior = jnp.where(decided, jnp.take_along_axis(by_decision, which[None], axis=0)[0], settled)
  # Members of a group that decide together, at the same length.
  group = slots.group * len(rule.detect) + which.astype(jnp.int32)

  rule_probability = jnp.ones_like(score)
  if due and rule.kind != "max_variance":
    if rule.kind == "budget":
      by_rule, past = _budget(rule, slots, posterior, which, decided, past)
    else:
      kept = KEEP_PROBABILITY.get(rule.kind, _own if "." in rule.kind else _published)
      by_rule = kept(rule, slots, tables, posterior, which, group, decided)
    rule_probability = jnp.where(pruning & jnp.any(decided), by_rule, rule_probability)
  holdout = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, _HOLDOUT)))(slots.key) < rule.holdout
  key = jax.vmap(lambda k, c: jax.random.fold_in(k, _DRAW - c))(slots.key, which)
  # At a threshold the best of those that are asked goes on, whoever has ended.
  floor = missing(rule.floor, slots.group, _others(slots, decided)) if rule.floor and rule.kind != "threshold" else None
  keep, probability = _draw(rule, key, jnp.where(holdout, 1.0, rule_probability), posterior, group, decided, floor)
  slots = pin(slots.replace(active=slots.active & keep, pruned=slots.pruned | (decided & ~keep)))
  said = Decision(decided, keep, score, posterior, probability, rule_probability, holdout, final, seen if features else None)
  return slots, sharding.constrain_rows(said), past


def _others(slots: Slots, decided: jax.Array) -> jax.Array:
  """Rows bool[B] that are not up for a decision and were not cut: finished, or between boundaries."""
  return ~decided & ~slots.pruned & (slots.generated > 0)


def judge(slots: Slots, head: dict, rule: PruneRule, decided: jax.Array, which: jax.Array) -> tuple:
  """What the head reads of each row and says of it: features, the logit at the row's decision f32[B], the logit at its last token
  f32[B], and what is to be expected of a row that is not up for a decision, f32[B] in [0, 1] (None: what the last table says)."""
  if not is_linear(head):
    seen = features_of(slots, head)
    score = quality_logit(head, seen)
    return seen, score, score, None
  x = vector(slots, rule.inputs, len(slots.cache))
  one = lambda c: linear_head.LinearHead(**{k: v[c] for k, v in head.items() if k in linear_head.NAMES})
  group = slots.group * len(rule.detect) + which.astype(jnp.int32)
  ended = _others(slots, decided)
  logits = []
  for c in range(len(rule.detect)):
    logits.append(linear_head.to_logit(one(c), linear_head.score(one(c), x, group, decided)))
  score = jnp.take_along_axis(jnp.stack(logits), which[None], axis=0)[0]
  last = one(head["level"].shape[0] - 1)
  return x, score, linear_head.alone(last, x), jnp.clip(linear_head.score(last, x, slots.group, ended), 0.0, 1.0)


# ---- keep probability f32[B] by rule: tables [C,Q], posterior f32[B], which (decision) i32[B], group i32[B], decided bool[B]


def _published(rule, slots, tables, posterior, which, group, decided):
  """METHOD section 4; "random", "lowest" and "highest" are strengths of it."""
  constants = rule.constants()
  delta = jax.vmap(lambda table: solve_delta(table, **constants))(tables)
  return survival(posterior, delta=delta[which], **constants)


def _group(rule, slots, tables, posterior, which, group, decided):
  """METHOD 9.5: each group's expected ratio is steered to rho."""
  return group_survival(posterior, group, decided, rho=rule.target, **rule.limits())


def _confidence(rule, slots, tables, posterior, which, group, decided):
  """DeepConf: a group's most confident tokens."""
  return top_share(slots.confidence_sum / jnp.maximum(slots.generated, 1), group, decided, **rule.limits())


def _threshold(rule, slots, tables, posterior, which, group, decided):
  """For inference: all whose posterior is at least `keep`, and at least what the row's request chose."""
  least = rule.keep if slots.sampling_params is None else jnp.maximum(rule.keep, slots.sampling_params.keep)
  return (posterior >= least).astype(jnp.float32)


def _budget(rule, slots, posterior, which, decided, past):
  """METHOD 10.1: over the whole batch, the set of largest expected signal, or by the threshold of earlier decisions where rows
  decide at different times. Finished rollouts count with what their last token promises, until their slots are others'."""
  request = jax.vmap(lambda k: jax.random.bits(k, (), jnp.uint32))(slots.key).astype(jnp.int32)  # ties do not go by slot
  keep, past = carried_probability(posterior, slots.group, decided, _others(slots, decided), which, past,
                                   rule.limits() | {"group_size": rule.group_size}, request)
  return keep, sharding.constrain(past, None, None, None)


def _own(rule, slots, tables, posterior, which, group, decided):
  """The user's: MODULE.FUNCTION."""
  return own_rule(rule.kind)(posterior, group, decided, **rule.limits())


KEEP_PROBABILITY = {"group": _group, "confidence": _confidence, "threshold": _threshold}


def _draw(rule: PruneRule, key: jax.Array, probability: jax.Array, posterior: jax.Array, group: jax.Array,
          decided: jax.Array, floor: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
  """Who goes on, bool[B], and with which probability each did, f32[B]: the rule's draw, and where it has a floor, `floor` i32[B]
  (None: the rule's) of those of a row's group that decide."""
  floor = rule.floor if floor is None else floor
  if rule.draw == "systematic":
    probability = lift(floor, probability, group, decided) if rule.floor else probability
    over = jnp.zeros_like(group) if rule.kind == "budget" and not rule.floor else group  # the budget is the batch's
    return draw(key, jnp.where(decided, probability, 1.0), method="systematic", groups=over), probability
  u = jax.vmap(jax.random.uniform)(key)
  keep = (u < probability) | ~decided
  if not rule.floor:
    return keep, probability
  if rule.kind == "threshold":  # nothing is drawn: who goes on does so for sure
    keep |= at_least(floor, -posterior, group, decided)
    return keep, jnp.where(decided, keep.astype(jnp.float32), probability)
  keep |= at_least(floor, nearness(u, probability), group, decided)
  return keep, survival_with_floor(floor, u, probability, group, decided)
