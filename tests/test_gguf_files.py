"""GGUF files written here with the gguf package load to the logits of the committed fixtures; damaged ones say so."""

import functools
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from arrol_jax.models.files import gguf as gguf_files
from arrol_jax.models.files.weights import load_policy
from arrol_jax.models.transformer import RopeScaling
from arrol_jax.types import UserError

FIXTURES = Path(__file__).parent / "fixtures"
F32, F16, Q8_0 = gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.Q8_0
NAMES = {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
         "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm",
         "self_attn.k_norm": "attn_k_norm", "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate",
         "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "model.embed_tokens": "token_embd",
         "model.norm": "output_norm", "lm_head": "output"}


@functools.cache
def fixture(name):
  """The fixture's policy and its tensors under Hugging Face's names."""
  arrays = {}
  for file in (FIXTURES / name).glob("*.safetensors"):
    arrays |= load_file(file)
  return load_policy(FIXTURES / name), arrays


def to_gguf(name: str) -> str:
  stem, kind = name.rsplit(".", 1)
  if name.startswith("model.layers."):
    layer, stem = stem.removeprefix("model.layers.").split(".", 1)
    return f"blk.{layer}.{NAMES[stem]}.{kind}"
  return f"{NAMES[stem]}.{kind}"


def permute(w, heads):
  """Row order of q and k in llama files, as llama.cpp's converter makes it."""
  return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def write(path, name, kind=F32, tensors=None, **metadata):
  """The fixture `name` as a GGUF file; `tensors` are added or replace others, `metadata` overrides keys."""
  c, arrays = fixture(name)[0].config, dict(fixture(name)[1])
  writer = gguf.GGUFWriter(str(path), c.family)
  keys = {"embedding_length": c.width, "block_count": c.layers, "feed_forward_length": c.ffn,
          "context_length": c.max_length, "rope.freq_base": c.rope_theta, "attention.head_count": c.heads,
          "attention.head_count_kv": c.kv_heads, "attention.key_length": c.head_dim,
          "attention.value_length": c.head_dim, "attention.layer_norm_rms_epsilon": c.norm_eps}
  keys |= {key.replace("__", "."): value for key, value in metadata.items()}
  for key, value in keys.items():
    {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](f"{c.family}.{key}", value)
  for key, w in arrays.items():
    if c.family == "llama" and ".q_proj" in key or c.family == "llama" and ".k_proj" in key:
      w = permute(w, c.heads if ".q_proj" in key else c.kv_heads)
    fits = w.ndim > 1 and w.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0
    use = kind if fits else F32
    writer.add_tensor(to_gguf(key), gguf.quants.quantize(w, use), raw_dtype=use)
  for key, w in (tensors or {}).items():
    writer.add_tensor(key, w)
  if c.rope_scaling:
    writer.add_tensor("rope_freqs.weight", gguf_files.rope_divisors(c.rope_scaling, c.head_dim, c.rope_theta))
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  return path


@pytest.mark.parametrize("order", list(gguf.GGUFEndian))
def test_metadata_are_what_the_package_reads(tmp_path, order):
  """Arrays are read by a way of our own: all kinds, empty ones, in both orders of bytes."""
  writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama", endianess=order)
  for name, value in {"text": ["a", "", "ä b", "x" * 300], "whole": [1, -2, 3], "real": [0.5, 2.0], "flags": [True, False],
                      "nested": [[1, 2], [3]]}.items():
    writer.add_array(name, value)
  writer.add_uint32("after", 7)
  writer.add_tensor("token_embd.weight", np.ones((2, 4), np.float32))
  for work in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
    work()
  ours, theirs = ({k: field.contents() for k, field in reader(tmp_path / "m.gguf").fields.items()}
                  for reader in (gguf_files._Reader, gguf.GGUFReader))
  assert ours == theirs and ours["text"][2] == "ä b" and ours["after"] == 7


@pytest.mark.parametrize("name", ["qwen3_tied", "qwen2_untied", "llama_untied"])
def test_float32_file_is_exact(name, tmp_path):
  want, expected = fixture(name)[0], np.load(FIXTURES / name / "expected.npz")
  got = load_policy(write(tmp_path / "m.gguf", name))
  assert got.config == want.config and got.tokenizer is None
  jax.tree.map(np.testing.assert_array_equal, got.params, want.params)
  np.testing.assert_allclose(got.logits(expected["tokens"], expected["lengths"]), expected["logits"], rtol=0, atol=2e-4)


def test_float16_file(tmp_path):
  got, want = load_policy(write(tmp_path / "m.gguf", "qwen2_tied", F16)), fixture("qwen2_tied")[0]
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), got.params, want.params)
  assert np.any(got.params["embed"] != want.params["embed"])


def test_quantised_rows_are_dequantised_in_chunks_before_they_are_put_in_order(tmp_path, monkeypatch):
  rng = np.random.default_rng(0)
  name = "blk.0.attn_q.weight"
  rows = rng.normal(size=(8, 64)).astype(np.float32)  # 2 heads of 4
  writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "llama")
  for key, value in {"embedding_length": 64, "block_count": 1, "feed_forward_length": 8, "context_length": 8,
                     "attention.head_count": 2, "attention.key_length": 4}.items():
    writer.add_uint32(f"llama.{key}", value)
  writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-6)
  writer.add_tensor("token_embd.weight", np.zeros((4, 64), np.float32))
  writer.add_tensor(name, gguf.quants.quantize(permute(rows, 2), Q8_0), raw_dtype=Q8_0)
  writer.write_header_to_file()
  writer.write_kv_data_to_file()
  writer.write_tensors_to_file()
  writer.close()
  tensor = gguf_files.open_gguf(tmp_path / "m.gguf").tensors["model.layers.0.self_attn.q_proj.weight"]
  exact = gguf.quants.dequantize(gguf.quants.quantize(rows, Q8_0), Q8_0)
  assert tensor.shape == (8, 64)
  for chunk in (gguf_files._CHUNK, 96, 1):  # 16 blocks at once, by threes, one by one
    monkeypatch.setattr(gguf_files, "_CHUNK", chunk)
    np.testing.assert_array_equal(tensor.read(), exact)
  np.testing.assert_allclose(tensor.read(), rows, atol=0.03)


def test_unpermute_by_hand():
  rows = np.array([0, 2, 1, 3, 10, 12, 11, 13])[:, None]  # two heads of 4: (0, 2), (1, 3) are the rotated pairs
  np.testing.assert_array_equal(gguf_files.unpermute(rows, 2)[:, 0], [0, 1, 2, 3, 10, 11, 12, 13])


def test_llama3_rope_scaling_comes_back_from_its_divisors(tmp_path):
  c = fixture("llama_untied")[0].config  # head_dim 8
  scaling = RopeScaling(32.0, 1.0, 4.0, 8192)
  divisors = gguf_files.rope_divisors(scaling, c.head_dim, 5e5)
  path = write(tmp_path / "m.gguf", "llama_untied", tensors={"rope_freqs.weight": divisors}, rope__freq_base=5e5)
  assert load_policy(path).config.rope_scaling == scaling
  assert divisors[0] == 1.0 and divisors[-1] == 32.0
  odd = {"rope_freqs.weight": divisors[::-1].copy()}
  path = write(tmp_path / "n.gguf", "llama_untied", tensors=odd, rope__freq_base=5e5)
  assert "tensor rope_freqs.weight is not Llama 3's" in message(path)
  path = write(tmp_path / "o.gguf", "llama_tied_scaled")  # its original length is 16
  assert "tensor rope_freqs.weight is not Llama 3's" in message(path)


def message(path) -> str:
  with pytest.raises(UserError) as e:
    load_policy(path)
  assert "\n" not in str(e.value) and str(e.value).startswith(f"{path}: ")
  return str(e.value)


@pytest.mark.parametrize("metadata, text", [
  ({"rope__scaling__type": "yarn"}, "llama.rope.scaling.type = yarn is not supported"),
  ({"expert_count": 8}, "llama.expert_count = 8 is not supported"),
  ({"rope__dimension_count": 4}, "llama.rope.dimension_count = 4 is not supported"),
  ({"block_count": "two"}, "metadata key llama.block_count is 'two'"),
  ({"attention__head_count": 0}, "metadata key llama.attention.head_count is 0"),
  ({"block_count": 10**9}, "cannot be those of 1000000000 layers"),
  ({"block_count": 3}, "tensor model.layers.2.input_layernorm.weight is missing"),
  ({"block_count": 1}, "tensor model.layers.1.input_layernorm.weight is not part of"),
  ({"feed_forward_length": 29}, "tensor model.layers.0.mlp.gate_proj.weight has shape [28, 16]"),
])
def test_unsupported_metadata(metadata, text, tmp_path):
  assert text in message(write(tmp_path / "m.gguf", "llama_untied", **metadata))


def test_damaged_files(tmp_path):
  whole = write(tmp_path / "m.gguf", "llama_untied").read_bytes()
  path = tmp_path / "n.gguf"
  path.write_bytes(whole[:-3000])
  assert "corrupt GGUF file (truncated, tensor blk.1." in message(path) or "truncated, tensor output" in message(path)
  for cut in (0, 2, 30, 200, 700):  # within magic number, counts, keys, tensor infos
    path.write_bytes(whole[:cut])
    assert "corrupt GGUF file" in message(path)
  path.write_bytes(b"{" + whole[1:])
  assert "corrupt GGUF file" in message(path)
  path.write_bytes(whole.replace(b"llama", b"mamba"))
  assert "architecture 'mamba' is not supported" in message(path)
  rng = np.random.default_rng(0)
  for _ in range(40):  # whatever a damaged header says, loading ends, in one line or with a policy
    damaged = bytearray(whole)
    for at in rng.integers(0, 1200, 3):
      damaged[at] = rng.integers(0, 256)
    path.write_bytes(damaged)
    try:
      gguf_files.open_gguf(path)
    except UserError as e:
      assert "\n" not in str(e)
