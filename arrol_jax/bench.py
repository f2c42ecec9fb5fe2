"""Measures the engine, the update and a whole step on random weights: one JSON line a case.

  python -m arrol_jax.bench decode --shape=qwen3-1.7b --rows=256 --prompt=256 --max_new=1024
  python -m arrol_jax.bench update --shape=qwen3-1.7b --rows=128 --prompt=256 --max_new=1024
  python -m arrol_jax.bench step   --shape=qwen3-1.7b --rows=512 --prompt=256 --max_new=2048 --detect=512,256
  python -m arrol_jax.bench attention --shape=qwen3-1.7b --rows=256,64 --prompt=256 --max_new=1024
  python -m arrol_jax.bench gather --shape=qwen3-1.7b --rows=256 --prompt=256 --max_new=1024
Compiles and warms up first, waits for results, reports the median of --runs with minimum and maximum. The floor is what this
device's own measured read bandwidth and matrix rate allow; `floor` in the output says what was measured to get it.
--profile=DIR writes a JAX trace of the last run (of `decode`: two segments).
"""

import argparse
import contextlib
import functools
import heapq
import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from arrol_jax import config as configuration
from arrol_jax.engine import decode_attention, decode_kernel, kv_cache, scheduler
from arrol_jax.engine.programs import generate_segment, init_slots, take_rows
from arrol_jax.engine.sampling import Sampling
from arrol_jax.engine.scheduler import Engine, Request
from arrol_jax.learning import batching, update
from arrol_jax.learning.losses import GRPO
from arrol_jax.models import sharding, transformer
from arrol_jax.models.attention import IMPLEMENTATIONS
from arrol_jax.models.layers import Rotary
from arrol_jax.models.zoo import ZOO
from arrol_jax.pruning.decision import make_decide
from arrol_jax.pruning.head import init_head
from arrol_jax.pruning.rule import PruneRule
from arrol_jax.pruning.table import Calibration
from arrol_jax.types import Rollout, TrainState, UserError


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
  """Response lengths i64[rows]: all max_new ("full"), or clip(lognormal(ln(centre N), spread), N/16, N), the first N."""
  if kind == "full":
    return np.full(rows, max_new)
  lengths = np.random.default_rng(0).lognormal(np.log(max_new * centre), spread, rows)
  lengths = np.clip(lengths, max_new // 16, max_new).astype(int)
  lengths[0] = max_new
  return lengths


def peak_bytes() -> int | None:
  return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def requests(c: transformer.PolicyConfig, rows: int, group: int, prompt: int, lengths: np.ndarray) -> list[Request]:
  """`rows` requests over rows / group random prompts of `prompt` tokens, each to run to its own length."""
  tokens = np.random.default_rng(0).integers(1, c.vocab - 2, (-(-rows // group), prompt)).astype(np.int32)
  return [Request(i, i // group, tokens[i // group], int(lengths[i])) for i in range(rows)]


def spread(values: list[float]) -> dict:
  return {"runs": len(values), "min": min(values), "max": max(values)}


def cache_bytes(c, a) -> int:
  """Bytes of one token's cache."""
  return kv_cache.bytes_per_token(c.layers, c.kv_heads, c.head_dim, a.cache or a.dtype)


def decode_floor(c, a, lengths, slots: int, limits: dict, shared: bool = False) -> float:
  """Seconds that reading takes at the measured bandwidth: each token its row's cache, each step all weights once.

  Steps: as many as `slots` rows need when a slot takes the next request the moment it is free. shared: a group's prompt is read
  once a step for all its rows (all of them start together), not once a row.
  """
  free = [0] * min(slots, len(lengths))
  for n in lengths:
    heapq.heapreplace(free, free[0] + int(n))
  lengths = np.asarray(lengths, float)
  groups = [lengths[i:i + a.group] for i in range(0, len(lengths), a.group)]
  prompts = sum(max(group) if shared else sum(group) for group in groups) * a.prompt
  context = prompts + np.sum(lengths * (lengths + 1) / 2)
  weights = c.num_params() * jnp.dtype(a.dtype).itemsize
  return (context * cache_bytes(c, a) + max(free) * weights) / limits["read_bytes_s"]


def make_engine(a, c, mesh, slots: int) -> tuple[Engine, Sampling]:
  return (Engine(c, mesh, slots, a.prompt, a.max_new, a.segment, a.row_buckets),
          Sampling(1.0, (), a.dtype, a.cache, a.decode_attention))


def decode(a, c, mesh) -> list[dict]:
  """W1: static and useful tokens a second of the engine, log-probs and hidden states on."""
  limits = ceilings()
  engine, sampling = make_engine(a, c, mesh, a.slots or a.rows)
  engine.load(jax.jit(lambda key: transformer.init_params(c, key, a.dtype))(jax.random.key(0)), a.dtype)
  key, start = jax.random.key(1), time.perf_counter()
  engine.warm_up(sampling)
  compile_s = time.perf_counter() - start
  lengths = target_lengths("lognormal", a.rows, a.max_new, 0.4, 0.6)
  everything = np.full(a.rows, a.max_new)
  own, full = (requests(c, a.rows, a.group, a.prompt, x) for x in (lengths, everything))
  useful, _ = timed(lambda: engine.run(own, key, sampling) and None, a.runs)
  out = {"tok_s_useful": int(lengths.sum()) / statistics.median(useful),
         "useful_floor_share": decode_floor(c, a, lengths, engine.rows, limits) / statistics.median(useful),
         "useful_floor_share_shared": decode_floor(c, a, lengths, engine.rows, limits, shared=True) / statistics.median(useful),
         "floor": limits}
  rates = [int(lengths.sum()) / s for s in useful]
  if a.static:
    static, _ = timed(lambda: engine.run(full, key, sampling) and None, a.runs)
    floor, shared = (decode_floor(c, a, everything, engine.rows, limits, shared=x) for x in (False, True))
    rates, seconds = [a.rows * a.max_new / s for s in static], statistics.median(static)
    out |= {"tok_s_static": a.rows * a.max_new / seconds, "floor_share": floor / seconds, "floor_share_shared": shared / seconds,
            "floor": limits | {"tok_s_static": a.rows * a.max_new / floor, "tok_s_static_shared": a.rows * a.max_new / shared}}
  if a.profile:
    short = requests(c, a.rows, a.group, a.prompt, np.full(a.rows, 2 * a.segment))
    with jax.profiler.trace(a.profile):
      engine.run(short, key, sampling)
  return [out | {"compile_s": compile_s, "cache": a.cache or a.dtype} | spread(rates)]


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
  def step_triton(columns, qkv, rotary, position, active, kind, together):
    rotary = rotary._replace(cos=rotary.cos[:, 0, 0], sin=rotary.sin[:, 0, 0])
    group = jnp.arange(position.size, dtype=jnp.int32) // a.group
    shared = kv_cache.shared_prefix(group, active, jnp.full_like(position, a.prompt - 1)) if together else None
    columns, out = decode_kernel.step_triton(columns, qkv[:, 0], position + 1, rotary, shared, **kind)
    return columns, out[:, None]

  ways = {"xla": functools.partial(decode_attention.step, "xla")}
  if jax.default_backend() == "gpu":
    ways |= {f"triton{' shared' * together} splits={n} block={block} warps={warps} stages={stages}":
             functools.partial(step_triton, kind=dict(splits=n, block=block, warps=warps, stages=stages), together=together)
             for n, block, warps, stages in KERNELS for together in (False, True)}
  scale = jnp.ones(c.head_dim) if c.qk_norm else None

  def chain(way, columns, qkv, position):
    """Fifty steps, each waiting for the one before, so that launches do not count."""
    rows, active = qkv.shape[0], jnp.ones(qkv.shape[0], bool)
    rotary = Rotary(*transformer.rope_tables(c, position[:, None]), scale, scale, c.norm_eps)
    one = lambda _, x: way(x[0], (qkv + 0.0 * x[1][:, :, :1, None]).astype(qkv.dtype), rotary, position, active)
    return jax.lax.fori_loop(0, 50, one, (columns, qkv[:, :, :, :-2].reshape(rows, 1, -1, c.head_dim)))

  for rows in a.attention_rows:
    spread_out = np.random.default_rng(0).permutation(np.linspace(a.prompt, room - 2, rows))
    contexts = {"start": np.full(rows, a.prompt), "middle": np.full(rows, a.prompt + a.max_new // 2), "spread": spread_out}
    qkv = jax.random.normal(jax.random.key(0), (rows, 1, c.kv_heads, c.heads // c.kv_heads + 2, c.head_dim), a.dtype)
    for name, way in ways.items():
      program = jax.jit(functools.partial(chain, way), donate_argnums=0)
      for context, position in contexts.items():
        position = jnp.asarray(position, jnp.int32)
        columns = jax.jit(kv_cache.empty, static_argnums=range(5))(c.kv_heads, rows, room, c.head_dim, a.cache or a.dtype)
        try:
          columns, _ = program(columns, qkv, position)
          seconds = []
          for _ in range(a.runs):
            start = time.perf_counter()
            columns, _ = jax.block_until_ready(program(columns, qkv, position))
            seconds.append((time.perf_counter() - start) / 50)
        except Exception as e:  # a variant that the compiler refuses is a result too
          out.append({"way": name, "rows": rows, "context": context, "error": str(e).splitlines()[0][:200]})
          continue
        read = int((position + 1).sum()) * cache_bytes(c, a) / c.layers / min(seconds)
        out.append({"way": name, "rows": rows, "context": context, "us": min(seconds) * 1e6, "read_bytes_s": read,
                    "floor_share": read / limits["read_bytes_s"]})
  return out


# splits, block, warps, stages
KERNELS = [(1, 64, 2, 3), (1, 32, 2, 4), (2, 64, 2, 3)]


def fake_rollouts(c, a, lengths: np.ndarray) -> list[Rollout]:
  """Finished rollouts with random tokens and rewards, all of one length a row."""
  rng = np.random.default_rng(0)
  return [Rollout(i, i // a.group, rng.integers(1, c.vocab - 2, a.prompt).astype(np.int32),
                          rng.integers(1, c.vocab - 2, n).astype(np.int32), np.full(n, -10.0, np.float32), stopped=True,
                          scores=(0.0,) * sum(n > d for d in a.detect), reward=float(rng.integers(2)))
          for i, n in enumerate(lengths)]


def fresh_state(c, mesh) -> tuple[TrainState, object]:
  optimizer = update.make_optimizer(1e-6, 1e-3, 0, 1.0, 0.0, 0.9, 0.99)
  axes = sharding.shardings(transformer.logical_axes(c), transformer.abstract_params(c), mesh, sharding.TRAIN)
  weights = jax.jit(lambda key: transformer.init_params(c, key), out_shardings=axes)(jax.random.key(0))
  params = {"policy": weights, "head": init_head(c.width, 256, jax.random.key(1))}
  return TrainState(params, jax.jit(optimizer.init)(params), Calibration(), jnp.zeros((), jnp.int32)), optimizer


def flops(c, tokens: int, length: float, passes: int) -> float:
  """Model FLOPs of `passes` forward-sized passes (3 = forward and backward) over rows of `length` tokens."""
  return passes * (2 * c.num_params() * tokens + 2 * c.layers * c.heads * c.head_dim * length * tokens)


def bench_update(a, c, mesh) -> list[dict]:
  """W2: tokens a second and MFU of the update, and of the log-prob pass, on full rows."""
  limits = ceilings()
  state, optimizer = fresh_state(c, mesh)
  compute = update.Compute(a.dtype, a.attention, a.remat, a.chunk_tokens)
  shape = batching.PackShape(a.prompt + a.max_new, min(a.micro_tokens, a.rows * (a.prompt + a.max_new)), 1)
  batches = batching.pack(fake_rollouts(c, a, np.full(a.rows, a.max_new)), shape, mesh, detect=tuple(a.detect))
  tokens = a.rows * (a.prompt + a.max_new)
  logprob, _ = timed(lambda: update.fill_logprobs(c, state.params["policy"], None, batches, 1.0, compute), a.runs)

  def once():
    nonlocal state
    state, metrics = update.step(c, state, batches, GRPO, 1.0, compute, optimizer)
    return metrics

  seconds, first = timed(once, a.runs, a.profile)
  rates = [tokens / s for s in seconds]
  mfu = lambda s, passes: flops(c, tokens, a.prompt + a.max_new, passes) / s / limits["matmul_flop_s"]
  best = statistics.median(seconds)
  return [{"tokens_s": statistics.median(rates), "mfu": mfu(best, 3), "floor_share": mfu(best, 3), "floor": limits,
           "logprob_tokens_s": tokens / statistics.median(logprob), "logprob_mfu": mfu(statistics.median(logprob), 1),
           "remat": a.remat, "micro_tokens": a.micro_tokens, "chunk_tokens": a.chunk_tokens,
           "compile_s": first - best} | spread(rates)]


def bench_step(a, c, mesh) -> list[dict]:
  """W3: a whole step without pruning and with it at each --detect: phases, speed-ups, and the ideal for the same rollouts."""
  limits = ceilings()
  state, optimizer = fresh_state(c, mesh)
  compute = update.Compute(a.dtype, a.attention, a.remat, a.chunk_tokens)
  engine, sampling = make_engine(a, c, mesh, a.rows)
  slots = a.slots or scheduler.slots_that_fit(engine, sampling, a.group, state.params["policy"]) or a.rows
  engine, _ = make_engine(a, c, mesh, min(slots, a.rows))
  lengths = target_lengths(a.lengths, a.rows, a.max_new, 0.6, 0.5)
  wanted = requests(c, a.rows, a.group, a.prompt, lengths)
  shape = batching.PackShape(a.prompt + a.max_new, a.micro_tokens, a.length_buckets)

  def decide_at(detect):
    rule = PruneRule((detect or a.detect[0],))
    return make_decide(state.params["head"], state.calibration, rule, detect is not None)

  def once(detect: int | None) -> tuple[dict, list]:
    """One step; with detect None the same programs keep every rollout."""
    nonlocal state
    marks = [time.perf_counter()]
    engine.load(state.params["policy"], a.dtype)
    done = engine.run(wanted, jax.random.key(1), sampling, decide=decide_at(detect))
    engine.params = None
    marks.append(time.perf_counter())
    for r in done:
      r.reward = float(r.request % 2)
    batches = batching.pack(done, shape, mesh, detect=(detect or a.detect[0],))
    batches = jax.block_until_ready(update.fill_logprobs(c, state.params["policy"], None, batches, 1.0, compute))
    marks.append(time.perf_counter())
    state, metrics = update.step(c, state, batches, GRPO, 1.0, compute, optimizer)
    jax.block_until_ready((state, metrics))
    marks.append(time.perf_counter())
    seconds = dict(zip(PHASES, np.diff(marks).tolist(), strict=True))
    return seconds | {"step": marks[-1] - marks[0]}, done

  start = time.perf_counter()
  warm_up_step(engine, sampling, decide_at, a, c, state, mesh, shape, compute, optimizer)
  compile_s = time.perf_counter() - start
  results = {}
  for detect in (None, *a.detect):
    trace = jax.profiler.trace(a.profile) if a.profile and detect else contextlib.nullcontext()
    with trace:
      runs = [once(detect) for _ in range(a.runs)]
    results[detect] = {k: statistics.median(seconds[k] for seconds, _ in runs) for k in (*PHASES, "step")}, runs

  base, base_runs = results[None]
  out = []
  for detect in a.detect:
    pruned, runs = results[detect]
    before, after = base_runs[0][1], runs[0][1]
    ideal = ideal_speedup(c, a, before, after, engine.rows, limits)
    ideal["step"] = base["step"] / sum(base[k] / ideal[k] for k in PHASES)
    speedup = {k: base[k] / pruned[k] for k in (*PHASES, "step")}
    kept = [r for r in after if not r.pruned]
    out.append({f"sec_{k}": v for k, v in base.items()} | {f"sec_{k}_pruned": v for k, v in pruned.items()} | {
      "detect": detect, "speedup": speedup, "ideal": ideal, "ideal_share": {k: speedup[k] / ideal[k] for k in ideal},
      "floor_share": decode_floor(c, a, [len(r.tokens) for r in before], engine.rows, limits) / base["generate"],
      "floor": limits, "slots": engine.rows, "kept": len(kept), "tokens_generated": sum(len(r.tokens) for r in before),
      "tokens_generated_pruned": sum(len(r.tokens) for r in after), "tokens_trained_pruned": sum(len(r.tokens) for r in kept),
      "compile_s": compile_s, "cache": a.cache or a.dtype} | spread([x["step"] for x, _ in runs]))
  return out


PHASES = ("generate", "logprob", "update")


def ideal_speedup(c, a, before: list, after: list, slots: int, limits: dict) -> dict:
  """By phase, what these rollouts would gain at the floor: bytes read in generation, FLOPs of the rows trained on."""
  work = lambda done: sum(flops(c, n, n, 1) for n in (len(r.prompt_tokens) + len(r.tokens) for r in done if not r.pruned))
  read = lambda done: decode_floor(c, a, [len(r.tokens) for r in done], slots, limits)
  trained = work(before) / work(after)
  return {"generate": read(before) / read(after), "logprob": trained, "update": trained}


def warm_up_step(engine, sampling, decide_at, a, c, state, mesh, shape, compute, optimizer) -> None:
  """Compiles everything a step runs: the engine's shapes, and a micro-batch of each row length."""
  engine.load(state.params["policy"], a.dtype)
  for detect in (None, *a.detect):
    engine.warm_up(sampling, decide_at(detect))
  engine.params = None
  totals = {"tokens": jnp.float32(1), "rows": jnp.float32(1), "head": jnp.float32(1)}
  for batch in batching.empty_batches(shape, mesh, (a.detect[0],)):
    update.fill_logprobs(c, state.params["policy"], None, [batch], 1.0, compute)
    grads, metrics = update.zeros(c, state.params)
    jax.block_until_ready(update.accumulate(c, state.params, grads, metrics, batch, totals, loss=GRPO, temperature=1.0,
                                            compute=compute))


CASES = {"decode": decode, "update": bench_update, "step": bench_step, "attention": bench_attention, "gather": bench_gather}


def main():
  p = argparse.ArgumentParser(prog="python -m arrol_jax.bench", description=__doc__.partition("\n")[0])
  p.add_argument("case", choices=CASES)
  p.add_argument("--shape", default="tiny")
  p.add_argument("--rows", default="64", help="rollouts; for `attention` several row counts, separated by commas")
  p.add_argument("--detect", default="64", help="detection lengths of `step`, separated by commas")
  for name, default in dict(group=16, prompt=64, max_new=128, slots=0, segment=32, runs=3, row_buckets=4, length_buckets=6,
                            micro_tokens=16384, chunk_tokens=4096).items():
    p.add_argument(f"--{name}", type=int, default=default)
  p.add_argument("--lengths", choices=("full", "lognormal"), default="lognormal")
  p.add_argument("--static", action=argparse.BooleanOptionalAction, default=True, help="`decode`: also all rows to --max_new")
  p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32" if jax.default_backend() == "cpu" else "bfloat16")
  p.add_argument("--cache", choices=("int8",), default=None)
  p.add_argument("--attention", choices=IMPLEMENTATIONS, default="auto")
  p.add_argument("--decode_attention", choices=decode_attention.IMPLEMENTATIONS, default="auto")
  p.add_argument("--remat", choices=transformer.REMAT, default="dots")
  p.add_argument("--profile", default=None)
  a = p.parse_args(sys.argv[1:])
  if a.shape not in ZOO:
    raise UserError(f"--shape={a.shape} is not known; there are {', '.join(ZOO)}")
  try:
    a.attention_rows, a.detect = [int(x) for x in a.rows.split(",")], [int(x) for x in a.detect.split(",")]
  except ValueError as e:
    raise UserError("--rows and --detect take whole numbers, separated by commas") from e
  a.rows = a.attention_rows[0]
  for name in ("group", "prompt", "max_new", "segment", "runs", "row_buckets", "length_buckets", "micro_tokens", "chunk_tokens"):
    if getattr(a, name) < 1:
      raise UserError(f"--{name} is {getattr(a, name)}; it must be at least 1")
  if min(a.attention_rows) < 1:
    raise UserError(f"--rows is {min(a.attention_rows)}; it must be at least 1")
  if a.slots < 0:
    raise UserError(f"--slots is {a.slots}; it must be at least 1, or 0 for as many as there are rows")
  if a.case == "step" and any(d % a.segment or not 2 <= d < a.max_new for d in a.detect):
    raise UserError(f"--detect: each must be a multiple of --segment={a.segment} and less than --max_new={a.max_new}")
  mesh = sharding.make_mesh()
  with jax.set_mesh(mesh):
    results = CASES[a.case](a, ZOO[a.shape], mesh)
  line = {"case": a.case, "shape": a.shape, "rows": a.rows, "prompt": a.prompt, "max_new": a.max_new, "lengths": a.lengths,
          "dtype": a.dtype, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
  for result in results:
    print(json.dumps(line | result | {"peak_bytes": peak_bytes(),
                                      "command": "python -m arrol_jax.bench " + " ".join(sys.argv[1:])}), flush=True)


if __name__ == "__main__":
  configuration.run(main)
