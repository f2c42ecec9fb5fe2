"""One end of a line between the engine's process (front.py) and one that speaks HTTP; remote.py says what goes over it."""

from multiprocessing.connection import Connection
import pickle
import threading


class Line:
  """Sends messages from any thread, and hears them in one. EOFError or OSError from `hear` where the other process has ended."""

  def __init__(self, connection: Connection):
    self.connection, self._sending, self.hear = connection, threading.Lock(), connection.recv

  def send(self, *message) -> None:
    """To nobody where the other process has ended: the thread that hears finds out."""
    try:
      with self._sending:
        self.connection.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))  # Connection.send's pickler takes longer
    except OSError:
      pass

  def close(self) -> None:
    with self._sending:  # what sends now must not write to a file that has this one's number next
      self.connection.close()
