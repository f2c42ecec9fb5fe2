"""Grading in worker processes with deadlines: what cannot be bounded here runs where it can be killed.

`Grader` settles most answers inline and hands the rest, and every call of a custom reward function, to
workers. Each worker has one item at a time, a deadline and a memory limit; one that is late or dead is killed
and replaced. Workers (worker.py) are started on first need, as fresh interpreters that import this package's rewards and
nothing else: not the caller's __main__ (so a script needs no guard and a notebook works), not JAX, not the
trainer. They are a guard against mistakes and hostile text, not a sandbox against hostile code. Unix only; memory is
limited on Linux only.
Left out: grading over several hosts.
"""

import atexit
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, wait
import contextlib
import logging
from multiprocessing.connection import Connection, Pipe
import os
import queue
import signal
import socket
import struct
import subprocess
import sys
import threading
import weakref

from arrol_jax.rewards import worker as worker_process
from arrol_jax.rewards.extract import check_pattern
from arrol_jax.rewards.grade import Graded, judge, settle

START_SECONDS = 120.0  # for a worker's imports on a busy machine; not part of an item's time
START_ATTEMPTS = 5  # for one item: a busy machine is slow to start one, and something may kill it meanwhile
_START = "import sys; from arrol_jax.rewards import worker; worker.work(int(sys.argv[1]))"

_log = logging.getLogger(__name__)
class _Worker:
  """The parent's side of one worker process. One thread asks; any thread may close."""

  def __init__(self, settings: tuple, tell: Callable[[str, str], None]):
    """settings: seconds, MiB, reward function, pattern, least reward of a success. tell(kind, text): what went wrong."""
    self.settings, self.timeout_s, self.tell = settings, settings[0], tell
    self.process: subprocess.Popen | None = None
    self.connection: Connection | None = None
    self.closed = False
    self.missing = ""  # a module without which no process will ever start
    self.lock = threading.Lock()  # between starting a process and closing

  def start(self) -> str:
    """Starts the process and waits until it can take an item. Returns "" or what went wrong."""
    ours, theirs = Pipe()
    with self.lock, theirs:
      if self.closed:
        ours.close()
        return "the grader is closed"
      path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
      self.connection = ours
      # The same hash seed in every worker: what a reward function does with a set does not depend on the worker.
      environment = os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"}
      self.process = subprocess.Popen(  # -P: only the parent's sys.path counts
        [sys.executable, "-P", "-c", _START, str(theirs.fileno())], env=environment, stdin=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()])
    try:
      _limit_waiting(ours, self.timeout_s)
      self.connection.send((os.getpid(), *self.settings))
      problem = self.connection.recv() if self.connection.poll(START_SECONDS) else "it did not start in time"
    except (OSError, EOFError):
      problem = "it died while starting"
    if problem:
      self.stop()
    return problem

  def stop(self) -> None:
    """Kills the process, if there is one, and forgets it."""
    with self.lock:
      if self.process is not None:
        self.process.kill()
        self.process.wait()
        self.connection.close()
      self.process = self.connection = None

  def ask(self, item: tuple[str, str]) -> Graded:
    """One item's grade, within the deadline, whatever the worker does."""
    for _ in range(2):
      problem = self._ensure_started()
      if problem:
        if not self.closed and problem != self.missing:
          _log.warning("no reward worker, so reward 0: %s", problem)
        if "ModuleNotFoundError" in problem:
          self.missing = problem  # told once; trying again with every item would cost a process each
        return Graded(0.0, "error")
      try:
        self.connection.send(item)
        if not self.connection.poll(self.timeout_s):
          self.stop()
          if not self.closed:
            self.tell("timeout", f"it took longer than reward.timeout={self.timeout_s:g} s")
          return Graded(0.0, "timeout")
        *graded, problem = self.connection.recv()
        graded = Graded(*graded)
      except (OSError, EOFError):
        how = self._death()
        self.stop()  # dead, of this item or of something else: the item gets a second worker
        continue
      if problem:
        self.tell("returned" if problem.startswith("it returned") else graded.reason, problem)
      if graded.reason == "crashed":
        self.stop()  # out of memory: what is left of the process is not to be relied on
      return graded
    if not self.closed:
      self.tell("died", f"its process ended under one answer twice ({how})")
    return Graded(0.0, "crashed")

  def _death(self) -> str:
    """How the process ended, whose end of the connection is closed."""
    try:
      status = self.process.wait(1.0)
    except subprocess.TimeoutExpired:
      return "it closed its connection"
    return f"exit status {status}" if status >= 0 else signal.Signals(-status).name

  def _ensure_started(self) -> str:
    """Returns "" or what stood in the way of having a live worker."""
    problem = self.missing
    for _ in range(0 if self.missing else START_ATTEMPTS):
      if self.process is not None and self.process.poll() is None:
        return ""
      self.stop()
      problem = self.start()
      if not problem or self.closed or "ModuleNotFoundError" in problem:
        break
    return problem

  def close(self) -> None:
    """No process from now on; a thread that waits for this one is woken by its death."""
    with self.lock:
      self.closed = True
      if self.process is not None:
        self.process.kill()


def _limit_waiting(connection: Connection, seconds: float) -> None:
  """Lets a send that is not read (a long response, a worker that stands still) and a message that does not go on fail with
  OSError after `seconds`."""
  with socket.socket(fileno=os.dup(connection.fileno())) as other:  # the options are the socket's, not the descriptor's
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
      other.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", int(seconds) + 1, 0))


class _Shared:
  """What a grader's threads need of it. Not the grader itself: it must be collectable while they wait."""

  def __init__(self, limit: int, settings: tuple[float, int, str | None, str | None, float]):
    self.limit, self.settings = limit, settings
    self.problems: dict[str, str] = {}  # the first of each kind, in their order
    self.tasks: queue.SimpleQueue = queue.SimpleQueue()  # (Future, item); None: stop
    self.workers: list[_Worker] = []
    self.counts: Counter[str] = Counter()
    self.closed = False
    self.lock = threading.RLock()  # re-entrant: `close` may run as a finalizer anywhere

  def count(self, graded: Graded) -> Graded:
    with self.lock:
      self.counts[graded.reason] += 1
    return graded

  def tell(self, kind: str, problem: str) -> None:
    """Prints the first problem of each kind: a function that fails each time must not look like a policy that knows nothing."""
    with self.lock:
      if self.settings[2] and kind not in self.problems:
        self.problems[kind] = problem
        from tqdm import tqdm  # a line of its own, not behind a progress bar; workers import this module without it

        tqdm.write(f"reward function {self.settings[2]}: {problem}; reward 0", file=sys.stderr)
        sys.stderr.flush()

  def submit(self, item: tuple[str, str]) -> Future:
    """A worker's grade of a pair: what `judge` left open (gold, answer), or what a reward function takes."""
    future: Future = Future()
    with self.lock:
      if self.closed:
        future.set_result(self.count(Graded(0.0, "error")))
        return future
      if len(self.workers) < self.limit:
        self.add_worker()
      self.tasks.put((future, item))
    return future

  def add_worker(self) -> _Worker:
    """A worker and its thread; the process starts with the first item."""
    worker = _Worker(self.settings, self.tell)
    self.workers.append(worker)
    threading.Thread(target=self.serve, args=(worker,), daemon=True, name="reward").start()
    return worker

  def serve(self, worker: _Worker) -> None:
    """A thread's life: items to its worker, one after the other."""
    while (task := self.tasks.get()) is not None:
      future, item = task
      try:
        graded = worker.ask(item)
      except Exception as error:  # a caller waits for this future, so it must be set
        _log.warning("grading failed, so reward 0: %r", error)
        worker.stop()  # its answer may still come, and must not be taken for the next item's
        graded = Graded(0.0, "error")
      future.set_result(self.count(graded))
    worker.stop()

  def close(self) -> None:
    with self.lock:
      self.closed = True
      for worker in self.workers:
        worker.close()
      with contextlib.suppress(queue.Empty):
        while True:
          task = self.tasks.get_nowait()
          if task is not None:
            task[0].set_result(self.count(Graded(0.0, "error")))
      for _ in self.workers:
        self.tasks.put(None)


class Pending:
  """Grades under way, from `Grader.grade_async`."""

  def __init__(self, grader: "Grader", grades: list[Graded | Future]):
    self._grader = grader  # a grader that nobody holds closes; this one is still needed
    self._grades = grades

  def done(self) -> bool:
    """Whether `result` would return at once."""
    return self.wait(0)

  def wait(self, seconds: float) -> bool:
    """Waits so long for the missing ones, and says whether `result` would return at once."""
    return not wait([grade for grade in self._grades if isinstance(grade, Future)], seconds).not_done

  def result(self) -> list[Graded]:
    """The grades in the order of the items; waits for the missing ones."""
    return [grade if isinstance(grade, Graded) else grade.result() for grade in self._grades]


class Grader:
  """Grades responses with `workers` worker processes at most, started when an item first needs one.

  workers: number of processes, >= 1.
  pattern: where the answer is, as in `extract_answer`; None reads the last \\boxed{...}.
  timeout_s: seconds an item may take in a worker. A late one is reward 0, reason "timeout".
  memory_mb: MiB of address space an item may add to its worker's.
  reward_fn: dotted path ("my.module.function") of a function (response, answer) -> any finite number (up to 1e150), which
    then grades every item, in a worker under the same limits; any other value, or an exception, is reward 0,
    reason "error"; the first failure of each kind, late answers and deaths too, is printed. It finds the answer by
    itself; a parameter called pattern gets `pattern` (worker.bind says how parameters are filled).
  success: the least reward of reward_fn's that has the reason "correct".
  A worker that dies under an item is replaced and the item tried once more; the second death is reward 0,
  "crashed". Out of memory is "crashed" too. `counts` counts the reasons of all grades so far.
  Close it, or use it as a context manager; else the workers end with its last reference or with the process.
  Raises UserError for a bad pattern, number or reward function, one that cannot be called so among them.
  """

  def __init__(self, workers: int, pattern: str | None = None, timeout_s: float = 5.0, memory_mb: int = 2048,
               reward_fn: str | None = None, success: float = 1.0):
    if workers < 1 or timeout_s <= 0 or memory_mb <= 0:
      raise _user_error(
        f"rewards: workers={workers}, timeout_s={timeout_s} and memory_mb={memory_mb} must be positive")
    try:
      check_pattern(pattern)
    except ValueError as error:
      raise _user_error(str(error)) from None
    self._pattern, self._reward_fn = pattern, reward_fn
    self._shared = _Shared(workers, (timeout_s, memory_mb, reward_fn, pattern, success))
    self._finalizer = weakref.finalize(self, self._shared.close)
    if reward_fn is not None:  # found out now, not as a run of zero rewards
      problem = self._shared.add_worker().start()
      if problem:
        self.close()
        raise _user_error(f"reward.function: {reward_fn!r} cannot be used: {problem}")

  def grade_async(self, items: Iterable[tuple[str, str]]) -> Pending:
    """Starts grading (response, answer) pairs; what needs no worker is graded before this returns."""
    return Pending(self, [self._grade(response, answer) for response, answer in items])

  def grade_all(self, items: Iterable[tuple[str, str]]) -> list[Graded]:
    """The grades of (response, answer) pairs, in their order."""
    return self.grade_async(items).result()

  @property
  def counts(self) -> Counter[str]:
    """How many grades had which reason, up to now."""
    with self._shared.lock:
      return Counter(self._shared.counts)

  @property
  def first_problem(self) -> str:
    """What first went wrong inside the reward function; "" if nothing did."""
    return next(iter(self._shared.problems.values()), "")

  def close(self) -> None:
    """Ends the workers. Items under way, and later ones that need a worker, are reward 0, reason "error"."""
    self._finalizer()

  def __enter__(self) -> "Grader":
    return self

  def __exit__(self, *_exception) -> None:
    self.close()

  def _grade(self, response: str, answer: str) -> Graded | Future:
    if self._reward_fn is not None:
      return self._shared.submit((response, answer))
    try:
      verdict = judge(response, answer, self._pattern)
    except Exception:  # not text, for one: no reason to end a run
      verdict = Graded(0.0, "error")
    return self._shared.count(verdict) if isinstance(verdict, Graded) else self._shared.submit(verdict)


def _user_error(message: str) -> Exception:
  from arrol_jax.types import UserError  # here, because workers import this module and types.py imports JAX

  return UserError(message)


# --- for `grade`, which has no grader -----------------------------------------------------------------------

_alone: _Shared | None = None
_alone_lock = threading.Lock()


def settle_alone(gold: str, answer: str) -> Graded:
  """`settle` from any thread: directly in a worker, else in the one worker that this process keeps for it."""
  global _alone
  if worker_process.inside:
    return settle(gold, answer)
  with _alone_lock:
    if _alone is None:
      _alone = _Shared(1, (5.0, 2048, None, None, 1.0))
    future = _alone.submit((gold, answer))
  return future.result()


@atexit.register
def _close_alone() -> None:
  if _alone is not None:
    _alone.close()


def _forget_alone() -> None:
  """In a forked child the parent's threads are missing: a grade would wait for ever."""
  global _alone, _alone_lock
  _alone, _alone_lock = None, threading.Lock()


os.register_at_fork(after_in_child=_forget_alone)
