"""The same answer by another convention: which letters stand for constants and integers, which name a quantity has, and the like.

Each rule needs both answers: it writes one of them as the other is written, where nothing but a convention differs.
"""

import re

from arrol_jax.rewards.braces import closes_at_end, cut
from arrol_jax.rewards.exact import value
from arrol_jax.rewards.parts import NAMED, without_qualifier

_SIDE = r"(?:[A-Za-z](?:_\{[^{}]*\})?|[A-Z]{2,4}|\[[A-Z]{1,6}\])"
# A quantity that is no letter: \sin\theta=, \frac{AB}{CD}=
_QUANTITY = re.compile(
  r"(?:\\(?:sin|cos|tan|cot|sec|csc)(?:\^\{2\})? ?[0-9]*(?:\\?[A-Za-z]+|\\angle ?[A-Z]+|\([^()=]*\)|\{[^{}=]*\})"
  rf"|\\frac\{{{_SIDE}\}}\{{{_SIDE}\}})=([^=]+)")
_BOTH = re.compile(rf"(?:{_SIDE}=){{2,6}}([^=]+)")
_ABOUT = re.compile(rf"(?:{NAMED})?\\approx ?([-+]?[0-9]*\.[0-9]+)")
_CLOCK = re.compile(r"(?:\\text\{)?0?([1-9]|1[0-2])(?::([0-9]{2}))?(?:\\text\{)?([AaPp])\.?[Mm]\.?\}*")
_DIGITS = re.compile(r"(?<![0-9.,])[0-9]+(?:,[0-9]+)+")
_ZEROS = re.compile(r"(?<![0-9.])[1-9][0-9]{0,2},0[0-9]{2}(?![0-9])")  # no list: nobody writes 1 and 000
_LIMITS = re.compile(r"[<>]|\\[lg]e(?![A-Za-z])")
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
    if "=" not in gold and (found := _BOTH.fullmatch(answer)) and value(found[1]) is not None:  # x=y=57
      answer = found[1]
    if "=" not in gold or "=" not in answer:
      gold, answer = (found[1] if (found := _QUANTITY.fullmatch(text)) else text for text in (gold, answer))
    answer = _coordinates(answer, gold)
  if "\\approx" in gold + answer:
    gold, answer = (found[1] if (found := _ABOUT.fullmatch(text)) else text for text in (gold, answer))
  if "," in answer:
    gold, answer = _thousands(gold, answer)
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


def _thousands(gold: str, answer: str) -> tuple[str, str]:
  """x<1,000 as x<1000: where 1,000 can be no list, or the answer so has as many parts as the gold and had more."""
  if _ZEROS.search(gold):
    gold = _DIGITS.sub(_joined, gold)
  joined, zeros = _DIGITS.sub(_joined, answer), _ZEROS.search(answer)
  relations = [_LIMITS.search(text) is not None for text in (gold, answer)]
  gold_parts, parts, fewer = (text.count(",") + text.count(";") for text in (gold, answer, joined))
  if relations[0] != relations[1]:  # an interval
    gold_parts = 0 if relations[1] else 1 + answer.count("\\cup")
  return gold, joined if zeros or parts != gold_parts == fewer else answer


def _joined(digits: re.Match) -> str:
  """0,1,000 as 0,1000. Alone in its brackets (1,200) is a pair, and (1,000) neither (1,0) nor 1000."""
  numbers, goes_on = [], False
  for part in digits[0].split(","):
    if goes_on and len(part) == 3:
      numbers[-1] += part
    else:
      numbers.append(part)
      goes_on = len(part) < 4 and part[0] != "0"
  text, begin, end = digits.string, digits.start(), digits.end()
  if len(numbers) > 1 or not text.startswith(("(", "[", "{"), begin - 1) or not text.startswith((")", "]", "\\}"), end):
    return ",".join(numbers)
  return numbers[0] + "," if _ZEROS.search(digits[0]) else digits[0]


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
