"""From an answer's text to one canonical notation, so that equal answers mostly become equal strings.

Removed are differences that carry no meaning: spacing and font commands, \\dfrac, `$`, markdown, currency signs, units (they are
handed back beside the text). Left out: any judgement of equality (grade.py).
"""

import functools
import re
from typing import NamedTuple

from arrol_jax.rewards import units
from arrol_jax.rewards.braces import braced, closes_at_end, each_group, unwrapped
from arrol_jax.rewards.characters import latex
from arrol_jax.rewards.counted import announces


class Canonical(NamedTuple):
  """An answer in one notation, the text of its unit and the name of its currency ("" where there is none)."""

  text: str
  unit: str
  currency: str


_WRAPPER = re.compile(
  r"\\(?:underline|textcolor\s*\{[^{}]*\}|color\s*\{[^{}]*\}|colorbox\s*\{[^{}]*\}|ensuremath|fbox|framebox|mathop|mathord"
  r"|mathstrut"
  r"|displaystyle|textstyle|scriptstyle|limits|smash|hphantom\s*\{[^{}]*\}|[hv]space\*?\s*\{[^{}]*\}|tag\*?\s*\{[^{}]*\}"
  r"|Large|large|LARGE|huge|Huge|normalsize|small|emph|uline|mathnormal|strut|hfill|noindent|nonumber"
  r"|notag)(?![A-Za-z])\s*")
_STRUCK_OUT = re.compile(  # \\cancel{5}, ~~5~~
  r"\\(?:[bx]?cancel|sout|st)\s*\{(?:[^{}]|\{[^{}]*\})*\}|(?<![^\s{])~~[^~\s][^~]*~~(?![^\s}.])")
_BOLD = "mathbf|boldsymbol|bm|pmb|mathit|mathsf|mathtt|bold"
_FONT = re.compile(
  r"\\(text(?:bf|it|rm|normal|sf|tt|sc|md|up)?|mbox|hbox|mathrm|operatorname\*?|" + _BOLD + r")\s*(?=\{)")
_BARE_FONT = re.compile(r"\\(?:" + _BOLD + r"|mathrm)(?![A-Za-z])\s*")  # \mathbf 5
_SWITCH = re.compile(r"\{\s*\\(?:bf|rm|it|sf|tt|bfseries|itshape|rmfamily)(?![A-Za-z])\s*")  # {\bf 57}
_PLAIN_FONT = re.compile(r"\\(?:rm|bf|it)\s*(?=\{)")
_FUNCTIONS = ("arcsin|arccos|arctan|arccot|arcsec|arccsc|arsinh|arcosh|artanh|sinh|cosh|tanh|coth|sin|cos|tan|cot|sec|csc|log|ln"
              "|lg"
              "|exp|gcd|lcm|max|min|det|deg")
_FUNCTION = re.compile(rf"(?:{_FUNCTIONS})")
_OTHER_SPELLING = re.compile(r"\\(?:cdot|times|quad)(?![A-Za-z])|\\[,;:! ]|~")


# A cross product of marked vectors, whose order counts: \vec{a}\times\mathbf{b}, \vec a\times(b+c). \mathbf{5} is a number, and
# beside a bracket \hat{p} may be one.
_VECTOR = (rf"\\(?:vec|overrightarrow|hat|widehat|bf|{_BOLD})(?![A-Za-z])\s*"
           r"(?:\{(?![0-9.,\s]*\})(?:[^{}]|\{[^{}]*\}){1,40}\}|\\?[A-Za-z]+)(?:_(?:\w|\{[^{}]{0,40}\}))?")
_SURE = rf"(?!\\(?:wide)?hat){_VECTOR}"
_CROSS = re.compile(
  rf"({_VECTOR})\s?\\times(?=\s?{_VECTOR})|({_VECTOR}\s?\)?|\))\s?\\times(?=\s?\(?\s?{_SURE})"
  rf"|({_SURE}\s?\)?)\s?\\times(?=\s?(?:\(|{_VECTOR}))")
_UNIT_QUOTIENT = re.compile(r"\\[dt]?frac\s*\{\s*([A-Za-z]+)\s*\}\s*\{\s*([A-Za-z]+(?:\^\{?[0-9]\}?)?)\s*\}")


def _font(found: re.Match, content: str) -> str:
  """\\text{content} for words and units in any font, the content itself for what is mathematics."""
  inner = each_group(content, _FONT, lambda _, text: text)
  if found[1].startswith("operatorname"):
    return f"\\{inner} " if _FUNCTION.fullmatch(inner) else f"\\text{{{inner}}}"
  if _FUNCTION.fullmatch(inner.strip()) and inner.strip() not in ("min", "sec", "deg", "max"):
    return f"\\{inner.strip()} "
  inner = _UNIT_QUOTIENT.sub(r"\1/\2", inner)
  plain = _OTHER_SPELLING.sub(" ", inner).replace("\\mu", "\u03bc").replace("\\Omega", "\u03a9").replace("\\%", "%")
  if "\\" in plain or "$" in plain or found[1] in _BOLD and not re.search("[A-Za-z]{2}", plain):
    return inner.replace("$", " ")
  return f"\\text{{{plain}}}"


_THOUSANDS = re.compile(r"(?<=[0-9])\s*(?:\{,\}|\{\\,\}|\\text\{,\}|'|,\s*\\!|\\[,;:])\s*(?=[0-9]{3}(?![0-9]))")
_BASES = {word: str(base) for base, word in enumerate(
  "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split(), 2)}
_BASE = "|".join(_BASES)


def _unit_between(found: re.Match) -> str:
  """A unit between two numbers by its name: 2 hours and 30 minutes."""
  name = units.named(found[1] or found[2])
  return f"\\text{{{name}}}" if name else found[0]


# (what a text must contain, pattern, replacement): most answers contain few of these.
_NOTATION = [(trigger, re.compile(pattern), replacement) for trigger, pattern, replacement in (
  ("\\", r"\\(?:left|right|middle|[bB]igg?[lrm]?)(?![A-Za-z])\.?", ""),
  ("\\", r"(?<!\\)\\(?:[!,;:>/ ]|q?quad(?![A-Za-z])|enspace(?![A-Za-z])|thinspace(?![A-Za-z]))", " "),
  ("-}", r"(?<![\^_}\]])\{\s*-\s*\}|\\text\{\s*-\s*\}", "-"), ("~", "~", " "), ("&nbsp;", "&nbsp;", " "),
  ("\\", r"(?<!\\)\\[()\[\]]", " "), ("$", r"\\?\$", " "),  # math delimiters and currency
  ("  ", r"\s{2,}", " "),
  ("frac", r"\\(?:[dtcsx]|nice)frac(?![A-Za-z])", r"\\frac"),
  ("phantom", r"\\[hv]?phantom\s*\{[^{}]*\}", ""), ("\\", r"^\s*\\(?:rm|bf|it|sf|tt)(?![A-Za-z])\s*", ""),
  ("\\", r"\\(?:blacksquare|square|checkmark|qed|qedsymbol|Box)(?![A-Za-z])\s*\.?\s*$", ""), ("\\cr", r"\\cr(?![A-Za-z]"
    r")", r"\\\\"),
  ("\\surd", r"\\surd(?![A-Za-z])", r"\\sqrt"), ("\\sqrt", r"\\sqrt\s*([0-9]{2,})", r"\\sqrt{\1}"),
  ("\\Bbb", r"\\Bbb(?![A-Za-z])", r"\\mathbb"), ("\\big", r"\\big(cup|cap)(?![A-Za-z])", r"\\\1 "),
  ("\\mathbb", r"\\mathbb\s*([A-Z])(?![A-Za-z])", r"\\mathbb{\1}"),
  ("\\mathbb", r"(?<=\\mathbb\{R\})\s*-\s*(?=\\\{)", r"\\setminus "),
  ("\\text", r"\\text\{\s*([,;])\s*\}", r"\1 "),
  ("C", r"\{\s*\}\s*([\^_])\s*(?:\{(\w+)\}|(\w))\s*C\s*_\s*(?:\{(\w+)\}|(\w))", r"\\binom{\2\3}{\4\5}"),
  (":", r":=|\\coloneqq(?![A-Za-z])", "="),
  (":", r"^\\text\{\s*([A-Za-z ]+)(?::\s*\}|\}\s*:)(?=\s*[^\s])", r"\\text{\1}="), ("..", r"\.\s?\.\s?\.(?=\s*,)", r"\\dots "),
  ("to", r"(?<=[0-9])\s*(?:\\text\{\s*to\s*\}|(?<=\s)to(?=\s))\s*(?=[0-9])", ":"),
  ("{\\text", r"\^\s*\{\\text\{\s*(-?[0-9])\s*\}\}", r"^{\1}"),
  ("o", r"(?<=[0-9])\s*\^\s*(?:\{\s*o\s*\}|o(?![A-Za-z]))", r"^\\circ "),
  ("binom", r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
  ("\\choose", r"\{([^{}]*[^{}\\\s])\s*\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
  ("\\over", r"\{([^{}]*)\\over(?![A-Za-z])([^{}]*)\}|^([^{}]*)\\over(?![A-Za-z])([^{}]*)$", r"\\frac{\1\3}{\2\4}"),
  ("\\le", r"\\leqslant(?![A-Za-z])|\\leq(?![A-Za-z])", r"\\le "), ("<=", "<=", r"\\le "),
  ("\\ge", r"\\geqslant(?![A-Za-z])|\\geq(?![A-Za-z])", r"\\ge "), (">=", ">=", r"\\ge "),
  ("n", r"\\neq(?![A-Za-z])|\\not\s*=", r"\\ne "), ("!=", "!=", r"\\ne "),
  ("\\lt", r"\\lt(?![A-Za-z])", "<"), ("\\gt", r"\\gt(?![A-Za-z])", ">"),
  ("\\lbr", r"\\lbrack(?![A-Za-z])", "["), ("\\rbr", r"\\rbrack(?![A-Za-z])", "]"), ("\\lbr", r"\\lbrace(?![A-Za-z])", r"\\{"),
  ("\\rbr", r"\\rbrace(?![A-Za-z])", r"\\}"), ("\\colon", r"\\colon(?![A-Za-z])", ":"), (":", r"\\mathbin:|\\text\{\s*:\s*"
    r"\}", ":"),
  ("{", r"(?<=[0-9])\{([.:])\}(?=[0-9])", r"\1"), ("\\prime", r"\^\s*(?:\{\s*)?((?:\\prime(?![A-Za-z])\s*)+)\}?",
                                         lambda primes: "'" * primes[1].count("\\prime")),
  ("mod", r"\\text\{\s*\(?\s*mod\s+([0-9A-Za-z]+)\s*\)?\s*\}", r"\\pmod{\1}"),
  ("mod", r"(\()?\s*(?:\\[pb]?mod|\\text\{\s*\(?\s*mod\s*\}|(?<![A-Za-z\\])mod)(?![A-Za-z])\s*(?:\{([^{}]*)\}|([0-9A-Za-z]+))"
   r"\s*(?(1)\))", r"\\pmod{\2\3}"),
  (" ", r"(?<=[0-9])\s*(?:\\text\{\s*([A-Za-z]+),?(?:\s+and)?\s*\}|(?<=\s)([A-Za-z]{2,}),?(?:\s+and)?\s)\s*(?=[0-9])",
   _unit_between),
  ("\\%", r"\\%", "%"), ("%", r"\\text\{\s*%\s*\}", "%"), ("% of ", r"(?<=[0-9])\s*% of [a-z ]+$", "%"),
  ("%", r"%\s*\\text\{\s*of [a-zA-Z ]+\}$", "%"),
  ("cent", r"\\text\{\s*(?:per\s?cents?|percentage)(?:\s+points?)?\s*\}"
   r"|\b(?:per\s?cents?|percentage)(?:\s+points?)?(?![A-Za-z ])", "%"),
  ("p", r"\\text\{\s*(?:pct|por ciento|prozent)\s*\}|\bpct(?![A-Za-z ])", "%"),
  ("\\circ", r"\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![A-Za-z])|\\text\{\s*\^\\circ\s*\}", r"^\\circ "),
  ("degree", r"\^?\s?\\(?:text)?degree(?![A-Za-z])(?:\s?\{\s?\})?", r"^\\circ "),
  ("\\", r"(?<=[0-9])\s?\\(?:circ|deg)(?![A-Za-z])"
   r"(?=\s?(?:[CF](?![A-Za-z])|\\text\{\s?[CF]\s?\}|[,;.)}\]]|\\lor|$))", r"^\\circ "),
  ("or", r",?\s*\\text\{\s*,?\s*(?:or)\s*\}\s*|(?<![A-Za-z\\])or(?![A-Za-z])", r"\\lor "), ("\\vee", r"\\vee(?![A-Za-z]"
    r")", r"\\lor "),
  ("and", r",?\s*\\text\{\s*,?\s*and\s*\}\s*| ?(?<![A-Za-z\\])and(?![A-Za-z])", ", "),
  ("&", r",?\s*\\text\{\s*,?\s*&\s*\}\s*", ","),
  ("\\lor", r",\s*\\lor", r"\\lor"), (",", r",(?:\s*,)+", ","),
  ("\\varn", r"\\varnothing(?![A-Za-z])", r"\\emptyset "),
  ("dots", r"\\[lc]dots(?![A-Za-z])|\\dots[bcmio](?![A-Za-z])", r"\\dots "),
  ("vert", r"\\(?:lvert|rvert|vert)(?![A-Za-z])", "|"), ("\\mid", r"\\mid(?![A-Za-z])", "|"),
  ("\\bar", r"\\bar(?![A-Za-z])", r"\\overline"), ("\\back", r"\\backslash(?![A-Za-z])", r"\\setminus "),
  ("\\textsu", r"\\textsuperscript\s?(?=\{)", "^"), ("\\textsu", r"\\textsubscript\s?(?=\{)", "_"),
  ("{", r"\\(?:SI|qty)\s?\{([^{}]*)\}\s?\{([A-Za-z][A-Za-z0-9/^ .-]*)\}", r"\1\\text{ \2}"),  # \SI{57}{cm}
  ("U", r"(,[^()\[\],]*[)\]])\s?(?:\\text\{\s*U\s*\}|U)\s?(?=[(\[][^()\[\],]*,)", r"\1\\cup "),  # (1,2) U (3,4)
  ("-", r"\\((?:sin|cos|tan|cot|sec|csc)h?)\s*\^\s*(?:\{\s*-\s*1\s*\}|-1)", r"\\arc\1 "),
  ("_", rf"(?<=[0-9)])_\s?\{{\s?({_BASE})\s?\}}", lambda base: f"_{{{_BASES[base[1]]}}}"),
  ("_", rf"_\s*(?:\{{\s*)?\\text\{{\s*({_BASE})\s*\}}\s*\}}?", lambda base: f"_{{{_BASES[base[1]]}}}"),
  ("base", rf"_\s*\{{\s*(?:\\text\{{\s*)?base[\s-]*\}}?\s*({_BASE}|[0-9]+)\s*\}}?\s*\}}",
   lambda base: f"_{{{_BASES.get(base[1], base[1])}}}"),
  ("base", rf"(?<=[0-9A-F])\)?\s*(?:\\text\{{\s*)?\(?\s*(?:in\s+)?base(?:[\s-]+|(?=\s*\}}))\}}?\s*({_BASE}|[0-9]+)"
   r"\s*\)?\s*(?:\}|$)",
   lambda base: f"_{{{_BASES.get(base[1], base[1])}}}"),
  ("_", r"^\(([0-9A-F]+)\)(?=_)", r"\1"), ("_", r"_\{\(([0-9]+)\)\}", r"_{\1}"),
)]
# Mathematics as people type it: 2*pi*r, 3*sqrt(2), x**2, 2^(n+1), 2.5 x 10^-3.
_NAMES = ("infinity|alpha|beta|gamma|delta|epsilon|theta|lambda|sigma|omega|phi|psi|rho|tau|mu|pi|"
          "asin|acos|atan|sqrt|arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp")
_TYPED = re.compile(rf"(?P<kept>\\text\{{[^{{}}]*\}}|\\[A-Za-z]+)|(?<![A-Za-z\\])(?P<name>{_NAMES})(?![A-Za-z])")
_OPERATORS = [(re.compile(pattern), replacement) for pattern, replacement in (
  (r"(?<=[0-9])\s*[xX]\s*(?=10\s*\^)", r"\\times "), (r"\*\*", "^"), (r"(?<=[\w)}\]])\s*\*\s*(?=[\w(\\])", r"\\cdot "),
  (r"([\^_])\s*(-?[0-9]{2,}|-[0-9A-Za-z])", r"\1{\2}"),
  (r"\\lg(?![A-Za-z])", r"\\log_{10}"), (r"\\sqrt\s*([0-9]{2,})", r"\\sqrt{\1}"), (r"(?<![A-Za-z\\])abs\(([^()]*)\)", r"|\1|"),
)]
_LAST_BACKSLASH = re.compile(r"(?<!\\)(?:\\ )*\\$")  # of a last space
_RENAMED = {"infinity": "\\infty ", "asin": "\\arcsin ", "acos": "\\arccos ", "atan": "\\arctan "}
_LETTERS = re.compile(r"[A-Za-z*(]")
_BRACKETED = re.compile(r"(\\sqrt|\^)\s*\(")
# Spaces that matter: after a command, between numbers (1 1/2), and after a comma that else would mark
# thousands (2, 120).
_GAP = re.compile(
  r"(?P<command>\\[A-Za-z]+)\s+(?=[A-Za-z])"
  r"|(?P<digits>(?<=[0-9])\s+(?=[0-9])|(?<=[0-9],)\s+(?=[0-9]{3}(?![0-9])))|\s+")
_TIDY = [(re.compile(pattern), replacement) for pattern, replacement in (
  (r"(?:(?<![^=,;(\[{+-])|(?<=, ))[1-9][0-9]{0,2}(?: [0-9]{3})+(?![0-9 /]|\\frac)", lambda groups: groups[0].replace(" ", "")),
  (r"\\text\{([A-Za-z]|[+-]?[0-9][0-9.,/]*%?)\}", r"\1"), (r"^([+-])\{([0-9.,/]+)\}$", r"\1\2"),
  (r"\\text\{(?:infinity)\}", r"\\infty"), (r"\\text\{[.,;:]*\}", ""),
  (r"_\{\\text\{([A-Za-z]+)\}\}", r"_{\1}"), (r"\\(max|min|gcd) ?\\\{([^{}\\]*)\\\}", r"\\\1(\2)"),
  (r"^\+(?![+-])", ""), (r"([(\[,])\+(?=\\infty)", r"\1"),
  (r"^\(([A-Z])\)$", r"\1"),  # (C), the choice, is C
  (r"^\\\{\\\}$|(?i:^\\text\{(?:the)?emptyset\}$)", r"\\emptyset"), (r"\\math(?:bb|cal|frak|scr)\{([0-9.]+)\}", r"\1"),
  (r"(?<=[0-9])\{(\\frac\{[^{}]*\}\{[^{}]*\})\}", r"\1"),
  (r"^\]([^\[\]]*[,;][^\[\]]*)\[$", r"(\1)"), (r"^\]([^\[\]]*[,;][^\[\]]*)\]$", r"(\1]"), (r"^\[([^\[\]]*[,;][^\[\]]*)\["
    r"$", r"[\1)"),
  (r"\\mathbb\{R\}(?:\^\{?\+\}?|_\{?>0\}?|_\{?\+\}?)$", r"(0,\\infty)"), (r"\\mathbb\{R\}_\{\\ge ?0\}$", r"[0,\\infty)"),
  (r"\\mathbb\{R\}(?:\^\{?-\}?|_\{?<0\}?)$", r"(-\\infty,0)"),
  (r"(?i)(^|\\in ?)(?:\\mathbb\{?R\}?|\\text\{(?:the)?(?:setof)?all(?:real)?numbers\}|\\text\{(?:all)?(?:the)?real(?:number)?s\}"
   r"|\\text\{allreal(?:values|x)?\})$", r"\1(-\\infty,\\infty)"),
)]
_MARKDOWN = re.compile(r"^(\*{1,3}|_{1,3}|`{1,3}|\"|'|==)(?![*_`\s\"'])([^_]*[^\s*_`\\\"'])\1$", re.DOTALL)
# Environments: matrices get one name, rows of equations become a list.
_ENVIRONMENTS = [(re.compile(pattern), replacement) for pattern, replacement in (
  (r"\\\\\s*\[[^\[\]]*\]", r"\\\\"), (r"\\hline(?![A-Za-z])", ""),
  (r"\\(begin|end)\{([pbBvV]?)smallmatrix\*?\}", r"\\\1{\2matrix}"),
  (r"\\(begin|end)\{[dr]cases\}", r"\\\1{cases}"), (r"\\begin\{([pbB]?)matrix\*\}(?:\s*\[[a-z]\])?", r"\\begin{\1matrix}"),
  (r"\\end\{([pbB]?)matrix\*\}", r"\\end{\1matrix}"),
  (r"\\begin\{array\}\s*(?:\[[a-z]\])?\{[^{}]*\}", r"\\begin{matrix}"), (r"\\end\{array\}", r"\\end{matrix}"),
  (r"(?:\\\\\s*)+(?=\\end\{)", ""), (r"(?:\\\\|\\newline(?![A-Za-z]))\s*$", ""),
)]
_ROWS = re.compile(r"^\\begin\{(cases|aligned|align\*?|gathered|gather\*?|split|matrix|equation\*?)\}(.*)\\end\{\1\}$", re.DOTALL)
# What only announces an answer, in \text or not.
_ANNOUNCED = re.compile(r"(?i)^\s*(\\text\{)?\s*(?:so|thus|hence|therefore)?,?\s*(?:the\s+|our\s+)?(?:final\s+|correct\s+)?"
                        r"(?:answer|result)\s+is\b:?\s*(\})?\s*(?=[^\s}])")
_NAMING = re.compile(r"(?:\\text\{([^{}]*)\}(?:_\{[^{}]*\}|_\w|\([^()]*\)|\s*[A-Z]{1,4}(?![A-Za-z]))?"
                     r"|(?<![\\A-Za-z])([A-Za-z]{2,}+(?:\s+[A-Za-z]+)*+))\s*(?:=|\\in(?![A-Za-z]))")
_TEX_MATRIX = re.compile(r"\\([pbB]?matrix)\s?(?=\{)")  # \pmatrix{1&2\cr3&4}
_RELATED = re.compile(r"=|[<>]|\\[lgn]e(?![A-Za-z])")
_SYSTEM = re.compile(r"^\\\{(?=\\begin\{matrix\})")


def _named(found: re.Match) -> str:
  """A name in words as it is; \\text{not the answer}=5 as the inequality that it is."""
  words = found[1] or found[2] or ""
  return found[0] if announces(words) else f"\\text{{{words}}}\\ne "


def _rows(text: str) -> str:
  """A system of equations in an environment as a list; pieces of a function and matrices as they are, in one spelling."""
  text = each_group(text, _TEX_MATRIX, lambda matrix, rows: f"\\begin{{{matrix[1]}}}{rows}\\end{{{matrix[1]}}}")
  if "\\begin" not in text:
    lines = [line.strip().rstrip(",;. ") for line in re.split(r"\\\\(?:\s*\[[^\[\]]*\])?", text)]
    return ",".join(line for line in lines if line).replace("\\&", ",").replace("&", ",") if len(lines) > 1 else (
      text.replace("\\&", ",").replace("&", ","))
  for pattern, replacement in _ENVIRONMENTS:
    text = pattern.sub(replacement, text)
  text = re.sub(r"^[(\[]\s*(\\begin\{matrix\}.*\\end\{matrix\})\s*[)\]]$", r"\1", text.strip(), flags=re.DOTALL)
  system = _SYSTEM.search(text) is not None
  rows = _ROWS.match(text[2:] if system else text)
  if rows is None:
    return text
  lines = [line.strip().rstrip(",;. ") for line in rows[2].split("\\\\")]
  lines = [re.sub(r"&\s*(?==|<|>|\\le|\\ge)|(?<==)\s*&", "", line) for line in lines if line]
  if system and any("&" in line for line in lines):
    return "\\begin{pieces}" + "\\\\".join(lines) + "\\end{pieces}"
  equations = lines and all(map(_RELATED.search, lines))
  if rows[1] == "matrix" and not (system or equations) or any("&" in line for line in lines):
    return text.replace("{cases}", "{pieces}")
  return ",".join(lines)


def _typed(text: str) -> str:
  """Mathematics that is typed like a program's, as LaTeX."""
  if not _LETTERS.search(text):
    return _OPERATORS[3][0].sub(_OPERATORS[3][1], text) if "^" in text or "_" in text else text
  text = _TYPED.sub(lambda found: found["kept"] or (
    _RENAMED.get(found["name"]) or f"\\{found['name']} "), text)
  for pattern, replacement in _OPERATORS:
    text = pattern.sub(replacement, text)
  position = 0
  while (found := _BRACKETED.search(text, position)) is not None:  # 2^(n+1), \sqrt(2)
    opening, depth, close = found.end() - 1, 0, -1
    for i in range(opening, len(text)):
      depth += (text[i] == "(") - (text[i] == ")")
      if depth == 0:
        close = i
        break
    position = found.end()
    if close > 0:
      text = f"{text[:opening]}{{{text[opening + 1:close]}}}{text[close + 1:]}"
  return text


def _unmarked(text: str) -> str:
  """`text` less markdown, quotes and a box around the whole of it."""
  for _ in range(3):
    text = text.strip().rstrip(".").strip() if text.strip().endswith(("*.", "`.", "$.")) else text.strip()
    mark = _MARKDOWN.match(text)
    if mark:
      text = mark[2]
    elif text.startswith("\\boxed{") and text.endswith("}") and closes_at_end(text[6:]):
      text = text[7:-1]
    elif text[:1] == "$" and text[-1:] == "$" and "$" not in text[1:-1].strip("$"):
      text = text.strip("$")
  return text


@functools.lru_cache(maxsize=4096)
def canonical(text: str) -> Canonical:
  """`text` in one notation, less its unit, and that unit. For texts of bounded length: grade.py caps it before and after.

  The same mathematics, fewer spellings: `$`, `\\(`, a currency sign, \\left, fonts, colors, spacing, a final full stop, a
  leading +, what is struck out and units are dropped; \\dfrac, \\frac12, \\sqrt2, x^2, 10{,}080, ^{\\circ}, \\%, ½, sqrt(2),
  environments get one spelling each. The unit is as `units.measure` reads it.
  """
  text, currency = units.split_currency(_unmarked(_LAST_BACKSLASH.sub("", latex(" ".join(text.split())))))
  text = _THOUSANDS.sub("", _STRUCK_OUT.sub("", text))
  if "\\" in text:
    if "\\times" in text:
      text = _CROSS.sub(lambda cross: f"{cross[cross.lastindex]}\\crossing ", text)
    text = _PLAIN_FONT.sub(r"\\text", _SWITCH.sub(r"\\text{", text))
    text = each_group(unwrapped(text, _WRAPPER), _FONT, _font)
    text = _BARE_FONT.sub("", text)
  for trigger, pattern, replacement in _NOTATION:
    if trigger in text:
      text = pattern.sub(replacement, text)
  text = _ANNOUNCED.sub(lambda found: found[1] if found[1] and not found[2] else "", text) if " is" in text else text
  text = " ".join(text.split())
  text = re.sub(r"(?:\.\s*){3,}$", r"\\dots ", text.strip()).rstrip(" .")  # 1,2,3,... is not 1,2,3
  text = _typed(_rows(_unmarked(re.sub(r"\s*\\text\{[\s.,;]*\}\s*$", "", text))))
  text = _NAMING.sub(_named, text)
  text, unit = units.split_unit(text.strip())
  text = _GAP.sub(lambda gap: gap["command"] + " " if gap["command"] else " " if gap["digits"] else "", text)
  text = braced(text.strip().rstrip(".,;:"))
  if "\\pm" not in text:
    text = text.replace("\\mp", "\\pm")
  for pattern, replacement in _TIDY:
    text = pattern.sub(replacement, text)
  return Canonical(text, unit or ("degree" if text.endswith("^\\circ") else ""), currency)
