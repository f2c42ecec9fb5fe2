"""The trial's queue on several devices of one machine: a process each, that sees one device and does what no other is at.

A process ends when all is done, when its time is over, when its standard input ends (so all end with the one that started them,
however that ends), or when a run fails: what is left of it on the device is not to be trusted, so another takes its place. Each
says what it does in lines of its own ("device 2: ..."); all else that its runs print goes to runs/trial/device2.log. Processor
cores are shared out, so that one run's compiling does not slow another's steps. Left out: what is run (trial_queue.py).
"""

from collections.abc import Iterator
import contextlib
import os
from pathlib import Path
import signal
import subprocess
import sys
import threading

from arrol_jax.types import UserError
from experiments import runs, trial_queue
from experiments.trial_arms import ROOT, Run
from experiments.trial_queue import Call

GRACE = 90.0   # seconds that a process has to save its run and end, once it is told to
FAILURES = 3   # failed runs after which a device is given up
AGAIN = 3      # exit status of a process whose run failed


def start(command: list[str], count: int, todo: list[Run], call: Call, platform: str | None = None) -> bool:
  """Processes `python COMMAND --worker=I` on `count` devices until all of `todo` is done or the call is over: False. platform:
  JAX's, "cuda" where it must not be anything else. UserError where a device is given up, or for what the user can mend."""
  devices, said = visible(count), [""] * count

  def serve(i: int):
    environment = os.environ | runs.environment() | {"CUDA_VISIBLE_DEVICES": devices[i]}
    environment |= {"JAX_PLATFORMS": platform} if platform else {}
    said[i] = keep_busy(i, command, environment, todo, call)

  threads = [threading.Thread(target=serve, args=(i,), daemon=True) for i in range(count)]
  with told_by_signals(call.told):
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
  if any(said):
    raise UserError("; ".join(dict.fromkeys(filter(None, said))))
  return not any(trial_queue.missing(run, "train") for run in todo)


def visible(count: int) -> list[str]:
  """Names of the first `count` devices, of those that CUDA_VISIBLE_DEVICES allows where it is set."""
  names = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name] or list(map(str, range(count)))
  if count > len(names):
    raise UserError(f"--devices={count}: CUDA_VISIBLE_DEVICES names {len(names)}")
  return names[:count]


@contextlib.contextmanager
def told_by_signals(told: threading.Event) -> Iterator[None]:
  """SIGTERM, SIGHUP and Ctrl-C set `told`; after a second Ctrl-C this process ends at once and the others by themselves."""
  def note(number, _frame):
    told.set()
    if number == signal.SIGINT:
      signal.signal(signal.SIGINT, signal.default_int_handler)
      with contextlib.suppress(OSError):
        os.write(2, b"\nruns save their last step and end\n")

  before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
  try:
    yield
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


def log_of(i: int) -> Path:
  return ROOT / f"runs/trial/device{i}.log"


def keep_busy(i: int, command: list[str], environment: dict, todo: list[Run], call: Call) -> str:
  """Processes on device i, one after another as runs fail; why the device was given up, "" if it was not."""
  log = log_of(i)
  log.parent.mkdir(parents=True, exist_ok=True)
  for _ in range(FAILURES):
    with open(log, "ab") as file:
      process = subprocess.Popen([sys.executable, *command, f"--minutes={max(0.0, call.left()) / 60}", f"--worker={i}"], cwd=ROOT,
                                 env=environment, stdin=subprocess.PIPE, stderr=file, start_new_session=True)
    status = wait(process, call)
    if status == 0 or call.left() <= 0:
      return ""
    last = (log.read_text(errors="replace").split("\n")[-2:-1] or [""])[0].rpartition("\r")[2].strip()
    if status == 2:  # a mistake that all of them would find
      call.told.set()
      return last.removeprefix("error: ")
    if status != AGAIN:
      trial_queue.give_up(todo, process.pid, f"its process ended with status {status}: {last}"[:500], call)
  return f"device {i}: given up after {FAILURES} failures; see {log.relative_to(ROOT)}"


def wait(process: subprocess.Popen, call: Call) -> int:
  """Its exit status; when the call is over it is told to end, and made to if it does not."""
  while process.poll() is None and call.left() > 0:
    with contextlib.suppress(subprocess.TimeoutExpired):
      process.wait(min(0.5, max(0.01, call.left())))
  process.stdin.close()
  try:
    return process.wait(GRACE)
  except subprocess.TimeoutExpired:
    process.kill()
    return process.wait()


# ---- in such a process


def work(i: int, count: int, todo: list[Run], call: Call) -> int:
  """One device's part, in a process that sees no other; its exit status. call: quiet and fresh."""
  if hasattr(os, "sched_setaffinity"):
    cores = sorted(os.sched_getaffinity(0))
    share = len(cores) // count
    os.sched_setaffinity(0, cores[i * share:(i + 1) * share] or cores)
  threading.Thread(target=_until_alone, args=(call.told,), daemon=True).start()
  try:
    trial_queue.start(todo, call)
  except trial_queue.Failed:
    return AGAIN
  return 0


def _until_alone(told: threading.Event) -> None:
  """Sets `told` when standard input ends: by whom it was started wants it to end, or is gone."""
  while os.read(0, 1):
    pass
  told.set()
