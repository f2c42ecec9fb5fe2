"""Whether two expressions, equations or inequalities are the same mathematics. For worker processes only, for want of bounds.

latex2sympy2_extended reads the LaTeX; expressions are then compared by their values, with as many digits as it takes, at several
points if they have variables; math-verify compares what else there is (sets). Importing this module imports neither: that
takes a second.
"""

import functools
import logging
import math
import random
import re

from arrol_jax.rewards.braces import each_group
from arrol_jax.rewards.exact import value

MAX_DIGITS = 50_000  # what a number may be computed with
SURE_DIGITS = 450, 120  # equal to so many digits, and those of _hidden, is equal: numbers, values of expressions with variables
MAX_TERMS = 1000  # of a sum or product that is written out
# Values for variables: of both signs, below and above 1, and no two with a simple relation.
_VALUES = ((7, 3), (3, 8), (-5, 4), (31, 5), (-17, 6), (5, 7), (29, 3), (-2, 9), (97, 8), (4, 9), (-43, 7), (11, 13))
_ENOUGH = 4  # points at which equal values make an identity


_VECTOR = r"(?:\\[a-z]+\{(?:[^{}]|\{[^{}]*\})*\}|\\[a-z]+|[A-Za-z])(?:_\{[^{}]*\})?"
_CROSS = re.compile(rf"{_VECTOR}\\crossing ?{_VECTOR}(?![\^'(])")


def _one_letter(cross: re.Match) -> str:
  """A cross product of two vectors as a variable of its own, for its order counts."""
  return f"K_{{{int.from_bytes(cross[0].replace(' ', '').encode())}}}"


_ODD_ROOT = re.compile(r"\\sqrt\[[0-9]*[13579]\](?=\{)")


def _real_root(root: re.Match, content: str) -> str:
  """An odd root of a negative number as the real one."""
  number = value(content)
  if number is not None and number < 0:
    return f"(-{root[0]}{{\\frac{{{-number.numerator}}}{{{number.denominator}}}}})"
  return f"{root[0]}{{{each_group(content, _ODD_ROOT, _real_root)}}}"


def _for_sympy(text: str) -> str:
  """LaTeX that latex2sympy reads as meant: exact decimals, mixed numbers, 3/4\\pi as 3/4 of \\pi, e-notation as products, degrees
  in radians."""
  text = each_group(re.sub(r"np\.([a-z]+)", r"\\\1", text), _ODD_ROOT, _real_root)
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


@functools.lru_cache(maxsize=1024)
def _parsed(text: str):
  """The sympy object that a canonical expression writes; None for what is no LaTeX. Lists ask for one expression many times."""
  from latex2sympy2_extended import NormalizationConfig, latex2sympy
  from latex2sympy2_extended.latex2sympy2 import ConversionConfig
  import sympy

  text = _CROSS.sub(_one_letter, text)
  if "\\crossing" in text:
    return None
  notation = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none", equations=False)
  reading = ConversionConfig(lowercase_symbols=False)
  try:
    read = latex2sympy(_for_sympy(text), normalization_config=notation, conversion_config=reading)
  except MemoryError:
    raise
  except Exception:
    return None
  if isinstance(read, sympy.Expr):  # math's i is a variable to latex2sympy
    read = read.subs({symbol: sympy.I for symbol in read.free_symbols if symbol.name == "i"})
  return read


def symbolic(gold: str, answer: str) -> bool:
  """Whether two canonical expressions, equations, inequalities or sets say the same. What cannot be read is no answer."""
  import math_verify  # noqa: F401  its absence is told even where only expressions are compared

  for name in ("math_verify", "latex2sympy2_extended"):
    logging.getLogger(name).setLevel(logging.CRITICAL)
  try:
    return _same(_parsed(gold), _parsed(answer))
  except (ArithmeticError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError):
    return False  # sympy on nonsense: a division by zero, a matrix in an inequality


def _same(left, right) -> bool:
  """`symbolic` of what was read; None for a side that could not be."""
  from math_verify import verify
  import sympy

  if left is None or right is None or _undefined(left) or _undefined(right):
    return False
  if isinstance(left, sympy.Expr) and isinstance(right, sympy.Expr):
    return same_value(left, right)
  left_relations, right_relations = _relations(left), _relations(right)
  if left_relations and right_relations:
    return _same_relations(left_relations, right_relations)
  if isinstance(left, sympy.Expr) or isinstance(right, sympy.Expr):
    return False
  # Its own timeouts stay off: they need the main thread, take over SIGALRM and raise past `except Exception`.
  return verify([left], [right], numeric_precision=30, allow_set_relation_comp=True, timeout_seconds=None)


def _undefined(read) -> bool:
  """Whether something is divided by zero in it, as it stands (1/0, 1/(1-1)); sympy has one infinity for all of these."""
  import sympy

  for part in sympy.preorder_traversal(read):
    if part in (sympy.zoo, sympy.nan):
      return True
    if isinstance(part, sympy.Pow) and part.exp.is_extended_negative:
      base = part.base.doit(deep=False) if isinstance(part.base, (sympy.Add, sympy.Mul)) else part.base
      if base == 0:
        return True
  return False


# --- expressions --------------------------------------------------------------------------------------------

def _written_out(expression):
  """Sums and products with few terms as such, limits and derivatives taken."""
  import sympy

  def terms(series):
    (variable, low, high), *rest = series.limits
    if rest or not (low.is_Integer and high.is_Integer) or high - low >= MAX_TERMS:
      return series.doit()
    operation = sympy.Add if isinstance(series, sympy.Sum) else sympy.Mul
    return operation(*(series.function.subs(variable, k) for k in range(int(low), int(high) + 1)))

  kinds = {sympy.Sum: terms, sympy.Product: terms, sympy.Limit: sympy.Basic.doit, sympy.Derivative: sympy.Basic.doit}
  if not expression.has(*kinds):
    return expression
  return expression.replace(lambda part: type(part) in kinds, lambda part: kinds[type(part)](part))


def _number(expression, point: dict, digits: int = 30):
  """(real, imaginary) of an expression at a point, mpmath numbers with `digits` right digits; None where it has no finite value.

  A part that is zero as far as its digits show is zero.
  """
  from mpmath import mp
  import sympy
  from sympy.core.evalf import evalf

  reach = max(600, 2 * digits)  # digits that cancellation may cost
  options = {"maxprec": int(reach * 3.33), "chop": False, "strict": False, "verbose": False}
  if any(value.is_Integer for value in point.values()) or point and expression.has(sympy.floor, sympy.ceiling):  # exact at jumps
    expression, point = expression.subs(point), {}
  try:
    result = evalf(expression, int(digits * 3.33) + 4, options | ({"subs": point} if point else {}))
    if result is sympy.S.ComplexInfinity or result[0] is sympy.S.ComplexInfinity:
      return None
    parts = [(part, accuracy) for part, accuracy in zip(result[:2], result[2:], strict=True)]
  except NotImplementedError:
    value = expression.subs(point).evalf(digits, maxn=reach)
    real, imaginary = value.as_real_imag()
    if not all(part.is_Float or part.is_Rational for part in (real, imaginary)):
      return None
    parts = [(part.evalf(digits)._mpf_ if part else None, 100) for part in (real, imaginary)]
  values = []
  for part, accuracy in parts:
    number = mp.make_mpf(part) if part is not None else mp.zero
    if not mp.isfinite(number):
      return None
    values.append(mp.zero if accuracy is not None and accuracy < 8 and abs(number) < mp.mpf(10) ** (-reach * 3 // 4) else number)
  return tuple(values)


def _agree(left, right, digits: int = 22) -> bool:
  from mpmath import mp

  with mp.workdps(digits + 20):
    allowed = max(abs(part) for part in (*left, *right)) * mp.mpf(10) ** -digits
    return all(abs(a - b) <= allowed for a, b in zip(left, right, strict=True))


def _hidden(gold, answer, point: dict) -> int:
  """How many digits the numbers, powers and exponential functions in the two may shift one another by: 130 for 10^{-130}."""
  from mpmath import mp
  import sympy
  from sympy.functions.elementary.hyperbolic import HyperbolicFunction

  kinds = sympy.Pow, sympy.exp, sympy.factorial, HyperbolicFunction
  digits = 0
  for part in {part for side in (gold, answer) for part in sympy.preorder_traversal(side)}:
    if part.is_Rational:
      digits += int((abs(part.p).bit_length() + part.q.bit_length()) * 0.301)
    elif isinstance(part, kinds):
      value = _number(sympy.cosh(2 * part.args[0]) if isinstance(part, HyperbolicFunction) else part, point, 15)
      with mp.workdps(20):
        size = mp.hypot(*value) if value else 0
        digits += int(abs(mp.log10(size))) if size else 0
  return digits


def _surely_agree(gold, answer, point: dict, value) -> bool:
  """Whether the two, of about `value` there, agree to so many digits that they are equal; digits before the point not counted."""
  from mpmath import mp

  with mp.workdps(20):
    before = max(0, int(mp.log10(max(abs(part) for part in value) + 1)) + 1)
  digits = SURE_DIGITS[bool(point)] + before + _hidden(gold, answer, point)
  if digits >= MAX_DIGITS:
    return False
  closer = [_number(expression, point, digits + 20) for expression in (gold, answer)]
  return None not in closer and _agree(*closer, digits=digits)


def _stepping(*expressions) -> set:
  """The variables in which an expression jumps: those under floor or ceil, and the n of (-1)^n."""
  import sympy

  variables = set()
  for expression in expressions:
    variables |= set().union(*(part.free_symbols for part in expression.atoms(sympy.floor, sympy.ceiling)))
    variables |= {variable for part in expression.atoms(sympy.Pow) if part.base.is_negative
                  for variable in part.exp.free_symbols if _is_integer(variable)}
  return variables


def _is_integer(variable) -> bool:
  """Whether a variable's name is an integer's: one of the letters i to n, with or without an index."""
  return re.fullmatch("[i-nI-N](?:_.*)?", variable.name) is not None


def _points(*expressions):
  """Points to try, of all variables of the expressions; a single empty one where there are no variables.

  Variables under floor or ceil take the numbers where those jump: integers, halves and thirds, what is written in them, and near;
  integers alone if they are named as one.
  """
  import sympy

  names = sorted(set().union(*(expression.free_symbols for expression in expressions)), key=str)
  stepping = _stepping(*expressions)
  numbers = set().union(*(expression.atoms(sympy.Rational) for expression in expressions))
  written = {part + near for number in numbers for part in (abs(number.p), number.q) for near in (-1, 0, 1)}
  integers = [sympy.Integer(k) for k in (*range(1, 31), *sorted(part for part in written if 30 < part < 10_000))]
  jumps = list(dict.fromkeys([*integers, *(sympy.Rational(k, d) for d in (1, 2, 3) for k in range(-7, 8))]))
  choices = {name: integers if _is_integer(name) else jumps for name in names if name in stepping}
  draw = random.Random(0)
  for first in range(max(map(len, choices.values()), default=len(_VALUES)) if names else 1):
    chosen = [_VALUES[(first + (first * 2 + 5) * i) % len(_VALUES)] for i in range(len(names))]
    point = {name: sympy.Rational(*chosen[i]) + sympy.Rational(i, 7) for i, name in enumerate(names)}
    for i, (name, values) in enumerate(choices.items()):
      point[name] = draw.choice(values) if i else values[first % len(values)]
    yield point


def same_value(gold, answer) -> bool:
  """Whether two sympy expressions are equal wherever the gold has a real value (a complex one, if it contains i)."""
  import sympy

  if gold == answer:
    return True
  gold, answer = _written_out(gold), _written_out(answer)
  if gold - answer == 0:
    return True
  if gold.is_Rational and answer.is_Rational or gold.has(sympy.nan, sympy.zoo) or answer.has(sympy.nan, sympy.zoo):
    return False
  if gold.has(sympy.Integral) or answer.has(sympy.Integral):
    return _same_integral(gold, answer)
  complex_gold, agreeing, constant = gold.has(sympy.I), 0, not (gold.free_symbols | answer.free_symbols)
  enough = math.inf if _stepping(gold, answer) else _ENOUGH
  for point in _points(gold, answer):
    values = _number(gold, point), _number(answer, point)
    if None in values:
      continue
    if not _agree(*values):
      if complex_gold or constant or values[0][1] == 0:
        return False
      continue
    agreeing += 1
    if agreeing == 1 and not _surely_agree(gold, answer, point, values[0]):
      return False
    if agreeing == enough:
      break
  return agreeing >= (1 if constant else _ENOUGH - 1)


def _same_integral(gold, answer) -> bool:
  """By numerical integration for definite integrals, in closed form for others."""
  if gold.free_symbols or answer.free_symbols:
    gold, answer = gold.doit(), answer.doit()
    return gold == answer or (gold - answer).simplify() == 0
  values = [_number(expression, {}, digits=15) for expression in (gold, answer)]
  return None not in values and _agree(*values, digits=12)


# --- equations and inequalities -----------------------------------------------------------------------------

def _relations(parsed) -> list[tuple]:
  """The relations that `parsed` is or joins, each as (side below - side above, kind); [] for other objects."""
  import sympy

  parts = parsed.args if type(parsed).__name__ == "And" else (parsed,)
  parts = getattr(parsed, "_unsorted_args", parts) if type(parsed).__name__ == "And" else parts
  out = []
  for part in parts:
    if not isinstance(part, sympy.core.relational.Relational) or not all(isinstance(side, sympy.Expr) for side in part.args):
      return []
    difference = part.lhs - part.rhs
    kind = {"==": "=", "!=": "!="}.get(part.rel_op, part.rel_op.lstrip("<>") + "<")
    out.append((-difference if part.rel_op.startswith(">") else difference, kind))
  return out


def _same_relations(golds: list[tuple], answers: list[tuple]) -> bool:
  """Whether the relations are the same in any order, each up to a factor: positive for inequalities, not 0 for equations."""
  left = list(answers)
  for difference, kind in golds:
    negative_too = kind in ("=", "!=")
    match = next((other for other in left if other[1] == kind and _same_up_to_factor(difference, other[0], negative_too)), None)
    if match is None:
      return False
    left.remove(match)
  return not left


def _same_up_to_factor(gold, answer, negative_too: bool) -> bool:
  """Whether gold is a constant times answer, and neither is 0 everywhere: an identity says nothing, and is right for nobody."""
  if gold.free_symbols != answer.free_symbols or not gold.free_symbols:
    return False
  gold, answer = _written_out(gold), _written_out(answer)
  ratios, enough = [], math.inf if _stepping(gold, answer) else _ENOUGH
  for point in _points(gold, answer):
    values = _number(gold, point), _number(answer, point)
    if None in values or any(value[1] != 0 for value in values):
      continue
    if values[0][0] == 0 or values[1][0] == 0:
      if values[0][0] == values[1][0] and enough > _ENOUGH:
        continue  # a solution of both among the integers
      return False
    ratios.append((values[0][0] / values[1][0], 0))
    if not _agree(ratios[0], ratios[-1]):
      return False
    if len(ratios) == enough:
      break
  return len(ratios) >= _ENOUGH - 1 and (negative_too or ratios[0][0] > 0)
