"""Commands of the experiments: what is printed is what runs and what is kept; mistakes; the notebook."""

import io
import json
import os
from pathlib import Path
import re
import shlex
import signal
import sys
import time
from unittest import mock

import jax
import pytest

from arrol_jax import config
from arrol_jax.running import kept
from arrol_jax.types import UserError
from experiments import runs, starts, table4, tables

ROOT = Path(__file__).resolve().parents[1]

# ---- commands


def test_every_training_command_is_understood():
  """Each config exists, each key is known, each arm changes what its name says."""
  for scale in (scale for scale in runs.SCALES.values() if not scale.trial):  # those of the trial are in test_trial.py
    models = runs.PAPER_MODELS if scale.name == "paper" else ["qwen3_1b7"]
    for model in models:
      read = {arm: config.parse(list(runs.training(scale, arm, 0, model).argv))[0] for arm in runs.ARMS}
      assert [read[arm].prune.enabled for arm in ("none", "published", "dapo_none", "dapo")] == [False, True, False, True]
      assert [read[arm].loss.name for arm in ("none", "dapo_none", "dapo")] == ["grpo", "dapo", "dapo"]
      assert [read[arm].prune.keep for arm in ("keep025", "published", "keep075")] == [0.25, 0.5, 0.75]
      assert read["balanced_head"].quality.balance and tuple(read["balanced_head"].quality.inputs) == ("mean", "logprobs")
      assert read["random"].prune.rule == "random" and read["dapo"].rollout.resampling == 3
      assert len({c.model.path for c in read.values()}) == 1
    assert config.parse(list(runs.stopping(scale, "published", 0).argv))[0].eval.stop_below == runs.STOP_BELOW
    vote = config.parse(list(runs.voting(scale, "published", 0).argv))[0]
    assert (vote.eval.samples, vote.eval.temperature, vote.eval.deepconf) == (16, 1.0, True)
    assert vote.model.path == f"{runs.training(scale, 'published', 0).workdir}/policy"


class Started:
  """Stands for runs.call: notes what is started and leaves a finished run, or goes on until SIGTERM."""

  def __init__(self, ends=True, status=0):
    self.ends, self.status, self.argv, self.signals = ends, status, [], []

  def __call__(self, argv, stdout):
    self.argv.append(argv)
    flags = dict(a.partition("=")[::2] for a in argv)
    if not self.ends:
      before = signal.signal(signal.SIGTERM, lambda number, _: self.signals.append(number))
      while not self.signals:
        time.sleep(0.01)
      signal.signal(signal.SIGTERM, before)
    elif "--workdir" in flags:
      folder = runs.ROOT / flags["--workdir"]
      (folder / "policy").mkdir(parents=True, exist_ok=True)
      (folder / "metrics.jsonl").write_text("{}\n")
      (folder / "config.json").write_text(json.dumps({"path": flags.get("--config.model.path")}))
      (folder / "summary.json").write_text("{}")
      fields = dict.fromkeys(runs.SCORES, 1) | {"text": "long"}
      (folder / "rollouts.jsonl").write_text(json.dumps(fields) + "\n")
    elif stdout:
      stdout.write('{"benchmark": "/secret/gsm8k_test.jsonl"}\n')
    return self.status


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
  """Runs write below a folder of the test's, and leave JAX's settings as they were."""
  monkeypatch.setattr(runs, "ROOT", tmp_path)
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  names = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
  before = {name: getattr(jax.config, name) for name in names}
  yield tmp_path
  for name, value in before.items():
    jax.config.update(name, value)


def test_what_is_printed_is_what_runs_and_what_is_kept(elsewhere, monkeypatch, capsys):
  scale = runs.with_paths(runs.GPU, "/secret/model.gguf", "/secret")
  started, jobs = Started(), [runs.training(scale, "none", 0), runs.voting(scale, "none", 0)]
  monkeypatch.setattr(runs, "call", started)
  assert runs.start(jobs, None)
  printed = [line[2:] for line in capsys.readouterr().out.splitlines() if line.startswith("$ ")]
  assert len(printed) == len(started.argv) == 2
  for text, argv in zip(printed, started.argv, strict=True):
    words = shlex.split(text)
    assignments = words[:words.index("python")]
    assert words[len(assignments):] == ["python", "-m", *argv]
    settings = {name: str(getattr(jax.config, name.lower())) for name, _, _ in (a.partition("=") for a in assignments)}
    assert settings == {"JAX_COMPILATION_CACHE_DIR": runs.CACHE, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.0"}
  kept = elsewhere / scale.results
  everything = "".join(p.read_text() for p in kept.rglob("*.json*"))
  assert "/secret" not in everything and "--config.model.path=DIR/model.gguf" in everything and "long" not in everything
  about = json.loads((kept / "none_seed0" / "run.jsonl").read_text())
  assert about["command"] == printed[0].replace("/secret", "DIR") and about["wall_s"] >= 0
  assert runs.start(jobs, None) and len(started.argv) == 2  # done: nothing is run twice


def test_a_vote_first_trains_the_policy_it_needs(elsewhere, monkeypatch):
  started = Started()
  monkeypatch.setattr(runs, "call", started)
  assert runs.start([runs.voting(runs.CPU, "published", 1)], None)
  assert [argv[0] for argv in started.argv] == ["arrol_jax.train", "arrol_jax.evaluate"]


def test_time_over_stops_with_sigterm_and_the_next_call_goes_on(elsewhere, monkeypatch):
  started, jobs = Started(ends=False), [runs.training(runs.CPU, arm, 0) for arm in ("none", "published")]
  monkeypatch.setattr(runs, "call", started)
  assert not runs.start(jobs, 0.01)
  assert len(started.argv) == 1 and started.signals == [signal.SIGTERM]
  assert not (elsewhere / runs.CPU.results / "none_seed0").exists()
  again = Started()
  monkeypatch.setattr(runs, "call", again)
  assert runs.start(jobs, 9.0)
  assert again.argv[0] == started.argv[0] and len(again.argv) == 2
  assert len((elsewhere / runs.CPU.results / "none_seed0" / "run.jsonl").read_text().splitlines()) == 2  # a line a piece


def test_a_run_that_fails_is_told_with_its_command(elsewhere, monkeypatch):
  monkeypatch.setattr(runs, "call", Started(ends=True, status=2))
  with pytest.raises(UserError, match="none_seed0: exit status 2 from: python -m arrol_jax.train"):
    runs.start([runs.training(runs.CPU, "none", 0)], None)


def test_a_call_is_the_command_itself(elsewhere, capsys):
  """The module's main with its arguments: what it prints, its exit status, its one line for a user's mistake."""
  out = io.StringIO()
  assert runs.call(("arrol_jax.train", "--help"), out) == 0 and "--config=NAME" in out.getvalue()
  before = sys.argv
  assert runs.call(("arrol_jax.train", "--config=configs/none.py"), None) == 2 and sys.argv is before
  assert capsys.readouterr().err.startswith("error: configs/none.py: no such config file; ")


@pytest.mark.parametrize("argument", ["--scale=tpu", "--minutes=soon", "--steps=3", "table4", "--data=DIR"])
def test_wrong_arguments_end_in_one_line(argument):
  with pytest.raises(UserError) as e:
    tables.parse(["table4.py", argument])
  assert "\n" not in " ".join(str(e.value).split())


def test_help_shows_the_commands_own_page(monkeypatch, capsys):
  monkeypatch.setitem(sys.modules, "__main__", table4)
  with pytest.raises(SystemExit) as e:
    tables.parse(["table4.py", "--scale=gpu", "--help"])
  assert e.value.code == 0 and "python -m experiments.table4 [--scale=cpu|gpu|paper]" in capsys.readouterr().out


# ---- notebook


@pytest.mark.slow
def test_the_notebook_runs_and_defines_nothing(tmp_path):
  import nbclient
  import nbformat
  notebook = nbformat.read(ROOT / "experiments" / "arrol_demo.ipynb", 4)
  code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
  assert not re.search(r"^\s*(def|class)\b|\blambda\b", code, re.MULTILINE)
  tiny = {"ARROL_DEMO_TINY": "1", "ARROL_DEMO_DIR": str(tmp_path / "run"), "JAX_NUM_CPU_DEVICES": "1"}
  with mock.patch.dict(os.environ, tiny):
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT / "experiments")}}).execute()
  said = "".join(o.get("text", "") for cell in notebook.cells for o in cell.get("outputs", []))
  assert "4 steps done" in said and "cut   at   16" in said and "ended at" in said and " kept, " in said
  assert "look.html: written" in said and "maj@8" in said and "% of the weight; its heaviest trace says:" in said
  shown = [o["data"]["text/html"] for cell in notebook.cells for o in cell.get("outputs", []) if "text/html" in o.get("data", {})]
  assert len(shown) == 1 and shown[0].startswith("<iframe srcdoc=") and "Held-out accuracy" in shown[0]


def test_starts_takes_kept_programs_away_once(tmp_path, monkeypatch, capsys):
  """Five starts over one cache; the fourth finds none of those that were kept whole, the fifth what the fourth left."""
  found = []

  def start(folder, flags):
    cache = Path(next(flag.partition("=")[2] for flag in flags if flag.startswith("--compilation_cache=")))
    found.append((cache / kept.FOLDER).exists())
    (cache / kept.FOLDER).mkdir(parents=True, exist_ok=True)
    assert flags[:2] == ["--config=quickstart", "--config.steps=2"] and "--config.checkpoint.export=False" in flags
    return {"first_step_s": 1.0}

  monkeypatch.setattr(starts, "start", start)
  monkeypatch.setattr(sys, "argv", ["starts", "--config=quickstart", "--config.steps=2", f"--out={tmp_path / 'out.jsonl'}"])
  starts.main()
  assert found == [False, True, True, False, True]
  lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
  assert [line["start"] for line in lines] == ["cold", "kept", "kept", "jax", "after"]
  assert lines == [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
  monkeypatch.setattr(sys, "argv", ["starts", "--config=quickstart", "--workdir=x"])
  with pytest.raises(UserError, match="neither --workdir"):
    starts.main()
