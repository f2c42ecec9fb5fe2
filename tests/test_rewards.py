"""Extraction, grading and the worker pool: what is right, and that nothing hangs, raises or is lost."""

import json
import os
from pathlib import Path
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time

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
   ["1,23,4", "12,34", "1.234", "1 234"]),
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


# --- hostile input, time, threads ---------------------------------------------------------------------------

HOSTILE = ["9**9**9**9", "9^{9^{9^{9}}}", "9!!!!!!!!", "(((((((9!)!)!)!)!)!)!", "{" * 500 + "1" + "}" * 500,
           "+".join(["x^2"] * 2000),
           "x" * 100_000, "9" * 100_000, "1e999999999", "2.5e9999999999", r"10^{999999999}",
           r"\frac{1}{1e-999999999}", r"\sum_{n=1}^{10^{9}} \frac{1}{n!}",
           "(" * 140 + "x" + ")" * 140, "1/0", r"\int_0^1 e^{e^{e^{x^9}}} dx", "\x00\ud800", "\\", "^",
           r"\input{/etc/passwd}"]


def test_hostile_answers_cost_a_deadline_at_most():
  items = [(boxed(text), gold) for text in HOSTILE for gold in ("12", r"\sqrt{2}")] + [(boxed("2^{1/2}"),
                                                                                        r"\sqrt{2}")]
  with Grader(2, timeout_s=1.0, memory_mb=512) as grader:
    start = time.monotonic()
    grades = grader.grade_all(items)
    assert time.monotonic() - start < 1.0 * len(HOSTILE) + 10
    assert [graded.reward for graded in grades] == [0.0] * (2 * len(HOSTILE)) + [1.0]
    assert grades[2 * HOSTILE.index("x" * 100_000)].reason == "too_long"
    assert grader.counts.total() == len(items)


def test_settling_inline_is_fast_and_starts_nothing():
  with Grader(2) as grader:
    start = time.monotonic()
    pending = grader.grade_async([(boxed("9" * 100_000), "12"), ("\\boxed{" * 20_000, "12"),
                                  ("\\" * 100_000, "12"),
                                  ("\\boxed" + " " * 100_000, "12"), (boxed("1e999999999"), "12"),
                                  (boxed(r"\frac12"), "0.5"),
                                  *[(boxed(f"{i}"), f"{i}") for i in range(1000)]])
    assert pending.done()
    assert time.monotonic() - start < 1.0
    assert sum(graded.reward for graded in pending.result()) == 1001
    assert grader._shared.workers == []


def test_grade_from_another_thread_leaves_timers_and_signals_alone():
  handler = signal.signal(signal.SIGALRM, lambda *_: None)
  signal.setitimer(signal.ITIMER_REAL, 1000)
  try:
    results = []
    threads = [threading.Thread(target=lambda: results.append(grade(boxed("1+x"), "x+1"))) for _ in range(4)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert results == [1.0] * 4
    assert grade(boxed("2+x"), "x+1") == 0.0
    assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, handler)


@pytest.mark.parametrize("response, answer", [(None, "12"), (b"12", "12"), (12, "12"), (boxed("x+1"), None),
                                              ("", "")])
def test_grade_never_raises(response, answer):
  assert grade(response, answer) == 0.0


# --- the pool -----------------------------------------------------------------------------------------------

REWARDS = """
  import os, signal, sys, time
  from arrol_jax.rewards import grade

  def behave(response, answer, pattern):
    kind, _, rest = response.partition(" ")
    if kind == "sleep": time.sleep(float(rest))
    if kind == "die": os.kill(os.getpid(), signal.SIGKILL)
    if kind == "die_once" and not os.path.exists(rest):
      open(rest, "w").close()
      os.kill(os.getpid(), signal.SIGKILL)
    if kind == "memory": bytearray(4 * 2**30)
    if kind == "exit": sys.exit(0)
    if kind == "raise": raise BaseException
    if kind == "number": return float(rest)
    if kind == "grade": return grade(rest, answer)
    if kind == "pattern": return pattern == rest
    if kind == "ready": return "math_verify" in sys.modules
    if kind == "modules": return not {"jax", "jaxlib", "flax", "arrol_jax.types"} & set(sys.modules)
    print("not for the run's output")
    return 1
"""


@pytest.fixture
def rewards_module(tmp_path, monkeypatch):
  (tmp_path / "some_rewards.py").write_text(textwrap.dedent(REWARDS))
  monkeypatch.syspath_prepend(str(tmp_path))
  return "some_rewards.behave"


def test_reward_function_under_limits(rewards_module, tmp_path, capfd):
  kinds = [("fine", "correct"), ("sleep 60", "timeout"), ("die", "crashed"), ("memory", "crashed"),
           (f"die_once {tmp_path}/died", "correct"), ("exit", "error"), ("raise", "error"),
           ("number nan", "error"), ("number 2", "error"), ("number 0.5", "wrong"), ("number 0", "wrong"),
           ("modules", "correct"), ("pattern hashes", "correct"), ("fine", "correct")]
  with Grader(1, "hashes", timeout_s=2.0, memory_mb=1024, reward_fn=rewards_module) as grader:
    grades = grader.grade_all([(kind, "x+1") for kind, _ in kinds])
    assert [(kind, graded.reason) for (kind, _), graded in zip(kinds, grades, strict=True)] == kinds
    assert [graded.reward for graded in grades] == [
      0.5 if kind == "number 0.5" else float(reason == "correct") for kind, reason in kinds]
    assert grader.counts == {reason: [r for _, r in kinds].count(reason) for _, reason in kinds}
  out, err = capfd.readouterr()
  assert out == "" and err.count("some_rewards.behave: SystemExit") == 1


def test_a_reward_function_may_grade(rewards_module):
  with Grader(1, reward_fn=rewards_module) as grader:
    assert grader.grade_all([("ready", "")]) == [Graded(1.0, "correct")]  # imported before the deadline runs
    grades = grader.grade_all([(rf"grade {boxed(answer)}", "x+1") for answer in ("1+x", "x")])
    assert grades == [Graded(1.0, "correct"), Graded(0.0, "wrong")]


def test_order_is_kept_while_workers_overtake_each_other(rewards_module):
  delays = [0.4, 0.0, 0.2, 0.0, 0.1, 0.0, 0.0, 0.3]
  with Grader(2, reward_fn=rewards_module) as grader:
    rewards = [i / 16 for i in range(16)]
    items = [item for delay, reward in zip(delays, rewards, strict=False) for item in ((f"sleep {delay}", ""),
                                                                         (f"number {reward}", ""))]
    pending = grader.grade_async(items)
    assert not pending.done()
    assert [graded.reward for graded in pending.result()] == [r for reward in rewards[:8] for r in (1.0,
                                                                                                    reward)]
    assert pending.done()


def test_killing_workers_loses_nothing(grader):
  items = [(boxed(f"{i}+x"), f"x+{i + i % 2}") for i in range(200)]
  pending = grader.grade_async(items)
  killed = 0
  while not pending.done() and killed < 6:
    for worker in list(grader._shared.workers):
      process = worker.process
      if process is not None:
        os.kill(process.pid, signal.SIGKILL)
        killed += 1
    time.sleep(1.5)
  assert killed
  assert [graded.reward for graded in pending.result()] == [float(i % 2 == 0) for i in range(200)]


def test_bad_reward_functions_and_numbers_are_told_at_once(rewards_module):
  for path in ("some_rewards.missing", "no_such_module.reward", "nodots"):
    with pytest.raises(UserError, match=path):
      Grader(1, reward_fn=path)
  with pytest.raises(UserError, match="workers=0"):
    Grader(0)


def test_close_ends_what_is_under_way(rewards_module):
  grader = Grader(1, timeout_s=60, reward_fn=rewards_module)
  pending = grader.grade_async([("sleep 60", "")] * 3)
  time.sleep(0.2)
  process = grader._shared.workers[0].process
  start = time.monotonic()
  grader.close()
  assert [graded.reason for graded in pending.result()] == ["error"] * 3
  assert grader.grade_all([("fine", "")]) == [Graded(0.0, "error")]
  assert time.monotonic() - start < 5
  process.wait(5)


SCRIPT = """
  import os, sys, time
  from arrol_jax.rewards import Grader, grade
  print("main ran", grade(r"\\\\boxed{1+x}", "x+1"), "jax" in sys.modules, flush=True)
  grader = Grader(1, timeout_s=0.5, reward_fn="some_rewards.behave")
  grader.grade_async([("sleep 60", "")])
  time.sleep(0.3)  # now the worker is at it, and would not see that its parent is gone
  print(grader._shared.workers[0].process.pid, flush=True)
  os._exit(0)
"""


def test_unguarded_script_and_nothing_outlives_it(rewards_module, tmp_path):
  script = tmp_path / "script.py"
  script.write_text(textwrap.dedent(SCRIPT))
  run = subprocess.run([sys.executable, str(script)], env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
                       capture_output=True,
                       text=True, timeout=60)
  lines = run.stdout.splitlines()
  assert lines[0] == "main ran 1.0 False" and len(lines) == 2, run.stderr
  deadline = time.monotonic() + 10
  while _alive(int(lines[1])):
    assert time.monotonic() < deadline, "the worker outlived its parent"
    time.sleep(0.1)


def _alive(pid: int) -> bool:
  try:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except (FileNotFoundError, ProcessLookupError):
    return False


def test_grading_in_a_forked_child():
  code = textwrap.dedent(r"""
    import os, sys
    from arrol_jax.rewards import grade
    right = lambda: grade(r"\boxed{1+x}", "x+1") == 1.0
    assert right()
    pid = os.fork()
    if pid == 0:
      os._exit(0 if right() else 1)
    sys.exit(os.waitpid(pid, 0)[1] or not right())  # the child took nothing from its parent
  """)
  environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
  run = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60)
  assert run.returncode == 0
