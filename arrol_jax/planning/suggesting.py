"""What would make a step fit: changes of the config in the order of what they cost, the first that compiles and fits.
"""

from collections.abc import Iterator
import sys

from ml_collections import ConfigDict

from arrol_jax.planning.compiling import GENERATION, PHASES, DoesNotFit, Step


def phases_over(step: Step) -> tuple[str, ...]:
  """Phases in which a program does not fit."""
  return tuple({("generation" if p.name in GENERATION else "training"): None for p in step.programs if not p.fits})


def changes(c: ConfigDict, step: Step) -> Iterator[dict]:
  """Overrides that may make a step fit, those that should cost the least speed first."""
  over, mesh = phases_over(step), c.mesh
  unit = mesh.data * mesh.fsdp
  if mesh.data > 1:
    yield {"mesh.data": 1, "mesh.fsdp": unit}
  if "generation" in over:
    known = [p.in_step for p in step.programs if p.name in GENERATION and p.in_step]
    excess, cache = max(known, default=0) - step.limit, step.sizes.get("cache and slots", 0)
    rows = int(step.shapes.get("slots", 0) * (1 - 1.05 * excess / cache)) // unit * unit if cache else 0
    if rows >= max(unit, c.rollout.group_size):
      yield {"rollout.slots": rows}
  if "training" in over:
    if not c.model.scan_layers:
      yield {"model.scan_layers": True}
    if c.model.remat != "full":
      yield {"model.remat": "full"}
    longest = c.rollout.max_prompt + c.rollout.max_new
    if step.shapes["micro-batch tokens"] > 1.1 * unit * longest:
      yield {"optim.micro_tokens": max(unit * longest, step.shapes["micro-batch tokens"] // 2)}
    if c.optim.chunk_tokens > 1024:
      yield {"optim.chunk_tokens": 1024}
  for wider in (2, 4, 8):
    if unit % wider == 0 and step.loaded.config.kv_heads % (mesh.tensor * wider) == 0:
      yield {"mesh.data": 1, "mesh.fsdp": unit // wider, "mesh.tensor": mesh.tensor * wider}
  if "generation" in over and c.rollout.cache is None:
    yield {"rollout.cache": "int8"}
  if "generation" in over and c.rollout.weights is None:
    yield {"rollout.weights": "int8"}


def helps(change: dict) -> set[str]:
  """Phases in which a change may save memory."""
  part = {"mesh": {"generation", "training"}, "rollout": {"generation"}}
  return set().union(*(part.get(name.partition(".")[0], {"training"}) for name in change))


def what_fits(c: ConfigDict, step: Step, compile_with) -> tuple[dict, Step] | None:
  """The first of `changes`, alone or with those before it, with which all that did not fit does: compiled, not estimated.

  compile_with(changed config, phases) -> Step, or raises DoesNotFit. A change of the mesh has all programs compiled.
  """
  over, single = phases_over(step), list(changes(c, step))
  together = [{k: v for change in single[:n] for k, v in change.items()} for n in range(2, len(single) + 1)]
  for change in [*single, *together]:
    if not set(over) <= helps(change):
      continue
    print("trying", *as_flags(change), file=sys.stderr, flush=True)
    changed = c.copy_and_resolve_references()
    changed.update_from_flattened_dict(change)
    try:
      return change, compile_with(changed, PHASES if any(name.startswith("mesh.") for name in change) else over)
    except DoesNotFit:
      continue
  return None


def as_flags(change: dict) -> list[str]:
  return [f"--config.{name}={value}" for name, value in change.items()]
