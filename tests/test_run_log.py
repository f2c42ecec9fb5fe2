"""A run that goes on beside a log, or evaluations, that lack what it reads of them: one line, and no totals that look whole."""

import json

from helpers_train import FAST, arguments, assert_refused, command, read, run
import pytest

from arrol_jax.running import lines
from arrol_jax.types import UserError


def said(result) -> list[str]:
  return [line for line in result.err.replace("\r", "\n").splitlines() if line.startswith(("warning:", "error:"))]


def refused(result, *words):
  result.err = result.err.replace("\r", "\n").strip().splitlines()[-1]
  assert_refused(result, *words)


@pytest.mark.parametrize("text", ["", "\0" * 3000, '{"step": 1, "reward"'])
def test_steps_without_lines_are_told(copied, text):
  (copied / "metrics.jsonl").write_text(text)
  result = command(*arguments(copied, **FAST))
  assert result.status == 0 and len(said(result)) == 1
  assert said(result)[0].startswith(f"warning: {copied}/metrics.jsonl has no lines of 3 of the 3 steps done")
  summary = read(copied / "summary.json")
  assert summary["steps"] == 3 and summary["final_reward"] is None


def test_one_step_without_a_line_is_told_and_the_run_knows_how_far_it_is(copied):
  kept = (copied / "metrics.jsonl").read_text().splitlines(True)[:2]
  (copied / "metrics.jsonl").write_text("".join(kept))
  result = command(*arguments(copied, **FAST))
  assert "has no lines of 1 of the 3 steps" in said(result)[0]
  summary = read(copied / "summary.json")
  assert summary["steps"] == 3 and summary["tokens_generated"] == sum(json.loads(x)["tokens_generated"] for x in kept)
  assert "finished (3 steps)" in run(copied, **FAST).out


def test_a_whole_log_is_nothing_to_warn_of(copied):
  assert not said(command(*arguments(copied, **FAST)))


def test_what_goes_by_seconds_does_not_go_on_without_them(copied):
  setting = {"stop_seconds": 1e6}
  kept = (copied / "metrics.jsonl").read_text().splitlines(True)
  (copied / "metrics.jsonl").write_text("".join(kept[:2]))
  refused(command(*arguments(copied, **FAST | setting)), "no line of step 3", "put it back, or choose another --workdir")
  (copied / "metrics.jsonl").write_text(kept[2])  # it says the seconds of all
  assert command(*arguments(copied, **FAST | setting)).status == 0


@pytest.mark.parametrize("line", ['{"step": 1e400}', '{"step": "3"}', "[]", "\0\0\0"])
def test_a_damaged_line_that_may_be_the_last_steps_is_named(tmp_path, line):
  """And nothing is dropped with it."""
  path, text = tmp_path / "log.jsonl", f'{{"step": 1}}\n{{"step": 2}}\n{line}\n'
  path.write_text(text)
  with pytest.raises(UserError, match="log.jsonl, line 3: damaged; delete that line"):
    lines.cut_back(str(path), 3)
  assert path.read_text() == text
  lines.cut_back(str(path), 2)
  assert len(lines.read_lines(str(path))) == 2


@pytest.mark.parametrize("key, value", [
  ("reward_ipw", None), ("tokens_generated", "12"), ("tokens_trained", float("nan")), ("sec_step", []), ("sec_total", "x"),
  ("reward", "a")])
def test_a_line_without_what_is_read_again_is_named(tmp_path, key, value):
  whole = dict.fromkeys(lines.READ_AGAIN, 1.0) | {"reward": None}
  path = tmp_path / "log.jsonl"
  path.write_text("".join(json.dumps(x) + "\n" for x in ({"step": 1} | whole, {"step": 2} | whole | {key: value})))
  with pytest.raises(UserError, match=rf"line 2: damaged \(no {key}\); delete that line"):
    lines.cut_back(str(path), 2, lines.READ_AGAIN)
  lines.cut_back(str(path), 1, lines.READ_AGAIN)  # that step comes again


def test_a_log_trimmed_to_a_few_keys_is_one_line(copied):
  kept = [{k: x[k] for k in ("step", "reward")} for x in read(copied / "metrics.jsonl")]
  (copied / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in kept))
  refused(command(*arguments(copied, **FAST)), "metrics.jsonl, line 1: damaged (no reward_ipw)")


@pytest.mark.parametrize("text", ['{"test": 5}', '{"test": {"accuracy": null, "problems": 4}}', '{"test": {"accuracy": 0.5}}',
                                  '{"other": {"accuracy": 0.5, "problems": 4}}', "{}",
                                  '{"test": {"accuracy": "1", "problems": 4}}'])
def test_an_evaluation_of_another_shape_is_one_line(tmp_path, text):
  settings = {"steps": 1, "checkpoint__export": False}
  if text == "{}":  # the advice is sound
    run(tmp_path, **settings)
    (tmp_path / "summary.json").unlink()
    (tmp_path / "eval_before.json").unlink()
    run(tmp_path, **settings)
    (tmp_path / "summary.json").unlink()
  (tmp_path / "eval_before.json").write_text(text)
  refused(command(*arguments(tmp_path, **settings)), "eval_before.json: damaged (no accuracy of test)", "delete it")
