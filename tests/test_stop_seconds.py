"""Runs that end after so many seconds of steps (stop_seconds), evaluated on the way (eval.at_seconds, eval.sampled)."""

import json
import math

from helpers_train import arguments, assert_refused, command, read, run, timeless
import numpy as np
import pytest

from arrol_jax import assemble, assemble_state, config, step
from arrol_jax.running import hosts
from arrol_jax.running.checkpoint import Checkpoints
from arrol_jax.running.workdir import finished, seconds_of

TIMED = {"steps": 1000, "stop_seconds": 3.5, "eval__at_seconds": "(1.5,)", "eval__sampled": 2, "eval__before": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """Every step takes one second: `whole` runs for 3.5, `parts` for 0.5 first, `longer` for 3.5 and then for 4.5."""
  patch = pytest.MonkeyPatch()
  patch.setattr(step.Clock, "total", lambda self: 1.0)
  patch.setattr(hosts.Compiling, "_note", lambda *a, **k: None)
  folder = tmp_path_factory.mktemp("timed")
  said = {"whole": run(folder / "whole", **TIMED).out, "first": run(folder / "parts", **TIMED | {"stop_seconds": 0.5}).out}
  run(folder / "parts", **TIMED)
  said["again"] = run(folder / "whole", **TIMED).out
  yield folder, said
  patch.undo()


def test_the_step_that_fills_the_seconds_is_the_last(folder):
  folder, said = folder
  lines, summary = read(folder / "whole" / "metrics.jsonl"), read(folder / "whole" / "summary.json")
  assert [x["sec_total"] for x in lines] == [1.0, 2.0, 3.0, 4.0]
  assert summary["steps"] == 4 and "4 steps done" in said["whole"]
  assert "finished (4 steps)" in said["again"] and "1 steps done" in said["first"]


def test_all_problems_are_evaluated_at_the_first_step_past_a_time(folder):
  whole = folder[0] / "whole"
  assert sorted(p.name for p in whole.glob("eval_*")) == ["eval_after.json", "eval_all_0002.json"]
  result = read(whole / "eval_all_0002.json")["test"]
  assert (result["problems"], result["samples"]) == (4, 1)
  assert (result["sampled"]["problems"], result["sampled"]["samples"]) == (4, 2)
  assert [x.get("held_out_accuracy") for x in read(whole / "metrics.jsonl")] == [None, result["accuracy"], None, None]
  assert read(whole / "summary.json")["eval_after"]["test"]["sampled"]["samples"] == 2


def test_a_run_in_parts_is_the_same(folder):
  whole, parts = (folder[0] / name for name in ("whole", "parts"))
  assert timeless(read(whole / "metrics.jsonl")) == timeless(read(parts / "metrics.jsonl"))
  assert read(whole / "eval_all_0002.json") == read(parts / "eval_all_0002.json")


def test_an_evaluation_that_was_cut_off_is_made_when_the_run_goes_on(folder):
  """As if stopped in the middle of the one after the second step: its line is there, its file is not."""
  parts = folder[0] / "cut"
  run(parts, **TIMED | {"stop_seconds": 1.5})
  there = read(parts / "eval_all_0002.json")
  (parts / "eval_all_0002.json").unlink()
  lines = read(parts / "metrics.jsonl")
  assert lines[1].pop("held_out_accuracy") == there["test"]["accuracy"]
  (parts / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
  run(parts, **TIMED)
  assert timeless(read(parts / "metrics.jsonl")) == timeless(read(folder[0] / "whole" / "metrics.jsonl"))
  assert read(parts / "eval_all_0002.json") == there == read(folder[0] / "whole" / "eval_all_0002.json")


def test_a_step_with_both_evaluations_is_scored_by_the_one_that_others_have(folder):
  """The second step and, where the run ends, the last: all problems too, and the line says these."""
  both = folder[0] / "both"
  run(both, **TIMED | {"eval__every": 1, "eval__subset": 2, "eval__at_seconds": "(1.5,3.5)", "checkpoint__keep": 9,
                       "checkpoint__every": 9, "checkpoint__best": "held_out_accuracy"})
  result = lambda name: read(both / f"{name}.json")["test"]
  assert [result(f"eval_000{step}")["problems"] for step in (1, 2, 3, 4)] == [2] * 4
  assert [result(f"eval_all_000{step}")["problems"] for step in (2, 4)] == [4] * 2
  scores = Checkpoints(str(both), 9, read_only=True, best=assemble_state.scored_by(both)).kept.scores
  assert scores == {step: result(f"eval_000{step}")["accuracy"] for step in (1, 2, 3, 4)}
  said = [x["held_out_accuracy"] for x in read(both / "metrics.jsonl")]
  assert said == [result(name)["accuracy"] for name in ("eval_0001", "eval_all_0002", "eval_0003", "eval_all_0004")]


def test_the_learning_rate_falls_by_seconds(folder):
  """Linearly to 0 at the last; a run in parts has the same, and may not then be given more seconds."""
  linear = TIMED | {"optim__schedule": "linear", "optim__lr": 0.01, "optim__warmup": 2, "eval__at_seconds": "()"}
  run(folder[0] / "linear", **linear)
  lines = read(folder[0] / "linear" / "metrics.jsonl")
  np.testing.assert_allclose([x["lr"] for x in lines], [0.005, 0.01 * 2.5 / 3.5, 0.01 * 1.5 / 3.5, 0.01 * 0.5 / 3.5], rtol=1e-6)
  assert_refused(command(*arguments(folder[0] / "linear", **linear | {"stop_seconds": 9.0})), "stop_seconds")
  whole = read(folder[0] / "whole" / "metrics.jsonl")
  assert lines[0]["reward"] == whole[0]["reward"] and lines[-1]["entropy"] != whole[-1]["entropy"]


@pytest.mark.parametrize(("name", "left"), [("constant", [1.0] * 4), ("linear", [1.0, 0.6, 0.5, 0.0]),
                                            ("cosine", [1.0, 0.5 + 0.5 * math.cos(0.4 * math.pi), 0.5, 0.0])])
def test_what_is_left_of_the_rate(name, left):
  """By seconds, or by steps after the warm-up where these are further; all of it where nothing ends by seconds."""
  c = config.parse(["train", "--config=configs/quickstart.py", "--config.steps=12", "--config.optim.warmup=2",
                    f"--config.optim.schedule={name}"])[0]
  assert assemble.decay(c, 8, 40.0) == 1.0
  c.stop_seconds = 100.0
  assert [assemble.decay(c, *x) for x in ((0, 0.0), (4, 40.0), (7, 40.0), (3, 130.0))] == pytest.approx(left)


def test_seconds_and_ends_by_hand(tmp_path):
  assert seconds_of([]) == 0.0 and seconds_of([{"sec_step": 2.0}, {"sec_step": 3.0}]) == 5.0
  assert seconds_of([{"sec_step": 2.0, "sec_total": 1.5}, {"sec_step": 3.0, "sec_total": 4.5}]) == 4.5
  assert finished(str(tmp_path), 5, None) == 0
  (tmp_path / "metrics.jsonl").write_text('{"step": 4, "sec_total": 9.5}\n')
  assert finished(str(tmp_path), 4, 9.0) == 0  # its summary is not there yet
  (tmp_path / "summary.json").write_text('{"steps": 4}')
  ends = [finished(str(tmp_path), *x) for x in ((4, None), (5, None), (5, 9.0), (5, 10.0))]
  assert ends == [4, 0, 4, 0]


@pytest.mark.parametrize("settings, words", [
  ({"stop_seconds": 0.0}, ("stop_seconds is 0", "above 0")),
  ({"eval__at_seconds": "(0.0,)"}, ("eval.at_seconds", "above 0")),
  ({"eval__at_seconds": "(5.0,)", "data__eval": ""}, ("eval.at_seconds", "data.eval is empty"))])
def test_mistakes_are_told_in_one_line(tmp_path, settings, words):
  assert_refused(command(*arguments(tmp_path / "run", **settings)), *words)
