"""What Unicode writes in one character, as ASCII or LaTeX: full-width signs, raised digits, Greek, fractions."""

import re
import unicodedata

# Full-width ASCII (from Chinese text) and typographic signs become ASCII or LaTeX, digits of other scripts and fonts the
# digits that they are. Raised and lowered digits become exponents and indices: 12² must not read as 122.
_GREEK = dict(zip("αβγδεζηθικλμνξπρσςτυφχψωΓΔΘΛΞΠΣΦΨΩϕϑϵϱ", (
  "alpha beta gamma delta varepsilon zeta eta theta iota kappa lambda mu nu xi pi rho sigma varsigma tau upsilon varphi chi psi "
  "omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega phi vartheta epsilon varrho").split(), strict=True))
_SIGNS = {
  "\u2212": "-", "\u2010": "-", "\u2011": "-", "\u2013": "-", "\ufe63": "-", "\u3000": " ", "\u00a0": " ", "\u2009": " ",
  "\u202f": " ", "\u200b": "", "\ufeff": "", "\u2060": "", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ",
  "∗": "*", "÷": "/", "∕": "/", "\u2044": "/", "∞": r"\infty ", "±": r"\pm ", "∓": r"\mp ", "≤": r"\le ", "≥": r"\ge ",
  "⩽": r"\le ", "⩾": r"\ge ", "≠": r"\ne ", "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "∖": r"\setminus ",
  "°": r"^\circ ", "℃": r"^\circ \text{C}", "℉": r"^\circ \text{F}", "℧": "", "。": ".", "、": ",", "．": ".", "∶": ":",
  "…": r"\dots ", "⋯": r"\dots ", "′": "'", "’": "'", "″": "''", "∠": r"\angle ", "△": r"\triangle ", "≈": r"\approx ",
  "∨": r"\lor ", "∧": r"\land ", "⟨": r"\langle ", "⟩": r"\rangle ", "〈": r"\langle ", "〉": r"\rangle ", "⌊": r"\lfloor ",
  "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "∣": "|", "【": "[", "】": "]", "→": r"\to ", "∘": r"\circ ",
  "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}", "ℚ": r"\mathbb{Q}", "ℕ": r"\mathbb{N}", "ℂ": r"\mathbb{C}", "µ": r"\mu ", "“": "",
  "∑": r"\sum ", "∫": r"\int ",
  "∏": r"\prod ", "ℓ": r"\ell ", "\u2126": r"\Omega ", "ₙ": "_{n}", "ⁿ": "^{n}", "º": "^\\circ ", "”": "",
  "˚": r"^\circ ", "∀": r"\forall ", "≡": r"\equiv ",
}
_GREEK_WORD = re.compile("[α-ωΑ-Ω]*[ά-ώΆ-Ώ][α-ωΑ-Ωά-ώΆ-Ώ]+")  # words have an accent: μέτρα
_CHARACTERS = ({0xFF01 + i: 0x21 + i for i in range(94)} | {ord(letter): f"\\{name} " for letter, name in _GREEK.items()}
               | {ord(sign): latex for sign, latex in _SIGNS.items()})
_RAISED, _LOWERED = "⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "₀₁₂₃₄₅₆₇₈₉₋₊"
_LEVEL = {ord(sign): "0123456789-+"[i] for signs in (_RAISED, _LOWERED) for i, sign in enumerate(signs)}
_QUOTIENT = re.compile(rf"([{_RAISED}]+)[\u2044/∕]([{_LOWERED}]+)")
_ROOT = re.compile(r"([√∛∜])\s*(?:([0-9]+|[A-Za-z])|\(([^()]*)\)|\{([^{}]*)\}|(?=\\))")
_DEGREE = {"√": "", "∛": "[3]", "∜": "[4]"}


def _root(found: re.Match) -> str:
  content = next((group for group in found.groups()[1:] if group is not None), None)
  return f"\\sqrt{_DEGREE[found[1]]}" + ("" if content is None else f"{{{content}}}")


def latex(text: str) -> str:
  """`text` with what Unicode writes in one character written as LaTeX does; letters of other scripts stay."""
  if text.isascii():
    return text
  text = _QUOTIENT.sub(lambda q: f"\\frac{{{q[1].translate(_LEVEL)}}}{{{q[2].translate(_LEVEL)}}}", text)
  words = iter([*_GREEK_WORD.findall(text), ""])
  text = "".join(rest.translate(_CHARACTERS) + next(words) for rest in _GREEK_WORD.split(text))
  for signs, mark in ((_RAISED, "^"), (_LOWERED, "_")):
    text = re.sub(f"[{signs}]+", lambda run, mark=mark: f"{mark}{{{run[0].translate(_LEVEL)}}}", text)
  text = _ROOT.sub(_root, text)
  out = []
  for character in text:
    parts = unicodedata.normalize("NFKC", character).split("\u2044") if not character.isascii() else ()
    if len(parts) == 2 and all(parts):
      out.append(f"\\frac{{{parts[0]}}}{{{parts[1]}}}")  # ½
    elif len(parts) == 1 and parts[0].isascii() and parts[0].isalpha():
      out.append(parts[0])  # a letter in a font of its own
    elif unicodedata.decomposition(character).startswith("<small>"):
      out.append(*parts)  # ﹥
    else:
      out.append(str(unicodedata.decimal(character, character)))
  return "".join(out)
