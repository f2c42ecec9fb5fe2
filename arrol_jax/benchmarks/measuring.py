"""What benchmarks share: timing, this device's ceilings, workloads, floors. `a` is the command line (bench.py).
"""

import contextlib
import dataclasses
import heapq
import json
from pathlib import Path
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from arrol_jax.engine import kv_cache
from arrol_jax.engine.sampling import Sampling
from arrol_jax.engine.scheduler import Engine, Request
from arrol_jax.learning import optimizers
from arrol_jax.models import sharding, transformer
from arrol_jax.models.lora import Lora
from arrol_jax.planning.rollout import lognormal_lengths
from arrol_jax.pruning.head import init_head
from arrol_jax.pruning.table import Calibration
from arrol_jax.types import Rollout, TrainState


def timed(run, runs: int, profile: str | None = None) -> tuple[list[float], float]:
  """Seconds of `runs` calls after a warm-up, and the warm-up's (compilation included)."""
  seconds = []
  for i in range(runs + 1):
    trace = jax.profiler.trace(profile) if profile and i == runs else contextlib.nullcontext()
    with trace:
      start = time.perf_counter()
      jax.block_until_ready(run())
      seconds.append(time.perf_counter() - start)
  return seconds[1:], seconds[0]


def ceilings() -> dict:
  """Measured read bandwidth (bytes/s) and bfloat16 matrix rate (FLOP/s; float32 on a CPU) of one device."""
  big = jax.default_backend() != "cpu"
  x = jnp.ones((1 << (29 if big else 26),), jnp.bfloat16 if big else jnp.float32)
  total = jax.jit(lambda x: jnp.sum(x, dtype=jnp.float32))
  size, dtype = (8192, jnp.bfloat16) if big else (1024, jnp.float32)
  a = jax.random.normal(jax.random.key(0), (size, size), dtype)
  product = jax.jit(lambda a: a @ a)
  read = min(timed(lambda: [total(x) for _ in range(10)], 3)[0]) / 10
  matmul = min(timed(lambda: [product(a) for _ in range(10)], 3)[0]) / 10
  return {"read_bytes_s": x.nbytes / read, "matmul_flop_s": 2 * size**3 / matmul}


def target_lengths(kind: str, rows: int, max_new: int, centre: float, spread: float) -> np.ndarray:
  """Response lengths i64[rows]: all max_new ("full"), or as rollout.lognormal_lengths draws them."""
  return np.full(rows, max_new) if kind == "full" else lognormal_lengths(rows, max_new, centre, spread)


def peak_bytes() -> int | None:
  return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


class Workload(NamedTuple):
  """What a benchmark rolls out, by rollout: its length; by group: its prompt's length. rewards: None where none is known."""
  prompts: list[int]
  responses: np.ndarray
  rewards: np.ndarray | None = None


# A step of experiments/results/gsm8k_step/none, and the settings of configs/gsm8k_qwen05b.py on random weights of that shape.
PRESETS = {"gsm8k": {"shape": "qwen2.5-0.5b-untied", "rows": "512", "group": 16, "prompt": 256, "max_new": 400, "detect": "128",
                     "segment": 16, "length_buckets": 2, "tail_sizes": 1}}


def preset(name: str) -> Workload:
  """Real lengths and rewards of a committed step."""
  told = json.loads(Path(__file__).with_name(f"{name}_step.json").read_text())
  return Workload(told["prompt_tokens"], np.concatenate(told["response_tokens"]), np.concatenate(told["rewards"]))


def alike(a, lengths: np.ndarray) -> Workload:
  """`lengths` of responses, prompts of --prompt tokens each."""
  return Workload([a.prompt] * -(-a.rows // a.group), lengths)


def requests(c: transformer.PolicyConfig, group: int, work: Workload) -> list[Request]:
  """Requests over random prompts, each to run to its own length."""
  rng = np.random.default_rng(0)
  tokens = [rng.integers(1, c.vocab - 2, n).astype(np.int32) for n in work.prompts]
  return [Request(i, i // group, tokens[i // group], int(n)) for i, n in enumerate(work.responses)]


def spread(values: list[float]) -> dict:
  return {"runs": len(values), "min": min(values), "max": max(values)}


def cache_bytes(c, a) -> int:
  """Bytes of one token's cache."""
  return kv_cache.bytes_per_token(c.layers, c.kv_heads, c.head_dim, a.cache or a.dtype)


def decode_floor(c, a, work: Workload, slots: int, limits: dict, shared: bool = False) -> float:
  """Seconds that reading takes at the measured bandwidth of one device: each token its row's cache, each step all weights once.
  Over the mesh in use devices share the rows and their heads; weights are split along `tensor` alone.

  Steps: as many as `slots` rows need when a slot takes the next request the moment it is free. shared: a group's prompt is read
  once a step for all its rows (all of them start together), not once a row.
  """
  free = [0] * min(slots, len(work.responses))
  for n in work.responses:
    heapq.heapreplace(free, free[0] + int(n))
  lengths = np.asarray(work.responses, float)
  groups = [lengths[i:i + a.group] for i in range(0, len(lengths), a.group)]
  prompts = sum(n * (max(group) if shared else sum(group)) for n, group in zip(work.prompts, groups, strict=True))
  context = prompts + np.sum(lengths * (lengths + 1) / 2)
  weights = c.num_params() * jnp.dtype(a.weights or a.dtype).itemsize
  mesh = jax.sharding.get_mesh()
  devices, parts = (mesh.size, mesh.shape["tensor"]) if not mesh.empty else (1, 1)
  return (context * cache_bytes(c, a) / devices + max(free) * weights / parts) / limits["read_bytes_s"]


def make_engine(a, c, mesh, slots: int) -> tuple[Engine, Sampling]:
  """An engine, and how it draws: as in a training run, where the temperature is the request's (1)."""
  return (Engine(c, mesh, slots, a.prompt, a.max_new, a.segment, a.row_buckets, weights=a.weights),
          Sampling(None, (), a.dtype, a.cache, a.decode_attention, top_p=1.0))


def fake_rollouts(c, a, lengths: np.ndarray) -> list[Rollout]:
  """Finished rollouts with random tokens and rewards, all of one length a row."""
  rng = np.random.default_rng(0)
  return [Rollout(i, i // a.group, rng.integers(1, c.vocab - 2, a.prompt).astype(np.int32),
                          rng.integers(1, c.vocab - 2, n).astype(np.int32), np.full(n, -10.0, np.float32), stopped=True,
                          scores=(0.0,) * sum(n > d for d in a.detect), reward=float(rng.integers(2)))
          for i, n in enumerate(lengths)]


def with_lora(c: transformer.PolicyConfig, rank: int) -> transformer.PolicyConfig:
  """The shape with adapters of `rank` beside all matrices of its layers; 0: without."""
  return dataclasses.replace(c, lora=Lora(rank, 2.0 * rank)) if rank else c


def fresh_state(c, mesh, dtype: str = "float32") -> tuple[TrainState, object]:
  """Random weights and an optimizer, sharded as in a run. With c.lora they are frozen, in `dtype`, and fresh adapters trained."""
  optimizer = optimizers.Optimizer(optimizers.RateSchedule("constant", 1e-6, 0, 1), 1e-3, 1.0, 0.0, 0.9, 0.99)
  def make(init, axes):
    shapes = jax.eval_shape(init, jax.random.key(0))
    return jax.jit(init, out_shardings=sharding.shardings(axes, shapes, mesh, sharding.TRAIN))(jax.random.key(0))

  weights = make(lambda key: transformer.init_params(c, key, dtype if c.lora else "float32"), transformer.logical_axes(c))
  trained = make(lambda key: transformer.init_adapters(c, key), transformer.adapter_axes(c)) if c.lora else weights
  head, tables, step = jax.device_put((init_head(c.width, 256, jax.random.key(1)), Calibration(), jnp.zeros((), jnp.int32)),
                                      sharding.replicated(mesh))
  params = {"policy": trained, "head": head}
  where = sharding.following(jax.eval_shape(optimizer.init, params), params, mesh)
  opt_state = jax.jit(optimizer.init, out_shardings=where)(params)
  return TrainState(params, opt_state, tables, step, base=weights if c.lora else None), optimizer


def flops(c, tokens: int, length: float, passes: int) -> float:
  """Model FLOPs of `passes` forward-sized passes (3 = forward and backward) over rows of `length` tokens."""
  return passes * (2 * c.num_params() * tokens + 2 * c.layers * c.heads * c.head_dim * length * tokens)
