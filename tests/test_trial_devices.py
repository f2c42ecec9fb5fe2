"""The trial on several devices: real processes, in which a stand-in for training does what its arm's name says."""

import json
import os
import signal
import threading
import time

import pytest

from arrol_jax.types import UserError
from experiments import trial_arms, trial_devices, trial_pieces, trial_queue
from experiments.trial_arms import REGIMES, Run
from experiments.trial_queue import Call

CPU, VERSION = REGIMES["arithmetic"], {"commit": "abc", "code": "123"}

WORKER = '''
import json, os, signal, sys, time, types
from pathlib import Path
from arrol_jax import config
from arrol_jax.running import hosts
from arrol_jax.types import UserError
from experiments import trial_arms, trial_devices, trial_pieces, trial_queue
from experiments.trial_queue import Call

flags = dict(a.partition("=")[::2] for a in sys.argv[1:])
root = Path(flags["--root"])
for module in (trial_arms, trial_devices, trial_pieces, trial_queue):
  module.ROOT = root

def looks(call):  # where the cores are by then
  with open(root / "cores", "a") as f:
    f.write(f"{call.platform} {len(os.sched_getaffinity(0))}\\n")

trial_queue.check_platform = looks

def main():
  name = next(a for a in sys.argv if a.startswith("--workdir=")).rpartition("/")[2]
  folder = root / "runs/trial/arithmetic" / name
  with open(root / "begun", "a") as f:
    f.write(f"{name} {os.environ['CUDA_VISIBLE_DEVICES']}\\n")
  if name.startswith("random"):
    raise UserError("model.path: none does not exist")
  (folder / "checkpoints" / "1").mkdir(parents=True, exist_ok=True)
  (folder / "metrics.jsonl").write_text('{"step": 1, "sec_total": 6.0}\\n')
  if name.startswith("plain8"):
    raise RuntimeError("out of memory")
  if name.startswith("budget"):
    print("killed by nobody", file=sys.stderr, flush=True)
    os._exit(7)
  if name.startswith("published"):  # as a training that has not begun to listen, and then does
    time.sleep(1.5)
    told = []
    signal.signal(signal.SIGTERM, lambda *_: told.append(1))
    while not told:
      time.sleep(0.05)
    raise hosts.Preempted("SIGTERM")
  time.sleep(0.5)
  result = {"test": {"accuracy": 0.25, "truncated": 0.0, "problems": 4, "sampled": {"accuracy": 0.125}}}
  (folder / "summary.json").write_text(json.dumps({"device": "1 x cpu", "eval_after": result}))

sys.modules["arrol_jax.train"] = types.SimpleNamespace(main=main)  # the real one takes seconds to import
todo = [trial_arms.Run(trial_arms.REGIMES["arithmetic"], *x) for x in json.loads(flags["--runs"])]
call = Call({"commit": "abc", "code": "123"}, deadline=time.monotonic() + 60 * float(flags["--minutes"]), quiet=True, fresh=True,
            platform="gpu", name=f"device {flags['--worker']}: ")
config.run(lambda: sys.exit(trial_devices.work(int(flags["--worker"]), 2, todo, call)))
'''


@pytest.fixture
def machine(tmp_path, monkeypatch):
  for module in (trial_arms, trial_pieces, trial_queue):
    monkeypatch.setattr(module, "ROOT", tmp_path)
  monkeypatch.setenv("PYTHONPATH", str(trial_devices.ROOT))
  monkeypatch.setattr(trial_devices, "ROOT", tmp_path)
  monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")
  (tmp_path / "worker.py").write_text(WORKER)

  def start(names, devices=1, told=None):
    todo = [Run(CPU, *name) for name in names]
    command = [str(tmp_path / "worker.py"), f"--root={tmp_path}", f"--runs={json.dumps(names)}"]
    call = Call(VERSION, deadline=time.monotonic() + 600, told=told or threading.Event())
    return todo, trial_devices.start(command, devices, todo, call)
  return tmp_path, start


def test_each_run_is_done_once_and_failures_cost_no_other_run(machine, capfd):
  folder, start = machine
  names = [("plain", 1), ("plain8", 1), ("budget", 1), ("chosen", 1), ("plain", 2)]
  todo, finished = start(names, devices=2)
  assert finished and [trial_queue.state(run) for run in todo] == ["done", "failed", "failed", "done", "done"]
  cores = len(os.sched_getaffinity(0))  # shared out before JAX starts, whose threads would keep all of them
  assert set((folder / "cores").read_text().splitlines()) == {f"gpu {cores // 2 or cores}"}
  begun = [line.split() for line in (folder / "begun").read_text().splitlines()]
  others = [name for name, _ in begun if name != "budget_seed1"]  # which the other device may take up before it is given up
  assert sorted(others) == sorted(run.name for run in todo if run.name != "budget_seed1") and {d for _, d in begun} == {"4", "6"}
  problems = [json.loads((run.folder / "failed.json").read_text())["problem"] for run in todo[1:3]]
  assert problems == ["RuntimeError: out of memory", "its process ended with status 7: killed by nobody"]
  said = capfd.readouterr().out
  assert "arithmetic/plain_seed1: 1 steps in 6.0 s; held out none halfway, 25.0% at the end" in said
  assert "arithmetic/budget_seed1: failed: its process ended with status 7" in said and "$ python -m" not in said
  assert "$ python -m arrol_jax.train" in (folder / "runs/trial/device0.log").read_text()
  assert not list((folder / "runs/trial/arithmetic").glob("plain_seed*/"))


def test_what_is_told_to_stop_saves_and_can_go_on(machine, capfd):
  """Also where a training is told before it listens; the run is free again."""
  folder, start = machine
  told = threading.Event()

  def tell():
    while not (folder / "begun").exists():
      time.sleep(0.05)
    told.set()

  threading.Thread(target=tell, daemon=True).start()
  todo, finished = start([("published", 1)], told=told)
  assert not finished and trial_queue.state(todo[0]) == "begun" and not todo[0].folder.exists()
  assert "arithmetic/published_seed1: stopped after step 1" in capfd.readouterr().out
  with trial_queue.claimed(todo[0]) as mine:
    assert mine
    with trial_queue.claimed(todo[0]) as again:
      assert not again


def test_a_users_mistake_ends_all_in_one_line(machine):
  folder, start = machine
  with pytest.raises(UserError, match=r"^model.path: none does not exist$"):
    start([("random", 1), ("plain", 1)])
  assert not Run(CPU, "random", 1).folder.exists() and (folder / "begun").read_text() == "random_seed1 4\n"


def test_more_devices_than_are_allowed(machine):
  with pytest.raises(UserError, match="--devices=3: CUDA_VISIBLE_DEVICES names 2"):
    trial_devices.visible(3)


def test_a_claim_of_a_dead_process_is_taken_over(machine):
  run = Run(CPU, "plain", 1)
  lock = trial_queue.lock_of(run)
  lock.parent.mkdir(parents=True)
  lock.write_text("99999999")
  with trial_queue.claimed(run) as mine:
    assert mine
  assert lock.read_text() == ""


def test_signals_tell_once():
  told, before = threading.Event(), [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
  with trial_devices.told_by_signals(told):
    os.kill(os.getpid(), signal.SIGTERM)
    assert told.wait(1.0)
  assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
