"""One end of a line between the engine's process (front.py) and one that speaks HTTP; remote.py says what goes over it."""

import collections
from multiprocessing.connection import Connection
import pickle
import select
import threading
import time

_SMALL = 1 << 16  # bytes of a message that a line which can be written to takes at once


class Line:
  """Sends messages from any thread, and hears them in one. EOFError or OSError from `hear` where the other process has ended.

  behind: where posted messages wait for the other process, when it last took one, by time.monotonic(); None where none waits.
  """

  def __init__(self, connection: Connection):
    self.connection, self._sending, self.hear = connection, threading.Lock(), connection.recv
    self.behind: float | None = None
    self._order, self._waiting = threading.Lock(), collections.deque()

  def send(self, *message) -> None:
    """To nobody where the other process has ended: the thread that hears finds out."""
    self._write(_packed(message))

  def post(self, *message) -> None:
    """As send, and waits for nobody: what the other process has no room for goes later, and then all that follows it."""
    data = _packed(message)
    with self._order:
      if self.behind is None and len(data) <= _SMALL and self._has_room():
        return self._write(data)
      self._waiting.append(data)
      if self.behind is None:
        self.behind = time.monotonic()
        threading.Thread(target=self._catch_up, name="line", daemon=True).start()

  def _catch_up(self) -> None:
    while True:
      with self._order:
        if not self._waiting:
          self.behind = None
          return
        data, self.behind = self._waiting.popleft(), time.monotonic()
      self._write(data)

  def _has_room(self) -> bool:
    try:
      poll = select.poll()
      poll.register(self.connection.fileno(), select.POLLOUT)
      return bool(poll.poll(0))
    except OSError:  # closed
      return True

  def _write(self, data: bytes) -> None:
    try:
      with self._sending:
        self.connection.send_bytes(data)
    except OSError:
      pass

  def close(self) -> None:
    with self._sending:  # what sends now must not write to a file that has this one's number next
      self.connection.close()


def _packed(message: tuple) -> bytes:
  return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)  # Connection.send's pickler takes longer
