"""Kinds of answers: what says the same as the reference answer is right, and the near miss is wrong.

The tables are tests/grading/kinds.jsonl: a line a reference answer, with answers that are right and answers that are wrong.
"""

import contextlib
import functools
import json
from pathlib import Path
import time

import pytest

from arrol_jax.rewards import Grader
from arrol_jax.rewards.grade import CORRECT, judge

ROOT = Path(__file__).resolve().parents[1]
ROWS = [json.loads(line) for line in (ROOT / "tests/grading/kinds.jsonl").read_text(encoding="utf-8").splitlines()]
CASES = ROOT.parent / "shared" / "cases" / "grading.jsonl"


@pytest.fixture(scope="module")
def graders():
  """By pattern, one each for all tests. The deadline is a long one: a busy machine is no judge of what is right."""
  with contextlib.ExitStack() as stack:
    yield functools.cache(lambda pattern: stack.enter_context(Grader(2, pattern, timeout_s=60)))


def misjudged(grader: Grader, items: list[tuple[str, str, float]]) -> list[tuple]:
  """(response, gold, wanted reward, reason) of what is graded otherwise than wanted."""
  grades = grader.grade_all([(response, gold) for response, gold, _ in items])
  return [(*item, graded.reason) for item, graded in zip(items, grades, strict=True) if graded.reward != item[2]]


@pytest.mark.parametrize("kind", sorted({row["kind"] for row in ROWS}))
def test_kind(kind, graders):
  rows = [row for row in ROWS if row["kind"] == kind]
  assert all(row["right"] or row["wrong"] for row in rows)
  for pattern in {row.get("pattern") for row in rows}:
    items = [(other if pattern else f"So $\\boxed{{{other}}}$.", row["gold"], reward)
             for row in rows if row.get("pattern") == pattern
             for reward, others in ((1.0, row["right"]), (0.0, row["wrong"])) for other in others]
    assert misjudged(graders(pattern), items) == []


def test_shared_cases_of_grading(graders):
  """At least 97 in 100 as wanted, and no wrong answer taken for right."""
  if not CASES.exists():
    pytest.skip("no ../shared/cases")
  rows = [json.loads(line) for line in CASES.read_text(encoding="utf-8").splitlines()]
  missed = []
  for pattern in {row["pattern"] for row in rows}:
    items = [(row["response"], row["answer"], float(row["want"])) for row in rows if row["pattern"] == pattern]
    missed += misjudged(graders(pattern), items)
  assert [item for item in missed if not item[2]] == []
  assert len(missed) <= 0.03 * len(rows), missed


PIECES = ["km", "km/", "a ", "$", r"\$", "5 ", r"\text{m}", r"\frac", "^",
          r"\pm", "x<", "(1,2)", "...", "'", r"\mu", "for", r"\text{for}", "&", "th", "{", "."]


@pytest.mark.parametrize("piece", PIECES)
def test_no_repetition_holds_the_caller_up(piece):
  """Answers as long as they may be, of one piece again and again: no pattern tries all ways to cut them."""
  begun = time.process_time()
  for before, after in (("", ""), ("5 ", "!"), (r"\text{", "")):
    text = before + piece * (2900 // len(piece)) + after
    judge(f"\\boxed{{{text}}}", "x+1")
    judge(f"Answer: {text}", "x+1", "answer")
    judge("Answer: " + text * 10, "x+1", "answer")
  assert time.process_time() - begun < 5


@pytest.mark.parametrize("command", [r"\frac", r"\binom", r"\frac\overline", r"\frac\sqrt", r"\frac1\overline", r"\frac\text"])
@pytest.mark.parametrize("opening, close", [("{", "}"), ("", "")])
def test_arguments_that_are_missing_hold_nobody_up(command, opening, close):
  """2,000 characters of commands in commands' arguments, of which the last ones lack, are read once."""
  depth = 18 if opening else 40
  nest = (command + opening) * depth + "1" + close * depth
  text = nest * (2000 // len(nest))
  begun = time.process_time()
  assert judge(f"\\boxed{{{text}}}", "x^2+1") != CORRECT
  assert time.process_time() - begun < 1
