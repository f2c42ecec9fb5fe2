"""Numbers exactly, as fractions: literals, and arithmetic on them. No tolerance anywhere."""

from fractions import Fraction
import math
import re

MAX_EXPONENT = 1000  # beyond it 10**n is not formed in the caller
MAX_BITS = 60_000  # of a power's value
MAX_FACTORIAL = 500

_INTEGER = re.compile(r"([+-]?)([0-9]+|[1-9][0-9]{0,2}(?:,[0-9]{3})+)(?:\.0*)?(?:\^\\circ)?")
_SIGNED = r"([+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+))"
_NUMBERS = [re.compile(pattern) for pattern in (
  rf"{_SIGNED}",
  r"([+-]?[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?)",
  rf"{_SIGNED}/{_SIGNED}",
  rf"([+-]?)\\frac\{{{_SIGNED}\}}\{{{_SIGNED}\}}",
  r"([+-]?)([0-9]+) ?\\frac\{([0-9]+)\}\{([0-9]+)\}",  # 1\frac{1}{2} is mixed, no product
  r"([+-]?)([0-9]+) ([0-9]+)/([0-9]+)",
)]
_REPEATING = re.compile(r"([+-]?)([0-9]*)\.([0-9]*)(?:\\(?:overline|dot)\{([0-9]+)\}|\(([0-9]+)\))")
_DOTS = re.compile(r"\\dot\{([0-9])\}([0-9]*)\\dot\{([0-9])\}")
SCIENTIFIC = re.compile(
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

  A percent or degree sign at the end is dropped: grade.py has compared them.
  """
  text = text.removesuffix("%").removesuffix("^\\circ")
  match = SCIENTIFIC.fullmatch(text)
  if match is not None:
    mantissa = match[1] or match[5] + "1"
    exponent = int(match[2] or match[3] or match[4] or match[6])
    return Fraction(mantissa) * Fraction(10) ** exponent if abs(exponent) <= MAX_EXPONENT else None
  match = _REPEATING.fullmatch(_DOTS.sub(r"\\overline{\1\2\3}", text))
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


# --- arithmetic ---------------------------------------------------------------------------------------------

_TOKEN = re.compile(r"(?P<mixed>[0-9]+ ?(?=\\frac\{[0-9]+\}\{[0-9]+\})|[0-9]+ (?=[0-9]+/[0-9]+))|(?P<number>[0-9]+\.?[0-9]*"
                    r"|\.[0-9]+)"
                    r"|\\(?P<command>frac|binom|cdot|times|div)(?![A-Za-z])|(?P<sign>[-+*/^!(){}\[\]])")
_ARITHMETIC = re.compile(r"(?:[-+*/^!(){}\[\]0-9. ]|\\(?:frac|binom|cdot|times|div)(?![A-Za-z]))+")


class _Unreadable(Exception):
  """Text that is no arithmetic on numbers, or too large to form."""


class _Reader:
  """Reads one canonical text by recursive descent; `value` raises _Unreadable."""

  def __init__(self, text: str):
    self.text, self.at = text, 0

  def peek(self) -> re.Match | None:
    while self.text[self.at:self.at + 1] == " ":
      self.at += 1
    return _TOKEN.match(self.text, self.at)

  def take(self, sign: str) -> bool:
    token = self.peek()
    if token is None or token[0] not in (sign, "\\" + sign):
      return False
    self.at = token.end()
    return True

  def need(self, sign: str) -> None:
    if not self.take(sign):
      raise _Unreadable

  def sum(self) -> Fraction:
    total, sign = Fraction(0), -1 if self.take("-") else 1
    while True:
      total += sign * self.product()
      if self.take("+"):
        sign = 1
      elif self.take("-"):
        sign = -1
      else:
        return total

  def product(self) -> Fraction:
    value, divided = self.power(), False
    while True:
      if self.take("cdot") or self.take("times") or self.take("*"):
        value *= self.signed()
      elif self.take("/") or self.take("div"):
        value, divided = _quotient(value, self.signed()), True
      elif (token := self.peek()) is not None and (token[0] in "({" or token["command"] in ("frac", "binom")):
        if divided:
          raise _Unreadable  # 1/2(3): either reading
        value *= self.power()
      else:
        return value

  def signed(self) -> Fraction:
    return -self.power() if self.take("-") else self.power()

  def power(self) -> Fraction:
    value = self.atom()
    while self.take("!"):
      if value.denominator != 1 or not 0 <= value <= MAX_FACTORIAL or self.take("!"):
        raise _Unreadable
      value = Fraction(math.factorial(int(value)))
    if not self.take("^"):
      return value
    exponent = self.group("{", "}") if self.text[self.at:self.at + 1] == "{" else self.atom()
    bits = max(value.numerator.bit_length(), value.denominator.bit_length())
    if exponent.denominator != 1 or abs(exponent) * bits > MAX_BITS or value == 0 and exponent <= 0 or self.take("^"):
      raise _Unreadable
    return value ** int(exponent)

  def group(self, opening: str, close: str) -> Fraction:
    self.need(opening)
    value = self.sum()
    self.need(close)
    return value

  def atom(self) -> Fraction:
    token = self.peek()
    if token is None:
      raise _Unreadable
    if token[0] in "({":
      return self.group(token[0], {"(": ")", "{": "}"}[token[0]])
    self.at = token.end()
    if token["mixed"] is not None:
      part = self.atom() if self.text.startswith("\\frac", self.at) else Fraction(self.atom(), self.atom_after("/"))
      return Fraction(token["mixed"].strip()) + part
    if token["number"] is not None:
      return Fraction(token["number"])
    if token["command"] == "frac":
      return _quotient(self.group("{", "}"), self.group("{", "}"))
    if token["command"] == "binom":
      n, k = self.group("{", "}"), self.group("{", "}")
      if n.denominator != 1 or k.denominator != 1 or not 0 <= k <= n <= MAX_FACTORIAL:
        raise _Unreadable
      return Fraction(math.comb(int(n), int(k)))
    raise _Unreadable

  def atom_after(self, sign: str) -> Fraction:
    self.need(sign)
    value = self.atom()
    if value == 0:
      raise _Unreadable
    return value


def _quotient(above: Fraction, below: Fraction) -> Fraction:
  if below == 0:
    raise _Unreadable
  return above / below


def value(text: str) -> Fraction | None:
  """The exact value of canonical arithmetic on numbers (sums, products, powers, factorials, binomials); None for other text.

  Bounded: a power of more than MAX_BITS bits, a factorial beyond MAX_FACTORIAL are None.
  """
  literal = number(text)
  if literal is not None:
    return literal
  if _ARITHMETIC.fullmatch(text) is None:
    return None
  reader = _Reader(text)
  try:
    total = reader.sum()
    return total if reader.peek() is None and reader.at == len(text) else None
  except (_Unreadable, RecursionError):
    return None
