"""For user_cases.py: the commands as a user gives them, in this process or one of their own, and what they say."""

import contextlib
import importlib
import io
import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time
from typing import NamedTuple
from unittest import mock

from arrol_jax import config

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "experiments/arithmetic/signs"
TRAIN = ROOT / "experiments/arithmetic/train.jsonl"
# Three steps of 4 prompts x 4 rollouts in one shape each.
SMALL = {"steps": 3, "data.eval": "", "rollout.prompts": 4, "rollout.group_size": 4, "rollout.slots": 16,
         "rollout.row_buckets": 1, "prune.cold_start": 1, "optim.micro_tokens": 1024, "checkpoint.every": 2,
         "checkpoint.export": False, "log.backends": "jsonl"}


class Said(NamedTuple):
  """How a command ended; lines of its error output without progress bars."""
  status: int
  out: str
  err: list[str]

  @property
  def lines(self) -> list[str]:
    return [x for x in self.err if x.startswith(("error:", "warning:", "reward function"))]


def arguments(folder: Path, **overrides) -> list[str]:
  """In `overrides` a double underscore stands for the dot."""
  keys = SMALL | {k.replace("__", "."): v for k, v in overrides.items()}
  return ["--config=quickstart", f"--workdir={folder}", *(f"--config.{k}={v}" for k, v in keys.items())]


def command(name: str, argv: list[str]) -> Said:
  """arrol-NAME in this process."""
  out, err, status = io.StringIO(), io.StringIO(), 0
  with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), \
      mock.patch.object(sys, "argv", [f"arrol-{name}", *map(str, argv)]):
    try:
      config.run(importlib.import_module(f"arrol_jax.{name}").main)
    except SystemExit as e:
      status = e.code or 0
  return Said(status, out.getvalue(), err.getvalue().replace("\r", "\n").splitlines())


def train(folder: Path, **overrides) -> Said:
  return command("train", arguments(folder, **overrides))


def start(name: str, argv: list[str], **environment) -> subprocess.Popen:
  """The same in a process of its own."""
  return subprocess.Popen([sys.executable, "-m", f"arrol_jax.{name}", *map(str, argv)], cwd=ROOT, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | environment)


def ended(process: subprocess.Popen, seconds: float = 240) -> Said:
  try:
    out, err = process.communicate(timeout=seconds)
  except subprocess.TimeoutExpired:
    process.kill()
    process.communicate()
    raise AssertionError(f"it did not end within {seconds:.0f} s") from None
  return Said(process.returncode, out, err.replace("\r", "\n").splitlines())


def apart(name: str, argv: list[str], **environment) -> Said:
  return ended(start(name, argv, **environment))


def metrics(folder: Path) -> list[dict]:
  path = folder / "metrics.jsonl"
  whole = path.read_text().splitlines(True) if path.exists() else []
  return [json.loads(x) for x in whole if x.endswith("\n")]


def until_step(process: subprocess.Popen, folder: Path, step: int, seconds: float = 240) -> None:
  """Waits until a run has made so many steps."""
  end = time.monotonic() + seconds
  while process.poll() is None and len(metrics(folder)) < step and time.monotonic() < end:
    time.sleep(0.05)
  if len(metrics(folder)) < step:
    process.kill()
    raise AssertionError(f"the run did not get to step {step}: {ended(process).err[-3:]}")


def stopped(folder: Path, number: signal.Signals, step: int = 1, **overrides) -> Said:
  """A run that gets a signal after `step` steps."""
  process = start("train", arguments(folder, **{"steps": 10**5} | overrides))
  until_step(process, folder, step)
  process.send_signal(number)
  return ended(process)


def refused(said: Said, *words: str) -> str:
  """The one line of a command that ended with status 2."""
  need(said.status == 2, f"status {said.status}, not 2: {said.err[-3:]}")
  lines = [x for x in said.err if x.strip() and not x.startswith("warning:")]
  need(len(said.lines) >= 1 and "Traceback" not in "".join(lines), f"no single line: {lines[-3:]}")
  errors = [x for x in said.lines if x.startswith("error:")]
  need(len(errors) == 1, f"{len(errors)} lines of errors: {errors}")
  need(all(word in errors[0] for word in words), f"{errors[0]!r} does not say {words}")
  return errors[0]


def worked(said: Said) -> Said:
  need(said.status == 0, f"status {said.status}: {said.err[-2:]}")
  return said


def need(ok: bool, text: str) -> None:
  if not ok:
    raise AssertionError(text)


def model(folder: Path, **files) -> Path:
  """A copy of the shipped model in which JSON files have other keys; None takes one out."""
  shutil.copytree(MODEL, folder)
  for name, keys in files.items():
    path = folder / f"{name}.json"
    raw = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({k: v for k, v in (raw | keys).items() if v is not None}))
  return folder


def module(folder: Path, name: str, text: str) -> None:
  """A module of the user's, importable here and in reward workers."""
  (folder / f"{name}.py").write_text(text)
  if str(folder) not in sys.path:
    sys.path.insert(0, str(folder))
