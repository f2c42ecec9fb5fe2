"""A step's programs compiled for chips that are not there: what each needs beside what is held meanwhile.

Nothing is allocated and no weights are read: arguments are shapes with shardings (step.py lists them).
"""

import dataclasses
import re
import sys

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from arrol_jax import assemble, step_programs
from arrol_jax.assemble_state import abstract_state, per_chip, reference
from arrol_jax.models import transformer
from arrol_jax.models.files.weights import Policy
from arrol_jax.models.transformer import PolicyConfig
from arrol_jax.planning import hlo
from arrol_jax.planning.chips import Rates
from arrol_jax.types import TrainState, UserError

PHASES = "generation", "training"
GENERATION = ("reshard", "prefill", "init slots", "insert", "decode segment", "decide", "gather")
HELD = {"reshard": "decode weights", "init slots": "cache and slots", "prefill": "prompts' cache"}  # results that stay
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
  seconds: float = 0.0  # operations one after another at the chip's rates (hlo.roofline), collectives left out
  error: str = ""

  @property
  def fits(self) -> bool:
    return not self.error and max(self.in_step, self.peak) <= self.limit


def out_of_memory(message: str) -> tuple[int, str]:
  """Bytes that a program would have used, from the compiler's RESOURCE_EXHAUSTED message, and what to say."""
  found = (re.search(r"[Uu]sed ([\d.]+)([KMGT]?) of ([\d.]+[KMGT]?) hbm", message) or
           re.search(r"\(([\d.]+)([KMGT]?)\) exceeds available HBM \(([\d.]+[KMGT]?)\)", message))
  if not found:
    return 0, "the compiler ran out of the chip's memory: " + " ".join(message.split())[:200]
  used, unit, limit = found.groups()
  return int(float(used) * 1024 ** " KMGT".index(unit or " ")), f"the compiler needs {used}{unit} of {limit}"


def measure(program: Program, compiled, unknown_trips: int, rates: Rates | None = None) -> None:
  """Fills in what the compiler says of the program and what its text adds up to, seconds where a chip's rates are given."""
  memory, cost, module = compiled.memory_analysis(), compiled.cost_analysis(), hlo.parse(compiled.as_text())
  program.argument, program.output = memory.argument_size_in_bytes, memory.output_size_in_bytes
  program.alias, program.temp = memory.alias_size_in_bytes, memory.temp_size_in_bytes
  fresh = program.output - program.alias + program.temp
  program.peak, program.in_step = program.argument + fresh, max(program.held, program.argument) + fresh
  count = hlo.trips(module, unknown_trips)
  program.flops, program.traffic = hlo.flops(module, count), hlo.traffic(module, count)
  program.flops_once, program.traffic_once = cost.get("flops", 0.0), cost.get("bytes accessed", 0.0)
  program.collectives = hlo.collective_counts(module, count)
  program.seconds = hlo.roofline(module, count, rates.flops, rates.memory) if rates else 0.0


class DoesNotFit(Exception):
  """A program does not fit, and nobody wants to know about the others."""


class Step:
  """The programs of one step, compiled one after another; `held` is what lies on each chip between them.

  stop: `run` raises DoesNotFit at the first program that does not fit. rates: the chip's, for programs' seconds.
  """

  def __init__(self, c: ConfigDict, model: PolicyConfig, mesh: Mesh, limit: int, effort: float | None = None,
               stop: bool = False, rates: Rates | None = None):
    self.c, self.mesh, self.limit, self.stop, self.rates = c, mesh, limit, stop, rates
    model = dataclasses.replace(model, lora=assemble.lora(c))
    self.loaded = Policy(model, transformer.abstract_params(model), None, (model.vocab - 1,), 0)
    self.options = None if effort is None else {"exec_time_optimization_effort": effort}
    self.programs: list[Program] = []
    self.held: dict[str, int] = {}
    self.sizes: dict[str, int] = {}  # everything that was ever held
    self.shapes: dict[str, int] = {}
    self.row_counts: list[int] = []  # that the engine compiles
    self.kernels = mesh.devices.flat[0].platform == "tpu" and c.model.attention in ("auto", "splash")

  def hold(self, name: str, size: int) -> None:
    self.held[name] = self.sizes[name] = size

  def compile(self, listed: step_programs.Program, results: dict) -> None:
    """Compiles a listed program beside what is held; adds its result as shapes with shardings to `results` where it fits."""
    name, args = listed.name, listed.args(results)
    program = Program(name, self.limit, held=sum(self.held.values()), runs=listed.runs, argument=per_chip(args))
    self.programs.append(program)
    lowered = listed.jitted.lower(*args, **listed.static)
    try:
      compiled = lowered.compile(compiler_options=self.options)
    except jax.errors.JaxRuntimeError as e:
      if "RESOURCE_EXHAUSTED" not in str(e):
        raise
      program.peak, program.error = out_of_memory(str(e))
      program.in_step = program.peak + max(0, program.held - program.argument)
      return self.check()
    measure(program, compiled, listed.unknown_trips, self.rates)
    print(f"{name}: {program.in_step / GIB:.2f} GiB in the step", file=sys.stderr, flush=True)
    self.check()
    results[name] = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), lowered.out_info,
                                 compiled.output_shardings)

  def quietly(self, listed: step_programs.Program, results: dict):
    """A small program's results as shapes with shardings."""
    lowered = listed.jitted.lower(*listed.args(results), **listed.static)
    compiled = lowered.compile(compiler_options=self.options)
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
      state = abstract_state(self.c, self.loaded.config, self.mesh)
      self.hold("parameters, optimizer, head", per_chip(state.changing))
      if state.base is not None:
        self.hold("frozen weights", per_chip(state.base))
      elif reference(self.c, state):
        self.hold("reference parameters", reference(self.c, state))
      always = dict(self.held)
      if "generation" in phases:
        self.generation(state)
      ahead = (HELD["init slots"], HELD["prefill"]) if self.c.rollout.ahead else ()  # stay with the rollouts that are under way
      self.held = always | {name: size for name, size in self.held.items() if name in ahead}
      if "training" in phases:
        self.training(state)
    return self

  def generation(self, state: TrainState) -> None:
    """Decode weights, cache, then what runs on them, as Engine.run does it."""
    c, config = self.c, assemble.step_config(self.c, self.loaded)
    try:
      engine = assemble.engine(c, self.loaded, self.mesh, c.rollout.max_new, state.policy,
                               memory=(self.limit - sum(self.held.values()), self.limit))
    except UserError as e:
      self.skip(*GENERATION)
      next(p for p in self.programs if p.name == "init slots").error = str(e)
      return self.check()
    self.row_counts = engine.row_counts(config.sampling)
    self.shapes |= {"slots": engine.rows, "cache columns": engine.lengths(config.sampling)[-1]}
    self.compile_all(step_programs.generation_programs(engine, config, state, c.rollout.prompts, c.rollout.group_size))

  def compile_all(self, listed: list[step_programs.Program]) -> None:
    """Programs in their order; one that needs what did not fit is skipped, and small ones are not reported."""
    results = {}
    for program in listed:
      if program.small:
        results[program.name] = self.quietly(program, results)
      elif all(name in results for name in program.needs):
        self.compile(program, results)
        if program.name in HELD and program.name in results:
          self.hold(HELD[program.name], self.programs[-1].output)
      else:
        self.skip(program.name)

  def training(self, state: TrainState) -> None:
    """Log-probs, gradients a micro-batch, the optimizer's step."""
    c, config = self.c, assemble.step_config(self.c, self.loaded)
    started = c.rollout.prompts * c.rollout.group_size
    kept = started * (c.prune.keep if c.prune.enabled else 1.0)
    listed = step_programs.training_programs(self.mesh, config, state, kept, started)
    update = next(p for p in listed if p.name == "update")
    batch = update.args({"zeros": ((), ())})[4]
    self.shapes |= {"micro-batch tokens": batch.tokens.size, "micro-batch rows": batch.response_mask.shape[0],
                    "micro-batch columns": batch.response_mask.shape[1]}
    self.hold("micro-batches", update.runs * per_chip(batch))
    self.hold("gradients", per_chip(state.params["policy"]))
    self.compile_all(listed)
