"""GGUF files: shape of the policy, tensors under their Hugging Face names, metadata. Uses the `gguf` package, no torch.

Architectures qwen2, qwen3 and llama. Every quantisation that the `gguf` package dequantises can be read; values come
out in float32. Llama files store the rows of q and k in pairs (rotary dimension i next to i + H/2): undone here.
Left out: writing GGUF, mixtures of experts, yarn and linear rope scaling, SentencePiece tokenizers (tokenizers.py).
"""

import concurrent.futures
import functools
import os
from pathlib import Path
import struct
import sys
from typing import NamedTuple

import gguf
import numpy as np

from arrol_jax.models.files.safetensors import Stored
from arrol_jax.models.transformer import PolicyConfig, RopeScaling
from arrol_jax.types import UserError

_CHUNK, _THREADS = 1 << 21, 8  # values that a thread dequantises at a time; a thread holds some 30 MB of them
ARRAY = gguf.GGUFValueType.ARRAY
SWAPPED = ">Q" if sys.byteorder == "little" else "<Q"  # a length of the other byte order
ARCHITECTURES = ("qwen3", "qwen2", "llama")
# GGUF name of a layer's tensor, after "blk.<i>." -> Hugging Face's, after "model.layers.<i>."
LAYER_NAMES = {
  "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
  "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
  "attn_k_norm": "self_attn.k_norm", "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj",
  "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
MODEL_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


class GGUF(NamedTuple):
  """An opened file: metadata values by key (lists for arrays), and tensors by Hugging Face name."""
  path: Path
  meta: dict
  config: PolicyConfig
  tensors: dict[str, Stored]


class _Reader(gguf.GGUFReader):
  """The package's reader, except that bytes past the end of the file are an error instead of an empty array (a damaged length
  would read on for ever), and that an array's elements are not three objects each: a vocabulary has half a million.
  """

  def _get(self, offset, dtype, count=1, override_order=None):
    dtype, offset = np.dtype(dtype), int(offset)
    end = offset + dtype.itemsize * int(count)
    if end > len(self.data):
      raise EOFError("truncated")
    order = override_order or self.byte_order
    return self._plain[offset:end].view(dtype if order == "I" else dtype.newbyteorder(order))

  @functools.cached_property
  def _plain(self):
    return np.asarray(self.data)

  def _get_field_parts(self, orig_offs, raw_type):
    """(bytes, parts, which parts are values, types) of a value: an array's numbers are one part, its strings one each."""
    kind = self._get(orig_offs, np.uint32)[0] if raw_type == ARRAY else None
    if kind in (None, ARRAY):  # no array, or an array of arrays
      return super()._get_field_parts(orig_offs, raw_type)
    kind, count, start = gguf.GGUFValueType(kind), int(self._get(orig_offs + 4, np.uint64)[0]), int(orig_offs) + 12
    if kind == gguf.GGUFValueType.STRING:
      parts, end = self._strings(start, count)
    else:
      parts = [self._get(start, self.gguf_scalar_to_np[kind], count)]
      end = start + parts[0].nbytes
    return end - int(orig_offs), parts, range(len(parts)), [ARRAY, kind]

  def _strings(self, at: int, count: int) -> tuple[list[memoryview], int]:
    """`count` strings that stand one after the other from byte `at`, and where they end."""
    view, length, out = memoryview(self._plain), struct.Struct("=Q" if self.byte_order == "I" else SWAPPED), []
    for _ in range(count):
      if at + 8 > len(view):
        raise EOFError("truncated")
      end = at + 8 + length.unpack_from(view, at)[0]
      if end > len(view):
        raise EOFError("truncated")
      out.append(view[at + 8:end])
      at = end
    return out, at

  def _build_tensors(self, start_offs, fields):
    tensors = []
    for field in fields:
      try:
        super()._build_tensors(start_offs, [field])
      except EOFError:
        raise EOFError(f"truncated, tensor {field.name} ends past the end of the file") from None
      tensors += self.tensors
    self.tensors = tensors


def open_gguf(path: Path) -> GGUF:
  """Reads a file's metadata; tensors are dequantised when read. UserError: corrupt, truncated, unsupported."""
  try:
    reader = _Reader(path)
    meta = {key: field.contents() for key, field in reader.fields.items()}
  except (ValueError, KeyError, IndexError, EOFError, OverflowError, UnicodeDecodeError, TypeError) as e:
    raise UserError(f"{path}: corrupt GGUF file ({e}); fetch it again") from e
  arch = meta.get("general.architecture")
  if arch not in ARCHITECTURES:
    raise UserError(f"{path}: architecture {arch!r} is not supported (supported: {', '.join(ARCHITECTURES)})")
  stored = {t.name: t for t in reader.tensors}
  config = _config(path, arch, meta, stored)
  tensors = {}
  for name, tensor in stored.items():
    if name != "rope_freqs.weight":  # read by _config
      ours = _hf_name(name)
      heads = config.heads if ".q_proj." in ours else config.kv_heads if ".k_proj." in ours else None
      tensors[ours] = _stored(path, tensor, heads if arch == "llama" else None)
  return GGUF(path, meta, config, tensors)


def _hf_name(name: str) -> str:
  stem, _, kind = name.rpartition(".")
  if stem.startswith("blk.") and stem.count(".") > 1:
    _, layer, stem = stem.split(".", 2)
    return f"model.layers.{layer}.{LAYER_NAMES.get(stem, stem)}.{kind}"
  return f"{MODEL_NAMES.get(stem, stem)}.{kind}"


def _stored(path: Path, tensor: gguf.ReaderTensor, heads: int | None) -> Stored:
  shape = tuple(int(n) for n in reversed(tensor.shape))

  def read() -> np.ndarray:
    try:
      value = _dequantised(tensor)
    except NotImplementedError as e:
      raise UserError(f"{path}: tensor {tensor.name} is {tensor.tensor_type.name}, which the gguf package cannot "
                      f"dequantise") from e
    value = value.astype(np.float32, copy=False).reshape(shape)
    return value if heads is None else unpermute(value, heads)

  return Stored(path, shape, np.dtype(np.float32), read)


def _dequantised(tensor: gguf.ReaderTensor) -> np.ndarray:
  """All values in a row, by threads. The package goes through 16 rows at a time, for which the interpreter's lock is taken dozens
  of times; what it is given here are rows as long as a chunk, so that few waits are left while others work (compiling ahead)."""
  kind = tensor.tensor_type
  if kind == gguf.GGMLQuantizationType.F32:  # which is read where it stands
    return gguf.quants.dequantize(tensor.data, kind)
  block, size = gguf.GGML_QUANT_SIZES[kind]
  blocks = tensor.data.reshape(-1).view(np.uint8).reshape(-1, size)
  out = np.empty((len(blocks), block), np.float32)
  step = max(1, _CHUNK // block)

  def read(at: int) -> None:
    part = slice(at, at + step)
    out[part] = gguf.quants.dequantize(blocks[part].reshape(1, -1), kind).reshape(-1, block)

  list(_pool().map(read, range(0, len(blocks), step)))
  return out


@functools.cache
def _pool() -> concurrent.futures.ThreadPoolExecutor:
  return concurrent.futures.ThreadPoolExecutor(min(_THREADS, os.cpu_count()), "dequantise")


def unpermute(value: np.ndarray, heads: int) -> np.ndarray:
  """Rows of q or k in llama GGUF order (0, H/2, 1, H/2 + 1, ...) -> Hugging Face's (0, 1, 2, ...), head by head."""
  half = value.shape[0] // heads // 2
  return value.reshape(heads, half, 2, *value.shape[1:]).swapaxes(1, 2).reshape(value.shape)


def _config(path: Path, arch: str, meta: dict, stored: dict) -> PolicyConfig:
  def need(key, default=None):
    value = meta.get(f"{arch}.{key}", default)
    if isinstance(value, list) and len(set(value)) == 1:
      value = value[0]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
      raise UserError(f"{path}: metadata key {arch}.{key} is {value!r}, it must be a positive number for all layers")
    return value

  if "token_embd.weight" not in stored:
    raise UserError(f"{path}: tensor token_embd.weight is missing")
  heads, width = need("attention.head_count"), need("embedding_length")
  head_dim = need("attention.key_length", width // heads)
  for key, plain in (("rope.scaling.type", "none"), ("expert_count", 0), ("rope.dimension_count", head_dim),
                     ("attention.value_length", head_dim)):
    if meta.get(f"{arch}.{key}", plain) != plain:
      raise UserError(f"{path}: {arch}.{key} = {meta[f'{arch}.{key}']} is not supported (only {plain})")
  theta = float(need("rope.freq_base", 10000.0))
  return PolicyConfig(
    family=arch, vocab=int(stored["token_embd.weight"].shape[1]), width=width, layers=need("block_count"), heads=heads,
    kv_heads=need("attention.head_count_kv", heads), head_dim=head_dim, ffn=need("feed_forward_length"),
    qk_norm=arch == "qwen3", qkv_bias=arch == "qwen2", tied="output.weight" not in stored, rope_theta=theta,
    rope_scaling=_rope_scaling(path, stored.get("rope_freqs.weight"), head_dim, theta),
    norm_eps=float(str(np.float32(need("attention.layer_norm_rms_epsilon")))),  # 1e-6, not 9.99999997e-07
    max_length=need("context_length"))


def rope_divisors(s: RopeScaling, head_dim: int, theta: float) -> np.ndarray:
  """What llama3 scaling divides each rotary frequency by, f32[H/2]: the content of a GGUF's rope_freqs.weight."""
  turns = s.original_length * theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
  keep = np.clip((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor), 0.0, 1.0)
  return (1.0 / (keep + (1.0 - keep) / s.factor)).astype(np.float32)


def _rope_scaling(path: Path, tensor, head_dim: int, theta: float) -> RopeScaling | None:
  """The file stores divisors, not the four numbers behind them: the numbers of Llama 3.1 and later are tried."""
  if tensor is None:
    return None
  divisors = np.asarray(tensor.data, np.float32)
  scaling = RopeScaling(float(divisors.max()), 1.0, 4.0, 8192)
  known = rope_divisors(scaling, head_dim, theta)
  if divisors.shape != known.shape or not np.allclose(divisors, known, rtol=1e-4):
    raise UserError(f"{path}: tensor rope_freqs.weight is not Llama 3's rope scaling (low 1, high 4, length 8192)")
  return scaling
