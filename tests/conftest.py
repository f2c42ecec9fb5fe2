"""Tests run on the CPU with 8 forced devices, refuse silent rank promotion and turn warnings into errors."""

import atexit
import gc
from importlib.metadata import version
import os
from pathlib import Path
import shutil
import signal
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
# Programs are compiled once, by whichever test or process comes first. pytest-xdist's workers and the commands that tests start
# inherit the folder; the process that made it, the only one or xdist's controller, removes it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
  os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="arrol_tests_")
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
# Programs run for milliseconds here: what counts is how fast they are compiled, a third of the usual time so. Commands that tests
# start inherit this and the devices; one that needs other devices sets JAX_NUM_CPU_DEVICES.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
if "PYTEST_XDIST_WORKER" not in os.environ and version("jaxlib").startswith("0.10."):  # an XLA without these flags would end
  os.environ["XLA_FLAGS"] = " ".join([
    os.environ.get("XLA_FLAGS", ""), "--xla_cpu_use_fusion_emitters=false", "--xla_cpu_parallel_codegen_split_count=1"]).strip()

if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:  # as under nohup
  signal.signal(signal.SIGHUP, signal.SIG_DFL)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # a shell started the tests in the background; some of them send it
  signal.signal(signal.SIGINT, signal.default_int_handler)

import jax  # noqa: E402  (after the environment is set)
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
pytest.register_assert_rewrite("helpers_serve", "helpers_train")


def pytest_collection_modifyitems(items):
  """Files with slow tests come first, so that no worker is left alone with one at the end."""
  slow = {item.path for item in items if item.get_closest_marker("slow")}
  items.sort(key=lambda item: item.path not in slow)


MAPS = 20_000


@pytest.fixture(scope="module", autouse=True)
def programs_go_when_they_are_many():
  """Each compiled CPU program holds a few memory maps; kept over the whole suite they come to more than Linux gives a process
  (65,530), and the compiler then crashes. Below that the next file has what this one traced and compiled."""
  yield
  maps = Path("/proc/self/maps")
  if not maps.exists() or maps.read_bytes().count(b"\n") > MAPS:
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session")
def mesh():
  """A mesh of one device."""
  from arrol_jax.models import sharding
  return sharding.make_mesh()


@pytest.fixture(scope="session")
def head():
  """A quality head for states of width 32 with random weights in both layers: its scores differ."""
  from arrol_jax.pruning.head import init_head
  out = init_head(32, 8, jax.random.key(1))
  return out | {"w2": jax.random.normal(jax.random.key(2), out["w2"].shape)}


@pytest.fixture(scope="session")
def table():
  """A history in which higher scores went with success, in 8 bins."""
  import jax.numpy as jnp

  from arrol_jax.prune import Calibration
  return Calibration(jnp.array([1, 0, 2, 3, 6, 9, 4, 5], jnp.float32), jnp.array([7, 4, 8, 5, 3, 2, 1, 0], jnp.float32))


@pytest.fixture(scope="session")
def done(tmp_path_factory):
  """A finished run of three steps (helpers_train.py's FAST); its folder, to be read."""
  from helpers_train import FAST, run
  folder = tmp_path_factory.mktemp("done")
  run(folder, **FAST)
  return folder


@pytest.fixture
def copied(done, tmp_path):
  """A copy of it, as if it had been killed before its end."""
  folder = Path(shutil.copytree(done, tmp_path / "run"))
  (folder / "summary.json").unlink()
  return folder


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
  """A served model's folder (helpers_serve.py)."""
  from helpers_serve import export
  return export(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(exported):
  """A server of it in this process."""
  from helpers_serve import serving
  with serving(exported) as out:
    yield out


@pytest.fixture
def access(server):
  """set(Access) for a test."""
  before = server.web.access
  def put(access):
    server.web.access = access
  yield put
  server.web.access = before
