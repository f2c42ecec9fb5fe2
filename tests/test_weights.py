"""Models in and out: parity with transformers on committed fixtures (made by make_fixtures.py), round trips, errors.

No torch is needed, but for the tests at the end, which skip without it.
"""

import dataclasses
import functools
import itertools
import json
from pathlib import Path
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from arrol_jax.models import sharding, transformer
from arrol_jax.models.files import safetensors
from arrol_jax.models.files.weights import Policy, load_policy
from arrol_jax.models.transformer import PolicyConfig, RopeScaling
from arrol_jax.prune import Calibration
from arrol_jax.pruning.head import init_head
from arrol_jax.types import UserError

FIXTURES = Path(__file__).parent / "fixtures"
NAMES = sorted(f.name for f in FIXTURES.iterdir())
SHARDED = "llama_tied_scaled"


@functools.cache
def fixture(name) -> Policy:
  return load_policy(FIXTURES / name)


def same(a, b):
  assert jax.tree.structure(a) == jax.tree.structure(b)
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    assert x.dtype == y.dtype
    np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def copy(name, tmp_path):
  return Path(shutil.copytree(FIXTURES / name, tmp_path / name))


def edit(file, **changes):
  value = json.loads(file.read_text()) | changes
  file.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def write(file, arrays):
  safetensors.write(file, [(n, a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()])


def rewrite(file, change):
  """Writes the safetensors `file` again with change({name: array})."""
  arrays = change({name: np.array(t.read()) for name, t in safetensors.read_header(file).items()})
  write(file, arrays)


def make(qkv_bias=False, tied=True, **options) -> Policy:
  """A random policy without tokenizer."""
  c = PolicyConfig("qwen2" if qkv_bias else "llama", vocab=20, width=16, layers=2, heads=2, kv_heads=1, head_dim=8,
                   ffn=24, qkv_bias=qkv_bias, tied=tied, **options)
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), transformer.abstract_params(c))
  return Policy(c, params, None, eos_ids=(3, 5), pad_id=1)


# ---- parity --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_logits_equal_those_of_transformers(name):
  want = np.load(FIXTURES / name / "expected.npz")
  got = fixture(name).logits(want["tokens"], want["lengths"])
  assert got.dtype == jnp.float32 and np.abs(want["logits"]).max() > 1.0
  np.testing.assert_allclose(got, want["logits"], rtol=0, atol=2e-4)  # also that it is 0 past a row's length


def test_fixtures_cover_what_they_are_for():
  configs = {name: fixture(name).config for name in NAMES}
  families = set(itertools.product(("qwen3", "qwen2", "llama"), (True, False)))
  assert {(c.family, c.tied) for c in configs.values()} == families
  assert any(c.head_dim * c.heads != c.width for c in configs.values())
  assert any(c.kv_heads < c.heads for c in configs.values())
  assert configs[SHARDED].rope_scaling == RopeScaling(4.0, 1.0, 4.0, 16) and configs[SHARDED].rope_theta == 500.0
  assert len(list((FIXTURES / SHARDED).glob("*.safetensors"))) > 1
  assert sum(f.stat().st_size for f in FIXTURES.rglob("*") if f.is_file()) < 300_000


def test_older_config_files_mean_the_same(tmp_path):
  folder = copy(SHARDED, tmp_path)
  rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
  theta = rope.pop("rope_theta")
  rope["type"] = rope.pop("rope_type")
  edit(folder / "config.json", rope_parameters=None, rope_theta=theta, rope_scaling=rope)
  assert load_policy(folder).config == fixture(SHARDED).config


def test_absent_keys_take_the_defaults_of_transformers(tmp_path):
  folder = copy("llama_untied", tmp_path)
  want = load_policy(folder).config
  edit(folder / "config.json", head_dim=None, tie_word_embeddings=None, rms_norm_eps=None, rope_parameters=None)
  assert load_policy(folder).config == want


def test_several_ends_and_the_pad_id_are_read():
  loaded = fixture("qwen3_untied")
  assert loaded.eos_ids == (3, 5) and loaded.pad_id == 1 and loaded.tokenizer is None
  assert loaded.generation["eos_token_id"] == [3, 5]
  assert fixture(SHARDED).eos_ids == (2,) and fixture(SHARDED).pad_id == 2


# ---- loading -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [SHARDED, "qwen2_untied", "qwen3_untied"])
@pytest.mark.parametrize("table", ["TRAIN", "DECODE"])
def test_sharded_load_equals_unsharded(name, table):
  mesh, table = sharding.make_mesh(2, 2, 2), getattr(sharding, table)
  plain, spread = fixture(name), load_policy(FIXTURES / name, mesh=mesh, table=table)
  same(plain.params, spread.params)
  want = sharding.shardings(transformer.logical_axes(plain.config), plain.params, mesh, table)
  assert all(jax.tree.leaves(jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), spread.params, want)))
  tokens, lengths = np.arange(6, dtype=np.int32).reshape(2, 3), [3, 2]
  np.testing.assert_allclose(spread.logits(tokens, lengths), plain.logits(tokens, lengths), atol=1e-5)
  assert spread.params["layers"]["gate"].sharding.spec[2] == "tensor"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_dtype_on_load_is_the_callers(dtype):
  plain, small = fixture(SHARDED), load_policy(FIXTURES / SHARDED, dtype=dtype)
  same(small.params, jax.tree.map(lambda x: x.astype(dtype), plain.params))
  logits = small.logits(np.arange(8)[None], [8])
  assert logits.dtype == jnp.float32
  np.testing.assert_allclose(logits, plain.logits(np.arange(8)[None], [8]), atol=1.0)  # of some 20 in size


def test_float64_files_are_read(tmp_path):
  folder = copy("qwen2_tied", tmp_path)
  rewrite(folder / "model.safetensors", lambda a: {k: v.astype(np.float64) for k, v in a.items()})
  same(load_policy(folder).params, fixture("qwen2_tied").params)


def test_parameters_outlive_their_files(tmp_path):
  folder = copy("qwen2_tied", tmp_path)
  loaded = load_policy(folder)
  for file in folder.glob("*.safetensors"):  # in place, so that parameters which alias the map would change with it
    size = file.stat().st_size
    with open(file, "r+b") as f:
      f.write(b"\0" * size)
  same(loaded.params, fixture("qwen2_tied").params)


# ---- saving --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shard_bytes", [10**9, 4_000])
def test_round_trip_is_exact(name, shard_bytes, tmp_path):
  first = fixture(name)
  first.save(tmp_path / "out", shard_bytes=shard_bytes)
  again = load_policy(tmp_path / "out")
  same(first.params, again.params)
  assert (again.config, again.eos_ids, again.pad_id) == (first.config, first.eos_ids, first.pad_id)
  files = list((tmp_path / "out").glob("*.safetensors"))
  assert (len(files) == 1) == (shard_bytes == 10**9)
  last = f"model-{len(files):05d}-of-{len(files):05d}.safetensors"
  assert len(files) == 1 or sorted(f.name for f in files)[-1] == last
  shapes = lambda files: {t: s.shape for f in files for t, s in safetensors.read_header(f).items()}
  assert shapes(files) == shapes((FIXTURES / name).glob("*.safetensors"))


def test_round_trip_from_a_mesh_and_in_another_dtype(tmp_path):
  spread = load_policy(FIXTURES / SHARDED, mesh=sharding.make_mesh(2, 2, 2))
  spread.save(tmp_path / "out", dtype="bfloat16")
  again = load_policy(tmp_path / "out", dtype="bfloat16")
  same(again.params, jax.tree.map(lambda x: x.astype("bfloat16"), spread.params))
  tensor = safetensors.read_header(tmp_path / "out" / "model.safetensors")["model.norm.weight"].read()
  assert tensor.dtype == ml_dtypes.bfloat16
  assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


def test_files_are_read_and_written_like_the_safetensors_package(tmp_path):
  from safetensors.numpy import load_file, save_file
  arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.float16([1.5]),
            "c": np.zeros((0, 2), np.float32), "d": np.array(7, np.int32), "e": np.array([True, False])}
  save_file(arrays, tmp_path / "theirs.safetensors")
  write(tmp_path / "ours.safetensors", arrays)
  ours = {n: t.read() for n, t in safetensors.read_header(tmp_path / "theirs.safetensors").items()}
  theirs = load_file(tmp_path / "ours.safetensors")
  assert set(ours) == set(theirs) == set(arrays)
  for name, a in arrays.items():
    np.testing.assert_array_equal(ours[name], a, strict=True)
    np.testing.assert_array_equal(theirs[name], a, strict=True)


def test_head_and_calibration_travel_in_a_file_of_their_own(tmp_path):
  model = make()
  model.head = init_head(16, 4, jax.random.key(1))
  model.calibration = Calibration(jnp.arange(128.0), jnp.arange(128.0)[::-1])
  model.save(tmp_path / "out")
  again = load_policy(tmp_path / "out")
  same(model.head, again.head)
  same(model.calibration, again.calibration)
  names = safetensors.read_header(tmp_path / "out" / "model.safetensors")
  assert all(n.startswith("model.") for n in names) and (tmp_path / "out" / "quality_head.safetensors").is_file()
  model.head = model.calibration = None
  model.save(tmp_path / "out")  # and goes away with the next model that has none
  assert load_policy(tmp_path / "out").head is None and not (tmp_path / "out" / "quality_head.safetensors").exists()


def test_a_failed_save_leaves_the_existing_folder(tmp_path, monkeypatch):
  model = make()
  model.save(tmp_path / "out")
  before = {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()}

  def full(path, tensors):
    path.write_bytes(b"half")
    raise OSError("no space left on device")
  monkeypatch.setattr(safetensors, "write", full)
  with pytest.raises(OSError, match="no space"):
    model.save(tmp_path / "out")
  assert {f.name: f.read_bytes() for f in (tmp_path / "out").iterdir()} == before
  assert [f.name for f in tmp_path.iterdir()] == ["out"]


def test_a_failed_last_step_puts_the_existing_folder_back(tmp_path, monkeypatch):
  make().save(tmp_path / "out")
  rename = Path.rename

  def failing(path, target):
    if Path(target).name == "out" and not path.name.endswith(".old"):
      raise OSError("no")
    return rename(path, target)
  monkeypatch.setattr(Path, "rename", failing)
  with pytest.raises(OSError, match="no"):
    make(qkv_bias=True, tied=False).save(tmp_path / "out")
  assert load_policy(tmp_path / "out").config.family == "llama" and [f.name for f in tmp_path.iterdir()] == ["out"]


def test_save_replaces_a_model_and_nothing_else(tmp_path):
  make().save(tmp_path / "out", shard_bytes=2_000)
  make(qkv_bias=True, tied=False).save(tmp_path / "out")
  assert load_policy(tmp_path / "out").config.family == "qwen2"
  assert len(list((tmp_path / "out").glob("*.safetensors"))) == 1
  (tmp_path / "out" / "notes.txt").write_text("mine")
  with pytest.raises(UserError, match="notes.txt"):
    make().save(tmp_path / "out")
  with pytest.raises(UserError, match="is a file"):
    make().save(tmp_path / "out" / "notes.txt")
  odd = make()
  odd.config = PolicyConfig("llama", 20, 16, 2, 2, 1, 8, 24, qk_norm=True)
  with pytest.raises(UserError, match="no Hugging Face layout"):
    odd.save(tmp_path / "new")
  assert sorted(f.name for f in tmp_path.iterdir()) == ["out"]


# ---- errors --------------------------------------------------------------------------------------------------


def message(call, *args) -> str:
  with pytest.raises(UserError) as e:
    call(*args)
  assert "\n" not in str(e.value)
  return str(e.value)


def test_missing_folder_weights_and_config(tmp_path):
  assert "no/such: no such model" in message(load_policy, "no/such")
  assert f"{tmp_path / 'config.json'}: no such file" in message(load_policy, tmp_path)
  folder = copy("qwen2_tied", tmp_path)
  (folder / "model.safetensors").unlink()
  assert f"{folder}: no weights here" in message(load_policy, folder)
  (folder / "config.json").write_text("{")
  assert "config.json: not valid JSON" in message(load_policy, folder)
  assert "dtype 'int8'" in message(load_policy, folder, "int8")


@pytest.mark.parametrize("changes, text", [
  ({"model_type": "mamba"}, "model_type 'mamba' is not supported"), ({"model_type": None}, "model_type None is not supported"),
  ({"hidden_size": None}, "key hidden_size is None"), ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
  ({"attention_bias": True}, "attention_bias is set"), ({"mlp_bias": True}, "mlp_bias is set"),
  ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config is set"),
  ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0, "rope_theta": 1e4}}, "rope type 'longrope'"),
  ({"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "rope scaling llama3 needs"),
  ({"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
  ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; it must be an object"),
  ({"rope_scaling": {"factor": 2.0}}, "has a factor (2.0) and no rope_type"),
  ({"num_key_value_heads": 3}, "not a multiple"),
  ({"num_key_value_heads": "two"}, "num_key_value_heads is 'two'; it must be a positive whole number"),
  ({"head_dim": 0}, "head_dim is 0"), ({"max_position_embeddings": "64"}, "max_position_embeddings is '64'"),
  ({"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'; it must be a number above 0"),
  ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"), ({"rms_norm_eps": 0}, "rms_norm_eps is 0"),
  ({"rope_parameters": {"rope_theta": "abc"}}, "rope_parameters.rope_theta is 'abc'"), ({"rope_theta": 0}, "rope_theta is 0"),
  ({"rope_parameters": []}, "rope_parameters is []; it must be an object"),
  ({"tie_word_embeddings": "true"}, "tie_word_embeddings is 'true'; it must be true or false"),
  ({"eos_token_id": True}, "eos_token_id is True; it must be a token id"), ({"eos_token_id": [1, 18.0]}, "is [1, 18.0]"),
  ({"layer_types": 5}, "wrong kind"),
  ({"model_type": "qwen2", "layer_types": ["full_attention", "sliding_attention"]}, "sliding window"),
  ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}, "sliding window"),
])
def test_unsupported_configurations(changes, text, tmp_path):
  folder = copy(SHARDED, tmp_path)
  edit(folder / "config.json", **changes)
  assert text in message(load_policy, folder) and "config.json" in message(load_policy, folder)


def test_a_sliding_window_that_no_layer_uses_is_fine(tmp_path):
  folder = copy("qwen2_tied", tmp_path)
  edit(folder / "config.json", use_sliding_window=True, sliding_window=8, max_window_layers=2, layer_types=None)
  load_policy(folder)
  edit(folder / "config.json", use_sliding_window=False, sliding_window=8, max_window_layers=1)
  load_policy(folder)


def test_damaged_files_name_file_and_tensor(tmp_path):
  folder = copy("qwen2_tied", tmp_path)
  file = folder / "model.safetensors"
  whole = file.read_bytes()
  file.write_bytes(whole[:-10])
  last = list(safetensors.read_header(FIXTURES / "qwen2_tied" / "model.safetensors"))[-1]
  assert f"{file}: truncated, tensor {last} ends 10 bytes past" in message(load_policy, folder)
  file.write_bytes(whole[:100])
  assert f"{file}: truncated or not a safetensors file" in message(load_policy, folder)
  file.write_bytes(b"")
  assert f"{file}: truncated or not a safetensors file" in message(load_policy, folder)
  file.write_bytes(whole[:8] + b"x" + whole[9:])
  assert f"{file}: not a safetensors file" in message(load_policy, folder)


def test_wrong_tensors_name_file_and_tensor(tmp_path):
  folder = copy("qwen2_tied", tmp_path)
  file, name = folder / "model.safetensors", "model.layers.1.mlp.down_proj.weight"
  rewrite(file, lambda a: a | {name: a[name].T})
  text = f"{file}: tensor {name} has shape [28, 16], the configuration asks for [16, 28]"
  assert text in message(load_policy, folder)
  rewrite(file, lambda a: {k: v for k, v in a.items() if k != name})
  assert f"{file}: tensor {name} is missing" in message(load_policy, folder)
  rewrite(file, lambda a: a | {name: np.zeros((16, 28), np.int32)})
  assert f"{file}: tensor {name} holds int32" in message(load_policy, folder)
  bias = "model.layers.1.self_attn.o_proj.bias"
  rewrite(file, lambda a: a | {name: np.zeros((16, 28), np.float32), bias: np.zeros(16, np.float32)})
  assert f"{file}: tensor {bias} is not part of a qwen2 model of 2 layers" in message(load_policy, folder)
  rewrite(file, lambda a: {k: v for k, v in a.items() if k != bias} | {"v_head.weight": np.zeros(3, np.float32)})
  load_policy(folder)  # what lies outside the model is left alone


def test_an_index_that_is_not_true(tmp_path):
  folder = copy(SHARDED, tmp_path)
  index = folder / "model.safetensors.index.json"
  names = json.loads(index.read_text())["weight_map"]
  edit(index, weight_map=names | {"model.norm.weight": "model-9.safetensors"})
  assert f"{folder / 'model-9.safetensors'}: no such file, but {index.name} says it holds model.norm.weight" in \
    message(load_policy, folder)
  edit(index, weight_map=names | {"model.layers.0.extra": names["model.norm.weight"]})
  assert "tensor model.layers.0.extra is missing" in message(load_policy, folder)
  edit(index, weight_map=None)
  assert f"{index}: no weight_map" in message(load_policy, folder)


@pytest.mark.parametrize("tokens, lengths, words", [
  ([1, 2], [2], "lengths"), ([[1, 2, 20]], [3], "0 to 19.*1 to 20"), ([[1, -2]], [2], "-2"), ([[2**40]], [1], "vocabulary"),
  ([[1.0, 2.0, 3.0]], [3], "integers"), ([[True, False]], [2], "integers"), ([[1, 2, 3]], [3.0], "integers"),
  ([[1, 2, 3]], [4], "3 columns"), ([[1, 2], [1, 2]], [2, -1], "-1 to 2"), (np.zeros((0, 3)), np.zeros(0, int), "integers"),
  (np.zeros((2, 3), np.int32), [3], "lengths")])
def test_logits_of_what_cannot_be_are_refused(tokens, lengths, words):
  with pytest.raises(ValueError, match=words):
    make().logits(tokens, lengths)


def test_what_stands_behind_a_rows_length_is_nobodys():
  policy = make()
  plain = policy.logits([[1, 2, 0, 0], [3, 4, 5, 6]], [2, 4])
  np.testing.assert_array_equal(policy.logits(np.array([[1, 2, -100, 10**6], [3, 4, 5, 6]]), [2, 4]), plain)
  assert np.isfinite(plain).all() and not np.any(plain[0, 2:])
  assert policy.logits(np.zeros((0, 3), np.int32), np.zeros(0, np.int32)).shape[:2] == (0, 3)


# ---- with torch ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_transformers_loads_what_was_saved(name, tmp_path):
  torch = pytest.importorskip("torch")
  from transformers import AutoModelForCausalLM
  want = np.load(FIXTURES / name / "expected.npz")
  model = dataclasses.replace(fixture(name), head=init_head(16, 4, jax.random.key(1)))
  model.save(tmp_path / "out", shard_bytes=5_000)
  theirs, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
  assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
  with torch.no_grad():
    tokens = torch.tensor(want["tokens"][:1]).long()
    np.testing.assert_allclose(theirs.float()(tokens).logits[0], want["logits"][0], rtol=0, atol=2e-5)
  assert theirs.config.eos_token_id == ([*model.eos_ids, None][0] if len(model.eos_ids) < 2 else list(model.eos_ids))
  theirs.save_pretrained(tmp_path / "theirs")
  same(load_policy(tmp_path / "theirs").params, model.params)
