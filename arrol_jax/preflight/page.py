"""The page that arrol-doctor prints, section by section, and what it found wrong."""

from collections.abc import Callable

from arrol_jax.types import UserError

_LEFT = 14  # columns of the sections' names


class Page:
  """Lines as they are said; warnings and errors for the end. An error is what train.py would end with."""

  def __init__(self):
    self.warnings: list[str] = []
    self.errors: list[str] = []
    self._name = ""

  def section(self, name: str, work: Callable, *needs):
    """work(), whose UserError is an error of the page; None where it failed, or where one of `needs` is None.

    What work says stands behind the section's name.
    """
    if any(x is None for x in needs):
      return None
    self._name = name
    try:
      return work()
    except UserError as e:
      text = " ".join(str(e).split())
      self.say("cannot work")
      self.errors.append(text)
      return None

  def say(self, text: str) -> None:
    print(f"{self._name:<{_LEFT}}{text}", flush=True)
    self._name = ""

  def warn(self, text: str) -> None:
    self.warnings.append(text)


def size(count: float) -> str:
  """Bytes as people read them."""
  unit = next((u for u in ("GiB", "MiB", "KiB") if count >= {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}[u]), "B")
  return f"{count / {'GiB': 2**30, 'MiB': 2**20, 'KiB': 2**10, 'B': 1}[unit]:,.{1 if unit != 'B' else 0}f} {unit}"
