"""Evaluations in a run's folder: lines, scores and what is exported go by the file that is there, whatever came in between."""

import contextlib
import hashlib
import importlib.util
import json
import shutil
import sys
from unittest import mock
import zipfile

from helpers_train import arguments, assert_refused, command, in_process, read, run
import pytest

from arrol_jax import assemble, assemble_state, doctor, evaluate
from arrol_jax.rewards.worker import source_digest
from arrol_jax.running import evaluated, hosts, json_files
from arrol_jax.running.checkpoint import Checkpoints
from arrol_jax.running.lines import READ_AGAIN
from arrol_jax.running.workdir import Logs
from arrol_jax.types import UserError

BEST = {"eval__before": False, "eval__every": 2, "checkpoint__every": 50, "checkpoint__keep": 9,
        "checkpoint__best": "held_out_accuracy", "checkpoint__export": False}


def saying(cut_off: str = "", **said):
  """Evaluations that find `said` by their names, such as before and 0002 (as e0002), else 0.5; the first of `cut_off` is."""
  cut = [cut_off]

  def accuracy(c, loaded, engine, prompts, grader, name, head, tables):
    if name == cut[0]:
      cut.clear()
      cut.append("")
      raise hosts.Preempted("SIGTERM")
    return {"accuracy": said.get(name.replace("eval ", "e"), 0.5), "problems": len(prompts)}

  return mock.patch.object(assemble, "accuracy", accuracy)


def scores(folder):
  reader = Checkpoints(str(folder), 9, read_only=True, best=assemble_state.scored_by(str(folder)))
  reader.close()
  return {step: reader.kept.scores[step] for step in reader.steps()}


@pytest.fixture(scope="module")
def rated_again(tmp_path_factory):
  """A run of two steps, 0.75 after the second, that goes on to four on other problems: 0.6 there, and 0.25 after the fourth."""
  folder = tmp_path_factory.mktemp("evaluated") / "run"
  with saying(e0002=0.75):
    run(folder, steps=2, **BEST)
  with saying(e0002=0.6, e0004=0.25):
    said = run(folder, steps=4, eval__subset=3, **BEST)
  return folder, said.out


def test_what_is_evaluated_in_another_way_is_scored_by_that_from_then_on(rated_again, tmp_path):
  folder, said = rated_again
  assert "(eval.subset): eval_0002 removed" in said and "step 2 has the best held_out_accuracy" in said
  assert scores(folder) == {2: 0.6, 4: 0.25}
  assert [x.get("held_out_accuracy") for x in read(folder / "metrics.jsonl")] == [None, 0.6, None, 0.25]
  with saying():
    assert json.loads(in_process(evaluate, f"--workdir={folder}", "--step=best").out)["step"] == 2
  longer = shutil.copytree(folder, tmp_path / "longer")
  with saying(e0006=0.5):
    run(longer, steps=6, eval__subset=3, **BEST)
  assert read(longer / "summary.json")["best_step"] == 2


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"test": {"accuracy": "0.59", "problems": 3}}',
                                  '{"test": {"accuracy": NaN, "problems": 3}}', '{"test": {"accuracy": true, "problems": 3}}'])
def test_a_damaged_evaluation_is_one_line_and_without_it_the_checkpoints_own_score_counts(rated_again, tmp_path, text):
  folder = shutil.copytree(rated_again[0], tmp_path / "run")
  for step in (2, 4):
    file = folder / f"eval_{step:04d}.json"
    file.write_text(text)
    said = in_process(evaluate, f"--workdir={folder}", "--step=best")
    assert_refused(said, f"{file.name}: damaged (", "put it back, or delete it")
    file.unlink()
  assert scores(folder) == {2: None, 4: 0.25}  # the second was saved with that on other problems
  (folder / "eval_0003.json").write_text(text)  # of no checkpoint
  assert scores(folder) == {2: None, 4: 0.25}


def test_what_to_do_about_a_damaged_file_is_true_of_it():
  said = lambda name: str(json_files.damaged(f"runs/a/{name}.json", "x"))
  again = "delete it, and the same command makes it again"
  assert [again in said(name) for name in ("summary", "eval_before", "eval_0002", "eval_all_0002", "config")] == [
    True, True, False, False, False]


def test_evaluations_of_steps_that_come_again_go(tmp_path):
  """A run that was killed behind its third step goes on from the second: what it found on another course is not kept."""
  settings = BEST | {"eval__every": 1, "eval__before": True, "checkpoint__best": None, "checkpoint__every": 2}
  with saying(e0001=0.1, e0002=0.2, e0003=0.3):
    run(tmp_path, steps=3, **settings)
  shutil.rmtree(tmp_path / "checkpoints" / "3")
  (tmp_path / "summary.json").unlink()
  (tmp_path / "eval_all_0009.json").write_text((tmp_path / "eval_0003.json").read_text())
  with saying(e0003=0.9):
    assert "going on after step 2" in run(tmp_path, steps=3, **settings).out
  assert [x["held_out_accuracy"] for x in read(tmp_path / "metrics.jsonl")] == [0.1, 0.2, 0.9]
  assert read(tmp_path / "eval_0003.json")["test"]["accuracy"] == 0.9
  assert evaluated.steps(str(tmp_path)) == {"eval_0001": 1, "eval_0002": 2, "eval_0003": 3}


@pytest.mark.parametrize("cut_off", ["eval 0003", "eval after"])
def test_a_run_that_a_signal_ends_rates_the_checkpoints_that_another_rates(tmp_path, cut_off):
  """By reward_ipw of the steps since the last: that of the third, the run's last, alone."""
  settings = BEST | {"eval__every": 3, "checkpoint__best": None, "checkpoint__every": 2}
  with saying(cut_off):
    assert "step 3 is saved" in run(tmp_path, steps=3, **settings).out
    run(tmp_path, steps=3, **settings)
  rewards = [x["reward_ipw"] for x in read(tmp_path / "metrics.jsonl")]
  assert scores(tmp_path) == {2: pytest.approx(sum(rewards[:2]) / 2), 3: pytest.approx(rewards[2])}


def test_a_signal_while_the_best_step_is_evaluated_names_the_step_that_the_run_goes_on_from(tmp_path):
  settings = BEST | {"eval__every": 1}
  with saying("eval after", e0001=0.9):
    assert "SIGTERM; step 2 is saved" in run(tmp_path, steps=2, **settings).out
    assert "going on after step 2" in (said := run(tmp_path, steps=2, **settings).out) and "step 1 has the best" in said


def test_an_edited_reward_function_is_another_way_to_evaluate(tmp_path, monkeypatch):
  """Killed before its first checkpoint, a run begins again; and what a checkpoint says of itself is of the old function."""
  monkeypatch.syspath_prepend(str(tmp_path))
  settings = BEST | {"eval__before": True, "reward__function": "edited_rewards.f"}
  source, folder = tmp_path / "edited_rewards.py", tmp_path / "run"
  source.write_text("def f(response, answer): return 0.0")
  with saying(ebefore=0.1, e0002=0.75):
    run(folder, steps=2, **settings)
  fresh = shutil.copytree(folder, tmp_path / "fresh", ignore=shutil.ignore_patterns("checkpoints", "*.jsonl", "summary.json"))
  source.write_text("def f(response, answer): return 1.0")
  with saying(ebefore=0.4, e0002=0.5, e0004=0.25):
    for run_folder, goes_on in ((fresh, False), (folder, True)):
      said = run(run_folder, steps=4, **settings).out
      assert "(the file of reward.function): eval_0002, eval_before removed" in said and ("going on" in said) == goes_on
      assert read(run_folder / "summary.json")["eval_before"]["test"]["accuracy"] == 0.4
      assert scores(run_folder) == {2: 0.5, 4: 0.25}
  (folder / "eval_0002.json").unlink()
  assert scores(folder) == {2: None, 4: 0.25}


def test_the_file_of_a_function_is_found_without_importing_it(tmp_path, monkeypatch):
  monkeypatch.syspath_prepend(str(tmp_path))
  (tmp_path / "package_of_mine").mkdir()
  for name in ("alone", "package_of_mine/__init__", "package_of_mine/part"):
    (tmp_path / f"{name}.py").write_text(f"raise ValueError({name!r})")
  found = [source_digest(x) for x in ("alone.f", "package_of_mine.f", "package_of_mine.part.f", "package_of_mine.part:f")]
  assert len(set(found)) == 3 and found[2] == found[3] and all(found)
  (tmp_path / "alone.py").write_text("def f(): pass")
  assert source_digest("alone.f") not in ("", found[0])
  assert [source_digest(x) for x in (None, "", "f", "not_there.f", "package_of_mine.part.f.g", "sys.exit")] == [""] * 6


def test_the_file_of_a_function_is_the_one_that_an_import_reads(tmp_path, monkeypatch):
  """In a zip file, behind a folder of its name that is no package, and where only a finder of an installed package knows."""
  with zipfile.ZipFile(tmp_path / "z.zip", "w") as z:
    z.writestr("zipped.py", "f = 1")
  for name in ("first/both", "second/both", "elsewhere"):
    (tmp_path / name).mkdir(parents=True)
  (tmp_path / "first/both/part.py").write_text("f = 2")
  (tmp_path / "second/both/__init__.py").write_text("")
  (tmp_path / "second/both/part.py").write_text("f = 3")
  (tmp_path / "elsewhere/mapped.py").write_text("f = 4")
  for entry in ("second", "first", "z.zip"):
    monkeypatch.syspath_prepend(tmp_path / entry)

  class Finder:
    find_spec = staticmethod(lambda name, path=None, target=None: name == "mapped" and importlib.util.spec_from_file_location(
      name, tmp_path / "elsewhere/mapped.py") or None)

  monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
  digest = lambda text: hashlib.sha256(text.encode()).hexdigest()[:16]
  assert [source_digest(x) for x in ("zipped.f", "both.part.f", "mapped.f")] == [digest(f"f = {i}") for i in (1, 3, 4)]


def test_a_best_checkpoint_that_is_damaged_leaves_the_next_best(tmp_path):
  with saying(e0002=0.9, e0004=0.6):
    run(tmp_path / "run", steps=4, **BEST)
  data = max((tmp_path / "run/checkpoints/2").rglob("*"), key=lambda f: f.stat().st_size)
  data.write_bytes(data.read_bytes()[:100])
  with saying(e0006=0.3):
    said = run(tmp_path / "run", steps=6, **BEST).out
  assert "checkpoint 2 is damaged (" in said and "; the next best counts" in said and "step 4 has the best" in said
  assert read(tmp_path / "run/summary.json")["best_step"] == 4


def test_a_checkpoint_whose_score_counts_no_more_is_named(tmp_path):
  """Step 2's evaluation goes as it was made in another way, and it is not the step that the run goes on from."""
  with saying(e0002=0.9, e0004=0.6):
    run(tmp_path / "run", steps=4, **BEST)
  with saying(e0004=0.5, e0006=0.3):
    said = run(tmp_path / "run", steps=6, eval__subset=3, **BEST).out
  assert "checkpoint 2 was scored in another way, so it does not count as the best" in said and "step 4 has the best" in said


def test_a_command_that_is_refused_leaves_evaluations(tmp_path):
  with saying():
    run(tmp_path / "run", steps=4, **BEST)
  (tmp_path / "run/summary.json").unlink()  # as if a signal had ended it
  assert_refused(command(*arguments(tmp_path / "run", steps=2, eval__subset=3, **BEST)), "holds step 4 and steps is 2")
  assert evaluated.steps(str(tmp_path / "run")) == {"eval_0002": 2, "eval_0004": 4}


def test_the_doctor_names_a_damaged_evaluation(tmp_path):
  with saying():
    run(tmp_path / "run", steps=2, **BEST)
  (tmp_path / "run/eval_0002.json").write_text("[]")
  assert_refused(in_process(doctor, *arguments(tmp_path / "run", steps=4, **BEST)), "eval_0002.json: damaged")


def test_a_line_forgets_the_sources_that_are_evaluated_no_more(tmp_path):
  """And only that of the step asked for, where anything was found."""
  lines = [{"step": step, "sec_total": 1.0, "held_out_accuracy": 0.5, "held_out_accuracy/a": 0.25, "held_out_accuracy/b": 0.75}
           | dict.fromkeys(READ_AGAIN, 1.0) for step in (1, 2)]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
  with contextlib.closing(Logs(str(tmp_path), 2, [])) as logs:
    logs.amend(1, {"held_out_accuracy": 1.0})
    logs.amend(2, {})
    assert read(tmp_path / "metrics.jsonl") == lines
    logs.amend(2, {"held_out_accuracy": 0.125})
    amended = {k: v for k, v in lines[1].items() if "/" not in k} | {"held_out_accuracy": 0.125}
    assert read(tmp_path / "metrics.jsonl") == [lines[0], amended]


def test_an_evaluation_may_not_be_of_nothing(tmp_path):
  (tmp_path / "eval_0001.json").write_text("{}")
  with pytest.raises(UserError, match="no results"):
    evaluated.read_results(str(tmp_path / "eval_0001.json"))
  assert_refused(command(*arguments(tmp_path / "run", checkpoint__best="nothing")), "checkpoint.best is 'nothing'")
