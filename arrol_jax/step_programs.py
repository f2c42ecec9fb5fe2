"""The programs that a training step runs on the device, listed with what it gives them: to compile ahead, or for a plan.

step.py calls these same functions. Nothing here runs a step: engine/compile_ahead.py compiles them before the first, plan.py for
chips that are not there.
"""

from collections.abc import Callable
import math
from typing import NamedTuple

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
      to, index = f"{at} to {n}x{columns}" if everything else "", np.zeros(n, np.int32)
      slots, needs = to_gather(e.mesh, at)
      out += [Program("gather" + to, decoding.take_columns, lambda out, slots=slots, index=index: (slots(out).cache[0], index),
                      {"length": columns}, needs, e.config.layers * (len(counts) - 1))]
      if everything:
        out += [Program("gather rest" + to, decoding.take_rest, lambda out, slots=slots, index=index, columns=columns: (
          slots(out).replace(cache=()), index, index > 0, columns), {}, needs)]
      if moves(e.mesh, at) and (rows, length) == shapes[0]:  # from wherever they come, they have the same shardings
        of = f" at {n}x{columns}"
        stood = lambda out, to=to: out["gather rest" + to].replace(cache=(out["gather" + to],) * e.config.layers)
        out += slot_programs(e, c, state, (n, columns), of, waves, (stood, ("gather" + to, "gather rest" + to)))
  return out


def moves(mesh: Mesh, at: str) -> bool:
  """Whether slots change their shardings from program to program, until they have gone through each once: then what a program
  is given, of all that is compiled, is what comes out of the one before it."""
  return bool(at) and mesh.size > 1


def to_gather(mesh: Mesh, at: str) -> tuple[Callable, tuple[str, ...]]:
  """The slots that are gathered, of the results, and what has to be there for it."""
  if moves(mesh, at):
    return lambda out: out["decide" + at][0], ("decide" + at,)
  return lambda out: out.get("decode segment" + at, (out["init slots" + at],))[0], ("init slots" + at,)


def slot_programs(e: Engine, c: StepConfig, state: TrainState, shape: tuple[int, int], at: str, waves: int,
                  gathered: tuple[Callable, tuple[str, ...]] | None = None) -> list[Program]:
  """What runs on slots of one shape, (rows, columns); at: behind the programs' names. gathered: what gives these slots, of the
  results, and what it needs, where they are not new."""
  chained, on = moves(e.mesh, at), _OnSlots(e, c, state, shape[0], waves, at != "")
  at += " gathered" * bool(gathered)
  init, insert, segment, decide = (name + at for name in ("init slots", "insert", "decode segment", "decide"))
  begin, needs = gathered or (lambda out: out[init], (init,))
  said = lambda out: out.get(segment, (out[init],))[0]
  listed = [] if gathered else [Program(init, decoding.init_slots, lambda out: (e.config, *shape, c.sampling), {}, ("reshard",))]
  listed += [on.insert(insert, begin, needs)]
  if chained:
    first = (begin, needs) if gathered else (lambda out: out[insert], (insert,))
    said, needs, decided = lambda out: out[segment][0], (segment,), lambda out: out[decide][0]
    listed += [on.segment(segment, *first), on.insert(insert + " again", decided, (decide,)),
               on.segment(segment + " again", decided, (decide,)),
               on.decide(decide + " again", lambda out: out[segment + " again"][0], (segment + " again",))]
  else:
    listed += [on.segment(segment, begin, needs)]
  listed += [on.decide(decide, said, needs)]
  if at:
    listed += [on.decide("score" + at, said, needs, due=False), on.results("results" + at, segment, decide),
               on.results("results without a decision" + at, segment, decide, made=False)]
  return listed


class _OnSlots(NamedTuple):
  """Programs on so many slots, by what gives these of the results and what that needs."""
  e: Engine
  c: StepConfig
  state: TrainState
  rows: int
  waves: int
  here: bool  # on the devices at hand

  @property
  def segments(self) -> int:
    return self.waves * -(-self.e.max_new // self.e.segment)

  def insert(self, name: str, slots: Callable, needs: tuple[str, ...]) -> Program:
    row = np.zeros(self.rows, np.int32)
    own = SamplingParams(*np.zeros((4, self.rows), np.float32)) if self.c.sampling.temperature is None else None
    fresh = lambda: fold_all(jax.random.key(0), row)
    keys = fresh if self.here else lambda: jax.eval_shape(fresh)
    return Program(name, decoding.insert, lambda out: (slots(out), out["prefill"], row, keys(), row, row, own), {},
                   ("prefill", *needs), self.waves)

  def segment(self, name: str, slots: Callable, needs: tuple[str, ...]) -> Program:
    e = self.e
    return Program(name, decoding.segment_program(e.weights == "int8"), lambda out: (e.config, out["reshard"], slots(out)),
                   {"steps": e.segment, "sampling": self.c.sampling}, ("reshard", *needs), self.segments,
                   1 if decoding.asks_nobody() else e.segment // math.gcd(e.segment, decoding.STRIDE))

  def decide(self, name: str, slots: Callable, needs: tuple[str, ...], due: bool = True) -> Program:
    """due: whether rows may stand at a boundary."""
    state, rule = self.state, self.c.rule
    past = jax.ShapeDtypeStruct((2, len(rule.detect), decision.PAST), np.float32, sharding=sharding.replicated(self.e.mesh))
    known = past if due and rule.kind == "budget" else None
    return Program(name, decision.decide, lambda out: (
      slots(out), state.params["head"], state.calibration, rule, np.bool_(True), True, due, known), {}, needs, self.segments)

  def results(self, name: str, segment: str, decide: str, made: bool = True) -> Program:
    """What the host reads; made: a decision was."""
    def args(out) -> tuple:
      slots, made_of_them = out[decide][:2]
      return ((*out[segment][1:], slots.generated, slots.active, made_of_them if made else None),)

    return Program(name, everywhere(self.e.mesh), args, {}, (segment, decide))


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
