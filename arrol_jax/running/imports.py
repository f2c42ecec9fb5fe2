"""Libraries that a command imports without PyTorch. Where it is installed they import it too, for what a command does not ask of
them: seconds of a start, ten in all on some machines."""

from collections.abc import Iterator
import contextlib
import sys

from arrol_jax.running import hosts


@contextlib.contextmanager
def without_torch() -> Iterator[None]:
  """PyTorch is as if it were not installed, in a command's own process; another program's may want it."""
  hidden = hosts.own_process() and "torch" not in sys.modules
  if hidden:
    sys.modules["torch"] = None
  try:
    yield
  finally:
    if hidden:
      sys.modules.pop("torch", None)
