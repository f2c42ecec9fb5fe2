"""Units of measurement at the end of an answer: dropped for the comparison, and compared where both sides name one.

An answer may give or omit its unit. Where both sides give a unit of the table below, they must be the same unit:
5 cm is not 5 m. Units that are not in the table ("apples") are dropped and not compared. Left out: conversion.
"""

import re

# name: other spellings. Plurals in -s are found by themselves; what has one letter counts in its case only.
_TABLE = """
meter: m metre | kilometer: km kilometre | centimeter: cm centimetre | millimeter: mm millimetre | inch: in inches
foot: ft feet | yard: yd | mile: mi | gram: g gm | kilogram: kg kilo | milligram: | pound: lb | ounce: oz | ton: tonne
second: s sec | minute: min | hour: h hr | day: | week: | month: | year: yr | cent: | dollar: usd buck | euro: eur
degree: deg | radian: rad | liter: L litre | milliliter: ml mL millilitre | newton: N | joule: J | watt: W | volt: V
kelvin: K | celsius: C | fahrenheit: F | ampere: A amp | unit: | gallon: gal | hertz: Hz hz | acre: | pascal: Pa pa
"""
_NAMES = {spelling: entry.partition(":")[0].strip() for entry in re.split(r"[|\n]", _TABLE) if entry.strip()
          for spelling in entry.replace(":", " ").split()}
_COMPOUND = {"mph": {"mile": 1, "hour": -1}, "kmh": {"kilometer": 1, "hour": -1}, "kph": {"kilometer": 1, "hour": -1}}

# Words after a number that change its value or offer a second one; everything else counts as a unit.
_NOT_UNITS = frozenset(
  "and or to not if when where plus minus times mod base percent percentage pct hundred hundreds thousand thousands "
  "million millions billion billions trillion trillions dozen dozens half halves third thirds quarter quarters fourth "
  "fourths fifth fifths sixth sixths seventh sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths "
  "thousandth thousandths point maybe perhaps possibly probably otherwise except unless score squared cubed factorial pi "
  "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen "
  "nineteen twenty thirty forty fifty sixty seventy eighty ninety am pm below negative choose over sqrt january february "
  "march april may june july august september october november december "
  "permille mille lakh lakhs crore crores gross tens repeating recurring eleventh elevenths twelfth twelfths".split()
)
_NUMBER_WORD = re.compile(r"teenths?$|ieths?$|illions?$|illiards?$")  # sixteenths, twentieths, quadrillion
_UNIT_LETTERS = frozenset("ACFJKLNVWghms")
_JOINING = frozenset("per of a the square sq cubic cu".split())

_EXPONENT = r"\^(?:-?[0-9]|\{-?[0-9]\})"
_MARKED = re.compile(rf"(?<=[0-9A-Za-z}})])\s*/?\s*\\text\{{((?:[A-Za-z\s.,/~-]|{_EXPONENT})+)\}}(?:{_EXPONENT})?[.\s]*$")
_PLAIN = re.compile(rf"([^A-Za-z\\]*[0-9])\s+([A-Za-z][A-Za-z\s/.-]*(?:{_EXPONENT})?)")
_TEXT = re.compile(r"^\\text\{\s*([-+]?[0-9][^{}\\]*)\}$")
_TOKEN = re.compile(r"[A-Za-z]+|/|\^\{?(-?[0-9])\}?")


def split_unit(text: str) -> tuple[str, str]:
  """`text`, in which words are \\text{words}, less the units at its end, and these units' text ("" where there are none).

  Without \\text a number must stand before the unit, a space between, and its words be long or in the table, and of two
  letters at least: 12 xy and 3 m are products. \\text{12 apples} is such a text too.
  """
  whole = text
  for _ in range(3):  # 9.8 \text{ m} \text{ s}^{-2}
    unit = _MARKED.search(text)
    words = re.findall("[A-Za-z]+", unit[1]) if unit else []
    # What begins with a comma was "or" or "and": a second answer, no unit.
    if not 1 <= len(words) <= 5 or unit[1].lstrip().startswith(",") or any(
        _changes_value(word) or (len(word) == 1 and word not in _UNIT_LETTERS) for word in words):
      break
    text = text[:unit.start()]
  if text == whole and (plain := _PLAIN.fullmatch(_TEXT.sub(r"\1", text))):
    words = re.findall("[A-Za-z]+", plain[2])
    if len(words) <= 5 and not any(map(_changes_value, words)) and all(
        len(word) > 3 or word.lower() in _JOINING or len(word) > 1 and _name(word) or word in _COMPOUND for word in words):
      return plain[1], plain[2]
  return text, whole[len(text):]


def _changes_value(word: str) -> bool:
  return word.lower() in _NOT_UNITS or _NUMBER_WORD.search(word.lower()) is not None


def measure(unit: str) -> dict[str, int] | None:
  """A unit's powers, {"meter": 1, "second": -2}; None for no unit and for one with a word that is not in the table."""
  powers, sign, power, last = {}, 1, 1, None
  for token in _TOKEN.finditer(unit.replace("\\text", " ")):
    word = token[0]
    if word == "/" or word == "per":
      sign = -1
    elif token[1]:
      if last is not None:
        powers[last] *= int(token[1])
    elif word.lower() in ("square", "sq", "cubic", "cu"):
      power = 2 if word.lower().startswith("s") else 3
    elif word in _COMPOUND:
      powers |= _COMPOUND[word]
    else:
      last = _name(word)
      if last is None or last in powers:
        return None
      powers[last], power = sign * power, 1
  return powers or None


def _name(word: str) -> str | None:
  small = word.lower()
  return _NAMES.get(word) or (None if len(word) == 1 else _NAMES.get(small) or _NAMES.get(small.removesuffix("s")))
