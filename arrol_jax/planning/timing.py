"""Seconds a step by phase, tokens a second and dollars, from compiled programs, a chip's sheet and a simulated generation.

Each program takes the sum of its operations, each the longer of products and memory traffic at the rates that a chip reaches
(hlo.roofline), and its collectives, as if none overlapped with anything. A decode step is taken apart: weights, what grows
with the rows, and the columns of the cache that its rows have by then. Waiting for grades is left out.
"""

import dataclasses
import math

from arrol_jax.planning import rollout, work
from arrol_jax.planning.chips import Rates
from arrol_jax.planning.compiling import Program, Step

PHASES = ("generate", "logprob", "update", "rest")


@dataclasses.dataclass
class Timed:
  """One step. Seconds; tokens a second are those generated over the whole step."""
  seconds: dict[str, float]
  tokens_generated: int
  tokens_trained: int
  kept: int
  decode_steps: int
  moved: float = 0.0  # bytes that collectives move on a chip

  @property
  def total(self) -> float:
    return sum(self.seconds.values())

  def as_dict(self, chips: int, price: float | None) -> dict:
    out = {f"sec_{k}": v for k, v in self.seconds.items()} | {
      "sec_step": self.total, "tokens_generated": self.tokens_generated, "tokens_trained": self.tokens_trained,
      "rollouts_kept": self.kept, "decode_steps": self.decode_steps, "bytes_moved_a_chip": self.moved,
      "tokens_s": self.tokens_generated / self.total}
    return out | ({"dollars": dollars(self.total, chips, price)} if price is not None else {})


def dollars(seconds: float, chips: int, price: float) -> float:
  """Of so many chips at `price` a chip and hour."""
  return seconds / 3600 * chips * price


def decode_cost(segment: Program, weights: int, cache: int, column: float, how: dict) -> work.DecodeCost:
  """A decode step taken apart from the compiled segment. weights, cache: bytes on a chip, read once a step at the shape that was
  compiled; column: of one column of the cache. how: "rows" on a chip, "steps", "layers", "shards"."""
  rows, steps = how["rows"], how["steps"]
  rest = max(0.0, segment.traffic / steps - weights - cache)
  moved = {kind: [times / steps, size / steps / rows] for kind, (times, size) in segment.collectives.items()}
  return work.DecodeCost(weights, segment.flops / steps / rows, rest / rows, column, how["layers"], how["shards"], moved)


def of_step(step: Step, lengths, prompt: int, pruning: bool) -> Timed:
  """Predicts one step of the config's run: all its rollouts with responses of `lengths` i64[N], pruned or not. Raises
  ValueError where a program did not compile."""
  c, rates, model = step.c, step.rates, step.loaded.config
  missing = [p.name for p in step.programs if p.error]
  if missing:
    raise ValueError(f"not compiled: {', '.join(missing)}")
  p = {x.name: x for x in step.programs}
  detect = tuple(n for n in c.prune.detect if n)
  how = rollout.Decoding(prompt, c.rollout.group_size, step.row_counts, c.rollout.segment, detect if pruning else (),
                         c.prune.keep if pruning else 1.0)
  made = rollout.simulate(lengths, how)
  shards = c.mesh.data * c.mesh.fsdp
  cost = decode_cost(
    p["decode segment"], step.sizes["decode weights"], step.sizes["cache and slots"],
    work.column_bytes(model, c.rollout.cache or c.model.dtype, c.mesh.tensor),
    {"rows": step.row_counts[-1] / shards, "steps": c.rollout.segment, "layers": model.layers, "shards": shards})
  seconds = lambda name, runs=1.0: runs * program_seconds(p[name], rates) if name in p and runs else 0.0
  generation = (seconds("reshard") + seconds("init slots") + seconds("prefill", p["prefill"].runs) +
                seconds("insert", made.inserts) + seconds("decide", len(made.segments)) +
                seconds("gather", p["gather"].runs if "gather" in p else 0) + cost.seconds(made, rates))
  bins = step.shapes["micro-batch tokens"] // shards
  trained = work.packed(prompt, len(lengths) // c.rollout.group_size, made.kept, bins)
  parts = c.optim.tail_sizes + 1  # sizes that the last may have
  batches = math.ceil(parts * trained.tokens / step.shapes["micro-batch tokens"]) / parts
  passes = p["log-probs"].runs // p["update"].runs if "log-probs" in p else 0
  square = work.attention_flops(model, step.shapes["micro-batch rows"], step.shapes["micro-batch columns"])
  kernel = square / step.mesh.size / rates.flops if step.kernels else 0.0  # which the compiled text hides
  phases = {"generate": generation, "logprob": batches * passes * (seconds("log-probs") + kernel) if passes else 0.0,
            "update": c.optim.epochs * batches * (seconds("update") + 3 * kernel) +
                      c.optim.epochs * c.optim.minibatches * seconds("optimizer"),
            "rest": len(lengths) * rates.rollout}
  return Timed(phases, made.tokens, int(made.kept.sum()), len(made.kept), sum(s.steps for s in made.segments),
               moved_bytes(p, made, batches, passes, c.rollout.segment))


def moved_bytes(p: dict[str, Program], made: rollout.Generation, batches: float, passes: int, segment: int) -> float:
  """What a chip's collectives move in a step."""
  size = lambda name: sum(b for _, b in p[name].collectives.values()) if name in p else 0
  largest = max(s.rows for s in made.segments)
  steps = sum(s.steps * s.rows / largest for s in made.segments) / segment
  return (size("reshard") + size("prefill") * p["prefill"].runs + size("insert") * made.inserts + size("decode segment") * steps +
          batches * (passes * size("log-probs") + size("update")) + size("optimizer"))


def program_seconds(program: Program, rates: Rates) -> float:
  return program.seconds + rates.collectives(program.collectives)


def table(cases: dict[str, Timed], chips: int, price: float | None) -> str:
  """Markdown, a case a line."""
  head = ("a step", "generation", "log-probs", "update", "rest", "seconds", "tokens generated", "tokens/s", "GB moved a chip",
          *(["dollars"] if price is not None else []))
  lines = [head, ("---",) * len(head)]
  for name, t in cases.items():
    lines.append((name, *(f"{t.seconds[k]:.2f}" for k in PHASES), f"{t.total:.2f}", f"{t.tokens_generated:,}",
                  f"{t.tokens_generated / t.total:,.0f}", f"{t.moved / 1e9:,.1f}",
                  *([f"{dollars(t.total, chips, price):.3f}"] if price is not None else [])))
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)
