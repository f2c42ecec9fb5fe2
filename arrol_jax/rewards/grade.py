"""Is the answer right? Exact rules for numbers and lists; algebra only for what is left.

The order: the same text; caps on length and nesting; one convention for both (conventions.py); an integer gold by integer
comparison; numbers exactly, as fractions; lists, sets, tuples, unions and matrices by their elements; a single expression or
relation by symbolic.py, which runs in a worker process with a deadline (pool.py), never in the caller.

Strict where reports of other graders were not: a gold with a percent sign wants one (an answer may carry one more, if the
numbers are equal: 20\\% for 20, never 0.2); an equation is not its last number (`1=2=12` is not 12); (1,2) is not 1,2 and not
[1,2]; 0.333333 is not 1/3; a word must be the same word. An integer gold takes the integer only (`12.0` and `x=12` too), not an
expression that evaluates to it. Lenient where nothing is lost: a unit or what is counted (counted.py), a degree sign on a
number, the name in `x=...` and "for any constant c" may be given or omitted (but units that both sides give must agree:
units.py). A set has each element once, and as a whole answer the set of one element is that element; a quotient by zero is
equal to nothing but its own text. Left out: partial credit, tolerances.
"""

from collections import Counter
from collections.abc import Callable
import re
from typing import NamedTuple

from arrol_jax.rewards import units
from arrol_jax.rewards.conventions import alike
from arrol_jax.rewards.exact import SCIENTIFIC, integer, number, value
from arrol_jax.rewards.extract import check_pattern, nesting, search
from arrol_jax.rewards.notation import canonical
from arrol_jax.rewards.parts import (
  NAME,
  RELATION,
  as_set,
  bare,
  distinct,
  forward,
  in_order,
  names,
  split,
  value_or_text,
  without_builder,
  without_name,
  without_qualifier,
)

MAX_CHARACTERS = 300  # a longer answer is none, and costs a parser seconds; with a longer gold, that gold's length
MAX_RAW = 3000  # before spaces, fonts and the like are gone
MAX_NESTING = 20


class Graded(NamedTuple):
  """A reward (0 or 1 here, a reward function's own number else) and its reason: correct, wrong, no_answer, too_long, timeout,
  crashed or error."""

  reward: float
  reason: str


CORRECT, WRONG = Graded(1.0, "correct"), Graded(0.0, "wrong")
# Decides a pair (gold, answer) of single expressions; None leaves it open.
Decide = Callable[[str, str], bool | None]


def equivalent(gold: str, answer: str, decide: Decide, outermost: bool = True) -> bool | None:
  """Whether two canonical answers are the same mathematics, `decide` being asked about single expressions."""
  gold, answer = without_builder(bare(gold)), without_builder(bare(answer))
  if gold[:1] != answer[:1] and "(" in (gold[:1], answer[:1]) and "=" in gold and "=" in answer:
    gold, answer = in_order(gold, answer)
  if gold == answer:
    return True
  shorter = without_qualifier(gold), without_qualifier(answer)
  if (shorter[0] == gold) != (shorter[1] == answer):
    gold, answer = shorter
  stripped = without_name(gold, answer)
  if stripped is None:
    return False
  gold, answer = map(bare, stripped)
  if gold == answer:
    return True
  if number(gold) is not None and number(answer) is not None:
    return _leaf(gold, answer, decide)
  if RELATION.search(gold) or RELATION.search(answer):
    sets = as_set(gold), as_set(answer)
    if None not in sets:
      if sets[0][0] and sets[1][0] and sets[0][0] != sets[1][0]:
        return False
      gold, answer = sets[0][1], sets[1][1]
  verdict = _by_parts(gold, answer, decide, outermost)
  if verdict is False and (once := (distinct(gold), distinct(answer))) != (gold, answer):
    return _by_parts(*once, decide, outermost)
  return verdict


_INEQUALITY = re.compile(r"[<>]|\\[lg]e(?![A-Za-z])")


def _by_parts(gold: str, answer: str, decide: Decide, outermost: bool) -> bool | None:
  """`equivalent` without names: by the kind of the two answers and their elements."""
  gold_parts, answer_parts = split(gold, outermost), split(answer, outermost)
  if gold_parts is None or answer_parts is None:
    return False
  (kind, golds), (answer_kind, answers) = gold_parts, answer_parts
  if ("\\text" in gold or "\\text" in answer) and ("one" in (kind, answer_kind) or kind != answer_kind):
    return _same_words(gold, answer, outermost)
  listed = gold if kind == "list" else answer
  if {kind, answer_kind} == {"list", "union"} and re.search(r"\\lor|\\infty", listed) and all(
      re.match(r"[(\[].*,.*[)\]]$", part) for part in golds + answers):
    kind = answer_kind = "union"  # (-\infty,2) or (3,\infty)
  if kind != answer_kind:
    relations = [RELATION.search(text) is not None for text in (gold, answer)]
    plain = [which for which, relation in zip((kind, answer_kind), relations, strict=True) if not relation]
    if plain == ["list"] and _INEQUALITY.search(gold + answer):
      return False  # two numbers are not what lies between them
    sets = {kind, answer_kind} <= {"union", "()", "(]", "[)", "[]", "one", "set", "list"} and (
      "\\setminus" in gold + answer or "union" in (kind, answer_kind) and all(text[0] in "([\\" for text in (gold, answer)))
    same_set = sorted(relations) == [False, True] and "=" not in gold + answer or sets
    return decide(gold, answer) if same_set else False
  if kind == "one":
    return _leaf(golds[0], answers[0], decide)
  if len(golds) != len(answers):
    return decide(gold, answer) if kind == "union" else False
  if kind in ("list", "union", "pieces"):
    named = names(golds), names(answers)
    if named[0] != named[1] and max(map(len, named)) > 1:
      return _same_words(gold, answer, outermost) if "\\text" in gold and "\\text" in answer else False  # x=1,y=2 is not 1,2
    verdict = _same_in_any_order(golds, answers, decide, keep_names=len(named[0]) > 1)
    return verdict if verdict is not False or "\\text" not in gold or kind != "list" else _same_words(gold, answer, outermost)
  verdicts = [equivalent(g, a, decide, False) for g, a in zip(golds, answers, strict=True)]
  return False if False in verdicts else None if None in verdicts else True


def _same_in_any_order(golds: list[str], answers: list[str], decide: Decide, keep_names: bool) -> bool | None:
  """Elements with the same text or exact value first, so that few pairs are left to `decide`."""

  def key(text: str) -> object:
    name = NAME.fullmatch(text)
    return value_or_text(bare(name[2] if name and not keep_names else text))

  keyed = [[(key(text), text) for text in texts] for texts in (golds, answers)]
  common = Counter(k for k, _ in keyed[0]) & Counter(k for k, _ in keyed[1])
  left = []
  for pairs in keyed:
    spent, rest = common.copy(), []
    for k, text in pairs:
      if spent[k] > 0:
        spent[k] -= 1
      else:
        rest.append(text)
    left.append(rest)
  undecided = False
  for gold in left[0]:
    verdicts = []
    for answer in left[1]:
      verdicts.append(equivalent(gold, answer, decide, False))
      if verdicts[-1]:
        break
    if True in verdicts:
      left[1].pop(verdicts.index(True))
    elif None in verdicts:
      undecided = True
    else:
      return False
  return None if undecided else True


# --- words --------------------------------------------------------------------------------------------------

_SYNONYMS = {"dne": "doesnotexist"}
_SOLUTIONS = re.compile(r"^there(?:is|are|exists?)(?=no)|(?<=solution)(?:s?exists?|s)$")


def _words(text: str) -> list[str]:
  """The words of an answer in words, without case, spaces, quotes, full stops; single letters (choices) sorted."""
  text = re.sub(r"\\text\{((?:[^{}]|\{[^{}]*\})*)\}", r"\1", text).replace("\\lor", ",").replace("{}", "")
  text = re.sub(r"\\[{}]", "", text)
  words = re.sub(r"\s|(?<![0-9])\.|\.(?![0-9])|[`\"]|''|(?<=[A-Za-z])-(?=[A-Za-z])", "", text).casefold().split(",")
  words = [re.sub(r"^\((.)\)$", r"\1", word) for word in words if word]
  words = [_SOLUTIONS.sub("", _SYNONYMS.get(word, word)) for word in words]
  return sorted(words) if all(len(word) == 1 for word in words) else words


_BARE_WORD = re.compile(r"[A-Za-z]{4,}|(?i:yes|no|odd|all|any|red)")


def _same_words(gold: str, answer: str, outermost: bool) -> bool:
  """Whether two answers with words are the same; an element of a list may have a known unit or not."""
  if _words(gold) == _words(answer):
    return True
  if outermost or RELATION.search(gold + answer):
    return False
  (gold, gold_unit), (answer, unit) = units.split_unit(gold), units.split_unit(answer)
  known = all(not text or units.measure(text) and units.droppable(text) for text in (gold_unit, unit))
  known = known and not units.differ((gold_unit, ""), (unit, ""))
  return bool(known and (gold_unit or unit) and value(gold) is not None and value(gold) == value(answer))


_CHOICE = re.compile(
  r"(?:\\text\{)?\s*(?:(?:[Tt]he\s+)?(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\s*:?\s*)?(?:\(\s*(?:\\text\{)?([A-J])\}?\s*\)"
  r"|([A-J])(?=\s*[:.)]))\s*\}?\s*[:.)]?\s*(.*)",
  re.DOTALL)
_OPTION = re.compile(r"(?:\\text\{)?\s*(?:[Tt]he\s*)?(?:[Oo]ption|[Cc]hoice|[Aa]nswer)\s*:?\s*\(?([A-J])\)?\}?\.?")
_SECOND = re.compile(r"\(\s*(?:\\text\{)?[A-J]\}?\s*\)|^[\s,;]*[A-J](?![A-Za-z0-9])|^\s*(?:\\text\{)?\s*(?:,|;|/|&|and\b|or\b"
                     r"|not\b|\\lor|nor\b)|^(?:[+*/^=<>!_&|]|-\s|\\(?:cdot|times|pm|cup|cap|le|ge|ne|in|to|lor)(?![A-Za-z]))")
_FONTS = re.compile(r"\\(?:text(?:bf|it|rm|normal|sf|tt)?|mathrm|mathbf|mbox|boxed|bold|textsf)(?=\s*\{)")


def _choice(text: str) -> tuple[str, str] | None:
  """The letter and the text of a choice with its text: (C) 12, C: 12, Option C; None for other answers."""
  text = _FONTS.sub(r"\\text", text.replace("\\left", "").replace("\\right", "").replace("$", "")).strip().strip("*` ")
  option = _OPTION.fullmatch(text)
  if option:
    return option[1], ""
  text = re.sub(r"\\(?:quad|[ ,;:])|~", " ", text)
  found = _CHOICE.fullmatch(text)
  if found is None or _SECOND.search(found[3]) or found[3] and not re.search(r"[\s:.]$", text[:found.start(3)].rstrip("}")):
    return None
  rest = found[3].strip().strip(".")
  return found[1] or found[2], rest.removesuffix("}") if rest.count("}") > rest.count("{") else rest


def _same_choice(gold: str, answer: str) -> bool | None:
  """Whether the letters agree, and the texts where both have one; None where one side is no choice."""
  gold_choice = (gold, "") if re.fullmatch("[A-J]", gold) else _choice(gold)
  answer_choice = (answer, "") if re.fullmatch("[A-J]", answer) else _choice(answer)
  if gold_choice is None or answer_choice is None:
    return None
  if gold_choice[0] != answer_choice[0]:
    return False
  if not gold_choice[1] or not answer_choice[1]:
    return True
  return equivalent(canonical(gold_choice[1]).text, canonical(answer_choice[1]).text, lambda _gold, _answer: False)


# --- single expressions -------------------------------------------------------------------------------------

_INDEX = re.compile(r"\\(?:sum|prod|lim)_\{[^{}]*\}")  # n=1 under a sum, n\to\infty under a limit
_OTHER_BASE = re.compile(r"[+-]?[0-9A-Fa-f.]+_\{?[0-9]+\}?")
# What latex2sympy drops (primes, dots, transposes, \angle), adds up (2 3) or evaluates (\gcd of two letters is 1 to it).
_TEXT_ONLY = re.compile(r"gcd|lcm|'|\\prime|!!|\\angle|\.\.|\\dots|\\frac\{d[^{}]*\}\{d|[A-Za-z]\^\{-1\}\(|\^\{(?:T|\\top|\*"
                        r"|\\dagger)\}|[0-9] [0-9]"
                        r"|\\approx|\\begin|\\forall|\\to(?![A-Za-z])|\\equiv|\\pmod")


def _leaf(gold: str, answer: str, decide: Decide) -> bool | None:
  """A single expression or relation: what can be said without algebra, else `decide`."""
  if gold == answer:
    return True
  if answer.endswith("%") and not gold.endswith("%"):
    values = value(gold), value(answer[:-1])
    return values[0] is not None and values[0] == values[1]
  if gold.endswith("%") and answer.endswith("%"):
    gold, answer = gold[:-1], answer[:-1]
  plain = _INDEX.sub("", gold), _INDEX.sub("", answer)
  if any(plain[0].count(sign) != plain[1].count(sign) for sign in ("%", "=", "\\approx")):
    return False
  values = value(gold), value(answer)
  if None not in values:
    return values[0] == values[1]
  if _BARE_WORD.fullmatch(gold) and gold.casefold() == answer.casefold():
    return True
  if plain[0].count("=") > 1 or any(
      ":" in text or _TEXT_ONLY.search(_INDEX.sub("", text)) or _OTHER_BASE.fullmatch(text)
      or SCIENTIFIC.fullmatch(text) and number(text) is None
      or "=" in text and None not in map(number, text.split("=")) for text in (gold, answer)):
    return False  # chains, times, ratios, other bases, huge powers of ten, equations of numbers: as text only
  return decide(gold, answer)


# --- grading ------------------------------------------------------------------------------------------------

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
  if len(found) <= MAX_CHARACTERS and "\\" not in found + gold:  # two integers, the most frequent case
    integers = integer(gold), integer(found)
    if None not in integers:
      return CORRECT if integers[0] == integers[1] else WRONG
  if len(" ".join(found.split())) > max(MAX_RAW, 2 * len(gold)) or nesting(found) > MAX_NESTING:
    return Graded(0.0, "too_long")
  return _judge(gold, found)


_SUM = re.compile(r"([a-z](?:\+[a-z])+)=(.+)")  # m+n=57
_TWO_READINGS = re.compile("[1-9][0-9]{0,2}(?:,[1-9][0-9]{2})+")  # 70,110: a number or a list; 70,000 is a number


def _judge(raw_gold: str, raw_found: str) -> Graded | tuple[str, str]:
  """`judge` of a gold and a final answer whose texts differ."""
  (gold, *gold_unit), (found, *found_unit) = canonical(raw_gold), canonical(raw_found)
  gold, found = bare(gold), bare(found)
  if len(found) > max(MAX_CHARACTERS, 2 * len(gold)):
    return Graded(0.0, "too_long")
  if not gold:
    return Graded(0.0, "error")  # a gold that says nothing is right for nobody
  chosen = _same_choice(gold if len(gold) == 1 else raw_gold, found if len(found) == 1 else raw_found)
  if chosen is not None and (chosen or len(gold) == 1):
    return CORRECT if chosen else WRONG
  if not found_unit[0]:
    found = units.without_same(found, gold_unit[0])
  if units.differ(tuple(gold_unit), tuple(found_unit)) or any(gold_unit) and found.endswith("%"):
    return WRONG
  gold, found = alike(gold, found)
  expected = integer(gold)
  if expected is not None:
    whole, found = found, forward(without_qualifier(found))
    name = NAME.fullmatch(found) or _SUM.fullmatch(found)
    found = bare(name[2] if name and ("=" in found or name[2].startswith("\\{")) else found)
    kind, elements = split(distinct(found)) or ("", [])
    found = bare(elements[0]) if kind == "one" else found  # the solution set {4}
    if integer(found.removesuffix("%")) == expected:
      return CORRECT
    if kind == "one" or not _TWO_READINGS.fullmatch(gold):
      return WRONG
    found = whole
  verdict = equivalent(gold, found, lambda _gold, _answer: None)
  return (gold, found) if verdict is None else CORRECT if verdict else WRONG


def settle(gold: str, answer: str) -> Graded:
  """The grade of a pair that `judge` left open. For a worker process only, as `symbolic` is."""
  from arrol_jax.rewards.symbolic import symbolic  # sympy: in workers only

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
