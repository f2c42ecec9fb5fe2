"""The programs that a training step runs on the device, listed with what it gives them: to compile ahead, or for a plan.

step.py calls these same functions. Nothing here runs a step: engine/compile_ahead.py compiles them before the first, plan.py for
chips that are not there.
"""

import math

import jax
from jax.sharding import Mesh
import numpy as np

from arrol_jax.engine import programs as decoding
from arrol_jax.engine.compile_ahead import Program
from arrol_jax.engine.sampling import SamplingParams
from arrol_jax.engine.scheduler import Engine, everywhere, fold_all
from arrol_jax.learning import batching, head_training, update
from arrol_jax.models import sharding
from arrol_jax.pruning import decision
from arrol_jax.step import StepConfig
from arrol_jax.types import TrainState


def generation_programs(e: Engine, c: StepConfig, state: TrainState, prompts: int, group_size: int,
                        everything: bool = False) -> list[Program]:
  """What rolling out `prompts` groups runs: each program at its largest shape, or at all of them (" at ROWSxCOLUMNS")."""
  weights, prefills = state.policy, -(-prompts // e.prefill_rows)
  waves = -(-prompts * group_size // e.rows)
  texts = np.zeros((e.prefill_rows, e.max_prompt), np.int32), np.ones(e.prefill_rows, np.int32)
  by_row = sharding.rows(e.mesh)
  texts = sharding.put(texts, by_row) if everything else [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=by_row) for x in texts]
  out = [Program("reshard", e.loader(weights, c.dtype), lambda out: (weights,), {}),
         Program("prefill", decoding.prefill, lambda out: (e.config, out["reshard"], *texts), {"sampling": c.sampling},
                 ("reshard",), prefills)]
  lengths, counts = e.lengths(c.sampling), e.row_counts(c.sampling)
  shapes = [(n, length) for length in reversed(lengths) for n in reversed(counts)]
  for rows, length in shapes if everything else shapes[:1]:
    at = f" at {rows}x{length}" if everything else ""
    out += slot_programs(e, c, state, (rows, length), at, waves)
    smaller = [s for s in shapes if s != (rows, length) and s[0] <= rows and s[1] >= length] if everything else shapes[1:2]
    for n, columns in smaller if len(counts) > 1 or everything else ():  # a layer at a time, the old one deleted before the next
      to, index, slots = f"{at} to {n}x{columns}" if everything else "", np.zeros(n, np.int32), "init slots" + at
      out += [Program("gather" + to, decoding.take_columns, lambda out, slots=slots, index=index: (out[slots].cache[0], index),
                      {"length": columns}, (slots,), e.config.layers * (len(counts) - 1))]
      if everything:
        out += [Program("gather rest" + to, decoding.take_rest, lambda out, slots=slots, index=index, columns=columns: (
          out[slots].replace(cache=()), index, index > 0, columns), {}, (slots,))]
  return out


def slot_programs(e: Engine, c: StepConfig, state: TrainState, shape: tuple[int, int], at: str, waves: int) -> list[Program]:
  """What runs on slots of one shape, (rows, columns); at: behind the programs' names, "" where the devices are not at hand.
  Every program gives slots on as it gets them (decoding.pin), so each is compiled for new ones."""
  row, rule, segments = np.zeros(shape[0], np.int32), c.rule, waves * -(-e.max_new // e.segment)
  init, insert, segment, decide, score = (name + at for name in ("init slots", "insert", "decode segment", "decide", "score"))
  slots = lambda out: out[init]
  own = SamplingParams(*np.zeros((4, shape[0]), np.float32)) if c.sampling.temperature is None else None
  fresh = lambda: fold_all(jax.random.key(0), row)
  keys = fresh if at else lambda: jax.eval_shape(fresh)
  past = jax.ShapeDtypeStruct((2, len(rule.detect), decision.PAST), np.float32, sharding=sharding.replicated(e.mesh))

  def decides(name: str, due: bool) -> Program:
    """due: whether rows may stand at a boundary."""
    known = past if due and rule.kind == "budget" else None
    return Program(name, decision.decide, lambda out: (
      slots(out), state.params["head"], state.calibration, rule, np.bool_(True), True, due, known), {}, (init,), segments)

  def results(name: str, made: bool) -> Program:
    """What the host reads; made: a decision was."""
    return Program(name, everywhere(e.mesh), lambda out: (
      (*out[segment][1:], slots(out).generated, slots(out).active, out[decide][1] if made else None),), {}, (segment, decide))

  listed = [
    Program(init, decoding.init_slots, lambda out: (e.config, *shape, c.sampling), {}, ("reshard",)),
    Program(insert, decoding.insert, lambda out: (slots(out), out["prefill"], row, keys(), row, row, own), {}, ("prefill", init),
            waves),
    Program(segment, decoding.segment_program(e.weights == "int8"), lambda out: (e.config, out["reshard"], slots(out)),
            {"steps": e.segment, "sampling": c.sampling}, ("reshard", init), segments,
            1 if decoding.asks_nobody() else e.segment // math.gcd(e.segment, decoding.STRIDE)),
    decides(decide, True)]
  return listed + [decides(score, False), results("results" + at, True),
                   results("results without a decision" + at, False)] if at else listed


def training_programs(mesh: Mesh, c: StepConfig, state: TrainState, kept: int, started: int,
                      everything: bool = False) -> list[Program]:
  """What learning from `kept` survivors of `started` rollouts runs, micro-batches at their largest or of every size."""
  u, trained = c.update, state.params["policy"]
  batches = batching.abstract_batches(c.shape, mesh)
  if not everything:
    batches = [max(batches, key=lambda batch: batch.response_mask.size)]
  count = math.ceil(kept * c.shape.length / batches[0].tokens.size)
  scalars = dict.fromkeys(("tokens", "rows", "trained", "temperature"), np.float32(0))
  taught = batching.empty_examples(state.params["head"], u.model.width, started * len(c.rule.detect))
  kl, frozen = bool(u.loss.kl_weight), state.base is not None
  readers = [("log-probs", state.policy, (not u.fresh) + (kl and not frozen)),
             ("reference log-probs", state.base, int(kl and frozen))]  # without adapters: another program
  out = [Program("zeros", update.zeros, lambda out: (u.model, trained), {}, small=True)]
  for batch in batches:
    at = f" of {batch.tokens.size}x{batch.response_mask.shape[0]}x{batch.response_mask.shape[1]}" if everything else ""
    out += [Program(name + at, update.batch_logprobs, lambda out, batch=batch, policy=policy: (u, policy, batch, np.float32(0)),
                    {}, runs=count * passes) for name, policy, passes in readers if passes]
    out += [Program("update" + at, update.accumulate, lambda out, batch=batch: (
      u, trained, *out["zeros"], batch, scalars, state.base), {}, ("zeros",), count)]
  out += [Program("optimizer", update.apply, lambda out: (state.changing, out["zeros"][0], scalars, taught),
                  {"head_weight": u.loss.head_weight, "optimizer": c.optimizer, "decay": np.float32(1)}, ("zeros",)),
          Program("tables", head_training.update_tables, lambda out: (
            state.calibration, *head_training.table_rows(state.calibration, [], started, (), len(c.rule.detect)),
            head_training.as_scalar(c.half_life)), {}, small=True),
          Program("head norm", update.norm_of, lambda out: (state.params["head"],), {}, small=True)]
  if c.strength is not None:
    features = batching.linear_examples([], len(c.rule.detect), state.params["head"]["mean"].shape[1])
    pad = 1 << max(0, started - 1).bit_length()
    grown = [np.zeros((*x.shape[:a], pad, *x.shape[a + 1:]), x.dtype) for x, a in zip(features, (1, 0, 1, 0), strict=True)]
    out += [Program("fit", head_training.fit_linear, lambda out: (
      state.recent, *grown, np.float32(c.strength), c.head_half_life, np.float32(0)), {}, small=True)]
  if c.head_optimizer:
    out += [Program("refit", head_training.refit, lambda out: (
      state.params["head"], state.recent, *head_training.latest(state, taught)),
      {"passes": c.passes, "optimizer": c.head_optimizer}, small=True)]
  return out
