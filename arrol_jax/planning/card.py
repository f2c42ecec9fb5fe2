"""What a run needs of one GPU's memory, by count: nothing is compiled, so no GPU is needed either.

Weights, optimizer and cache are counted exactly; what the update holds for its backward pass tensor by tensor, as
transformer.layer and update.token_logprobs make them. Compiling for a CPU would say more where it means less: there the update
of Qwen3-1.7B has twice the temporary memory that a GPU was seen to need. experiments/results/card/README.md has counted beside
measured. Left out: several cards, micro-batches' own tokens, XLA's attention (model.attention=xla), fragmentation.
"""

from collections.abc import Iterator
import dataclasses
import math

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from arrol_jax import assemble
from arrol_jax.assemble_state import abstract_state, per_chip, reference
from arrol_jax.engine import kv_cache, memory
from arrol_jax.learning import batching
from arrol_jax.models import sharding, transformer
from arrol_jax.models.files.weights import Policy
from arrol_jax.models.transformer import PolicyConfig
from arrol_jax.running.hosts import CARD_SHARE
from arrol_jax.types import UserError

ESTIMATE = ("An estimate, by count. Beside four peaks of an H100 (experiments/results/card): decoding 4% below to 2% above, the "
            "update 12% above; an adapters' step in 24 GB of an H100 and of an H200 4% above. The limit is "
            f"{CARD_SHARE} of the card, which commands take unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.")
PHASES = "generation", "update", "optimizer"


@dataclasses.dataclass
class Needs:
  """Bytes by what takes them: `held` all the time, and what each phase has beside it. slots: rows that decode at once."""
  held: dict[str, int]
  phases: dict[str, dict[str, int]]
  slots: int = 0
  error: str = ""  # why there is no generation

  def peak(self, phase: str) -> int:
    return sum(self.held.values()) + sum(self.phases[phase].values())


def count(c: ConfigDict, model: PolicyConfig, limit: int) -> Needs:
  """What the config's step needs on a card whose programs may fill `limit` bytes; rollout.slots None: as many as fit."""
  model, mesh = dataclasses.replace(model, lora=assemble.lora(c)), sharding.make_mesh()
  state = abstract_state(c, model, mesh)
  held = {"trained weights, optimizer, head": per_chip(state.changing)}
  if state.base is not None:
    held["frozen weights"] = per_chip(state.base)
  elif reference(c, state):
    held["reference weights"] = reference(c, state)
  gradients = per_chip(state.params["policy"])
  out = Needs(held, {"update": {"gradients": 2 * gradients} | update(c, model),  # their sum, and a micro-batch's
                     "optimizer": {"gradients": gradients, "optimizer's step": gradients}})
  try:
    out.slots, out.phases["generation"] = generation(c, model, state.policy, limit - sum(held.values()), limit)
    if c.rollout.ahead:
      for phase in ("update", "optimizer"):
        out.phases[phase]["cache of what runs ahead"] = out.phases["generation"]["cache"]
  except UserError as e:
    out.error = str(e)
  return out


def generation(c: ConfigDict, model: PolicyConfig, params: dict, free: int, limit: int) -> tuple[int, dict[str, int]]:
  """Rows that decode at once, and what they need. UserError where not one group has room."""
  c = c.copy_and_resolve_references()
  if c.rollout.attention == "auto" and c.model.dtype == "bfloat16" and model.head_dim & (model.head_dim - 1) == 0:
    c.rollout.attention = "triton"  # what auto is on a GPU
  loaded, size = Policy(model, params, None, (model.vocab - 1,), 0), jnp.dtype(c.model.dtype).itemsize
  with jax.set_mesh(sharding.make_mesh()):
    engine = assemble.engine(c, loaded, sharding.make_mesh(), c.rollout.max_new, params, memory=(free, limit))
    how = assemble.sampling(c, loaded)
    columns, weights = engine.lengths(how)[-1], memory.decode_weights(engine, params, c.model.dtype)
  token = kv_cache.bytes_per_token(model.layers, model.kv_heads, model.head_dim, how.cache_dtype)
  return engine.rows, {
    "weights to decode with": weights,
    "cache": engine.rows * columns * token,
    "prompts": engine.prefill_rows * engine.max_prompt * (token + 8 * max(model.ffn, model.width) * size),
    "sampling": engine.rows * 3 * 4 * model.vocab}


def update(c: ConfigDict, model: PolicyConfig) -> dict[str, int]:
  """What gradients of one micro-batch need beside weights and gradients."""
  size = jnp.dtype(c.model.dtype).itemsize
  batch = max(batching.abstract_batches(assemble.pack_shape(c), sharding.make_mesh()), key=lambda x: x.response_mask.size)
  tokens, rows = batch.tokens.size, batch.response_mask.size  # each once; and as attention sees them, with padding
  d, f, heads, kv = model.width, model.ffn, model.heads * model.head_dim, model.kv_heads * model.head_dim
  layers = sum(math.prod(w.shape) for w in transformer.block_weights(model).values()) * model.layers
  products = 2 * heads + 2 * kv + d + 2 * f
  saved = {"full": 0, "dots": products, "none": products + 6 * d + 3 * f + 2 * heads}[c.model.remat] + d
  chunk = min(c.optim.chunk_tokens, tokens)
  out = {"activations for the backward pass": tokens * model.layers * saved * size,
         "a layer's backward pass": (tokens * (products + 3 * f + 4 * d) + 2 * rows * (2 * heads + 2 * kv)) * size,
         "logits": 3 * chunk * model.vocab * 4}
  if not c.model.scan_layers:  # about what two shapes took more on an H100
    out["layers one by one"] = 8 * layers + tokens * model.layers * (d + f) * size
  if not model.lora and c.model.dtype != "float32":
    out["weights in model.dtype"] = (layers + model.vocab * model.width) * size
  return out


def fits(needs: Needs, limit: int) -> bool:
  return not needs.error and all(needs.peak(phase) <= limit for phase in PHASES)


def changes(c: ConfigDict) -> Iterator[dict]:
  """Overrides that save memory, those that should cost the least first; adapters, which train something else, last."""
  yield from _same_training(c)
  if c.rollout.slots is not None:
    yield from ({"rollout.slots": None} | x for x in _same_training(c))
  if not c.model.lora.rank:
    yield from ({"model.lora.rank": 16} | x for x in [{}, *changes(changed(c, {"model.lora.rank": 16}))])


def _same_training(c: ConfigDict) -> Iterator[dict]:
  """Those that leave the trained weights as they are; with none at first, which goes with another rollout.slots."""
  longest = assemble.pack_shape(c).lengths()[-1]
  scan = {} if c.model.scan_layers else {"model.scan_layers": True}
  yield scan
  chunks = scan | ({"optim.chunk_tokens": 1024} if c.optim.chunk_tokens > 1024 else {})
  yield chunks
  tokens = c.optim.micro_tokens
  while tokens > 2 * longest:
    tokens //= 2
    yield chunks | {"optim.micro_tokens": tokens}
  small = chunks | {"optim.micro_tokens": tokens} | ({"model.remat": "full"} if c.model.remat != "full" else {})
  yield small
  small |= {"rollout.cache": "int8"} if c.rollout.cache is None else {}
  yield small
  yield small | ({"rollout.weights": "int8"} if c.rollout.weights is None else {})


def what_fits(c: ConfigDict, model: PolicyConfig, limit: int) -> dict | None:
  """The first of `changes` with which the config fits, and with how many slots where fewer have to be."""
  for change in filter(None, changes(c)):
    needs = count(changed(c, change), model, limit)
    if fits(needs, limit):
      return change | ({"rollout.slots": needs.slots} if "rollout.slots" in change else {})
  return None


def changed(c: ConfigDict, change: dict) -> ConfigDict:
  """The config with these overrides."""
  out = c.copy_and_resolve_references()
  out.update_from_flattened_dict(change)
  return out


def report(title: str, needs: Needs, limit: int) -> str:
  """The count as Markdown: what is held, and each phase's part of the limit."""
  gb = lambda size: f"{size / 1e9:.2f}"
  lines = [f"# {title}", "", f"Held all the time, GB: {', '.join(f'{name} {gb(x)}' for name, x in needs.held.items())}.", "",
           "| phase | beside that, GB | peak, GB | of the limit |", "|---|---|---|---|"]
  for phase in PHASES:
    if phase in needs.phases:
      parts, peak = ", ".join(f"{name} {gb(x)}" for name, x in needs.phases[phase].items()), needs.peak(phase)
      share = f"{peak / limit:.0%}"
      lines.append(f"| {phase} | {parts} | {gb(peak)} | {share if peak <= limit else f'**{share}**'} |")
    else:
      lines.append(f"| {phase} | {needs.error} | | **over** |")
  return "\n".join(lines)
