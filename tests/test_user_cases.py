"""experiments/user_cases.py: a row is a line that says what was seen; one that fails is told, and the status is 1."""

from pathlib import Path
import re
import sys

import pytest

from experiments import user_cases
from experiments.user_cases_runs import Skipped

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT.parent / "shared" / "cases" / "trainer.md"
LINES = (ROOT / "experiments/results/user_cases/cases.txt").read_text().splitlines()


def status(monkeypatch, *argv):
  monkeypatch.setattr(sys, "argv", ["user_cases", *map(str, argv)])
  with pytest.raises(SystemExit) as e:
    user_cases.main()
  return e.value.code


def test_every_row_is_there():
  assert list(user_cases.ROWS) == list(range(1, 21))
  if TABLE.exists():
    rows = [int(x) for x in re.findall(r"^\| (\d+) \|", TABLE.read_text(), re.M)]
    assert rows == list(user_cases.ROWS)


def test_the_committed_lines_are_of_these_rows():
  assert [re.match(r"(?:OK|skipped) (\d+) (.*?): ", x)[1] for x in LINES[:-1]] == [str(n) for n in user_cases.ROWS]
  for line, (name, _) in zip(LINES, user_cases.ROWS.values()):
    assert f" {name}: " in line
  assert re.match(r"\d+ OK, 0 FAILED, \d skipped in \d+ s ", LINES[-1])


def test_rows_that_are_quick(monkeypatch, tmp_path, capsys):
  """Through the commands: numbers out of range, -h, make."""
  assert status(monkeypatch, "--only=13,14,15", f"--out={tmp_path}/a/cases.txt") == 0
  out = capsys.readouterr().out
  assert [x.partition(":")[0] for x in out.splitlines()[:3]] == [f"OK {n} {user_cases.ROWS[n][0]}" for n in (13, 14, 15)]
  assert (tmp_path / "a" / "cases.txt").read_text() == out


def test_a_row_that_fails_or_cannot_be_tried_is_told(monkeypatch, capsys):
  def fails(folder):
    raise AssertionError(f"{folder} is not\nright")

  def cannot(_):
    raise Skipped("no chattr here")

  monkeypatch.setattr(user_cases, "ROWS", {1: ("one", fails), 2: ("two", cannot)})
  assert status(monkeypatch, "--only=1,2") == 1
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == "FAILED 1 one: AssertionError: DIR is not right" and lines[1] == "skipped 2 two: no chattr here"
  assert lines[2].startswith("0 OK, 1 FAILED, 1 skipped")
