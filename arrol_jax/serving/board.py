"""A page of memory that the processes of the HTTP side share, and the engine's with them: what each must know of all."""

import mmap
import os
import tempfile

import numpy as np

# Traces handed in; those that have ended; when the first of those under way was handed in, by time.monotonic(); traces of calls
# that want passes or a vote; calls cut off.
FIELDS = ("sent", "ended", "woke", "scoring", "cut")


class Board:
  """Each process writes its own row and reads all of them, without a lock: a sum may be a moment old. So two calls that come to
  two processes at once may both find the last place free, and be one call more than there is room for.

  count: of rows; number: the own one; fd: of a Board made by another process (None: a new page, whose `fd` it is).
  """

  def __init__(self, count: int = 1, number: int = 0, fd: int | None = None):
    self.fd = _page(count * len(FIELDS) * 8) if fd is None else fd
    self._rows = np.frombuffer(mmap.mmap(self.fd, 0), np.float64).reshape(-1, len(FIELDS))
    self._mine = self._rows[number]

  def put(self, field: str, value: float) -> None:
    """Sets a field of the own row."""
    self._mine[FIELDS.index(field)] = value

  def add(self, field: str, value: int) -> None:
    self._mine[FIELDS.index(field)] += value

  def total(self, field: str) -> int:
    return int(self._rows[:, FIELDS.index(field)].sum())

  def latest(self, field: str) -> float:
    return float(self._rows[:, FIELDS.index(field)].max())

  def close(self) -> None:
    os.close(self.fd)


def _page(size: int) -> int:
  """A file descriptor of so many bytes of memory, all 0."""
  if hasattr(os, "memfd_create"):
    out = os.memfd_create("arrol-board")
  else:
    with tempfile.TemporaryFile() as file:
      out = os.dup(file.fileno())
  os.ftruncate(out, size)
  return out
