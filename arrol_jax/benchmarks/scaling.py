"""How a step scales over devices: W3 on 1, 2, 4, ... of them, with as many rollouts a device (weak) or in all (strong), and what
the plan predicts for the same meshes."""

from collections.abc import Iterator
import copy
import functools

import jax

from arrol_jax import step_programs
from arrol_jax.benchmarks.measuring import target_lengths
from arrol_jax.benchmarks.training import PHASES, bench_step
from arrol_jax.engine import decode_attention
from arrol_jax.models import sharding
from arrol_jax.planning import by_hand, chips
from arrol_jax.planning.rollout import Decoding

KEEP = 0.5  # of the rule that bench_step prunes with


def bench_scale(a, c, mesh) -> Iterator[dict]:
  """Lines of `step` with the first --detect, by mesh and kind of scaling; --rows and --micro_tokens are one device's.

  share_of_linear, by phase: weak, one device's seconds over n devices' for n times the rollouts; strong, one device's over n
  times n devices' for the same. With pruning: keys ending in _pruned. bytes_moved: by a step's collectives on one device.
  prediction: seconds by phase for --chip or the chip at hand; None where that is not in the sheet. mesh is not used: each count
  of devices has its own, split along --axis.
  """
  counts = [n for n in (1, 2, 4, 8, 16) if n <= min(len(jax.devices()), a.devices)]
  alone = None
  for kind in ("weak", "strong"):
    for n in counts if kind == "weak" else counts[1:]:
      shape = {"data": 1, "fsdp": 1, "tensor": 1} | {a.axis: n}
      one = copy.copy(a)
      one.rows, one.detect, one.micro_tokens = a.rows * (n if kind == "weak" else 1), a.detect[:1], a.micro_tokens * n
      part = sharding.make_mesh(**shape)
      with jax.set_mesh(part):
        line = bench_step(one, c, part, functools.partial(planned, one, c, shape))[0]
      alone = alone or line
      work = 1 if kind == "weak" else n
      names = [f"sec_{phase}{end}" for phase in (*PHASES, "step") for end in ("", "_pruned")]
      line["share_of_linear"] = {name[4:]: alone[name] / (work * line[name]) for name in names if line[name] > 1e-4}
      yield line | {"scaling": kind, "devices": n, "mesh": shape, "rows": one.rows}


def planned(a, c, shape: dict[str, int], one, state) -> dict:
  """What the plan says of the compiled step `one`: prediction, and bytes that its collectives move."""
  e, config = one.engine, one.config
  listed = step_programs.generation_programs(e, config, state, a.rows // a.group, a.group)
  programs = by_hand.collectives(listed + step_programs.training_programs(e.mesh, config, state, a.rows, a.rows), e.mesh)
  lengths = target_lengths(a.lengths, a.rows, a.max_new, 0.6, 0.5)
  bins = config.shape.bins(shape["data"] * shape["fsdp"], config.shape.lengths()[-1])[-1].tokens
  shared = decode_attention.resolve(config.sampling.attention, c.head_dim, config.sampling.cache_dtype) == "triton"
  chip = a.chip or chips.chip_of(jax.devices()[0].device_kind)
  rates = chips.rates(chip or "h100")  # bytes need none
  out = {"prediction": {"chip": chip} if chip else None}
  for end, detect, keep in (("", (), 1.0), ("_pruned", tuple(a.detect), KEEP)):
    how = Decoding(a.prompt, a.group, e.row_counts(config.sampling), a.segment, detect, keep)
    timed = by_hand.predict(c, by_hand.Workload(lengths, how, a.dtype, a.cache, a.weights, shared, bins), shape, rates, programs)
    out[f"bytes_moved{end}"] = timed.moved
    if chip:
      out["prediction"] |= {f"sec_{k}{end}": v for k, v in (timed.seconds | {"step": timed.total}).items()}
  return out
