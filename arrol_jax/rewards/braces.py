"""LaTeX's braces: where they close, what a command's arguments are, which commands only wrap their content."""

import re
from typing import NamedTuple

# Commands that take arguments: how many. \sqrt and \overline{AB} may stand before one character without braces.
_ARITY = {"frac": 2, "sqrt": 1, "binom": 2, "overline": 1, "bar": 1, "dot": 1, "vec": 1, "hat": 1, "text": 1, "mathbb": 1}
_COMMAND = re.compile(r"\\([A-Za-z]+|.)", re.DOTALL)
_TAKES = re.compile(r"\\(?:frac|sqrt|binom)(?![A-Za-z])|[\^_]|\\(?:overline|bar|dot|vec|hat)(?![A-Za-z])")
_DEGREE = re.compile(r"\s*\{?\\circ")
MAX_DEPTH = 60  # of arguments in arguments


def closing(text: str, opening: int) -> int:
  """The index of the brace that closes the one at `opening`; -1 if none does."""
  depth, i = 0, opening
  while i < len(text):
    if text[i] == "\\":
      i += 2
      continue
    depth += (text[i] == "{") - (text[i] == "}")
    if depth == 0:
      return i
    i += 1
  return -1


class _Read(NamedTuple):
  """What was read from a text: in braces where it is an argument, as it stands where its command lacks another, and its end.

  Not `complete`: a command whose arguments are not all there.
  """

  argument: str
  alone: str
  end: int
  complete: bool = True


def _argument(text: str, i: int, depth: int) -> _Read | None:
  """The argument that begins at `i`: a group, a command with its arguments or one character; None where there is none."""
  spaces = text[i:len(text) - len(text[i:].lstrip(" "))]
  i += len(spaces)
  if i >= len(text) or text[i] in "})]&," or depth > MAX_DEPTH:
    return None
  if text[i] == "{":
    end = closing(text, i)
    if end < 0:
      return None
    inner = braced(text[i + 1:end], depth + 1)
    return _Read(inner, f"{spaces}{{{inner}}}", end + 1)
  command = _COMMAND.match(text, i)
  if command is None:
    return _Read(text[i], spaces + text[i], i + 1)
  arity = _ARITY.get(command[1], 0)
  if not arity:
    return _Read(command[0], spaces + command[0], command.end())
  found = _command(text, command.end(), command[0], arity, depth + 1)
  return found._replace(alone=spaces + found.alone)


def _command(text: str, i: int, name: str, arity: int, depth: int) -> _Read:
  """The command `name` with `arity` arguments from `i` on, all in braces. No text is read twice where an argument is missing."""
  if name == "\\sqrt" and text[i:i + 1] == "[" and (end := text.find("]", i)) > 0:
    name, i = name + text[i:end + 1], end + 1
  out = alone = name
  for _ in range(arity):
    argument = _argument(text, i, depth)
    if argument is None:
      return _Read(alone, alone, i, complete=False)
    alone, i = alone + argument.alone, argument.end
    if not argument.complete:
      return _Read(alone, alone, i, complete=False)
    out = f"{out}{{{argument.argument}}}"
  return _Read(out, out, i)


def braced(text: str, depth: int = 0) -> str:
  """`text` with braces around all arguments: \\frac12 is \\frac{1}{2}, x^2 is x^{2}, \\sqrt[3]9 is \\sqrt[3]{9}."""
  out, done = [], 0
  while (taker := _TAKES.search(text, done)) is not None:
    name = taker[0]
    out.append(text[done:taker.start()])
    if _DEGREE.match(text, taker.end()):
      out.append(name)
      done = taker.end()
    else:
      found = _command(text, taker.end(), name, _ARITY.get(name[1:], 1), depth)
      out.append(found.alone)
      done = found.end
  return "".join(out) + text[done:]


def unwrapped(text: str, command: re.Pattern) -> str:
  """`text` with \\command{content} replaced by content, from the left; without braces only the command goes."""
  position = 0
  while (wrapper := command.search(text, position)) is not None:
    position, end = wrapper.start(), wrapper.end()
    close = closing(text, end) if text[end:end + 1] == "{" else -1
    inner = text[end + 1:close] if close >= 0 else ""
    text = text[:position] + inner + text[close + 1 if close >= 0 else end:]
  return text


def each_group(text: str, command: re.Pattern, replace) -> str:
  """`text` with every \\command{content} replaced by `replace(match, content)`, innermost last (content comes as it is)."""
  out, done = [], 0
  while (found := command.search(text, done)) is not None:
    opening = text.find("{", found.end() - 1)
    close = closing(text, opening)
    out.append(text[done:found.start()])
    if close < 0:
      out.append(found[0])
      done = found.end()
    else:
      out.append(replace(found, text[opening + 1:close]))
      done = close + 1
  return "".join(out) + text[done:]


def cut(text: str, separators: tuple[str, ...]) -> list[str] | None:
  """`text` cut at the separators outside all brackets; None if the brackets do not match up."""
  parts, start, depth, i = [], 0, 0, 0
  while i < len(text):
    depth += (text[i] in "{([") - (text[i] in "})]")
    if depth < 0:
      return None
    separator = next((s for s in separators if text.startswith(s, i)), None) if depth == 0 else None
    if separator:
      parts.append(text[start:i].strip())
      start = i = i + len(separator)
    else:
      i += 1
  return parts + [text[start:].strip()] if depth == 0 else None


def closes_at_end(text: str) -> bool:
  """Whether the bracket that opens `text` is closed by its last character."""
  depth = 0
  for i, character in enumerate(text):
    depth += (character in "{([") - (character in "})]")
    if depth == 0 and character in "})]":
      return i == len(text) - 1
  return False
