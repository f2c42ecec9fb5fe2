"""W2 and W3: the update, and a whole training step with and without pruning.
"""

import contextlib
import statistics
import time

import jax
import numpy as np

from arrol_jax import step_programs
from arrol_jax.benchmarks.measuring import (
  Workload,
  alike,
  ceilings,
  decode_floor,
  fake_rollouts,
  flops,
  fresh_state,
  make_engine,
  preset,
  requests,
  spread,
  target_lengths,
  timed,
  with_lora,
)
from arrol_jax.engine import compile_ahead
from arrol_jax.engine.memory import slots_that_fit
from arrol_jax.learning import batching, update
from arrol_jax.learning.losses import GRPO
from arrol_jax.learning.metrics import by_prompt
from arrol_jax.pruning.rule import PruneRule
from arrol_jax.step import RolledOut, StepConfig, TrainingStep

PHASES = ("generate", "logprob", "update")
TIMED = ("generate", "batch", "logprob", "update", "step")  # a step's seconds; the reward costs none here


def compute(a) -> update.Compute:
  return update.Compute(a.dtype, a.attention, a.remat, a.chunk_tokens, a.scan_layers)


def bench_update(a, c, mesh) -> list[dict]:
  """W2: tokens a second and MFU of the update on full rows; `tokens_s` counts a prompt for each of its rollouts, `mfu` what is
  computed, of all devices' rate."""
  limits, c = ceilings(), with_lora(c, a.lora)
  state, optimizer = fresh_state(c, mesh, a.dtype)
  u = update.UpdateConfig(c, GRPO, compute(a))
  shape = batching.PackShape(a.prompt + a.max_new, a.micro_tokens, 1)
  rollouts = fake_rollouts(c, a, np.full(a.rows, a.max_new))
  batches, counts = batching.pack(rollouts, shape, mesh)
  examples = batching.head_examples(rollouts, state.params["head"], c.width)
  rows = counts["trained"] / a.max_new
  tokens, computed = rows * (a.prompt + a.max_new), sum(int(b.used.sum()) for b in batches)
  logprob, _ = timed(lambda: [update.batch_logprobs(u, state.policy, b, np.float32(1)) for b in batches], a.runs)

  def once():
    nonlocal state
    state, metrics = update.step(u, state, batches, examples, counts | {"temperature": 1.0}, optimizer)
    return metrics

  seconds, first = timed(once, a.runs, a.profile)
  mfu = lambda s, passes: update_flops(c, computed, rows, a, passes) / s / limits["matmul_flop_s"] / mesh.size
  best, passes = statistics.median(seconds), 2 if c.lora else 3  # frozen matrices have no slopes
  return [{"tokens_s": tokens / best, "computed_tokens_s": computed / best, "mfu": mfu(best, passes),
           "floor_share": mfu(best, passes),
           "mfu_is_of": "the measured matrix rate, tokens computed", "floor": limits, "rows_trained": rows,
           "logprob_tokens_s": tokens / statistics.median(logprob), "logprob_mfu": mfu(statistics.median(logprob), 1),
           "remat": a.remat, "scan_layers": a.scan_layers, "micro_tokens": a.micro_tokens, "chunk_tokens": a.chunk_tokens,
           "compile_s": first - best} | spread([tokens / s for s in seconds])]


def update_flops(c, computed: int, rows: float, a, passes: int) -> float:
  """FLOPs of `passes` forward-sized passes: matrix products over the tokens computed, attention of each row over its length."""
  length = a.prompt + a.max_new
  attention = 2 * c.layers * c.heads * c.head_dim * length * length * rows
  return passes * (2 * c.num_params() * computed + attention)


def training_step(a, c, mesh, detect: int, params: dict, optimizer) -> TrainingStep:
  """The step of train.py, with a decision at `detect` tokens and as many slots as fit, at most --rows."""
  engine, sampling = make_engine(a, c, mesh, a.rows)
  slots = a.slots or slots_that_fit(engine, sampling, a.group, params) or a.rows
  engine, _ = make_engine(a, c, mesh, min(slots, a.rows))
  return TrainingStep(engine, StepConfig(
    dtype=a.dtype, sampling=sampling, temperature=1.0, rule=PruneRule((detect,)),
    update=update.UpdateConfig(c, GRPO, compute(a)),
    shape=batching.PackShape(a.prompt + a.max_new, a.micro_tokens, a.length_buckets, a.tail_sizes),
    optimizer=optimizer))


def compile_step(one: TrainingStep, state, prompts: int, group: int) -> None:
  """Compiles all that a step runs, ahead as train.py does."""
  mesh, c = one.engine.mesh, one.config
  programs = step_programs.generation_programs(one.engine, c, state, prompts, group, everything=True)
  programs += step_programs.training_programs(mesh, c, state, prompts * group, prompts * group, everything=True)
  compile_ahead.compile_ahead(programs, mesh)


def bench_step(a, c, mesh, inspect=None) -> list[dict]:
  """W3: a whole step without pruning and with it at each --detect: phases, speed-ups, and the ideal for the same rollouts.

  inspect(compiled TrainingStep, its state) -> fields for the lines.
  """
  limits, c = ceilings(), with_lora(c, a.lora)
  state, optimizer = fresh_state(c, mesh, a.dtype)
  work = preset(a.preset) if a.preset else alike(a, target_lengths(a.lengths, a.rows, a.max_new, 0.6, 0.5))
  wanted = requests(c, a.group, work)
  steps = {detect: training_step(a, c, mesh, detect, state.policy, optimizer) for detect in a.detect}

  def once(detect: int | None) -> tuple[dict, list]:
    """One step; with detect None the same programs keep every rollout."""
    nonlocal state
    one = steps[detect or a.detect[0]]

    def roll_out(decide) -> RolledOut:
      done = one.engine.run(wanted, jax.random.key(1), one.config.sampling, decide=decide)
      for r in done:
        r.reward = float(r.request % 2 if work.rewards is None else work.rewards[r.request])
      return RolledOut(done, done)

    state, rolled, metrics = one(state, roll_out, detect is not None)
    return {k: metrics[f"sec_{k}"] for k in TIMED} | {"rows_trained": metrics["rows_trained"]}, rolled.rollouts

  start = time.perf_counter()
  for one in steps.values():
    compile_step(one, state, a.rows // a.group, a.group)
  compile_s = time.perf_counter() - start
  more = inspect(steps[a.detect[0]], state) if inspect else {}
  results = {}
  for detect in (None, *a.detect):
    trace = jax.profiler.trace(a.profile) if a.profile and detect else contextlib.nullcontext()
    with trace:
      runs = [once(detect) for _ in range(a.runs)]
    results[detect] = {k: statistics.median(seconds[k] for seconds, _ in runs) for k in TIMED}, runs
  slots = steps[a.detect[0]].engine.rows
  return [step_line(a, c, detect, results, slots, limits) | more | {"compile_s": compile_s, "cache": a.cache or a.dtype,
                                                                       "weights": a.weights or a.dtype,
                                                                       "scan_layers": a.scan_layers}
          for detect in a.detect]


def step_line(a, c, detect: int, results: dict, slots: int, limits: dict) -> dict:
  """One decision length's line: phases with and without pruning, speed-ups and their ideal."""
  base, base_runs = results[None]
  pruned, runs = results[detect]
  before, after = base_runs[0][1], runs[0][1]
  lengths = lambda rows: sum(len(r.tokens) for r in rows)
  ideal = ideal_speedup(c, a, before, after, slots, limits)
  ideal["step"] = base["step"] / sum(base[k] / ideal[k] for k in PHASES)
  speedup = {k: base[k] / pruned[k] for k in (*PHASES, "step")}
  return {f"sec_{k}": v for k, v in base.items()} | {f"sec_{k}_pruned": v for k, v in pruned.items()} | {
    "detect": detect, "speedup": speedup, "ideal": ideal, "ideal_share": {k: speedup[k] / ideal[k] for k in ideal},
    "floor_share": decode_floor(c, a, made(before), slots, limits) / base["generate"],
    "rows_trained": base_runs[0][0]["rows_trained"], "rows_trained_pruned": runs[0][0]["rows_trained"], "floor": limits,
    "slots": slots,
    "kept": sum(not r.pruned for r in after), "tokens_generated": lengths(before),
    "tokens_generated_pruned": lengths(after), "tokens_trained_pruned": lengths(trained(after))} | spread(
      [x["step"] for x, _ in runs])


def ideal_speedup(c, a, before: list, after: list, slots: int, limits: dict) -> dict:
  """By phase, what these rollouts would gain at the floor: bytes read in generation, FLOPs of the rows trained on."""
  work = lambda done: sum(flops(c, n, n, 1) for n in (len(r.prompt_tokens) + len(r.tokens) for r in trained(done)))
  read = lambda done: decode_floor(c, a, made(done), slots, limits)
  learned = work(before) / max(work(after), 1.0)  # one FLOP where nothing is left to train
  return {"generate": read(before) / read(after), "logprob": learned, "update": learned}


def made(done: list) -> Workload:
  """What was generated, by the rollouts of a step."""
  return Workload([len(group[0].prompt_tokens) for group in by_prompt(done).values()], np.array([len(r.tokens) for r in done]))


def trained(done: list) -> list:
  """Survivors with an advantage: those of groups whose rewards differ."""
  groups = by_prompt([r for r in done if not r.pruned]).values()
  return [r for group in groups if len({x.reward for x in group}) > 1 for r in group]
