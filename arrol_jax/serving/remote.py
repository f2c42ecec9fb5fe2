"""The HTTP side in processes of its own, so that it does not share the interpreter with the engine's thread: in each of them
`Remote` stands for the Service, which lives at the other end of a connection (front.py). What one of them must know of the others
stands on a page that all share (board.py).

Messages are tuples, pickled, a word first. To the engine's process: ("serving",), ("submit", [(number, Call)]), ("cancel",
number), ("score", number, method of Scorer, arguments), ("close",), ("cut",). From it: ("said", [(number, Piece or exception)],
waits for a slot in seconds, Standing) after each turn of the engine's thread, ("scored", number, result or exception), ("stop",)
for a signal, ("end", what went wrong or None) when the engine's thread has ended or this process alone has no more to wait for. A
connection that ends counts as an engine that broke.
No accelerator is touched here.
"""

from collections.abc import Callable
import contextlib
import itertools
from multiprocessing.connection import Connection
import os
import shutil
import signal
import sys
import time
import traceback
import weakref

from arrol_jax.running import hosts, streams
from arrol_jax.running.imports import without_torch
from arrol_jax.serving.board import Board
from arrol_jax.serving.calls import Broken, Call, Cut, Standing, Ticket, check_room
from arrol_jax.serving.lifecycle import Shared, listen
from arrol_jax.serving.line import Line
from arrol_jax.serving.meters import COUNTED


class Remote:
  """What the HTTP side asks of a Service. `most`: as the Service's; submit_all and cancel are called from one thread."""

  def __init__(self, line: Line, most: int, standing: Standing, board: Board):
    self.line, self.most, self.standing, self.board, self.failure = line, most, standing, board, None
    self.on_queue: Callable[[float], None] | None = None
    self.on_stop: Callable[[], None] | None = None  # called when the other process got a signal
    self._numbers = itertools.count()
    self._tickets: weakref.WeakValueDictionary[int, Ticket] = weakref.WeakValueDictionary()  # callers hold them
    self._scores: dict[int, Callable] = {}
    self._end: Exception | None = None  # why nobody answers any more: the failure, or Cut

  # ---- called from any thread -------------------------------------------------------------------------------

  def submit_all(self, calls: list[Call], on_piece: list[Callable]) -> list[Ticket]:
    """As Service.submit_all."""
    check_room(self._taken, calls, self.most)
    if not self._taken:
      self.board.put("woke", time.monotonic())
    self.board.add("sent", sum(call.n for call in calls))
    tickets = [Ticket(call, told, next(self._numbers)) for call, told in zip(calls, on_piece, strict=True)]
    self._tickets.update({ticket.number: ticket for ticket in tickets})
    self.line.send("submit", [(ticket.number, ticket.call) for ticket in tickets])
    if self._end is not None:  # perhaps before that was noted: nobody may be left to tell
      raise Cut() if self.failure is None else Broken("the engine broke") from self.failure
    return tickets

  def cancel(self, ticket: Ticket) -> None:
    self.line.send("cancel", ticket.number)

  def score(self, name: str, args: tuple, tell: Callable) -> None:
    """As Service.score."""
    number = next(self._numbers)
    self._scores[number] = tell
    self.line.send("score", number, name, args)
    self._tell_scores()

  def serving(self) -> None:
    """Calls are taken from now on."""
    self.line.send("serving")

  def close(self) -> None:
    self.line.send("close")

  def cut(self) -> None:
    self.line.send("cut")

  @property
  def running(self) -> int:
    return self.standing.running

  @property
  def waiting(self) -> int:
    return max(0, self._taken - self.running)

  @property
  def still(self) -> float:
    return time.monotonic() - max(self.standing.beat, self.board.latest("woke")) if self._taken else 0.0

  @property
  def _taken(self) -> int:
    """Traces that run or wait, of all processes; never fewer than the Service knows of."""
    return self.board.total("sent") - self.board.total("ended")

  def _tell_scores(self) -> None:
    """If nobody answers any more: tells so, each once."""
    while self._end is not None and self._scores:
      with contextlib.suppress(KeyError):  # the other thread was first
        self._scores.popitem()[1](self._end)

  # ---- the reading thread -----------------------------------------------------------------------------------

  def serve(self) -> None:
    """Hands on what comes, until the engine's thread has ended; what broke it, or the line to it, is in `failure` then."""
    try:
      while (message := self.line.hear())[0] != "end":
        self._take(*message)
      self.failure = message[1] and Broken(message[1])
    except (EOFError, OSError):
      self.failure = Broken("the engine's process has ended")
      self._orphaned()
    except Exception as e:
      self.failure = e
      traceback.print_exc()
    self._end = self.failure or Cut()
    for ticket in list(self._tickets.values()):
      ticket.on_piece(self._end)
    self._tell_scores()

  def _orphaned(self) -> None:
    """The engine's process was killed: one of those that are left removes what it would have removed, and says so."""
    if _remove_counts():
      with contextlib.suppress(OSError):  # the terminal may have ended with it
        print("error: the engine's process was killed; its callers have been told", file=sys.stderr, flush=True)

  def _take(self, word: str, *rest) -> None:
    if word == "said":
      pieces, waits, self.standing = rest
      for number, piece in pieces:
        ticket = self._tickets.get(number)
        if ticket is not None:
          ticket.on_piece(piece)
      for seconds in waits:
        self.on_queue and self.on_queue(seconds)
    elif word == "scored":
      number, result = rest
      self._scores.pop(number)(result)
    elif word == "stop":
      self.on_stop()
    else:
      raise ValueError(f"no such message: {word!r}")


def _remove_counts() -> bool:
  """Removes the folder where several processes count; whether this one did, or is alone: a folder can be moved away once."""
  folder = os.environ.get(COUNTED)
  if not folder:
    return True
  try:
    os.rename(folder, f"{folder}.gone")
  except OSError:
    return False
  shutil.rmtree(f"{folder}.gone", ignore_errors=True)
  return True


def main(listener: int, connection: int, board: int, number: int) -> int:
  """The process: serves at a listening socket; all but its number are given as file descriptors. The exit status."""
  for name in (signal.SIGTERM, signal.SIGINT):  # they may go to all processes of a group; the other one passes its own on
    signal.signal(name, lambda *_: None)
  line = Line(Connection(connection))
  hosts.take_process()
  streams.take()
  streams.spare()
  with without_torch():
    from transformers import PreTrainedTokenizerFast  # noqa: F401  (what comes has one; imported while the model loads)
  try:
    limits, *settings, standing = line.hear()
  except (EOFError, OSError):
    _remove_counts()
    return 0  # the model could not be loaded, which has been said, or the command was killed
  remote = Remote(line, limits.max_traces, standing, Board(number=number, fd=board))
  hosts.settle()
  return listen(remote, limits, Shared(fileno=listener), *settings)
