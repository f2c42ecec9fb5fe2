"""A run's folder: config.json, inputs.json, metrics.jsonl, rollouts.jsonl, summary.json.

Whatever moment a run is killed at, what is in the folder can be read and the run goes on: JSON files appear whole or not at
all (json_files.py), logs (lines.py) lose at most their last line, and lines and evaluations of steps that will be made again are
dropped. One run at a time writes there (`hold`), and it is the run that began there: same settings, problems and weights
(`check_workdir`, `claim`). Checkpoints are checkpoint.py's, evaluations evaluated.py's, other logs loggers.py's.
"""

import fcntl
import hashlib
import json
import os
import socket
import tempfile

import jax
import numpy as np

from arrol_jax.running import evaluated, hosts
from arrol_jax.running.json_files import damaged, read_json, write_json
from arrol_jax.running.lines import READ_AGAIN, cut_back, read_lines, records, rewrite, seconds_of
from arrol_jax.running.rollout_lines import finite, in_full, in_short
from arrol_jax.types import UserError


class Logs:
  """metrics.jsonl, rollouts.jsonl and summary.json of a workdir; lines and evaluations past `start` steps are dropped.

  backends: where else lines go (loggers.py). timed: the run goes by its seconds, which the line of step `start` says. UserError
  where that line is not there, or one is damaged; else a warning of those that are not there.
  """

  def __init__(self, workdir: str, start: int, backends: list, timed: bool = False):
    self.workdir, self.start, self.backends = workdir, start, backends
    path = f"{workdir}/metrics.jsonl"
    cut_back(path, start, READ_AGAIN)
    cut_back(f"{workdir}/rollouts.jsonl", start)
    evaluated.remove(workdir, [name for name, step in evaluated.steps(workdir).items() if step > start])
    self.lines = read_lines(path)
    there = {x["step"] for x in self.lines}
    if timed and start and start not in there:
      raise UserError(f"{path} has no line of step {start}, which the run goes on from, so the seconds that stop_seconds and "
                      "eval.at_seconds count are not known; put it back, or choose another --workdir")
    lacking = start - len(there & set(range(1, start + 1)))
    if lacking:
      hosts.warn(f"{path} has no lines of {lacking} of the {start} steps done: its sec_total and summary.json's totals will "
                 "leave out what only these say; to have them, stop this run and put the file back")
    self.files = {name: open(f"{workdir}/{name}.jsonl", "a") for name in ("metrics", "rollouts")}

  def write(self, line: dict, rollouts: list, texts: int) -> None:
    line = {k: finite(v) for k, v in line.items()}
    self.lines.append(line)
    shown = [rollouts[i] for i in np.linspace(0, len(rollouts) - 1, min(texts, len(rollouts)), dtype=int)]
    table = [{"step": line["step"]} | in_short(r) for r in shown]
    for r, record in zip(shown, table, strict=True):
      self._append("rollouts", record | in_full(r, rollouts))
    self._append("metrics", line)
    figures = {name: value for name, value in line.items() if name != "step" and isinstance(value, int | float)}
    for backend in self.backends:
      backend.write(line["step"], figures, table)

  def amend(self, step: int, found: dict) -> None:
    """What the last line says of its evaluations is `found` from now on, if it is of `step` and anything was found: it was
    written before, or says what was measured in another way."""
    if not found or not self.lines or self.lines[-1]["step"] != step:
      return
    found = {k: finite(v) for k, v in found.items()}
    line = {k: v for k, v in self.lines[-1].items() if k.partition("/")[0] != "held_out_accuracy"} | found
    if line != self.lines[-1]:
      self.lines[-1] = line
      self.files["metrics"].close()
      rewrite(f"{self.workdir}/metrics.jsonl", self.lines)
      self.files["metrics"] = open(f"{self.workdir}/metrics.jsonl", "a")
      for backend in self.backends:
        backend.write(step, found, [])

  def _append(self, name: str, record: dict) -> None:
    self.files[name].write(json.dumps(record) + "\n")
    self.files[name].flush()

  def sync(self) -> None:
    """Waits until the lines are on the disk, or in the bucket that is mounted there: a checkpoint must not outlive its log."""
    for file in self.files.values():
      os.fsync(file.fileno())

  def finish(self, c, before: dict, after: dict, seconds: float, best: int | None = None) -> None:
    """best: the step that was evaluated and exported, where it is not simply the last."""
    device, steps = jax.devices()[0], max(self.start, *(x["step"] for x in self.lines[-1:]), 0)
    last = self.lines[-1] if self.lines and self.lines[-1]["step"] == steps else {"reward": None}
    write_json(f"{self.workdir}/summary.json", {
      "steps": steps, "seconds": seconds, "device": f"{jax.device_count()} x {device.device_kind}",
      "config_hash": fingerprint(c), "eval_before": before, "eval_after": after, "final_reward": last["reward"],
      **{name: sum(x[name] for x in self.lines) for name in ("tokens_generated", "tokens_trained")},
      **({} if best is None else {"best_step": best})})

  def close(self) -> None:
    for file in [*self.files.values(), *self.backends]:
      file.close()


def check_workdir(workdir: str, c, defaults=None) -> None:
  """Makes the folder, or checks that what it holds belongs to this config. defaults: what keys have that it does not name."""
  check_writable(workdir)
  try:
    os.makedirs(workdir, exist_ok=True)
  except OSError as e:
    raise UserError(f"--workdir={workdir}: {e.strerror}") from e
  check_settings(workdir, c, defaults)


def check_writable(workdir: str) -> None:
  """UserError, in the system's words, where the folder, or what is there of the path to it, takes no file."""
  there = workdir
  while not os.path.exists(there):
    there = os.path.dirname(there) or "."
  try:
    tempfile.TemporaryFile(dir=there).close()
  except OSError as e:
    raise UserError(f"--workdir={workdir}: nothing can be written there ({e.strerror})") from e


def check_settings(workdir: str, c, defaults=None) -> None:
  """UserError where the folder's run has other settings than this config, of those that may not change."""
  stored = stored_config(workdir, defaults)
  if stored and lasting(type(c)(stored)) != lasting(c):
    names = differing(lasting(type(c)(stored)), lasting(c))
    ends = {"steps", "stop_seconds"} & set(names)
    why = f"; with optim.schedule={c.optim.schedule} the rate depends on where a run ends" if ends else ""
    raise UserError(f"{workdir} holds a run with other settings ({', '.join(names)}){why}; choose another --workdir")


def stored_config(workdir: str, defaults=None) -> dict | None:
  """config.json with today's keys; None without one."""
  if not os.path.exists(f"{workdir}/config.json"):
    return None
  path = f"{workdir}/config.json"
  stored, usual = renamed(read_json(path)), json.loads(to_json(defaults)) if defaults else {}
  broken = next((name for name, x in usual.items() if isinstance(x, dict) and not isinstance(stored.get(name, {}), dict)), None)
  if broken:
    raise damaged(path, f"{broken} has no keys")
  return filled(stored, usual)


def is_run(folder: str | os.PathLike) -> bool:
  """Whether a run has begun there; models have a config.json too."""
  path = os.path.join(folder, "config.json")
  return os.path.isfile(path) and isinstance(read_json(path).get("rollout"), dict)


def hold(workdir: str):
  """A file that is locked until it is closed, also by the end of this process however it comes. UserError where another process
  has it."""
  path = f"{workdir}/.lock"
  try:
    file = open(path, "a+")
  except OSError as e:
    raise UserError(f"{path}: {e.strerror}") from e
  try:
    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}")
    file.flush()
  except BlockingIOError as e:
    file.seek(0)
    who = file.read().strip() or "another process"
    file.close()
    raise UserError(f"{workdir}: another run is writing there ({who}); wait for its end, or choose another --workdir") from e
  except OSError:  # some file systems know no locks
    pass
  return file


def steps_done(workdir: str) -> int:
  """Of a finished run, by its summary.json; 0 for others."""
  path = f"{workdir}/summary.json"
  steps = read_json(path).get("steps") if os.path.exists(path) else 0
  if not isinstance(steps, int):
    raise damaged(path, "no number of steps")
  return steps


def finished(workdir: str, steps: int, stop_seconds: float | None) -> int:
  """Steps of a run that ended as these settings have it, after so many steps or seconds; 0 for others."""
  done = steps_done(workdir)
  over = stop_seconds is not None and seconds_of(read_lines(f"{workdir}/metrics.jsonl")) >= stop_seconds
  return done if done >= steps or over else 0


def saved_steps(workdir: str) -> list[int]:
  """The steps of the checkpoints in the folder."""
  folder = f"{workdir}/checkpoints"
  return [int(name) for name in os.listdir(folder) if name.isdigit()] if os.path.isdir(folder) else []


def newest_checkpoint(workdir: str) -> int:
  """The step of the newest checkpoint in the folder; 0 without one."""
  return max(saved_steps(workdir), default=0)


def check_can_go_on(workdir: str) -> None:
  """UserError where steps were done and saved, and no checkpoint of them is there: starting anew would wipe their results."""
  if newest_checkpoint(workdir):
    return
  steps, stored, log = steps_done(workdir), stored_config(workdir), f"{workdir}/metrics.jsonl"
  for file in (log, f"{workdir}/rollouts.jsonl") if stored is None else ():
    if os.path.isfile(file) and os.path.getsize(file):
      raise UserError(f"{file} is there, and no config.json or checkpoints that tell whose it is: move it away, or choose "
                      "another --workdir")
  if not steps and stored:  # past the second save the first was on disk
    logged = max((record["step"] for _, record in records(log) if record), default=0)
    steps = logged if logged > 2 * stored.get("checkpoint", {}).get("every", logged) else 0
  if steps:
    policy = f"; {workdir}/policy, as model.path of another --workdir, trains on" if os.path.isdir(f"{workdir}/policy") else ""
    raise UserError(f"{workdir} holds {steps} steps of a run whose checkpoints are gone, so it cannot go on: put "
                    f"{workdir}/checkpoints back, or choose another --workdir{policy}")


def check_length(workdir: str, start: int, steps: int) -> None:
  """UserError where the checkpoint to go on from, of step `start`, lies past the end."""
  if start > steps:
    raise UserError(f"{workdir} holds step {start} and steps is {steps}; give as many at least, or another --workdir")


# What a run begins with, by its name in inputs.json.
INPUTS = {"problems": "the problems of data.train", "weights": "the weights of model.path",
          "model": "what config.json and generation_config.json of model.path say (heads, rope, norm, stop tokens)",
          "tokens": "what the tokenizer makes of the prompts (tokenizer, chat template)"}


# What else evaluations go by, by its name in inputs.json: other ones are made where it changes.
EVALUATED_BY = {"held_out": "the problems of data.eval", "reward": "the file of reward.function"}
_WHEN = ("every", "before", "at_seconds", "benchmarks")  # of eval: what changes no evaluation that has been made


def claim(workdir: str, c, inputs: dict, defaults=None) -> list[str]:
  """Writes config.json and inputs.json; removes results that this run, longer or evaluated in another way, will replace.

  inputs: hashes by the names of INPUTS and EVALUATED_BY. Returns the config hashes that this run's checkpoints may have. Raises
  UserError where an input is not what the run began with.
  """
  config, stored = json.loads(to_json(c)), stored_config(workdir, defaults)
  before = stored_inputs(workdir) or {"config_hashes": _older_hashes(workdir) if stored else []}
  check_inputs(workdir, inputs)
  check_length(workdir, newest_checkpoint(workdir), c.steps)  # before anything goes
  how = lambda x: {k: v for k, v in x["eval"].items() if k not in _WHEN}
  changed = stored and [*(f"eval.{x}" for x in differing(how(stored), how(config))), *evaluated_by_other(before, inputs)]
  if changed and (gone := evaluated.remove(workdir, ["eval_before", *evaluated.steps(workdir)])):
    hosts.say(f"evaluated in another way from now on ({', '.join(changed)}): {', '.join(sorted(gone))} removed")
  evaluated.remove(workdir, ["summary", "eval_after"])
  hashes = list(dict.fromkeys([*before.get("config_hashes", []), fingerprint(c)]))
  write_json(f"{workdir}/inputs.json", inputs | {"config_hashes": hashes})
  write_json(f"{workdir}/config.json", config)
  return hashes


def evaluated_by_other(before: dict, inputs: dict) -> list[str]:
  """What evaluations go by and has changed since inputs.json said `before`."""
  return [what for name, what in EVALUATED_BY.items() if before.get(name, inputs.get(name)) != inputs.get(name)]


def stored_inputs(workdir: str) -> dict | None:
  """inputs.json; None without one."""
  path = f"{workdir}/inputs.json"
  return read_json(path) if os.path.exists(path) else None


def check_inputs(workdir: str, inputs: dict) -> None:
  """UserError where an input, hashes by the names of INPUTS, is not what the folder's run began with."""
  before = stored_inputs(workdir) or {}
  changed = [name for name in INPUTS if before.get(name, inputs[name]) != inputs[name]]
  if changed:
    if "problems" in changed and "tokens" in changed:  # other problems have other tokens
      changed.remove("tokens")
    raise UserError(f"{workdir}: {' and '.join(INPUTS[name] for name in changed)} changed since this run began; put back what "
                    "was there, or choose another --workdir")


def _older_hashes(workdir: str) -> list[str]:
  """The hash that versions before inputs.json took of the config that stands there."""
  config = read_json(f"{workdir}/config.json")
  kept = {k: v for k, v in config.items() if k not in _FREE_SECTIONS}
  if kept.get("optim", {}).get("schedule", "constant") == "constant":
    kept.pop("steps", None)
  return [_hash(kept)]


# ---- what makes two runs the same

# Config keys by the names that they had a release ago.
RENAMED = {"prune.control": "prune.holdout", "rollout.rounds": "rollout.resampling", "log.tensorboard": "log.backends"}
# What an old value is called now, where the name is not all that changed.
VALUES = {"log.tensorboard": lambda x: "jsonl,tensorboard" if str(x).lower() in ("true", "1", "yes") else "jsonl"}


def renamed(config: dict) -> dict:
  """A stored config with today's names of its keys."""
  config = {section: dict(x) if isinstance(x, dict) else x for section, x in config.items()}
  for old, new in RENAMED.items():
    section, name = old.split(".")
    if name in config.get(section, ()):
      config[section][new.split(".")[1]] = VALUES.get(old, lambda x: x)(config[section].pop(name))
  return config


def to_json(c) -> str:
  """A config (ConfigDict) as JSON."""
  return json.dumps(c.to_dict(), indent=2, sort_keys=True, default=list)


# What a run may go on with whatever it began with: sections, and keys that concern only memory, machines and speed.
_FREE_SECTIONS = ("steps", "stop_seconds", "checkpoint", "log", "eval", "mesh")
FREE = """model.attention model.remat model.scan_layers data.folder data.tfds_dir rollout.slots rollout.attention rollout.segment
  rollout.row_buckets rollout.length_buckets optim.micro_tokens optim.chunk_tokens optim.length_buckets optim.tail_sizes
  reward.workers reward.timeout reward.memory""".split()


def lasting(c) -> dict:
  """All that shapes a run's course; a longer `steps` or `stop_seconds`, other logging or saving, another mesh or memory continue
  the same run."""
  kept = {k: v for k, v in json.loads(to_json(c)).items() if k not in _FREE_SECTIONS}
  for section, name in (x.split(".") for x in FREE):
    if isinstance(kept.get(section), dict):
      kept[section].pop(name, None)
  if kept.get("optim", {}).get("schedule", "constant") != "constant":  # then the rate depends on where the run ends
    kept["steps"] = c.steps
    kept |= {"stop_seconds": c.stop_seconds} if c.stop_seconds else {}
  return kept


def filled(config: dict, defaults: dict) -> dict:
  """A stored config, and what it does not name as `defaults` has it: keys that came with a later version."""
  out = defaults | config
  return out | {k: filled(out[k], v) for k, v in defaults.items() if isinstance(v, dict) and isinstance(out[k], dict)}


def fill(c, stored: dict, prefix: str = "") -> list[str]:
  """Sets a config's keys as a stored one has them; returns the names of those that it does not have."""
  unknown = []
  for name, value in stored.items():
    if name not in c or hasattr(c[name], "items") != isinstance(value, dict):
      unknown.append(prefix + name)
    elif isinstance(value, dict):
      unknown += fill(c[name], value, f"{name}.")
    else:
      c[name] = tuple(value) if isinstance(value, list) else value
  return unknown


def fingerprint(c) -> str:
  """Hash of `lasting`."""
  return _hash(lasting(c))


def _hash(config: dict) -> str:
  return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def flat(config: dict, prefix: str = "") -> dict:
  """The leaves of nested dicts by their dotted names."""
  out = {}
  for key, value in config.items():
    out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
  return out


def differing(a: dict, b: dict, prefix: str = "") -> list[str]:
  """Dotted names of the leaves in which two nested dicts differ."""
  out = []
  for key in sorted(a.keys() | b.keys()):
    x, y = a.get(key), b.get(key)
    if isinstance(x, dict) and isinstance(y, dict):
      out += differing(x, y, f"{prefix}{key}.")
    elif x != y:
      out.append(f"{prefix}{key}")
  return out
