"""What `--help` prints: what a command does with examples, its flags, and every config key, each with its default."""

import argparse
import re
import textwrap

from arrol_jax.running import shipped
from arrol_jax.types import UserError

WIDTH = 118


class Parser(argparse.ArgumentParser):
  """For commands without a config: a mistake is one line, like every other."""

  def error(self, message: str):
    raise UserError(f"{message} ({self.prog} -h tells all)")


def text(doc: str, flags: list[tuple[str, object, str]]) -> str:
  """doc: the command's docstring, whose second paragraph are examples. flags: (name, default, what it does)."""
  lines = [doc.strip(), "", "Flags:"]
  lines += _rows([(f"--{name}" + ("" if default is None else f"={default}"), what) for name, default, what in flags])
  lines += ["", "Config keys, with defaults of configs/base.py (a config file sets others):"]
  return "\n".join(lines + _rows([(f"--config.{name}={value}", what) for name, value, what in keys()]))


def keys() -> list[tuple[str, str, str]]:
  """(name, default, what it means) of every config key, read from the assignments of configs/base.py."""
  out = []
  for line in (shipped.CONFIGS / "base.py").read_text().splitlines():
    assigned = re.match(r"  c\.([\w.]+) = (.+?)(?:\s+# (.*))?$", line)
    if assigned and not re.fullmatch(r"(ConfigDict|Section)\(\)", assigned[2]):
      value = "None" if "placeholder(" in assigned[2] else assigned[2]
      out.append((assigned[1], value, assigned[3] or ""))
    elif out and (more := re.match(r"\s{12,}# (.*)", line)):
      out[-1] = (*out[-1][:2], f"{out[-1][2]} {more[1]}")
  return out


def _rows(pairs: list[tuple[str, str]]) -> list[str]:
  out = []
  for left, right in pairs:
    room = max(34, len(left) + 2)
    first, *rest = textwrap.wrap(right, WIDTH - room) or [""]
    out += [f"  {left:<{room}}{first}".rstrip(), *(f"  {'':<{room}}{line}" for line in rest)]
  return out
