"""Several processes: two of four devices each train, stop and go on as one process of one device does."""

import gc
import json
import os
from pathlib import Path
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref

import pytest

from arrol_jax.running import hosts
from arrol_jax.types import UserError

ROOT = Path(__file__).resolve().parents[1]
STEPS = 5
# Shapes of the notebook in its test, whose programs this shares.
SETTINGS = {"rollout.prompts": 4, "rollout.group_size": 4, "rollout.slots": 16, "rollout.row_buckets": 1,
            "rollout.length_buckets": 1, "prune.cold_start": 2, "optim.micro_tokens": 1024, "optim.length_buckets": 1,
            "quality.hidden": 16, "checkpoint.every": 2, "log.backends": "jsonl", "eval.problems": 6}


def start(folder, processes: int, devices: int, mesh=(1, 1, 1), steps=STEPS, by_process=None, **other) -> list[subprocess.Popen]:
  """The training command in `processes` processes of `devices` devices each; what they write goes to folder/log.N.

  by_process: settings of single processes.
  """
  folder.mkdir(exist_ok=True)
  with socket.socket() as s:
    s.bind(("localhost", 0))
    port = s.getsockname()[1]
  names = SETTINGS | {"steps": steps, "mesh.data": mesh[0], "mesh.fsdp": mesh[1], "mesh.tensor": mesh[2]} | other
  out = []
  for i in range(processes):
    own = names | (by_process[i] if by_process else {})
    arguments = [f"--workdir={folder / 'run'}", *(f"--config.{k}={v}" for k, v in own.items())]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
    if processes > 1:
      environment |= {"JAX_COORDINATOR_ADDRESS": f"localhost:{port}", "JAX_NUM_PROCESSES": str(processes),
                      "JAX_PROCESS_ID": str(i)}
    with open(folder / f"log.{i}", "w") as log:
      out.append(subprocess.Popen([sys.executable, "-m", "arrol_jax.train", "--config=configs/quickstart.py", *arguments],
                                  cwd=ROOT, stdout=log, stderr=log, env=environment))
  return out


def finish(folder, processes, seconds=900) -> list[str]:
  """Waits for the end; what each process wrote. All must have ended with status 0."""
  try:
    for process in processes:
      process.wait(seconds)
  finally:
    for process in processes:
      process.kill()
      process.wait()
  said = [(folder / f"log.{i}").read_text() for i in range(len(processes))]
  assert [p.returncode for p in processes] == [0] * len(processes), "\n".join(said)
  return said


def metrics(folder) -> list[dict]:
  lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
  return [{k: v for k, v in json.loads(line).items() if not k.startswith("sec_")} for line in lines]


def texts(folder) -> list[tuple]:
  lines = map(json.loads, (folder / "run" / "rollouts.jsonl").read_text().splitlines())
  return [(x["step"], x["prompt"], x["text"], x["pruned"], x["reward"], x["reason"]) for x in lines]


def assert_same_course(folder, other):
  """Texts, decisions, rewards and counts are equal; what is a mean of float32 sums, to 1e-4 or 1e-5 absolute."""
  assert texts(folder) == texts(other)
  for a, b in zip(metrics(folder), metrics(other), strict=True):
    for name in a:
      if isinstance(b[name], float):
        assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name
      else:
        assert a[name] == b[name], name


@pytest.fixture(scope="module")
def one(tmp_path_factory):
  """One process, one device."""
  folder = tmp_path_factory.mktemp("one")
  finish(folder, start(folder, 1, 1))
  return folder


@pytest.mark.parametrize("given", [{}, {"XLA_CLIENT_MEM_FRACTION": "0.5"}, {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.6"}])
def test_commands_take_as_much_of_a_gpu_as_plans_count_with(monkeypatch, given):
  """Unless the environment says how much; JAX refuses both names at once."""
  names = ("XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION")
  for name in names:
    monkeypatch.setenv(name, "")  # so that it is put back at the end
    monkeypatch.delenv(name)
  for name, value in given.items():
    monkeypatch.setenv(name, value)
  hosts.begin()
  assert {name: os.environ[name] for name in names if name in os.environ} == (given or {names[1]: str(hosts.CARD_SHARE)})
  assert 0.9 < hosts.CARD_SHARE < 0.97


@pytest.mark.slow
def test_two_processes_of_four_devices_do_what_one_does(tmp_path, one):
  """Five steps, with evaluations before and after, over a mesh (2, 2, 2) whose data axis crosses the processes."""
  said = finish(tmp_path, start(tmp_path, 2, 4, (2, 2, 2)))
  assert_same_course(tmp_path, one)
  for name in ("eval_before.json", "eval_after.json"):
    assert json.loads((tmp_path / "run" / name).read_text()) == json.loads((one / "run" / name).read_text())
  assert f"{STEPS} steps done" in said[0] and "held-out accuracy after" in said[0]
  assert "steps done" not in said[1] and "held-out" not in said[1]  # one process speaks
  summary = json.loads((tmp_path / "run" / "summary.json").read_text())
  assert summary["device"].startswith("8 x ") and (tmp_path / "run" / "policy" / "model.safetensors").exists()


@pytest.mark.slow
def test_sigterm_to_one_stops_both_and_another_mesh_goes_on(tmp_path, one):
  """Both end with status 0 and the step saved; one process of two devices takes over and ends as the plain run does."""
  processes = start(tmp_path, 2, 4, (1, 4, 2), steps=10**6, **{"data.eval": ""})
  log, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 900
  while not log.exists() or log.read_bytes().count(b"\n") < 2:
    assert all(p.poll() is None for p in processes) and time.monotonic() < deadline, (tmp_path / "log.0").read_text()
    time.sleep(0.01)
  processes[1].send_signal(signal.SIGTERM)
  said = finish(tmp_path, processes, 60)
  saved = int(re.search(r"SIGTERM; step (\d+) is saved\nstopped by SIGTERM; the same command goes on", said[0])[1])
  assert 2 <= saved and (tmp_path / "run" / "checkpoints" / str(saved)).is_dir()
  steps = max(STEPS, saved + 1)
  said = finish(tmp_path, start(tmp_path, 1, 2, (2, 1, 1), steps=steps, **{"data.eval": ""}))
  assert f"going on after step {saved}" in said[0]
  if steps == STEPS:
    assert_same_course(tmp_path, one)
  else:  # a fast machine had gone past the plain run
    assert texts(tmp_path)[:len(texts(one))] == texts(one)


LATE = """
import os, pathlib, time
def reward(response, answer):
  log, waiting = pathlib.Path(os.environ["LOG"]), pathlib.Path(os.environ["WAITING"])
  if os.environ["JAX_PROCESS_ID"] == "1" and log.exists() and log.stat().st_size:
    waiting.touch()
    time.sleep(100)
  return float(len(response) % 2)
"""


@pytest.mark.slow
def test_sigterm_to_one_while_another_waits_for_grades(tmp_path, monkeypatch):
  """The first has its own and waits for the second's: both give the step up."""
  (tmp_path / "late_rewards.py").write_text(LATE)
  waiting = tmp_path / "waiting"
  for name, value in {"PYTHONPATH": tmp_path, "LOG": tmp_path / "run" / "metrics.jsonl", "WAITING": waiting}.items():
    monkeypatch.setenv(name, str(value))
  late = {"data.eval": "", "reward.function": "late_rewards.reward", "reward.timeout": 200.0}
  processes = start(tmp_path, 2, 1, (2, 1, 1), **late)
  deadline = time.monotonic() + 300
  while not waiting.exists():
    assert all(p.poll() is None for p in processes) and time.monotonic() < deadline, (tmp_path / "log.0").read_text()
    time.sleep(0.01)
  time.sleep(2.0)  # of the wait
  processes[0].send_signal(signal.SIGTERM)
  said = finish(tmp_path, processes, 30)
  assert "SIGTERM; step 1 is saved\nstopped by SIGTERM" in said[0] and (tmp_path / "run" / "checkpoints" / "1").is_dir()


@pytest.mark.slow
def test_two_processes_go_on_from_what_one_left(tmp_path, one):
  """From one process of one device to two of four, past a newest checkpoint that is damaged: both take the one before."""
  shutil.copytree(one, tmp_path, dirs_exist_ok=True)
  for name in ("summary.json", "eval_after.json"):
    (tmp_path / "run" / name).unlink()
  newest = max((tmp_path / "run" / "checkpoints" / str(STEPS)).rglob("*"), key=lambda f: f.stat().st_size)
  newest.write_bytes(newest.read_bytes()[:1000])
  said = finish(tmp_path, start(tmp_path, 2, 4, (2, 2, 2)))
  assert f"checkpoint {STEPS} is damaged" in said[0] and "going on after step 4" in said[0] and "damaged" not in said[1]
  assert_same_course(tmp_path, one)
  after = [json.loads((folder / "run" / "eval_after.json").read_text()) for folder in (tmp_path, one)]
  assert after[0] == after[1]


@pytest.mark.slow
def test_a_mistake_on_one_host_ends_both_with_its_words(tmp_path):
  """The second host lacks the training file: neither waits for the other, nothing of the folder is taken."""
  processes = start(tmp_path, 2, 1, (2, 1, 1), by_process=[{}, {"data.train": str(tmp_path / "missing.jsonl")}])
  for process in processes:
    assert process.wait(120) == 2, [(tmp_path / f"log.{i}").read_text() for i in range(2)]
  for i in range(2):
    last = (tmp_path / f"log.{i}").read_text().splitlines()[-1]
    assert last.startswith("error: process 1: data: ") and last.endswith("missing.jsonl does not exist")
  assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("given, words", [
  ({"JAX_COORDINATOR_ADDRESS": "localhost:1"}, "JAX_NUM_PROCESSES \\(not set\\)"),
  ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS \\(not set\\)"),
  ({"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "two numbers"),
  ({"JAX_COORDINATOR_ADDRESS": "localhost", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "HOST:PORT"),
])
def test_half_an_environment_is_a_mistake(monkeypatch, given, words):
  for name, value in given.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(UserError, match=words):
    hosts.connect()


def test_alone_nothing_is_shared_out():
  assert hosts.gather({"a": 1}) == [{"a": 1}] and hosts.agree("x") == "x" and hosts.first() and not hosts.several()
  assert hosts.spread(lambda x: 2 * x, [1, 2, 3]) == [2, 4, 6] and all(hosts.mine(i) for i in range(5))
  assert hosts.together(lambda: 3) == 3
  with pytest.raises(UserError, match="^mine$"):
    hosts.together(lambda: (_ for _ in ()).throw(UserError("mine")))


def test_shares_of_several_processes_make_the_whole(monkeypatch):
  """As three processes would see it: each encodes its own, in turn, and all get everything in order."""
  items, done = list("abcdefg"), []
  for process in range(3):
    monkeypatch.setattr(hosts, "mine", lambda i, p=process: i % 3 == p)
    done.append([x.upper() for i, x in enumerate(items) if hosts.mine(i)])
  monkeypatch.setattr(hosts, "gather", lambda _: done)
  assert hosts.spread(str.upper, items) == list("ABCDEFG")
  monkeypatch.setattr(hosts, "gather", lambda _: [None, "no such file"])
  with pytest.raises(UserError, match="process 1: no such file"):
    hosts.together(lambda: 3)


def test_where_nothing_is_to_be_saved_the_signal_itself_raises():
  with pytest.raises(hosts.Preempted, match="SIGTERM"), hosts.Watch(at_once=True):
    signal.raise_signal(signal.SIGTERM)
  with hosts.Watch(at_once=True) as watch:
    watch.at_once = False
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(hosts.Preempted):
      watch.check()


def test_a_signal_while_loading_is_not_swallowed_by_a_library():
  """JAX goes on after any Exception while it writes its cache. Who waits for programs asks again, whatever became of the first
  one."""
  with hosts.Watch(at_once=True) as watch:
    with pytest.raises(hosts.Preempted):
      try:
        signal.raise_signal(signal.SIGTERM)
      except Exception:
        pass
    with pytest.raises(hosts.Preempted, match="SIGTERM"):
      watch.check()


def test_a_file_of_flags_is_left_as_it_is(monkeypatch):
  """XLA takes its name alone, or flags."""
  monkeypatch.setattr(hosts.jax, "devices", list)  # which would read the file
  ours = "--xla_gpu_enable_triton_gemm=false --xla_gpu_graph_min_graph_size=1"
  theirs = "--xla_cpu_enable_fast_math=false"
  for given, after in (("flags.txt", "flags.txt"), (theirs, f"{theirs} {ours}"), ("", ours)):
    monkeypatch.setenv("XLA_FLAGS", given)
    hosts.check_devices()
    assert os.environ["XLA_FLAGS"] == after


def test_the_watch_raises_at_the_next_call_and_hands_the_signal_back():
  before = signal.getsignal(signal.SIGTERM)
  with hosts.Watch() as watch:
    watch.check()
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(hosts.Preempted):
      watch.check()
  assert signal.getsignal(signal.SIGTERM) is before


class Node:
  other = None


def test_only_a_process_of_our_own_takes_what_is_there_out_of_the_collectors_way(monkeypatch):
  """Garbage of before is collected first, what comes later goes as ever."""
  before = gc.get_freeze_count()
  hosts.settle()
  assert gc.get_freeze_count() == before
  garbage = [Node(), Node()]
  monkeypatch.setattr(hosts, "own_process", lambda: True)
  try:
    garbage[0].other = garbage[0]
    gone = weakref.ref(garbage.pop(0))
    hosts.settle()
    assert gone() is None and gc.get_freeze_count() > before
    later = weakref.ref(cycle := Node())
    cycle.other = cycle
    del cycle
    gc.collect()
    assert later() is None
  finally:
    gc.unfreeze()
