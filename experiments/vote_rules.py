"""Votes of many problems at once: what traces may weigh, and which pool of answers wins (experiments/vote_weights.py).

P problems, G traces each. A trace's pool is the number of its answer in order of appearance, -1 without an answer: it has no
vote. The rules that ship (majority, rank, posterior, logit, deepconf) give what pruning/voting.py gives, ties to the first
answer included.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from arrol_jax.pruning import voting
from arrol_jax.rewards import grade

OFFSETS, POWERS, BETAS, SHARES = (0.0, 2.0, 4.0), (0.5, 2.0, 3.0, 4.0, 6.0), (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0), (0.5, 1.0)
WINDOWS, TOPS = (16, 32, 64, 128), (None, 0.1, 0.25, 0.5, 0.9)  # DeepConf's, in tokens and as shares of the traces


class Known(NamedTuple):
  """What a head says of traces."""
  z: np.ndarray          # f[P,G]  its score, in standard deviations within a problem
  posterior: np.ndarray  # f[P,G]  in [0, 1], by the score alone, as voters take it
  levelled: np.ndarray   # f[P,G]  the same by the score with its group's level


class Ballots(NamedTuple):
  """Whose votes count how."""
  pools: np.ndarray      # i32[P,G]
  right: np.ndarray      # f32[P,G]  whether pool k's first trace is right; 0 where there is no such pool


Rule = Callable[[Known, np.ndarray], np.ndarray]  # (known, pools) -> totals f[P,G] of the pools, the largest wins


def pools_of(answers: list[list[str | None]]) -> np.ndarray:
  """i32[P,G]; math-equal answers share a pool, as in voting.vote."""
  same, out = {}, np.full((len(answers), len(answers[0])), -1, np.int32)
  for row, said in zip(out, answers, strict=True):
    firsts = []
    for i, answer in enumerate(a and a.strip() for a in said):
      if answer is None:
        continue
      for first in firsts:
        if first != answer and (first, answer) not in same:
          same[first, answer] = grade(f"\\boxed{{{answer}}}", first) > 0
      row[i] = next((k for k, first in enumerate(firsts) if first == answer or same[first, answer]), len(firsts))
      if row[i] == len(firsts):
        firsts.append(answer)
  return out


def ballots(pools: np.ndarray, success: np.ndarray) -> Ballots:
  """Of pools i32[P,G], success f32[P,G]."""
  right = np.zeros(pools.shape, np.float32)
  for k in range(pools.shape[1]):
    here = pools == k
    right[:, k] = np.where(here.any(axis=1), np.take_along_axis(success, here.argmax(axis=1)[:, None], axis=1)[:, 0], 0.0)
  return Ballots(pools, right)


def hits(totals: np.ndarray, votes: Ballots, some: np.ndarray | None = None) -> np.ndarray:
  """f32[P]: 1 where the pool of the largest of totals f[P,G] is right. some bool[P,G]: only these traces voted."""
  there = (votes.pools if some is None else np.where(some, votes.pools, -1))[:, :, None] == np.arange(votes.pools.shape[1])
  size = there.sum(axis=1)
  totals = np.where(size > 0, totals, -np.inf)
  highest = totals.max(axis=1, keepdims=True)
  tied = (totals >= highest - 1e-12 * np.abs(highest)) & (size > 0)
  first = np.where(tied, there.argmax(axis=1), totals.shape[1]).argmin(axis=1)  # that appears first among those that voted
  return np.where(tied.any(axis=1), np.take_along_axis(votes.right, first[:, None], axis=1)[:, 0], 0.0)


# ---- weights f[P,G] of traces


def summed(weights: np.ndarray, pools: np.ndarray) -> np.ndarray:
  """What each pool's traces weigh together, f[P,G]."""
  return np.stack([np.sum(np.where(pools == k, weights, 0.0), axis=1) for k in range(pools.shape[1])], axis=1)


def ranks(z: np.ndarray, voters: np.ndarray) -> np.ndarray:
  """voting.rank_weights of each problem's voters bool[P,G], f[P,G]."""
  below = np.sum((z[:, None, :] < z[:, :, None]) & voters[:, None, :], axis=2)
  level = np.sum((z[:, None, :] == z[:, :, None]) & voters[:, None, :], axis=2)
  others = np.sum(voters, axis=1, keepdims=True) - 1
  below = np.maximum(below + (level - 1) / 2, 0)  # others than voters have no rank
  return np.where(others > 0, below / np.maximum(others, 1), 1.0)


def log_odds(posterior: np.ndarray, pools: np.ndarray) -> np.ndarray:
  """voting.logit_weights of each problem's voters, f[P,G]."""
  return np.stack([voting.logit_weights(q, int(n)) for q, n in zip(posterior, pools.max(axis=1) + 1, strict=True)])


def _logit(posterior):
  q = np.clip(posterior, 1 - voting.SUREST, voting.SUREST)
  return np.log(q / (1 - q))


def tops(scores: np.ndarray, voters: np.ndarray, share: float | None) -> np.ndarray:
  """scores f[P,G], 0 for all but this share of a problem's votes with the largest and those that tie with the last."""
  if share is None:
    return scores
  kept = np.maximum(1, np.ceil(share * voters.sum(axis=1) - 1e-9)).astype(int)
  ordered = -np.sort(-np.where(voters, scores, -np.inf), axis=1)
  return np.where(scores >= np.take_along_axis(ordered, kept[:, None] - 1, axis=1), scores, 0.0)


# ---- rules


def _weighs(weight: Callable[[Known, np.ndarray], np.ndarray]) -> Rule:
  return lambda known, pools: summed(weight(known, pools), pools)


def _best(known: Known, pools: np.ndarray) -> np.ndarray:
  z = np.where(pools >= 0, known.z, -np.inf)
  return summed((np.arange(z.shape[1])[None] == z.argmax(axis=1)[:, None]).astype(float), pools)


def _pooled(share: float, beta: float, largest: bool) -> Rule:
  """log of (votes to the power `share`) times exp(beta times the pool's mean or largest score)."""
  def rule(known, pools):
    count = summed(np.ones(pools.shape), pools)
    score = summed(known.z, pools) / np.maximum(count, 1)
    if largest:
      score = np.stack([np.max(np.where(pools == k, known.z, -np.inf), axis=1) for k in range(pools.shape[1])], axis=1)
    return np.where(count > 0, share * np.log(np.maximum(count, 1)) + beta * np.where(count > 0, score, 0.0), -np.inf)

  return rule


def rules() -> dict[str, Rule]:
  """All weights by name, the plain ones first."""
  rank = lambda power: _weighs(lambda known, pools: ranks(known.z, pools >= 0)**power)
  out = {"majority": _weighs(lambda known, _: np.ones(known.z.shape)), "rank": rank(1.0),
         "posterior": _weighs(lambda known, _: known.posterior),
         "logit": _weighs(lambda known, pools: log_odds(known.posterior, pools)), "best": _best,
         "levelled posterior": _weighs(lambda known, _: known.levelled),
         "levelled logit": _weighs(lambda known, pools: log_odds(known.levelled, pools))}
  out |= {f"rank^{p:g}": rank(p) for p in POWERS}
  out |= {f"logit + {b:g}, cut at 0": _weighs(lambda known, _, b=b: np.maximum(0.0, _logit(known.posterior) + b))
          for b in OFFSETS}
  out |= {f"posterior^{p:g}": _weighs(lambda known, _, p=p: known.posterior**p) for p in POWERS}
  # The largest exponent is 0: nothing overflows, and what wins is the same.
  top = lambda known: known.z - known.z.max(axis=1, keepdims=True)
  out |= {f"exp({b:g} z)": _weighs(lambda known, _, b=b: np.exp(b * top(known))) for b in BETAS}
  for share in SHARES:
    votes = "votes" if share == 1 else f"votes^{share:g}"
    out |= {f"{votes} x exp({b:g} {what} z)": _pooled(share, b, what == "max")
            for what in ("mean", "max") for b in BETAS if b in (0.5, 1.0, 2.0, 4.0)}
  return out


# ---- DeepConf


def deepconf_scores(confidences: np.ndarray, tokens: np.ndarray) -> dict[str, np.ndarray]:
  """Trace confidences f[P,G] by kind and window, from the tokens' f[all], one trace after the other; tokens i32[P,G]."""
  traces = np.split(confidences, np.cumsum(tokens.reshape(-1))[:-1])
  of = lambda kind, window: np.array([voting.summarize_confidence(t, window, kind) for t in traces]).reshape(tokens.shape)
  out = {"mean": of("mean", WINDOWS[0])}
  return out | {f"{kind}, {window} tokens": of(kind, window) for kind in voting.CONFIDENCES if kind != "mean"
                for window in WINDOWS}


def deepconf(scores: dict[str, np.ndarray]) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
  """Totals f[P,G] of pools i32[P,G] by variant of the weights and of who votes."""
  rule = lambda score, top: lambda pools: summed(tops(score, pools >= 0, top), pools)
  return {name + (f", best {top:.0%}" if top else ""): rule(score, top) for name, score in scores.items() for top in TOPS}
