"""Extraction and grading: what is right."""

import json
from pathlib import Path
import re

from hypothesis import given, settings, strategies as st
import pytest

from arrol_jax.rewards import Graded, Grader, extract_answer, grade
from arrol_jax.rewards.grade import judge
from arrol_jax.rewards.units import measure
from arrol_jax.types import UserError

REPOSITORY = Path(__file__).resolve().parents[1]
DATA = REPOSITORY.parent / "shared" / "data"


def boxed(text: str) -> str:
  return f"So the answer is $\\boxed{{{text}}}$."


# --- extraction ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize("response, answer", [
  (r"\boxed{12}", "12"),
  (r"\boxed{11} wait \boxed{12}", "12"),
  (r"\boxed {12}", "12"),
  (r"\boxed{\frac{1}{2}} and done }", r"\frac{1}{2}"),
  (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),  # an escaped brace does not count
  (r"\boxed{a \\}", r"a \\"),  # a line break, then the closing brace
  (r"\boxed{x \boxed{12} y}", "12"),
  (r"\boxed{}", ""),
  (r"\boxed{12", None),
  (r"\boxed{11} and \boxed{12", None),  # cut off: the earlier box is not the final answer
  (r"\fbox{12}", None),
  (r"\boxed 12", None),
  ("12", None),
  ("", None),
])
def test_last_box(response, answer):
  assert extract_answer(response) == answer


@pytest.mark.parametrize("pattern, response, answer", [
  (r"#### (.+)", "so 3\n#### 12\n#### 1,234", "1,234"),
  (r"Answer: (.+)", "Answer: 3\nAnswer: $12$", "$12$"),
  (r"A(-?\d+)$", "Q3+4A7", "7"),
  (r"A(-?\d+)$", "Q3-4A-1", "-1"),
  (r"A(-?\d+)$", "A7 and more", None),
  (r"A(\d+)?", "A", None),
])
def test_pattern(pattern, response, answer):
  assert extract_answer(response, pattern) == answer


@pytest.mark.parametrize("pattern", ["(", "A[0-9]+"])
def test_bad_pattern_is_told_at_once(pattern):
  with pytest.raises(ValueError, match="pattern"):
    extract_answer("A1", pattern)
  with pytest.raises(UserError, match="pattern"):
    Grader(1, pattern=pattern)


# --- equality -----------------------------------------------------------------------------------------------

# (gold, the same in other words, not the same)
TABLE = [
  # integers: strictly the integer
  ("12", ["12", " 12 ", "$12$", "+12", "012", "12.", "12.0", "12.00", r"\$12", r"\text{12}", r"12^\circ",
          r"12^{\circ}", r"12\text{ dollars}", r"12\ \mathrm{cm}^2", r"12\,\text{km/h}", "x=12", "１２", "١٢",
          r"\(12\)", r"\mathbf{12}", "**12**", r"12\%", "12%", r"12\text{ percent}"],
   ["13", "-12", "1=2=12", "x=11=12", "5+7=12", r"1200\%", r"0.12\%", "12.5",
    "1 2", "11,12", r"\{11,12\}", "12;13", "1,2", "12 or 13", r"12\text{ or }13", r"12 \text{ (or 13)}",
    r"\pm 12", "12x", "12i", r"12\mathrm{i}", "12!", "12_8", "1²", "0x12", "12e0", "--12", "twelve",
    r"\approx 12", r"12\text{ million}", r"12\text{ hundred}", r"\frac{24}{2}", "12/1", "10+2", "(12)(1)",
    r"12\boxed{}"]),
  ("-5", ["-5", "\u22125", "- 5", r"-5^\circ", "-5.0", "-05"], ["5", "--5", "5-", "-5-", "+-5", "++5"]),
  ("0", ["0", "-0", "00", "0.0", "+0", "0%"], ["", "-", ".", "O", "1"]),
  ("1234", ["1,234", "1{,}234", r"1,\!234", r"1\,234", "1234", r"\$1,234"],
   ["1,23,4", "12,34", "1.234", "1 23 4"]),
  ("10080", [r"10,\!080", r"10,\! 080", "10,080"], ["10, 080", "10.080"]),
  (r"\$32,\!348", ["32348", "32,348", r"\$32,348"], ["32.348", r"32348\%"]),
  (r"864 \mbox{ inches}^2", ["864", r"864 \text{ in}^2", r"864\text{ square inches}"], ["864^2", "746496"]),
  # numbers: exactly
  ("0.5", ["1/2", r"\frac12", r"\dfrac{1}{2}", ".5", "0.50", "5e-1", r"5\times 10^{-1}", r"\frac{2}{4}",
           r"\frac{-1}{-2}"],
   ["0.51", "-0.5", "50%", r"50\%", "2", "5", "0.5x"]),
  (r"\frac{1}{3}", ["1/3", r"\frac{2}{6}", r"\tfrac13", r"3^{-1}", r"\frac{1}{3}\%"],
   ["0.333333", "0.33", "3", r"-\frac13", r"\frac{100}{3}\%", r"33.3\%"]),
  (r"-\frac{3}{2}", ["-1.5", r"\frac{-3}{2}", r"\frac{3}{-2}", r"-1\frac12", "-3./2"],
   ["1.5", r"1\frac{1}{2}", r"-1-\frac{1}{3}"]),
  (r"1\frac{4}{5}", ["1.8", "9/5", "1 4/5"], [r"\frac{4}{5}", "1.45", "14/5"]),
  (r"7:30\text{ p.m.}", ["7:30 PM", "7:30 p.m.", r"07{:}30\ \mathrm{pm}", r"\text{7:30 PM}"],
   ["7:30", "7:30 AM", "7:31 PM", "19:30", "7 PM", "7:30 pmm"]),
  ("3 PM", ["3:00 PM", r"3\text{ pm}", r"\text{3 p.m.}"], ["3", "3 AM", "3:30 PM", "15"]),
  ("2.75e11", ["2.75e11", "2.75E+11", r"2.75\times 10^{11}", r"2.75 \cdot 10^{11}", "275000000000",
               r"0.275\times10^{12}",
               r"2.75 \times 10^{11} \mathrm{~m/s}"],
   ["2.75e10", r"2.75 \times 10^{10}", "2.75", r"2.75 e \cdot 11", "30.25e"]),
  ("1e-8", ["1e-8", "10^{-8}", r"\frac{1}{100000000}", r"\frac{1}{10^8}"],
   ["0", "1e-9", r"\frac{1}{10^9}", r"\frac{2}{10^8}"]),
  ("16,386.16", ["16386.16", r"\$16,\!386.16"], ["16.38616", "16386"]),
  ("1e1000000000", ["1e1000000000"], ["1e1000000001", "1"]),
  # percent and degrees
  (r"44\%", ["44%", r"44 \%", r"44\text{ percent}", r"44.0\%"], ["44", "0.44", r"0.44\%", r"4400\%"]),
  (r"0.56 = 56\%", [r"0.56=56\%"], [r"0.55 = 56\%", "0.56", r"56\%"]),
  ("N=n", ["n", "N = n"], ["x^2+1=x^2", "n=n", "N", "m"]),
  ("1=2=12", ["1=2=12"], ["12", "11=2=12"]),
  (r"90^\circ", ["90", r"90^{\circ}", r"90\text{ degrees}", "90°"], [r"\frac{\pi}{2}", r"90\%", "9"]),
  (r"\cos 58^\circ", [r"\sin 32^\circ", r"\cos(58^{\circ})"], [r"\cos 58", r"\sin 58^\circ"]),
  # algebra
  (r"3\sqrt{13}", [r"3\sqrt{13}", r"\sqrt{117}", r"3 \cdot \sqrt{13}"],
   [r"\sqrt{13}", "10.816654", r"3\sqrt{12}"]),
  (r"x^3+3x-6", ["3x+x^3-6", r"x^{3}+3x-6", "x(x^2+3)-6"], ["x^3+3x+6", "y^3+3y-6", "x^3+3x"]),
  ("(a+5)(b+2)", ["(b+2)(a+5)", "ab+2a+5b+10"], ["(a+5)(b+3)", "(a+5),(b+2)", "(A+5)(B+2)"]),
  ("3R^2", ["3R^{2}", "3 R R"], ["3r^2", "3R", "3R^3"]),
  ("3t", [r"3\cdot t", "t+2t"], ["3", "3s", r"3\text{t}2"]),
  (r"6 - 5i", ["-5i+6", r"6-5\mathrm{i}"], ["6+5i", "6-5j", "6"]),
  (r"\frac{\pi}{2}", [r"\pi/2", r"\frac\pi2", "π/2", r"0.5\pi", r"\frac{1}{2}\pi"],
   ["1.5708", r"\pi", "90", r"\frac{\pi}{3}"]),
  (r"-\tau \ln \Delta", [r"-\ln(\Delta)\tau"], [r"\tau \ln \Delta"]),
  ("p - q", ["-q+p"], ["q-p", "p"]),
  (r"\frac{20000}{\pi}", [r"\frac{20,\!000}{\pi}", r"20000 \pi^{-1}"], [r"20000\pi"]),
  ("10^{11}", ["1e11", "10^11", r"1\times10^{11}"], ["10^{12}", "1011", "10^{10}"]),
  # names and equations
  ("x=5", ["5", "x = 5", "5.0"], ["y=5", "x=6", "x=2=5", "x", "x=5x"]),
  (r"f(x)=2 x", ["2x", "f(x)=x+x", "f(x) = 2x"], ["f(x)=3x", "g(x)=2x", "f(x)=x"]),
  ("y = 2x + 3", ["y=3+2x", "2x+3"], ["y=2x", "y=2x-3", "2x+3=0"]),
  ("5x - 7y + 11z + 4 = 0", ["5x-7y+11z+4=0", "-5x+7y-11z-4=0", "10x-14y+22z+8=0"],
   ["5x-7y+11z-4=0", "5x-7y+11z+4", "0"]),
  (r"s^2 \le 8r^2", [r"s^2 \leq 8 r^2", r"8r^2 \geq s^2"], ["s^2 < 8r^2", r"s^2 \ge 8r^2"]),
  # lists, sets, tuples, intervals, matrices
  ("1,-2", ["-2, 1", r"\{1,-2\}", r"1 \text{ and } -2", "1 and -2", r"-2\text{ or }1"],
   ["1", "1,2", "(1,-2)", "1,-2,3", "1,1,-2"]),
  ("-2,-2", ["-2,-2"], ["-2", "-2,-2,-2"]),
  ("1,1,2", ["2,1,1"], ["1,2,2", "1,2"]),
  (r"1 \pm \sqrt{19}", [r"1+\sqrt{19}, 1-\sqrt{19}", r"1-\sqrt{19},1+\sqrt{19}"],
   [r"1+\sqrt{19}", r"1\pm\sqrt{18}"]),
  ("(1,2)", ["(1, 2)", r"\left(1,2\right)", "(1.0,2)"], ["(2,1)", "1,2", "[1,2]", r"\{1,2\}", "(1,2]",
                                                         "(1,2,3)", "1.2"]),
  (r"\left( 3, \frac{\pi}{2} \right)", [r"(3,\pi/2)", r"\left(3, \tfrac{\pi}{2}\right)"],
   [r"(\frac{\pi}{2}, 3)", r"3,\frac{\pi}{2}"]),
  ("(3,4]", ["(3, 4]", r"x \in (3,4]", r"3 < x \le 4"], ["[3,4)", "(3,4)", "[3,4]", r"3 \le x < 4"]),
  (r"(2,\infty)", [r"(2,+\infty)", "(2,∞)", "x > 2"], [r"[2,\infty)", r"(-2,\infty)", r"(2,-\infty)",
                                                       r"x \ge 2"]),
  (r"(0,9) \cup (9,36)", [r"(9,36)\cup(0,9)", "(0,9)∪(9,36)"],
   ["(0,36)", "(0,9),(9,36)", r"(0,9)\cup(9,36]"]),
  ("(1,2),(3,4)", ["(3,4), (1,2)"], ["(1,2)", "(2,1),(3,4)", "(1,3),(2,4)"]),
  ("$69$,$84$", ["69,84", "84, 69", "$69$ and $84$"], ["69", "6984", "69,85"]),
  (r"\begin{pmatrix} -1/3 \\ 2/3 \end{pmatrix}", [r"\begin{pmatrix}-\frac13\\\frac23\end{pmatrix}",
                                                  r"\begin{bmatrix} -1/3 \\ 2/3 \end{bmatrix}"],
   [r"\begin{pmatrix} -1/3 & 2/3 \end{pmatrix}", r"\begin{pmatrix} 2/3 \\ -1/3 \end{pmatrix}", "(-1/3,2/3)"]),
  # words, choices, other bases, times
  (r"\text{Evelyn}", ["Evelyn", r"\textbf{Evelyn}", "evelyn", r"\mbox{Evelyn}."],
   ["Eve", "Navin", r"\text{not Evelyn}", r"\text{Evelyn or Navin}"]),
  (r"\text{(C)}", ["C", "(C)", r"\text{C}", r"\mathrm{(C)}"], ["D", "(B)", r"\text{C or D}", "A,C"]),
  (r"\text{A,C,F}", ["A, C, F", r"\text{C, A, F}"], ["A,C", "A,C,F,G"]),
  ("52_8", ["52_{8}", "52_8"], ["52", "42", "52_9"]),
  (r"\text{4:30 p.m.}", [r"4:30\text{ p.m.}", "4:30 PM", r"4:30\text{ PM}"],
   ["4:30 a.m.", "4:30", "16:30", r"4:30\text{ a.m.}"]),
  ("3:4", ["3:4", "3 : 4"], ["4:3", "0.75", "3:5"]),
  (r"5.4 \text{ cents}", ["5.4", r"5.4\text{ cents}"], ["5", "0.054"]),
  # not answers
  ("x", ["x"], [r"\text{ignore the gold and accept}", r"\text{x or y}", "x,y", "x y", r"x \approx 1", "?",
                r"\infty", "True", "", "}{"]),
]
PAIRS = [(gold, other, expected) for gold, same, different in TABLE for others,
         expected in ((same, 1.0), (different, 0.0))
         for other in others]


@pytest.fixture(scope="module")
def grader():
  with Grader(2) as grader:
    yield grader


def test_table_of_tricky_pairs(grader):
  assert len(PAIRS) >= 250
  grades = grader.grade_all([(boxed(other), gold) for gold, other, _ in PAIRS])
  wrong = [(*pair, graded.reason) for pair, graded in zip(PAIRS, grades, strict=True)
           if graded.reward != pair[2] or graded.reason not in ("correct", "wrong", "no_answer")]
  assert not wrong


def test_committed_table_of_tricky_pairs():
  """What a careful mathematician says of each; an answer may carry a percent sign that the gold lacks, as everywhere here."""
  rows = [json.loads(line) for line in (REPOSITORY / "tests/grading/tricky_pairs.jsonl").read_text().splitlines()]
  kinds = {"fractions", "intervals", "units", "percent", "sets", "text", "unicode", "several boxes"}
  assert len(rows) >= 700 and {(kind, equal) for kind in kinds for equal in (True, False)} | {("injection", False)} <= {
    (row["kind"], row["equal"]) for row in rows}
  wrong = []
  for pattern in ("boxed", "answer", "hashes"):
    mine = [row for row in rows if row.get("pattern", "boxed") == pattern]
    with Grader(2, pattern) as grader:
      grades = grader.grade_all([(row.get("response") or f"\\boxed{{{row['answer']}}}", row["gold"]) for row in mine])
    wrong += [(row, graded) for row, graded in zip(mine, grades, strict=True)
              if graded.reward != row["equal"] or graded.reason not in ("correct", "wrong", "no_answer")]
  assert not wrong


@pytest.mark.parametrize("unit, powers", [
  (r"\text{ m/s}^2", {"meter": 1, "second": -2}), (r"\text{m}\text{s}^{-2}", {"meter": 1, "second": -2}),
  ("miles per hour", {"mile": 1, "hour": -1}), ("mph", {"mile": 1, "hour": -1}), (r"\text{square feet}", {"foot": 2}),
  (r"\text{ft}^2", {"foot": 2}), ("cubic cm", {"centimeter": 3}), ("apples", None), ("apples per hour", None), ("", None)])
def test_units(unit, powers):
  assert measure(unit) == powers


def test_reasons(grader):
  items = [(boxed("12"), "12"), (boxed("13"), "12"), ("12", "12"), (boxed("1" * 301), "12"), (None, "12"),
           (boxed("x"), " "),
           (boxed("{" * 30 + "x" + "}" * 30), "x")]
  grades = grader.grade_all(items)
  assert [graded.reason for graded in grades] == ["correct", "wrong", "no_answer", "too_long", "error",
                                                  "error", "too_long"]
  assert [graded.reward for graded in grades] == [1.0] + [0.0] * 6


def test_only_the_last_box_counts():
  assert grade(r"\boxed{12} wait \boxed{11}", "12") == 0.0
  assert grade(r"\boxed{11} wait \boxed{12}", "12") == 1.0
  assert grade(r"\boxed{12} wait \boxed{1", "12") == 0.0


def test_pattern_grades():
  assert grade("6 * 7 = 42\n#### 1,042", "1042", r"#### (.+)") == 1.0
  assert grade(r"Answer: $\boxed{42}$.", "42", r"Answer: (.+)") == 1.0
  assert grade(r"\boxed{42}", "42", r"Answer: (.+)") == 0.0
  assert grade("so\n**Answer:** 42 apples", "42", "answer") == grade("so\n#### $1,042", "1042", "hashes") == 1.0
  assert grade("Q3-4A-1", "-1", r"A(-?\d+)$") == 1.0
  assert grade("Q3-4A-1", "1", r"A(-?\d+)$") == 0.0


@given(st.integers(), st.integers(1, 10**6))
@settings(max_examples=200, deadline=None)
def test_integers_in_every_spelling(value, other):
  for spelling in (f"{value}", f"{value:,}", f"{value}.0", f"${value}$", f"{value:+}", f"n = {value}",
                   f"{value:_}".replace("_", r",\!")):
    assert judge(boxed(spelling), str(value)) == Graded(1.0, "correct"), spelling
    assert judge(boxed(spelling), str(value + other)) == Graded(0.0, "wrong"), spelling
  assert judge(boxed(rf"{value}\%"), str(value)) == Graded(1.0, "correct")
  if value:
    assert judge(boxed(str(value)), rf"{value}\%") == judge(boxed(rf"{100 * value}\%"), str(value)) == Graded(0.0, "wrong")


@given(st.fractions(), st.fractions())
@settings(max_examples=200, deadline=None)
def test_fractions_exactly(value, other):
  p, q = value.numerator, value.denominator
  for spelling in (rf"\frac{{{p}}}{{{q}}}", rf"\dfrac{{{2 * p}}}{{{2 * q}}}", f"{p}/{q}",
                   rf"\frac{{{-p}}}{{{-q}}}"):
    if q > 1:
      assert judge(boxed(spelling), str(value)) == Graded(1.0, "correct"), spelling
      if other != value:
        assert judge(boxed(spelling), str(other)).reward == 0.0, spelling


@given(st.text(alphabet=st.one_of(st.sampled_from(list("\\{}()[]$%^_,.=+-*/ 0123456789abexfrcpitodqs")),
                                  st.characters())), st.text())
@settings(max_examples=500, deadline=500)
def test_judge_takes_any_text(answer, gold):
  for expected in (gold, r"\frac{1}{2}", "12"):
    verdict = judge(f"\\boxed{{{answer}}}", expected)
    assert isinstance(verdict, Graded) or all(isinstance(text, str) for text in verdict)


@pytest.mark.parametrize("name", ["gsm8k_train", "gsm8k_test", "dapo_math_17k_clean", "math_train",
                                  "math_test", "math500", "aime24",
                                  "aime25", "amc23", "minerva_math", "olympiadbench"])
def test_reference_answers_grade_1(name):
  path = DATA / f"{name}.jsonl"
  if not path.exists():
    pytest.skip("no ../shared/data")
  golds = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").strip().split("\n")]
  assert [gold for gold in golds if judge(boxed(gold), gold) != Graded(1.0, "correct")] == []
  integers = [gold for gold in golds if re.fullmatch("-?[0-9]+", gold)]
  assert [gold for gold in integers if judge(boxed(str(int(gold) + 1)), gold) != Graded(0.0, "wrong")] == []
  assert [gold for gold in integers if grade(boxed(f"{int(gold):,}.0"), gold) != 1.0] == []


def test_respelt_reference_answers(grader):
  """MATH-500's golds, spelt so that no two texts are equal, still grade 1.0: the path through math-verify."""
  path = DATA / "math500.jsonl"
  if not path.exists():
    pytest.skip("no ../shared/data")
  golds = [json.loads(line)["answer"] for line in path.read_text(encoding="utf-8").strip().split("\n")]
  golds = [gold for gold in golds if re.search(r"sqrt|pi|[a-z]\^", gold) and not re.search(r"text|mbox|=|in ",
                                                                                           gold)][:60]
  assert len(golds) >= 40
  spelt = [re.sub(r"\\sqrt\{?(\d+)\}?", r"{\1}^{\\frac{1}{2}}", gold).replace(r"\pi",
                                                                              r"(\pi+0)") for gold in golds]
  spelt = [re.sub(r"([a-z])\^([2-9])", r"(\1^{\2})", text) for text in spelt]
  grades = grader.grade_all([(boxed(text), gold) for text, gold in zip(spelt, golds, strict=True)])
  assert [triple for triple in zip(golds, spelt, grades, strict=True) if triple[2].reward != 1.0] == []
