"""Trains a policy with online rollout pruning: python -m arrol_jax.train --config=configs/NAME.py [--workdir=DIR]

One step: (1) roll out G responses to each prompt, pruning at the detection length by the quality head's posterior;
(2) grade the survivors while others decode; (3) log-probs, GRPO/DAPO loss and head loss in one optax step;
(4) add the survivors' scores and rewards to the calibration table. Everything random is a function of (seed, step), so a
checkpoint is the TrainState alone and the same command on the same folder goes on exactly where it stopped.
"""

from contextlib import ExitStack, closing
import dataclasses
import json
import math
import os
import sys
import time

import jax
import numpy as np
from tqdm import tqdm

from arrol_jax import assemble, config as configuration, data, rollout, update
from arrol_jax.checkpoint import Checkpoints
from arrol_jax.metrics import rollout_metrics
from arrol_jax.rewards import Grader
from arrol_jax.types import UserError


def main():
  c, flags = configuration.parse(sys.argv)
  configuration.check(c)
  workdir, started = flags.workdir, time.time()
  check_workdir(workdir, c)
  done = read_json(f"{workdir}/summary.json")["steps"] if os.path.exists(f"{workdir}/summary.json") else 0
  if done >= c.steps:
    print(f"{workdir}: finished ({done} steps); its results are in summary.json")
    return

  # ---- mesh, model, data
  mesh = assemble.make_mesh(c)
  with jax.set_mesh(mesh), Grader(c.reward.workers, c.reward.pattern, c.reward.timeout) as grader, ExitStack() as stack:
    loaded = assemble.load(c, mesh)
    train_prompts = assemble.prompts(c, loaded, c.data.train)
    eval_prompts = assemble.prompts(c, loaded, c.data.eval, c.eval.problems) if c.data.eval else []
    loss, compute, rule = assemble.loss(c), assemble.compute(c), assemble.prune_rule(c)
    engine = assemble.engine(c, loaded.config, mesh, c.rollout.max_new)
    sampling = assemble.sampling(c, loaded, c.rollout.temperature)
    claim(workdir, c)  # not before all that the user gave has been read: a mistake leaves the folder free

    def evaluate(state, name: str) -> dict:
      path = f"{workdir}/{name}.json"
      if not eval_prompts:
        return {}
      if not os.path.exists(path):
        held_out = assemble.engine(c, loaded.config, mesh, c.eval.max_new or c.rollout.max_new)
        held_out.load(state.params["policy"], c.model.dtype)
        total = len(eval_prompts) * c.eval.samples
        with tqdm(total=total, desc=name.replace("_", " "), unit="response", leave=False) as bar:
          result, _ = rollout.measure(held_out, eval_prompts, c.eval.samples, assemble.key(c, assemble.EVAL),
                                      assemble.sampling(c, loaded, c.eval.temperature), loaded.tokenizer, grader,
                                      progress=lambda _: bar.update())
        write_json(path, {benchmark_name(c.data.eval): result})
      return read_json(path)

    # ---- state, resume
    optimizer = assemble.optimizer(c)
    reference = loaded.params if loss.kl_weight else None  # updates make new arrays: these stay
    state = assemble.init_state(c, loaded, optimizer, mesh, keep_params=reference is not None)
    before = evaluate(state, "eval_before")
    if before:
      print("held-out accuracy before:", summary_line(before))
    checkpoints = stack.enter_context(closing(Checkpoints(workdir, c.checkpoint.keep)))
    start = checkpoints.latest() or 0
    if start:
      state = checkpoints.restore(start, state)
      print(f"{workdir}: going on after step {start}")
    loaded.params = None
    logs = stack.enter_context(closing(Logs(workdir, start, c.log.tensorboard)))

    # ---- loop
    bar = stack.enter_context(tqdm(range(start, c.steps), initial=start, total=c.steps, desc="train", unit="step"))
    for step in bar:
      clock = Clock()
      batch = data.batch_at(train_prompts, step, c.seed, c.rollout.prompts)
      engine.load(state.params["policy"], c.model.dtype)
      pruning = c.prune.enabled and step >= c.prune.cold_start
      decide = rollout.make_decide(state.params["head"], state.calibration, rule, pruning)
      rollouts, sec_reward = rollout.generate(engine, batch, c.rollout.group_size, assemble.key(c, assemble.TRAIN, step),
                                              sampling, loaded.tokenizer, grader, decide=decide)
      engine.params = None  # the update needs the room
      clock.lap("sec_generate")
      batches = rollout.pack(rollouts, assemble.pack_shape(c), mesh, detect=rule.detect,
                             normalize_std=loss.normalize_std, short=c.quality.short)
      batches = update.fill_logprobs(loaded.config, state.params["policy"], reference, batches, sampling.temperature, compute)
      clock.lap("sec_logprob", batches)
      state, metrics = update.step(loaded.config, state, batches, loss, sampling.temperature, compute, optimizer)
      state = state.replace(calibration=rollout.update_calibration(state.calibration, rollouts, c.prune.half_life))
      metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
      clock.lap("sec_update", state.step)
      clock.seconds["sec_generate"] -= sec_reward

      line = {"step": step + 1} | rollout_metrics(rollouts) | metrics | {
        "pruning": pruning, "lr": float(update.learning_rate(c.optim.lr, c.optim.warmup, step)), "sec_reward": sec_reward,
        **clock.seconds, "sec_step": clock.total()}
      logs.write(line, rollouts, c.log.rollouts)
      if not all(math.isfinite(metrics[k]) for k in ("policy_loss", "head_loss", "grad_norm")):
        raise UserError(f"step {step + 1}: the loss or gradient is not finite; the run stopped before saving it (last "
                        f"checkpoint: step {checkpoints.latest() or 0}). Try a smaller optim.lr")
      bar.set_postfix(reward=f"{line['reward']:.3f}", kept=f"{line['rollouts_kept']}/{line['rollouts_started']}",
                      tok_s=f"{line['tokens_generated'] / line['sec_generate']:,.0f}")
      if (step + 1) % c.checkpoint.every == 0 or step + 1 == c.steps:
        checkpoints.save(step + 1, state)
    bar.close()

    # ---- after
    after = evaluate(state, "eval_after")
    if c.checkpoint.export:
      trained = dataclasses.replace(loaded, params=state.params["policy"], head=state.params["head"],
                                    calibration=state.calibration)
      trained.save(f"{workdir}/policy", dtype=c.model.dtype)
    logs.finish(c, before, after, time.time() - started)
  if after:
    print("held-out accuracy after: ", summary_line(after))
  print(f"{workdir}: {c.steps} steps done; metrics.jsonl, rollouts.jsonl and summary.json are there")


class Clock:
  """Wall-clock seconds of a step's phases; a lap waits for the arrays given."""

  def __init__(self):
    self.start = self.last = time.perf_counter()
    self.seconds = {}

  def lap(self, name: str, wait_for=None) -> None:
    jax.block_until_ready(wait_for)
    now = time.perf_counter()
    self.seconds[name], self.last = now - self.last, now

  def total(self) -> float:
    return time.perf_counter() - self.start


class Logs:
  """metrics.jsonl, rollouts.jsonl, TensorBoard and summary.json of a workdir; lines past `start` steps are dropped."""

  def __init__(self, workdir: str, start: int, tensorboard: bool):
    self.workdir = workdir
    self.files = {name: resumed(f"{workdir}/{name}.jsonl", start) for name in ("metrics", "rollouts")}
    self.board = None
    if tensorboard:
      from tensorboardX import SummaryWriter  # only where it is wanted
      self.board = SummaryWriter(f"{workdir}/tensorboard", purge_step=start + 1)
    self.lines = read_lines(f"{workdir}/metrics.jsonl")

  def write(self, line: dict, rollouts: list, texts: int) -> None:
    line = {k: finite(v) for k, v in line.items()}
    self.lines.append(line)
    for i in np.linspace(0, len(rollouts) - 1, texts, dtype=int):
      r = rollouts[i]
      self._append("rollouts", {"step": line["step"], "prompt": r.prompt, "text": r.text, "tokens": len(r.tokens),
                                "pruned": r.pruned, "score": finite(r.score), "posterior": finite(r.posterior),
                                "survival": finite(r.survival), "reward": finite(r.reward), "reason": r.reason})
    self._append("metrics", line)
    if self.board:
      for name, value in line.items():
        if name != "step" and value is not None:
          self.board.add_scalar(name, value, line["step"])

  def _append(self, name: str, record: dict) -> None:
    self.files[name].write(json.dumps(record) + "\n")
    self.files[name].flush()

  def finish(self, c, before: dict, after: dict, seconds: float) -> None:
    device = jax.devices()[0]
    write_json(f"{self.workdir}/summary.json", {
      "steps": self.lines[-1]["step"], "seconds": seconds, "device": f"{jax.device_count()} x {device.device_kind}",
      "config_hash": configuration.fingerprint(c), "eval_before": before, "eval_after": after,
      "tokens_generated": sum(x["tokens_generated"] for x in self.lines),
      "tokens_trained": sum(x["tokens_trained"] for x in self.lines), "final_reward": self.lines[-1]["reward"]})

  def close(self) -> None:
    for file in [*self.files.values(), *filter(None, [self.board])]:
      file.close()


def check_workdir(workdir: str, c) -> None:
  """Makes the folder, or checks that what it holds belongs to this config."""
  try:
    os.makedirs(workdir, exist_ok=True)
  except OSError as e:
    raise UserError(f"--workdir={workdir}: {e.strerror}") from e
  stored = read_json(f"{workdir}/config.json") if os.path.exists(f"{workdir}/config.json") else None
  if stored and configuration.lasting(type(c)(stored)) != configuration.lasting(c):
    names = configuration.differing(configuration.lasting(type(c)(stored)), configuration.lasting(c))
    raise UserError(f"{workdir} holds a run with other settings ({', '.join(names)}); choose another --workdir")


def claim(workdir: str, c) -> None:
  """Writes config.json; removes results that this run, longer or evaluated in another way, will replace."""
  config = json.loads(configuration.to_json(c))
  stale = ["summary", "eval_after"]
  if os.path.exists(f"{workdir}/config.json") and read_json(f"{workdir}/config.json")["eval"] != config["eval"]:
    stale.append("eval_before")
  for name in stale:
    if os.path.exists(f"{workdir}/{name}.json"):
      os.remove(f"{workdir}/{name}.json")
  write_json(f"{workdir}/config.json", config)


def resumed(path: str, start: int):
  """Opens a JSONL log for appending, without the lines of steps after `start` (they will be made again)."""
  kept = [x for x in read_lines(path) if x["step"] <= start]
  with open(path + ".part", "w") as f:
    f.writelines(json.dumps(x) + "\n" for x in kept)
  os.replace(path + ".part", path)
  return open(path, "a")


def read_lines(path: str) -> list[dict]:
  """Complete lines of a JSONL log; a last line cut short by a kill is dropped."""
  if not os.path.exists(path):
    return []
  with open(path) as f:
    return [json.loads(line) for line in f if line.endswith("\n")]


def read_json(path: str) -> dict:
  with open(path) as f:
    return json.load(f)


def write_json(path: str, value: dict) -> None:
  """Writes in one move: a reader never sees half a file."""
  with open(path + ".part", "w") as f:
    json.dump({k: finite(v) for k, v in value.items()}, f, indent=2)
    f.write("\n")
  os.replace(path + ".part", path)


def finite(x):
  """JSON has no NaN: null stands for "undefined here". Works through nested dicts."""
  if isinstance(x, dict):
    return {k: finite(v) for k, v in x.items()}
  return None if isinstance(x, float) and not math.isfinite(x) else x


def benchmark_name(path: str) -> str:
  return os.path.basename(path).partition(".")[0]


def summary_line(result: dict) -> str:
  return ", ".join(f"{k} {100 * v['accuracy']:.1f}% ({v['problems']} problems)" for k, v in result.items())


if __name__ == "__main__":
  configuration.run(main)
