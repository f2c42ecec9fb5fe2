"""Plans a run on a TPU slice or a GPU that is not there: says whether a step's programs fit, and what would make them.

  arrol-plan --config=qwen3_1b7 --topology=v5e:16x16 [--json=FILE] [--config.KEY=VALUE]
  arrol-plan --config=gsm8k_qwen3_06b --topology=gpu:24GB     # one card, by count: an estimate

For a TPU every program that train.py runs in a step is lowered from shapes and shardings alone (nothing is allocated, no
weights are read) and compiled by libtpu, which `pip install "jax[tpu]"` brings. --effort=-1 compiles several times faster, with
temporary memory that is not the real one's. For a GPU nothing is compiled: what is held is counted, and what an update needs
beside it. The model's shape is that of model.path where that is there, else of zoo.py: --shape=NAME, or the name that
model.path's folder begins with. --suggest=no looks for no change that would fit.

What runs at several shapes is compiled at the largest; programs of a few scalars, evaluation and host memory are left out.

Where all fit, seconds a step by phase are predicted, with and without pruning, for responses as long as --lengths says: work and
collectives of the compiled programs at the rates that a chip reaches (arrol_jax/planning/chips.py). The shares of the peaks come
from one H100, where predicted steps are within 30% of measured ones (python -m experiments.plan_check); for TPUs nothing is
validated. All survivors are taken to be learned from, and their responses to be like the others.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import os
from pathlib import Path
import re
import sys

import jax
from jax.experimental import mesh_utils, topologies
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict
import numpy as np

from arrol_jax import assemble, config as configuration
from arrol_jax.models import sharding
from arrol_jax.models.files import gguf as gguf_files, hf_config, hub
from arrol_jax.models.files.weights import check_positions
from arrol_jax.models.transformer import PolicyConfig
from arrol_jax.models.zoo import ZOO
from arrol_jax.planning import card, chips, rollout, timing
from arrol_jax.planning.compiling import GIB, PHASES, SKIPPED, Program, Step
from arrol_jax.planning.suggesting import as_flags, what_fits
from arrol_jax.running import streams
from arrol_jax.running.hosts import CARD_SHARE
from arrol_jax.types import UserError

# GiB that programs may fill of a chip's memory; the compiler names the figure where one does not fit.
HBM = {"v5e": 15.75, "v5p": 95.74, "v6e": 31.25}
# libtpu asks the machine it is on for a TPU's name and place; these answer for it.
ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost",
               "TPU_WORKER_ID": "0", "TPU_LOG_DIR": "disabled", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}


FLAGS = {"topology": (None, "the slice, such as v5e:16x16 or v5p:4x4x4, or a card, such as gpu:24GB"),
         "json": (None, "a file for the plan as JSON"),
         "shape": (None, "the model's shape by its name in zoo.py"),
         "effort": (None, "the compiler's; -1 is several times faster, with temporary memory that is not the real one's"),
         "suggest": ("yes", "no: do not look for changes that would fit"),
         "lengths": (rollout.LENGTHS, "responses: lognormal:CENTRE:SPREAD (median as a share of rollout.max_new, spread of the "
                                      "logarithm), or a file of whole numbers"),
         "prompt": (None, "tokens of a prompt; as many as rollout.max_prompt if not given"),
         "price": (None, "dollars a chip and hour, for dollars a step")}


def table(programs: list[Program]) -> str:
  """Markdown, a program a line, per chip."""
  gib = lambda x: f"{x / GIB:.2f}"
  head = ("program", "runs a step", "arguments", "temp", "output", "in place", "peak alone", "peak in the step", "of HBM",
          "TFLOP", "GB moved", "collectives (times, MB)")
  lines = [head, ("---",) * len(head)]
  for p in programs:
    if p.error:
      lines.append((p.name, p.runs, *("",) * 4, gib(p.peak) if p.peak else "", gib(p.in_step) if p.in_step else "",
                    "**over**" if p.peak else "", p.error, "", ""))
      continue
    moved = ", ".join(f"{kind} {n:,} ({size / 1e6:,.1f})" for kind, (n, size) in sorted(p.collectives.items()))
    share = f"{p.in_step / p.limit:.0%}"
    lines.append((p.name, p.runs, gib(p.argument), gib(p.temp), gib(p.output), gib(p.alias), gib(p.peak), gib(p.in_step),
                  share if p.fits else f"**{share}**", f"{p.flops / 1e12:,.3f}", f"{p.traffic / 1e9:,.2f}", moved))
  return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def verdict(step: Step, topology: str) -> str:
  over = [p for p in step.programs if not p.fits]
  if not over:
    fullest = max(step.programs, key=lambda p: p.in_step)
    return (f"**Fits** {topology}: the fullest program, {fullest.name}, takes {fullest.in_step / GIB:.2f} of "
            f"{step.limit / GIB:.2f} GiB a chip with all that is held beside it.")
  parts = [f"{p.name} ({p.error or f'{p.in_step / GIB:.2f} of {p.limit / GIB:.2f} GiB'})" for p in over
           if p.error != SKIPPED]
  return f"**Does not fit** {topology}: {'; '.join(parts)}."


def report(title: str, step: Step) -> str:
  """The plan as Markdown."""
  held = ", ".join(f"{name} {size / GIB:.2f}" for name, size in step.sizes.items())
  shapes = ", ".join(f"{name} {size:,}" for name, size in step.shapes.items())
  return "\n".join([f"# {title}", "", f"{shapes}.", f"Held on a chip, GiB: {held}.", "", table(step.programs), "",
                    "GiB a chip; `in the step` counts what others hold meanwhile. TFLOP (products outside kernels), GB moved and "
                    "collectives are a run's on one chip, loops counted by their trips (cost_analysis counts a body once)."])


def plan_card(c: ConfigDict, model: PolicyConfig, source: str, flags) -> None:
  """Prints what the config needs of a card such as gpu:24GB, whether it fits, and what would."""
  size = re.fullmatch(r"gpu:([1-9]\d{0,3})GB", flags.topology)
  if not size:
    raise UserError(f"--topology={flags.topology}: write one card's memory, such as gpu:24GB")
  given = [f"--{name}" for name in ("effort", "lengths", "prompt", "price") if flags[name].present]
  if given:
    raise UserError(f"{', '.join(given)}: for a card nothing is compiled and no time predicted; leave that out")
  if any(c.mesh[name] != 1 for name in sharding.AXES):
    raise UserError(f"--topology={flags.topology} is one card: give --config.mesh.data=1, .fsdp=1 and .tensor=1")
  assemble.check_attention(c, "gpu")
  limit = int(int(size[1]) * 1e9 * CARD_SHARE)
  needs = card.count(c, model, limit)
  fits = card.fits(needs, limit)
  fix = None if fits or flags.suggest == "no" else card.what_fits(c, model, limit)
  said = lambda x: f"{max(map(x.peak, x.phases)) / 1e9:.1f} of {limit / 1e9:.1f} GB at most, {x.slots} rows decode at once"
  lines = [card.report(f"{source} on {flags.topology}", needs, limit), "",
           f"**{'Fits' if fits else 'Does not fit'}** {flags.topology}: {needs.error or said(needs)}."]
  if fix:
    lines += [f"It fits with {' '.join(as_flags(fix))}: {said(card.count(card.changed(c, fix), model, limit))}."]
  elif not fits and flags.suggest != "no":
    lines += ["None of the changes tried makes it fit; take a larger card, or fewer and shorter rollouts."]
  if flags.json:
    programs = [{"name": phase, "argument": sum(needs.held.values()), "temp": sum(needs.phases.get(phase, {}).values()),
                 "peak": needs.peak(phase) if phase in needs.phases else 0, "limit": limit} for phase in card.PHASES]
    write_json(flags.json, {
      "fits": fits, "topology": flags.topology, "model": source, "held": needs.held, "programs": programs, "fits_with": fix,
      "phases": needs.phases, "slots": needs.slots, "error": needs.error, "estimate": True})
  print("\n".join([*lines, "", card.ESTIMATE]))


def write_json(path: str, plan: dict) -> None:
  """The plan, and what it was made with."""
  out = plan | {"jax": jax.__version__, "command": " ".join(["python -m arrol_jax.plan", *sys.argv[1:]])}
  with streams.naming(path):
    Path(path).write_text(json.dumps(out, indent=1) + "\n")


def topology_mesh(name: str, c: ConfigDict) -> tuple[Mesh, int]:
  """The config's mesh over the chips of a topology such as v5e:16x16, and bytes a chip; UserError if they do not match."""
  chip = name.partition(":")[0]
  if chip not in HBM:
    raise UserError(f"--topology={name}: unknown chip; write {', '.join(HBM)} and a shape, such as v5e:16x16 or v5p:4x4x4, "
                    "or gpu:24GB for one card")
  assemble.check_attention(c, "tpu")
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(f'libtpu, which compiles for TPUs, is not installed: pip install "jax[tpu]=={jax.__version__}"')
  os.environ.update(ENVIRONMENT)
  try:
    devices = topologies.get_topology_desc(name, "tpu").devices
  except jax.errors.JaxRuntimeError as e:
    raise UserError(f"--topology={name}: {str(e).splitlines()[0]}") from e
  shape = (c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
  if math.prod(shape) != len(devices):
    raise UserError(f"the mesh of {' x '.join(map(str, shape))} (data, fsdp, tensor) has {math.prod(shape)} devices and {name} "
                    f"has {len(devices)} chips: give --config.mesh.data, .fsdp and .tensor with that product")
  grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  return Mesh(grid, sharding.AXES, axis_types=(AxisType.Auto,) * 3), int(HBM[chip] * GIB)


def model_shape(path: str, shape: str | None) -> tuple[PolicyConfig, str]:
  """The policy's shape and where it is from: --shape, the model's files, or what of zoo.py its folder's name begins with."""
  names = ", ".join(ZOO)
  if shape:
    if shape not in ZOO:
      raise UserError(f"--shape={shape}: no such shape; there are {names}")
    return ZOO[shape], f"{shape} of zoo.py"
  path = hub.here(path)
  file = Path(path) / "config.json"
  if file.is_file():
    try:
      return hf_config.config_from_json(file, json.loads(file.read_text())), str(file)
    except ValueError as e:
      raise UserError(f"{file}: not readable as JSON ({e})") from e
  if Path(path).is_file():
    return gguf_files.open_gguf(Path(path)).config, path
  found = max((n for n in ZOO if Path(path).name.lower().startswith(n)), key=len, default=None)
  if not found:
    raise UserError(f"model.path: {path} is not here and names no known shape; give --shape=NAME, one of {names}")
  return ZOO[found], f"{found} of zoo.py ({path} is not here)"


def number(flags, name: str, whole: bool = False) -> float | None:
  """A flag's number, above 0; None where it was not given."""
  text = flags[name].value
  if text is None:
    return None
  try:
    value = int(text) if whole else float(text)
  except ValueError:
    value = math.nan
  if not 0 < value < math.inf:
    raise UserError(f"--{name}={text}: it takes a {'whole ' if whole else ''}number above 0")
  return value


def predicted(step: Step, lengths: np.ndarray, prompt: int) -> dict[str, timing.Timed]:
  """A step without pruning and, where the config prunes, one with it."""
  cases = {"nothing pruned": timing.of_step(step, lengths, prompt, False)}
  if step.c.prune.enabled and step.c.prune.keep < 1:
    cases["pruned"] = timing.of_step(step, lengths, prompt, True)
  return cases


def seconds_report(cases: dict[str, timing.Timed], flags, chip: str, count: int, price: float | None) -> str:
  """Predicted seconds as Markdown, with what they rest on."""
  times = [t.total for t in cases.values()]
  gain = f" Pruning makes a step {times[0] / times[1]:.2f}x faster." if len(times) > 1 else ""
  s, sheet = chips.FITTED, chips.CHIPS[chip]
  cost = f" Dollars: {price} a chip and hour." if price is not None else ""
  return "\n".join([
    f"Predicted seconds a step on {count} {chip} (lengths {flags.lengths}), not validated on any TPU:", "",
    timing.table(cases, count, price), "",
    f"Of {sheet.flops / 1e12:,.0f} TFLOP/s {s.matrix:.0%}, of {sheet.memory / 1e12:.2f} TB/s {s.memory:.0%} (cache "
    f"{s.cache:.0%}), both as on one H100; of {sheet.link / 1e9:,.0f} GB/s to other chips {s.link:.0%}, assumed; nothing "
    f"overlaps.{gain}{cost}"])


def main():
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", False)  # it holds programs for devices that are here
  c, flags = configuration.parse(sys.argv, FLAGS, __doc__)
  configuration.check(c, files=False)
  if not flags.topology:
    raise UserError("no --topology given, such as v5e:16x16 for a TPU slice or gpu:24GB for one card")
  model, source = model_shape(c.model.path, flags.shape)
  check_positions(model, source, assemble.longest_row(c, True, c.data.eval != ""))
  try:
    effort = float(flags.effort) if flags.effort else None
    flags.json and open(flags.json, "a").close()  # found out before the compiler has worked for minutes
  except (ValueError, OSError) as e:
    raise UserError(f"{e}; --effort takes a number, --json a file in a folder that is there") from e

  if flags.suggest not in ("yes", "no"):
    raise UserError(f"--suggest is {flags.suggest!r}; it takes yes or no")
  if flags.topology.lower().startswith("gpu"):
    plan_card(c, model, source, flags)
    return

  price, prompt = number(flags, "price"), number(flags, "prompt", whole=True) or c.rollout.max_prompt
  if prompt > c.rollout.max_prompt:
    raise UserError(f"--prompt={prompt}: prompts have at most rollout.max_prompt ({c.rollout.max_prompt}) tokens")
  lengths = rollout.parse_lengths(flags.lengths, c.rollout.prompts * c.rollout.group_size, c.rollout.max_new)
  chip = flags.topology.partition(":")[0]

  def compile_with(c: ConfigDict, phases: tuple[str, ...] = PHASES, stop: bool = True) -> Step:
    mesh, limit = topology_mesh(flags.topology, c)
    return Step(c, model, mesh, limit, effort, stop, chips.rates(chip)).run(phases)

  step = compile_with(c, stop=False)
  fits = all(p.fits for p in step.programs)
  mesh = "x".join(str(c.mesh[name]) for name in sharding.AXES)
  lines = [report(f"{source} on {flags.topology}, mesh {mesh} (data x fsdp x tensor)", step), "", verdict(step, flags.topology)]
  fix = None if fits or flags.suggest == "no" else what_fits(c, step, compile_with)
  if fix:
    most = max(p.in_step for p in fix[1].programs) / GIB
    lines += [f"It fits with {' '.join(as_flags(fix[0]))}: compiled, {most:.2f} GiB at most in what did not fit."]
  elif not fits and flags.suggest != "no":
    lines += ["None of the changes tried makes it fit; take a larger topology."]
  cases = predicted(step, lengths, prompt) if fits else {}
  if cases:
    lines += ["", seconds_report(cases, flags, chip, step.mesh.size, price)]
  if flags.json:
    write_json(flags.json, {
      "fits": fits, "topology": flags.topology, "mesh": c.mesh.to_dict(), "model": source, "shapes": step.shapes,
      "held": step.sizes, "programs": [dataclasses.asdict(p) | {"fits": p.fits} for p in step.programs],
      "fits_with": fix and fix[0], "time": cases and {
        "chip": chip, "peaks": chips.CHIPS[chip]._asdict(), "shares": chips.FITTED._asdict(), "lengths": flags.lengths,
        "prompt": prompt, "price": price,
        "steps": {name: t.as_dict(step.mesh.size, price) for name, t in cases.items()}}})
  print("\n".join(lines))


command = functools.partial(configuration.run, main)

if __name__ == "__main__":
  command()
