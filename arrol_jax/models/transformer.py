"""The policy: one decoder-only transformer that covers Qwen3, Qwen2.5 and the Llama 3 family (SmolLM2 too).

What differs between the families is three fields of `PolicyConfig`: `qk_norm` (Qwen3), `qkv_bias` (Qwen2.5) and
`rope_scaling` (Llama 3.1 and later; rope.py). `block_weights` and `model_weights` are the one source for the shape, logical
axes and initialisation of every weight. Layers are stacked on a leading axis and scanned, so that compile time does not grow
with depth; the decoder (engine/programs.py) passes a tuple of single layers instead, so that no step copies a layer's slice.

A layer does not know where keys and values come from: `attend` does the attention and returns what the caller wants kept.
Training passes attention.py's `causal_attention`; prefill and decoding pass functions that fill a cache.
Left out: weights' files (weights.py), sampling and caches (engine/).
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import NamedTuple

from flax import nnx
import jax
from jax.ad_checkpoint import checkpoint_name
import jax.numpy as jnp

from arrol_jax.models import lora
from arrol_jax.models.int8 import Int8, axes_of_all, product, quantize_all, scaled_product
from arrol_jax.models.layers import Rotary, add_norm, rms_norm
from arrol_jax.models.lora import Lora
from arrol_jax.models.rope import DynamicScaling, LinearScaling, RopeScaling, YarnScaling, frequencies
from arrol_jax.models.sharding import DECODE, constrain


@dataclasses.dataclass(frozen=True)
class PolicyConfig:
  """Shape of a policy. `family` is Hugging Face's model_type and is only used to write config.json."""
  family: str
  vocab: int
  width: int
  layers: int
  heads: int
  kv_heads: int
  head_dim: int
  ffn: int
  qk_norm: bool = False
  qkv_bias: bool = False
  tied: bool = True
  rope_theta: float = 10000.0
  rope_scaling: RopeScaling | LinearScaling | DynamicScaling | YarnScaling | None = None
  norm_eps: float = 1e-6
  max_length: int = 32768
  lora: Lora | None = None   # adapters beside the layers' matrices (lora.py); None: the policy has none

  def num_params(self) -> int:
    per_layer = sum(math.prod(w.shape) for w in block_weights(self).values())
    return self.layers * per_layer + sum(math.prod(w.shape) for w in model_weights(self).values())


class Weight(NamedTuple):
  shape: tuple
  axes: tuple             # logical axes, see sharding.py
  init: float | str       # standard deviation of a normal, or "ones" / "zeros"


def block_weights(c: PolicyConfig) -> dict[str, Weight]:
  """Weights of one layer."""
  d, n, m, h, f = c.width, c.heads, c.kv_heads, c.head_dim, c.ffn
  out = {
    "attn_norm": Weight((d,), ("embed",), "ones"),
    "q": Weight((d, n, h), ("embed", "heads", None), d**-0.5),
    "k": Weight((d, m, h), ("embed", "kv_heads", None), d**-0.5),
    "v": Weight((d, m, h), ("embed", "kv_heads", None), d**-0.5),
    "o": Weight((n, h, d), ("heads", None, "embed"), (n * h)**-0.5),
    "mlp_norm": Weight((d,), ("embed",), "ones"),
    "gate": Weight((d, f), ("embed", "ffn"), d**-0.5),
    "up": Weight((d, f), ("embed", "ffn"), d**-0.5),
    "down": Weight((f, d), ("ffn", "embed"), f**-0.5),
  }
  if c.qkv_bias:
    out |= {"q_bias": Weight((n, h), ("heads", None), "zeros"), "k_bias": Weight((m, h), ("kv_heads", None), "zeros"),
            "v_bias": Weight((m, h), ("kv_heads", None), "zeros")}
  if c.qk_norm:
    out |= {"q_norm": Weight((h,), (None,), "ones"), "k_norm": Weight((h,), (None,), "ones")}
  return out


def adapter_weights(c: PolicyConfig) -> dict[str, Weight]:
  """Adapters of one layer; {} where there are none."""
  return lora.adapter_weights(c.lora, block_weights(c)) if c.lora else {}


def model_weights(c: PolicyConfig) -> dict[str, Weight]:
  """Weights outside the layers."""
  out = {"embed": Weight((c.vocab, c.width), ("vocab", "embed"), 0.02), "final_norm": Weight((c.width,), ("embed",), "ones")}
  if not c.tied:
    out["unembed"] = Weight((c.width, c.vocab), ("embed", "vocab"), c.width**-0.5)
  return out


def _param(weight: Weight, key: jax.Array, dtype, stack: tuple = ()) -> nnx.Param:
  shape, axes = stack + weight.shape, (None,) * len(stack) + weight.axes
  if isinstance(weight.init, str):
    value = jnp.ones(shape, dtype) if weight.init == "ones" else jnp.zeros(shape, dtype)
  else:
    value = (jax.random.normal(key, shape, jnp.float32) * weight.init).astype(dtype)
  return nnx.Param(value, axes=axes)


def rope_tables(c: PolicyConfig, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
  """cos and sin, f32[B,S,1,H/2], for positions i32[B,S]."""
  freq, scale = frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
  angle = positions.astype(jnp.float32)[:, :, None, None] * freq[None, None, None, :]
  cos, sin = jnp.cos(angle), jnp.sin(angle)
  return (cos, sin) if scale == 1.0 else (cos * scale, sin * scale)


# What remat "dots" keeps: a layer's matrix products. Norms, rotations and activations are computed again.
keep = functools.partial(checkpoint_name, name="dots")
_checkpoint = functools.partial(jax.checkpoint, prevent_cse=False)  # a scan's body is not merged with its backward pass anyway
REMAT = {"none": lambda f: f, "full": _checkpoint,
         "dots": functools.partial(_checkpoint, policy=jax.checkpoint_policies.save_only_these_names("dots"))}


class Block(nnx.Module):
  """One layer, or with `stack=(layers,)` all of them on a leading axis (then only to be scanned over)."""

  def __init__(self, c: PolicyConfig, key: jax.Array, dtype=jnp.float32, stack: tuple = ()):
    self.config = c
    names = block_weights(c)
    for (name, weight), k in zip(names.items(), jax.random.split(key, len(names)), strict=True):
      setattr(self, name, _param(weight, k, dtype, stack))

  def __call__(self, x: jax.Array, rope: tuple, attend: Callable, adapters: dict) -> tuple[jax.Array, object]:
    """x [B,S,D] -> [B,S,D] and what attend(q, k, v) kept. adapters: this layer's (lora.py)."""
    weights = {name: getattr(self, name)[...] for name in block_weights(self.config)} | adapters
    x, delta, kept = layer(self.config, weights, x, None, rope, lambda q, k, v, rotary: attend(*rotary(q, k), v))
    return x + delta, kept


def layer(c: PolicyConfig, weights: dict, x: jax.Array, delta: jax.Array | None, rope: tuple, attend: Callable,
          fused: bool = False) -> tuple[jax.Array, jax.Array, object]:
  """x and the branch `delta` not yet added to it, [B,S,D] -> x after attention, the MLP's branch, what `attend` kept.

  Branches are added where the next norm reads the sum. attend(q, k, v, rotary) gets queries and keys as projected; with merged
  weights (`unstack`) it is attend(qkv, rotary), qkv [B,S,M,N/M+2,H].
  """
  w = lambda name: weights[name].astype(x.dtype)

  def project(y, equation, name):
    bias, (a, b) = weights.get(name + "_bias"), lora.names(name)
    out = _merged(y, weights["qkv"], bias) if name == "qkv" else product(equation, y, weights[name])
    if a in weights:
      out = out + c.lora.scale * lora.branch(y, equation, w(a), w(b))
    return out if bias is None or name == "qkv" else out + w(name + "_bias")[None, None]

  with jax.named_scope("attention"):
    x, y = add_norm(x, delta, weights["attn_norm"], c.norm_eps, fused=fused)
    rotary = Rotary(*rope, *((weights["q_norm"], weights["k_norm"]) if c.qk_norm else (None, None)), c.norm_eps)
    if "qkv" in weights:
      out, kept = attend(keep(project(y, "bsd,dmgh->bsmgh", "qkv")), rotary)
    else:
      q, k, v = (keep(project(y, f"bsd,d{heads}h->bs{heads}h", name)) for name, heads in (("q", "n"), ("k", "m"), ("v", "m")))
      out, kept = attend(q, k, v, rotary)
    out = keep(project(keep(out), "bsnh,nhd->bsd", "o"))
  with jax.named_scope("mlp"):
    x, y = add_norm(x, out, weights["mlp_norm"], c.norm_eps, fused=fused)
    if "gate_up" in weights:
      gate, up = jnp.split(keep(project(y, "bsd,dcf->bscf", "gate_up")), 2, axis=2)
      gate, up = gate[:, :, 0], up[:, :, 0]
    else:
      gate, up = keep(project(y, "bsd,df->bsf", "gate")), keep(project(y, "bsd,df->bsf", "up"))
    return x, project(jax.nn.silu(gate) * up, "bsf,fd->bsd", "down"), kept


def _merged(y: jax.Array, weight: jax.Array | Int8, bias: jax.Array | None) -> jax.Array:
  """y [B,S,D] times [D,M,N/M+2,H] plus bias; as matrices, so that the product's own kernel adds the bias."""
  if bias is None or isinstance(weight, Int8):
    out = product("bsd,dmgh->bsmgh", y, weight)
    return out if bias is None else out + bias.astype(y.dtype)[None, None]
  weight = weight.astype(y.dtype)
  out = y.reshape(-1, y.shape[2]) @ weight.reshape(y.shape[2], -1) + bias.astype(y.dtype).reshape(1, -1)
  return out.reshape(*y.shape[:2], *weight.shape[1:])


class Transformer(nnx.Module):
  """Embedding, stacked layers, final norm; `Transformer(config, key)` has random weights."""

  def __init__(self, c: PolicyConfig, key: jax.Array, dtype=jnp.float32):
    self.config = c
    keys = jax.random.split(key, 4)
    self.layers = Block(c, keys[0], dtype, stack=(c.layers,))
    for (name, weight), k in zip(model_weights(c).items(), keys[1:], strict=False):
      setattr(self, name, _param(weight, k, dtype))


@functools.cache
def _structure(c: PolicyConfig):
  """(graph definition of the model, of one block, abstract state of the model)."""
  model = nnx.eval_shape(lambda: Transformer(c, jax.random.key(0)))
  graph, state = nnx.split(model)
  return graph, nnx.split(model.layers)[0], state


def init_params(c: PolicyConfig, key: jax.Array, dtype=jnp.float32) -> dict:
  """Random weights: {"embed", "layers": {name: [layers, ...]}, "final_norm", "unembed" (untied only)}."""
  return nnx.to_pure_dict(nnx.state(Transformer(c, key, dtype)))


def abstract_params(c: PolicyConfig, dtype=jnp.float32) -> dict:
  """The same tree as ShapeDtypeStruct: nothing is allocated."""
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), nnx.to_pure_dict(_structure(c)[2]))


def logical_axes(c: PolicyConfig) -> dict:
  """The same tree with each weight's logical axes."""
  layers = {name: (None,) + w.axes for name, w in block_weights(c).items()}
  return {"layers": layers} | {name: w.axes for name, w in model_weights(c).items()}


def adapter_axes(c: PolicyConfig) -> dict:
  """Logical axes of `init_adapters`' result; {} where there are none."""
  return {name: (None, *w.axes) for name, w in adapter_weights(c).items()}


def trained_axes(c: PolicyConfig) -> dict:
  """Logical axes of what training changes of a policy: its adapters, or all of it where it has none."""
  return adapter_axes(c) if c.lora else logical_axes(c)


def init_adapters(c: PolicyConfig, key: jax.Array) -> dict:
  """Fresh adapters, f32: {NAME_lora_a: [layers, inputs, R], NAME_lora_b: [layers, R, outputs]} with B all zero."""
  weights = adapter_weights(c)
  keys = jax.random.split(key, len(weights))
  return {name: _param(w, k, jnp.float32, (c.layers,))[...] for (name, w), k in zip(weights.items(), keys, strict=True)}


def unstack(params: dict) -> dict:
  """Training layout -> decoding layout: `layers` becomes a tuple of single layers, whose projections that read the same
  input are merged into one product: qkv [D,M,N/M+2,H] (a KV head's queries, its key, its value) and gate_up [D,2,F]."""
  count = params["layers"]["q"].shape[0]
  return params | {"layers": tuple(_merge({name: x[i] for name, x in params["layers"].items()}) for i in range(count))}


def _merge(w: dict) -> dict:
  """One layer's weights in the decoding layout."""
  d, m, h = w["k"].shape
  group = lambda q, k, v: jnp.concatenate([q.reshape(*q.shape[:-2], m, -1, h), k[..., None, :], v[..., None, :]], axis=-2)
  merged = {"qkv": group(w["q"], w["k"], w["v"]), "gate_up": jnp.stack([w["gate"], w["up"]], axis=1)}
  if "q_bias" in w:
    merged["qkv_bias"] = group(w["q_bias"], w["k_bias"], w["v_bias"])
  gone = ("q", "k", "v", "gate", "up", "q_bias", "k_bias", "v_bias")
  return {name: x for name, x in w.items() if name not in gone and "_lora_" not in name} | merged | lora.merge_layer(w)


def decoding_params(c: PolicyConfig, params: dict, dtype: str, weights: str | None = None) -> dict:
  """Training parameters in the decoding layout and dtype; weights "int8": matrices are rounded from the training parameters.

  What fsdp splits is cast and comes together a stacked array at a time: by layer it would be hundreds of small collectives.
  """
  if weights == "int8":
    cast = lambda x: x if isinstance(x, Int8) else x.astype(dtype)
    return jax.tree.map(cast, quantize_all(unstack(params)), is_leaf=lambda x: isinstance(x, Int8))
  cast = lambda x, axes: constrain(x.astype(dtype), *axes, table=DECODE)
  axes = logical_axes(c)
  return unstack(jax.tree.map(cast, params, axes | {"layers": axes["layers"] | adapter_axes(c)}))


def decoding_axes(c: PolicyConfig, weights: str | None = None) -> dict:
  """`logical_axes` of `decoding_params`, adapters among them."""
  axes = logical_axes(c)
  kept = {name: a[1:] for name, a in axes["layers"].items() if name in ("attn_norm", "o", "mlp_norm", "down", "q_norm", "k_norm")}
  merged = {"qkv": ("embed", "kv_heads", None, None), "gate_up": ("embed", None, "ffn")}
  if "q_bias" in axes["layers"]:
    merged["qkv_bias"] = ("kv_heads", None, None)
  adapters = lora.merged_axes({name: w.axes for name, w in adapter_weights(c).items()})
  axes |= {"layers": (kept | merged | adapters,) * c.layers}
  return axes_of_all(axes) if weights == "int8" else axes


def forward(c: PolicyConfig, params: dict, tokens: jax.Array, positions: jax.Array, attend: Callable, *,
            dtype=jnp.float32, remat: str = "none", scan: bool = True) -> tuple[jax.Array, object]:
  """tokens, positions i32[B,S] -> hidden states after the final norm [B,S,D] and what `attend` kept, by layer.

  `attend(q, k, v)` is scanned over the stacked layers and what it keeps is stacked; remat says what the backward pass computes
  again: "none", "dots" (all but a layer's matrix products and attention's result) or "full" (whole layers, least memory). Without
  `scan` the program has each layer by itself: what the backward pass needs is not copied into stacks and out again.
  """
  block_def, rope, x = _structure(c)[1], rope_tables(c, positions), _embed(params, tokens, dtype)
  # Once, before the scan would copy each layer's float32 weights to round them.
  layers = {name: w if name.endswith("norm") else w.astype(dtype) for name, w in params["layers"].items()}
  adapters = {name: layers.pop(name) for name in list(layers) if "_lora_" in name}

  def body(x, weights):
    weights, adapters = weights
    x, kept = nnx.merge(block_def, nnx.State(weights))(x, rope, attend, adapters)
    return constrain(x, "batch", None, None), kept

  x, kept = jax.lax.scan(REMAT[remat](body), x, (layers, adapters), unroll=not scan)
  return rms_norm(x, params["final_norm"], c.norm_eps), kept


def unrolled(c: PolicyConfig, params: dict, tokens: jax.Array, positions: jax.Array, attend: Callable, states: tuple = (), *,
             fused: bool = False, tap: Callable | None = None) -> tuple[jax.Array, list]:
  """`forward` on a tuple of layers (`unstack`), in their dtype. `attend(state, qkv, rotary)` gets a layer's own of `states`
  (None: there are none), and queries and keys still to be turned (layers.Rotary); what it keeps comes back as a list. fused:
  layers.add_norm's kernel, forward only. tap(n, x) sees the residual stream x [B,S,D] after n layers."""
  rope, x, kept, delta = rope_tables(c, positions), _embed(params, tokens, params["final_norm"].dtype), [], None

  @jax.jit  # all layers are one function to trace and to lower, which the compiler puts back in line
  def one(weights, state, x, delta):
    x, delta, result = layer(c, weights, x, delta, rope, functools.partial(attend, state), fused)
    return constrain(x, "batch", None, None), delta, result

  for i, weights in enumerate(params["layers"]):
    x, delta, result = one(weights, states[i] if states else None, x, delta)
    kept.append(result)
    tap and tap(i + 1, x + delta)
  return add_norm(x, delta, params["final_norm"], c.norm_eps, fused=fused)[1], kept


def _embed(params: dict, tokens: jax.Array, dtype) -> jax.Array:
  """The table's columns, which fsdp splits, come together first; else the partitioner would replicate all looked-up rows."""
  if isinstance(params["embed"], Int8):
    values, scale = params["embed"].values[tokens], params["embed"].scale[tokens][..., None]
    return constrain((values.astype(jnp.float32) * scale).astype(dtype), "batch", None, None)
  return constrain(constrain(params["embed"].astype(dtype), "vocab", None)[tokens], "batch", None, None)


def unembedding(params: dict) -> tuple[jax.Array, str]:
  """The table that logits are products with, and its axes: "vd" where it is the embedding's, else "dv"."""
  return (params["unembed"], "dv") if "unembed" in params else (params["embed"], "vd")


def unembed(params: dict, hidden: jax.Array) -> jax.Array:
  """hidden [..., D] -> logits f32[..., V]."""
  table, axes = unembedding(params)
  equation = f"...d,{axes}->...v"
  if isinstance(table, Int8):
    return scaled_product(equation, hidden, table)
  return jnp.einsum(equation, hidden, table.astype(hidden.dtype), preferred_element_type=jnp.float32)


def default_positions(tokens: jax.Array) -> jax.Array:
  """0, 1, 2, ... along each row of tokens [B,S]."""
  return jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32)[None, :], tokens.shape)
