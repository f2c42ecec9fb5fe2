"""What an answer consists of: lists, sets, tuples, unions, matrices, inequalities, names before "=" and qualifiers after it."""

import re

from arrol_jax.rewards.braces import closes_at_end, cut
from arrol_jax.rewards.exact import value

RELATION = re.compile(r"[<>]|\\(?:le|ge|ne)(?![A-Za-z])")
_LETTER = r"\\?[A-Za-z]+'*(?:_\{[^{}]*\})?"
_ARGUMENTS = r"(?:\((?:[^()=]|\([^()=]*\))*\)|\[[^\[\]=]*\])"
_POINTS = r"\\(?:overline|vec|hat|widehat|overrightarrow|tilde|mathbb|mathcal|mathscr)\{[^{}]*\}"
NAMED = (rf"(?:\\text\{{[^{{}}]*\}}(?:_\{{[^{{}}]*\}})?(?:\([^()]*\))?"
          r"(?:(?:\\(?:triangle|angle|square|odot) ?)?[A-Z]{1,4}"
          rf"|{_POINTS})?|(?:{_POINTS}|{_LETTER})(?:_\{{[^{{}}]*\}})?(?:\^\{{(?:-1|\\prime|[*'])\}})?{_ARGUMENTS}?"
          rf"|m?\\(?:angle|triangle|measuredangle|Delta) ?[A-Za-z_{{}}0-9]+|\[(?:\\(?:triangle|square|odot) ?)?[A-Za-z]+\]"
          rf"|\\(?:max|min|sup|inf|deg|det|dim|#) ?{_LETTER}{_ARGUMENTS}?|\\[|]{_LETTER}\\[|]|\|{_POINTS}\||\|{_LETTER}\|"
          rf"|\(?{_LETTER}\\circ ?{_LETTER}\)?\([^()=]*\)"
          rf"|\\frac\{{d\^?\{{?[0-9]?\}}?{_LETTER}\}}\{{d{_LETTER}(?:\^\{{[0-9]\}})?\}}"
          rf"|\\lim_\{{[^{{}}]*\}}{_LETTER}{_ARGUMENTS}?|\\l(?:floor|ceil)(?![A-Za-z])[^=]{{1,40}}\\r(?:floor|ceil)"
          r"|(?:[PE]|\\Pr ?|\\mathbb\{[PE]\})(?:\((?:[^()]|\([^()]*\))*\)|\[[^\[\]]*\]))")  # P(X=2), E[X|Y=1]
NAME = re.compile(rf"({NAMED}|\({NAMED}(?:,{NAMED})+\))(?:=|\\in(?![A-Za-z]))([^=]+)")
_BACKWARD = re.compile(r"((?:[^=A-Za-z\\]|\\(?:(?:frac|sqrt|pi|cdot|pm)(?![A-Za-z])|[^A-Za-z]))+)"  # 57=n, \frac{3}{4}=P(A)
                       r"=([A-Za-z](?:_\{[^{}]*\})?(?:\([A-Za-z]\))?)")
_INDEXED = re.compile(r"([A-Za-z])_\{[0-9A-Za-z]\}")
# After an answer, without which it says the same: for any constant c, k\in\mathbb{Z}.
_QUALIFIER = re.compile(
  r"[,;(]?(?:\\text\{,?\(?(?:for|where|with)(?:any|all|every|each|some|arbitrary|an?|the|is|are|integers?|constants?|reals?"
  r"|numbers?)*\)?\}"
  r"(?:[A-Za-z](?:\\in ?(?:\\mathbb\{[ZRN]\}|[ZRN])|\\in ?\(-\\infty,\\infty\))?(?:\\text\{(?:is|are)?(?:any|an?|arbitrary|real"
  r"|constant|integers?|number)*\})?)?"
  r"|(?<=[,;(])[A-Za-z]\\in ?(?:\\mathbb\{[ZRN]\}|[ZRN](?![A-Za-z])|\(-\\infty,\\infty\)))\)?$")


def without_qualifier(text: str) -> str:
  """`text` less a last phrase that only says which letters are constants or integers."""
  found = _QUALIFIER.search(text)
  if found is None or found.start() == 0 or RELATION.search(text[:found.start()]) and re.search(r"[ZN]\}?\)?$|integer", found[0]):
    return text  # x>3 of integers is another set
  return text[:found.start()]


def forward(text: str) -> str:
  """57=n as n=57."""
  found = _BACKWARD.fullmatch(text)
  return f"{found[2]}={found[1]}" if found else text


def without_name(gold: str, answer: str) -> tuple[str, str] | None:
  """Both less the name in `x=...`, `f(x)=...`, `x\\in...`, which one may omit; None if the names differ.

  A name: a letter with indices and arguments, words, |z|, [ABC], an angle, \\overline{AB}, f^{-1}(x), (f\\circ g)(x), a tuple
  of such.
  """
  gold, answer = forward(gold), forward(answer)
  left, equals, right = gold.partition("=")
  if answer == f"{right}={left}" and equals and "=" not in right and value(left) is None and value(right) is None:
    return gold, gold  # b=a is a=b
  if gold[:1] == "(" or answer[:1] == "(":
    gold, answer = _coordinates(gold), _coordinates(answer)
  gold_name, answer_name = _assigned(gold), _assigned(answer)
  if gold_name and answer_name and _is_graph(gold_name[1], answer_name[1]):
    return gold_name[2], answer_name[2]
  if gold_name and answer_name and gold_name[1] != answer_name[1] and (
      ("\\text" in gold_name[1]) == ("\\text" in answer_name[1])):
    same = "\\text" in gold_name[1] and gold_name[1].casefold() == answer_name[1].casefold()
    return (gold_name[2], answer_name[2]) if same else None
  if (gold_name is None and "=" in gold) or (answer_name is None and "=" in answer):
    gold, answer = (name[2] if name and "=" not in text else text for name, text in ((gold_name, gold), (answer_name, answer)))
    return gold, answer  # an equation on one side: its counterpart is no assignment, but x\in\{2,5\} is x=2\lor x=5
  return (gold_name[2] if gold_name else gold), (answer_name[2] if answer_name else answer)


def _assigned(text: str) -> re.Match | None:
  """NAME's match, unless the letter that is named occurs in its own value: x=2x+1 is an equation."""
  found = NAME.fullmatch(text)
  own = found and len(found[1]) == 1 and text[1] == "=" and re.search(
    rf"(?<![A-Za-z]){found[1]}(?![A-Za-z])", re.sub(r"\\[A-Za-z]+|_\{[^{}]*\}", " ", found[2]))
  return None if own else found


_TUPLE = re.compile(rf"\(({_LETTER}(?:,{_LETTER})+)\)=(\(.*\))")


def in_order(gold: str, answer: str) -> tuple[str, str]:
  """(x,y)=(4,9) beside y=9,x=4 as two tuples in the first one's order; other pairs as they are."""
  found = _TUPLE.fullmatch(gold) or _TUPLE.fullmatch(answer)
  other = answer if found and found[0] == gold else gold
  parts = [part.partition("=") for part in cut(other, (",", ";")) or ()]
  named = {name: one for name, _, one in parts}
  order = found[1].split(",") if found else []
  if sorted(order) != sorted(name for name, _, _ in parts) or len(named) < len(order):
    return gold, answer
  same = f"({','.join(named[name] for name in order)})"
  return (found[2], same) if found[0] == gold else (same, found[2])


def _coordinates(text: str) -> str:
  """A point by its name, A(1,2), as its coordinates."""
  named = re.match(r"[A-DMO-S]\(", text) and closes_at_end(text[1:])
  return text[1:] if named and len(cut(text[2:-1], (",",)) or ()) > 1 else text


def _is_graph(*names: str) -> bool:
  """Whether two names are y and a function's, f(x)."""
  return "y" in names and any(re.fullmatch(r"[a-xzA-Z]\([a-xz]\)", name) for name in names)


def names(elements: list[str]) -> set[str]:
  """The names of a list's elements; x_1=4,x_2=9 and x=4,x=9 have the one name x."""
  found = [NAME.fullmatch(part) for part in elements]
  bases = {name[1] for name in found if name}
  indexed = [_INDEXED.fullmatch(base) for base in bases]
  return {match[1] for match in indexed} if all(indexed) and len({match[1] for match in indexed}) == 1 else bases


def bare(text: str) -> str:
  """`text` without brackets around the whole of a single expression: (-4), {18}. Braces alone are not seen: {1,2} is 1,2."""
  while text[:1] in ("(", "{") and text[-1:] == {"(": ")", "{": "}"}[text[0]] and closes_at_end(text):
    inner = cut(text[1:-1], (",", ";", "\\lor"))
    if inner is None or len(inner) > 1 and text[0] == "(" or not inner[0]:
      break
    text = text[1:-1].strip()
  return text


def value_or_text(text: str) -> object:
  """What equal elements share: the exact value, else the text. A percentage is text."""
  found = None if text.endswith("%") else value(text)
  return text if found is None else found


def distinct(text: str) -> str:
  """A set in \\{ \\} with each element once, {1,2,2} as {1,2}; other text as it is."""
  if not (text.startswith("\\{") and text.endswith("\\}") and closes_at_end(text[1:])):
    return text
  elements = {value_or_text(element): element for element in reversed(cut(text[2:-2], (",", ";")) or ())}
  return f"\\{{{','.join(reversed(elements.values()))}\\}}"


def _both_signs(text: str) -> list[str]:
  """The two values of an expression with one \\pm (and \\mp the other way round); else the text alone."""
  if text.count("\\pm") != 1 or text.count("\\mp") > 1:
    return [text]
  signs = (("+", "-"), ("-", "+"))
  values = [text.replace("\\pm", one).replace("\\mp", other) for one, other in signs]
  return [re.sub(r"([({\[])\+", r"\1", value).removeprefix("+") for value in values]


# A number times a matrix too. Not [vV]: a determinant, a norm.
_MATRIX = re.compile(r"([-0-9./]*|-?\\frac\{[-0-9]+\}\{[0-9]+\})(?:\\cdot ?)?\\begin\{([pbB]?matrix|pieces)\}(.*)\\end\{\2\}")


def split(text: str, outermost: bool = True) -> tuple[str, list[str]] | None:
  """The kind of a canonical answer and its elements; None if its brackets do not match up.

  Kinds: "one" (a single expression), "list" (a list or a set: order is free), "union", "matrix [columns of each row]", "pieces"
  (of a function), "set" (of one element, itself an element), and for tuples and intervals the two brackets, such as "(]" or "<>".
  As a whole answer the set of one element is that element: the solution set.
  """
  matrix = _MATRIX.fullmatch(text)
  if matrix and "\\begin" not in matrix[3]:
    rows = [row.split("&") for row in matrix[3].removesuffix("\\\\").split("\\\\")]
    if matrix[1] and matrix[2] != "pieces":
      factor = "-1" if matrix[1] == "-" else matrix[1]
      rows = [[f"{factor}\\cdot({cell})" for cell in row] for row in rows]
    if matrix[2] == "pieces":
      return "pieces", ["&".join(_condition(cell) for cell in row) for row in rows]
    return f"matrix {[len(row) for row in rows]}", [cell for row in rows for cell in row]
  parts = cut(text, (",", ";", "\\lor"))
  if parts is None:
    return None
  if len(parts) > 1:
    return "list", [value for part in parts for value in _both_signs(part)]
  parts = cut(text, ("\\cup",))
  if len(parts) > 1:
    return "union", parts
  return _enclosed(text, outermost)


def _enclosed(text: str, outermost: bool) -> tuple[str, list[str]]:
  """`split` of what is no list: a set, a tuple, an interval, a vector or a single expression."""
  if text.startswith("\\{") and text.endswith("\\}") and closes_at_end(text[1:]):
    inner = [value for part in cut(text[2:-2], (",", ";", "\\lor")) for value in _both_signs(part)]
    return ("list" if len(inner) > 1 else "one" if outermost and inner != ["\\emptyset"] else "set"), inner
  if text.startswith("\\langle") and text.endswith("\\rangle") and len(inner := cut(text[7:-7], (",", ";")) or []) > 1:
    return "<>", inner
  if text.count("\\pm") == 1:
    return "list", _both_signs(text)
  if text[:1] in ("(", "[") and closes_at_end(text):
    inner = cut(text[1:-1], (",", ";"))
    if len(inner) > 1:
      return text[0] + text[-1], inner
  return "one", [text]


def _condition(cell: str) -> str:
  """A cell of a function defined in pieces, without "if" and commas: x\\ge0, otherwise."""
  cell = re.sub(r"\\text\{,?(?:if|for|when|where)\}|^,|^(?:if|for)(?![A-Za-z])", "", cell.strip().rstrip(",;. "))
  return re.sub(r"\\text\{,?(?:if|for|when|where)", r"\\text{", cell).rstrip(",;. ") or "\\text{otherwise}"


# --- inequalities as sets -----------------------------------------------------------------------------------

_BUILDER = re.compile(r"\\\{([A-Za-z])(?:\\in ?\(-\\infty,\\infty\)|\\in ?\\mathbb\{R\})?(?:\\mid ?|:|\||(?<=[})]),)(.+)\\\}")
_SIGN = re.compile(r"(<|>|\\le(?![A-Za-z]) ?|\\ge(?![A-Za-z]) ?|\\ne(?![A-Za-z]) ?|=)")
_VARIABLE = re.compile(r"\\?[A-Za-z]+(?:_\{[^{}]*\})?|\|[A-Za-z]\||[A-Za-z]\([A-Za-z]\)")


def without_builder(text: str) -> str:
  """The relation in {x | 2 < x}, which says the same."""
  match = _BUILDER.fullmatch(text)
  return match[2] if match and match[1] in match[2] and RELATION.search(match[2]) else text


def _is_variable(text: str) -> bool:
  return _VARIABLE.fullmatch(text) is not None and text not in ("\\pi", "\\infty", "e")


def _interval(relation: str) -> tuple[str, str] | None:
  """(variable, set) of a relation such as 2<x\\le5, x\\ne3, x=1; None for other text."""
  pieces = _SIGN.split(relation)
  terms, signs = [term.strip() for term in pieces[::2]], [sign.strip() for sign in pieces[1::2]]
  if not all(terms) or len(terms) not in (2, 3):
    return None
  if signs[0] in (">", "\\ge"):  # read from the other end
    flipped = {">": "<", "\\ge": "\\le"}
    if any(sign not in flipped for sign in signs):
      return None
    terms, signs = terms[::-1], [flipped[sign] for sign in signs[::-1]]
  if len(terms) == 3:
    low, variable, high = terms
    if not _is_variable(variable) or any(sign not in ("<", "\\le") for sign in signs):
      return None
    return variable, f"{'(' if signs[0] == '<' else '['}{low},{high}{')' if signs[1] == '<' else ']'}"
  left, right = terms
  if signs[0] in ("\\ne", "="):
    variable, other = (left, right) if _is_variable(left) else (right, left)
    if not _is_variable(variable):
      return None
    return variable, f"\\{{{other}\\}}" if signs[0] == "=" else f"(-\\infty,{other})\\cup({other},\\infty)"
  if _is_variable(left) and not (_is_variable(right) and len(right) < len(left)):
    return left, f"(-\\infty,{right}{')' if signs[0] == '<' else ']'}"
  return (right, f"{'(' if signs[0] == '<' else '['}{left},\\infty)") if _is_variable(right) else None


def _absolute(variable: str, interval: str) -> tuple[str, str] | None:
  """|x|<5 as the set of x; None where the bound is no positive number."""
  low, high = interval[1:-1].split(",", 1)
  bound = high if low == "-\\infty" else low
  if "\\cup" in interval or interval[0] == "\\" or (value(bound) or 0) <= 0:
    return None
  if low == "-\\infty":
    return variable[1:-1], f"{'(' if interval[-1] == ')' else '['}-{bound},{bound}{interval[-1]}"
  return variable[1:-1], f"(-\\infty,-{bound}{')' if interval[0] == '(' else ']'}\\cup{interval}"


def _both(parts: list[str]) -> tuple[str, str] | None:
  """2<x,x<5 as the one interval; None for other pairs."""
  found = [_interval(part) for part in parts]
  if None in found or found[0][0] != found[1][0] or any("\\cup" in sets or "," not in sets for _, sets in found):
    return None
  sets = sorted((sets for _, sets in found), key=lambda text: not text.endswith(",\\infty)"))
  if not sets[0].endswith(",\\infty)") or not sets[1].startswith("(-\\infty,"):
    return None
  low, high = sets[0].removesuffix(",\\infty)"), sets[1].removeprefix("(-\\infty,")
  bounds = value(low[1:]), value(high[:-1])
  return (found[0][0], f"{low},{high}") if None not in bounds and bounds[0] < bounds[1] else None


def as_set(text: str) -> tuple[str, str] | None:
  """(variable, set) of inequalities joined by "or", \\cup and intervals; None for other text. Sets alone have no variable: ""."""
  parts = cut(text, ("\\lor", "\\cup"))
  if parts is None:
    return None
  if len(parts) == 1 and len(both := cut(text, (",", "\\land")) or []) == 2 and RELATION.search(both[0]):
    return _both(both)
  variables, sets = set(), []
  for part in parts:
    part = bare(without_builder(part))
    if RELATION.search(part) or "=" in part:
      found = _interval(part)
      if found and found[0].startswith("|"):
        found = _absolute(*found)
      if found is None:
        return None
      variables.add(found[0])
      sets.append(found[1])
    elif part[:1] in ("(", "[") or part.startswith("\\{") or part == "\\emptyset":
      sets.append(part)
    else:
      return None
  return ("".join(variables), "\\cup".join(sets)) if len(variables) < 2 else None
