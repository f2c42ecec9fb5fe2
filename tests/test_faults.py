"""What a training run does when it is told to stop, out of disk, damaged or fed NaN; experiments/faults.py kills it for real."""

import errno
import gc
import json
import os
from pathlib import Path
import shutil
import signal
import time
from types import SimpleNamespace
from unittest import mock

from helpers_train import QUICKSTART, command
import jax
import pytest

from arrol_jax import train
from arrol_jax.learning import generation, update
from arrol_jax.running import hosts
from arrol_jax.running.checkpoint import Checkpoints

ROOT = Path(__file__).resolve().parents[1]
STEPS = 5
SETTINGS = {"steps": STEPS, "data.eval": "", "rollout.prompts": 4, "rollout.group_size": 4, "rollout.slots": 16,
            "rollout.row_buckets": 1, "rollout.length_buckets": 1, "prune.cold_start": 1, "optim.micro_tokens": 1024,
            "optim.length_buckets": 1, "checkpoint.every": 2, "checkpoint.export": False, "log.backends": "jsonl"}


# Reading a damaged checkpoint leaves orbax's coroutines behind: they are collected here, not in whatever test comes next.
pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
              pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")]


def run(folder, **other):
  """The training command in this process: exit status, stdout, stderr."""
  names = SETTINGS | {k.replace("__", "."): v for k, v in other.items()}
  seen = command(QUICKSTART, f"--workdir={folder}", *(f"--config.{k}={v}" for k, v in names.items()))
  gc.collect()
  return SimpleNamespace(status=seen.status, out=seen.out, err=seen.err.split("\r")[-1].splitlines())


def course(folder):
  """metrics.jsonl without seconds, and rollouts.jsonl."""
  metrics, texts = ([json.loads(x) for x in (folder / f"{n}.jsonl").read_text().splitlines()] for n in ("metrics", "rollouts"))
  return [{k: v for k, v in x.items() if not k.startswith("sec_")} for x in metrics], texts


def scores(folder):
  """What "best" goes by, by step."""
  checkpoints = Checkpoints(str(folder), 2, read_only=True)
  checkpoints.close()
  return checkpoints.kept.scores


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
  folder = tmp_path_factory.mktemp("plain")
  assert run(folder).status == 0
  return folder


def nth(number: int, before, real):
  """A function that does `before` on entering its call `number`."""
  calls = iter(range(1, 10**6))
  def call(*args, **kwargs):
    if next(calls) == number:
      before()
    return real(*args, **kwargs)
  return call


@pytest.mark.parametrize("call, saved", [(1, None), (2, 1), (4, 3)])
def test_sigterm_saves_the_step_before_and_ends_with_0_and_a_word(tmp_path, plain, call, saved):
  """During generation: that step is given up, and made again by the same command."""
  handler = signal.getsignal(signal.SIGTERM)
  tell = lambda: os.kill(os.getpid(), signal.SIGTERM)
  with mock.patch.object(generation, "generate", nth(call, tell, generation.generate)):
    result = run(tmp_path)
  assert result.status == 0 and result.out.endswith("stopped by SIGTERM; the same command goes on from there\n")
  assert (f"SIGTERM; step {saved} is saved" in result.out) == (saved is not None)
  assert signal.getsignal(signal.SIGTERM) is handler and not (tmp_path / "summary.json").exists()
  result = run(tmp_path)
  assert result.status == 0 and (f"going on after step {saved}" in result.out) == (saved is not None)
  assert course(tmp_path) == course(plain)
  assert {step: scores(tmp_path)[step] for step in (4, STEPS)} == {step: scores(plain)[step] for step in (4, STEPS)}


WAITED_FOR = """
import os, signal, time
def reward(response, answer):
  if os.path.exists(os.environ["WHEN"]) and os.path.getsize(os.environ["WHEN"]):
    os.kill(os.getppid(), signal.SIGTERM)
    time.sleep(100)
  return float(len(response) % 2)
"""


@pytest.mark.parametrize("when, saved", [("config.json", None), ("metrics.jsonl", 1)], ids=["an evaluation", "a step"])
def test_sigterm_while_grades_are_waited_for(tmp_path, monkeypatch, when, saved):
  """Heard at once, though none of them would come for long; the step is made again by the same command."""
  (tmp_path / "late_rewards.py").write_text(WAITED_FOR)
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.setenv("WHEN", str(tmp_path / "run" / when))
  other = {"steps": 2, "reward__function": "late_rewards.reward", "reward__timeout": 60.0, "eval__problems": 4}
  if saved is None:
    other["data__eval"] = "experiments/arithmetic/test.jsonl"
  told, real = [], hosts.Watch._note
  with mock.patch.object(hosts.Watch, "_note", lambda *args: told.append(time.monotonic()) or real(*args)):
    result = run(tmp_path / "run", **other)
  assert time.monotonic() - told[0] < 20 and result.status == 0
  assert result.out.endswith("stopped by SIGTERM; the same command goes on from there\n")
  assert (f"SIGTERM; step {saved} is saved" in result.out) == (saved is not None)
  monkeypatch.setenv("WHEN", str(tmp_path / "never"))
  assert run(tmp_path / "run", **other).status == 0 and len(course(tmp_path / "run")[0]) == 2


def test_a_checkpoint_does_not_outlive_its_log(tmp_path):
  """Lines are on the disk before a checkpoint of their step: what only the memory holds, a lost machine takes along."""
  synced, saved, real = [], [], Checkpoints.save

  def save(self, step, *args, **kwargs):
    saved.append((step, [name for name in synced if name.endswith(".jsonl")]))
    synced.clear()
    return real(self, step, *args, **kwargs)

  with mock.patch.object(os, "fsync", lambda file: synced.append(os.readlink(f"/proc/self/fd/{file}"))), \
      mock.patch.object(Checkpoints, "save", save):
    assert run(tmp_path).status == 0
  logs = [str(tmp_path / f"{name}.jsonl") for name in ("metrics", "rollouts")]
  assert [step for step, _ in saved] == [2, 4, 5] and all(sorted(names) == logs for _, names in saved)


def test_a_disk_without_room_for_a_line_is_one_line(tmp_path, plain):
  full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "metrics.jsonl")
  def stop():
    raise full
  with mock.patch.object(train.Logs, "write", nth(4, stop, train.Logs.write)):
    result = run(tmp_path)
  assert result.status == 2 and "Traceback" not in "".join(result.err)
  assert "error: metrics.jsonl: No space left on device; make room" in result.err[-1]
  assert run(tmp_path).status == 0 and course(tmp_path) == course(plain)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(tmp_path, plain):
  shutil.copytree(plain, tmp_path, dirs_exist_ok=True)
  (tmp_path / "summary.json").unlink()
  newest = max((tmp_path / "checkpoints" / str(STEPS)).rglob("*"), key=lambda f: f.stat().st_size)
  newest.write_bytes(newest.read_bytes()[:1000])
  result = run(tmp_path)
  assert result.status == 0 and f"checkpoint {STEPS} is damaged" in result.out and "going on after step 4" in result.out
  assert course(tmp_path) == course(plain) and "Traceback" not in "".join(result.err)


@pytest.mark.parametrize("what", ["loss", "gradient", "head's gradient"])
def test_nan_stops_before_the_save_and_names_the_step(tmp_path, plain, what):
  """Of the loss, through the advantages; of a gradient alone; of the head's, which leaves its weights NaN and its loss finite.
  Without its cause the same command goes on."""
  accumulate, apply, steps = update.accumulate, update.apply, iter(range(2, 100))
  spoil = lambda tree: jax.tree.map(lambda x: x * float("nan"), tree)
  step = 1

  def spoilt_accumulate(u, params, grads, metrics, batch, *others):
    if step == 5 and what == "loss":
      batch = batch.replace(advantages=batch.advantages * float("nan"))
    grads, metrics = accumulate(u, params, grads, metrics, batch, *others)
    return spoil(grads) if step == 5 and what == "gradient" else grads, metrics

  def spoilt_apply(state, grads, scalars, examples, **settings):
    nonlocal step
    state, metrics = apply(state, grads, scalars, examples, **settings)
    if step == 5 and what == "head's gradient":
      state = state.replace(params=state.params | {"head": spoil(state.params["head"])})
    step = next(steps)
    return state, metrics

  spoilt_accumulate.lower, spoilt_apply.lower = accumulate.lower, apply.lower  # compiled ahead as they are
  with mock.patch.object(update, "accumulate", spoilt_accumulate), mock.patch.object(update, "apply", spoilt_apply):
    result = run(tmp_path, checkpoint__every=1)
  assert result.status == 2 and result.err[-1].startswith("error: step 5: the loss or gradient is not finite")
  assert "last checkpoint: step 4" in result.err[-1] and not (tmp_path / "checkpoints" / "5").exists()
  assert run(tmp_path).status == 0 and course(tmp_path) == course(plain)
