"""Overlaps: layout hides none, other numbers are told from the same problem, and nothing shared is nothing found."""

from pathlib import Path
import subprocess
import sys

import pytest

from arrol_jax.data.problems import Problem
from experiments.leakage import Index, overlaps, table, tokens

ROOT = Path(__file__).resolve().parents[1]


def problem(name: str, text: str, answer: str = "1") -> Problem:
  return Problem(name, text, answer, "s")


TRAIN = [problem("t0", "Find the least positive integer $n$ such that $\\dfrac{n}{7} + 3$ is a perfect square number.", "7"),
         problem("t1", "A train travels 270 miles in 3 hours. How far does it travel in 11 hours at that rate?", "990"),
         problem("t2", "求最小的正整数 $n$ 使得 $n+3$ 是完全平方数"), problem("t3", "Compute 2+2.", "4")]
INDEX = Index(TRAIN)


def found(text: str, answer: str = "1", near: float = 0.5) -> list[dict]:
  return overlaps(INDEX, [problem("e", text, answer)], near)


def test_layout_case_and_punctuation_are_nothing():
  text = "find the least positive integer n, such that\n \\[\\frac n7 +3\\] is a perfect square number"
  assert tokens(TRAIN[0].problem)[:9] == ["find", "the", "least", "positive", "integer", "n", "such", "that", "\\frac"]
  (pair,) = found(text.replace("\\frac n7", "\\tfrac{n}{7}").replace("\\[", "$\\left").replace("\\]", "$"), "7.0")
  assert pair == {"eval": "e", "train": "t0", "exact": True, "similarity": 1.0, "same_numbers": True, "same_answer": True}
  assert found("compute $2 + 2$")[0]["exact"] and not found("compute $2 - 2$")
  assert found(TRAIN[2].problem.replace(" ", ""))[0]["train"] == "t2"


def test_near_is_jaccard_of_runs_of_five_tokens():
  (pair,) = found(TRAIN[1].problem.replace("11 hours", "12 hours"), "1080")
  words = tokens(TRAIN[1].problem)
  touched = 5  # runs that hold the number; it stands more than five tokens from either end
  shared, runs = len(words) - 4 - touched, len(words) - 4
  assert pair["similarity"] == round(shared / (2 * runs - shared), 3)
  assert (pair["exact"], pair["same_numbers"], pair["same_answer"]) == (False, False, False)
  assert not found(TRAIN[1].problem.replace("11 hours", "12 hours"), near=pair["similarity"] + 0.01)
  assert not found("Nothing of this is anywhere to be seen in the other file at all.", near=0.0001)


def test_table_counts_each_evaluation_problem_once():
  pairs = overlaps(INDEX, [TRAIN[3], TRAIN[1], problem("e", TRAIN[1].problem.replace("11", "12"))], 0.5)
  last = table([{"train": "a", "train_problems": 4, "eval": "b", "eval_problems": 3, "pairs": pairs}]).splitlines()[-1]
  assert last == "| a | 4 | b | 3 | 2 | 1 | 0 | 0 |"


@pytest.mark.parametrize("arguments, words", [
  (["experiments.leakage", "--train={folder}/a.jsonl", "--eval=amc23", "--out={folder}/out"], "data.folder"),
  (["experiments.grader_soak", "--data={folder}", "--out={folder}/out"], "a.jsonl, line 1: not JSON"),
  (["experiments.grader_soak", "--data={folder}/none", "--out={folder}/out"], "no .jsonl files"),
])
def test_mistakes_end_in_one_line(tmp_path, arguments, words):
  (tmp_path / "a.jsonl").write_text("{]\n")
  done = subprocess.run([sys.executable, "-m", *(a.format(folder=tmp_path) for a in arguments)], capture_output=True, text=True,
                        cwd=ROOT)
  assert done.returncode == 2 and done.stderr.startswith("error: ") and words in done.stderr and done.stderr.count("\n") == 1
