"""Programs kept on disk (running/kept.py): found again where all that shapes them is the same, and nowhere else."""

import functools
import importlib
import json
import os
import re
import subprocess
import sys
import time

import jax
from jax.experimental.compilation_cache import compilation_cache
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from arrol_jax import assemble
from arrol_jax.engine.compile_ahead import Program, compile_ahead
from arrol_jax.models import sharding
from arrol_jax.running import hosts, kept
from configs import base
from tests.helpers_train import ROOT, arguments, read

traced = []  # how often Python ran `scaled`


@functools.partial(kept.jit, static_argnames=("power",), donate_argnames=("x",))
def scaled(x: dict, power: int, by: jax.Array | None = None, *, more: float = 0.0) -> jax.Array:
  traced.append(power)
  return x["a"] ** power * (1.0 if by is None else by) + more


def fresh(folder):
  """JAX's own cache is empty, on disk and in memory."""
  jax.clear_caches()
  compilation_cache.reset_cache()
  jax.config.update("jax_compilation_cache_dir", str(folder))


@pytest.fixture
def shelf(tmp_path):
  before = jax.config.jax_compilation_cache_dir
  fresh(tmp_path / "cache")
  out = kept.Shelf(tmp_path / "programs", sharding.make_mesh(devices=jax.devices()[:1]))
  traced.clear()
  yield out
  out.forget()
  fresh(before)


def array(n=3):
  return {"a": jax.device_put(jnp.arange(n, dtype=jnp.float32), jax.devices()[0])}


def compiled(shelf, jitted, *args, **static):
  compile_ahead([Program("one", jitted, lambda _: args, static)], sharding.make_mesh(devices=jax.devices()[:1]), shelf=shelf)


def files(shelf):
  return sorted(shelf.folder.iterdir()) if shelf.folder.exists() else []


def test_a_kept_program_is_run_without_tracing(shelf):
  """Whether static arguments are given by place or by name; another shape, or another static argument, is traced."""
  by = np.float32(3)
  compiled(shelf, scaled, array(), 2, by)
  assert len(files(shelf)) == 1 and traced == [2]
  jax.clear_caches()
  compiled(shelf, scaled, array(), 2, by)
  np.testing.assert_array_equal(scaled(array(), 2, by), [0, 3, 12])
  assert traced == [2] and shelf.loaded == [scaled]
  np.testing.assert_array_equal(scaled(array(), 3, by), [0, 3, 24])
  np.testing.assert_array_equal(scaled(array(4), 2, by), [0, 3, 12, 27])
  np.testing.assert_array_equal(scaled(array(), power=2), [0, 1, 4])
  assert traced == [2, 3, 2, 2]
  shelf.forget()
  np.testing.assert_array_equal(scaled(array(), 2, by), [0, 3, 12])
  assert traced == [2, 3, 2, 2, 2]


def test_what_it_is_given_is_donated_and_can_be_abstract(shelf):
  compiled(shelf, scaled, array(), power=2)
  jax.clear_caches()
  compiled(shelf, scaled, array(), power=2)
  x = array()
  np.testing.assert_array_equal(scaled(x, power=2), [0, 1, 4])
  assert x["a"].is_deleted() and traced == [2]
  assert jax.eval_shape(lambda x: scaled(x, power=2), array()).shape == (3,)  # within another program it is traced
  np.testing.assert_array_equal(jax.grad(lambda x: scaled(x, power=2).sum())(array())["a"], [0, 2, 4])


@pytest.mark.parametrize("other", ["source", "config", "import", "setting", "variable", "version", "mesh", "function"])
def test_a_program_is_found_only_where_all_is_the_same(shelf, monkeypatch, request, other):
  """Each of these could make another program of the same call."""
  compiled(shelf, scaled, array(), power=2)
  before, mesh = shelf.path(scaled, (array(),), {"power": 2}), sharding.make_mesh(devices=jax.devices()[:1])
  again = lambda mesh: kept.Shelf(shelf.folder, mesh)
  assert before == files(shelf)[0] and again(mesh).path(scaled, (array(),), {"power": 2}) == before
  function = scaled
  if other == "source":
    monkeypatch.setattr(kept, "source", lambda: "edited")
  elif other == "config":  # it may have replaced parts of the package
    monkeypatch.setattr(kept, "_beside", ["import arrol_jax.learning.losses"])
  elif other == "import":
    monkeypatch.setattr(kept, "beside", lambda: [("my_patches.py", 3, 5)])
  elif other == "setting":
    request.addfinalizer(functools.partial(jax.config.update, "jax_default_matmul_precision", None))
    jax.config.update("jax_default_matmul_precision", "highest")
  elif other == "variable":
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
  elif other == "version":
    monkeypatch.setattr(kept, "versions", lambda: [("jax", "0.0")])
  elif other == "mesh":
    mesh = sharding.make_mesh(data=2, devices=jax.devices()[:2])
  else:
    function = kept.jit(lambda x, power: x["a"] * power, static_argnames=("power",))
  assert again(mesh).load(function, (array(),), {"power": 2}) is None
  assert again(mesh).path(function, (array(),), {"power": 2}) != before


def test_the_source_is_every_file_of_the_package(tmp_path, monkeypatch):
  """But for what editors leave: a link to nowhere, as Emacs locks a file. A file that is newer than the process may be another
  than the one it has imported."""
  (tmp_path / "running").mkdir()
  for name in ("step.py", "running/kept.py"):
    (tmp_path / name).write_text("x = 1\n")
    os.utime(tmp_path / name, (0, 0))
  (tmp_path / ".#step.py").symlink_to("me@host.1:2")
  monkeypatch.setattr(kept, "PACKAGE", tmp_path)
  before = kept.source()
  assert not kept.edited()
  (tmp_path / "step.py").write_text("x = 2\n")
  assert kept.source() != before and kept.edited()
  os.utime(tmp_path / "step.py", (kept.began() - 60, kept.began() - 60))
  assert not kept.edited() and 0 < time.time() - kept.began() < 1e5


def test_what_is_imported_beside_the_package_counts(tmp_path, monkeypatch):
  """A config may import a module of the user's that replaces parts; installed packages count by their versions."""
  monkeypatch.syspath_prepend(tmp_path)
  (tmp_path / "my_patches.py").write_text("")
  before = kept.beside()
  importlib.import_module("my_patches")
  found, = set(kept.beside()) - set(before)
  assert found[0] == str(tmp_path / "my_patches.py")
  assert not any("site-packages" in name or str(kept.PACKAGE) in name for name, *_ in kept.beside())
  (tmp_path / "my_patches.py").write_text("x = 1\n")
  assert found not in kept.beside()
  del sys.modules["my_patches"]


def test_what_is_another_object_at_each_start_is_not_kept(shelf):
  """optax's optimizers are closures, and nothing in their names says which."""
  step = kept.jit(lambda x, optimizer: optimizer.update(x, optimizer.init(x))[0], static_argnames=("optimizer",))
  compiled(shelf, step, array(), optimizer=optax.sgd(0.1))
  assert not files(shelf) and not shelf.loaded


def test_on_a_cpu_what_came_from_jaxs_cache_is_not_kept(shelf):
  """It would have lost its functions. It is run all the same."""
  compiled(None, scaled, array(), power=2)
  jax.clear_caches()
  compiled(shelf, scaled, array(), power=2)
  assert not files(shelf) and traced == [2, 2]
  np.testing.assert_array_equal(scaled(array(), power=2), [0, 1, 4])


def test_on_a_cpu_what_calls_lapack_is_not_kept(shelf):
  """In a process that lowers no such call its functions are not there, and the program would end it."""
  solve = kept.jit(jnp.linalg.cholesky)
  compiled(shelf, solve, np.eye(3, dtype=np.float32))
  assert not files(shelf)
  np.testing.assert_array_equal(solve(np.eye(3, dtype=np.float32)), np.eye(3))


@pytest.mark.parametrize("damaged", [lambda x: x[:len(x) // 2], lambda x: x[:2000] + bytes([x[2000] ^ 1]) + x[2001:],
                                     lambda x: b""], ids=["half", "one bit", "nothing"])
def test_a_damaged_file_is_made_again(shelf, tmp_path, damaged):
  compiled(shelf, scaled, array(), power=2)
  path, = files(shelf)
  whole = path.read_bytes()
  path.write_bytes(damaged(whole))
  fresh(tmp_path / "another")
  compiled(shelf, scaled, array(), power=2)
  assert traced == [2, 2] and not shelf.loaded and damaged(whole) != files(shelf)[0].read_bytes()
  jax.clear_caches()
  compiled(shelf, scaled, array(), power=2)
  assert traced == [2, 2] and shelf.loaded


def test_a_folder_that_cannot_be_written_is_read(shelf, monkeypatch):
  """As where it is another user's: neither a file's time nor a new file can be written."""
  compiled(shelf, scaled, array(), power=2)

  def refuse(*_args, **_kwargs):
    raise PermissionError

  monkeypatch.setattr(kept.os, "utime", refuse)
  jax.clear_caches()
  compiled(shelf, scaled, array(), power=2)
  assert traced == [2] and shelf.loaded and len(files(shelf)) == 1
  monkeypatch.setattr(kept.Path, "rename", refuse)  # the last step of writing: as a full disk, nothing is left of it
  compiled(shelf, scaled, array(), power=3)
  assert traced == [2, 3] and len(files(shelf)) == 1
  monkeypatch.setattr(kept.Path, "unlink", refuse)
  files(shelf)[0].write_bytes(b"")
  jax.clear_caches()
  compiled(shelf, scaled, array(), power=2)
  assert traced == [2, 3, 2]


def test_files_that_nobody_reads_go(shelf):
  compiled(shelf, scaled, array(), power=2)
  compiled(shelf, scaled, array(), power=3)
  old, new = files(shelf)
  os.utime(old, (0, 0))
  shelf.tidy()
  assert files(shelf) == [new]


def test_only_a_commands_own_process_keeps_programs(shelf, monkeypatch):
  """Another program may have replaced parts of the package: neither may it read what files made, nor others what it made."""
  mesh = sharding.make_mesh()
  assert kept.shelf(mesh) is None
  monkeypatch.setattr(hosts, "own_process", lambda: True)
  monkeypatch.setattr(kept, "edited", lambda: False)
  assert kept.shelf(mesh).folder.parent.name == "cache"
  c = base.get_config()
  assert assemble.shelf(c, mesh)
  c.prune.rule = "my_rules.mine"  # may be another function by the next time
  assert assemble.shelf(c, mesh) is None
  monkeypatch.setattr(hosts, "several", lambda: True)
  assert kept.shelf(mesh) is None
  monkeypatch.setattr(hosts, "several", lambda: False)
  monkeypatch.setattr(kept, "edited", lambda: True)
  assert kept.shelf(mesh) is None
  monkeypatch.setattr(kept, "edited", lambda: False)
  assert kept.shelf(mesh)
  monkeypatch.setenv("XLA_FLAGS", "a_file_of_flags")
  assert kept.shelf(mesh) is None


RIDGE = {"quality__fit": "ridge", "quality__inputs": "('mean@2/3','prompt@2/3','logprobs','siblings')", "prune__rule": "budget",
         "prune__p_max": 1.0}


@pytest.mark.parametrize("settings", [RIDGE, {"mesh__fsdp": 2, "mesh__tensor": 2, "loss__kl_weight": 0.0}], ids=["one", "mesh"])
def test_the_same_command_again_reads_its_programs_and_does_the_same(tmp_path, settings):
  """Bit for bit. All but what calls LAPACK; on a mesh those stay out that the same arrays reach by another way."""
  devices = "4" if "mesh__fsdp" in settings else "1"
  environment = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"} | {
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "PYTHONPATH": str(ROOT)}
  off = {"steps": 3, "prune__cold_start": 1, "data__eval": "", "checkpoint__last": False}
  said, lines = [], []
  for name in "ab":
    argv = [sys.executable, "-m", "arrol_jax.train", *arguments(tmp_path / name, **off | settings),
            f"--compilation_cache={tmp_path}/cache"]
    done = subprocess.run(argv, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    said.append(next(line for line in (done.stdout + done.stderr).splitlines() if " programs in " in line))
    lines.append([{k: v for k, v in x.items() if not k.startswith("sec_")} for x in read(tmp_path / name / "metrics.jsonl")])
  assert said[0].startswith("compiled ") and json.dumps(lines[0]) == json.dumps(lines[-1])
  compiled, read_again = re.match(r"(?:compiled (\d+) and )?read (\d+) programs in ", said[1]).groups()
  assert int(read_again) > 10 and (devices == "1") <= int(compiled or 0) <= 6 * (devices == "4") + 1


@pytest.mark.parametrize("own", [True, False])
def test_a_command_leaves_pytorch_alone(tmp_path, own):
  """transformers and tensorboardX would import it, for what a command does not do; it can still be imported."""
  (tmp_path / "torch").mkdir()
  (tmp_path / "torch/__init__.py").write_text(
    "import builtins\nbuiltins.torch_was_imported = True\n__version__, Tensor = '2.9.0', float\n")
  (tmp_path / "torch-2.9.0.dist-info").mkdir()
  (tmp_path / "torch-2.9.0.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.9.0\n")
  script = f"""
import builtins, threading
from arrol_jax.models.files import tokenizers
from arrol_jax.running import hosts, loggers
def main():
  tokenizers.import_early()
  [t.join() for t in threading.enumerate() if t.name == "import transformers"]
  loggers.start("jsonl,tensorboard", {str(tmp_path)!r}, 0, dict())
  from transformers import PreTrainedTokenizerFast
  print(hasattr(builtins, "torch_was_imported"), bool(PreTrainedTokenizerFast))
  import torch
  print(torch.__version__)
hosts.process(main) if {own} else main()"""
  done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"},
                        capture_output=True, text=True, timeout=120)
  assert done.stdout.splitlines()[-2:] == [f"{not own} True", "2.9.0"], done.stderr
