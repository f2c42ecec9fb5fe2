"""Plans a run on a TPU slice that is not there: compiles a step's programs for it, says whether they fit and what would.

  python -m arrol_jax.plan --config=configs/qwen3_1b7.py --topology=v5e:16x16 [--json=FILE] [--config.KEY=VALUE]

Every program that train.py runs in a step is lowered from shapes and shardings alone (nothing is allocated, no weights are
read) and compiled by libtpu, which `pip install "jax[tpu]"` brings. The model's shape is that of model.path where that is there,
else of zoo.py: --shape=NAME, or the name that model.path's folder begins with. --effort=-1 compiles several times faster, with
temporary memory that is not the real one's. --suggest=no looks for no change that would fit.

What runs at several shapes is compiled at the largest; programs of a few scalars, evaluation and host memory are left out.
"""

from collections.abc import Iterator
import dataclasses
import importlib.util
import json
import math
import os
from pathlib import Path
import re
import sys

import jax
from jax.experimental import mesh_utils, topologies
import jax.numpy as jnp
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict
import optax

from arrol_jax import assemble, config as configuration
from arrol_jax.engine import programs
from arrol_jax.learning import head_training, update
from arrol_jax.models import sharding, transformer
from arrol_jax.models.files import gguf as gguf_files, hf_config
from arrol_jax.models.files.weights import Policy
from arrol_jax.models.transformer import PolicyConfig
from arrol_jax.models.zoo import ZOO
from arrol_jax.planning import hlo
from arrol_jax.pruning.decision import make_decide
from arrol_jax.pruning.table import Calibration
from arrol_jax.types import Batch, TrainState, UserError

# GiB that programs may fill of a chip's memory; the compiler names the figure where one does not fit.
HBM = {"v5e": 15.75, "v5p": 95.74, "v6e": 31.25}
# libtpu asks the machine it is on for a TPU's name and place; these answer for it.
ENVIRONMENT = {"TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost",
               "TPU_WORKER_ID": "0", "TPU_LOG_DIR": "disabled", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
PHASES = "generation", "training"
GENERATION = ("reshard", "init slots", "prefill", "insert", "decode segment", "decide", "gather")
GIB = 1 << 30
SKIPPED = "not compiled: one before it does not fit"


@dataclasses.dataclass
class Program:
  """One program on one chip, in bytes. Where it did not compile, `error` says why and `peak` is the compiler's figure or 0."""
  name: str
  limit: int
  held: int = 0        # on the chip while it runs, its own arguments among it
  runs: int = 1        # a step, at most, if all run at this shape
  argument: int = 0
  output: int = 0
  alias: int = 0       # output that takes an argument's place
  temp: int = 0
  peak: int = 0        # by itself: argument + output - alias + temp
  in_step: int = 0     # held + output - alias + temp
  flops: float = 0.0   # matrix products, loops by their trips
  traffic: float = 0.0  # bytes to and from memory, loops by their trips
  flops_once: float = 0.0    # cost_analysis: a loop's body once
  traffic_once: float = 0.0
  collectives: dict = dataclasses.field(default_factory=dict)  # kind: [times, bytes], loops by their trips
  error: str = ""

  @property
  def fits(self) -> bool:
    return not self.error and max(self.in_step, self.peak) <= self.limit


def per_chip(tree) -> int:
  """Bytes of a tree of shapes with shardings on one chip, a tile's padding not counted; of what has no sharding, all."""
  local = lambda x: x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) else x.shape
  return sum(math.prod(local(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree) if hasattr(x, "shape"))


def abstract_state(c: ConfigDict, model: PolicyConfig, mesh: Mesh) -> tuple[TrainState, optax.GradientTransformation]:
  """assemble.init_state's result as shapes with shardings, and the optimizer."""
  optimizer, everywhere = assemble.optimizer(c), sharding.replicated(mesh)
  place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  weights = transformer.abstract_params(model)
  weights = jax.tree.map(place, weights, sharding.shardings(transformer.logical_axes(model), weights, mesh, sharding.TRAIN))
  q = c.quality
  head = jax.eval_shape(lambda: head.init_head(model.width, q.hidden, jax.random.key(0), tuple(q.inputs)))
  params = {"policy": weights, "head": jax.tree.map(lambda x: place(x, everywhere), head)}
  # The optimizer's leaves that follow a parameter end in its path, and are sharded as it is (assemble.init_state).
  at = {jax.tree_util.keystr(path): x.sharding for path, x in jax.tree_util.tree_leaves_with_path(params)}
  follows = lambda path: next((s for name, s in at.items() if jax.tree_util.keystr(path).endswith(name)), everywhere)
  opt_state = jax.tree_util.tree_map_with_path(lambda path, x: place(x, follows(path)), jax.eval_shape(optimizer.init, params))
  table = jax.ShapeDtypeStruct((len(c.prune.detect), c.prune.bins), jnp.float32, sharding=everywhere)
  count = jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere)
  recent = None
  if q.buffer:
    ring = jax.eval_shape(lambda head: head_training.no_recent(head, model.width, q.buffer, assemble.head_optimizer(c)), head)
    recent = jax.tree.map(lambda x: place(x, everywhere), ring)
  return TrainState(params, opt_state, Calibration(table, table), count, recent), optimizer


def abstract_batch(rows: int, length: int, decisions: int, mesh: Mesh) -> Batch:
  """A micro-batch of rollout.pack as shapes with shardings."""
  array = lambda dtype, *shape: jax.ShapeDtypeStruct((rows, *shape), dtype, sharding=sharding.rows(mesh))
  grid, row = array(jnp.float32, length), array(jnp.float32)
  return Batch(tokens=array(jnp.int32, length), response_mask=grid, sampler_logprobs=grid, old_logprobs=grid,
               ref_logprobs=grid, advantages=row, rewards=row, head_position=array(jnp.int32, decisions),
               head_weight=array(jnp.float32, decisions))


def out_of_memory(message: str) -> tuple[int, str]:
  """Bytes that a program would have used, from the compiler's RESOURCE_EXHAUSTED message, and what to say."""
  found = (re.search(r"[Uu]sed ([\d.]+)([KMGT]?) of ([\d.]+[KMGT]?) hbm", message) or
           re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)", message))
  if not found:
    return 0, "the compiler ran out of the chip's memory: " + " ".join(message.split())[:200]
  used, unit, limit = found.groups()
  return int(float(used) * 1024 ** " KMGT".index(unit or " ")), f"the compiler needs {used}{unit} of {limit}"


def measure(program: Program, compiled, unknown_trips: int) -> None:
  """Fills in what the compiler says of the program and what its text adds up to."""
  memory, cost, module = compiled.memory_analysis(), compiled.cost_analysis(), hlo.parse(compiled.as_text())
  program.argument, program.output = memory.argument_size_in_bytes, memory.output_size_in_bytes
  program.alias, program.temp = memory.alias_size_in_bytes, memory.temp_size_in_bytes
  fresh = program.output - program.alias + program.temp
  program.peak, program.in_step = program.argument + fresh, max(program.held, program.argument) + fresh
  count = hlo.trips(module, unknown_trips)
  program.flops, program.traffic = hlo.flops(module, count), hlo.traffic(module, count)
  program.flops_once, program.traffic_once = cost.get("flops", 0.0), cost.get("bytes accessed", 0.0)
  program.collectives = hlo.collective_counts(module, count)


class DoesNotFit(Exception):
  """A program does not fit, and nobody wants to know about the others."""


class Step:
  """The programs of one step, compiled one after another; `held` is what lies on each chip between them.

  stop: `run` raises DoesNotFit at the first program that does not fit.
  """

  def __init__(self, c: ConfigDict, model: PolicyConfig, mesh: Mesh, limit: int, effort: float | None = None,
               stop: bool = False):
    self.c, self.mesh, self.limit, self.stop = c, mesh, limit, stop
    self.loaded = Policy(model, transformer.abstract_params(model), None, (model.vocab - 1,), 0)
    self.options = None if effort is None else {"exec_time_optimization_effort": effort}
    self.programs: list[Program] = []
    self.held: dict[str, int] = {}
    self.sizes: dict[str, int] = {}  # everything that was ever held
    self.shapes: dict[str, int] = {}

  def hold(self, name: str, size: int) -> None:
    self.held[name] = self.sizes[name] = size

  def compile(self, name: str, jitted, *args, runs: int = 1, unknown_trips: int = 1, **static):
    """Compiles a program beside what is held; its results as shapes with shardings, None where it does not fit."""
    program = Program(name, self.limit, held=sum(self.held.values()), runs=runs, argument=per_chip(args))
    self.programs.append(program)
    lowered = jitted.lower(*args, **static)
    try:
      compiled = lowered.compile(compiler_options=self.options)
    except jax.errors.JaxRuntimeError as e:
      if "RESOURCE_EXHAUSTED" not in str(e):
        raise
      program.peak, program.error = out_of_memory(str(e))
      program.in_step = program.peak + max(0, program.held - program.argument)
      return self.check()
    measure(program, compiled, unknown_trips)
    print(f"{name}: {program.in_step / GIB:.2f} GiB in the step", file=sys.stderr, flush=True)
    self.check()
    return jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), lowered.out_info,
                        compiled.output_shardings)

  def skip(self, *names: str) -> None:
    """Programs whose arguments come from one that does not fit."""
    self.programs += [Program(n, self.limit, error=SKIPPED) for n in names]

  def check(self) -> None:
    if self.stop and not all(p.fits for p in self.programs):
      raise DoesNotFit

  def run(self, phases: tuple[str, ...] = PHASES) -> "Step":
    with jax.set_mesh(self.mesh):
      state, optimizer = abstract_state(self.c, self.loaded.config, self.mesh)
      self.hold("parameters, optimizer, head", per_chip(state))
      if assemble.loss(self.c).kl_weight:
        self.hold("reference parameters", per_chip(state.params["policy"]))
      always = dict(self.held)
      if "generation" in phases:
        self.generation(state)
      self.held = always
      if "training" in phases:
        self.training(state, optimizer)
    return self

  def generation(self, state: TrainState) -> None:
    """Decode weights, cache, then what runs on them, as Engine.run does it."""
    c, weights, key = self.c, state.params["policy"], jax.eval_shape(lambda: jax.random.key(0))
    sampling = assemble.sampling(c, self.loaded, c.rollout.temperature)
    try:
      engine = assemble.engine(c, self.loaded, self.mesh, c.rollout.max_new, weights,
                               memory=(self.limit - sum(self.held.values()), self.limit))
    except UserError as e:
      self.skip(*GENERATION)
      self.programs[-len(GENERATION) + 1].error = str(e)  # init slots
      return self.check()
    columns, requests = engine.lengths(sampling)[-1], c.rollout.prompts * c.rollout.group_size
    self.shapes |= {"slots": engine.rows, "cache columns": columns}
    waves = -(-requests // engine.rows)
    many, number = (lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)), sharding.rows(self.mesh)

    load = engine.loader(weights, c.model.dtype)
    params = self.compile("reshard", load, weights)
    if not params:
      return self.skip(*GENERATION[1:])
    self.hold("decode weights", self.programs[-1].output)
    slots = self.compile("init slots", programs.init_slots, self.loaded.config, engine.rows, columns, sampling=sampling)
    if not slots:
      return self.skip(*GENERATION[2:])
    self.hold("cache and slots", self.programs[-1].output)
    prompts = [jax.ShapeDtypeStruct(shape, jnp.int32, sharding=number)
               for shape in ((engine.prefill_rows, engine.max_prompt), (engine.prefill_rows,))]
    prefix = self.compile("prefill", programs.prefill, self.loaded.config, params, *prompts, sampling=sampling,
                          runs=-(-c.rollout.prompts // engine.prefill_rows))
    if prefix:
      self.hold("prompts' cache", self.programs[-1].output)
      keys = jax.eval_shape(lambda k: jax.random.split(k, engine.rows), key)
      row = many(engine.rows)
      self.compile("insert", programs.insert, slots, prefix, row, keys, row, row, runs=self.programs[-1].runs * waves)
    else:
      self.skip("insert")
    segments = waves * -(-c.rollout.max_new // engine.segment)
    out = self.compile("decode segment", programs.segment_program(), self.loaded.config, params, slots, steps=engine.segment,
                       sampling=sampling, runs=segments,
                       unknown_trips=engine.segment // math.gcd(engine.segment, programs.STRIDE))
    slots = out[0] if out else slots
    rule, readings = assemble.prune_rule(c), bool(c.quality.buffer)
    decide = jax.jit(lambda slots, head, tables: make_decide(head, tables, rule, True, readings)(slots), donate_argnums=0)
    self.compile("decide", decide, slots, state.params["head"], state.calibration, runs=segments)
    counts = engine.row_counts(sampling)
    if len(counts) > 1:  # a layer at a time, the old one deleted before the next
      self.compile("gather", programs.take_columns, slots.cache[0], many(counts[-2]), length=columns,
                   runs=self.loaded.config.layers * (len(counts) - 1))

  def training(self, state: TrainState, optimizer: optax.GradientTransformation) -> None:
    """Log-probs, gradients a micro-batch, the optimizer's step, as update.py does it."""
    c, model, mesh = self.c, self.loaded.config, self.mesh
    compute, loss, temperature = assemble.compute(c), assemble.loss(c), c.rollout.temperature
    rows, length = max(assemble.pack_shape(c).sizes(mesh.shape["data"] * mesh.shape["fsdp"]), key=math.prod)
    batch = abstract_batch(rows, length, len(c.prune.detect), mesh)
    self.shapes |= {"micro-batch rows": rows, "micro-batch columns": length}
    kept = c.rollout.prompts * c.rollout.group_size * (c.prune.keep if c.prune.enabled else 1.0)
    count = math.ceil(kept / rows)
    self.hold("micro-batches", count * per_chip(batch))
    self.compile("log-probs", update.batch_logprobs, model, state.params["policy"], batch, temperature=temperature,
                 compute=compute, runs=count * (2 if loss.kl_weight else 1))
    scalar = jax.ShapeDtypeStruct((), jnp.float32, sharding=sharding.replicated(mesh))
    metrics, totals = dict.fromkeys(update.METRICS, scalar), dict.fromkeys(("tokens", "head", "rows"), scalar)
    self.hold("gradients", per_chip(state.params))
    out = self.compile("update", update.accumulate, model, state.params, state.params, metrics, batch, totals, loss=loss,
                       temperature=temperature, compute=compute, runs=count)
    grads = out[0] if out else state.params
    self.compile("optimizer", update.apply, state, grads, optimizer)


# ---- what would fit ------------------------------------------------------------------------------------------


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
    if c.model.remat != "full":
      yield {"model.remat": "full"}
    if step.shapes["micro-batch rows"] > unit:
      yield {"optim.micro_tokens": max(unit, step.shapes["micro-batch rows"] // 2) * step.shapes["micro-batch columns"]}
    if c.optim.chunk_tokens > 1024:
      yield {"optim.chunk_tokens": 1024}
  for wider in (2, 4, 8):
    if unit % wider == 0 and step.loaded.config.kv_heads % (mesh.tensor * wider) == 0:
      yield {"mesh.data": 1, "mesh.fsdp": unit // wider, "mesh.tensor": mesh.tensor * wider}
  if "generation" in over and c.rollout.cache is None:
    yield {"rollout.cache": "int8"}


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


# ---- report --------------------------------------------------------------------------------------------------


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


# ---- command line --------------------------------------------------------------------------------------------


def topology_mesh(name: str, c: ConfigDict) -> tuple[Mesh, int]:
  """The config's mesh over the chips of a topology such as v5e:16x16, and bytes a chip; UserError if they do not match."""
  if importlib.util.find_spec("libtpu") is None:
    raise UserError(f'libtpu, which compiles for TPUs, is not installed: pip install "jax[tpu]=={jax.__version__}"')
  chip = name.partition(":")[0]
  if chip not in HBM:
    raise UserError(f"--topology={name}: unknown chip; write {', '.join(HBM)} and a shape, such as v5e:16x16 or v5p:4x4x4")
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


def main():
  jax.config.update("jax_platforms", "cpu")
  jax.config.update("jax_enable_compilation_cache", False)  # it holds programs for devices that are here
  c, flags = configuration.parse(sys.argv, dict.fromkeys(("topology", "json", "shape", "effort"), None) | {"suggest": "yes"})
  configuration.check(c, files=False)
  if not flags.topology:
    raise UserError("no --topology=CHIP:SHAPE given, such as v5e:16x16")
  model, source = model_shape(c.model.path, flags.shape)
  try:
    effort = float(flags.effort) if flags.effort else None
    flags.json and Path(flags.json).touch()  # found out before the compiler has worked for minutes
  except (ValueError, OSError) as e:
    raise UserError(f"{e}; --effort takes a number, --json a file in a folder that is there") from e

  def compile_with(c: ConfigDict, phases: tuple[str, ...] = PHASES, stop: bool = True) -> Step:
    mesh, limit = topology_mesh(flags.topology, c)
    return Step(c, model, mesh, limit, effort, stop).run(phases)

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
  print("\n".join(lines))
  if flags.json:
    out = {"fits": fits, "topology": flags.topology, "mesh": c.mesh.to_dict(), "model": source, "shapes": step.shapes,
           "held": step.sizes, "programs": [dataclasses.asdict(p) | {"fits": p.fits} for p in step.programs],
           "fits_with": fix and fix[0],
           "jax": jax.__version__, "command": " ".join(["python -m arrol_jax.plan", *sys.argv[1:]])}
    Path(flags.json).write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
  configuration.run(main)
