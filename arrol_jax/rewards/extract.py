"""From a response to the text of its final answer, and from that text to one canonical notation.

`extract_answer` finds the answer; `canonical` removes differences of notation that carry no meaning (spacing
commands, \\dfrac, \\text, units, `$`), so that equal answers mostly become equal strings. Left out: any
judgement of equality (grade.py) and natural-language answers ("the answer is twelve").
"""

from collections import deque
from collections.abc import Iterator
import re
import unicodedata

import regex

from arrol_jax.rewards import units

_BOX = re.compile(r"\\boxed\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
SEARCH_S = 1.0  # what a pattern of the user's may take on one response; `regex` counts the time of all threads of the process

# Answer formats by name. "answer" takes the rest of its line: **Final Answer:** 12.
PATTERNS = {
  "boxed": None,
  "answer": r"(?i:answer)[*_]{0,3}[ \t]*+[:：][ \t*_]*+([^\n]+)",
  "hashes": r"####[ \t]*+([^\n]+)",
  "first_hashes": r"(?s)\A.*?####[ \t]*+([^\n]+)",
}


def check_pattern(pattern: str | None) -> None:
  """Raises ValueError if `pattern` is neither None, a name in PATTERNS nor a regular expression with a group."""
  pattern = PATTERNS.get(pattern, pattern)
  if pattern is None:
    return
  try:
    groups = regex.compile(pattern).groups
  except regex.error as error:
    raise ValueError(f"answer pattern {pattern!r} is not a regular expression: {error}") from None
  if groups < 1:
    raise ValueError(f"answer pattern {pattern!r} has no group: put the answer in (parentheses)")


def extract_answer(response: str, pattern: str | None = None) -> str | None:
  """The final answer's text, or None where the response has none.

  pattern None or "boxed": the content of the last \\boxed{...}, braces balanced, escaped braces not counted. If that
  last box is never closed (a truncated response) there is no answer, even if an earlier box was complete; of
  nested boxes the inner one counts; \\fbox does not. Takes time linear in the response's length.
  "answer": what follows the last "Answer:" on its line; "hashes": what follows the last "####"; "first_hashes":
  the first one (a base model shown examples goes on to questions of its own).
  Else a regular expression as the `regex` package reads it; group 1 of its last match (r"A(-?\\d+)$"). One that searches for more
  than a second has found nothing. Raises ValueError for a pattern that does not compile or has no group.
  """
  try:
    return search(response, pattern)
  except TimeoutError:
    return None


def search(response: str, pattern: str | None) -> str | None:
  """`extract_answer` that raises TimeoutError for a pattern that takes too long."""
  if PATTERNS.get(pattern, pattern) is not None:
    if pattern in PATTERNS:
      matches = re.finditer(PATTERNS[pattern], response)  # linear: needs no deadline
    else:
      check_pattern(pattern)
      matches = regex.finditer(pattern, response, timeout=SEARCH_S)
    last = _last(matches)
    return None if last is None else last.group(1)
  box = _last(_BOX.finditer(response))
  if box is None:
    return None
  depth = 1
  for brace in _BRACE.finditer(response, box.end()):
    depth += {"{": 1, "}": -1}.get(brace.group(), 0)
    if depth == 0:
      return response[box.end():brace.start()]
  return None


def _last(matches: Iterator):
  last = deque(matches, maxlen=1)
  return last[0] if last else None


def nesting(text: str) -> int:
  """The deepest nesting of brackets of any kind; half-open intervals close with either bracket."""
  depth = deepest = 0
  for character in text:
    if character in "{([":
      depth += 1
      deepest = max(deepest, depth)
    elif character in "})]":
      depth -= 1
  return deepest


# Full-width ASCII (from Chinese text) and typographic signs become ASCII or LaTeX, digits of other scripts and fonts the
# digits that they are. Raised and lowered digits become exponents and indices: 12² must not read as 122.
_CHARACTERS = {0xFF01 + i: 0x21 + i for i in range(94)} | {
  ord(character): replacement for character, replacement in {
    "\u2212": "-", "\u2010": "-", "\u2011": "-", "\u2013": "-", "\ufe63": "-", "\u3000": " ", "\u00a0": " ", "\u2009": " ",
    "\u202f": " ", "\u200b": "", "\ufeff": "", "×": r"\times ", "·": r"\cdot ", "÷": "/", "∞": r"\infty ", "±": r"\pm ",
    "≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∈": r"\in ", "∅": r"\emptyset ", "°": r"^\circ ",
    "€": "", "£": "", "¥": "", "ℝ": r"\mathbb{R}",
    "α": r"\alpha ", "β": r"\beta ", "γ": r"\gamma ", "δ": r"\delta ", "θ": r"\theta ", "λ": r"\lambda ", "μ": r"\mu ",
    "π": r"\pi ", "σ": r"\sigma ", "φ": r"\phi ", "ω": r"\omega ",
  }.items()
}
_RAISED, _LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "₀₁₂₃₄₅₆₇₈₉₋₊"
_LEVEL = {ord(sign): "0123456789-+"[i] for signs in (_RAISED, _LOWERED) for i, sign in enumerate(signs)}
_ROOT = re.compile(r"√\s*(?:([0-9]+|[A-Za-z])|\(([^()]*)\))")


def _ascii(text: str) -> str:
  """`text` with what Unicode writes in one character written as LaTeX does."""
  text = text.translate(_CHARACTERS)
  if text.isascii():
    return text
  for signs, mark in ((_RAISED, "^"), (_LOWERED, "_")):
    text = re.sub(f"[{signs}]+", lambda run, mark=mark: f"{mark}{{{run[0].translate(_LEVEL)}}}", text)
  text = _ROOT.sub(lambda root: f"\\sqrt{{{root[1] or root[2] or ''}}}", text)
  out = []
  for character in text:
    parts = unicodedata.normalize("NFKC", character).split("\u2044") if not character.isascii() else ()
    if len(parts) == 2 and all(parts):
      out.append(f"\\frac{{{parts[0]}}}{{{parts[1]}}}")  # ½
    else:
      out.append(str(unicodedata.decimal(character, character)))
  return "".join(out)


_THOUSANDS = re.compile(r"(?<=[0-9])\s*(?:\{,\}|,\s*\\!|\\,)\s*(?=[0-9]{3}(?![0-9]))")
_WORD = re.compile(r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|mbox|mathrm|mathbf|mathit|mathsf)\s*(?=\{)")
_NOTATION = [(re.compile(pattern), replacement) for pattern, replacement in (
  (r"\\(?:left|right|[bB]igg?[lr]?)(?![A-Za-z])\.?", ""),
  (r"(?<!\\)\\(?:[!,;:> ]|q?quad(?![A-Za-z])|(?:display|text)style(?![A-Za-z]))|~", " "),
  (r"(?<!\\)\\[()\[\]]|\\?\$", " "),  # math delimiters and currency
  (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
  (r"\\leqslant(?![A-Za-z])|\\leq(?![A-Za-z])", r"\\le "),
  (r"\\geqslant(?![A-Za-z])|\\geq(?![A-Za-z])", r"\\ge "),
  (r"\\%|\\text\{\s*(?:per\s?cents?|percentage|pct)\s*\}|\bper\s?cents?(?![A-Za-z])", "%"),
  (r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![A-Za-z])|\\degree(?![A-Za-z])", r"^\\circ "),
  (r",?\s*\\text\{\s*,?\s*(?:and|or)\s*\}\s*|(?<![A-Za-z\\])(?:and|or)(?![A-Za-z])", ","),
  (r",(?:\s*,)+", ","),
  (r"\\varnothing(?![A-Za-z])", r"\\emptyset "),
  (r"\\[lc]dots(?![A-Za-z])", r"\\dots "),
  (r"\\(?:lvert|rvert|vert)(?![A-Za-z])", "|"),
)]
# Spaces that matter: after a command, between numbers (1 1/2), and after a comma that else would mark
# thousands (2, 120).
_GAP = re.compile(
  r"(?P<command>\\[A-Za-z]+)\s+(?=[A-Za-z])"
  r"|(?P<digits>(?<=[0-9])\s+(?=[0-9])|(?<=[0-9],)\s+(?=[0-9]{3}(?![0-9])))|\s+")
_TIDY = [(re.compile(pattern), replacement) for pattern, replacement in (
  (r"\\text\{([A-Za-z]|[+-]?[0-9][0-9.,/]*)\}", r"\1"),
  (r"_\{\\text\{([A-Za-z]+)\}\}", r"_{\1}"),
  (r"([_^])([A-Za-z]|[0-9](?![0-9]))", r"\1{\2}"),
  (r"\\sqrt\s*([0-9A-Za-z])", r"\\sqrt{\1}"),
  (r"\\frac\s*([0-9])\s*([0-9])", r"\\frac{\1}{\2}"),
  (r"\\frac\s*([0-9])\s*\{", r"\\frac{\1}{"),
  (r"\\frac(\{[^{}]*\})([0-9])", r"\\frac\1{\2}"),
  (r"\\frac(\\[A-Za-z]+)([0-9])", r"\\frac{\1}{\2}"),
  (r"^\+(?![+-])", ""),
  (r"^\(([A-Z])\)$", r"\1"),  # (C), the choice, is C
  (r"^[(\[](\\begin\{matrix\}.*\\end\{matrix\})[)\]]$", r"\1"),
  (r"^\\\{\\\}$", r"\\emptyset"),
  (r"(^|\\in ?)(?:\\mathbb\{?R\}?|\\text\{all(?:real)?numbers\})$", r"\1(-\\infty,\\infty)"),
)]


def canonical(text: str) -> tuple[str, str]:
  """`text` in one notation, less its unit, and that unit's text. For short texts (grade.MAX_CHARACTERS).

  The same mathematics, fewer spellings: `$`, `\\(`, a currency sign, \\left, spacing, a final full stop, a leading + and
  units are dropped; \\dfrac, \\frac12, \\sqrt2, x^2, 10{,}080, ^{\\circ}, \\%, ½, "and"/"or" between answers get one
  spelling each. The unit is as `units.measure` reads it; a dollar or degree sign is one too.
  """
  text = _ascii(text).strip().removeprefix("**").removesuffix("**")
  dollars = re.match(r"[-+]?\\\$", text) or text.startswith("$") and text.count("$") == 1
  text = _THOUSANDS.sub("", text)
  text = _WORD.sub(r"\\text", text)
  for pattern, replacement in _NOTATION:
    text = pattern.sub(replacement, text)
  text = re.sub(r"(?:\.\s*){3,}$", r"\\dots ", text.strip()).rstrip(" .")  # 1,2,3,... is not 1,2,3
  inner = extract_answer(text)
  if inner is not None and text == f"\\boxed{{{inner}}}":  # "Answer: $\boxed{12}$", found by a pattern
    text = inner
  text, unit = units.split_unit(text.strip())
  text = _GAP.sub(lambda gap: gap["command"] + " " if gap["command"] else " " if gap["digits"] else "", text)
  text = text.strip().rstrip(".,;")
  for pattern, replacement in _TIDY:
    text = pattern.sub(replacement, text)
  return text, unit or ("dollar" if dollars else "degree" if text.endswith("^\\circ") else "")
