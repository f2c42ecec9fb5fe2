"""Engine + quality head + pruning rule + rewards -> graded rollouts, packed for the update (paper Algorithm 1).

`make_decide` is the boundary decision of METHOD section 4 as one jitted program; `generate` runs one step's prompts and
grades the survivors while later segments decode; `pack` re-batches them into a few fixed shapes. Pruning off, and the
cold start, are the same program with survival probability 1.
"""

from collections.abc import Callable
import dataclasses
import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from arrol_jax import prune, sharding
from arrol_jax.decode import Sampling, Slots
from arrol_jax.engine import Decision, Engine, Request
from arrol_jax.losses import group_advantages
from arrol_jax.prune import Calibration
from arrol_jax.quality import quality_logit
from arrol_jax.types import Batch, Rollout

_DRAW = 0x7FFFFFFF  # folded into a request's key for its survival draw; token n uses n


@dataclasses.dataclass(frozen=True)
class PruneRule:
  """Constants of METHOD sections 3-4. `detect`: response tokens at detection; `keep` kappa, `target` rho, `strength` lambda."""
  detect: int
  keep: float = 0.5
  target: float = 0.5
  strength: float = 0.5
  p_min: float = 0.1
  p_max: float = 0.9

  def constants(self) -> dict:
    """Keyword arguments of prune.solve_delta and prune.survival."""
    return dict(kappa=self.keep, rho=self.target, lam=self.strength, p_min=self.p_min, p_max=self.p_max)


@functools.partial(jax.jit, static_argnames=("rule", "pruning"), donate_argnames=("slots",))
def _decide(slots: Slots, head: dict, table: Calibration, rule: PruneRule, pruning: bool) -> tuple[Slots, Decision]:
  decided = slots.active & (slots.generated == rule.detect)
  score = quality_logit(head, slots.hidden)
  posterior = prune.posterior(table, score)
  survival = jnp.ones_like(score)
  if pruning:
    constants = rule.constants()
    survival = prune.survival(posterior, delta=prune.solve_delta(table, **constants), **constants)
  key = jax.vmap(lambda k: jax.random.fold_in(k, _DRAW))(slots.key)
  keep = jax.vmap(prune.draw)(key, survival) | ~decided
  return slots.replace(active=slots.active & keep), Decision(decided, keep, score, posterior, survival)


def make_decide(head: dict, table: Calibration, rule: PruneRule, pruning: bool) -> Callable:
  """decide(slots) for Engine.run. pruning False scores and keeps every rollout (survival probability 1)."""
  return lambda slots: _decide(slots, head, table, rule, pruning)


def generate(engine: Engine, prompts: list, group_size: int, key: jax.Array, sampling: Sampling, tokenizer, grader, *,
             decide: Callable | None = None, progress: Callable | None = None) -> tuple[list[Rollout], float]:
  """Rolls out `group_size` responses to each prompt (data.Prompt) and grades those that were not pruned.

  Returns P * G rollouts in order (rollout i belongs to prompt i // G) and the seconds spent waiting for grades after the
  last token. progress(rollout) is called for each that ends.
  """
  requests = [Request(p * group_size + g, p, prompt.tokens, engine.max_new)
              for p, prompt in enumerate(prompts) for g in range(group_size)]
  pending = []

  def on_done(rollout: Rollout):
    rollout.text = tokenizer.decode(rollout.tokens, skip_special_tokens=True)
    if not rollout.pruned:
      pending.append((rollout, grader.grade_async([(rollout.text, prompts[rollout.prompt].problem.answer)])))
    progress and progress(rollout)

  rollouts = engine.run(requests, key, sampling, decide=decide, on_done=on_done)
  waited = time.perf_counter()
  for rollout, grade in pending:
    rollout.reward, rollout.reason = grade.result()[0]
  return rollouts, time.perf_counter() - waited


class PackShape(NamedTuple):
  """Shapes of the update: rows of at most `length` tokens, about `micro_tokens` tokens a micro-batch."""
  length: int
  micro_tokens: int
  buckets: int = 3

  def sizes(self, unit: int) -> list[tuple[int, int]]:
    """(rows, row length) of each compiled micro-batch, shortest rows first; rows are a multiple of `unit`."""
    lengths = sorted({-(-self.length * (b + 1) // self.buckets // 16) * 16 for b in range(self.buckets)})
    return [(-(-max(1, self.micro_tokens // n) // unit) * unit, n) for n in lengths]


def empty_batches(shape: PackShape, mesh) -> list[Batch]:
  """A micro-batch of each size with no rollout in it: for compiling ahead."""
  sizes = shape.sizes(mesh.shape["data"] * mesh.shape["fsdp"])
  return [jax.device_put(_micro_batch([], np.zeros(0), *size, None, "skip"), sharding.rows(mesh)) for size in sizes]


def pack(rollouts: list[Rollout], shape: PackShape, mesh, *, detect: int | None, normalize_std: bool = True,
         short: str = "skip") -> list[Batch]:
  """Survivors -> micro-batches in at most `shape.buckets` row lengths, longest rows last, padded with empty rows.

  Advantages are taken over a group's survivors. `short` says what a rollout that ended before the detection length
  teaches the head: "skip" nothing (the head learns the question it will be asked), "last" its last hidden state (the
  paper leaves this open). Old and reference log-probs are the update's to fill.
  """
  kept = [r for r in rollouts if not r.pruned]
  advantages = group_advantages([r.reward for r in kept], np.array([r.prompt for r in kept], int), normalize_std)
  unit = mesh.shape["data"] * mesh.shape["fsdp"]
  order = sorted(range(len(kept)), key=lambda i: len(kept[i].prompt_tokens) + len(kept[i].tokens))
  batches, held = [], []
  for rows, length in shape.sizes(unit):
    while order and len(kept[order[0]].prompt_tokens) + len(kept[order[0]].tokens) <= length:
      held.append(order.pop(0))
    full = len(held) // rows * rows
    if order:  # a part-filled micro-batch goes up to the next length, where there are more rows to fill it
      take, held = held[:full], held[full:]
    else:
      take, held = held, []
    batches += [_micro_batch([kept[i] for i in take[j:j + rows]], advantages[take[j:j + rows]], rows, length, detect, short)
                for j in range(0, len(take), rows)]
    if not order:
      break
  return [jax.device_put(batch, sharding.rows(mesh)) for batch in batches]


def _micro_batch(rows: list[Rollout], advantages: np.ndarray, count: int, length: int, detect: int | None, short: str) -> Batch:
  grid = lambda dtype: np.zeros((count, length), dtype)
  tokens, mask, sampled = grid(np.int32), grid(np.float32), grid(np.float32)
  reward, position, weight, advantage = (np.zeros(count, t) for t in (np.float32, np.int32, np.float32, np.float32))
  for i, r in enumerate(rows):
    start, end = len(r.prompt_tokens), len(r.prompt_tokens) + len(r.tokens)
    tokens[i, :start], tokens[i, start:end] = r.prompt_tokens, r.tokens
    mask[i, start:end], sampled[i, start:end] = 1.0, r.logprobs
    reward[i], advantage[i] = r.reward, advantages[i]
    # The state that sampled response token number n stands at start + n - 2.
    position[i] = start + (detect if r.decided else len(r.tokens)) - 2
    weight[i] = float(r.decided or short == "last")
  return Batch(tokens=tokens, response_mask=mask, sampler_logprobs=sampled, old_logprobs=np.zeros_like(sampled),
               ref_logprobs=np.zeros_like(sampled), advantages=advantage, rewards=reward, head_position=position,
               head_weight=weight)


def update_calibration(table: Calibration, rollouts: list[Rollout], half_life: float | None) -> Calibration:
  """The table with this step's graded survivors that were scored (METHOD section 3)."""
  scored = [r for r in rollouts if r.decided and not r.pruned]
  size = 1 << max(0, len(rollouts) - 1).bit_length()  # one compiled shape a step size
  score, reward, weight = np.zeros(size, np.float32), np.zeros(size, np.float32), np.zeros(size, np.float32)
  for i, r in enumerate(scored):
    score[i], reward[i], weight[i] = r.score, r.reward, 1.0
  return _update_table(table, score, reward, weight, half_life)


@functools.partial(jax.jit, static_argnames=("half_life",))
def _update_table(table, score, reward, weight, half_life):
  return prune.update(table, score, reward, weight, half_life=half_life)


def measure(engine: Engine, prompts: list, samples: int, key: jax.Array, sampling: Sampling, tokenizer, grader,
            progress: Callable | None = None) -> tuple[dict, list[Rollout]]:
  """Accuracy on held-out prompts, nothing pruned: metrics and the rollouts behind them.

  accuracy: mean reward over all samples; ci95: half-width of its normal interval over problems; pass: share of problems
  with at least one right answer; truncated: share that hit the length limit.
  """
  rollouts, _ = generate(engine, prompts, samples, key, sampling, tokenizer, grader, progress=progress)
  rewards = np.array([r.reward for r in rollouts]).reshape(len(prompts), samples)
  by_problem = rewards.mean(axis=1)
  return {"accuracy": float(by_problem.mean()),
          "ci95": float(1.96 * by_problem.std(ddof=1) / np.sqrt(len(prompts))) if len(prompts) > 1 else float("nan"),
          "problems": len(prompts), "samples": samples, "pass": float((rewards.max(axis=1) > 0).mean()),
          "response_len": float(np.mean([len(r.tokens) for r in rollouts])),
          "truncated": float(np.mean([not r.stopped for r in rollouts]))}, rollouts
