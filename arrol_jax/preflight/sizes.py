"""Shapes and memory of a step, from shapes alone: nothing is allocated or compiled.

Memory is what is known beforehand: weights, optimizer, decode weights, cache, gradients. Left out: activations and the
compiler's working memory, which come on top (arrol-plan has them compiled for TPUs, and counts them for one GPU).
"""

import os

import jax
from ml_collections import ConfigDict

from arrol_jax import assemble
from arrol_jax.assemble_state import abstract_state, per_chip, reference
from arrol_jax.engine import kv_cache
from arrol_jax.engine.memory import decode_weights
from arrol_jax.engine.scheduler import Engine
from arrol_jax.learning import batching
from arrol_jax.models.files.weights import Policy
from arrol_jax.preflight.page import Page, size
from arrol_jax.types import TrainState, UserError


def device_memory() -> tuple[int | None, str]:
  """Bytes a device may hold, and what they are of; a CPU's are shared by all of this machine's devices."""
  device = jax.local_devices()[0]
  stats = device.memory_stats() or {}
  if "bytes_limit" in stats:
    return stats["bytes_limit"], device.device_kind
  if device.platform == "cpu" and hasattr(os, "sysconf"):
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // jax.local_device_count(), "this machine"
  return None, device.device_kind


def shapes(page: Page, c: ConfigDict, loaded: Policy, mesh: jax.sharding.Mesh) -> tuple[Engine, TrainState]:
  """What a step rolls out and learns from, and how many programs that compiles."""
  r, state = c.rollout, abstract_state(c, loaded.config, mesh)
  limit, _ = device_memory()
  on_device = jax.local_devices()[0].platform != "cpu" and limit is not None
  held = per_chip(state) + reference(c, state)
  engine = assemble.engine(c, loaded, mesh, r.max_new, state.policy, (limit - held, limit) if on_device else None)
  started, config = r.prompts * r.group_size, assemble.step_config(c, loaded)
  chosen = f", chosen from {assemble.candidates(c)}" if assemble.candidates(c) > r.prompts else ""
  page.say(f"{r.prompts} prompts{chosen} x {r.group_size} rollouts = {started:,} a step, in {engine.rows:,} slots "
           f"({-(-started // engine.rows)} after each other)")
  if c.prune.enabled:
    page.say(f"after {c.prune.cold_start} steps without pruning, about {c.prune.keep:.0%} of those that get to "
             f"{', '.join(map(str, assemble.detect(c)))} tokens go on ({c.prune.rule})")
  batches = batching.abstract_batches(assemble.pack_shape(c), mesh)
  page.say("micro-batches of tokens x rows x columns: " + ", ".join(
    f"{b.tokens.size:,} x {b.response_mask.shape[0]} x {b.response_mask.shape[1]}" for b in batches))
  programs = assemble.programs(c, engine, config, state)
  page.say(f"{len(programs)} programs to compile: {len(engine.row_counts(config.sampling))} row counts x "
           f"{len(engine.lengths(config.sampling))} cache lengths, {len(batches)} shapes of micro-batches")
  return engine, state


def memory(page: Page, c: ConfigDict, loaded: Policy, engine: Engine, state: TrainState) -> None:
  """Bytes a device, in the two phases of a step."""
  mesh, policy = engine.mesh, loaded.config
  weights, frozen, compared = per_chip(state.params["policy"]), per_chip(state.base), reference(c, state)
  sampling = assemble.sampling(c, loaded)
  numbers = sum(x.size for x in jax.tree.leaves(state.policy))
  decode = decode_weights(engine, state.policy, sampling.dtype)
  shards = mesh.shape["tensor"] if policy.kv_heads % mesh.shape["tensor"] == 0 else 1
  token = kv_cache.bytes_per_token(policy.layers, policy.kv_heads, policy.head_dim, sampling.cache_dtype) // shards
  cache = engine.rows // (mesh.shape["data"] * mesh.shape["fsdp"]) * engine.lengths(sampling)[-1] * token
  rest = per_chip(state.changing) - weights
  held = weights + frozen + compared + rest
  if frozen and sum(x.size for x in jax.tree.leaves(state.params["policy"])) > numbers // 2:
    page.warn(f"model.lora.rank is {c.model.lora.rank}: the adapters hold more numbers than the model; a smaller one, or all "
              "weights (model.lora.rank=0), would learn as much with less")
  parts = [("trained weights" if frozen else "weights", weights), ("frozen weights", frozen), ("reference", compared),
           ("optimizer and head", rest)]
  page.say(f"{numbers:,} parameters; a device holds " + ", ".join(f"{name} {size(n)}" for name, n in parts if n))
  under_way = cache if c.rollout.ahead else 0  # the next steps' rollouts
  rolling, learning = held + decode + cache, held + weights + under_way
  page.say(f"while rolling out also decode weights {size(decode)} and cache {size(cache)}: {size(rolling)}")
  page.say(f"while learning also gradients {size(weights)}"
           f"{f' and cache {size(under_way)}' if under_way else ''}: {size(learning)}, and activations")
  limit, where = device_memory()
  if limit is None:
    page.say(f"{where} does not say how much memory it has")
    return
  page.say(f"{where} has {size(limit)} a device")
  if max(rolling, learning) > limit:
    raise UserError(f"memory: {size(max(rolling, learning))} a device are needed before any activation, and {where} has "
                    f"{size(limit)}: a smaller rollout.slots, a wider mesh.fsdp or a smaller model would fit")
