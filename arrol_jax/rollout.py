"""Engine + quality head + pruning rule + rewards -> graded rollouts, packed for the update (paper Algorithm 1).

`make_decide` is the boundary decision of METHOD section 4 as one jitted program; `generate` runs one step's prompts and
grades the survivors while later segments decode; `pack` re-batches them into a few fixed shapes. Pruning off, and the
cold start, are the same program with survival probability 1.
"""

from collections import Counter
from collections.abc import Callable
import dataclasses
import functools
import logging
import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from arrol_jax import hosts, prune, quality, sharding
from arrol_jax.decode import Sampling, Slots
from arrol_jax.engine import Decision, Engine, Request
from arrol_jax.losses import group_advantages
from arrol_jax.prune import Calibration
from arrol_jax.quality import Reading
from arrol_jax.types import FAILED, Batch, Rollout, TrainState

# Folded into a request's key for its survival draws (downward, one a decision) and for being a control; token n uses n.
_DRAW, _CONTROL = 0x7FFFFFFF, 0x7FFF0000
RULES = ("published", "group", "random", "lowest", "highest", "confidence", "max_variance")
DRAWS = ("bernoulli", "systematic")
WEIGH = ("table", "head", "policy")
_log = logging.getLogger(__name__)
_STEEP = 50.0  # a strength at which the rule is as good as a threshold


@dataclasses.dataclass(frozen=True)
class PruneRule:
  """How rollouts are cut: constants of METHOD sections 3-4 and the departures of section 9.

  detect: response tokens at each decision; keep kappa, target rho, strength lambda. The keep ratios of several decisions
  multiply to `keep`, and so do the limits p_min and p_max. kind: "published"; "group" steers each group's expected ratio to
  rho; "random" ignores scores; "lowest" and "highest" keep the least and the most promising by the table; "confidence" those of a
  group whose tokens are most confident (DeepConf); "max_variance" (PODS) lets all run to the end, see `down_sample`;
  "threshold", for inference, stops those whose posterior is below `keep` (or the row's own, decode.Own). draw: "bernoulli" or
  "systematic", a fixed number a group. floor: rows of a group that survive a decision at least. control: share of rollouts that
  are never cut.
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
  control: float = 0.0

  def constants(self) -> dict:
    """Keyword arguments of prune.solve_delta and prune.survival for one of the decisions."""
    root = 1.0 / len(self.detect)
    strength = {"random": 0.0, "lowest": _STEEP, "highest": -_STEEP}.get(self.kind, self.strength)
    return dict(kappa=self.keep**root, rho=self.target, lam=strength, p_min=self.p_min**root, p_max=self.p_max**root)


def reading_of(slots: Slots, head: dict) -> Reading:
  """What `head` reads of each slot as it stands."""
  inputs, count = quality.inputs_of(head), jnp.maximum(slots.generated, 1).astype(jnp.float32)
  return Reading(slots.hidden if "last" in inputs else None, slots.hidden_sum / count[:, None] if "mean" in inputs else None,
                 jnp.stack([slots.logprob_sum / count, slots.logprob_min], axis=1) if "logprobs" in inputs else None)


@functools.partial(jax.jit, static_argnames=("rule", "pruning", "readings"), donate_argnames=("slots",))
def _decide(slots: Slots, head: dict, tables: Calibration, rule: PruneRule, pruning: bool,
            readings: bool) -> tuple[Slots, Decision]:
  tables = jax.tree.map(jnp.atleast_2d, tables)  # [C,Q]
  here = slots.generated[:, None] == jnp.asarray(rule.detect, jnp.int32)[None, :]  # bool[B,C]
  decided, which = slots.active & jnp.any(here, axis=1), jnp.argmax(here, axis=1)
  of_row = lambda by_decision: jnp.take_along_axis(by_decision, which[None], axis=0)[0]  # [C,B] -> [B]
  reading = reading_of(slots, head)
  score = quality.quality_logit(head, reading)
  posterior = of_row(jax.vmap(prune.posterior, (0, None))(tables, score))
  # Members of a group that decide together, at the same length.
  group = slots.group * len(rule.detect) + which.astype(jnp.int32)
  constants = rule.constants()

  limits = {k: constants[k] for k in ("kappa", "p_min", "p_max")}

  def by_rule():
    if rule.kind == "group":
      return prune.group_survival(posterior, group, decided, rho=rule.target, **limits)
    if rule.kind == "confidence":
      return prune.top_share(slots.confidence_sum / jnp.maximum(slots.generated, 1), group, decided, **limits)
    if rule.kind == "threshold":
      return (posterior >= (rule.keep if slots.own is None else slots.own.keep)).astype(jnp.float32)
    delta = jax.vmap(lambda table: prune.solve_delta(table, **constants))(tables)
    return prune.survival(posterior, delta=delta[which], **constants)

  keep_all = lambda: jnp.ones_like(score)
  pruning &= rule.kind != "max_variance"
  planned = jax.lax.cond(jnp.any(decided), by_rule, keep_all) if pruning else keep_all()  # most boundaries decide nothing
  key = jax.vmap(lambda k, c: jax.random.fold_in(k, _DRAW - c))(slots.key, which)
  control = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, _CONTROL)))(slots.key) < rule.control
  survival = jnp.where(control, 1.0, planned)
  u = jax.vmap(jax.random.uniform)(key)
  if rule.draw == "systematic":
    survival = prune.lift(rule.floor, survival, group, decided) if rule.floor else survival
    keep = prune.draw(key, jnp.where(decided, survival, 1.0), method="systematic", groups=group)
  else:
    keep = (u < survival) | ~decided
    if rule.floor:
      keep |= prune.at_least(rule.floor, -posterior if rule.kind == "threshold" else u / survival, group, decided)
      survival = prune.survival_with_floor(rule.floor, u, survival, group, decided)
  return slots.replace(active=slots.active & keep), Decision(decided, keep, score, posterior, survival, planned,
                                                             control, reading if readings else None)


def make_decide(head: dict, tables: Calibration, rule: PruneRule, pruning: bool, readings: bool = False) -> Callable:
  """decide(slots) for Engine.run; tables [C,Q], one a detection length. pruning False scores and keeps every rollout; readings:
  rollouts bring home what the head read."""
  return lambda slots: _decide(slots, head, tables, rule, pruning, readings)


def generate(engine: Engine, prompts: list, group_size: int, key: jax.Array, sampling: Sampling, tokenizer, grader, *,
             decide: Callable | None = None, progress: Callable | None = None, first: int = 0) -> tuple[list[Rollout], float]:
  """Rolls out `group_size` responses to each prompt (data.Prompt) and grades those that were not pruned.

  Returns P * G rollouts in order (rollout i belongs to prompt i // G) and the seconds spent waiting for grades after the
  last token. progress(rollout) is called for each that ends. first: number of the first prompt within the step. With several
  processes each reads and grades its share of the rollouts, and all get all of them.
  """
  requests = [Request(p * group_size + g, p, prompt.tokens, engine.max_new)
              for p, prompt in enumerate(prompts, first) for g in range(group_size)]
  pending = []

  def on_done(rollout: Rollout):
    if hosts.mine(rollout.request):
      rollout.text = tokenizer.decode(rollout.tokens, skip_special_tokens=True)
      if not rollout.pruned:
        pending.append((rollout, grader.grade_async([(rollout.text, prompts[rollout.prompt - first].problem.answer)])))
    progress and progress(rollout)

  rollouts = engine.run(requests, key, sampling, decide=decide, on_done=on_done)
  waited = time.perf_counter()
  for rollout, waiting in pending:
    rollout.reward, rollout.reason = waiting.result()[0]
  failed = Counter(r.reason for r, _ in pending if r.reason in FAILED)
  if 2 * failed.total() > len(pending):  # now and then it is a hostile answer; this must not pass for a policy that knows nothing
    _log.warning("%d of %d answers could not be graded (%s) and count as wrong: see reward.function, reward.timeout, "
                 "reward.memory, reward.workers", failed.total(), len(pending),
                 ", ".join(f"{count} {reason}" for reason, count in failed.items()))
  parts = hosts.gather([(r.text, r.reward, r.reason) for r in rollouts if hosts.mine(r.request)])
  for r in rollouts:  # requests are numbered without a gap, and each process read its own in their order
    r.text, r.reward, r.reason = parts[r.request % len(parts)].pop(0)
  return rollouts, time.perf_counter() - waited


def mixed_groups(rollouts: list[Rollout]) -> list[int]:
  """Prompts whose survivors' raw rewards are not all alike, ascending."""
  rewards = {}
  for r in rollouts:
    if not r.pruned:
      rewards.setdefault(r.prompt, set()).add(r.reward)
  return sorted(p for p, seen in rewards.items() if len(seen) > 1)


def until_mixed(roll_out: Callable, wanted: int, rounds: int) -> tuple[list[Rollout], list[Rollout], int]:
  """DAPO's dynamic sampling: rolls out new prompts until `wanted` groups have variance, or `rounds` rounds are spent.

  roll_out(round, count) -> rollouts of `count` prompts of that round, numbered on from the rounds before. The first round has
  `wanted` prompts, a later one as many as should give the missing groups at the share that was mixed so far, and a margin
  of about one standard deviation. Returns the rollouts to learn from (the first `wanted` mixed groups), all rollouts,
  and the rounds taken.
  """
  everything, mixed, prompts, count = [], [], 0, wanted
  for n in range(rounds):
    new = roll_out(n, count)
    everything += new
    mixed += mixed_groups(new)
    prompts += count
    missing = wanted - len(mixed)
    if missing <= 0:
      break
    count = min(wanted, math.ceil((missing + math.sqrt(missing)) * prompts / max(len(mixed), 1)))
  chosen = set(mixed[:wanted])
  return [r for r in everything if r.prompt in chosen], everything, n + 1


def down_sample(rollouts: list[Rollout], keep: float) -> list[Rollout]:
  """PODS (arXiv 2504.13818): of each group's finished rollouts the share `keep` whose raw rewards vary most."""
  groups, out = {}, []
  for r in rollouts:
    if not r.pruned:
      groups.setdefault(r.prompt, []).append(r)
  for group in groups.values():
    chosen = prune.best_subset([r.reward for r in group], max(1, round(keep * len(group))))
    out += [r for r, taken in zip(group, chosen, strict=True) if taken]
  return out


class PackShape(NamedTuple):
  """Shapes of the update: rows of at most `length` tokens in `buckets` lengths, about `micro_tokens` tokens a micro-batch."""
  length: int
  micro_tokens: int
  buckets: int = 3

  def sizes(self, unit: int) -> list[tuple[int, int]]:
    """(rows, row length) of each full micro-batch, shortest rows first; rows are a multiple of `unit`."""
    lengths = sorted({-(-self.length * (b + 1) // self.buckets // 16) * 16 for b in range(self.buckets)})
    return [(-(-max(1, self.micro_tokens // n) // unit) * unit, n) for n in lengths]

  def holding(self, rows: int, longest: int, unit: int) -> tuple[int, int]:
    """The compiled size that takes the most of so many rows, the longest of which has so many tokens; half of a full one's
    rows where they do."""
    full, length = next(size for size in self.sizes(unit) if size[1] >= longest)
    half = -(-full // 2 // unit) * unit
    return (half if rows <= half else full), length


def empty_batches(shape: PackShape, mesh, detect: tuple[int, ...]) -> list[Batch]:
  """A micro-batch of each size with no rollout in it: for compiling ahead."""
  unit = mesh.shape["data"] * mesh.shape["fsdp"]
  sizes = dict.fromkeys(shape.holding(rows, length, unit) for full, length in shape.sizes(unit) for rows in (full, 1))
  return [sharding.put(_micro_batch([], np.zeros(0), np.zeros(0), *size, detect), sharding.rows(mesh)) for size in sizes]


def pack(rollouts: list[Rollout], shape: PackShape, mesh, *, detect: tuple[int, ...], normalize_std: bool = True,
         short: str = "skip", weigh: tuple[str, ...] = (), balance: bool = False, punish: Callable | None = None) -> list[Batch]:
  """Survivors -> micro-batches in at most `shape.buckets` row lengths, longest rows first: a part-filled one has the shortest.

  Advantages are taken over a group's survivors. `short` says what a rollout that ended before the detection length
  teaches the head: "skip" nothing (the head learns the question it will be asked), "last" its last hidden state (the
  paper leaves this open). weigh: where a survivor counts 1 / survival times (METHOD 9.1), "head" in the head's loss,
  "policy" in group means and advantages, scaled to mean 1. balance: `head_weights`. punish(lengths): added to the
  rewards that advantages are taken from, not to those that the head learns. Old and reference log-probs are the
  update's to fill.
  """
  kept = [r for r in rollouts if not r.pruned]
  weights = np.array([1.0 / r.survival for r in kept]) if "policy" in weigh else None
  shaped = np.array([r.reward for r in kept], np.float32)
  if punish:
    shaped = shaped + punish(np.array([len(r.tokens) for r in kept]))
  advantages = group_advantages(shaped, np.array([r.prompt for r in kept], int), normalize_std, weights=weights)
  teach = np.array([bool(r.scores) or short == "last" for r in kept], np.float32)
  lessons = head_weights(kept, teach, weigh, balance)
  unit = mesh.shape["data"] * mesh.shape["fsdp"]
  length_of = lambda i: len(kept[i].prompt_tokens) + len(kept[i].tokens)
  order, batches = sorted(range(len(kept)), key=length_of, reverse=True), []
  while order:
    rows, length = shape.holding(len(order), length_of(order[0]), unit)
    part, order = order[:rows], order[rows:]
    batches.append(_micro_batch([kept[i] for i in part], advantages[part], lessons[part], rows, length, detect))
  return [sharding.put(batch, sharding.rows(mesh)) for batch in batches]


def head_weights(rollouts: list[Rollout], teach: np.ndarray, weigh: tuple[str, ...], balance: bool) -> np.ndarray:
  """What each rollout counts in the head's loss, f32[N]; teach f32[N]: 0 where it teaches the head nothing.

  weigh holding "head": 1 / survival times as much (METHOD 9.1). balance: right and wrong rollouts then weigh half of the whole
  each, so the head learns what tells them apart and leaves their shares to the table's prior; without it Adam's first steps,
  each as large as any, go into the shares alone.
  """
  weight = teach * np.array([1.0 / r.survival if "head" in weigh else 1.0 for r in rollouts], np.float32)
  if balance:
    right = np.array([r.reward for r in rollouts], np.float32)
    half = lambda share: share / max(float(np.sum(weight * share)), 1e-6)
    weight = weight * np.sum(weight) / 2 * (half(right) + half(1.0 - right))
  return weight


def _micro_batch(rows: list[Rollout], advantages: np.ndarray, lessons: np.ndarray, count: int, length: int,
                 detect: tuple[int, ...]) -> Batch:
  grid = lambda dtype: np.zeros((count, length), dtype)
  tokens, mask, sampled = grid(np.int32), grid(np.float32), grid(np.float32)
  reward, advantage = np.zeros(count, np.float32), np.zeros(count, np.float32)
  position, weight = np.zeros((count, len(detect)), np.int32), np.zeros((count, len(detect)), np.float32)
  for i, r in enumerate(rows):
    start, end = len(r.prompt_tokens), len(r.prompt_tokens) + len(r.tokens)
    tokens[i, :start], tokens[i, start:end] = r.prompt_tokens, r.tokens
    mask[i, start:end], sampled[i, start:end] = 1.0, r.logprobs
    reward[i], advantage[i] = r.reward, advantages[i]
    # The state that sampled response token number n stands at start + n - 2.
    reads = detect[:len(r.scores)] or ((len(r.tokens),) if lessons[i] else ())
    position[i, :len(reads)] = start + np.array(reads, int) - 2
    weight[i, :len(reads)] = lessons[i]
  return Batch(tokens=tokens, response_mask=mask, sampler_logprobs=sampled, old_logprobs=np.zeros_like(sampled),
               ref_logprobs=np.zeros_like(sampled), advantages=advantage, rewards=reward, head_position=position,
               head_weight=weight)


def update_calibration(tables: Calibration, rollouts: list[Rollout], half_life: float | None,
                       weigh: tuple[str, ...] = ()) -> Calibration:
  """The tables [C,Q] (or one, [Q]) with this step's graded survivors, each at every length where it was scored (METHOD 3).

  weigh holding "table": a survivor counts 1 / survival times.
  """
  kept = [r for r in rollouts if not r.pruned]
  count = tables.positive.shape[0] if tables.positive.ndim == 2 else 1
  size = 1 << max(0, len(rollouts) - 1).bit_length()  # one compiled shape a step size
  score, weight = np.zeros((2, count, size), np.float32)
  reward = np.zeros(size, np.float32)
  for i, r in enumerate(kept):
    score[:len(r.scores), i], reward[i] = r.scores, r.reward
    weight[:len(r.scores), i] = 1.0 / r.survival if "table" in weigh else 1.0
  return _update_tables(tables, score, reward, weight, half_life)


@functools.partial(jax.jit, static_argnames=("half_life",))
def _update_tables(tables, score, reward, weight, half_life):
  if tables.positive.ndim == 1:
    return prune.update(tables, score[0], reward, weight[0], half_life=half_life)
  return jax.vmap(lambda t, s, w: prune.update(t, s, reward, w, half_life=half_life))(tables, score, weight)


def refit_head(state: TrainState, rollouts: list[Rollout], *, passes: int, optimizer: optax.GradientTransformation,
               weigh: tuple[str, ...] = (), balance: bool = False) -> TrainState:
  """The state after `passes` more steps of the head alone, over its buffer and this step's scored survivors.

  weigh, balance: `head_weights`. Needs rollouts with readings (`make_decide`).
  """
  scored = [(reading, r) for r in rollouts if not r.pruned for reading in r.readings][-state.recent.reward.shape[0]:]
  if not scored:
    return state
  size = 1 << (len(scored) - 1).bit_length()
  reading = jax.tree.map(lambda *x: np.pad(np.stack(x).astype(np.float32), ((0, size - len(x)), (0, 0))), *(x for x, _ in scored))
  reward, weight = np.zeros((2, size), np.float32)
  reward[:len(scored)] = [r.reward for _, r in scored]
  weight[:len(scored)] = head_weights([r for _, r in scored], np.ones(len(scored), np.float32), weigh, balance)
  head, recent = quality.refit(state.params["head"], state.recent, reading, reward, weight, passes=passes, optimizer=optimizer)
  return state.replace(params=state.params | {"head": head}, recent=recent)
