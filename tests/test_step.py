"""The training step is told once: train, bench and plan run the same programs, with the same arguments, in the same order."""

import ast
import concurrent.futures
import contextlib
import dataclasses
import inspect
from pathlib import Path
import subprocess
import sys
import threading
import time
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_rollout import GROUP, KEY, PARAMS, RULE, SAMPLING, C, engine, requests

from arrol_jax import plan, step, step_programs
from arrol_jax.engine import compile_ahead, programs
from arrol_jax.learning import head_training, update
from arrol_jax.learning.batching import PackShape
from arrol_jax.learning.losses import GRPO
from arrol_jax.models import sharding
from arrol_jax.planning import compiling
from arrol_jax.prune import Calibration
from arrol_jax.pruning import decision
from arrol_jax.types import TrainState
from configs import base

ROOT = Path(__file__).resolve().parents[1]
PROMPTS, STARTED, EXAMPLES = 5, 5 * GROUP, 32  # examples: up to the next power of two
# Where the engine and the update look each listed program up when they run it.
CALLED = {"init slots": (programs, "init_slots"), "prefill": (programs, "prefill"), "insert": (programs, "insert"),
          "decode segment": (programs, "segment"), "decide": (decision, "decide"), "gather": (programs, "take_columns"),
          "log-probs": (update, "batch_logprobs"), "update": (update, "accumulate"), "optimizer": (update, "apply"),
          "zeros": (update, "zeros"), "tables": (head_training, "update_tables"), "head norm": (update, "norm_of")}


TWICE = update.UpdateConfig(C, GRPO, update.Compute("float32", "xla", remat="none"), fresh=False)  # asks for old log-probs


def real(name):
  owner, attribute = CALLED[name]
  return getattr(owner, attribute)


@pytest.fixture(scope="module")
def one_step(mesh, head):
  """A step of 20 rollouts in 8 slots, and a state to start from."""
  optimizer = optax.sgd(1e-3)
  params = jax.tree.map(jnp.copy, {"policy": PARAMS, "head": head})
  tables = jax.tree.map(lambda x: x[None], Calibration.empty(8))
  config = step.StepConfig("float32", SAMPLING, 1.0, RULE, TWICE, PackShape(32, 128, 1), optimizer)
  with jax.set_mesh(mesh):
    return step.TrainingStep(engine(mesh), config), TrainState(params, optimizer.init(params), tables, jnp.int32(0))


@pytest.fixture(scope="module")
def listed(mesh, one_step):
  """All listed programs by their names."""
  run, state = one_step
  with jax.set_mesh(mesh):
    out = (*step_programs.generation_programs(run.engine, run.config, state, PROMPTS, GROUP),
           *step_programs.training_programs(mesh, run.config, state, STARTED, EXAMPLES))
  assert len({p.name for p in out}) == len(out)
  return {p.name: p for p in out}


def test_listed_programs_are_the_objects_that_a_step_calls(listed, one_step):
  assert set(listed) == {"reshard", *CALLED}
  for name in CALLED:
    assert listed[name].jitted is real(name), name
  run, state = one_step
  assert listed["reshard"].jitted is run.engine.loader(state.params["policy"], run.config.dtype)


def test_log_probs_are_listed_where_a_step_asks_for_them(mesh, one_step):
  """Of a policy that takes several steps, or of a reference; one that takes one is its own old policy."""
  run, state = one_step
  def runs(**changes):
    changed = dataclasses.replace(run.config, update=dataclasses.replace(TWICE, **changes))
    return {p.name: p.runs for p in step_programs.training_programs(mesh, changed, state, STARTED, EXAMPLES)}

  kl = dataclasses.replace(GRPO, kl_weight=0.1)
  once = runs()["update"]
  assert runs()["log-probs"] == runs(fresh=True, loss=kl)["log-probs"] == once and runs(loss=kl)["log-probs"] == 2 * once
  assert "log-probs" not in runs(fresh=True)


def signature(function, args, kwargs):
  """What a call gives, by parameter: shapes and dtypes of arrays, all else as it is."""
  bound = inspect.signature(function).bind(*args, **kwargs)
  bound.apply_defaults()
  say = lambda x: (np.shape(x), str(x.dtype)) if hasattr(x, "dtype") else x
  return {name: [say(x) for x in jax.tree.leaves(value)] for name, value in bound.arguments.items()}


def test_a_step_gives_its_programs_what_the_list_says(mesh, one_step, listed):
  """Every listed program runs in a step, and with the shapes and settings listed."""
  run, state = one_step
  seen = {name: [] for name in CALLED}

  def recording(name, function):
    def call(*args, **kwargs):
      seen[name].append(signature(function, args, kwargs))
      return function(*args, **kwargs)
    return call

  def roll_out(decide):
    done = run.engine.run(requests(PROMPTS), KEY, SAMPLING, decide=decide)
    for r in done:
      r.reward = float("nan") if r.pruned else float(r.request % 2)
    return step.RolledOut(done, done)

  results = {}
  with jax.set_mesh(mesh), contextlib.ExitStack() as stack:
    for name, (owner, attribute) in CALLED.items():
      stack.enter_context(mock.patch.object(owner, attribute, recording(name, real(name))))
    after, rolled, metrics = run(jax.tree.map(jnp.copy, state), roll_out, True)
  assert int(after.step) == 1 and metrics["rollouts_started"] == len(rolled.rollouts) == STARTED
  with jax.set_mesh(mesh):
    for name, program in listed.items():
      args = program.args(results)
      results[name] = program.jitted.lower(*args, **program.static).out_info
      if name != "reshard":
        assert set(program.needs) <= set(results) and signature(program.jitted, args, program.static) in seen[name], name


def test_plan_compiles_the_listed_programs():
  c = base.get_config()
  c.model.path, c.model.dtype = str(ROOT / "tests/fixtures/qwen3_tied"), "float32"
  c.rollout.update(prompts=4, group_size=4, max_prompt=16, max_new=48, segment=8, row_buckets=2, length_buckets=1)
  c.prune.detect, c.optim.micro_tokens, c.quality.hidden, c.loss.kl_weight = (16,), 512, 8, 0.1
  compiled = {}

  class Watched(compiling.Step):
    def compile(self, listed, results):
      compiled[listed.name] = listed.jitted
      self.programs.append(compiling.Program(listed.name, self.limit))
      results[listed.name] = listed.jitted.lower(*listed.args(results), **listed.static).out_info

  Watched(c, plan.model_shape(c.model.path, None)[0], sharding.make_mesh(), 1 << 40).run()
  reported = set(CALLED) - {"zeros", "tables", "head norm"}  # small ones are not
  assert set(compiled) == {"reshard", *reported} and all(compiled[name] is real(name) for name in reported)


PIECES = {"accumulate", "apply", "batch_logprobs", "fill_logprobs", "pack", "head_examples", "update_calibration", "refit_head",
          "down_sample", "make_decide", "rollout_metrics"}
GENERATION = {"init_slots", "prefill", "insert", "segment", "generate_segment", "take_columns", "take_rows"}


def names(tree: ast.AST) -> set[str]:
  """Names and attributes that a piece of source uses."""
  return ({x.id for x in ast.walk(tree) if isinstance(x, ast.Name)}
          | {x.attr for x in ast.walk(tree) if isinstance(x, ast.Attribute)})


@pytest.mark.parametrize("path, function, uses", [
  ("train.py", "main", {"TrainingStep"}), ("benchmarks/training.py", "training_step", {"TrainingStep"}),
  ("benchmarks/training.py", "bench_step", {"training_step"}),
  ("planning/compiling.py", None, {"generation_programs", "training_programs"})])
def test_nobody_else_tells_a_steps_order(path, function, uses):
  """bench_update times the update alone and is not a step."""
  tree = ast.parse((ROOT / "arrol_jax" / path).read_text())
  if function:
    tree, = (x for x in tree.body if isinstance(x, ast.FunctionDef) and x.name == function)
  used = names(tree)
  assert uses <= used and not used & (PIECES | GENERATION)
  assert "update.step" not in {ast.unparse(x) for x in ast.walk(tree) if isinstance(x, ast.Attribute)}


def quiet():
  """Waits until nothing is left of what other tests had compiled ahead, and gives Python's usual turn."""
  until = time.monotonic() + 60
  while compile_ahead.compiling() and time.monotonic() < until:
    time.sleep(0.05)
  return sys.getswitchinterval()


def test_turns_are_short_until_the_last_of_several_is_done():
  """Two that overlap: the second must not take the short turns of the first for what is usual."""
  usual, one, two = quiet(), compile_ahead.short_turns(), compile_ahead.short_turns()
  one.__enter__()
  two.__enter__()
  one.__exit__(None, None, None)
  assert sys.getswitchinterval() < usual
  two.__exit__(None, None, None)
  assert sys.getswitchinterval() == usual


@pytest.mark.parametrize("stays", [True, False])
def test_a_caller_that_leaves_ends_what_is_compiled_meanwhile(mesh, stays):
  """As where a mistake is found in the weights: programs that have not begun never do."""
  under_way, go, begun = threading.Event(), threading.Event(), []

  def program(name, needs=()):
    def args(results):
      begun.append(name)
      under_way.set()
      assert go.wait(60) and set(results) == set(needs)
      return (np.zeros(3),)
    return compile_ahead.Program(name, jax.jit(lambda x: x + 1), args, {}, needs)

  usual = quiet()
  with compile_ahead.CompilingAhead([program("first"), program("second", ("first",))], mesh) as ahead:
    assert under_way.wait(60) and sys.getswitchinterval() < usual  # others get their turn
    if stays:
      go.set()
      assert ahead.wait(lambda done: None) > 0
  go.set()
  failed = ahead.seconds.exception(60)
  assert sys.getswitchinterval() == usual
  assert (begun, ahead.done) == ((["first", "second"], 2) if stays else (["first"], 1))
  assert isinstance(failed, concurrent.futures.CancelledError) != stays


@pytest.mark.parametrize("name", ["train", "serve"])
def test_a_command_that_ends_meanwhile_does_not_wait_for_it(name):
  """Without this a mistake in the data was told, and the process went on for as long as a program takes to compile."""
  script = f"""
import time
from arrol_jax import {name}
from arrol_jax.engine import compile_ahead
from arrol_jax.models.sharding import make_mesh
from arrol_jax.types import UserError
def main():
  with compile_ahead.CompilingAhead([compile_ahead.Program("slow", None, lambda _: time.sleep(600), dict())], make_mesh()):
    raise UserError("a mistake")
{name}.main = main
{name}.command()"""
  done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=120)
  assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: a mistake\n")
