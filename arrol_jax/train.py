"""Trains a policy with online rollout pruning; `arrol-train` and `python -m arrol_jax.train` are the same.

  arrol-train --config=quickstart                                # a shipped config, into runs/quickstart
  arrol-train --config=my/run.py --workdir=DIR                   # a config of one's own; again: goes on exactly
  arrol-train --config=gsm8k_qwen3_06b --config.model.path=DIR --config.prune.keep=0.4 --config.steps=50
step.py tells what a step does; here are its prompts and rewards, evaluation, checkpoints and logs. Everything random is a
function of (seed, step), so a checkpoint is the TrainState alone and the same command on the same folder goes on exactly where it
stopped. With several processes every one of them runs this script (hosts.py); the first writes. SIGTERM, Ctrl-C and SIGHUP save
and end with status 0 (at once, while it loads and compiles); a second Ctrl-C ends at once with status 130.
"""

from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext
import dataclasses
import functools
import math
import os
import sys
import time

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from arrol_jax import assemble, assemble_state, config as configuration
from arrol_jax.data import problems, sources
from arrol_jax.engine import compile_ahead
from arrol_jax.engine.sampling import Sampling
from arrol_jax.engine.scheduler import Engine
from arrol_jax.learning import generation, resampling
from arrol_jax.learning.ahead import Ahead
from arrol_jax.learning.generation import Asked, Grading, Wanted
from arrol_jax.models.files import tokenizers
from arrol_jax.models.files.weights import Policy
from arrol_jax.rewards import Grader
from arrol_jax.running import endings, hosts, loggers, streams
from arrol_jax.running.checkpoint import Checkpoints
from arrol_jax.running.workdir import (
  Logs,
  check_can_go_on,
  check_length,
  check_workdir,
  claim,
  finished,
  hold,
  read_json,
  read_results,
  seconds_of,
  write_json,
)
from arrol_jax.step import RolledOut, TrainingStep
from arrol_jax.types import TrainState, UserError


def main():
  streams.spare()
  c, flags = configuration.parse(sys.argv, doc=__doc__)
  hosts.connect()
  hosts.together(lambda: configuration.check(c))
  hosts.together(lambda: loggers.names(c.log.backends))
  for remark in configuration.remarks(c):
    hosts.say(f"config: {remark}")
  workdir, started = flags.workdir, time.time()
  defaults = configuration.defaults()
  hosts.together(lambda: check_workdir(workdir, c, defaults))
  done = hosts.agree(hosts.together(lambda: finished(workdir, c.steps, c.stop_seconds)))
  if done:
    hosts.say(f"{workdir}: finished ({done} steps); its results are in summary.json")
    return
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
    compiling = hosts.Compiling()
    programs = stack.enter_context(compile_ahead.CompilingAhead(
      assemble.programs(c, engine, config, shapes), mesh, assemble.shelf(c, mesh)))

    # ---- weights, problems
    hosts.together(lambda: assemble.read_weights(c, loaded, mesh, training=True))
    train_prompts = assemble.prompts(c, loaded, c.data.train, split="train")
    eval_prompts = {name: assemble.prompts(c, loaded, source, c.eval.problems)
                    for name, source in sources.benchmark_names(c.data.eval).items()}
    assemble.warn(c, loaded, train_prompts)
    inputs = assemble.inputs(loaded, train_prompts, eval_prompts)
    hosts.say(f"{loaded.config.num_params() / 1e6:,.1f}M parameters, {len(train_prompts):,} problems to train on and "
              f"{sum(map(len, eval_prompts.values())):,} held out, after {time.time() - started:.0f} s")
    # Not before all that the user gave has been read: a mistake leaves the folder free.
    hashes = hosts.agree(hosts.together(lambda: claim(workdir, c, inputs, defaults) if hosts.first() else []))

    # ---- state, resume
    reference = loaded.params if config.update.loss.kl_weight else None  # updates make new arrays: these stay
    state = assemble_state.init_state(c, loaded, config.optimizer, mesh, keep_params=reference is not None)
    train_step = TrainingStep(engine, config, reference)
    grading = assemble.grading(c, loaded, grader)
    rolling = Rolling(c, engine, config.sampling, grading, train_prompts, train_step.choose)
    held_out = HeldOut(c, loaded, mesh, engine, grader, eval_prompts, workdir, rolling.make_room)
    with tqdm(total=programs.count, desc="compiling", unit="program", disable=not hosts.first()) as bar:
      took = programs.wait(lambda done: (bar.update(done - bar.n), stop.at_once and stop.check()))
    stop.at_once = False
    hosts.say(f"{programs.said()} in {took:.0f} s, ready after {time.time() - started:.0f} s")
    before = held_out(state, "eval_before") if c.eval.before else {}
    if before:
      hosts.say(f"held-out accuracy before: {summary_line(before)}")
    belongs = assemble_state.belongs(c, inputs["weights"] if loaded.config.lora else None)
    checkpoints = stack.enter_context(Checkpoints(
      workdir, c.checkpoint.keep, belongs, also=tuple(hashes), best=hosts.agree(assemble_state.scored_by(workdir))))
    start, state = checkpoints.restore(state)
    check_length(workdir, start, c.steps)
    if start:
      hosts.say(f"{workdir}: going on after step {start}")
    loaded.params = None

    def watch():
      stop.check()
      checkpoints.check()  # a save that has failed ends the run now, not when the next one is due

    engine.watch = watch
    timed = c.stop_seconds is not None or len(c.eval.at_seconds) > 0
    backends = loggers.start(c.log.backends, workdir, start, c.to_dict()) if hosts.first() else []
    logs = stack.enter_context(closing(Logs(workdir, start, backends, timed))) if hosts.first() else None
    # reward_ipw of the steps since the last checkpoint on schedule: the next one's score. SIGTERM's in between has none.
    since_saved = hosts.agree([x["reward_ipw"] for x in logs.lines if x["step"] > start - start % c.checkpoint.every]
                              if logs else None)
    earlier, spent = hosts.agree((seconds_of(logs.lines[:-1]), seconds_of(logs.lines)) if logs else None)
    if passed(c, earlier, spent):  # if it was not told to stop in the middle of that evaluation, this one is there
      held_out(state, f"eval_all_{start:04d}")
    time_is_over = lambda: c.stop_seconds is not None and spent >= c.stop_seconds

    @stack.push
    def save_before_leaving(kind, reason, *_):
      done = int(state.step)
      if kind in (hosts.Preempted, generation.Ungraded) and done:
        checkpoints.save(done, state)
        checkpoints.wait()
      if kind is hosts.Preempted and done:
        hosts.say(f"{workdir}: {reason}; step {done} is saved")
      if kind is generation.Ungraded:
        raise UserError(f"after step {done}{', which is saved' if done else ''}: {reason}; the same command goes on from there")

    # ---- loop
    to_do = range(start, start if time_is_over() else c.steps)
    bar = stack.enter_context(tqdm(to_do, initial=start, total=c.steps, desc="train", unit="step", disable=not hosts.first()))
    compiling.seconds()  # what was compiled before is no step's
    lost = []  # steps without a survivor
    for step in bar:
      pruning = c.prune.enabled and step >= c.prune.cold_start
      compiled, earlier = compiling.total, spent
      state, rolled, metrics = train_step(state, functools.partial(rolling, step), pruning,
                                          assemble.decay(c, step, spent))
      spent += max(0.0, metrics["sec_step"] - (compiling.total - compiled))
      spent = hosts.agree(spent) if timed else spent  # all must end at one step
      last = step + 1 == c.steps or time_is_over()
      line = {"step": step + 1} | metrics | {"sec_compile": compiling.seconds(), "sec_total": spent}
      since_saved.append(line["reward_ipw"])
      if not line["rollouts_kept"]:
        lost.append(step + 1)
        if len(lost) == 1:
          hosts.warn(f"step {lost[0]}: pruning left none of its {line['rollouts_started']} rollouts, so there was nothing to "
                     "learn from; see prune.keep and prune.p_min")
      finite = all(math.isfinite(line[k]) for k in ("policy_loss", "head_loss", "grad_norm", "head_norm"))
      try:
        if finite and passed(c, earlier, spent):
          line |= held_out_line(held_out(state, f"eval_all_{step + 1:04d}"))
        elif finite and c.eval.every and ((step + 1) % c.eval.every == 0 or last and c.checkpoint.best):
          line |= held_out_line(held_out(state, f"eval_{step + 1:04d}", c.eval.subset))
      finally:  # a run that is told to stop in the middle of it has made this step all the same
        if logs:
          logs.write(line, rolled.rollouts, c.log.rollouts)
      if not finite:
        checkpoints.wait()
        raise UserError(f"step {step + 1}: the loss or gradient is not finite; the run stopped before saving it (last "
                        f"checkpoint: step {checkpoints.latest() or 0}). Try a smaller optim.lr")
      bar.set_postfix(reward=f"{line['reward']:.3f}", kept=f"{line['rollouts_kept']}/{line['rollouts_started']}",
                      tok_s=f"{line['tokens_generated'] / line['sec_generate']:,.0f}")
      checkpoints.check()
      due = (step + 1) % c.checkpoint.every == 0 or (c.checkpoint.last and last)
      score = sum(since_saved) / len(since_saved)
      if c.checkpoint.best:  # an evaluation of all problems, after eval.at_seconds, is not to be compared with those of a part
        score = None if passed(c, earlier, spent) else line.get(c.checkpoint.best)
      if due or (c.checkpoint.best and score is not None):
        if logs:
          logs.sync()
        checkpoints.save(step + 1, state, score=score)
        since_saved.clear()
      if last:
        break
    bar.close()

    # ---- after
    done = int(state.step)
    best = checkpoints.best() if c.checkpoint.best else None
    if best not in (None, done):
      checkpoints.wait()
      _, state = checkpoints.restore(state, best)
      hosts.say(f"step {best} has the best {c.checkpoint.best}: evaluated and exported")
    if c.checkpoint.export:  # before what a reward function may still end
      assemble_state.export(c, loaded, state, workdir)
    after = held_out(state, "eval_after")
    checkpoints.wait()  # a run whose last step is not on disk is not done
    if logs:
      logs.finish(c, before, after, time.time() - started, best)
    hosts.gather(None)  # the others wait for what the first writes
    if after:
      hosts.say(f"held-out accuracy after:  {summary_line(after)}")
    if len(lost) > 1:
      hosts.warn(f"{len(lost)} steps had no survivors (rollouts_kept in metrics.jsonl), steps {lost[0]} to {lost[-1]}")
    hosts.say(f"{workdir}: {done} steps done; metrics.jsonl, rollouts.jsonl and summary.json are there")


class Rolling:
  """What a step rolls out: prompts that are a function of (seed, step), and their rollouts."""

  def __init__(self, c, engine: Engine, sampling: Sampling, grading: Grading, prompts: list, choose: Callable):
    """prompts: all problems to train on; choose: TrainingStep.choose."""
    self.c, self.engine, self.sampling, self.grading, self.prompts, self.choose = c, engine, sampling, grading, prompts, choose
    self.asked = Asked(c.rollout.group_size, c.rollout.temperature)
    self.ahead = None
    if c.rollout.ahead:
      self.ahead = Ahead(engine, sampling, assemble.key(c, assemble.TRAIN), self.wanted, c.steps, c.rollout.ahead)

  def __call__(self, step: int, decide: Callable | None) -> RolledOut:
    """The rollouts of `step`, those to learn from, and seconds waited for grades."""
    count, rounds, waited, chosen = self.c.rollout.prompts, 1, [], []

    def one(n: int, count: int) -> list:
      batch, known = self.batch(step, n, count)
      key = assemble.key(self.c, assemble.TRAIN, step)
      done, seconds = generation.generate(self.engine, batch, self.asked, key, self.sampling, self.grading, decide)
      waited.append(seconds)
      chosen.extend(known)
      return done

    if self.ahead:
      rollouts, *waited, chosen = self.ahead.generate(step, decide)
      learned = rollouts
    elif self.c.rollout.resampling == 1:
      learned = rollouts = one(0, count)
    else:
      learned, rollouts, rounds = resampling.until_mixed(one, count, self.c.rollout.resampling)
    self.engine.watch()
    return RolledOut(rollouts, learned, rounds, sum(waited), tuple(chosen))

  def batch(self, step: int, n: int, count: int) -> tuple[dict, tuple]:
    """A step's n-th batch of `count` prompts, numbered, and what was known of them where they were chosen."""
    # With several rounds allowed each step owns so many batches of the data, used or not: resuming needs no history.
    size, taken, chosen = self.c.rollout.prompts, assemble.candidates(self.c), ()
    batch = problems.batch_at(self.prompts, step * self.c.rollout.resampling + n, self.c.seed, taken)
    if taken > size:
      batch, *chosen = self.choose(batch, count, assemble.key(self.c, assemble.CHOICE, step))
    return dict(enumerate(batch[:count], n * size)), tuple(chosen)

  def wanted(self, step: int) -> Wanted:
    """What a step wants rolled out, where steps run ahead."""
    size = self.c.rollout.prompts
    batch, chosen = self.batch(step, 0, size)
    first = step * size * self.asked.samples
    return Wanted(batch, self.asked, self.c.rollout.max_new, self.grading, first, chosen=chosen)

  def make_room(self) -> None:
    """Gives up what runs ahead: others need its slots' memory."""
    if self.ahead:
      self.ahead.drop()


@dataclasses.dataclass
class HeldOut:
  """Evaluations on held-out problems, each kept in the run's folder and made once. prompts: by source of data.eval; make_room:
  called before an engine of its own is made."""
  c: ConfigDict
  loaded: Policy
  mesh: jax.sharding.Mesh
  engine: Engine
  grader: Grader
  prompts: dict[str, list]
  workdir: str
  make_room: Callable

  def __call__(self, state: TrainState, name: str, most: int | None = None) -> dict:
    """Results by source, on `most` problems of each; kept in NAME.json. {} where nothing is held out."""
    path = f"{self.workdir}/{name}.json"
    if not self.prompts:
      return {}
    if not hosts.agree(hosts.together(lambda: hosts.first() and os.path.exists(path) and not all_failed(path))):
      results = self.measured(state, name.replace("_", " "), most)
      if hosts.first():
        write_json(path, results)
    return hosts.agree(hosts.together(lambda: read_results(path, self.prompts) if hosts.first() else None))

  def measured(self, state: TrainState, name: str, most: int | None) -> dict:
    c = self.c
    self.make_room()
    same = c.eval.max_new in (0, c.rollout.max_new)  # then the training's programs serve
    engine = self.engine if same else assemble.eval_engine(c, self.loaded, self.mesh, state.policy)
    engine.watch = self.engine.watch
    engine.load(state.policy, c.model.dtype)
    accuracy = lambda c, prompts: assemble.accuracy(
      c, self.loaded, engine, prompts, self.grader, name, state.params["head"], state.calibration)
    results = {source: accuracy(c, problems.spaced(prompts, most)) for source, prompts in self.prompts.items()}
    if c.eval.sampled and most is None:
      for source, prompts in self.prompts.items():
        results[source]["sampled"] = accuracy(assemble.sampled(c), prompts)
    return results


def all_failed(path: str) -> bool:
  """Whether an evaluation's file is of a reward function that failed on every answer: then its mending calls for another."""
  results = read_json(path).values()
  return bool(results) and all(isinstance(x, dict) and x.get("ungraded") == 1 for x in results)


def held_out_line(results: dict) -> dict:
  """What a step's line says of its evaluation: accuracy over all problems, and by source where there are several."""
  count = sum(x["problems"] for x in results.values())
  out = {"held_out_accuracy": sum(x["accuracy"] * x["problems"] for x in results.values()) / count}
  return out | ({f"held_out_accuracy/{name}": x["accuracy"] for name, x in results.items()} if len(results) > 1 else {})


def passed(c, earlier: float, spent: float) -> bool:
  """Whether one of eval.at_seconds lies between a step's begin and its end."""
  return any(earlier < t <= spent for t in c.eval.at_seconds)


def summary_line(result: dict) -> str:
  return ", ".join(f"{k} {100 * v['accuracy']:.1f}% ({v['problems']} problems)" for k, v in result.items())


def command() -> None:
  """The whole process. A run that ends before its programs are compiled does not wait for those that nobody will call."""
  hosts.process(lambda: configuration.run(main), compile_ahead.compiling)


if __name__ == "__main__":
  command()
