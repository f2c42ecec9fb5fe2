"""The engine's end of the lines to the processes that speak HTTP (remote.py, which says what goes over them)."""

from collections.abc import Callable
import contextlib
import errno
import functools
from multiprocessing.connection import Pipe
import os
import queue
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import weakref

from arrol_jax.running import hosts
from arrol_jax.serving.board import Board
from arrol_jax.serving.calls import Broken, Call, Cut, Piece, Ticket, Totals
from arrol_jax.serving.connections import take_descriptors
from arrol_jax.serving.lifecycle import GRACE
from arrol_jax.serving.line import Line
from arrol_jax.serving.meters import COUNTED
from arrol_jax.serving.openai_api import Limits
from arrol_jax.serving.service import Service
from arrol_jax.serving.web import Access
from arrol_jax.types import UserError

CORES, MOST = 4, 4  # a process of the HTTP side for so many cores, and so many at most
SILENT = 5 * GRACE, 30 * GRACE  # seconds after which one that takes nothing of what it is told is named, and killed
STARTING = 15 * GRACE, 60 * GRACE  # the same of one that does not take calls yet, once the model is there
_ROOM = 16 << 20  # bytes that a folder must have for what they count together
_START = "import sys; from arrol_jax.serving import remote; sys.exit(remote.main(*map(int, sys.argv[1:])))"


def processes_here() -> int:
  """How many processes the HTTP side has where nobody says: one keeps up with some hundred calls a second."""
  cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
  return max(1, min(MOST, cores // CORES))


class _Side:
  """One process of the HTTP side, and the line to it."""

  def __init__(self, number: int, listener: socket.socket, board: Board, said, env: dict[str, str]):
    ours, theirs = Pipe()
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    fds = [listener.fileno(), theirs.fileno(), board.fd]
    with theirs:
      # A session of its own: Ctrl-C comes here alone. -P: only this process's sys.path counts.
      self.process = subprocess.Popen([sys.executable, "-P", "-c", _START, *map(str, (*fds, number))], pass_fds=fds,
                                      start_new_session=True, stdin=subprocess.DEVNULL, stdout=said,
                                      env=env | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"})
    self.line = Line(ours)
    self.tickets: weakref.WeakValueDictionary[int, Ticket] = weakref.WeakValueDictionary()  # by number; the service holds them
    self.said: list[tuple] = []  # of this turn
    self.begun = float("inf")  # when it was told to serve
    self.serving = self.named = False  # it takes calls; it has been said that it does not answer
    self.over = self.cut = self.gone = False  # it takes no more; its calls are cut; its end of the line is closed

  def silent(self) -> tuple[float, tuple[float, float]]:
    """Seconds since it took something of what it is told, or was told to serve; and after how many it is named, and killed."""
    since, allowed = (self.line.behind, SILENT) if self.serving else (self.begun, STARTING)
    return 0.0 if since is None else time.monotonic() - since, allowed

  def status(self) -> int:
    """Its exit status, where its end of the line is closed."""
    try:
      return self.process.wait(10 * GRACE)
    except subprocess.TimeoutExpired:
      self.process.kill()
      return self.process.wait()

  def end(self) -> None:
    self.process.kill()
    self.process.wait()
    self.line.close()


class Front:
  """The HTTP side, in `count` processes that are started at once, so that they are ready when the model is. They take the socket
  over, and connections as they come. As a context manager it leaves no process behind. said: where "serving NAME at URL" is
  printed, and how it ended (None: to stdout)."""

  def __init__(self, listener: socket.socket, count: int = 1, said=None):
    take_descriptors()  # as many as its processes, which inherit that, may have
    self.said, self.address = said, listener.getsockname()
    self.board = Board(count + 1, count)  # a row a process, the last is this one's
    self.counted = _folder() if count > 1 else None  # where they count together
    env = {name: value for name, value in os.environ.items() if name.upper() != COUNTED}
    env |= {COUNTED: self.counted.name} if self.counted else {}
    self.sides: list[_Side] = []
    try:
      with listener:
        for number in range(count):
          self.sides.append(_Side(number, listener, self.board, said, env))
    except OSError as e:
      self.__exit__()
      raise UserError(f"--http_processes={count}: {len(self.sides)} could be started ({e.strerror or e}); give it fewer, or "
                      "allow more open files and processes (ulimit)") from e
    self.service: Service | None = None
    self.model = ""
    self.waits: list[float] = []  # of this turn
    self.orders: queue.SimpleQueue = queue.SimpleQueue()  # "stop"; None: all processes have ended
    self.stopping = self.leaving = False  # leaving: all processes are being ended
    self._lock = threading.Lock()  # over what has become of the sides
    for side in self.sides:
      threading.Thread(target=self._listen, args=(side,), name="front", daemon=True).start()

  def __enter__(self) -> "Front":
    return self

  def __exit__(self, *_exception) -> None:
    self.leaving = True
    for side in self.sides:
      side.end()
    self.board.close()
    self.counted and self.counted.cleanup()

  def stop(self) -> None:
    """What a signal does: the first drains, the second cuts. For signal handlers too."""
    self.stopping = True
    self.orders.put("stop")

  def run(self, service: Service, limits: Limits, access: Access, drain: float, keep_alive: int) -> int:
    """Serves until it is stopped or something breaks; the exit status: 0 only where every call that was taken got its answer."""
    service.on_turn, service.on_queue = self._turn, self.waits.append
    self.before, self.model = _ended(service.totals), limits.model
    with self._lock:
      self.service = service
      if any(side.gone for side in self.sides):  # which has been said
        return 1
    for side in self.sides:
      side.begun = time.monotonic()
      side.line.post(limits, access, drain, keep_alive, service.standing)
    hosts.settle()
    engine = threading.Thread(target=self._decode, name="engine", daemon=True)
    engine.start()
    threading.Thread(target=self._watch, name="watch", daemon=True).start()
    patience = drain + 30 * GRACE  # a process waits up to 20 GRACE for an engine that does not answer
    while order := self.orders.get():
      for side in self.sides:
        side.line.post(order)
      killing = threading.Timer(patience, self._kill)
      killing.daemon, patience = True, 30 * GRACE
      killing.start()
    status = [side.status() for side in self.sides]
    self.leaving = True
    service.cut()
    engine.join(10 * GRACE)
    if cut := self.board.total("cut"):
      self._print(f"stopped: {cut} calls under way were cut")
    elif not any(status):
      self._print("drained")
    if engine.is_alive():  # in the device's hands: the interpreter would not end
      print("the engine does not answer; leaving without it", file=sys.stderr, flush=True)
      os._exit(1)
    return int(any(status) or service.failure is not None)

  def _kill(self) -> None:
    """Those that have not ended when all was to be over."""
    for side in self.sides:
      if not side.gone:
        side.process.kill()

  def _watch(self) -> None:
    """Names a process that does not answer, and then kills it: what happens to its calls is known, and the others drain."""
    while not self.leaving:
      time.sleep(GRACE / 4)
      for side in self.sides:
        seconds, (named, killed) = side.silent()
        of = f"a process of the HTTP side ({side.process.pid}) has not answered for {seconds:.0f} s"
        if not side.gone and seconds >= killed:
          _complain(f"error: {of}; it is killed")
          side.process.kill()
        elif not side.gone and seconds >= named and not side.named:
          _complain(f"warning: {of}")
        side.named = seconds >= named

  def _print(self, text: str) -> None:
    with contextlib.suppress(OSError):  # nobody may be left to read it, or its disk be full: no reason not to serve
      os.write(self.said.fileno() if self.said else 1, f"{text}\n".encode())

  # ---- the engine's thread

  def _decode(self) -> None:
    try:
      self.service.serve()
    except Exception:
      traceback.print_exc()
    try:
      self._turn()
    finally:
      for side in self.sides:
        side.line.post("end", self.service.failure and _told(self.service.failure))

  def _turn(self) -> None:
    """All pieces of a segment go together; how the engine stands goes to all, how long calls waited to one, which counts it."""
    waits = list(self.waits)
    self.waits.clear()
    self.board.put("ended", _ended(self.service.totals) - self.before)  # before anybody hears of it
    for side in self.sides:
      said = list(side.said)
      side.said.clear()
      if not side.gone:
        side.line.post("said", said, waits, self.service.standing)
        waits = []

  # ---- the threads that listen, one a side

  def _listen(self, side: _Side) -> None:
    try:
      while True:
        word, *rest = side.line.hear()
        if word == "serving":
          self._serving(side)
        else:
          self._take(side, word, *rest)
    except (EOFError, OSError):
      pass
    except Exception:
      traceback.print_exc()
      side.process.kill()  # no sense in what it says
    self._gone(side)

  def _serving(self, side: _Side) -> None:
    with self._lock:
      side.serving = True
      if all(x.serving for x in self.sides):
        self._print(f"serving {self.model} at {_url(*self.address)}")

  def _gone(self, side: _Side) -> None:
    """A process has ended. Where it was not told to, the others drain: nobody should have to find out which one answers. While
    the model loads the whole command ends."""
    if self.leaving:
      return
    died, status = not side.over, side.status()
    if status < 0:
      _complain(f"error: the HTTP side was killed (signal {-status})")
    if died or status < 0:  # it cannot count them
      self.board.add("cut", len(side.tickets))
    with self._lock:
      side.gone = True
      if self.service is None:
        return os.kill(os.getpid(), signal.SIGTERM)
      if all(x.gone for x in self.sides):
        self.orders.put(None)
      elif died and not self.stopping:
        self.stop()
    self._over(side, True)

  def _over(self, side: _Side, cut: bool) -> None:
    """A side takes no more calls, and those that it has are answered or cut. The last one's word is the engine's end."""
    with self._lock:
      side.over, side.cut = True, side.cut or cut
      last, all_cut = all(x.over for x in self.sides), all(x.cut for x in self.sides)
    if last and not all_cut:
      self.service.close()
    elif last:
      self.service.cut()
    else:
      for ticket in list(side.tickets.values()):
        self.service.cancel(ticket)
      side.line.post("end", None)

  def _take(self, side: _Side, word: str, *rest) -> None:
    if word == "submit":
      self._submit(side, *rest)
    elif word == "cancel":
      ticket = side.tickets.get(rest[0])
      ticket and self.service.cancel(ticket)
    elif word == "score":
      number, name, args = rest
      self.service.score(name, args, functools.partial(self._scored, side, number))
    elif word in ("close", "cut"):
      self._over(side, word == "cut")
    else:
      raise ValueError(f"no such message: {word!r}")

  def _submit(self, side: _Side, calls: list[tuple[int, Call]]) -> None:
    try:
      told = [_teller(side, number) for number, _ in calls]
      tickets = self.service.submit_all([call for _, call in calls], told, room_found=True)
    except Exception as e:
      side.line.post("said", [(number, _plain(e)) for number, _ in calls], [], self.service.standing)
      return
    side.tickets.update({number: ticket for (number, _), ticket in zip(calls, tickets, strict=True)})

  def _scored(self, side: _Side, number: int, result) -> None:
    if isinstance(result, Exception):
      traceback.print_exception(result)
      result = _plain(result)
    side.line.post("scored", number, result)


def _ended(totals: Totals) -> int:
  return totals.traces + totals.cancelled


def _folder() -> tempfile.TemporaryDirectory:
  """In memory where there is room: no disk that is full, nor what is cleaned away. Pages of a file that its disk has no room for
  would end the process that writes to them."""
  memory = "/dev/shm"
  try:
    folder = memory if os.access(memory, os.W_OK) and _room(memory) >= _ROOM else tempfile.gettempdir()
    if _room(folder) < _ROOM:
      raise OSError(errno.ENOSPC, f"{folder} has no {_ROOM >> 20} MiB left")
    return tempfile.TemporaryDirectory(prefix="arrol-serve-", dir=folder)
  except OSError as e:
    raise UserError(f"several processes that speak HTTP count together in a temporary folder, and there is none to be had "
                    f"({e.strerror or e}); let TMPDIR say where, or give --http_processes=1") from e


def _room(folder: str) -> int:
  """Bytes that are free there."""
  return shutil.disk_usage(folder).free


def _complain(text: str) -> None:
  with contextlib.suppress(OSError):
    print(text, file=sys.stderr, flush=True)


def _teller(side: _Side, number: int) -> Callable:
  """What the engine's thread calls with a call's pieces."""
  return lambda piece: side.said.append((number, piece if isinstance(piece, Piece) else _plain(piece)))


def _url(host: str, port: int, *_ipv6) -> str:
  return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _told(e: BaseException) -> str:
  return f"{type(e).__name__}: {e}"


def _plain(e: BaseException) -> Exception:
  """An exception that any process can read."""
  return Cut(str(e)) if isinstance(e, Cut) else Broken(_told(e))
