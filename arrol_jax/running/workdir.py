"""A run's folder: config.json, metrics.jsonl, rollouts.jsonl, summary.json.

Whatever moment a run is killed at, what is in the folder can be read and the run goes on: JSON files appear whole or not at
all, logs lose at most their last line, and lines of steps that will be made again are dropped. Checkpoints are
checkpoint.py's, other logs loggers.py's.
"""

import hashlib
import json
import math
import os
import re

import jax
import numpy as np

from arrol_jax.types import UserError


class Logs:
  """metrics.jsonl, rollouts.jsonl and summary.json of a workdir; lines past `start` steps are dropped.

  backends: where else lines go (loggers.py).
  """

  def __init__(self, workdir: str, start: int, backends: list):
    self.workdir, self.backends = workdir, backends
    self.files = {name: resumed(f"{workdir}/{name}.jsonl", start) for name in ("metrics", "rollouts")}
    self.lines = read_lines(f"{workdir}/metrics.jsonl")

  def write(self, line: dict, rollouts: list, texts: int) -> None:
    line = {k: finite(v) for k, v in line.items()}
    self.lines.append(line)
    shown = []
    for i in np.linspace(0, len(rollouts) - 1, min(texts, len(rollouts)), dtype=int):
      r = rollouts[i]
      shown.append({"step": line["step"], "prompt": r.prompt, "text": r.text, "tokens": len(r.tokens),
                    "pruned": r.pruned, "score": finite(r.score), "posterior": finite(r.posterior),
                    "survival": finite(r.keep_probability), "reward": finite(r.reward), "reason": r.reason})
      self._append("rollouts", shown[-1])
    self._append("metrics", line)
    figures = {name: value for name, value in line.items() if name != "step" and isinstance(value, int | float)}
    for backend in self.backends:
      backend.write(line["step"], figures, shown)

  def _append(self, name: str, record: dict) -> None:
    self.files[name].write(json.dumps(record) + "\n")
    self.files[name].flush()

  def sync(self) -> None:
    """Waits until the lines are on the disk, or in the bucket that is mounted there: a checkpoint must not outlive its log."""
    for file in self.files.values():
      os.fsync(file.fileno())

  def finish(self, c, before: dict, after: dict, seconds: float) -> None:
    device = jax.devices()[0]
    write_json(f"{self.workdir}/summary.json", {
      "steps": self.lines[-1]["step"], "seconds": seconds, "device": f"{jax.device_count()} x {device.device_kind}",
      "config_hash": fingerprint(c), "eval_before": before, "eval_after": after,
      "tokens_generated": sum(x["tokens_generated"] for x in self.lines),
      "tokens_trained": sum(x["tokens_trained"] for x in self.lines), "final_reward": self.lines[-1]["reward"]})

  def close(self) -> None:
    for file in [*self.files.values(), *self.backends]:
      file.close()


def check_workdir(workdir: str, c) -> None:
  """Makes the folder, or checks that what it holds belongs to this config."""
  try:
    os.makedirs(workdir, exist_ok=True)
  except OSError as e:
    raise UserError(f"--workdir={workdir}: {e.strerror}") from e
  if not os.access(workdir, os.W_OK):
    raise UserError(f"--workdir={workdir}: this user may not write there")
  stored = renamed(read_json(f"{workdir}/config.json")) if os.path.exists(f"{workdir}/config.json") else None
  if stored and lasting(type(c)(stored)) != lasting(c):
    names = differing(lasting(type(c)(stored)), lasting(c))
    raise UserError(f"{workdir} holds a run with other settings ({', '.join(names)}); choose another --workdir")


def claim(workdir: str, c) -> None:
  """Writes config.json; removes results that this run, longer or evaluated in another way, will replace."""
  config = json.loads(to_json(c))
  stale = ["summary", "eval_after"]
  if os.path.exists(f"{workdir}/config.json") and read_json(f"{workdir}/config.json")["eval"] != config["eval"]:
    stale += ["eval_before", *(name[:-len(".json")] for name in os.listdir(workdir) if re.fullmatch(r"eval_\d+\.json", name))]
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


def lasting(c) -> dict:
  """All that shapes a run's course; a longer `steps`, other logging or saving, another mesh continue the same run."""
  kept = {k: v for k, v in json.loads(to_json(c)).items() if k not in ("steps", "checkpoint", "log", "eval", "mesh")}
  if kept.get("optim", {}).get("schedule", "constant") != "constant":  # then the rate depends on where the run ends
    kept["steps"] = c.steps
  return kept


def fingerprint(c) -> str:
  """Hash of `lasting`."""
  return hashlib.sha256(json.dumps(lasting(c), sort_keys=True).encode()).hexdigest()[:16]


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
