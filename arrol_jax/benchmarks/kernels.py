"""Parts of a decoding step: attention over the cache by each way, and the gather that compacts rows."""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from arrol_jax.benchmarks.measuring import cache_bytes, ceilings, make_engine, spread, timed
from arrol_jax.engine import decode_attention, decode_kernel, kv_cache
from arrol_jax.engine.decode_kernel import Tiling
from arrol_jax.engine.programs import generate_segment, init_slots, take_rows
from arrol_jax.models import transformer
from arrol_jax.models.layers import Rotary

TILINGS = [Tiling(1, 64, 2, 3), Tiling(1, 32, 2, 4), Tiling(2, 64, 2, 3)]
CHAIN = 50  # steps of attention that are timed together


def bench_gather(a, c, mesh) -> list[dict]:
  """Compaction: milliseconds to gather half the rows into the next smaller row count, and the steps after which it has paid.

  Both row counts step on half the rows living at half of --max_new, the worst case for compacting: it saves least there.
  """
  engine, sampling = make_engine(a, c, mesh, a.slots or a.rows)
  engine.load(jax.jit(lambda key: transformer.init_params(c, key, a.dtype))(jax.random.key(0)), a.dtype)
  length, out = engine.lengths(sampling)[-1], []

  @functools.partial(jax.jit, static_argnums=(0, 1))
  def half_alive(rows: int, living: int):
    slots = init_slots(c, rows, length, sampling)
    return slots.replace(active=jnp.arange(rows) < living, position=jnp.full(rows, a.prompt + a.max_new // 2, jnp.int32),
                         max_tokens=jnp.full(rows, a.max_new, jnp.int32))

  def step_ms(rows: int, living: int) -> float:
    run = lambda: generate_segment(c, engine.params, half_alive(rows, living), steps=a.segment, sampling=sampling)
    idle = min(timed(lambda: half_alive(rows, living), a.runs)[0])
    return 1e3 * (statistics.median(timed(run, a.runs)[0]) - idle) / a.segment

  for rows, fewer in ((a.rows >> i, a.rows >> i + 1) for i in range(a.row_buckets - 1)):
    seconds = []
    for _ in range(a.runs + 1):
      slots = jax.block_until_ready(half_alive(rows, fewer))
      start = time.perf_counter()
      jax.block_until_ready(take_rows(slots, np.arange(fewer, dtype=np.int32) * 2 % rows, np.ones(fewer, bool),
                                               length=length))
      seconds.append(1e3 * (time.perf_counter() - start))
    wide, narrow, gather = step_ms(rows, fewer), step_ms(fewer, fewer), statistics.median(seconds[1:])
    out.append({"from": rows, "to": fewer, "ms_gather": gather, "ms_step_before": wide, "ms_step_after": narrow,
                "steps_to_pay": gather / (wide - narrow) if wide > narrow else None} | spread(seconds[1:]))
  return out


def bench_attention(a, c, mesh) -> list[dict]:
  """One layer's decoding step: microseconds and bandwidth of each way, by rows and by context (all alike, and W1's spread).

  "shared" reads the prompt of --group rows once, see kv_cache.SharedPrefix; the bandwidth counts every row's own columns
  all the same.
  """
  limits, out = ceilings(), []
  room = -(-(a.prompt + a.max_new) // kv_cache.BLOCK) * kv_cache.BLOCK
  for rows in a.attention_rows:
    spread_out = np.random.default_rng(0).permutation(np.linspace(a.prompt, room - 2, rows))
    contexts = {"start": np.full(rows, a.prompt), "middle": np.full(rows, a.prompt + a.max_new // 2), "spread": spread_out}
    qkv = jax.random.normal(jax.random.key(0), (rows, 1, c.kv_heads, c.heads // c.kv_heads + 2, c.head_dim), a.dtype)
    for name, way in _ways(a).items():
      program = jax.jit(functools.partial(_chain, c, way), donate_argnums=0)
      for context, position in contexts.items():
        position = jnp.asarray(position, jnp.int32)
        columns = jax.jit(kv_cache.empty, static_argnums=range(5))(c.kv_heads, rows, room, c.head_dim, a.cache or a.dtype)
        try:
          columns, _ = program(columns, qkv, position)
          seconds = []
          for _ in range(a.runs):
            start = time.perf_counter()
            columns, _ = jax.block_until_ready(program(columns, qkv, position))
            seconds.append((time.perf_counter() - start) / CHAIN)
        except Exception as e:  # a variant that the compiler refuses is a result too
          out.append({"way": name, "rows": rows, "context": context, "error": str(e).splitlines()[0][:200]})
          continue
        read = int((position + 1).sum()) * cache_bytes(c, a) / c.layers / min(seconds)
        out.append({"way": name, "rows": rows, "context": context, "us": min(seconds) * 1e6, "read_bytes_s": read,
                    "floor_share": read / limits["read_bytes_s"]})
  return out


def _ways(a) -> dict:
  """Names and steps to compare, called as way(columns, qkv, rotary, position, active)."""
  def step_triton(columns, qkv, rotary, position, active, tiling, together):
    rotary = rotary._replace(cos=rotary.cos[:, 0, 0], sin=rotary.sin[:, 0, 0])
    group = jnp.arange(position.size, dtype=jnp.int32) // a.group
    shared = kv_cache.shared_prefix(group, active, jnp.full_like(position, a.prompt - 1)) if together else None
    columns, out = decode_kernel.step_triton(columns, qkv[:, 0], position + 1, rotary, shared, tiling=tiling)
    return columns, out[:, None]

  ways = {"xla": functools.partial(decode_attention.step, "xla")}
  if jax.default_backend() == "gpu":
    ways |= {f"triton{' shared' * together} " + " ".join(f"{k}={v}" for k, v in tiling._asdict().items()):
             functools.partial(step_triton, tiling=tiling, together=together) for tiling in TILINGS for together in (False, True)}
  return ways


def _chain(c, way, columns, qkv, position):
  """Steps that each wait for the one before, so that launches do not count."""
  rows, active = qkv.shape[0], jnp.ones(qkv.shape[0], bool)
  scale = jnp.ones(c.head_dim) if c.qk_norm else None
  rotary = Rotary(*transformer.rope_tables(c, position[:, None]), scale, scale, c.norm_eps)
  one = lambda _, x: way(x[0], (qkv + 0.0 * x[1][:, :, :1, None]).astype(qkv.dtype), rotary, position, active)
  return jax.lax.fori_loop(0, CHAIN, one, (columns, qkv[:, :, :, :-2].reshape(rows, 1, -1, c.head_dim)))
