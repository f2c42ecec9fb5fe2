"""The trial's command: which regimes and runs it takes up, what it refuses."""

import dataclasses
import json
import os
import subprocess
import sys

import pytest
from test_trial import CPU, VERSION, Trained, elsewhere, queue  # noqa: F401 (fixtures)
from test_trial_page import made_up

from arrol_jax.running import hosts
from arrol_jax.types import UserError
from experiments import trial, trial_arms, trial_pieces, trial_queue
from experiments.trial_arms import REGIMES, Run, runs_of
from experiments.trial_queue import Call


def to_run(*argv, version=VERSION, model="", data=""):
  """The runs that a command takes up."""
  return trial.to_run(trial.parse(["trial", *argv]), Call(version, model, data))


def test_what_waits_for_a_choice_of_rates_is_not_run(elsewhere, monkeypatch, capsys):  # noqa: F811
  waits = dataclasses.replace(REGIMES["math_alone"], waits="math_tuning")
  monkeypatch.setitem(REGIMES, "math_alone", waits)
  failed = Run(REGIMES["math_tuning"], "plain@6e-6", 100)
  failed.folder.mkdir(parents=True)
  (failed.folder / "failed.json").write_text("{}")
  with pytest.raises(UserError, match=r"--regime=math_alone: its learning rates .* plain@6e-6_seed100 \(failed\), .*"
                                      "in a call before, with --regime=math_tuning"):
    to_run("--regime=ahead,math_alone")
  runs = to_run("--scale=gpu")
  assert runs and "math_alone" not in {run.regime.name for run in runs}
  assert "# left out: math_alone: its learning rates are chosen by math_tuning" in capsys.readouterr().out
  assert to_run("--scale=gpu", "--worker=0", "--devices=1", "--minutes=1") == runs and not capsys.readouterr().out
  worker = ("--worker=0", "--devices=1", "--minutes=1")
  assert to_run("--arms=plain", "--seeds=1", *worker) == to_run("--arms=plain", "--seeds=1") == [Run(CPU, "plain", 1)]
  assert waits in trial.chosen(trial.parse(["trial", "--table", "--regime=math_alone"]))


def test_a_regime_that_has_runs_is_gone_on_with_only_by_their_code(queue, elsewhere, capsys):  # noqa: F811
  first = Run(REGIMES["ahead"], "plain", 1)
  other, unknown, renamed = VERSION | {"code": "456"}, VERSION | {"commit": ""}, VERSION | {"commit": "def"}
  assert not queue(Trained(plain=hosts.Preempted("SIGTERM")), [first], 1.0)  # begun: it counts already
  with pytest.raises(UserError, match=r"--regime=ahead: its runs are of commit abc \(code 123\), this is code 456"):
    to_run("--regime=ahead", version=other)
  assert queue(Trained(), [first])
  assert len(to_run("--regime=ahead")) == len(to_run("--regime=ahead", version=unknown)) == 20
  with pytest.raises(UserError, match=r"--regime=ahead: its runs are of commit abc \(code 123\), this is code 456"):
    to_run("--regime=ahead", version=other)
  with pytest.raises(UserError, match=r"of commit abc \(code 123\), this is called commit def: if nothing but its name differs"):
    to_run("--regime=ahead", version=renamed)
  assert to_run("--regime=ahead", "--arms=plain", "--seeds=1", version=other) == [first]  # nothing of it is to be made
  regimes = {one.regime.name for one in to_run("--scale=gpu", version=other)}
  assert "ahead" not in regimes and "math" in regimes and "# left out: ahead: its runs are" in capsys.readouterr().out
  second = Run(REGIMES["ahead"], "plain", 2)
  assert queue(Trained(), [second], version=other)  # as a copy from elsewhere would
  assert len(to_run("--regime=ahead", version=other)) == 20  # the page says that both are not compared
  (first.folder / "run.json").write_text("[]")
  with pytest.raises(UserError, match=r"--regime=ahead: .*plain_seed1/run.json: not what this run leaves \(no object\)"):
    to_run("--regime=ahead")


def test_a_run_that_went_on_by_other_code_closes_its_regime_to_none(queue, elsewhere):  # noqa: F811
  first = Run(REGIMES["ahead"], "plain", 1)
  assert not queue(Trained(plain=hosts.Preempted("SIGTERM")), [first], 1.0) and queue(Trained(), [first], version={
    "commit": "def", "code": "456"})
  assert len(to_run("--regime=ahead")) == len(to_run("--regime=ahead", version={"commit": "def", "code": "456"})) == 20


def test_a_run_that_went_on_with_another_model_closes_its_regime_to_none(queue, elsewhere, tmp_path):  # noqa: F811
  first, model = Run(REGIMES["ahead"], "plain", 1), tmp_path / "model.gguf"
  model.write_bytes(b"weights")
  assert not queue(Trained(plain=hosts.Preempted("SIGTERM")), [first], 1.0, model=str(model))
  model.write_bytes(b"others")
  assert queue(Trained(), [first], model=str(model))
  assert "+" in json.loads((first.folder / "run.json").read_text())["inputs"]["model.path"]
  assert len(to_run("--regime=ahead", model=str(model))) == 20


def test_another_model_or_other_data_are_not_mixed_in(queue, elsewhere, tmp_path):  # noqa: F811
  mine, theirs, folder = tmp_path / "mine.gguf", tmp_path / "theirs.gguf", tmp_path / "folder"
  folder.mkdir()
  mine.write_bytes(b"weights")
  theirs.write_bytes(b"others")
  (folder / "config.json").write_text("{}")
  (tmp_path / "gsm8k_train.jsonl").write_text('{"problem": 1}\n')
  run, data = Run(REGIMES["ahead"], "plain", 1), str(tmp_path)
  assert len(to_run("--regime=ahead", model=str(theirs))) == 20  # nothing is there that it would stand beside
  assert queue(Trained(), [run], model=str(mine), data=data)
  assert len(to_run("--regime=ahead", model=str(mine), data=data)) == 20
  for model in (str(theirs), str(folder), "Qwen/Qwen3-0.6B"):
    with pytest.raises(UserError, match="--regime=ahead: its runs have model.path [0-9a-f]{12}, this call "):
      to_run("--regime=ahead", model=model, data=data)
  (folder / "inner").mkdir()
  marks = [trial_pieces.inputs(run, str(folder), "")["model.path"]]
  (folder / "inner" / "cache").write_text("x")  # no part of a model
  marks.append(trial_pieces.inputs(run, str(folder), "")["model.path"])
  (folder / "config.json").write_text("{} ")
  assert marks[0] == marks[1] != trial_pieces.inputs(run, str(folder), "")["model.path"]
  (tmp_path / "gsm8k_train.jsonl").write_text('{"problem": 2}\n')
  with pytest.raises(UserError, match="--regime=ahead: its runs have data.train [0-9a-f]{12}, this call "):
    to_run("--regime=ahead", model=str(mine), data=data)
  about = json.loads((run.folder / "run.json").read_text())
  (run.folder / "run.json").write_text(json.dumps(about | {"inputs": {}}))  # before November 29
  with pytest.raises(UserError, match=f"its runs have model.path {trial_arms.MODEL}, this call "):
    to_run("--regime=ahead", model=str(mine))


def test_data_of_which_a_part_is_asked_are_compared_before_the_part_is_written(queue, elsewhere, tmp_path):  # noqa: F811
  run, test = Run(REGIMES["math_alone"], "plain", 41), tmp_path / "math_test.jsonl"
  test.write_text("1\n2\n3\n4\n5\n")
  (elsewhere / run.thinned).parent.mkdir(parents=True)
  assert queue(Trained(), [run], data=str(tmp_path))
  take = lambda: to_run("--regime=math_alone", data=str(tmp_path))
  assert len(take()) == 29
  (elsewhere / run.thinned).unlink()  # another machine
  test.write_text("other\n2\n3\n4\n5\n")
  with pytest.raises(UserError, match="its runs have data.eval"):
    take()
  (elsewhere / run.thinned).write_text("other\n5\n")  # what wrong data left does not shut out the right ones
  test.write_text("1\n2\n3\n4\n5\n")
  assert len(take()) == 29


def test_votes_are_of_the_code_of_their_run(queue, elsewhere):  # noqa: F811
  run = Run(REGIMES["gsm8k_tables"], "plain", 71)
  assert queue(Trained(), [run], 1.0, votes=False)
  ask = lambda votes: trial.to_run(trial.parse(["trial", "--regime=gsm8k_tables", "--arms=plain", "--seeds=1"]),
                                   Call(VERSION | {"code": "456"}, votes=votes))
  assert ask(True) == [run]  # it kept no policy, so nothing is to do
  (elsewhere / run.workdir / "policy").mkdir(parents=True)
  assert ask(False) == [run]
  with pytest.raises(UserError, match="its runs are of commit abc"):
    ask(True)


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
  of = len([r for r in runs_of(CPU) if r.arm == "plain8"])
  assert capsys.readouterr().out.count("\npython -m arrol_jax.train ") == of
  made_up("plain8", 1, 0.3, version=("abc", trial_queue.code_hash()))
  trial.main()
  assert capsys.readouterr().out.count("\npython -m arrol_jax.train ") == of - 1


@pytest.mark.parametrize("argv, words", [
  (["--regime=gsm8k", "--scale=cpu", "--run"], "--regime=gsm8k: it is of scale gpu, not cpu"),
  (["--regime=gsm8k_tunned", "--run"], "--regime=gsm8k_tunned: there are gsm8k, .*gsm8k_tuned.*arithmetic"),
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


def test_the_gpu_scale_does_not_begin_on_a_cpu(elsewhere, monkeypatch, capsys):  # noqa: F811
  monkeypatch.setattr(trial_queue, "commit_of", lambda given: "27f5ba0301b4")
  monkeypatch.setattr(sys, "argv", ["trial.py", "--run", "--regime=math_batch", "--model=m", "--data=d"])
  with pytest.raises(UserError, match="these runs need a gpu, and JAX finds none here"):
    trial.main()
  for run in runs_of(REGIMES["math_batch"]):
    run.folder.mkdir(parents=True)
    (run.folder / "failed.json").write_text("{}")
  trial.main()  # nothing to do needs none
  assert "25 runs: 0 done, 25 failed" in capsys.readouterr().out


def test_what_a_run_tells_xla_is_in_force_though_the_device_is_looked_at_before(tmp_path):
  """In a process of its own: XLA reads its flags once, when JAX looks for devices."""
  code = ("import os, jax; from experiments import trial_queue; "
          "trial_queue.check_platform(trial_queue.Call({}, platform='cpu')); print(os.environ['XLA_FLAGS'])")
  said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"XLA_FLAGS": ""})
  assert "xla_gpu_enable_triton_gemm=false" in said.stdout, said.stderr


def test_a_page_of_some_runs_is_printed_and_not_kept(elsewhere, monkeypatch, capsys):  # noqa: F811
  for seed in (1, 2):
    made_up("plain", seed, 0.3)
    made_up("budget", seed, 0.3 + seed / 10)
  monkeypatch.setattr(sys, "argv", ["trial.py", "--table", "--arms=plain,budget", "--seeds=2-2"])
  trial.main()
  said = capsys.readouterr().out
  assert said.startswith("Of --arms=plain,budget --seeds=2-2 alone, printed and not kept.") and "| budget - plain | 1 |" in said
  assert not (elsewhere / trial_arms.RESULTS / "table_cpu.md").exists()
  monkeypatch.setattr(sys, "argv", ["trial.py", "--table"])
  trial.main()
  assert "| budget - plain | 2 |" in (elsewhere / trial_arms.RESULTS / "table_cpu.md").read_text()
