"""The engine's end of the line to the process that speaks HTTP (remote.py, which says what goes over it)."""

import functools
from multiprocessing.connection import Pipe
import os
import queue
import socket
import subprocess
import sys
import threading
import traceback
import weakref

from arrol_jax.running import hosts
from arrol_jax.serving.calls import Broken, Call, Cut, Piece, Ticket
from arrol_jax.serving.lifecycle import GRACE
from arrol_jax.serving.line import Line
from arrol_jax.serving.openai_api import Limits
from arrol_jax.serving.service import Service
from arrol_jax.serving.web import Access

_START = "import sys; from arrol_jax.serving import remote; sys.exit(remote.main(*map(int, sys.argv[1:])))"


class Front:
  """The HTTP side, in a process that is started at once, so that it is ready when the model is. It takes the socket over. As a
  context manager it leaves no process behind. said: where that process prints "serving NAME at URL" and how it ended (None: to
  this one's stdout)."""

  def __init__(self, listener: socket.socket, said=None):
    ours, theirs = Pipe()
    path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    fds = [listener.fileno(), theirs.fileno()]
    with listener, theirs:
      # A session of its own: Ctrl-C comes here alone. -P: only this process's sys.path counts.
      self.process = subprocess.Popen([sys.executable, "-P", "-c", _START, *map(str, fds)], pass_fds=fds, start_new_session=True,
                                      stdin=subprocess.DEVNULL, stdout=said,
                                      env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"})
    self.line = Line(ours)
    self.service: Service | None = None
    self.tickets: weakref.WeakValueDictionary[int, Ticket] = weakref.WeakValueDictionary()  # by number; the service holds them
    self.said, self.waits = [], []  # of this turn
    self.orders: queue.SimpleQueue = queue.SimpleQueue()  # "stop"; None: the process has ended

  def __enter__(self) -> "Front":
    return self

  def __exit__(self, *_exception) -> None:
    self.process.kill()
    self.process.wait()
    self.line.close()

  def stop(self) -> None:
    """What a signal does: the first drains, the second cuts. For signal handlers too."""
    self.orders.put("stop")

  def run(self, service: Service, limits: Limits, access: Access, drain: float, keep_alive: int) -> int:
    """Serves until it is stopped or something breaks; the exit status: 0 only where every call that was taken got its answer."""
    self.service, service.on_turn, service.on_queue = service, self._turn, self.waits.append
    self.line.send(limits, access, drain, keep_alive, service.standing)
    hosts.settle()
    engine = threading.Thread(target=self._decode, name="engine", daemon=True)
    engine.start()
    threading.Thread(target=self._listen, name="front", daemon=True).start()
    while order := self.orders.get():
      self.line.send(order)
    status = self._ended()
    service.cut()
    engine.join(10 * GRACE)
    if engine.is_alive():  # in the device's hands: the interpreter would not end
      os._exit(1)
    return int(status != 0 or service.failure is not None)

  def _ended(self) -> int:
    """The exit status of the HTTP side, whose end of the line is closed; said where it was killed."""
    try:
      status = self.process.wait(10 * GRACE)
    except subprocess.TimeoutExpired:
      self.process.kill()
      status = self.process.wait()
    if status < 0:
      print(f"error: the HTTP side was killed (signal {-status})", file=sys.stderr, flush=True)
    return status

  # ---- the engine's thread

  def _decode(self) -> None:
    try:
      self.service.serve()
    except Exception:
      traceback.print_exc()
    try:
      self._turn()
    finally:
      self.line.send("end", self.service.failure and _told(self.service.failure))

  def _say(self, number: int, piece: Piece | BaseException) -> None:
    self.said.append((number, piece if isinstance(piece, Piece) else _plain(piece)))

  def _turn(self) -> None:
    """All pieces of a segment go together."""
    said, waits = list(self.said), list(self.waits)
    self.said.clear()
    self.waits.clear()
    self.line.send("said", said, waits, self.service.standing)

  # ---- the thread that listens

  def _listen(self) -> None:
    try:
      while True:
        self._take(*self.line.hear())
    except (EOFError, OSError):
      pass
    except Exception:
      traceback.print_exc()
      self.process.kill()  # no sense in what it says
    self.orders.put(None)

  def _take(self, word: str, *rest) -> None:
    if word == "submit":
      self._submit(*rest)
    elif word == "cancel":
      ticket = self.tickets.get(rest[0])
      ticket and self.service.cancel(ticket)
    elif word == "score":
      number, name, args = rest
      self.service.score(name, args, functools.partial(self._scored, number))
    elif word in ("close", "cut"):
      getattr(self.service, word)()
    else:
      raise ValueError(f"no such message: {word!r}")

  def _submit(self, calls: list[tuple[int, Call]]) -> None:
    try:
      told = [functools.partial(self._say, number) for number, _ in calls]
      tickets = self.service.submit_all([call for _, call in calls], told)
    except Exception as e:
      self.line.send("said", [(number, _plain(e)) for number, _ in calls], [], self.service.standing)
      return
    self.tickets.update({number: ticket for (number, _), ticket in zip(calls, tickets, strict=True)})

  def _scored(self, number: int, result) -> None:
    if isinstance(result, Exception):
      traceback.print_exception(result)
      result = _plain(result)
    self.line.send("scored", number, result)


def _told(e: BaseException) -> str:
  return f"{type(e).__name__}: {e}"


def _plain(e: BaseException) -> Exception:
  """An exception that any process can read."""
  return Cut(str(e)) if isinstance(e, Cut) else Broken(_told(e))
