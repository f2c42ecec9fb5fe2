"""How many slots fit: what a device's memory holds beside all that is there already.
"""

import math

import jax
import jax.numpy as jnp

from arrol_jax.engine import kv_cache
from arrol_jax.engine.sampling import Sampling
from arrol_jax.engine.scheduler import Engine
from arrol_jax.models import transformer
from arrol_jax.running import hosts
from arrol_jax.types import UserError


def slots_that_fit(engine: Engine, sampling: Sampling, group_size: int, params: dict,
                   memory: tuple[int, int] | None = None, share: float = 1.0, to_come: int = 0) -> int | None:
  """Slots that the devices' free memory holds beside decode weights and working memory; None where a device tells nothing.

  Call it with all that stays in memory (parameters, optimizer state) in place but for `to_come` bytes a device, or give a
  device's `memory`: bytes free and bytes in all. share: of what is free, for the engine. Raises UserError where not even one
  group of `group_size` rollouts fits, with what would.
  """
  if memory is None:
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" not in stats:
      return None
    memory = min(hosts.gather((stats["bytes_limit"] - stats["bytes_in_use"] - to_come, stats["bytes_limit"])))
  free, limit = memory
  return _slots_in(engine, sampling, group_size, params, int(share * free), limit)


def decode_weights(engine: Engine, params: dict, dtype: str) -> int:
  """Bytes a device of what the engine makes of `params` to decode with, in `dtype` or int8."""
  loaded = jax.eval_shape(lambda x: transformer.decoding_params(engine.config, x, dtype, engine.weights), params)
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(loaded)) // engine.mesh.shape["tensor"]


def _slots_in(engine: Engine, sampling: Sampling, group_size: int, params: dict, free: int, limit: int) -> int:
  c, mesh = engine.config, engine.mesh
  size = jnp.dtype(sampling.dtype).itemsize
  shards = mesh.shape["tensor"] if c.kv_heads % mesh.shape["tensor"] == 0 else 1
  batch = mesh.shape["data"] * mesh.shape["fsdp"]
  token = kv_cache.bytes_per_token(c.layers, c.kv_heads, c.head_dim, sampling.cache_dtype) // shards
  weights = decode_weights(engine, params, sampling.dtype)
  prefix = engine.prefill_rows * engine.max_prompt // batch * (token + 8 * max(c.ffn, c.width) * size)
  room = free - weights - prefix - limit // 32
  row = engine.lengths(sampling)[-1] * token + 3 * 4 * c.vocab  # its columns; logits and what sampling makes of them
  per_device = max(0, room) // row
  per_device -= per_device % 16 if per_device > 16 else 0  # shapes that matrix units like
  if per_device * batch < group_size:
    fits = max(0, room) * batch // group_size // token - engine.max_prompt - kv_cache.BLOCK
    ways = [f"rollout.max_new={fits}"] * (fits > 0) + ["a smaller rollout.group_size", "a wider mesh"] + [
      "rollout.cache=int8"] * (sampling.cache_dtype != "int8") + ["rollout.weights=int8"] * (engine.weights is None)
    need, left = group_size * row / batch / 1e9, max(0, room) / 1e9
    raise UserError(f"one group of {group_size} rollouts needs {need:.2f} GB of cache on a device and {left:.2f} GB are free "
                    f"beside the weights; {', '.join(ways[:-1])} or {ways[-1]} would need less")
  return per_device * batch
