"""The same answer by another convention: which letters stand for constants and integers, which name a quantity has, and the like.

Each rule needs both answers: it writes one of them as the other is written, where nothing but a convention differs.
"""

import re

from arrol_jax.rewards.braces import closes_at_end, cut
from arrol_jax.rewards.parts import NAMED, without_qualifier

_SIDE = r"(?:[A-Za-z](?:_\{[^{}]*\})?|[A-Z]{2,4}|\[[A-Z]{1,6}\])"
# A quantity that is no letter: \sin\theta=, \frac{AB}{CD}=
_QUANTITY = re.compile(
  r"(?:\\(?:sin|cos|tan|cot|sec|csc)(?:\^\{2\})? ?[0-9]*(?:\\?[A-Za-z]+|\\angle ?[A-Z]+|\([^()=]*\)|\{[^{}=]*\})"
  rf"|\\frac\{{{_SIDE}\}}\{{{_SIDE}\}})=([^=]+)")
_ABOUT = re.compile(rf"(?:{NAMED})?\\approx ?([-+]?[0-9]*\.[0-9]+)")
_CLOCK = re.compile(r"(?:\\text\{)?0?([1-9]|1[0-2])(?::([0-9]{2}))?(?:\\text\{)?([AaPp])\.?[Mm]\.?\}*")
_THOUSANDS = re.compile(r"[-+]?[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9,.])")
_NOTHING = re.compile(r"(?i)\\text\{(?:there(?:is|are))?nosolutions?\}|nosolutions?")
_COMBINATION = re.compile(
  r"C\(([^(),]+),([^(),]+)\)|C_\{([^{}]*)\}\^\{([^{}]*)\}|C\^\{([^{}]*)\}_\{([^{}]*)\}|[\^_]\{([^{}]*)\}C_\{([^{}]*)\}")
_INTEGRAL = re.compile(r"(.*)\+C"), re.compile(r"(.*)\+([cKk]|C_\{[0-9]\})")
_OF_INTEGERS = re.compile(r"([A-Za-z])\\in ?(?:\\mathbb\{Z\}|Z)|\\text\{[^{}]*integers?\}([A-Za-z])")
_COMMAND = re.compile(r"\\[A-Za-z]+")
_VALUE = re.compile(r"([A-Za-z](?:_\{[^{}]*\})?)=([^=]+)")


def alike(gold: str, answer: str) -> tuple[str, str]:
  """Two canonical answers in one convention, as far as these rules know them; pairs without such a difference as they are."""
  if "=" in gold + answer:
    if "=" not in gold or "=" not in answer:
      gold, answer = (found[1] if (found := _QUANTITY.fullmatch(text)) else text for text in (gold, answer))
    answer = _coordinates(answer, gold)
  if "\\approx" in gold + answer:
    gold, answer = (found[1] if (found := _ABOUT.fullmatch(text)) else text for text in (gold, answer))
  if "," in answer and "," not in gold and (found := _THOUSANDS.match(answer)):  # 1,000\pi
    answer = found[0].replace(",", "") + answer[found.end():]
  if ("\\crossing" in gold) != ("\\crossing" in answer):  # a\times b for \mathbf{a}\times\mathbf{b}
    gold, answer = (re.sub(r"\\times(?![A-Za-z]) ?", r"\\crossing ", text) for text in (gold, answer))
  if "\\emptyset" in (gold, answer):
    gold, answer = ("\\emptyset" if _NOTHING.fullmatch(text) else text for text in (gold, answer))
  times = [_CLOCK.fullmatch(text) for text in (gold, answer)]
  if None not in times:
    return tuple(f"{hour}:{minute or '00'}\\text{{{half.lower()}m}}" for hour, minute, half in (x.groups() for x in times))
  if "\\binom" in gold and "C" in answer:
    answer = _COMBINATION.sub(_binomial, answer)
  ends = [pattern.fullmatch(text) for pattern, text in zip(_INTEGRAL, (gold, answer), strict=True)]
  if None not in ends and not any(re.search(rf"[A-Z]|{ends[1][2][0]}", _COMMAND.sub("", end[1])) for end in ends):
    answer = ends[1][1] + "+C"
  return _of_integers(gold, answer)


def _binomial(found: re.Match) -> str:
  """C(n,k), C_n^k, C^k_n and ^nC_k as \\binom{n}{k}."""
  n, k = (group for group in found.groups() if group is not None)
  return f"\\binom{{{k}}}{{{n}}}" if found[0].startswith("C^") else f"\\binom{{{n}}}{{{k}}}"


def _coordinates(answer: str, gold: str) -> str:
  """x=3,y=4 as (3,4), in the order of the letters, where the gold is such a tuple without names."""
  if "=" in gold or not (gold.startswith("(") and gold.endswith(")") and closes_at_end(gold)):
    return answer
  values = [_VALUE.fullmatch(part) for part in cut(answer, (",", ";")) or ()]
  if len(values) < 2 or None in values or len({value[1] for value in values}) < len(values):
    return answer
  return f"({','.join(value[2] for value in sorted(values, key=lambda value: value[1]))})"


def _of_integers(gold: str, answer: str) -> tuple[str, str]:
  """n\\pi,n\\in\\mathbb{Z} beside k\\pi,k\\in\\mathbb{Z} as k\\pi and k\\pi."""
  shorter = [without_qualifier(text) for text in (gold, answer)]
  bound = [_OF_INTEGERS.search(text[len(rest):]) for text, rest in zip((gold, answer), shorter, strict=True)]
  if None in bound:
    return gold, answer
  letter, other = (found[1] or found[2] for found in bound)
  if letter == other:
    return tuple(shorter)
  if re.search(rf"(?<![A-Za-z\\]){letter}(?![A-Za-z])", shorter[1]):
    return gold, answer
  return shorter[0], re.sub(rf"(?<![A-Za-z\\]){other}(?![A-Za-z])", letter, shorter[1])
