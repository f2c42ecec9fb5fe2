"""Evaluation during training, and where figures go: the same names in every backend, one run there however often it goes on."""

import importlib.util
import json
import os
from pathlib import Path
import subprocess
import sys
from types import SimpleNamespace

from helpers_train import METRICS, ROOT, arguments, assert_refused, command, read, run, timeless
import pytest

from arrol_jax import config
from arrol_jax.data import problems
from arrol_jax.running import loggers
from arrol_jax.running.workdir import renamed
from arrol_jax.types import UserError

# ---- evaluation during training


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
  """Four steps, evaluated after the second and the last on 3 of 6 problems; stopped after the third by its number of steps."""
  folder = tmp_path_factory.mktemp("evaluated")
  run(folder / "whole", steps=4, eval__every=2, eval__subset=3, eval__problems=6)
  run(folder / "parts", steps=3, eval__every=2, eval__subset=3, eval__problems=6)
  run(folder / "parts", steps=4, eval__every=2, eval__subset=3, eval__problems=6)
  run(folder / "without", steps=4, eval__problems=6)
  return folder


def test_accuracy_stands_in_the_lines_of_its_steps(evaluated):
  lines = read(evaluated / "whole" / "metrics.jsonl")
  assert [x["step"] for x in lines if "held_out_accuracy" in x] == [2, 4]
  for step in (2, 4):
    result = read(evaluated / "whole" / f"eval_{step:04d}.json")["test"]
    assert result["problems"] == 3 and lines[step - 1]["held_out_accuracy"] == result["accuracy"]
  assert read(evaluated / "whole" / "summary.json")["eval_after"]["test"]["problems"] == 6


def test_it_changes_nothing_and_a_resumed_run_has_the_same(evaluated):
  whole, parts, without = (timeless(read(evaluated / name / "metrics.jsonl")) for name in ("whole", "parts", "without"))
  assert whole == parts
  assert [{k: v for k, v in line.items() if k != "held_out_accuracy"} for line in whole] == without


def test_other_problems_are_evaluated_anew(evaluated):
  """A finished run that goes on with another subset: results of the old one are gone."""
  run(evaluated / "parts", steps=6, eval__every=3, eval__subset=2, eval__problems=6)
  names = sorted(p.name for p in (evaluated / "parts").glob("eval_*.json"))
  assert names == ["eval_0006.json", "eval_after.json", "eval_before.json"]


def test_a_subset_is_evenly_spaced():
  items = list(range(10))
  assert problems.spaced(items, 5) == [0, 2, 4, 6, 8] and problems.spaced(items, 3) == [0, 3, 6]
  assert problems.spaced(items, None) == problems.spaced(items, 10) == problems.spaced(items, 99) == items


def test_evaluation_needs_problems(tmp_path):
  assert_refused(command(*arguments(tmp_path / "run", eval__every=2, data__eval="")), "eval.every", "data.eval is empty")
  assert_refused(command(*arguments(tmp_path / "run", eval__every=0)), "eval.every is 0")


# ---- backends


def test_names(monkeypatch):
  assert loggers.names("jsonl, tensorboard,") == ["jsonl", "tensorboard"]
  with pytest.raises(UserError, match="'wandbb'; there are jsonl, tensorboard, wandb, trackio"):
    loggers.names("wandbb")
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=r'trackio is not installed: pip install "arrol-jax\[track\]"'):
    loggers.names("trackio")


def test_an_unknown_backend_is_one_line_before_anything_is_made(tmp_path):
  assert_refused(command(*arguments(tmp_path / "run", log__backends="csv")), "log.backends names 'csv'")
  assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize("value, backends", [("True", "jsonl,tensorboard"), ("False", "jsonl"), ("0", "jsonl")])
def test_the_old_name_works(value, backends, tmp_path, capsys):
  """On the command line, in a config file, and in a stored config."""
  c, _ = config.parse(["x", "--config=quickstart", f"--config.log.tensorboard={value}"])
  assert c.log.backends == backends and "log.tensorboard is called log.backends now" in capsys.readouterr().out
  file = tmp_path / "old.py"
  file.write_text(f"from configs import quickstart\ndef get_config():\n  c = quickstart.get_config()\n"
                  f"  c.log.tensorboard = {value}\n  return c\n")
  assert config.parse(["x", f"--config={file}"])[0].log.backends == backends
  assert renamed({"log": {"tensorboard": value}}) == {"log": {"backends": backends}}


FAKE = """
import json, os
Api = object
class Table:
  def __init__(self, columns, data):
    self.columns, self.data = columns, data
def init(**about):
  if os.environ.get("FAKE_FAILS"):
    raise RuntimeError("no\\nway in")
  say({"init": {k: v for k, v in about.items() if k != "config"}, "steps": about["config"]["steps"]})
  return Run()
def say(x):
  with open(os.environ["FAKE_LOG"], "a") as f:
    f.write(json.dumps(x, default=lambda table: {"columns": table.columns, "rows": len(table.data)}) + "\\n")
class Run:
  def log(self, metrics, step):
    say({"step": step} | metrics)
  def finish(self):
    say({"finish": True})
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
  """Stand-ins for wandb and trackio that write down their calls."""
  for name in ("wandb", "trackio"):
    (tmp_path / "fakes" / name).mkdir(parents=True)
    (tmp_path / "fakes" / name / "__init__.py").write_text(FAKE)
    monkeypatch.delitem(sys.modules, name, raising=False)
  monkeypatch.syspath_prepend(str(tmp_path / "fakes"))
  monkeypatch.setenv("FAKE_LOG", str(tmp_path / "calls.jsonl"))
  for name in ("WANDB_MODE", "WANDB_API_KEY", "FAKE_FAILS"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("HOME", str(tmp_path))
  yield tmp_path / "calls.jsonl"
  for name in ("wandb", "trackio"):
    sys.modules.pop(name, None)


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_the_names_of_metrics_jsonl_and_a_table(fake, tmp_path, name):
  run(tmp_path / "run", steps=1, log__backends=f"jsonl,{name}", data__eval="")
  run(tmp_path / "run", steps=2, log__backends=f"jsonl,{name}", data__eval="")
  calls = read(fake)
  starts = [x["init"] for x in calls if "init" in x]
  assert len(starts) == 2 and starts[0] == starts[1] and starts[0]["resume"] == "allow"  # the same run goes on
  assert starts[0]["name"].startswith("run-") and starts[0]["project"] == "arrol_jax"
  if name == "wandb":
    assert starts[0]["mode"] == "offline" and starts[0]["dir"] == str(tmp_path / "run") and starts[0]["id"]
  logged = [x for x in calls if "step" in x]
  for line, call in zip(read(tmp_path / "run" / "metrics.jsonl"), logged, strict=True):
    table = call.pop("rollouts")
    assert call == {k: v for k, v in line.items() if isinstance(v, int | float)} and {"reward", "signal"} <= call.keys()
    assert table["rows"] == 4 and {"text", "score", "posterior", "survival", "reward", "pruned"} <= set(table["columns"])
  assert calls[-1] == {"finish": True} and not set(METRICS) - {k for x in logged for k in x} - {"head_auc_within", "head_auc"}


def test_whoever_is_logged_in_is_online(fake, tmp_path, monkeypatch):
  (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password key\n")
  loggers.Tracker("wandb", str(tmp_path), {"steps": 1})
  monkeypatch.setenv("WANDB_MODE", "disabled")
  (tmp_path / ".netrc").unlink()
  loggers.Tracker("wandb", str(tmp_path), {"steps": 1})
  assert [x["init"]["mode"] for x in read(fake)] == [None, None]


def test_a_tracker_that_fails_is_one_line(fake, tmp_path, monkeypatch):
  monkeypatch.setenv("FAKE_FAILS", "1")
  result = command(*arguments(tmp_path / "run", log__backends="wandb", data__eval=""))
  assert result.status == 2 and result.err.splitlines()[-1] == "error: log.backends: wandb does not start (no way in)"


def test_tensorboard_gets_the_same(tmp_path):
  board = loggers.Board(str(tmp_path), 0)
  said = []
  board.writer = SimpleNamespace(add_scalar=lambda *x: said.append(x), add_text=lambda *x: said.append(x), close=lambda: None)
  board.write(3, {"reward": 0.5, "kl": 0}, [{"text": "a|b\nc", "score": 0.123456, "pruned": True, "reward": None}])
  assert said[:2] == [("reward", 0.5, 3), ("kl", 0, 3)]
  assert said[2][0] == "rollouts" and said[2][1].splitlines() == [
    "| text | score | pruned | reward |", "| --- | --- | --- | --- |", "| `a¦b⏎c` | 0.1235 | True | None |"]


# ---- the real ones, where they are installed


def test_wandb_itself_offline(tmp_path):
  pytest.importorskip("wandb")
  _real("wandb", tmp_path)
  assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


def test_trackio_itself(tmp_path):
  pytest.importorskip("trackio")
  _real("trackio", tmp_path)
  code = """import json
from trackio.sqlite_storage import SQLiteStorage
(name,) = SQLiteStorage.get_runs("arrol_jax")
print(json.dumps([[x["step"], x["reward"], len(x["rollouts"]["_value"])] for x in SQLiteStorage.get_logs("arrol_jax", name)]))"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_alone("trackio", tmp_path), check=True)
  assert json.loads(done.stdout.splitlines()[-1]) == [[1, 0.25, 1], [2, 0.5, 1]]


def _alone(name: str, folder: Path) -> dict:
  own = {"PYTHONPATH": ROOT, "HOME": folder, "TRACKIO_DIR": folder / "trackio", "NETRC": folder / "none"}
  return os.environ | {k: str(v) for k, v in own.items()}


def _real(name: str, folder: Path) -> None:
  """Two steps logged, in a process of its own: the libraries leave threads behind."""
  code = f"""from arrol_jax.running import loggers
for step in (1, 2):
  for one in loggers.start("jsonl,{name}", {str(folder)!r}, step - 1, {{"steps": 2, "prune": {{"detect": (16,)}}}}):
    one.write(step, {{"reward": 0.25 * step}}, [{{"text": "so 12", "score": 0.5, "pruned": False, "reward": None}}])
    one.close()"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=_alone(name, folder), timeout=120)
  assert done.returncode == 0, done.stderr
