"""What a run does when it is killed, told to stop, out of disk, damaged, or left by another process: counts, not assurances.

  python -m experiments.faults [--only=kill,sigterm,disk,inodes,damage,lost,nan,two,gone] [--kills=20] [--out=FILE.jsonl]

Small runs of the quickstart model on the CPU. Each case prints one JSON line: what was tried how often, and how often the
finished run's metrics.jsonl and rollouts.jsonl equalled those of a run that nothing had happened to, exactly, seconds apart.
A kill falls at a random moment inside generation, grading, update or saving: the process is started through this
file, which sets a timer when it enters that phase (`--inside`). `disk` and `inodes` need the right to mount a tmpfs.
"""

import argparse
from collections import Counter
import json
import os
from pathlib import Path
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from unittest import mock

import jax
import numpy as np

ROOT = Path(__file__).resolve().parents[1]
STEPS = 60
SETTINGS = {"data.eval": "", "rollout.prompts": 4, "rollout.group_size": 4, "rollout.slots": 16, "rollout.row_buckets": 1,
            "rollout.length_buckets": 1, "prune.cold_start": 2, "optim.micro_tokens": 1024, "optim.length_buckets": 1,
            "checkpoint.every": 3, "checkpoint.export": False, "log.backends": "jsonl"}
# Where a kill falls: what is entered, about how long it lasts (seconds), and on which entry the timer is set.
PHASES = {"generation": ("arrol_jax.learning.generation.generate", 0.05, 2, 6),
          "grading": ("arrol_jax.rewards.pool.Grader.grade_async", 0.002, 20, 90),
          "update": ("arrol_jax.learning.update.step", 0.05, 2, 6),
          "save": ("arrol_jax.running.checkpoint.Checkpoints.save", 0.2, 1, 2)}


def arguments(folder: Path, **other) -> list[str]:
  names = SETTINGS | {"steps": STEPS} | other
  return ["--config=configs/quickstart.py", f"--workdir={folder}", *(f"--config.{k}={v}" for k, v in names.items())]


def start(argv: list[str], module="arrol_jax.train", log=subprocess.DEVNULL, **environment) -> subprocess.Popen:
  return subprocess.Popen([sys.executable, "-m", *module.split(), *argv], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                          env=os.environ | {"JAX_PLATFORMS": "cpu"} | environment)


def run(argv: list[str], status=0, **other) -> str:
  """A command to its end; what it wrote."""
  with tempfile.TemporaryFile("w+") as log:
    process = start(argv, log=log, **other)
    process.wait(600)
    log.seek(0)
    said = log.read()
  assert process.returncode == status, said[-2000:]
  return said


def course(folder: Path) -> tuple[list, list]:
  """Whole lines of metrics.jsonl without seconds, and of rollouts.jsonl."""
  read = lambda name: [json.loads(x) for x in (folder / name).read_text().splitlines(True) if x.endswith("\n")]
  return [{k: v for k, v in x.items() if not k.startswith("sec_")} for x in read("metrics.jsonl")], read("rollouts.jsonl")


def inside(phase: str, seed: int, argv: list[str]) -> None:
  """The training command, killed inside `phase` at a moment drawn from `seed`."""
  from arrol_jax import config, train  # not before this process is known to be the victim
  name, lasts, first, last = PHASES[phase]
  rng, entries = random.Random(seed), [0]
  wanted, delay = rng.randint(first, last), rng.uniform(0, lasts)
  target, _, attribute = name.rpartition(".")
  owner = sys.modules.get(target) or getattr(sys.modules[target.rpartition(".")[0]], target.rpartition(".")[2])
  real = getattr(owner, attribute)

  def entered(*args, **kwargs):
    entries[0] += 1
    if entries[0] == wanted:
      threading.Timer(delay, lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    return real(*args, **kwargs)

  with mock.patch.object(owner, attribute, entered), mock.patch.object(sys, "argv", ["train", *argv]):
    config.run(train.main)


def kill(folder: Path, plain: Path, kills: int) -> dict:
  """One run, killed again and again, then left to finish."""
  run_folder, where, prefixes, half_saved = folder / "killed", Counter(), 0, 0
  whole = course(plain)
  for i in range(kills):
    phase = list(PHASES)[i % len(PHASES)]
    process = start([phase, str(i), *arguments(run_folder)], module="experiments.faults --inside")
    status = process.wait(600)
    if status != -signal.SIGKILL:  # the run was over before the moment came
      break
    where[phase] += 1
    lines, _ = course(run_folder) if (run_folder / "metrics.jsonl").exists() else ([], [])
    prefixes += lines == whole[0][:len(lines)]
    saves = os.listdir(run_folder / "checkpoints") if (run_folder / "checkpoints").exists() else []
    half_saved += any(not name.isdigit() for name in saves)
    print(f"kill {i + 1} in {phase}: {len(lines)} lines, checkpoints {sorted(saves)}", file=sys.stderr)
  run(arguments(run_folder))
  return {"case": "kill", "kills": sum(where.values()), "by_phase": dict(where), "a_save_was_half_written": half_saved,
          "lines_equal_after_a_kill": prefixes, "steps": STEPS, "finished_run_equal": course(run_folder) == whole}


def stopped(folder: Path, plain: Path, times=6) -> dict:
  """Stopped at random moments by SIGTERM, Ctrl-C and SIGHUP in turn, then left to finish."""
  run_folder, seconds, words, rng = folder / "stopped", [], 0, random.Random(1)
  numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
  for i in range(times):
    with open(folder / "log", "w") as log:
      process = start(arguments(run_folder), log=log)
      lines = lambda: (run_folder / "metrics.jsonl").read_bytes().count(b"\n") if (run_folder / "metrics.jsonl").exists() else 0
      before = lines()
      while process.poll() is None and lines() <= before:
        time.sleep(0.01)
      time.sleep(rng.uniform(0, 0.5))
      begun = time.monotonic()
      process.send_signal(numbers[i % 3])
      status = process.wait(60)
      seconds.append(round(time.monotonic() - begun, 2))
    said = (folder / "log").read_text()
    words += status == 0 and ("is saved" in said and f"stopped by {numbers[i % 3].name}" in said or "steps done" in said)
  run(arguments(run_folder))
  return {"case": "sigterm", "signals": [x.name for x in numbers],
          "times": times, "ended_with_status_0_and_a_word": words, "seconds_to_the_end": seconds,
          "finished_run_equal": course(run_folder) == course(plain)}


def disk(folder: Path, plain: Path, case="disk", small="size=10m", large="size=200m") -> dict:
  """A tmpfs that holds one checkpoint and a half, by its bytes or its inodes; then one that holds all."""
  place = folder / "small"
  place.mkdir(exist_ok=True)
  subprocess.run(["mount", "-t", "tmpfs", "-o", small, "none", str(place)], check=True)
  try:
    begun = time.monotonic()
    said = run(arguments(place / "run"), status=2)
    seconds = round(time.monotonic() - begun, 1)
    left = sorted(x for x in os.listdir(place / "run" / "checkpoints") if x.isdigit())
    subprocess.run(["mount", "-o", f"remount,{large}", str(place)], check=True)
    again = run(arguments(place / "run"))
    equal = course(place / "run") == course(plain)
  finally:
    subprocess.run(["umount", str(place)], check=True)
  line = next(x for x in said.splitlines() if "error:" in x)
  return {"case": case, "status": 2, "seconds_in_all": seconds, "tracebacks": said.count("Traceback"),
          "said": re.sub(r"\S*/small", "DIR", line[line.index("error:"):]), "checkpoints_left": left,
          "went_on_after_room": "going on after step" in again, "finished_run_equal": equal}


def two(folder: Path, plain: Path, times=5) -> dict:
  """A second run in the folder of one that is at work; then the first is killed and the folder is free again."""
  run_folder, refused, words, seconds = folder / "two", 0, "", []
  endless = arguments(run_folder, steps=10**6)
  first = start(endless)
  while not (run_folder / "metrics.jsonl").exists() and first.poll() is None:
    time.sleep(0.05)
  for _ in range(times):
    begun = time.monotonic()
    said = run(endless, status=2)
    seconds.append(round(time.monotonic() - begun, 1))
    words = next(x for x in said.splitlines() if "error:" in x)
    refused += "another run is writing there" in words
  working = first.poll() is None
  first.kill()
  first.wait()
  made = len(course(run_folder)[0])
  run(arguments(run_folder, steps=made + 1))
  lines = course(run_folder)[0]
  return {"case": "two", "times": times, "refused": refused, "first_still_at_work": working, "seconds": seconds,
          "said": re.sub(r"\S*/two", "DIR", words), "steps": made + 1,
          "lines_equal": lines[:STEPS] == course(plain)[0][:len(lines)] and len(lines) == made + 1}


def gone(folder: Path, plain: Path) -> dict:
  """A finished run without its checkpoints, asked for more steps; then with them."""
  run_folder = folder / "gone"
  shutil.copytree(plain, run_folder)
  os.rename(run_folder / "checkpoints", folder / "kept")
  before = {f.name: f.read_bytes() for f in run_folder.iterdir() if f.is_file() and f.name != ".lock"}
  said = run(arguments(run_folder, steps=STEPS + 3), status=2)
  untouched = all((run_folder / name).read_bytes() == data for name, data in before.items())
  shutil.rmtree(run_folder / "checkpoints", ignore_errors=True)
  os.rename(folder / "kept", run_folder / "checkpoints")
  run(arguments(run_folder, steps=STEPS + 3))
  line = next(x for x in said.splitlines() if "error:" in x)
  return {"case": "gone", "status": 2, "said": re.sub(r"\S*/gone", "DIR", line), "files_untouched": untouched,
          "went_on_with_them": course(run_folder)[0][:STEPS] == course(plain)[0] and len(course(run_folder)[0]) == STEPS + 3}


def damage(folder: Path, plain: Path, times=60) -> dict:
  """The newest checkpoint of a run, a bit flipped or a file cut short at a random place."""
  from arrol_jax import assemble, assemble_state, config
  from arrol_jax.running.checkpoint import Checkpoints
  c, _ = config.parse(["faults", *arguments(plain)])
  mesh = assemble.make_mesh(c)
  with jax.set_mesh(mesh):
    like = assemble_state.init_state(c, assemble.load(c, mesh), assemble.optimizer(c), mesh, keep_params=True)
  rng, outcomes = random.Random(2), {"flipped": Counter(), "truncated": Counter()}
  right = None
  for i in range(times + 1):
    copy = folder / f"damaged{i}"
    shutil.copytree(plain / "checkpoints", copy / "checkpoints")
    how = ("flipped", "truncated")[i % 2]
    if i < times and right:
      files = [f for f in (copy / "checkpoints" / str(STEPS)).rglob("*") if f.is_file()]
      path = rng.choices(files, [f.stat().st_size + 300 for f in files])[0]
      data = bytearray(path.read_bytes())
      at = rng.randrange(len(data)) if data else 0
      if how == "truncated":
        del data[at:]
      elif data:
        data[at] ^= 1 << rng.randrange(8)
      path.write_bytes(bytes(data))
    checkpoints = Checkpoints(str(copy), 9, assemble_state.belongs(c))
    step, state = checkpoints.restore(like)
    checkpoints.close()
    got = (step, [np.asarray(x) for x in jax.tree.leaves(state)])
    right = right or got
    same = step == STEPS and all(np.array_equal(a, b) for a, b in zip(got[1], right[1], strict=True))
    if i:
      outcomes[how]["fell back" if step < STEPS else "harmless" if same else "WRONG"] += 1
    shutil.rmtree(copy)
  return {"case": "damage", "files": "of the newest checkpoint, chosen by size"} | {k: dict(v) for k, v in outcomes.items()}


def lost(folder: Path, victim: int) -> dict:
  """Two processes of four devices; one is killed. How long the other lives on, and what it says."""
  place = folder / f"lost{victim}"
  place.mkdir()
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  mesh = {"mesh.data": 2, "mesh.fsdp": 2, "mesh.tensor": 2, "steps": 10**6}
  processes = []
  for i in range(2):
    with open(place / f"log{i}", "w") as log:
      processes.append(start(arguments(place / "run", **mesh), log=log, JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
                             JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(i),
                             XLA_FLAGS="--xla_force_host_platform_device_count=4"))
  lines = place / "run" / "metrics.jsonl"
  while all(p.poll() is None for p in processes) and not (lines.exists() and lines.read_bytes().count(b"\n") >= 3):
    time.sleep(0.05)
  processes[victim].kill()
  begun = time.monotonic()
  status = processes[1 - victim].wait(120)
  said = (place / f"log{1 - victim}").read_text()
  words = [x for x in said.splitlines() if x.startswith("error:") or "another task died" in x]
  return {"case": "lost", "killed": f"process {victim} of 2", "seconds_until_the_other_ended": round(time.monotonic() - begun, 1),
          "status": status, "said": words[-1][:300] if words else said[-500:]}


def nan(folder: Path, plain: Path, what: str) -> dict:
  """NaN in the advantages, and so the loss, or in a gradient alone in the 5th step; then the cause is gone."""
  run_folder = folder / f"nan_{what}"
  said = run([what, *arguments(run_folder, **{"checkpoint.every": 1})], module="experiments.faults --poisoned", status=2)
  line = next(x for x in said.splitlines() if "error:" in x)
  saved = sorted(os.listdir(run_folder / "checkpoints"))
  run(arguments(run_folder))
  return {"case": "nan", "in": what, "status": 2, "said": line[line.index("error:"):], "checkpoints": saved,
          "finished_run_equal": course(run_folder) == course(plain)}


def poisoned(what: str, argv: list[str]) -> None:
  """The training command, with NaN in the loss, or in the policy's ("gradient") or the head's gradient of its 5th step."""
  from arrol_jax import config, train
  from arrol_jax.learning import update
  accumulate, apply, steps = update.accumulate, update.apply, [0]
  spoil = lambda tree: jax.tree.map(lambda x: x * float("nan"), tree)

  def spoilt_accumulate(u, params, grads, metrics, batch, scalars):
    steps[0] += 1  # one micro-batch a step
    if steps[0] == 5 and what == "loss":
      batch = batch.replace(advantages=batch.advantages * float("nan"))
    grads, metrics = accumulate(u, params, grads, metrics, batch, scalars)
    return spoil(grads) if steps[0] == 5 and what == "gradient" else grads, metrics

  def spoilt_apply(state, grads, scalars, examples, **settings):
    state, metrics = apply(state, grads, scalars, examples, **settings)
    if steps[0] == 5 and what == "head":  # as such a gradient leaves it
      state = state.replace(params=state.params | {"head": spoil(state.params["head"])})
    return state, metrics

  spoilt_accumulate.lower, spoilt_apply.lower = accumulate.lower, apply.lower  # compiled ahead as they are
  with mock.patch.object(update, "accumulate", spoilt_accumulate), mock.patch.object(update, "apply", spoilt_apply), \
      mock.patch.object(sys, "argv", ["train", *argv]):
    config.run(train.main)


def main():
  if sys.argv[1:2] == ["--inside"]:
    return inside(sys.argv[2], int(sys.argv[3]), sys.argv[4:])
  if sys.argv[1:2] == ["--poisoned"]:
    return poisoned(sys.argv[2], sys.argv[3:])
  p = argparse.ArgumentParser(prog="python -m experiments.faults", description=__doc__.partition("\n")[0])
  p.add_argument("--only", default="kill,sigterm,disk,inodes,damage,lost,nan,two,gone")
  p.add_argument("--kills", type=int, default=20)
  p.add_argument("--out", default="")
  a = p.parse_args()
  only = a.only.split(",")
  for number in (signal.SIGINT, signal.SIGHUP):  # ignored in the background, and by what is started there
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
  with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    plain = folder / "plain"
    if only != ["lost"]:
      run(arguments(plain))
    cases = {"kill": lambda: [kill(folder, plain, a.kills)], "sigterm": lambda: [stopped(folder, plain)],
             "disk": lambda: [disk(folder, plain)],
             "inodes": lambda: [disk(folder, plain, "inodes", *(f"size=200m,nr_inodes={n}" for n in (40, 4000)))],
             "two": lambda: [two(folder, plain)], "gone": lambda: [gone(folder, plain)],
             "damage": lambda: [damage(folder, plain)],
             "lost": lambda: [lost(folder, 0), lost(folder, 1)],
             "nan": lambda: [nan(folder, plain, what) for what in ("loss", "gradient", "head")]}
    for case in only:
      for line in cases[case]():
        line |= {"device": "cpu", "jax": jax.__version__, "command": f"python -m experiments.faults --only={case}"}
        print(json.dumps(line), flush=True)
        if a.out:
          Path(a.out).parent.mkdir(parents=True, exist_ok=True)
          with open(a.out, "a") as f:
            f.write(json.dumps(line) + "\n")


if __name__ == "__main__":
  main()
