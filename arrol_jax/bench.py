"""Measures the engine, the update and a whole step on random weights: one JSON line a case.

  python -m arrol_jax.bench decode --shape=qwen3-1.7b --rows=256 --prompt=256 --max_new=1024 --lengths=lognormal
  python -m arrol_jax.bench update --shape=qwen3-1.7b --rows=128
  python -m arrol_jax.bench step   --shape=qwen3-1.7b --rows=512 --max_new=2048 --detect=512
Compiles and warms up first, waits for results, reports the median of --runs with minimum and maximum. The floor is what this
device's own measured read bandwidth and matrix rate allow; `floor` in the output says what was measured to get it.
--profile=DIR writes a JAX trace of the last run.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np

from arrol_jax import config as configuration, policy, prune, quality, rollout, sharding, update
from arrol_jax.decode import Sampling
from arrol_jax.engine import Engine, Request
from arrol_jax.losses import GRPO
from arrol_jax.types import TrainState, UserError
from arrol_jax.zoo import ZOO


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


def requests(c: policy.PolicyConfig, rows: int, group: int, prompt: int, lengths: np.ndarray) -> list[Request]:
  """`rows` requests over rows / group random prompts of `prompt` tokens, each to run to its own length."""
  tokens = np.random.default_rng(0).integers(1, c.vocab - 2, (-(-rows // group), prompt)).astype(np.int32)
  return [Request(i, i // group, tokens[i // group], int(lengths[i])) for i in range(rows)]


def spread(values: list[float]) -> dict:
  return {"runs": len(values), "min": min(values), "max": max(values)}


def decode(a, c, mesh) -> dict:
  """W1: static and useful tokens a second of the engine, log-probs and hidden states on."""
  limits = ceilings()
  engine = Engine(c, mesh, a.slots or a.rows, a.prompt, a.max_new, a.segment)
  engine.load(policy.init_params(c, jax.random.key(0), a.dtype), a.dtype)
  sampling, key = Sampling(1.0, (), a.dtype), jax.random.key(1)
  lengths = target_lengths(a.lengths, a.rows, a.max_new, 0.4, 0.6)
  full = requests(c, a.rows, a.group, a.prompt, np.full(a.rows, a.max_new))
  own = requests(c, a.rows, a.group, a.prompt, lengths)
  static, compile_static = timed(lambda: engine.run(full, key, sampling) and None, a.runs)
  useful, compile_useful = timed(lambda: engine.run(own, key, sampling) and None, a.runs, a.profile)
  size = jnp.dtype(a.dtype).itemsize
  columns = 2 * c.layers * c.kv_heads * c.head_dim * size  # cache bytes a token
  step = (c.num_params() * size + columns * (a.prompt + a.max_new / 2) * a.rows) / limits["read_bytes_s"]
  rates = [a.rows * a.max_new / s for s in static]
  return {"tok_s_static": statistics.median(rates), "tok_s_useful": int(lengths.sum()) / statistics.median(useful),
          "floor_share": statistics.median(rates) * step / a.rows, "floor": limits | {"tok_s_static": a.rows / step},
          "compile_s": compile_static + compile_useful - statistics.median(static) - statistics.median(useful)} | spread(rates)


def fake_rollouts(c, a, lengths: np.ndarray) -> list[rollout.Rollout]:
  """Finished rollouts with random tokens and rewards, all of one length a row."""
  rng = np.random.default_rng(0)
  return [rollout.Rollout(i, i // a.group, rng.integers(1, c.vocab - 2, a.prompt).astype(np.int32),
                          rng.integers(1, c.vocab - 2, n).astype(np.int32), np.full(n, -10.0, np.float32), stopped=True,
                          decided=n > a.detect, reward=float(rng.integers(2))) for i, n in enumerate(lengths)]


def fresh_state(c, mesh) -> tuple[TrainState, object]:
  optimizer = update.make_optimizer(1e-6, 1e-3, 0, 1.0, 0.0, 0.9, 0.99)
  axes = sharding.shardings(policy.logical_axes(c), policy.abstract_params(c), mesh, sharding.TRAIN)
  weights = jax.jit(lambda key: policy.init_params(c, key), out_shardings=axes)(jax.random.key(0))
  params = {"policy": weights, "head": quality.init_head(c.width, 256, jax.random.key(1))}
  return TrainState(params, jax.jit(optimizer.init)(params), prune.Calibration(), jnp.zeros((), jnp.int32)), optimizer


def flops(c, tokens: int, length: float, passes: int) -> float:
  """Model FLOPs of `passes` forward-sized passes (3 = forward and backward) over rows of `length` tokens."""
  return passes * (2 * c.num_params() * tokens + 2 * c.layers * c.heads * c.head_dim * length * tokens)


def bench_update(a, c, mesh) -> dict:
  """W2: tokens a second and MFU of the update, and of the log-prob pass, on full rows."""
  limits = ceilings()
  state, optimizer = fresh_state(c, mesh)
  compute = update.Compute(a.dtype, a.attention, a.remat)
  shape = rollout.PackShape(a.prompt + a.max_new, a.micro_tokens, 1)
  batches = rollout.pack(fake_rollouts(c, a, np.full(a.rows, a.max_new)), shape, mesh, detect=a.detect)
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
  return {"tokens_s": statistics.median(rates), "mfu": mfu(best, 3), "floor_share": mfu(best, 3), "floor": limits,
          "logprob_tokens_s": tokens / statistics.median(logprob), "logprob_mfu": mfu(statistics.median(logprob), 1),
          "compile_s": first - best} | spread(rates)


def bench_step(a, c, mesh) -> dict:
  """W3: a whole step with and without pruning: phases, and the speed-up that its own tokens would allow at best."""
  state, optimizer = fresh_state(c, mesh)
  compute = update.Compute(a.dtype, a.attention, a.remat)
  engine = Engine(c, mesh, a.slots or a.rows, a.prompt, a.max_new, a.segment)
  wanted = requests(c, a.rows, a.group, a.prompt, target_lengths(a.lengths, a.rows, a.max_new, 0.6, 0.5))
  rule, shape = rollout.PruneRule(a.detect), rollout.PackShape(a.prompt + a.max_new, a.micro_tokens)
  phases, generated, trained = {}, {}, {}

  def once(pruning: bool):
    nonlocal state
    marks = [time.perf_counter()]
    engine.load(state.params["policy"], a.dtype)
    decide = rollout.make_decide(state.params["head"], state.calibration, rule, pruning)
    done = engine.run(wanted, jax.random.key(1), Sampling(1.0, (), a.dtype), decide=decide)
    engine.params = None
    for r in done:
      r.reward = float(r.request % 2)
    marks.append(time.perf_counter())
    batches = update.fill_logprobs(c, state.params["policy"], None,
                                   rollout.pack(done, shape, mesh, detect=a.detect), 1.0, compute)
    jax.block_until_ready(batches)
    marks.append(time.perf_counter())
    state, metrics = update.step(c, state, batches, GRPO, 1.0, compute, optimizer)
    jax.block_until_ready(metrics)
    marks.append(time.perf_counter())
    phases[pruning].append(dict(zip(("generate", "logprob", "update"), np.diff(marks).tolist(), strict=True)) |
                           {"step": marks[-1] - marks[0]})
    generated[pruning] = sum(len(r.tokens) for r in done)
    trained[pruning] = sum(len(r.tokens) for r in done if not r.pruned)

  out, first = {}, {}
  for pruning in (False, True):
    phases[pruning] = []
    _, first[pruning] = timed(lambda p=pruning: once(p), a.runs, a.profile if pruning else None)
    rows = phases[pruning][1:]
    median = {k: statistics.median(r[k] for r in rows) for k in rows[0]}
    out |= {f"sec_{k}{'_pruned' if pruning else ''}": v for k, v in median.items()}
  speedup = {k: out[f"sec_{k}"] / out[f"sec_{k}_pruned"] for k in ("generate", "logprob", "update", "step")}
  steps = [r["step"] for r in phases[True][1:]]
  return out | {"speedup": speedup, "tokens_generated": generated[False], "tokens_generated_pruned": generated[True],
                "ideal_trained": trained[False] / trained[True], "compile_s": sum(first.values()) - out["sec_step"] -
                out["sec_step_pruned"]} | spread(steps)


CASES = {"decode": decode, "update": bench_update, "step": bench_step}


def main():
  p = argparse.ArgumentParser(prog="python -m arrol_jax.bench", description=__doc__.partition("\n")[0])
  p.add_argument("case", choices=CASES)
  p.add_argument("--shape", default="tiny")
  for name, default in dict(rows=64, group=16, prompt=64, max_new=128, slots=0, segment=32, runs=3, detect=64,
                            micro_tokens=16384).items():
    p.add_argument(f"--{name}", type=int, default=default)
  p.add_argument("--lengths", choices=("full", "lognormal"), default="lognormal")
  p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32" if jax.default_backend() == "cpu" else "bfloat16")
  p.add_argument("--attention", default="auto")
  p.add_argument("--remat", action=argparse.BooleanOptionalAction, default=True)
  p.add_argument("--profile", default=None)
  a = p.parse_args(sys.argv[1:])
  if a.shape not in ZOO:
    raise UserError(f"--shape={a.shape} is not known; there are {', '.join(ZOO)}")
  if a.case == "step" and (a.detect % a.segment or not 2 <= a.detect < a.max_new):
    raise UserError(f"--detect={a.detect} must be a multiple of --segment={a.segment} and less than --max_new={a.max_new}")
  mesh = sharding.make_mesh()
  with jax.set_mesh(mesh):
    result = CASES[a.case](a, ZOO[a.shape], mesh)
  line = {"case": a.case, "shape": a.shape, "rows": a.rows, "prompt": a.prompt, "max_new": a.max_new, "lengths": a.lengths,
          "dtype": a.dtype, "device": jax.devices()[0].device_kind, "jax": jax.__version__} | result
  print(json.dumps(line | {"peak_bytes": peak_bytes(), "command": "python -m arrol_jax.bench " + " ".join(sys.argv[1:])}))


if __name__ == "__main__":
  configuration.run(main)
