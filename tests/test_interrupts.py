"""Ctrl-C while a command's modules are imported ends it in one line; what is no command keeps its own ways."""

import os
from pathlib import Path
import subprocess
import sys

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Stands there for JAX: Ctrl-C comes while it is imported, and it makes of KeyboardInterrupt what some libraries do.
JAX = """
import os, signal
try:
  os.kill(os.getpid(), signal.SIGINT)
  for _ in range(1000): pass
except KeyboardInterrupt:
  raise ImportError("lost") from None
"""


def run(folder, *command):
  """(status, stdout, stderr) of Python with these arguments, which finds what is in the folder first."""
  done = subprocess.run([sys.executable, *map(str, command)], cwd=folder, capture_output=True, text=True,
                        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])})
  return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("name", ["train", "serve", "get", "look", "script"])
def test_ctrl_c_while_modules_are_imported_is_one_line(tmp_path, name):
  (tmp_path / "jax.py").write_text(JAX)
  script = tmp_path / "arrol-plan"
  script.write_text("import sys\nfrom arrol_jax.plan import command\nsys.exit(command())\n")
  command = [script] if name == "script" else ["-m", f"arrol_jax.{name}"]
  assert run(tmp_path, *command) == (130, "", "interrupted before it started\n")


def test_another_program_that_imports_the_package_is_left_alone(tmp_path):
  (tmp_path / "jax.py").write_text(JAX)
  mine = tmp_path / "mine.py"
  mine.write_text("try:\n  import arrol_jax.config\nexcept ImportError as e:\n  print(e)\n")
  assert run(tmp_path, mine, "arrol_jax.train") == (0, "lost\n", "")
  assert run(tmp_path, "-m", "mine") == (0, "lost\n", "")


def test_a_command_that_has_begun_gets_keyboard_interrupts(tmp_path):
  script = tmp_path / "arrol-mine"
  script.write_text("import os, signal\nfrom arrol_jax import config\n"
                    "config.run(lambda: os.kill(os.getpid(), signal.SIGINT))\n")
  status, out, err = run(tmp_path, script)
  assert (status, out) == (130, "") and err.splitlines()[-1].startswith("interrupted; the same command goes on")
