"""One training step, told once: train.py runs it, bench.py times it, plan.py compiles its programs.

1. Roll out: the engine decodes segments; at a boundary the head's score decides who goes on, survivors are graded meanwhile.
2. Batch: survivors, or those that dynamic sampling or a baseline chose among them, become a few fixed shapes.
3. Update: one optax step of the policy on the batch and of the head on all graded survivors.
4. Table: survivors' scores and rewards are added to the calibration table; the head may go over its buffer again.
5. Metrics.
`generation_programs` and `training_programs` list what all this runs on the device. Where
prompts and rewards come from is the caller's business.
"""

from collections.abc import Callable
import dataclasses
import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import numpy as np
import optax

from arrol_jax.engine import programs as decoding
from arrol_jax.engine.sampling import Sampling
from arrol_jax.engine.scheduler import Engine
from arrol_jax.learning import batching, head_training, update
from arrol_jax.learning.batching import PackShape
from arrol_jax.learning.metrics import rollout_metrics
from arrol_jax.learning.update import UpdateConfig
from arrol_jax.models import sharding
from arrol_jax.pruning import decision
from arrol_jax.pruning.baselines import down_sample
from arrol_jax.pruning.head import empty_features
from arrol_jax.pruning.rule import PruneRule
from arrol_jax.types import Examples, Rollout, TrainState


@dataclasses.dataclass(frozen=True)
class StepConfig:
  """What a step does, for a whole run (assemble.step_config makes it of the config)."""
  dtype: str
  sampling: Sampling
  rule: PruneRule
  update: UpdateConfig
  shape: PackShape
  optimizer: optax.GradientTransformation
  head_optimizer: optax.GradientTransformation | None = None  # goes over the head's buffer; None: there is none
  passes: int = 0              # over the buffer
  weigh: tuple[str, ...] = ()  # where survivors count 1 / keep probability times: "table", "head", "policy"
  balance: bool = False        # right and wrong weigh alike in the head's loss
  short: str = "skip"          # what rollouts that ended before detection teach the head
  half_life: float | None = None


class RolledOut(NamedTuple):
  """What a step's generation gave."""
  rollouts: list[Rollout]   # all that were started
  learned: list[Rollout]    # those to learn from: all, or what dynamic sampling chose
  rounds: int = 1           # of prompts taken
  sec_reward: float = 0.0   # waited for grades after the last token


class Clock:
  """Wall-clock seconds of a step's phases; a lap waits for the arrays given."""

  def __init__(self):
    self.start = self.last = time.perf_counter()
    self.seconds = {}

  def lap(self, name: str, wait_for=None) -> None:
    jax.block_until_ready(wait_for)
    now = time.perf_counter()
    self.seconds[name], self.last = now - self.last, now

  def total(self) -> float:
    return time.perf_counter() - self.start


@dataclasses.dataclass
class TrainingStep:
  """step(state, roll_out, pruning) -> (state, what was rolled out, metrics)."""
  engine: Engine
  config: StepConfig
  reference: dict | None = None  # the reference policy's parameters, where the loss has a KL term

  def __call__(self, state: TrainState, roll_out: Callable, pruning: bool) -> tuple[TrainState, RolledOut, dict]:
    """roll_out(decide) -> RolledOut, with the engine loaded. pruning False scores and keeps every rollout."""
    c, model, clock = self.config, self.engine.config, Clock()

    # ---- 1. roll out
    self.engine.load(state.params["policy"], c.dtype)
    rolled = roll_out(decision.make_decide(state.params["head"], state.calibration, c.rule, pruning, features=True))
    self.engine.params = None  # the update needs the room
    if pruning and c.rule.kind == "max_variance":
      rolled = rolled._replace(learned=down_sample(rolled.learned, c.rule.keep))
    clock.lap("sec_generate")
    clock.seconds["sec_generate"] -= rolled.sec_reward

    # ---- 2. batch
    batches, counts = batching.pack(rolled.learned, c.shape, self.engine.mesh, c.update.loss, c.weigh)
    scalars = counts | {"temperature": c.sampling.temperature}
    examples = batching.head_examples(rolled.rollouts, state.params["head"], model.width, c.weigh, c.balance, c.short)
    batches = update.fill_logprobs(c.update, state.params["policy"], self.reference, batches, np.float32(c.sampling.temperature))
    clock.lap("sec_logprob", batches)

    # ---- 3. update
    state, metrics = update.step(c.update, state, batches, examples, scalars, c.optimizer)

    # ---- 4. table
    calibration = head_training.update_calibration(state.calibration, rolled.rollouts, c.half_life, c.weigh)
    state = state.replace(calibration=calibration)
    if c.head_optimizer:
      state = head_training.refit_head(state, examples, passes=c.passes, optimizer=c.head_optimizer)

    # ---- 5. metrics
    metrics |= {"head_norm": update.norm_of(state.params["head"])}
    metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
    clock.lap("sec_update", state.step)
    return state, rolled, rollout_metrics(rolled.rollouts, rolled.learned) | metrics | {
      "pruning": pruning, "rounds": rolled.rounds, "groups_learned": len({r.prompt for r in rolled.learned}),
      "sec_reward": rolled.sec_reward, **clock.seconds, "sec_step": clock.total()}

  def warm_up(self, state: TrainState, pruning: tuple[bool, ...] = (False, True)) -> None:
    """Compiles everything a step runs: the engine's shapes, and a micro-batch of each size."""
    c, model, params = self.config, self.engine.config, state.params["policy"]
    self.engine.load(params, c.dtype)
    for one in pruning:
      self.engine.warm_up(c.sampling, decision.make_decide(state.params["head"], state.calibration, c.rule, one, features=True))
    self.engine.params = None
    scalars = {name: np.float32(1) for name in ("tokens", "rows", "trained", "temperature")}
    for batch in batching.empty_batches(c.shape, self.engine.mesh):
      batch, = update.fill_logprobs(c.update, params, self.reference, [batch], scalars["temperature"])
      jax.block_until_ready(update.accumulate(c.update, params, *update.zeros(model, params), batch, scalars))


# ---- programs ------------------------------------------------------------------------------------------------


class Program(NamedTuple):
  """A jitted program with what a step gives it. args(results) makes its arguments, arrays or shapes with shardings, from the
  results of the programs that it needs, by their names."""
  name: str
  jitted: Callable
  args: Callable[[dict], tuple]
  static: dict
  needs: tuple[str, ...] = ()
  runs: int = 1           # a step, at most
  unknown_trips: int = 1  # of a loop whose length the compiler does not know
  small: bool = False     # works on a few scalars or bins


def generation_programs(engine: Engine, c: StepConfig, state: TrainState, prompts: int, group_size: int) -> list[Program]:
  """What rolling out `prompts` groups runs, each program at its largest shape."""
  e, weights, sampling = engine, state.params["policy"], c.sampling
  waves, columns, counts = -(-prompts * group_size // e.rows), e.lengths(sampling)[-1], e.row_counts(sampling)
  segments = waves * -(-e.max_new // e.segment)
  whole, by_row = (lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)), sharding.rows(e.mesh)
  rows, keys = whole(e.rows), jax.eval_shape(lambda: jax.random.split(jax.random.key(0), e.rows))
  texts = tuple(jax.ShapeDtypeStruct(shape, jnp.int32, sharding=by_row)
                for shape in ((e.prefill_rows, e.max_prompt), (e.prefill_rows,)))
  prefills = -(-prompts // e.prefill_rows)
  stepped = lambda out: (out.get("decode segment") or (out["init slots"],))[0]
  out = [
    Program("reshard", e.loader(weights, c.dtype), lambda out: (weights,), {}),
    Program("init slots", decoding.init_slots, lambda out: (e.config, e.rows, columns), {"sampling": sampling}, ("reshard",)),
    Program("prefill", decoding.prefill, lambda out: (e.config, out["reshard"], *texts), {"sampling": sampling},
            ("reshard", "init slots"), prefills),
    Program("insert", decoding.insert, lambda out: (out["init slots"], out["prefill"], rows, keys, rows, rows), {},
            ("init slots", "prefill"), prefills * waves),
    Program("decode segment", decoding.segment_program(), lambda out: (e.config, out["reshard"], out["init slots"]),
            {"steps": e.segment, "sampling": sampling}, ("reshard", "init slots"), segments,
            e.segment // math.gcd(e.segment, decoding.STRIDE)),
    Program("decide", decision.decide, lambda out: (stepped(out), state.params["head"], state.calibration),
            {"rule": c.rule, "pruning": True, "features": True}, ("init slots",), segments)]
  if len(counts) > 1:  # a layer at a time, the old one deleted before the next
    out += [Program("gather", decoding.take_columns, lambda out: (stepped(out).cache[0], whole(counts[-2])), {"length": columns},
                    ("init slots",), e.config.layers * (len(counts) - 1))]
  return out


def training_programs(mesh: Mesh, c: StepConfig, state: TrainState, kept: int, examples: int) -> list[Program]:
  """What learning from `kept` survivors runs, micro-batches at their largest; examples: those of the head, padded."""
  u, policy = c.update, state.params["policy"]
  batch = max(batching.abstract_batches(c.shape, mesh), key=lambda batch: batch.response_mask.size)
  count = math.ceil(kept * c.shape.length / batch.tokens.size)
  scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
  metrics, scalars = dict.fromkeys(update.METRICS, scalar), dict.fromkeys(("tokens", "rows", "trained", "temperature"), scalar)
  row = jax.ShapeDtypeStruct((examples,), jnp.float32)
  taught = Examples(jax.eval_shape(lambda head: empty_features(head, u.model.width, examples), state.params["head"]), row, row)
  passes = (not u.fresh) + bool(u.loss.kl_weight)
  logprobs = Program("log-probs", update.batch_logprobs, lambda out: (u, policy, batch, scalar), {}, runs=count * passes)
  return [logprobs] * bool(passes) + [
    Program("update", update.accumulate, lambda out: (u, policy, policy, metrics, batch, scalars), {}, runs=count),
    Program("optimizer", update.apply, lambda out: (state, (out.get("update") or (policy,))[0], scalars, taught),
            {"head_weight": u.loss.head_weight, "optimizer": c.optimizer})]
