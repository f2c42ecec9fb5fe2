"""Predicts a step on a mesh of the chips at hand: work counted from shapes (work.py), collectives from the compiled programs.

For GPUs, whose compiled text hides matrix products in library calls, and for measured steps (bench.py, experiments).
"""

from typing import NamedTuple

import jax
from jax.sharding import Mesh
import numpy as np

from arrol_jax import step_programs
from arrol_jax.models.transformer import PolicyConfig
from arrol_jax.planning import hlo, rollout, work
from arrol_jax.planning.chips import Rates
from arrol_jax.planning.compiling import Program
from arrol_jax.planning.timing import Timed, moved_bytes


class Workload(NamedTuple):
  """One step's rollouts and how they are decoded and learned from."""
  lengths: np.ndarray         # i64[N]  of the responses
  decoding: rollout.Decoding
  dtype: str
  cache: str | None           # "int8", or None for dtype
  weights: str | None
  shared: bool                # a group's prompt is read once
  bin_tokens: int             # of an update's bin, one a shard
  passes: int = 0             # over the batch for log-probs alone


def collectives(listed: list[step_programs.Program], mesh: Mesh) -> dict[str, Program]:
  """The listed programs compiled, in their order, with what their collectives move; programs that a step has already compiled are
  found again."""
  out, results = {}, {}
  with jax.set_mesh(mesh):
    for one in listed:
      lowered = one.jitted.lower(*one.args(results), **one.static)
      compiled = lowered.compile()
      module = hlo.parse(compiled.as_text())
      counts = hlo.collective_counts(module, hlo.trips(module, one.unknown_trips))
      out[one.name] = Program(one.name, 0, runs=one.runs, collectives=counts)
      results[one.name] = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), lowered.out_info,
                                       compiled.output_shardings)
  return out


def predict(c: PolicyConfig, w: Workload, mesh: dict[str, int], rates: Rates, programs: dict[str, Program]) -> Timed:
  """One step on a mesh {"data", "fsdp", "tensor"}; programs: `collectives` of the step's."""
  shape = mesh["data"], mesh["fsdp"], mesh["tensor"]
  shards, chips = shape[0] * shape[1], shape[0] * shape[1] * shape[2]
  made, how = rollout.simulate(w.lengths, w.decoding), w.decoding
  groups, segment = len(w.lengths) // how.group, programs["decode segment"]
  rows = how.row_counts[-1] / shards
  moved = {kind: [times / how.segment, size / how.segment / rows] for kind, (times, size) in segment.collectives.items()}
  cost = work.decode_cost(c, w.dtype, w.cache, shape, w.shared, w.weights)._replace(collectives=moved)
  trained = work.packed(how.prompt, groups, made.kept, w.bin_tokens)
  batches = max(1.0, trained.tokens / (w.bin_tokens * shards))
  linked = lambda name, runs=1.0: runs * rates.collectives(programs[name].collectives) if name in programs and runs else 0.0
  seconds = {
    "generate": (cost.seconds(made, rates) + work.prefill_seconds(c, groups * how.prompt, rates, chips) +
                 work.load_seconds(c, rates, chips) + linked("reshard") + linked("prefill", programs["prefill"].runs) +
                 linked("insert", made.inserts)),
    "logprob": w.passes * (work.forward_seconds(c, trained, rates, chips) + linked("log-probs", batches)),
    "update": work.update_seconds(c, trained, rates, chips) + linked("update", batches) + linked("optimizer"),
    "rest": len(w.lengths) * rates.rollout}
  return Timed(seconds, made.tokens, int(made.kept.sum()), len(made.kept), sum(s.steps for s in made.segments),
               moved_bytes(programs, made, batches, w.passes, how.segment))
