"""Trains a policy with online rollout pruning; `arrol-train` and `python -m arrol_jax.train` are the same.

  arrol-train --config=quickstart                                # a shipped config, into runs/quickstart
  arrol-train --config=my/run.py --workdir=DIR                   # a config of one's own; again: goes on exactly
  arrol-train --config=gsm8k_qwen3_06b --config.model.path=DIR --config.prune.keep=0.4 --config.steps=50
Here all that a run needs is made, from the config to the first step; course.py tells what its steps roll out and leave, step.py
what one does. Everything random is a function of (seed, step), so a checkpoint is the TrainState alone and the same command on
the same folder goes on exactly where it stopped. With several processes every one of them runs this script (hosts.py); the first
writes. SIGTERM, Ctrl-C and SIGHUP save and end with status 0 (at once, while it loads and compiles); a second Ctrl-C ends at once
with status 130.
"""

from contextlib import ExitStack, closing, nullcontext
import sys
import time

import jax
from tqdm import tqdm

from arrol_jax import assemble, assemble_state, config as configuration
from arrol_jax.course import Course, HeldOut, Rolling, summary_line, timed
from arrol_jax.data import sources
from arrol_jax.engine import compile_ahead
from arrol_jax.models.files import tokenizers
from arrol_jax.preflight import remarks
from arrol_jax.running import endings, hosts, loggers, streams
from arrol_jax.running.checkpoint import Checkpoints
from arrol_jax.running.workdir import Logs, check_can_go_on, check_length, check_workdir, claim, finished, hold
from arrol_jax.step import TrainingStep


def main():
  streams.spare()
  c, flags = configuration.parse(sys.argv, doc=__doc__)
  hosts.connect()
  hosts.together(lambda: configuration.check(c))
  hosts.together(lambda: loggers.names(c.log.backends))
  for remark in remarks.of(c):
    hosts.say(f"config: {remark}")
  workdir, started = flags.workdir, time.time()
  defaults = configuration.defaults()
  hosts.together(lambda: check_workdir(workdir, c, defaults))
  done = hosts.agree(hosts.together(lambda: finished(workdir, c.steps, c.stop_seconds)))
  if done:
    hosts.say(f"{workdir}: finished ({done} steps); its results are in summary.json")
    return
  sources.import_early(c.data.train, c.data.eval)
  tokenizers.import_early()  # while JAX looks for its devices
  lock = hosts.together(lambda: hold(workdir) if hosts.first() else nullcontext())

  # ---- mesh, model, data
  with lock, jax.set_mesh(mesh := assemble.make_mesh(c)), assemble.grader(c) as grader, ExitStack() as stack:
    stack.enter_context(endings.naming(workdir))
    hosts.together(lambda: check_can_go_on(workdir))
    stop = stack.enter_context(hosts.Watch(at_once=not hosts.several()))
    hosts.wake_devices()
    hosts.say(f"{jax.device_count()} x {jax.devices()[0].device_kind} after {time.time() - started:.0f} s; "
              f"loading {c.model.path}")
    loaded = hosts.together(lambda: assemble.opened(c, training=True))
    hosts.together(lambda: assemble_state.check_export(c, workdir, loaded.tokenizer))
    config = assemble.step_config(c, loaded)

    # ---- programs need shapes alone: they are compiled while weights and problems are read
    shapes = assemble_state.abstract_state(c, loaded.config, mesh)
    to_come = assemble_state.per_chip(shapes) + assemble_state.reference(c, shapes)
    engine = hosts.together(lambda: assemble.engine(c, loaded, mesh, c.rollout.max_new, shapes.policy, to_come=to_come))
    engine.watch = stop.check
    programs = stack.enter_context(compile_ahead.CompilingAhead(
      assemble.programs(c, engine, config, shapes), mesh, assemble.shelf(c, mesh)))

    # ---- weights, problems
    hosts.together(lambda: assemble.read_weights(c, loaded, mesh, training=True))
    train_prompts = assemble.prompts(c, loaded, c.data.train, split="train")
    eval_prompts = {name: assemble.prompts(c, loaded, source, c.eval.problems)
                    for name, source in sources.benchmark_names(c.data.eval).items()}
    assemble.warn(c, loaded, train_prompts)
    inputs = assemble.inputs(c, loaded, train_prompts, eval_prompts)
    hosts.say(f"{loaded.config.num_params() / 1e6:,.1f}M parameters, {len(train_prompts):,} problems to train on and "
              f"{sum(map(len, eval_prompts.values())):,} held out, after {time.time() - started:.0f} s")
    # Not before all that the user gave has been read: a mistake leaves the folder free.
    hashes = hosts.agree(hosts.together(lambda: claim(workdir, c, inputs, defaults) if hosts.first() else []))
    scores = hosts.agree(hosts.together(lambda: assemble_state.scored_by(workdir) if hosts.first() else None))

    # ---- state, resume
    reference = loaded.params if config.update.loss.kl_weight else None  # updates make new arrays: these stay
    state = assemble_state.init_state(c, loaded, config.optimizer, mesh, keep_params=reference is not None)
    train_step = TrainingStep(engine, config, reference)
    rolling = Rolling(c, engine, config.sampling, assemble.grading(c, loaded, grader), train_prompts, train_step.choose)
    held_out = HeldOut(c, loaded, mesh, engine, grader, eval_prompts, workdir, rolling.make_room)
    with tqdm(total=programs.count, desc="compiling", unit="program", disable=not hosts.first()) as bar:
      took = programs.wait(lambda done: (bar.update(done - bar.n), stop.at_once and stop.check()))
    stop.at_once = False
    hosts.say(f"{programs.said()} in {took:.0f} s, ready after {time.time() - started:.0f} s")
    before = held_out(state, "eval_before") if c.eval.before else {}
    if before:
      hosts.say(f"held-out accuracy before: {summary_line(before)}")
    belongs = assemble_state.belongs(c, inputs["weights"] if loaded.config.lora else None)
    checkpoints = stack.enter_context(Checkpoints(workdir, c.checkpoint.keep, belongs, also=tuple(hashes), best=scores))
    start, state = checkpoints.restore(state)
    check_length(workdir, start, c.steps)
    if start:
      hosts.say(f"{workdir}: going on after step {start}")
    loaded.params = None

    def watch():
      stop.check()
      checkpoints.check()  # a save that has failed ends the run now, not when the next one is due

    engine.watch = watch
    backends = loggers.start(c.log.backends, workdir, start, c.to_dict()) if hosts.first() else []
    logs = stack.enter_context(closing(Logs(workdir, start, backends, timed(c)))) if hosts.first() else None

    # ---- steps, from here to the end
    course = Course(rolling, held_out, train_step, checkpoints, logs, state)
    del state  # the course has it: a second hold would keep what steps replace
    with course:
      course.catch_up()
      course.run()
      course.finish(before, started)


def command() -> None:
  """The whole process. A run that ends before its programs are compiled does not wait for those that nobody will call."""
  hosts.process(lambda: configuration.run(main), compile_ahead.compiling)


if __name__ == "__main__":
  command()
