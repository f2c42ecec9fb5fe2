"""Is the answer right? Exact rules for numbers and lists; math-verify only for what is left.

The order: the same text; caps on length and nesting; an integer gold by integer comparison; numbers exactly,
as fractions; lists, sets, tuples, unions and matrices by their elements; a single expression or relation by
math-verify, which runs in a worker process with a deadline (pool.py), never in the caller.

Strict where reports of other graders were not: a percent sign must be on both sides or on neither; an
equation is not its last number (`1=2=12` is not 12); (1,2) is not 1,2 and not [1,2]; 0.333333 is not 1/3; a
word must be the same word. An integer gold takes the integer only (`12.0` and `x=12` too), not an expression
that evaluates to it. Lenient where nothing is lost: a unit, a degree sign on a number and the name in `x=...`
may be given or omitted (but two known units must agree: units.py). Left out: partial credit, tolerances.
"""

from collections.abc import Callable
from fractions import Fraction
import logging
import re
from typing import NamedTuple

from arrol_jax.rewards.extract import canonical, check_pattern, nesting, search
from arrol_jax.rewards.units import measure

MAX_CHARACTERS = 300  # a longer box is no final answer, and costs a parser seconds
MAX_NESTING = 20
MAX_EXPONENT = 1000  # beyond it 10**n is not formed in the caller


class Graded(NamedTuple):
  """A reward in [0, 1] and its reason: correct, wrong, no_answer, too_long, timeout, crashed or error."""

  reward: float
  reason: str


CORRECT, WRONG = Graded(1.0, "correct"), Graded(0.0, "wrong")
# Decides a pair (gold, answer) of single expressions; None leaves it open.
Decide = Callable[[str, str], bool | None]

_INTEGER = re.compile(r"([+-]?)([0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)(?:\.0*)?(?:\^\\circ)?")
_SIGNED = r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))"
_NUMBERS = [re.compile(pattern) for pattern in (
  rf"{_SIGNED}",
  r"([+-]?[0-9]{1,3}(?:,[0-9]{3})+(?:\.[0-9]+)?)",
  rf"{_SIGNED}/{_SIGNED}",
  rf"([+-]?)\\frac\{{{_SIGNED}\}}\{{{_SIGNED}\}}",
  r"([+-]?)([0-9]+) ?\\frac\{([0-9]+)\}\{([0-9]+)\}",  # 1\frac{1}{2} is mixed, no product
  r"([+-]?)([0-9]+) ([0-9]+)/([0-9]+)",
)]
_REPEATING = re.compile(r"([+-]?)([0-9]*)\.([0-9]*)(?:\\(?:overline|bar|dot)\{([0-9]+)\}|\(([0-9]+)\))")
_SCIENTIFIC = re.compile(
  rf"{_SIGNED}(?:[eE]([+-]?[0-9]+)|(?:\\times|\\cdot|\*)10\^(?:\{{([+-]?[0-9]+)\}}|([0-9]+)))"
  r"|([+-]?)10\^\{?([+-]?[0-9]+)\}?")


def integer(text: str) -> str | None:
  """The integer that canonical `text` writes, as "-12"; None for other text. 007, 1,234 and 12.0 count."""
  match = _INTEGER.fullmatch(text)
  if match is None:
    return None
  digits = match[2].replace(",", "").lstrip("0") or "0"
  return "-" + digits if match[1] == "-" and digits != "0" else digits


def number(text: str) -> Fraction | None:
  """The value of a canonical decimal (repeating ones too), fraction, mixed number or e-notation, exactly; None for other text.

  A percent or degree sign at the end is dropped: `_leaf` has seen to it that both sides have the percent
  sign.
  """
  text = text.removesuffix("%").removesuffix("^\\circ")
  match = _SCIENTIFIC.fullmatch(text)
  if match is not None:
    mantissa = match[1] or match[5] + "1"
    exponent = int(match[2] or match[3] or match[4] or match[6])
    return Fraction(mantissa) * Fraction(10) ** exponent if abs(exponent) <= MAX_EXPONENT else None
  match = _REPEATING.fullmatch(text)
  if match is not None:  # 0.1\overline{6}
    sign, whole, fixed, period = match[1], match[2], match[3], match[4] or match[5]
    value = Fraction(int(whole + fixed + period) - int(whole + fixed or "0"), 10 ** len(fixed) * (10 ** len(period) - 1))
    return -value if sign == "-" else value
  for pattern in _NUMBERS:
    match = pattern.fullmatch(text)
    if match is None:
      continue
    signs = [group for group in match.groups() if group in ("", "+", "-")]
    values = [Fraction(group.replace(",", "")) for group in match.groups() if group not in ("", "+", "-")]
    if len(values) > 1 and values[-1] == 0:
      return None
    value = values[-1] if len(values) == 1 else values[-2] / values[-1]
    value += values[0] if len(values) == 3 else 0
    return -value if signs == ["-"] else value
  return None


_RELATION = re.compile(r"[<>]|\\(?:le|ge|ne)(?![A-Za-z])")
_NAME = re.compile(r"(\\?[A-Za-z]+'*(?:_\{[^{}]*\})?(?:\([^()=]*\))?)(?:=|\\in(?![A-Za-z]))([^=]+)")


def _without_name(gold: str, answer: str) -> tuple[str, str] | None:
  """Both less the name in `x=...`, `f(x)=...`, `x\\in...`, which one may omit; None if the names differ."""
  gold_name, answer_name = _NAME.fullmatch(gold), _NAME.fullmatch(answer)
  if gold_name and answer_name and gold_name[1] != answer_name[1]:
    return None
  if (gold_name is None and "=" in gold) or (answer_name is None and "=" in answer):
    return gold, answer  # an equation on one side: its counterpart is no assignment
  return (gold_name[2] if gold_name else gold), (answer_name[2] if answer_name else answer)


def _cut(text: str, separators: tuple[str, ...]) -> list[str] | None:
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


def _closes_at_end(text: str) -> bool:
  """Whether the bracket that opens `text` is closed by its last character."""
  depth = 0
  for i, character in enumerate(text):
    depth += (character in "{([") - (character in "})]")
    if depth == 0 and character in "})]":
      return i == len(text) - 1
  return False


def _bare(text: str) -> str:
  """`text` without brackets around the whole of a single expression: (-4), {18}."""
  while text[:1] in ("(", "{") and text[-1:] == {"(": ")", "{": "}"}[text[0]] and _closes_at_end(text):
    inner = _cut(text[1:-1], (",", ";"))
    if inner is None or len(inner) > 1 or not inner[0]:
      break
    text = inner[0]
  return text


def split(text: str, outermost: bool = True) -> tuple[str, list[str]] | None:
  """The kind of a canonical answer and its elements; None if its brackets do not match up.

  Kinds: "one" (a single expression), "list" (a list or a set: order is free), "union", "matrix [columns of each row]",
  "set" (of one element, itself an element), and for tuples and intervals the two brackets, such as "(]". As a whole
  answer the set of one element is that element: the solution set.
  """
  matrix = re.fullmatch(r"\\begin\{[pbB]?matrix\}(.*)\\end\{[pbB]?matrix\}", text)  # not [vV]: a determinant, a norm
  if matrix and "matrix" not in matrix[1]:
    rows = [row.split("&") for row in matrix[1].removesuffix("\\\\").split("\\\\")]
    return f"matrix {[len(row) for row in rows]}", [cell for row in rows for cell in row]
  parts = _cut(text, (",", ";"))
  if parts is None:
    return None
  if len(parts) > 1:
    return "list", parts
  parts = _cut(text, ("\\cup",))
  if len(parts) > 1:
    return "union", parts
  if text.startswith("\\{") and text.endswith("\\}") and _closes_at_end(text[1:]):
    inner = _cut(text[2:-2], (",", ";"))
    return ("list" if len(inner) > 1 else "one" if outermost and inner != ["\\emptyset"] else "set"), inner
  if text[:1] in ("(", "[") and _closes_at_end(text):
    inner = _cut(text[1:-1], (",", ";"))
    if len(inner) > 1:
      return text[0] + text[-1], inner
  if text.count("\\pm") == 1:
    return "list", [text.replace("\\pm", sign).removeprefix("+") for sign in ("+", "-")]
  return "one", [text]


_BUILDER = re.compile(r"\\\{([A-Za-z])(?:\\in\(-\\infty,\\infty\)|\\in\\mathbb\{R\})?(?:\\mid ?|:|\|)(.+)\\\}")


def _without_builder(text: str) -> str:
  """The relation in {x | 2 < x}, which says the same."""
  match = _BUILDER.fullmatch(text)
  return match[2] if match and match[1] in match[2] and _RELATION.search(match[2]) else text


def equivalent(gold: str, answer: str, decide: Decide, outermost: bool = True) -> bool | None:
  """Whether two canonical answers are the same mathematics, `decide` being asked about single expressions."""
  gold, answer = _without_builder(_bare(gold)), _without_builder(_bare(answer))
  if gold == answer:
    return True
  stripped = _without_name(gold, answer)
  if stripped is None:
    return False
  gold, answer = stripped
  if number(gold) is not None and number(answer) is not None:
    return _leaf(gold, answer, decide)
  if "\\text" in gold or "\\text" in answer:
    return _words(gold) == _words(answer)
  gold_parts, answer_parts = split(gold, outermost), split(answer, outermost)
  if gold_parts is None or answer_parts is None:
    return False
  (kind, golds), (answer_kind, answers) = gold_parts, answer_parts
  if kind != answer_kind:
    relations = [_RELATION.search(text) is not None for text in (gold, answer)]
    same_set = sorted(relations) == [False, True] and "=" not in gold + answer or "\\setminus" in gold + answer
    return decide(gold, answer) if same_set else False
  if kind == "one":
    return _leaf(golds[0], answers[0], decide)
  if len(golds) != len(answers):
    return False
  if kind in ("list", "union"):
    names = [{name[1] for part in parts if (name := _NAME.fullmatch(part))} for parts in (golds, answers)]
    if names[0] != names[1] and max(map(len, names)) > 1:
      return False  # x=1,y=2 is not 1,2
    return _same_in_any_order(golds, answers, decide)
  verdicts = [equivalent(g, a, decide, False) for g, a in zip(golds, answers, strict=True)]
  return False if False in verdicts else None if None in verdicts else True


def _same_in_any_order(golds: list[str], answers: list[str], decide: Decide) -> bool | None:
  left, undecided = list(answers), False
  for gold in golds:
    verdicts = [equivalent(gold, answer, decide, False) for answer in left]
    if True in verdicts:
      left.pop(verdicts.index(True))
    elif None in verdicts:
      undecided = True
    else:
      return False
  return None if undecided else True


def _words(text: str) -> list[str]:
  """The words of an answer in words, without case, spaces and full stops; single letters (choices) sorted."""
  text = re.sub(r"\\text\{((?:[^{}]|\{[^{}]*\})*)\}", r"\1", text)
  words = re.sub(r"\s|(?<![0-9])\.|\.(?![0-9])", "", text).casefold().split(",")
  words = [re.sub(r"^\((.)\)$", r"\1", word) for word in words]
  return sorted(words) if all(len(word) == 1 for word in words) else words


_OTHER_BASE = re.compile(r"[+-]?[0-9A-Fa-f.]+_\{?[0-9]+\}?")
# What math-verify drops (primes, dots, \angle) or evaluates (\gcd of two letters is 1 to it, dy/dx is 0).
_TEXT_ONLY = re.compile(r"gcd|lcm|'|\\prime|!!|\\angle|\.\.|\\dots|\\frac\{d[^{}]*\}\{d|[A-Za-z]\^\{-1\}\(")
_LETTERS = re.compile(r"\\[A-Za-z]+|([A-Za-z])")


def _leaf(gold: str, answer: str, decide: Decide) -> bool | None:
  """A single expression or relation: what can be said without algebra, else `decide`."""
  if gold == answer:
    return True
  if any(gold.count(sign) != answer.count(sign) for sign in ("%", "=", "\\approx")):
    return False
  values = number(gold), number(answer)
  if None not in values:
    return values[0] == values[1]
  if gold.count("=") > 1 or any(
      ":" in text or _TEXT_ONLY.search(text) or _OTHER_BASE.fullmatch(text)
      or _SCIENTIFIC.fullmatch(text) and number(text) is None
      or "=" in text and None not in map(number, text.split("=")) for text in (gold, answer)):
    return False  # chains, times, ratios, other bases, huge powers of ten, equations of numbers: as text only
  # math-verify folds case, but 3R^2 is not 3r^2, and N=n must not become n=n, which every identity equals.
  letters, used = ({match[1] for match in _LETTERS.finditer(text) if match[1]} for text in (gold, answer))
  if any(letter.swapcase() in letters for letter in (letters | used if "=" in gold else used - letters)):
    return False
  return decide(gold, answer)


def _for_sympy(text: str) -> str:
  """LaTeX that math-verify reads as meant: exact decimals, mixed numbers, 3/4\\pi as 3/4 of \\pi, e-notation as products, degrees
  in radians."""
  text = re.sub(r"np\.([a-z]+)", r"\\\1", text)
  text = re.sub(
    r"(?<![A-Za-z0-9.])([0-9]+\.?[0-9]*|\.[0-9]+)[eE]([+-]?[0-9]+)(?![0-9.])", r"(\1\\cdot 10^{\2})", text)
  if re.search(r"\\(?:sin|cos|tan|cot|sec|csc)", text):
    text = re.sub(r"([0-9]+(?:\.[0-9]+)?)\^\\circ", r"(\\frac{\1}{180}\\pi)", text)
  text = text.replace("^\\circ", "")

  def mixed(found: re.Match) -> str:
    whole, above, below = found.groups()
    return f"({whole}+\\frac{{{above}}}{{{below}}})" if int(above) < int(below) else found[0]

  text = re.sub(r"(?<![0-9.A-Za-z^_}/])([0-9]+)/([0-9]+)(?![0-9.])", r"\\frac{\1}{\2}", text)
  text = re.sub(r"(?<![0-9.A-Za-z^_}/])([0-9]+) ?\\frac\{([0-9]+)\}\{([0-9]+)\}", mixed, text)

  def exact(decimal: re.Match) -> str:
    whole, _, digits = decimal[0].partition(".")
    return f"(\\frac{{{int(whole + digits)}}}{{{10 ** len(digits)}}})" if digits else whole

  return re.sub(r"[0-9]+\.[0-9]*|(?<![0-9])\.[0-9]+", exact, text)


def _imaginary(part: object) -> object:
  """A parsed expression whose i is the imaginary unit; math-verify reads it as a variable."""
  import sympy  # workers only

  if not isinstance(part, sympy.Expr):
    return part
  return part.subs({symbol: sympy.I for symbol in part.free_symbols if symbol.name == "i"})


def symbolic(gold: str, answer: str) -> bool:
  """math-verify's verdict on two canonical expressions. Unbounded in time and memory: for workers only.

  Its own timeouts stay off: they need the main thread, take over SIGALRM and raise past `except Exception`.
  Its unit stripping stays off too: it reads 3t as 3.
  """
  from latex2sympy2_extended.math_normalization import NormalizationConfig  # half a second: workers only
  from math_verify import LatexExtractionConfig, parse, verify

  for name in ("math_verify", "latex2sympy2_extended"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  notation = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False)
  latex = LatexExtractionConfig(boxed_match_priority=-1, normalization_config=notation)
  gold_parsed, answer_parsed = (
    parse(f"${_for_sympy(text)}$", extraction_config=(latex,), fallback_mode="no_fallback",
          extraction_mode="first_match", parsing_timeout=None)
    for text in (gold, answer)
  )
  if not gold_parsed or not answer_parsed:
    return False
  gold_parsed, answer_parsed = ([_imaginary(part) for part in parsed] for parsed in (gold_parsed, answer_parsed))
  return verify(
    gold_parsed, answer_parsed, numeric_precision=30, allow_set_relation_comp=True, timeout_seconds=None)


def judge(response: str, answer: str, pattern: str | None = None) -> Graded | tuple[str, str]:
  """The grade where text and exact numbers settle it, else the canonical pair (gold, answer) for `settle`.

  Takes well under a millisecond for a short response. Raises ValueError for a bad `pattern`.
  """
  try:
    found = search(response, pattern)
  except TimeoutError:
    return Graded(0.0, "timeout")
  if found is None or not found.strip():
    return Graded(0.0, "no_answer")
  found, gold = found.strip(), str(answer).strip()
  if found == gold:
    return CORRECT
  if len(found) > MAX_CHARACTERS or nesting(found) > MAX_NESTING:
    return Graded(0.0, "too_long")
  (gold, gold_unit), (found, found_unit) = canonical(gold), canonical(found)
  gold, found = _bare(gold), _bare(found)
  measures = measure(gold_unit), measure(found_unit)
  if None not in measures and measures[0] != measures[1]:
    return WRONG
  if not gold:
    return Graded(0.0, "error")  # a gold that says nothing is right for nobody
  expected = integer(gold)
  if expected is not None:
    name = _NAME.fullmatch(found)
    return CORRECT if integer(name[2] if name and "=" in found else found) == expected else WRONG
  verdict = equivalent(gold, found, lambda _gold, _answer: None)
  return (gold, found) if verdict is None else CORRECT if verdict else WRONG


def settle(gold: str, answer: str) -> Graded:
  """The grade of a pair that `judge` left open. For a worker process only, as `symbolic` is."""
  return CORRECT if equivalent(gold, answer, symbolic) else WRONG


def grade(response: str, answer: str, pattern: str | None = None) -> float:
  """1.0 if the response's final answer equals `answer`, else 0.0. Callable from any thread.

  pattern: as in `extract_answer`; None reads the last \\boxed{...}.

  Never raises, whatever `response` and `answer` are: what cannot be graded is 0.0 (`Grader` tells why). Only
  a `pattern` that is no regular expression with a group, the caller's mistake, is a ValueError. Time is
  bounded: what text and exact numbers do not settle goes to a worker process, started on first need, which
  has 5 s.
  """
  check_pattern(pattern)
  try:
    verdict = judge(response, answer, pattern)
    if isinstance(verdict, Graded):
      return verdict.reward
    from arrol_jax.rewards import pool  # here, because pool.py imports this module

    return pool.settle_alone(*verdict).reward
  except Exception:
    return 0.0
