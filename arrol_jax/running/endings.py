"""What a command says of the error that ends it, and its exit status."""

from collections.abc import Iterator
import contextlib
import errno

import jax

from arrol_jax.types import UserError

_FULL = errno.ENOSPC, errno.EDQUOT, errno.EFBIG
_PLACES = errno.EIO, errno.ESTALE, errno.EROFS  # a place's own fault, also where the error names none
_AGAIN = "the same command goes on from the last checkpoint, if there is one"


@contextlib.contextmanager
def naming(folder: str) -> Iterator[None]:
  """What a disk says of no file by its name, as of one that is open, is of this folder."""
  try:
    yield
  except OSError as e:
    if e.filename is None and e.errno in _FULL + _PLACES:
      e.filename = folder
    raise


def told(e: BaseException) -> tuple[str, int] | None:
  """A line and a status; None for what nobody foresaw, which is a traceback."""
  match e:
    case UserError():
      return " ".join(["error:", *str(e).split()]), 2
    case KeyboardInterrupt():
      return f"interrupted; {_AGAIN}", 130
    case OSError() if e.errno in _FULL or e.filename is not None or e.errno in _PLACES:
      do = "make room" if e.errno in _FULL else "repair it"
      return f"error: {f'{e.filename}: ' * bool(e.filename)}{e.strerror}; {do}, and {_AGAIN}", 2
    case MemoryError():
      return _out_of_memory("this machine's memory", e)
    case _ if device_is_full(e):
      return _out_of_memory("a device's memory", e)
  return None


def device_is_full(e: BaseException) -> bool:
  """Whether this is JAX's error where a device has no memory left."""
  return isinstance(e, jax.errors.JaxRuntimeError) and ("RESOURCE_EXHAUSTED" in str(e) or "Out of memory" in str(e))


def _out_of_memory(whose: str, e: Exception) -> tuple[str, int]:
  said = next((line.strip() for line in str(e).splitlines() if line.strip()), "no more is to be had")[:200].rstrip(".")
  return (f"error: {whose} is full ({said}); fewer rollout.slots or rollout.prompts, a smaller optim.micro_tokens and "
          f"model.remat=full take less, and arrol-doctor estimates how much; {_AGAIN}"), 2
