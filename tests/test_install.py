"""The wheel works from any folder: its commands, the shipped configs by name, the quickstart's model and data."""

from configparser import ConfigParser
import importlib
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

from helpers_train import assert_refused, in_process
import pytest

from arrol_jax import config, usage
from arrol_jax.running import shipped
from arrol_jax.types import UserError

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = "train evaluate look chat serve bench plan get doctor".split()
QUICK = ["--config=quickstart", *(f"--config.{x}" for x in (
  "steps=1", "rollout.prompts=2", "rollout.group_size=4", "rollout.slots=8", "rollout.row_buckets=1", "optim.micro_tokens=1024",
  "eval.problems=4", "checkpoint.export=False", "log.backends=jsonl"))]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """The wheel, unpacked as pip would."""
  folder = tmp_path_factory.mktemp("wheel")
  source = folder / "source"
  left_out = shutil.ignore_patterns(".git", ".venv", "runs", "results", "__pycache__", "*.egg-info", "build")
  shutil.copytree(ROOT, source, ignore=left_out)
  pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", folder, source]
  done = subprocess.run(pip, capture_output=True, text=True)
  if done.returncode and "setuptools" in done.stderr and "satisfies" in done.stderr:
    pytest.skip("no network for the build's setuptools")
  assert done.returncode == 0, done.stderr
  with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
    archive.extractall(folder / "site")
  return folder / "site"


def installed(wheel, folder, name, *argv):
  """A console script of the wheel, run in `folder`."""
  code = f"import sys; from arrol_jax.{name} import command; sys.argv[0] = 'arrol-{name}'; sys.exit(command())"
  environment = os.environ | {"PYTHONPATH": str(wheel)}
  return subprocess.run([sys.executable, "-P", "-c", code, *argv], cwd=folder, env=environment, capture_output=True, text=True)


def test_the_wheel_holds_every_module_config_and_file_of_the_quickstart(wheel):
  listed = {str(p.relative_to(wheel)) for p in wheel.rglob("*") if p.is_file() and ".dist-info" not in str(p)}
  modules = {str(p.relative_to(ROOT)) for p in (ROOT / "arrol_jax").rglob("*.py")}
  configs = {f"arrol_jax/configs/{p.name}" for p in (ROOT / "configs").glob("*.py")}
  example = ROOT / "experiments" / "arithmetic"
  page = {f"arrol_jax/reporting/page.{kind}" for kind in ("css", "js")}
  shipped_example = {f"arrol_jax/arithmetic/{p.relative_to(example)}" for p in example.rglob("*") if p.is_file()}
  assert listed == modules | configs | shipped_example | page | {"arrol_jax/benchmarks/gsm8k_step.json"}


def test_the_wheel_has_the_commands(wheel):
  scripts = ConfigParser()
  scripts.read(next(wheel.glob("*.dist-info")) / "entry_points.txt")
  assert dict(scripts["console_scripts"]) == {f"arrol-{name}": f"arrol_jax.{name}:command" for name in COMMANDS}
  for name in COMMANDS:
    assert callable(importlib.import_module(f"arrol_jax.{name}").command)


def test_the_quickstart_runs_from_an_empty_folder(wheel, tmp_path):
  done = installed(wheel, tmp_path, "train", *QUICK)
  assert done.returncode == 0, done.stderr
  assert [p.name for p in tmp_path.iterdir()] == ["runs"] and (tmp_path / "runs" / "quickstart" / "summary.json").exists()
  assert '"model": {' in (tmp_path / "runs" / "quickstart" / "config.json").read_text()
  assert str(wheel) not in (tmp_path / "runs" / "quickstart" / "config.json").read_text()  # the same run on any machine


def test_a_config_and_a_reward_of_ones_own_in_that_folder(wheel, tmp_path):
  """A file that starts from a shipped one, beside a folder `configs` of one's own; the reward is imported from there too."""
  (tmp_path / "configs").mkdir()
  (tmp_path / "configs" / "mine.py").write_text("VALUE = 2\n")
  (tmp_path / "run.py").write_text("from configs import mine, quickstart\ndef get_config():\n  c = quickstart.get_config()\n"
                                   "  c.rollout.prompts = mine.VALUE\n  return c\n")
  (tmp_path / "my_rewards.py").write_text("def score(response, answer):\n  return 0.25\n")
  done = installed(wheel, tmp_path, "train", *(a for a in QUICK if "prompts" not in a), "--config=run.py",
                   "--config.reward.function=my_rewards.score", "--config.data.eval=")
  assert done.returncode == 0, done.stderr
  assert '"reward": 0.25' in (tmp_path / "runs" / "run" / "metrics.jsonl").read_text()


def test_an_unknown_config_is_one_line_that_lists_the_shipped_ones(wheel, tmp_path):
  done = installed(wheel, tmp_path, "train", "--config=quikstart")
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
  assert "quikstart" in done.stderr and "quickstart_clean" in done.stderr


def test_shipped_files_are_found_only_where_nothing_else_is(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  data = "experiments/arithmetic/test.jsonl"
  assert shipped.find(data) == str(ROOT / data) and shipped.config_file("quickstart") == str(ROOT / "configs" / "quickstart.py")
  assert shipped.find("configs/quickstart.py") == str(ROOT / "configs" / "quickstart.py")
  for path in ("experiments/arithmetic/none.jsonl", "../configs/base.py", "configs/../setup.py", "test.jsonl", "/none"):
    assert shipped.find(path) == path
  (tmp_path / "experiments" / "arithmetic").mkdir(parents=True)
  (tmp_path / data).write_text("")
  assert shipped.find(data) == data
  with pytest.raises(UserError, match="no such config file"):
    config.parse(["train.py", "--config=none"])


@pytest.mark.parametrize("name, argv, words", [
  ("look", [], "arguments are required: run"), ("get", ["gsm8k", "--form=x"], "unrecognized arguments: --form=x"),
  ("bench", ["decodee"], "invalid choice: 'decodee'"), ("train", ["quickstart"], "write --config=quickstart"),
  ("evaluate", ["{run}"], "write --workdir={run}")])
def test_a_wrong_command_line_is_one_line(tmp_path, name, argv, words):
  (tmp_path / "config.json").write_text('{"rollout": {}}')
  filled = lambda text: text.replace("{run}", str(tmp_path))
  done = in_process(importlib.import_module(f"arrol_jax.{name}"), *map(filled, argv))
  assert_refused(done, filled(words))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_every_flag_its_default_and_an_example(name, capsys, monkeypatch):
  module = importlib.import_module(f"arrol_jax.{name}")
  monkeypatch.setattr(sys, "argv", ["x", "-h"])
  with pytest.raises(SystemExit) as e:
    module.main()
  text = capsys.readouterr().out
  assert e.value.code == 0 and re.search(rf"^  arrol-{name} ", text, re.M)
  if name in ("bench", "get", "look"):
    flags = re.findall(r"^  (--\w+)", text, re.M)
    assert len(flags) == len(set(flags)) and text.count("(default") >= len([f for f in flags if f != "--help"])
  else:
    for flag, (default, what) in getattr(module, "FLAGS", {}).items():
      assert f"--{flag}={default}" in text if default is not None else f"--{flag} " in text
      assert " ".join(what.split()[:3]) in text
    for key, default, _ in usage.keys():
      assert f"--config.{key}={default}" in text
  for flag in set(re.findall(r"--(\w+)=", module.__doc__)) - {"config", "workdir"}:
    assert re.search(rf"^  --{flag}\b", text, re.M), flag


def test_help_knows_every_config_key():
  c, _ = config.parse(["x", "--config=quickstart"])
  def leaves(section, before=""):
    below = lambda key, x: leaves(x, f"{before}{key}.") if hasattr(x, "keys") else [before + key]
    return [name for key, x in section.items() for name in below(key, x)]

  assert sorted(name for name, _, _ in usage.keys()) == sorted(leaves(c))
  assert all(default for _, default, _ in usage.keys())


def test_extras_have_what_they_say():
  extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
  named = lambda extra: {re.match(r"[\w.-]+", x)[0] for x in extras[extra]}
  assert named("hub") == {"datasets"} and named("track") == {"wandb", "trackio"} and named("cuda") == named("tpu") == {"jax"}
