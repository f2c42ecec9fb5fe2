"""What `--help` prints: what a command does with examples, its flags, and every config key, each with its default; and what a
command line says of these keys, before flags are read."""

import argparse
import functools
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


@functools.cache
def config_flags() -> dict[str, str]:
  """Default of every config key, by its flag."""
  return {f"--config.{name}": default for name, default, _ in keys()}


def joined(argv: list[str]) -> list[str]:
  """The command line with a config key's value in its own word, as --config.KEY=VALUE: it may follow in the next, and a single
  dash is enough. Switches stand alone."""
  takes, words, out = {name for name, default in config_flags().items() if default not in ("True", "False")}, iter(argv), []
  for word in words:
    name = "--" + word.partition("=")[0].lstrip("-")
    if word.startswith("-") and name.startswith("--config."):
      word = "--" + word.lstrip("-")
    following = next(words, None) if word in takes else None
    out.append(word if following is None else f"{word}={following}")
  return out


def lists_once(argv: list[str]) -> list[str]:
  """The command line with the last word alone on each list: that counts, as on all else. (By themselves the flags join them.)"""
  lists = {name for name, default in config_flags().items() if default.startswith("(")}
  last = {name if (name := word.partition("=")[0]) in lists else i: word for i, word in enumerate(argv)}
  return list(last.values())


def switched_off(argv: list[str]) -> tuple[list[str], list[str]]:
  """The command line without --config.KEY=None, and such KEYs: those that may be None, where it is the last word on them. (By
  themselves the flags take no None for a number.)"""
  may = {name for name, default in config_flags().items() if default == "None"}
  last = {name: value for name, _, value in (a.partition("=") for a in argv)}
  off = [name for name in last if name in may and last[name] == "None"]
  given = lambda a: a.partition("=")[0] not in off and not (a.partition("=")[0] in may and a.endswith("=None"))
  return [a for a in argv if given(a)], [name.removeprefix("--config.") for name in off]


def _rows(pairs: list[tuple[str, str]]) -> list[str]:
  out = []
  for left, right in pairs:
    room = max(34, len(left) + 2)
    first, *rest = textwrap.wrap(right, WIDTH - room) or [""]
    out += [f"  {left:<{room}}{first}".rstrip(), *(f"  {'':<{room}}{line}" for line in rest)]
  return out


def words(text: str) -> list[str]:
  """Of a list, also where it stands in brackets, as (table,head), or its words in quotes."""
  text = text.strip()
  inside = text[1:-1] if (text[:1], text[-1:]) in (("(", ")"), ("[", "]")) else text
  return [word for part in inside.split(",") if (word := part.strip().strip("'\""))]
