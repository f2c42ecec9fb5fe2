"""Checkpoints: what stays, what a damaged or unfinished one does, and that another mesh restores the same state."""

import gc
from pathlib import Path
import resource
import threading
import time

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np
import pytest

from arrol_jax.models import sharding
from arrol_jax.prune import Calibration
from arrol_jax.running.checkpoint import Checkpoints, checksums
from arrol_jax.types import TrainState, UserError

# When one array cannot be read or written, orbax drops the work on the others unfinished; Python remarks on that.
pytestmark = [pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
              pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning")]
OURS = {"config_hash": "abc", "root_key": [0, 7]}


@pytest.fixture(autouse=True)
def remarks_come_here():
  yield
  gc.collect()  # and not in whatever test comes next


def make(seed: int, rows: tuple = (), mesh=None) -> TrainState:
  """A state whose leaves have several dtypes and sizes, sharded over `mesh`."""
  policy = jax.random.normal(jax.random.key(seed), (64, 129))
  state = TrainState({"policy": policy, "head": jnp.float32(seed)}, (jnp.ones(5, jnp.bfloat16), jnp.int32(seed)),
                     Calibration.empty(4), jnp.int32(seed))
  target = NamedSharding(mesh or sharding.make_mesh(), PartitionSpec(*rows))
  put = lambda x: jax.device_put(x, target if x.ndim == 2 else NamedSharding(target.mesh, PartitionSpec()))
  return jax.tree.map(put, state)


def save(folder, *steps, keep=2, scores=None) -> None:
  checkpoints = Checkpoints(str(folder), keep, OURS)
  for i, step in enumerate(steps):
    checkpoints.save(step, make(step), scores and scores[i])
  checkpoints.close()


def restore(folder, like=None, belongs=OURS, step=None):
  checkpoints = Checkpoints(str(folder), 2, belongs)
  try:
    return checkpoints.restore(make(0) if like is None else like, step)
  finally:
    checkpoints.close()


def same(state, seed) -> None:
  for got, want in zip(jax.tree.leaves(state), jax.tree.leaves(make(seed)), strict=True):
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def biggest(folder: Path, step: int) -> Path:
  """The file that holds most of a checkpoint."""
  return max((f for f in (folder / "checkpoints" / str(step)).rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def damage(path: Path, where: float, how: str) -> None:
  data = bytearray(path.read_bytes())
  at = int(where * (len(data) - 1))
  if how == "truncated":
    del data[at:]
  else:
    data[at] ^= 1 << 3
  path.write_bytes(bytes(data))


def test_without_a_checkpoint_the_state_stays(tmp_path):
  step, state = restore(tmp_path, make(5))
  assert step == 0
  same(state, 5)


def test_the_newest_stay_and_the_best_one(tmp_path):
  save(tmp_path, 1, 2, 3, 4, 5, scores=[0.1, 0.9, 0.3, None, 0.2])
  checkpoints = Checkpoints(str(tmp_path), 2, OURS)  # scores are read back: the best one of an earlier run stays too
  assert checkpoints.steps() == [2, 4, 5] and checkpoints.latest() == 5 and checkpoints.best() == 2
  checkpoints.save(6, make(6), 0.95)
  checkpoints.save(7, make(7), 0.5)
  checkpoints.save(7, make(1), 0.5)  # is there: left as it is
  checkpoints.close()
  assert sorted(f.name for f in (tmp_path / "checkpoints").iterdir()) == ["6", "7"]
  same(restore(tmp_path)[1], 7)
  same(restore(tmp_path, step=6)[1], 6)


@pytest.mark.parametrize("how", ["truncated", "flipped"])
@pytest.mark.parametrize("where", [0.0, 0.5])
def test_a_damaged_checkpoint_is_named_set_aside_and_made_again(tmp_path, capsys, where, how):
  save(tmp_path, 1, 2)
  damage(biggest(tmp_path, 2), where, how)
  step, state = restore(tmp_path)
  assert step == 1
  same(state, 1)
  said = capsys.readouterr().out
  assert said.startswith(f"{tmp_path}: checkpoint 2 is damaged (") and said.endswith("); falling back to the one before\n")
  assert (tmp_path / "damaged" / "2.0").is_dir() and not (tmp_path / "checkpoints" / "2").exists()
  save(tmp_path, 2)
  same(restore(tmp_path)[1], 2)


@pytest.mark.parametrize("name", ["_CHECKPOINT_METADATA", "default/_METADATA", "default/manifest.ocdbt"])
def test_every_kind_of_file_may_be_damaged(tmp_path, name):
  save(tmp_path, 1, 2)
  damage(tmp_path / "checkpoints" / "2" / name, 0.5, "truncated")
  step, state = restore(tmp_path)
  assert step == 1
  same(state, 1)


def test_a_damaged_hash_is_damage_and_no_other_run(tmp_path):
  save(tmp_path, 1, 2)
  path = tmp_path / "checkpoints" / "2" / "_CHECKPOINT_METADATA"
  path.write_text(path.read_text().replace('"abc"', '"abb"'))
  assert restore(tmp_path)[0] == 1


def test_one_wrong_number_is_found(tmp_path, monkeypatch, capsys):
  """Files that decode but hold another number, as a flipped bit in memory on the way to the disk leaves behind."""
  save(tmp_path, 1)
  checkpoints = Checkpoints(str(tmp_path), 2, OURS)
  real = checkpoints.manager.save
  state = make(2)
  bits = jax.lax.bitcast_convert_type(state.params["policy"], jnp.uint32).at[3, 100].add(1)
  wrong = state.replace(params=state.params | {"policy": jax.lax.bitcast_convert_type(bits, jnp.float32)})
  monkeypatch.setattr(checkpoints.manager, "save", lambda step, args, **k: real(
    step, args=type(args)(jax.tree.leaves(wrong)), **k))
  checkpoints.save(2, state)
  checkpoints.close()
  assert restore(tmp_path)[0] == 1 and "checksum" in capsys.readouterr().out


def test_when_all_are_damaged_the_run_does_not_start_anew(tmp_path):
  save(tmp_path, 1)
  damage(biggest(tmp_path, 1), 0.5, "truncated")
  with pytest.raises(UserError, match=r"no checkpoint can be read \(tried \[1\]\)"):
    restore(tmp_path)


@pytest.mark.parametrize("name", ["config_hash", "root_key"])
def test_a_checkpoint_of_another_run_is_refused(tmp_path, name):
  save(tmp_path, 1)
  with pytest.raises(UserError, match=f"another {name}"):
    restore(tmp_path, belongs=OURS | {name: "other"})
  same(restore(tmp_path, belongs=None)[1], 1)


def test_another_model_is_refused(tmp_path):
  save(tmp_path, 1)
  like = make(0)
  with pytest.raises(UserError, match="does not fit"):
    restore(tmp_path, like.replace(step=jnp.zeros(3)))


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_another_mesh_restores_the_same_state(tmp_path, shape):
  """Saved on one device, restored on eight; and back."""
  save(tmp_path, 3)
  mesh = sharding.make_mesh(*shape)
  like = make(0, (("data", "tensor"),), mesh)
  step, state = restore(tmp_path, like)
  same(state, 3)
  assert state.params["policy"].sharding.is_equivalent_to(like.params["policy"].sharding, 2)
  checkpoints = Checkpoints(str(tmp_path / "other"), 1, OURS)
  checkpoints.save(step, state)
  checkpoints.close()
  same(restore(tmp_path / "other")[1], 3)


def test_a_checksum_sees_every_bit_and_no_mesh():
  x = jax.random.normal(jax.random.key(0), (16, 24))
  plain = np.asarray(checksums([x, x.astype(jnp.bfloat16), jnp.int32(5)]))
  for bit in (0, 1, 15, 31):
    flipped = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.uint32).at[7, 11].add(jnp.uint32(1) << bit),
                                           jnp.float32)
    assert np.asarray(checksums([flipped, x, jnp.int32(5)]))[0] != plain[0]
  assert np.asarray(checksums([jnp.roll(x, 1, axis=1), x, jnp.int32(5)]))[0] != plain[0]
  cut = jax.device_put(x, NamedSharding(sharding.make_mesh(2, 2, 2), PartitionSpec(("data", "fsdp"), "tensor")))
  assert np.asarray(checksums([cut, x.astype(jnp.bfloat16), jnp.int32(5)])).tolist() == plain.tolist()


@pytest.fixture
def small_files():
  """No file may grow past 8 KiB: a disk that fills up in the middle of a save."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, before[1]))
  resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(tmp_path, small_files, caplog, capfd):
  save(tmp_path, 1, keep=1)
  checkpoints = Checkpoints(str(tmp_path), 1, OURS)
  small_files()
  with pytest.raises(UserError, match=r"a checkpoint could not be written \(File too large\); make room"):
    checkpoints.save(2, make(2))
    checkpoints.wait()
  checkpoints.close()  # waits for nothing
  gc.collect()
  assert capfd.readouterr().err == "" and not caplog.records  # neither orbax's threads nor what they leave say more
  late = [t for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]
  assert not [t.name for t in late if "save" in t.name or "setting_result" in t.name]  # nor do they hold the process
  resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
  step, state = restore(tmp_path)
  assert step == 1
  same(state, 1)
  for _ in range(100):  # orbax clears what was half written in a thread of its own, and two of them would be in each other's way
    if [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["1"]:
      break
    time.sleep(0.1)
  save(tmp_path, 2, keep=1)  # what was half written is no hindrance
  assert restore(tmp_path)[0] == 2 and [f.name for f in (tmp_path / "checkpoints").iterdir()] == ["2"]
