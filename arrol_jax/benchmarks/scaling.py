"""How a step scales over devices: W3 on 1, 2, 4, ... of them, with as many rollouts a device (weak) or in all (strong)."""

import copy

import jax

from arrol_jax.benchmarks.training import PHASES, bench_step
from arrol_jax.models import sharding


def bench_scale(a, c, mesh) -> list[dict]:
  """Lines of `step` with the first --detect, by mesh and kind of scaling; --rows are one device's.

  share_of_linear, by phase: weak, one device's seconds over n devices' for n times the rollouts; strong, one device's over n
  times n devices' for the same. With pruning: keys ending in _pruned. mesh is not used: each count of devices has its own,
  split along --axis. Over several devices the first run still compiles: give --runs=3 or more, whose median counts.
  """
  counts = [n for n in (1, 2, 4, 8, 16) if n <= min(len(jax.devices()), a.devices)]
  out, alone = [], None
  for n in counts:
    shape = {"data": 1, "fsdp": 1, "tensor": 1} | {a.axis: n}
    for kind in ("weak", "strong") if n > 1 else ("weak",):
      one = copy.copy(a)
      one.rows, one.detect = a.rows * (n if kind == "weak" else 1), a.detect[:1]
      part = sharding.make_mesh(**shape)
      with jax.set_mesh(part):
        line = bench_step(one, c, part)[0]
      alone = alone or line
      work = 1 if kind == "weak" else n
      names = [f"sec_{phase}{end}" for phase in (*PHASES, "step") for end in ("", "_pruned")]
      line["share_of_linear"] = {name[4:]: alone[name] / (work * line[name]) for name in names if line[name] > 1e-4}
      out.append(line | {"scaling": kind, "devices": n, "mesh": shape, "rows": one.rows})
  return out
