"""What a process says, where nobody can hear it: a pipe whose reader is gone, a full disk, a closed terminal.

stderr is for progress and messages: what cannot be written there is lost and costs nothing else. stdout may be a command's
product: its errors say where they come from, until the command says that it is for progress too (`spare`).
"""

from collections.abc import Iterator
import contextlib
import errno
import io
import os
import sys


class _Stream(io.FileIO):
  """A descriptor to write to, each text whole and at once: what could not be written is not kept for later."""

  def __init__(self, descriptor: int, named: str | None):
    """named: what errors call it; None: there are none."""
    super().__init__(descriptor, "w", closefd=False)
    self.named = named

  def write(self, data) -> int:
    rest = memoryview(data).cast("B")
    try:
      while rest:
        written = super().write(rest)
        if written is None:  # it is full, and set not to wait
          raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        rest = rest[written:]
    except OSError as e:
      if self.named:
        raise OSError(e.errno, e.strerror, self.named) from e
    return len(data)


def take() -> None:
  """Takes over this process's own sys.stdout and sys.stderr; what somebody has put there (a notebook, a test) stays."""
  for descriptor, name, named in ((1, "stdout", "standard output"), (2, "stderr", None)):
    stream = getattr(sys, name)
    if stream is not getattr(sys, f"__{name}__"):
      continue
    if stream is None:  # closed before the start; a file that is opened later must not get its number
      _fill(descriptor)
    with contextlib.suppress(AttributeError, OSError):
      stream.flush()
    like = {"encoding": stream.encoding, "errors": stream.errors} if stream else {}
    setattr(sys, name, io.TextIOWrapper(_Stream(descriptor, named), **like, line_buffering=True))


def spare() -> None:
  """From now on stdout is for progress as stderr is: what cannot be written is lost."""
  stream = getattr(sys.stdout, "buffer", None)
  if isinstance(stream, _Stream):
    stream.named = None


@contextlib.contextmanager
def naming(path: str | os.PathLike) -> Iterator[None]:
  """OSErrors of an open file name it, as those of its opening do."""
  try:
    yield
  except OSError as e:
    e.filename = e.filename or str(path)
    raise


def _fill(descriptor: int) -> None:
  """/dev/null in the place of a descriptor that is closed."""
  try:
    os.fstat(descriptor)
  except OSError:
    null = os.open(os.devnull, os.O_WRONLY)
    if null != descriptor:
      os.dup2(null, descriptor)
      os.close(null)
