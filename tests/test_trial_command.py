"""The trial's command: which regimes and runs it takes up, what it refuses."""

import dataclasses
import subprocess
import sys

import pytest
from test_trial import CPU, VERSION, Trained, elsewhere, queue  # noqa: F401 (fixtures)

from arrol_jax.types import UserError
from experiments import trial, trial_arms, trial_queue
from experiments.trial_arms import REGIMES, Run, runs_of


def test_what_waits_for_a_choice_of_rates_is_not_run(elsewhere, monkeypatch, capsys):  # noqa: F811
  waits = dataclasses.replace(REGIMES["math_alone"], waits="math_tuning")
  monkeypatch.setitem(REGIMES, "math_alone", waits)
  failed = Run(REGIMES["math_tuning"], "plain@6e-6", 100)
  failed.folder.mkdir(parents=True)
  (failed.folder / "failed.json").write_text("{}")
  named, _ = trial.parse(["trial", "--scale=gpu", "--regime=ahead,math_alone"]), capsys.readouterr()
  with pytest.raises(UserError, match=r"--regime=math_alone: its learning rates .* plain@6e-6_seed100 \(failed\), .*"
                                      "in a call before, with --regime=math_tuning"):
    trial.to_run(named, trial.chosen(named), VERSION)
  all_of_them = trial.parse(["trial", "--scale=gpu"])
  runs = trial.to_run(all_of_them, trial.chosen(all_of_them), VERSION)
  assert runs and "math_alone" not in {run.regime.name for run in runs}
  assert "# left out: math_alone: its learning rates are chosen by math_tuning" in capsys.readouterr().out
  assert waits in trial.chosen(trial.parse(["trial", "--scale=gpu", "--table", "--regime=math_alone"]))


def test_a_regime_that_has_runs_is_gone_on_with_only_by_their_code(queue, elsewhere, capsys):  # noqa: F811
  assert queue(Trained(), [Run(REGIMES["ahead"], "plain", 1)])
  named, every = (trial.parse(["trial", "--scale=gpu", *more]) for more in (["--regime=ahead"], []))
  start = lambda values, version: trial.to_run(values, trial.chosen(values), version)
  assert len(start(named, VERSION)) == 20 and len(start(named, VERSION | {"commit": ""})) == 20  # not known
  with pytest.raises(UserError, match=r"--regime=ahead: its runs are of commit abc \(code 123\), this is code 456"):
    start(named, VERSION | {"code": "456"})
  with pytest.raises(UserError, match=r"are of commit abc \(code 123\), this is called commit def: give --commit as they"):
    start(named, VERSION | {"commit": "def"})
  regimes = {one.regime.name for one in start(every, VERSION | {"code": "456"})}
  assert "ahead" not in regimes and "math" in regimes and "# left out: ahead: its runs are" in capsys.readouterr().out
  (Run(REGIMES["ahead"], "plain", 1).folder / "run.json").write_text("[]")
  with pytest.raises(UserError, match=r"--regime=ahead: .*plain_seed1/run.json: not what this run leaves \(no object\)"):
    start(named, VERSION)


def test_a_model_of_another_trial_is_not_mixed_in(queue, elsewhere, tmp_path):  # noqa: F811
  (tmp_path / "model.gguf").write_bytes(b"weights")
  values = trial.parse(["trial", "--regime=ahead", f"--model={tmp_path}/model.gguf"])  # the scale is the regime's
  assert values.scale == "gpu" and len(trial.to_run(values, trial.chosen(values), VERSION)) == 20
  assert queue(Trained(), [Run(REGIMES["ahead"], "plain", 1)])
  with pytest.raises(UserError, match=f"model.gguf: not the file of the runs that ahead has, .* begins with {trial_arms.MODEL}"):
    trial.to_run(values, trial.chosen(values), VERSION)


def test_the_commit_is_that_of_the_code(elsewhere, tmp_path_factory, monkeypatch):  # noqa: F811
  with pytest.raises(UserError, match="give --commit"):
    trial_queue.commit_of("")
  assert trial_queue.commit_of("0123456789abcdef") == "0123456789ab"
  for short in ("27f5ba0", "HEAD", "0123456789AB"):
    with pytest.raises(UserError, match=f"--commit={short}: give 12 hex digits or more"):
      trial_queue.commit_of(short)
  git = lambda *argv: subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *argv], cwd=elsewhere, check=True,
                                     capture_output=True, text=True).stdout.strip()
  git("init", "-q")
  (elsewhere / "configs").mkdir()
  (elsewhere / "configs" / "base.py").write_text("x = 1\n")
  before = trial_queue.code_hash()
  git("add", ".")
  git("commit", "-qm", "one")
  first = git("rev-parse", "HEAD")[:12]
  (elsewhere / "README.md").write_text("other\n")
  git("add", ".")
  git("commit", "-qm", "two")
  assert trial_queue.commit_of("") == first
  (elsewhere / "configs" / "base.py").write_text("x = 2\n")
  with pytest.raises(UserError, match="not committed: configs/base.py"):
    trial_queue.commit_of("")
  assert trial_queue.code_hash() != before
  inner = elsewhere / "copy"  # within another repository
  (inner / "configs").mkdir(parents=True)
  (inner / "configs" / "base.py").write_text("x = 1\n")
  monkeypatch.setattr(trial_queue, "ROOT", inner)
  with pytest.raises(UserError, match="this folder is no git repository of its own: give --commit"):
    trial_queue.commit_of("")
  part = tmp_path_factory.mktemp("part")
  subprocess.run(["git", "clone", "-q", "--depth=1", f"file://{elsewhere}", part], check=True)
  monkeypatch.setattr(trial_queue, "ROOT", part)
  with pytest.raises(UserError, match="a shallow clone"):
    trial_queue.commit_of("")


def test_dry_lists_the_commands_and_runs_none_of_them(monkeypatch, capsys, elsewhere):  # noqa: F811
  monkeypatch.setattr(sys, "argv", ["trial.py", "--run", "--dry", "--arms=plain8"])
  monkeypatch.setattr(trial_queue, "start", None)
  trial.main()
  assert capsys.readouterr().out.count("\npython -m arrol_jax.train ") == len([r for r in runs_of(CPU) if r.arm == "plain8"])


@pytest.mark.parametrize("argv, words", [
  (["--regime=gsm8k", "--scale=cpu", "--run"], "scale cpu has arithmetic; it is one of --scale=gpu"),
  (["--regime=gsm8k", "--run"], "needs --model="), (["--worker=0", "--run"], "--worker is what --devices gives"),
  (["--arms=none", "--run"], "no arm of arithmetic"),
  (["--scale=gpu", "--run"], "needs --model="), ([], "give --run, --table or --dry"), (["x"], "unexpected argument"),
  (["--minutes=soon"], "minutes"), (["--seeds=0", "--run"], "give a number of seeds, or the first and the last"),
  (["--seeds=5-3", "--dry"], "give a number of seeds"),
  (["--seeds=50-60", "--dry"], "no run is of these regimes, arms and seeds"),
  (["--seeds=50-60", "--table"], "no run is of these"),
  (["--arms=plain,x", "--table"], "--arms=x: no arm of arithmetic")])
def test_mistakes_end_in_one_line(argv, words, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["trial.py", *argv])
  with pytest.raises(UserError, match=words):
    trial.main()


def test_the_gpu_scale_does_not_begin_on_a_cpu(monkeypatch):
  monkeypatch.setattr(trial_queue, "commit_of", lambda given: "27f5ba0301b4")
  monkeypatch.setattr(trial_queue, "start", None)
  monkeypatch.setattr(sys, "argv", ["trial.py", "--run", "--regime=math_batch", "--model=m", "--data=d"])
  with pytest.raises(UserError, match="the gpu scale: JAX finds no GPU here"):
    trial.main()
