"""A run's course: what its steps roll out, what each leaves (a line, evaluations, a checkpoint), and how it ends.

train.py makes all that stands here from the config and calls it. Everything random is a function of (seed, step), so a run that
goes on from a checkpoint takes the course that it would have taken. Left out: what a step does (step.py), the run's folder
(running/workdir.py).
"""

from collections.abc import Callable
import dataclasses
import functools
import math
import os
import time

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from arrol_jax import assemble, assemble_state
from arrol_jax.data import problems
from arrol_jax.engine.sampling import Sampling
from arrol_jax.engine.scheduler import Engine
from arrol_jax.learning import generation, resampling
from arrol_jax.learning.ahead import Ahead
from arrol_jax.learning.generation import Asked, Grading, Wanted
from arrol_jax.models.files.weights import Policy
from arrol_jax.rewards import Grader
from arrol_jax.running import hosts
from arrol_jax.running.checkpoint import Checkpoints, Damaged
from arrol_jax.running.evaluated import held_out_line, read_results
from arrol_jax.running.json_files import read_json, write_json
from arrol_jax.running.workdir import Logs, seconds_of
from arrol_jax.step import RolledOut, TrainingStep
from arrol_jax.types import TrainState, UserError


class Course:
  """A run's steps, from the one that `state` has taken last to the end. A context: left by a signal, or because the reward
  function is broken, it saves what is done and says so."""

  def __init__(self, rolling: "Rolling", held_out: "HeldOut", train_step: TrainingStep, checkpoints: Checkpoints,
               logs: Logs | None, state: TrainState):
    """logs: None in all processes but the first."""
    self.rolling, self.held_out, self.train_step = rolling, held_out, train_step
    self.checkpoints, self.logs, self.state = checkpoints, logs, state
    self.c, self.workdir, self.start = held_out.c, held_out.workdir, int(state.step)
    self.lost = []  # steps without a survivor
    self.score = None  # of the last step's evaluation, where checkpoint.best goes by it
    self.compiling = hosts.Compiling()
    # reward_ipw of the steps since the last checkpoint on schedule: the next one's score. SIGTERM's in between has none.
    self.since_saved = hosts.agree([x["reward_ipw"] for x in logs.lines
                                    if x["step"] > self.start - self.start % self.c.checkpoint.every] if logs else None)
    # Seconds of steps, and those that had been spent before the last one.
    self.earlier, self.spent = hosts.agree((seconds_of(logs.lines[:-1]), seconds_of(logs.lines)) if logs else None)

  def __enter__(self):
    return self

  def __exit__(self, kind, reason, _):
    done = int(self.state.step)
    if kind in (hosts.Preempted, generation.Ungraded) and done:
      rated = self.due(done) and self.since_saved and not self.c.checkpoint.best
      self.checkpoints.save(done, self.state, self.rating() if rated else None)
      self.checkpoints.wait()
      done = self.checkpoints.latest()  # past the state's where the best one is being evaluated
    if kind is hosts.Preempted and done:
      hosts.say(f"{self.workdir}: {reason}; step {done} is saved")
    if kind is generation.Ungraded:
      raise UserError(f"after step {done}{', which is saved' if done else ''}: {reason}; the same command goes on from there")

  def catch_up(self) -> None:
    """The evaluations that the last step was due, in case the run was told to stop in the middle of them: its line and its
    checkpoint get what they lack, or were given in another way."""
    line = self.evaluated(self.start) if self.start else {}
    if self.score is not None:
      self.checkpoints.rate(self.start, self.score)
    if self.logs:
      self.logs.amend(self.start, line)

  def run(self) -> None:
    """All steps that are left."""
    c = self.c
    steps = range(self.start, self.start if self.time_is_over() else c.steps)
    self.compiling.seconds()  # what was compiled before is no step's
    with tqdm(steps, initial=self.start, total=c.steps, desc="train", unit="step", disable=not hosts.first()) as bar:
      for step in bar:
        line = self.step(step)
        bar.set_postfix(reward=f"{line['reward']:.3f}", kept=f"{line['rollouts_kept']}/{line['rollouts_started']}",
                        tok_s=f"{line['tokens_generated'] / line['sec_generate']:,.0f}")
        self.save(line)
        if self.last(step + 1):
          break

  def step(self, step: int) -> dict:
    """One step and the evaluation that is due behind it; its line of metrics.jsonl. UserError where the loss is not finite."""
    c, compiled = self.c, self.compiling.total
    pruning = c.prune.enabled and step >= c.prune.cold_start
    self.state, rolled, metrics = self.train_step(self.state, functools.partial(self.rolling, step), pruning,
                                                  assemble.decay(c, step, self.spent))
    self.earlier = self.spent
    self.spent += max(0.0, metrics["sec_step"] - (self.compiling.total - compiled))
    self.spent = hosts.agree(self.spent) if timed(c) else self.spent  # all must end at one step
    line = {"step": step + 1} | metrics | {"sec_compile": self.compiling.seconds(), "sec_total": self.spent}
    self.since_saved.append(line["reward_ipw"])
    if not line["rollouts_kept"]:
      self.lost.append(step + 1)
      if len(self.lost) == 1:
        hosts.warn(f"step {step + 1}: pruning left none of its {line['rollouts_started']} rollouts, so there was nothing to "
                   "learn from; see prune.keep and prune.p_min")
    finite = all(math.isfinite(line[k]) for k in ("policy_loss", "head_loss", "grad_norm", "head_norm"))
    try:
      line |= self.evaluated(step + 1) if finite else {}
    finally:  # a run that is told to stop in the middle of it has made this step all the same
      if self.logs:
        self.logs.write(line, rolled.rollouts, c.log.rollouts)
    if not finite:
      self.checkpoints.wait()
      raise UserError(f"step {step + 1}: the loss or gradient is not finite; the run stopped before saving it (last checkpoint: "
                      f"step {self.checkpoints.latest() or 0}). Try a smaller optim.lr, in another --workdir")
    return line

  def evaluated(self, done: int) -> dict:
    """What the line of step `done` says of the evaluations that are due behind it, of all problems where both are; {} where none
    is. The score is always of the subset."""
    c, line, self.score = self.c, {}, None
    if c.eval.every and (done % c.eval.every == 0 or self.last(done) and c.checkpoint.best):
      line = held_out_line(self.held_out(self.state, f"eval_{done:04d}", c.eval.subset))
      self.score = line[c.checkpoint.best] if c.checkpoint.best else None
    if self.passed():
      line = held_out_line(self.held_out(self.state, f"eval_all_{done:04d}"))
    return line

  def rating(self) -> float | None:
    """What the checkpoint behind the last step is rated by, after one step at least since the last on schedule."""
    return self.score if self.c.checkpoint.best else sum(self.since_saved) / len(self.since_saved)

  def save(self, line: dict) -> None:
    """A checkpoint where one is due behind the step of `line`."""
    c, done = self.c, line["step"]
    self.checkpoints.check()
    score = self.rating()
    if self.due(done) or (c.checkpoint.best and score is not None):
      if self.logs:
        self.logs.sync()
      self.checkpoints.save(done, self.state, score=score)
      self.since_saved.clear()

  def finish(self, before: dict, started: float) -> None:
    """Exports and evaluates the policy, the best where the config asks for it, and writes summary.json. before: its accuracy
    before training; started: time.time() of the command."""
    c, done = self.c, int(self.state.step)
    best = self.take_best() if c.checkpoint.best else None
    if c.checkpoint.export:  # before what a reward function may still end
      assemble_state.export(c, self.held_out.loaded, self.state, self.workdir)
    after = self.held_out(self.state, "eval_after")
    self.checkpoints.wait()  # a run whose last step is not on disk is not done
    if self.logs:
      self.logs.finish(c, before, after, time.time() - started, best)
    hosts.gather(None)  # the others wait for what the first writes
    if after:
      hosts.say(f"held-out accuracy after:  {summary_line(after)}")
    if len(self.lost) > 1:
      hosts.warn(f"{len(self.lost)} steps had no survivors (rollouts_kept in metrics.jsonl), steps {self.lost[0]} to "
                 f"{self.lost[-1]}")
    hosts.say(f"{self.workdir}: {done} steps done; metrics.jsonl, rollouts.jsonl and summary.json are there")
    if not self.rolling.grading.graded:
      self.rolling.grading.check(0)  # a short run of which no answer at all could be graded has learned nothing

  def take_best(self) -> int | None:
    """The step of the checkpoint with the best score that can be read, whose state this takes; None where none has one."""
    done = int(self.state.step)
    while (best := self.checkpoints.best()) not in (None, done):
      self.checkpoints.wait()
      try:
        _, self.state = self.checkpoints.restore(self.state, best)
      except Damaged as e:
        hosts.say(f"{e}; the next best counts")
        continue
      hosts.say(f"step {best} has the best {self.c.checkpoint.best}: evaluated and exported")
      break
    return best

  def due(self, done: int) -> bool:
    """Whether a checkpoint is due behind step `done`."""
    return done % self.c.checkpoint.every == 0 or (self.c.checkpoint.last and self.last(done))

  def last(self, done: int) -> bool:
    """Whether the run ends behind step `done`."""
    return done == self.c.steps or self.time_is_over()

  def time_is_over(self) -> bool:
    return self.c.stop_seconds is not None and self.spent >= self.c.stop_seconds

  def passed(self) -> bool:
    """Whether one of eval.at_seconds lies within the last step."""
    return any(self.earlier < t <= self.spent for t in self.c.eval.at_seconds)


def timed(c) -> bool:
  """Whether the course depends on seconds of steps."""
  return c.stop_seconds is not None or len(c.eval.at_seconds) > 0


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
    number = step * self.c.rollout.resampling + n
    batch = problems.batch_at(self.prompts, number, self.c.seed, taken)
    if taken > size:
      batch, *chosen = self.choose(batch, count, assemble.key(self.c, assemble.CHOICE, number))
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
    there = hosts.agree(hosts.together(lambda: hosts.first() and os.path.exists(path) and not all_failed(path)))
    if not there:
      results = self.measured(state, name.replace("_", " "), most)
      if hosts.first():
        write_json(path, results)
    results = hosts.agree(hosts.together(lambda: read_results(path, self.prompts) if hosts.first() else None))
    share = max(x.get("ungraded", 0) for x in results.values())
    if there and share:
      hosts.warn(f"{path}: {100 * share:.2g}% of its answers could not be graded and count as wrong; where that has been mended "
                 "since, delete it to have it made again")
    return results

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


def summary_line(result: dict) -> str:
  return ", ".join(f"{k} {100 * v['accuracy']:.1f}% ({v['problems']} problems)" for k, v in result.items())
