"""What logs of rollouts say of one, as JSON has it."""

import dataclasses
import math

from arrol_jax.types import Rollout


def in_short(r: Rollout) -> dict:
  """What every log of rollouts says of one."""
  return {"prompt": r.prompt, "text": r.text, "tokens": len(r.tokens), "pruned": r.pruned, "score": finite(r.score),
          "posterior": finite(r.posterior), "survival": finite(r.keep_probability), "reward": finite(r.reward),
          "reason": r.reason}


def in_full(r: Rollout, rollouts: list[Rollout]) -> dict:
  """What rollouts.jsonl says of it besides: its problem, its decisions, and how its group fared, among the step's `rollouts`."""
  problem = dataclasses.asdict(r.problem) if r.problem else {}
  group = sorted((x for x in rollouts if x.prompt == r.prompt), key=lambda x: x.request)
  short = lambda x: float(f"{x:.4g}") if math.isfinite(x) else None
  column = lambda of: [short(of(x)) for x in group]
  return {f"problem_{name}" if name in ("id", "source") else name: value for name, value in problem.items()} | {
    "stopped": r.stopped, "right": finite(r.success), "scores": list(map(finite, r.scores)),
    "posteriors": list(map(finite, r.posteriors)), "keep_probabilities": list(map(finite, r.keep_probabilities)),
    "member": [x.request for x in group].index(r.request), "group": {
      "tokens": [len(x.tokens) for x in group], "pruned": [x.pruned for x in group], "score": column(lambda x: x.score),
      "posterior": column(lambda x: x.posterior), "reward": column(lambda x: x.reward), "right": column(lambda x: x.success)}}


def finite(x):
  """JSON has no NaN: null stands for "undefined here". Works through nested dicts."""
  if isinstance(x, dict):
    return {k: finite(v) for k, v in x.items()}
  return None if isinstance(x, float) and not math.isfinite(x) else x
