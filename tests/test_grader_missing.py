"""A grader where something that it needs is missing."""

from arrol_jax.rewards import Grader, pool


def test_without_math_verify_what_needs_it_is_wrong_and_that_is_told_once(tmp_path, monkeypatch, caplog):
  """Text and numbers are still graded; each worker tries to start once, not with every item."""
  (tmp_path / "math_verify.py").write_text("raise ModuleNotFoundError(\"No module named 'latex2sympy2_extended'\")")
  monkeypatch.syspath_prepend(tmp_path)
  starts, start = [], pool._Worker.start
  monkeypatch.setattr(pool._Worker, "start", lambda self: starts.append(1) or start(self))
  with Grader(1) as grader:
    grades = grader.grade_all([("\\boxed{x+1}", "1+x"), ("\\boxed{12}", "12"), ("\\boxed{y+2}", "2+y")])
    assert grader.counts["error"] == 2
  assert [g.reason for g in grades] == ["error", "correct", "error"] and len(starts) == 1
  assert sum("no reward worker" in r.message for r in caplog.records) == 1
