"""config.json of Hugging Face <-> PolicyConfig, and the names and layouts of Hugging Face's tensors.

Model types qwen3, qwen2 and llama. Absent keys take the defaults of transformers' configuration classes; anything that
would change the model and is not implemented (sliding windows in use, longrope, biases, other activations) is an error,
never ignored. Both forms of rotary settings are read: `rope_theta` + `rope_scaling`, and transformers 5's
`rope_parameters`; where a file has both, `rope_scaling` counts, as in transformers.
"""

from collections.abc import Callable
import math
from pathlib import Path
from typing import NamedTuple

from arrol_jax.models.rope import DynamicScaling, LinearScaling, RopeScaling, Scaling, YarnScaling
from arrol_jax.models.transformer import PolicyConfig, block_weights, model_weights
from arrol_jax.types import UserError


class Family(NamedTuple):
  """What a model_type says beyond the keys of its config.json."""
  architecture: str
  qk_norm: bool = False
  qkv_bias: bool = False
  head_dim: int | None = None    # None: width / heads. This and the next two count where config.json has no such key
  kv_heads: int | None = 32      # None: as many as heads
  max_length: int = 32768
  refused: tuple[str, ...] = ()  # keys that change the model where they are set, and are not implemented


FAMILIES = {"qwen3": Family("Qwen3ForCausalLM", qk_norm=True, head_dim=128),
            "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True),
            "llama": Family("LlamaForCausalLM", kv_heads=None, max_length=2048)}
# Weight -> Hugging Face's name, our axes, their axes (a space separates the axes of the stored matrix).
LAYER = {
  "attn_norm": ("input_layernorm.weight", "d", "d"),
  "q": ("self_attn.q_proj.weight", "dnh", "nh d"), "q_bias": ("self_attn.q_proj.bias", "nh", "nh"),
  "k": ("self_attn.k_proj.weight", "dmh", "mh d"), "k_bias": ("self_attn.k_proj.bias", "mh", "mh"),
  "v": ("self_attn.v_proj.weight", "dmh", "mh d"), "v_bias": ("self_attn.v_proj.bias", "mh", "mh"),
  "o": ("self_attn.o_proj.weight", "nhd", "d nh"),
  "q_norm": ("self_attn.q_norm.weight", "h", "h"), "k_norm": ("self_attn.k_norm.weight", "h", "h"),
  "mlp_norm": ("post_attention_layernorm.weight", "d", "d"),
  "gate": ("mlp.gate_proj.weight", "df", "f d"), "up": ("mlp.up_proj.weight", "df", "f d"),
  "down": ("mlp.down_proj.weight", "fd", "d f"),
}
MODEL = {"embed": ("model.embed_tokens.weight", "vd", "v d"), "final_norm": ("model.norm.weight", "d", "d"),
         "unembed": ("lm_head.weight", "dv", "v d")}


class Place(NamedTuple):
  """Where a Hugging Face tensor goes. ours = stored.reshape(view).transpose(order)."""
  leaf: str
  layer: int | None    # None: not in a layer
  stored: tuple        # shape in the file
  view: tuple          # the same with heads split
  order: tuple


def layout(c: PolicyConfig) -> dict[str, Place]:
  """Hugging Face tensor name -> its place, for every tensor of the model, in the order of a forward pass."""
  def place(leaf, layer, shape, ours, theirs):
    size = dict(zip(ours, shape, strict=True))
    letters = theirs.replace(" ", "")
    return Place(leaf, layer, tuple(math.prod(size[a] for a in group) for group in theirs.split()),
                 tuple(size[a] for a in letters), tuple(letters.index(a) for a in ours))

  model = {MODEL[name][0]: place(name, None, w.shape, *MODEL[name][1:]) for name, w in model_weights(c).items()}
  out = {MODEL["embed"][0]: model.pop(MODEL["embed"][0])}
  for layer in range(c.layers):
    for name, w in block_weights(c).items():
      out[f"model.layers.{layer}.{LAYER[name][0]}"] = place(name, layer, w.shape, *LAYER[name][1:])
  return out | model


def config_from_json(file: Path, raw: dict) -> PolicyConfig:
  """PolicyConfig of a parsed config.json; `file` is named in errors. UserError: a model or a value that cannot be."""
  try:
    return _config(file, raw)
  except (TypeError, ValueError, AttributeError) as e:
    raise UserError(f"{file}: a key has a value of the wrong kind ({e})") from e


_POSITIVE = lambda x: isinstance(x, int | float) and not isinstance(x, bool) and 0 < x < math.inf
_WHOLE = lambda x: isinstance(x, int) and not isinstance(x, bool)
_COUNT = lambda x: _WHOLE(x) and x > 0
# What keys that may be left out hold where they are there and not null.
_VALUES = {
  'an object such as {"rope_type": "yarn", "factor": 4.0}': (
    lambda x: isinstance(x, dict), ("rope_scaling", "rope_parameters")),
  "a number above 0": (_POSITIVE, ("rms_norm_eps", "rope_theta", "rope_scaling.rope_theta", "rope_parameters.rope_theta")),
  "a positive whole number": (_COUNT, ("num_key_value_heads", "head_dim", "max_position_embeddings")),
  "true or false": (lambda x: isinstance(x, bool), ("tie_word_embeddings",)),
  "a token id, or a list of them": (
    lambda x: all(map(_WHOLE, x if isinstance(x, list) else [x])), ("eos_token_id", "bos_token_id", "pad_token_id"))}


def _check_values(file: Path, raw: dict) -> None:
  """UserError for values of another kind. transformers, which reads the tokenizer, would call that the tokenizer's fault."""
  for what, (holds, keys) in _VALUES.items():
    for key in keys:
      section, _, name = key.rpartition(".")
      value = (raw.get(section) or {} if section else raw).get(name)
      if value is not None and not holds(value):
        raise UserError(f"{file}: {key} is {value!r}; it must be {what}")


def _config(file: Path, raw: dict) -> PolicyConfig:
  kind = raw.get("model_type")
  if kind not in FAMILIES:
    raise UserError(f"{file}: model_type {kind!r} is not supported (supported: {', '.join(FAMILIES)})")
  family = FAMILIES[kind]

  def need(key):
    value = raw.get(key)
    if not _COUNT(value):
      raise UserError(f"{file}: key {key} is {value!r}, it must be a positive whole number")
    return value

  _check_values(file, raw)
  _refuse(file, family, raw)
  heads, width = need("num_attention_heads"), need("hidden_size")
  kv_heads = int(raw.get("num_key_value_heads", family.kv_heads) or heads)
  if heads % kv_heads:
    raise UserError(f"{file}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
  length = int(raw.get("max_position_embeddings", family.max_length))
  theta, scaling = _rope(file, raw, length)
  return PolicyConfig(
    family=kind, vocab=need("vocab_size"), width=width, layers=need("num_hidden_layers"), heads=heads,
    kv_heads=kv_heads, head_dim=int(raw.get("head_dim") or family.head_dim or width // heads),
    ffn=need("intermediate_size"),
    qk_norm=family.qk_norm, qkv_bias=family.qkv_bias, tied=bool(raw.get("tie_word_embeddings", False)),
    rope_theta=theta, rope_scaling=scaling, norm_eps=float(raw.get("rms_norm_eps", 1e-6)), max_length=length)


def _refuse(file: Path, family: Family, raw: dict) -> None:
  """UserError for settings that change the model and are not implemented."""
  if raw.get("hidden_act", "silu") != "silu":
    raise UserError(f"{file}: hidden_act {raw['hidden_act']!r} is not supported (only silu)")
  for key in ("attention_bias", "mlp_bias", "quantization_config", "num_experts", "num_local_experts", *family.refused):
    if raw.get(key) and not (family.qkv_bias and key == "attention_bias"):  # it has them always
      raise UserError(f"{file}: {key} is set, which is not supported")
  kinds = raw.get("layer_types")
  if kinds is None and raw.get("use_sliding_window") and raw.get("sliding_window", 4096) is not None:
    sliding = raw.get("max_window_layers", 28) < raw.get("num_hidden_layers", 32)
  else:
    sliding = any(k != "full_attention" for k in kinds or ())
  if sliding:
    raise UserError(f"{file}: sliding window attention is in use, which is not supported")


def _rope(file: Path, raw: dict, length: int) -> tuple[float, Scaling | None]:
  rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
  if any(isinstance(x, dict) for x in rope.values()):
    raise UserError(f"{file}: rope_parameters that differ by layer type ({', '.join(rope)}) are not supported")
  theta = float(rope.get("rope_theta") or raw.get("rope_theta") or 10000.0)
  kind = rope.get("rope_type", rope.get("type", "default"))
  if rope.get("partial_rotary_factor", raw.get("partial_rotary_factor")) not in (None, 1, 1.0):
    raise UserError(f"{file}: partial_rotary_factor is not supported")
  if not {"rope_type", "type"} & rope.keys() and rope.get("factor") not in (None, 1):
    raise UserError(f"{file}: rope_scaling has a factor ({rope['factor']!r}) and no rope_type, so nobody would use it")
  readers = {"linear": _linear, "dynamic": _linear, "llama3": _llama3, "yarn": _yarn}
  if kind == "default":
    return theta, None
  if kind not in readers:
    raise UserError(f"{file}: rope type {kind!r} is not supported (supported: default, {', '.join(readers)})")

  def number(key: str, default=None) -> float:
    value = default if rope.get(key) is None else rope[key]
    if not _POSITIVE(value):
      raise UserError(f"{file}: rope scaling {kind} needs {key}, a number above 0, not {value!r}")
    return float(value)

  original = raw.get("original_max_position_embeddings") or number("original_max_position_embeddings", length)
  return theta, readers[kind](kind, rope, number, int(original), length)


def _linear(kind: str, rope: dict, number: Callable, original: int, length: int) -> Scaling:
  return (LinearScaling if kind == "linear" else DynamicScaling)(number("factor"))


def _llama3(kind: str, rope: dict, number: Callable, original: int, length: int) -> Scaling:
  return RopeScaling(number("factor"), number("low_freq_factor"), number("high_freq_factor"), original)


def _yarn(kind: str, rope: dict, number: Callable, original: int, length: int) -> Scaling:
  factor = number("factor", length / original)
  scale = lambda weight: 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
  both = rope.get("mscale") and rope.get("mscale_all_dim")
  default = scale(number("mscale")) / scale(number("mscale_all_dim")) if both else scale(1.0)
  # A beta of 0 counts as absent, as in transformers.
  fast, slow = (number(key, default) if rope.get(key) else default for key, default in (("beta_fast", 32.0), ("beta_slow", 1.0)))
  return YarnScaling(factor, original, number("attention_factor", default), fast, slow, bool(rope.get("truncate", True)))


def _rope_to_json(scaling: Scaling | None) -> dict | None:
  """What `_rope` reads again as `scaling`."""
  match scaling:
    case LinearScaling(factor):
      return {"rope_type": "linear", "factor": factor}
    case DynamicScaling(factor):
      return {"rope_type": "dynamic", "factor": factor}
    case RopeScaling(factor, low, high, original):
      return {"rope_type": "llama3", "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
              "original_max_position_embeddings": original}
    case YarnScaling(factor, original, attention, fast, slow, truncate):
      return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, "truncate": truncate,
              "attention_factor": attention, "beta_fast": fast, "beta_slow": slow}
  return None


def config_to_json(c: PolicyConfig, dtype: str, eos_ids: tuple, pad_id: int, bos_id: int | None) -> dict:
  """config.json for transformers 4 and 5 (rotary settings in both forms)."""
  family = FAMILIES.get(c.family)
  if family is None or (c.qk_norm, c.qkv_bias) != (family.qk_norm, family.qkv_bias):
    raise UserError(f"a policy of family {c.family!r} with qk_norm={c.qk_norm} and qkv_bias={c.qkv_bias} has no "
                    f"Hugging Face layout (of {', '.join(FAMILIES)}: qwen3 has qk_norm, qwen2 has qkv_bias)")
  scaling = _rope_to_json(c.rope_scaling)
  return {
    "architectures": [family.architecture], "model_type": c.family, "dtype": dtype, "torch_dtype": dtype,
    "vocab_size": c.vocab, "hidden_size": c.width, "intermediate_size": c.ffn, "num_hidden_layers": c.layers,
    "num_attention_heads": c.heads, "num_key_value_heads": c.kv_heads, "head_dim": c.head_dim, "hidden_act": "silu",
    "max_position_embeddings": c.max_length, "rms_norm_eps": c.norm_eps, "tie_word_embeddings": c.tied,
    "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True,
    "rope_theta": c.rope_theta, "rope_scaling": scaling,
    "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": c.rope_theta},
    "bos_token_id": bos_id, "pad_token_id": pad_id,
    "eos_token_id": None if not eos_ids else list(eos_ids) if len(eos_ids) > 1 else eos_ids[0],
  }
