"""`make` needs Python 3.11, says so in one line, and whatever fails or is stopped, the next call starts from a clean environment.

A stand-in for Python tells the version it is asked to have, makes a folder for `-m venv` and does what pip.txt says for `-m pip`.
"""

import os
from pathlib import Path
import re
import shutil
import stat
import subprocess
import sys
import tomllib

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = """#!/bin/sh
version={version}
case "$1 $2" in
  "-m venv") [ {venv} = works ] || exit 1
             mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && : > "$3/made by $version" ;;
  "-m pip") [ "$(cat pip.txt)" = stops ] && kill -9 $PPID
            [ "$(cat pip.txt)" = works ] ;;
  "-c "*) exec {real} -c "import sys; sys.version_info = (*map(int, '$version'.split('.')), 0, 'final', 0)
$2" ;;
  *) exit 0 ;;
esac
"""


@pytest.fixture
def folder(tmp_path):
  for name in ("Makefile", "requirements.txt"):
    shutil.copy(ROOT / name, tmp_path)
  (tmp_path / "pip.txt").write_text("works")
  return tmp_path


def python(folder, version, venv="works"):
  path = folder / f"python{version}"
  path.write_text(PYTHON.format(version=version, venv=venv, real=sys.executable))
  path.chmod(path.stat().st_mode | stat.S_IXUSR)
  return path


def make(folder, python, target=".venv/run"):
  environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
  return subprocess.run(["make", target, f"PYTHON={python}"], cwd=folder, capture_output=True, text=True, env=environment)


def test_an_old_python_is_one_line_and_leaves_nothing(folder):
  done = make(folder, python(folder, "3.10"))
  said = [line for line in done.stderr.splitlines() if not line.startswith("make:")]
  assert done.returncode == 2 and len(said) == 1 and "3.11" in said[0] and "python3.10" in said[0]
  assert not (folder / ".venv").exists()
  assert make(folder, python(folder, "3.12")).returncode == 0
  assert (folder / ".venv" / "made by 3.12").exists() and (folder / ".venv" / "run").exists()


def test_a_python_that_is_not_there_is_the_same_line(folder):
  done = make(folder, "python3.99")
  assert done.returncode == 2 and "3.11" in done.stderr and not (folder / ".venv").exists()


def test_an_environment_of_an_old_python_is_made_anew(folder):
  """As a call before this check left it."""
  old = python(folder, "3.10")
  subprocess.run([old, "-m", "venv", ".venv"], cwd=folder, check=True)
  assert make(folder, python(folder, "3.13")).returncode == 0
  assert [f.name for f in (folder / ".venv").iterdir() if f.name.startswith("made")] == ["made by 3.13"]


@pytest.mark.parametrize("fault", ["fails", "stops"])
def test_after_an_install_that_fails_the_next_starts_clean(folder, fault):
  (folder / "pip.txt").write_text(fault)
  good = python(folder, "3.11")
  assert make(folder, good).returncode != 0
  assert not (folder / ".venv" / "run").exists()
  assert (folder / ".venv").exists() == (fault == "stops")  # killed outright: nothing was left to clean up, and it is marked
  (folder / "pip.txt").write_text("works")
  (folder / ".venv").mkdir(exist_ok=True)
  (folder / ".venv" / "half a package").write_text("")
  assert make(folder, good).returncode == 0
  assert not (folder / ".venv" / "half a package").exists() and not (folder / ".venv" / "unfinished").exists()


def test_without_venv_nothing_is_left(folder):
  assert make(folder, python(folder, "3.11", venv="is missing")).returncode != 0
  assert not (folder / ".venv").exists()


def test_a_finished_environment_outlives_a_failed_update(folder):
  good = python(folder, "3.11")
  assert make(folder, good).returncode == 0
  (folder / "requirements.txt").touch()
  os.utime(folder / ".venv" / "run", (1, 1))
  (folder / "pip.txt").write_text("fails")
  assert make(folder, good).returncode != 0 and (folder / ".venv" / "made by 3.11").exists()
  (folder / "pip.txt").write_text("works")
  assert make(folder, good).returncode == 0


def test_make_and_pyproject_ask_for_the_same():
  """The package's requirements are requirements.txt's; the test extras stand in both."""
  project = tomllib.loads((ROOT / "pyproject.toml").read_text())
  assert project["project"]["dynamic"] == ["dependencies"]
  assert project["tool"]["setuptools"]["dynamic"]["dependencies"] == {"file": ["requirements.txt"]}
  recipe = (ROOT / "Makefile").read_text().partition("$(VENV)/test: ")[2]
  assert re.findall(r'"([^"]+)"', recipe) == project["project"]["optional-dependencies"]["test"]
  jax = next(line for line in (ROOT / "requirements.txt").read_text().splitlines() if line.startswith("jax>"))
  for extra, name in (("cuda", "jax[cuda12]"), ("tpu", "jax[tpu]")):
    assert project["project"]["optional-dependencies"][extra] == [jax.replace("jax", name, 1)]
