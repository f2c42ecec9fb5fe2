"""Units of measurement at the end of an answer: dropped for the comparison, and compared where both sides name one.

An answer may give or omit its unit, if its words count as one (counted.py). Where both sides give one of the table below (SI
prefixes times bases, and what else is common), they must be the same unit: 5 cm is not 5 m, 5 mg not 5 g. Where a side has words
that are not in the table ("apples", "miles east"), the words must be the same. A bare letter or word after a number is a unit
only if it is in the table or, after a plain number, a word. Left out: conversion.
"""

import re

from arrol_jax.rewards.counted import changes_east_asian, changes_value, names_things

# name: symbol, then other spellings. Names and symbols take SI prefixes; symbols count in their case only.
_SI = """
meter: m metre | gram: g gramme | second: s | liter: L l litre | newton: N | joule: J | watt: W | volt: V | pascal: Pa | hertz: Hz
ampere: A amp | coulomb: C | farad: F | kelvin: K | mole: mol | ohm: Ω \u03a9 | electronvolt: eV | calorie: cal | tesla: T
weber: Wb | henry: H | siemens: S | becquerel: Bq | bit: bit | byte: B | bar: bar | tonne: t | candela: cd | lumen: lm
"""
_PREFIXES = {"kilo": "k", "centi": "c", "milli": "m", "deci": "d", "micro": "μ", "nano": "n", "pico": "p", "femto": "f",
             "mega": "M", "giga": "G", "tera": "T", "hecto": "h"}
# Plurals in -s are found by themselves; what has one letter counts in its case only.
_TABLE = """
inch: in inches | foot: ft feet | yard: yd | mile: mi | gram: gm | kilogram: kilo | pound: lb | ounce: oz | ton:
second: sec sekunde sekunden | meter: mtr metro mètre | minute: min minuten minuto | hour: h hr stunde stunden heure hora
day: d tage días | week: wk woche wochen semana | month: monate | year: yr jahr jahre année año anni | cent: | dollar: usd buck
euro: eur | rupee: rs inr | yen: jpy | yuan: rmb | cubiccentimeter: cc | milliliter: ml | kilohertz: khz | megahertz: mhz
kilowatt: kw | degree: deg | radian: rad | celsius: C centigrade | fahrenheit: F | unit: | gallon: gal | hertz: hz | acre:
pascal: pa | hectare: | pint: | quart: | cup: | knot: | decibel: dB | lightyear: ly | steradian: sr | au: AU | angstrom: Å
person: people | child: children | man: men | woman: women | penny: pennies | pence:
meter: м метр метра метров метры μέτρο μέτρα | kilometer: км километр километра километров χιλιόμετρο χιλιόμετρα
centimeter: см сантиметр сантиметра сантиметров | millimeter: мм миллиметр миллиметра миллиметров
gram: г грамм грамма граммов γραμμάρια | kilogram: кг килограмм килограмма килограммов κιλό κιλά
liter: л литр литра литров λίτρο λίτρα | milliliter: мл миллилитров | second: сек секунда секунды секунд δευτερόλεπτα
minute: мин минута минуты минут λεπτά | hour: ч час часа часов ώρα ώρες | day: день дня дней ημέρα ημέρες μέρες
week: неделя недели недель εβδομάδες | month: месяц месяца месяцев μήνες | year: год года лет χρόνια έτη
ruble: руб рубль рубля рублей | euro: евро ευρώ | dollar: доллар доллара долларов δολάρια | degree: градус градуса градусов μοίρες
person: человек человека άτομα
"""
# Of a script whose words are not letters alone.
_HINDI = {
  "किमी": "km", "सेमी": "cm", "मिमी": "mm", "मीटर": "meter", "किलोमीटर": "km", "सेंटीमीटर": "cm", "किग्रा": "kg",
  "किलोग्राम": "kg", "ग्राम": "gram", "लीटर": "liter", "घंटे": "hour", "मिनट": "minute", "सेकंड": "second", "दिन": "day",
  "वर्ष": "year", "साल": "year", "रुपये": "rupee"}
_HINDI_UNIT = re.compile(rf"(?<=[0-9{{ ])(?:{'|'.join(_HINDI)})(?=[ }}.]|$)")
_CURRENCIES = frozenset("cent dollar euro rupee yen yuan".split())


def _names() -> dict[str, str]:
  names = {}
  for entry in re.split(r"[|\n]", _SI):
    name, _, spellings = entry.strip().partition(":")
    for spelling in (name, *spellings.split()) if name else ():
      names.setdefault(spelling, name)
      for prefix, symbol in _PREFIXES.items():
        word = len(spelling) > 3 and spelling.islower() or spelling in ("ohm", "amp")
        for first in (prefix,) if word else (symbol, "u", "µ") if symbol == "μ" else (symbol,):
          names.setdefault(first + spelling, prefix + name)
  for entry in re.split(r"[|\n]", _TABLE):
    name, _, spellings = entry.strip().partition(":")
    names |= {spelling: name for spelling in (name, *spellings.split()) if name}
  return names


_NAMES = _names()
_COMPOUND = {"mph": {"mile": 1, "hour": -1}, "kmh": {"kilometer": 1, "hour": -1}, "kph": {"kilometer": 1, "hour": -1},
             "kmph": {"kilometer": 1, "hour": -1}, "mpg": {"mile": 1, "gallon": -1}, "rpm": {"revolution": 1, "minute": -1},
             "kWh": {"kilowatt": 1, "hour": 1}, "kwh": {"kilowatt": 1, "hour": 1}, "mps": {"meter": 1, "second": -1},
             "fps": {"foot": 1, "second": -1}, "sqft": {"foot": 2}, "psi": {"pound": 1, "inch": -2}}

_UNIT_LETTERS = frozenset("ACFJKLNVWTghmslΩ\u03a9")
_SMALL = frozenset("of the a an in total old".split())
_JOINING = frozenset("per of a the square sq cubic cu old".split())
_GLUED = frozenset(  # a unit also directly after a number or \pi; mg, ml and ms are products there
  "cm mm km kg dm ft lb lbs oz hr hrs min mins sec secs mph kmh kph kJ kW kWh kPa Hz kHz MHz GHz mol rad deg yd yds yr yrs gal "
  "usd kmph "
  "mL dL Pa MPa kN nm cc inch inches feet foot meters metres meter miles mile hours hour days minutes seconds dollars cents "
  "degrees "
  "radians grams years units".split())
# After a number in Chinese, Japanese or Korean.
_EAST_ASIAN = re.compile(r"(?<=[0-9])\s*\(?([\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]{1,6})\)?$")

_EXPONENT = r"\^(?:-?[0-9]|\{-?[0-9]\})"
_GAP = r"\s*(?:/|\\cdot|\\times|\*)?\s*"
_MARKED = re.compile(
  rf"(?<=[0-9A-Za-z}})\]])(?:{_GAP}\s*\\text\{{((?:[^\W\d_]|[µ\s.,/~'()\[\]-]|{_EXPONENT})+)\}}|\s*/?\s*()\\(?:Omega|mho"
  rf"|AA)(?![A-Za-z]))"
  rf"(?:{_EXPONENT})?[.\s]*$")
_POWER_OF = rf"(\\text\{{[^{{}}]*\}}(?:{_EXPONENT})?)"
_QUOTIENT = re.compile(rf"\\frac\s*\{{\s*{_POWER_OF}\s*\}}\s*\{{\s*{_POWER_OF}\s*\}}$")
_SCALE = re.compile(r"(?<=\\circ)\s*(?:\\text\{\s*)?([CF])\s*\}?$")
_MICRO = re.compile(r"\\mu\s*(?:\\text\{\s*([A-Za-z]+)\s*\}|([A-Za-z]{1,2})(?![A-Za-z]))")
_KILO_OHM = re.compile(r"(?<=[0-9 }])(?:\\text\{\s*([kM])\s*\}|([kM]))\s*\\Omega")
_PLAIN = re.compile(rf"([^A-Za-z\\]*[0-9])(?:\s+(\()?|\s*/\s*)([^\W\d_]+(?:[\s/.-]+[^\W\d_]+)*[.]?(?:{_EXPONENT})?)(?(2)\))")
_BARE = re.compile(rf"(.*[0-9}})]|.*\\pi|.*\\circ)(\s*)((?:[A-Za-z]++(?:{_EXPONENT})?+(?:\s*/\s*|\s++)?+)++)$", re.DOTALL)
_LONGEST = 60  # characters of a bare unit and what stands before it
_TEXT = re.compile(rf"^\\text\{{\s*([-+]?[0-9][^{{}}\\]*)\}}({_EXPONENT})?$")
_ORDINAL = re.compile(r"(?<=[0-9])(?:\s*-)?(?:\^\s*\{?\s*)?(?:\\text\{\s*(st|nd|rd|th)\s*\}|\s*(st|nd|rd|th))\s*\}?$")
_RANKED = re.compile(r"^([0-9]+)(?:\^?\{?\s*(\\text\{\s*)?)(?:st|nd|rd|th)\s*(\}{0,2})\s+(?=[a-z]{3}|\\text\{)")  # 57th day
_TEXT_RANK = re.compile(r"^\\text\{\s*([0-9]+)(?:st|nd|rd|th)\s*\}$")
_SQUARED = re.compile(r"per\s+(seconds?|minutes?|hours?)\s+(square|cube)d(?![a-z])")
_RATE = re.compile(rf"([^A-Za-z\\]*[0-9])\s+([A-Za-z]{{1,3}}\s*/\s*(?:(?:s|sec|h|hr|min|L|mL|kg|mol|day)(?:{_EXPONENT})?"
                   r"|c?m\^\{?[23]\}?))\.?")
_TOKEN = re.compile(r"[^\W\d_]+|/|\^\{?(-?[0-9])\}?")
_SIGN = re.compile(
  r"^(?P<minus>[-+]?\s*)(?P<text>\\text\{\s*)?(?P<sign>(?:US|AU|CA|A|C|S|HK|NT|NZ)?\s*\\?\$"
  r"|\\(?:textdollar|mathdollar|pounds|textsterling|mathsterling)(?![A-Za-z])"
  r"|\\(?:euro|texteuro)(?![A-Za-z])(?:\{\})?|\\(?:yen|textyen)(?![A-Za-z])|[€£¥₹₩₽₺₫₦¢]|(?:Rs|INR|USD|EUR|GBP|CAD|AUD|CNY|RMB"
  r"|JPY)\b\.?)"
  r"\s*(?P<close>\}?)\s*(?P<minus_too>-?)\s*(?=[-0-9.\\(\s])")
_SIGN_AFTER = re.compile(
  r"(?<=[0-9.}])\s*(?:\\text\{\s*)?(\\?\$|[€£¥₹₩₽₺₫₦¢]|\\cent(?:s)?(?![A-Za-z])|(?:USD|EUR|GBP|INR|CAD|AUD|CNY|RMB|JPY"
  r"|Rs)\b\.?)\s*\}?\s*\.?$")
_CURRENCY = {
  "$": "dollar", "dollar": "dollar", "USD": "dollar", "€": "euro", "EUR": "euro", "euro": "euro",
  "£": "pound", "GBP": "pound", "pounds": "pound",
  "sterling": "pound", "¥": "yen", "yen": "yen", "JPY": "yen", "CNY": "yen", "RMB": "yen", "₹": "rupee",
  "Rs": "rupee", "INR": "rupee",
  "¢": "cent", "cent": "cent"}


def _currency(sign: str) -> str:
  return next((name for mark, name in _CURRENCY.items() if mark in sign), sign)


def split_currency(text: str) -> tuple[str, str]:
  """`text` less a currency sign before or after its number, and the currency's name ("" for none). Math's `$...$` stay."""
  delimiters = text.count("$") - text.count("\\$") > 1  # of mathematics
  after = _SIGN_AFTER.search(text)
  if after and delimiters and after[1] == "$":
    after = None
  sign = _SIGN.match(text)
  if sign and not (delimiters and sign["sign"] == "$"):
    rest = text[sign.end():after.start() if after else None]  # $500 USD
    opening = "" if sign["close"] else sign["text"] or ""
    return opening + sign["minus"] + sign["minus_too"] + rest, _currency(sign["sign"])
  return (text[:after.start()], _currency(after[1])) if after else (text, "")


def split_unit(text: str) -> tuple[str, str]:
  """`text`, in which words are \\text{words}, less the units at its end, and these units' text ("" where there are none).

  Without \\text a unit of the table of two letters at least may stand behind a number, \\pi or a bracket, and after a plain
  number and a space also other words of more than three letters: 12 xy and 3 m are products. \\text{12 apples} is such a text
  too. Ordinals (57th) lose their ending.
  """
  if not text.isascii():
    text = _HINDI_UNIT.sub(lambda word: _HINDI[word[0]], text)
  text = _RANKED.sub(lambda rank: f"{rank[1]} {'' if rank[3] else rank[2] or ''}", text)
  text = _TEXT_RANK.sub(r"\1", text)
  text = _SQUARED.sub(r"per \2 \1", text)
  text = _QUOTIENT.sub(r"\1/\2", _KILO_OHM.sub(lambda k: f"\\text{{{k[1] or k[2]}Ω}}", text))
  text = _MICRO.sub(lambda unit: f"\\text{{μ{unit[1] or unit[2]}}}" if unit.end() == len(text) else unit[0], text)
  scale = _SCALE.search(text)
  if scale:
    return text[:scale.start()], scale[1]
  whole = text
  for _ in range(4):  # 9.8 \text{ m} \text{ s}^{-2}
    unit = _MARKED.search(text)
    content = unit[1] or "Ω" if unit else ""
    words = re.findall(r"[^\W\d_]+", content)
    # What begins with a comma was "and": a second answer, no unit.
    if not 1 <= len(words) <= 6 or content.lstrip().startswith(",") or changes_east_asian(content) or any(
        changes_value(word) or (len(word) == 1 and word.isascii() and word not in _UNIT_LETTERS) for word in words):
      break
    text = text[:unit.start()]
  if text == whole:
    text, tail = _split_bare(_TEXT.sub(r"\1\2", text))
    if not tail and text + tail != whole and _TEXT.match(whole):
      text = whole
  else:
    tail = whole[len(text):].replace("\\Omega", "Ω")
  ordinal = _ORDINAL.search(text)
  return text[:ordinal.start()] if ordinal else text, tail


def _split_bare(text: str) -> tuple[str, str]:
  """`split_unit` where no unit is in \\text."""
  rate = _RATE.fullmatch(text)
  if rate and measure(rate[2]):
    return rate[1], rate[2]
  plain = _PLAIN.fullmatch(text)
  if plain:
    words = re.findall(r"[^\W\d_]+", plain[3])
    if len(words) <= 5 and len(words[-1]) > 1 and not any(map(changes_value, words)) and all(
        len(word) > 3 - (len(words) > 1 and len(words[-1]) > 3) or word.lower() in _JOINING or word in _COMPOUND
        or len(word) > 1 and (_name(word) and word != "mg" or not word.isascii()) for word in words):
      return plain[1], plain[3]
  bare = _BARE.match(text[-_LONGEST:])
  if bare and not re.search(r"[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", text[:-len(bare[3])])):
    words = re.findall("[A-Za-z]+", bare[3])
    if words[0] in _GLUED and all(word in _GLUED or "/" in bare[3] and _name(word) or word in _JOINING for word in words):
      return text[:-len(bare[3])].rstrip(), bare[3].strip()
  asian = _EAST_ASIAN.search(text)
  if asian and not changes_east_asian(asian[1]):
    return text[:asian.start()], asian[1]
  return text, ""


def measure(unit: str) -> dict[str, int] | None:
  """A unit's powers, {"meter": 1, "second": -2}; None for no unit and for one with a word that is not in the table."""
  powers, sign, power, last = {}, 1, 1, None
  for token in _TOKEN.finditer(unit.replace("\\text", " ").replace("\\cdot", " ")):
    word = token[0]
    if word == "/" or word == "per":
      sign = -1
    elif token[1]:
      if last is not None:
        powers[last] *= int(token[1])
    elif word.lower() in ("square", "sq", "cubic", "cu", "cube"):
      power = 2 if word.lower().startswith("s") else 3
    elif word in _COMPOUND:
      powers |= _COMPOUND[word]
    else:
      last = _name(word)
      if last is None or last in powers:
        return None
      powers[last], power = sign * power, 1
  if len(powers) > 1 and {"celsius", "fahrenheit"} & set(powers):
    powers.pop("degree", None)  # degrees Celsius
  return powers or None


def _words(unit: str) -> list[str]:
  """A unit's words without plurals, articles and case, known ones by their names, sorted."""
  words = [_name(word) or word.lower() for word in re.findall(r"[^\W\d_]+", unit.replace("\\text", " ").replace("\\cdot", " "))]
  return sorted(word.removesuffix("s") if len(word) > 3 else word for word in words if word not in _SMALL)


def droppable(unit: str, money: str = "") -> bool:
  """Whether an answer may have a unit that the gold lacks: 5 kg, 5 apples; not 5 never, nor what may be a number: 5 K, $5 m."""
  phrase = unit.replace("\\text", " ").replace("\\cdot", " ")
  if measure(unit) is None:
    return names_things(phrase, _name)
  return phrase.strip(" {}.") not in ("K", "T", "MM", "kilo") and not (money and not re.search("/|per", phrase))


def differ(gold: tuple[str, str], answer: tuple[str, str]) -> bool:
  """Whether two (unit, currency) cannot mean the same; what a side omits is no difference, unless it may be no unit at all."""
  parts, words_only = [], []
  for unit, currency in (gold, answer):
    powers = measure(unit)
    money = next((name for name, power in (powers or {}).items() if power == 1 and name in _CURRENCIES), "")
    if powers and money:
      powers = {name: power for name, power in powers.items() if name != money}
      unit = unit if powers else ""
    parts.append((currency or money, powers, unit))
    if money and not currency and not unit:
      words_only.append(len(parts) - 1)
  (gold_money, gold_powers, gold_unit), (money, powers, unit) = parts
  if words_only and not (gold_money and money) and _words(gold[0]) != _words(answer[0]) and gold[0] and answer[0]:
    return True  # cents, and some other word
  if gold_money and money and gold_money != money:
    return True
  if "pound" in (gold_money, money) and {"pound": 1} in (gold_powers, powers):
    return False  # £5 is 5 pounds
  if unit and not gold_unit and not droppable(unit, money):
    return True
  if not gold_unit or not unit:
    return bool(gold_money and powers and not money and not gold_unit or money and gold_powers and not gold_money and not unit)
  if gold_powers and powers:
    degrees = {"degree": 1} in (gold_powers, powers) and {*gold_powers, *powers} <= {"degree", "celsius", "fahrenheit"}
    return gold_powers != powers and not degrees
  return _words(gold_unit) != _words(unit)


_LETTERS_AFTER = re.compile(rf"(.*(?:[0-9}})]|\\pi)) ?((?:[A-Za-z]++(?:{_EXPONENT})?+/?+)++)")


def without_same(text: str, unit: str) -> str:
  """`text` less letters at its end that name the unit which the other answer has: 4h where that is 4 hours."""
  found = _LETTERS_AFTER.fullmatch(text) if unit else None
  return found[1] if found and measure(found[2]) is not None and measure(found[2]) == measure(unit) else text


def named(word: str) -> str | None:
  """The name of a unit by one of its spellings, "hour" for h; None for other words."""
  return _name(word)


def _name(word: str) -> str | None:
  found = _NAMES.get(word)
  if found or len(word) == 1:
    return found
  singular = word.removesuffix("s")
  small = word.lower()
  return (_NAMES.get(singular) if len(singular) > 1 else None) or _NAMES.get(small) or _NAMES.get(small.removesuffix("s"))
