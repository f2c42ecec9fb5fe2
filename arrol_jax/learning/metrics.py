"""What a step's rollouts say about pruning: balance, keep ratio, how good and how calibrated the head is.

NumPy on host records; every figure is defined in docs/metrics.md and named in metrics.jsonl as here. NaN where it is undefined
(no mixed group, no scored rollout), written as null. What concerns the head, and shares of right ones, takes a rollout's
success (reward.success); means and variances of rewards, and what is mixed, take rewards as they are. Ranks and
binomial chances are written out: to import SciPy's statistics for them took every run's first step a second.
"""

import functools
import math

import numpy as np

from arrol_jax.learning.batching import levels_of
from arrol_jax.types import FAILED, Rollout


def auc(score: np.ndarray, label: np.ndarray) -> float:
  """Probability that a positive's score exceeds a negative's, ties counting half; NaN without both labels."""
  score, label = np.asarray(score, float), np.asarray(label) > 0.5
  positives, negatives = int(label.sum()), int((~label).sum())
  if not positives or not negatives:
    return float("nan")
  return float((ranks(score)[label].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def calibration_error(probability: np.ndarray, label: np.ndarray, bins: int = 10) -> float:
  """Expected calibration error: mean |mean probability - positive share| over equal-width bins, weighted by size."""
  probability, label = np.asarray(probability, float), np.asarray(label, float)
  if not len(label):
    return float("nan")
  index = np.minimum((probability * bins).astype(int), bins - 1)
  gaps = [np.abs(probability[index == b].mean() - label[index == b].mean()) * (index == b).sum() for b in np.unique(index)]
  return float(sum(gaps) / len(label))


def spearman(score: np.ndarray, label: np.ndarray) -> float:
  """Rank correlation; NaN where one of them does not vary."""
  if len(set(score)) < 2 or len(set(label)) < 2:
    return float("nan")
  return float(np.corrcoef(ranks(score), ranks(label))[0, 1])


def ranks(values) -> np.ndarray:
  """Ranks from 1 of finite numbers, ties sharing the mean of theirs, f64[N]."""
  _, place, counts = np.unique(np.asarray(values, float), return_inverse=True, return_counts=True)
  return (np.cumsum(counts) - (counts - 1) / 2)[place]


def binomial(n: int, p: float) -> np.ndarray:
  """Chances of 0, 1, ..., n successes in n tries of chance p, f64[n+1]."""
  return functools.reduce(np.convolve, [(1 - p, p)] * n, np.ones(1))


def pass_at_k(right: np.ndarray, k: int) -> float:
  """Chance that k of these n samples, drawn without putting back, hold a right one: 1 - C(n - c, k) / C(n, k)."""
  wrong = int(np.sum(np.asarray(right) <= 0))
  return 1.0 - math.comb(wrong, k) / math.comb(len(right), k)


def bootstrap_interval(values, resamples: int = 2000, seed: int = 0) -> list[float]:
  """95% percentile interval of the mean over problems, [low, high]."""
  values = np.asarray(values, float)
  index = np.random.default_rng(seed).integers(0, len(values), (resamples, len(values)))
  return [float(x) for x in np.percentile(values[index].mean(axis=1), [2.5, 97.5])]


def mean(values) -> float:
  """Mean, NaN of nothing (without NumPy's warning)."""
  values = list(values)
  return float(np.mean(values)) if values else float("nan")


def head_metrics(kept: list[Rollout], detect: tuple[int, ...]) -> dict:
  """AUC of the score over all graded rollouts and within prompts, at each decision ("head_auc@64") and at the last token
  ("head_auc@end")."""
  out, places = {}, {str(n): [(r.scores[c], r) for r in kept if len(r.scores) > c] for c, n in enumerate(detect)}
  places["end"] = [(r.final, r) for r in kept if not math.isnan(r.final)]
  for name, scored in places.items():
    groups = {}
    for score, r in scored:
      groups.setdefault(r.prompt, []).append((score, r.success))
    within = [auc(*zip(*group, strict=True)) for group in groups.values()]
    out |= {f"head_auc@{name}": auc([s for s, _ in scored], [r.success for _, r in scored]),
            f"head_auc_within@{name}": mean(a for a in within if not np.isnan(a))}
  return out


def expected_signals(groups: list[list[Rollout]]) -> dict[str, float]:
  """What the posteriors promised of K rho (1 - rho), a group: of the rows that the decisions kept, and on average of as many
  drawn at random (METHOD 10.1; in jnp: pruning/budget.py). Rows that ended before a decision count with their success;
  so it is of rewards 0 and 1."""
  decided = [[r for r in g if r.decided and not math.isnan(r.posterior)] for g in groups]
  total = sum(map(len, decided))
  share = sum(not r.pruned for rows in decided for r in rows) / max(total, 1)
  kept, random = [], []
  for group, rows in zip(groups, decided, strict=True):
    q = np.array([r.posterior for r in rows])
    stays = np.array([not r.pruned for r in rows], bool)
    settled = np.array([float(r.success) for r in group if not r.decided])
    both, fixed = pairs(q), pairs(settled)
    mixed, n, m = pairs(np.concatenate([q, settled])) - both - fixed, len(q), len(settled)
    kept.append(pairs(np.concatenate([q[stays], settled])) / max(stays.sum() + m, 1))
    k = np.arange(n + 1)
    among = both * k * (k - 1) / max(n * (n - 1), 1) + mixed * k / max(n, 1) + fixed
    random.append(float(np.sum(binomial(n, share) * among / np.maximum(k + m, 1))))
  return {"signal_expected": mean(kept if total else ()), "signal_expected_random": mean(random if total else ())}


def pairs(q: np.ndarray) -> float:
  """Sum over pairs of the chance that one of the two is right and the other wrong."""
  return float(len(q) * q.sum() - q.sum()**2 - np.sum(q * (1 - q))) if len(q) else 0.0


def by_prompt(rollouts: list[Rollout]) -> dict[int, list[Rollout]]:
  """Groups, in the order in which their prompts appear."""
  out = {}
  for r in rollouts:
    out.setdefault(r.prompt, []).append(r)
  return out


def baseline_shift(rollouts: list[Rollout]) -> float:
  """By how much survivors' mean reward exceeds that of all that their group started (losses.started_levels), the mean over groups
  whose survivors' rewards differ: what an advantage is off by that is measured from the survivors."""
  levels, kept = levels_of(rollouts), by_prompt([r for r in rollouts if not r.pruned])
  return mean(mean(r.reward for r in g) - levels[p][0] for p, g in kept.items() if len({r.reward for r in g}) > 1)


def rollout_metrics(rollouts: list[Rollout], learned: list[Rollout] | None = None, detect: tuple[int, ...] = ()) -> dict:
  """The rollout part of a line of metrics.jsonl. Survivors carry a reward, pruned rollouts none; learned: those that the update
  sees (None: all survivors)."""
  kept = [r for r in rollouts if not r.pruned]
  trained = [r for r in (rollouts if learned is None else learned) if not r.pruned]
  started = by_prompt(rollouts)
  groups = by_prompt(kept)
  survivors = [len(groups.get(p, ())) for p in started]
  ratios = [mean(r.success for r in g) for g in groups.values()]
  scored = [r for r in kept if r.decided]
  within = [auc([r.score for r in g if r.decided], [r.success for r in g if r.decided]) for g in groups.values()]
  score, right = [r.score for r in scored], [r.success for r in scored]
  # Held-out rollouts are kept whatever the rule says: what it would have done to the right ones is not biased by survival.
  held_out = [r for r in scored if r.holdout]
  by_place = head_metrics(kept, detect) if detect else {}
  generated = sum(len(r.tokens) for r in rollouts)
  by_place |= expected_signals(list(started.values()))
  total_signal = sum(len(g) * float(np.var([r.reward for r in g])) for g in groups.values())
  return by_place | {
    "signal_per_1k_tokens": 1000.0 * total_signal / max(generated, 1),
    "stale": sum(r.stale for r in rollouts) / max(generated, 1),
    "reward": mean(r.reward for r in kept),
    # Horvitz-Thompson: a survivor kept with probability p stands for 1/p rollouts
    "reward_ipw": sum(r.reward / r.keep_probability for r in kept) / len(rollouts),
    "rollouts_started": len(rollouts), "rollouts_pruned": len(rollouts) - len(kept), "rollouts_kept": len(kept),
    "rollouts_decided": sum(r.decided for r in rollouts), "keep_ratio": len(kept) / len(rollouts),
    "baseline_shift": baseline_shift(rollouts), "pos_ratio": mean(ratios), "pos_var": mean(p * (1 - p) for p in ratios),
    # K rho (1 - rho): sum of squared centred rewards, over all groups that started
    "signal": total_signal / len(survivors),
    "groups_mixed": sum(len({r.reward for r in g}) > 1 for g in groups.values()),
    "tokens_generated": generated, "tokens_trained": sum(len(r.tokens) for r in trained),
    # What all rollouts would have been, by the same weights, less what they were; without survivors nothing is known of it
    "tokens_saved": sum(len(r.tokens) / r.keep_probability for r in kept) - generated if kept else math.nan,
    "ungraded": mean(r.reason in FAILED for r in kept),
    "response_len": mean(len(r.tokens) for r in kept), "truncated": mean(not r.stopped for r in kept),
    "head_auc": auc(score, right), "head_auc_within": mean(a for a in within if not np.isnan(a)),
    "head_ece": calibration_error([r.posterior for r in scored], right),
    "head_brier": mean((r.posterior - r.success)**2 for r in scored),
    "head_spearman": spearman(score, [r.reward for r in scored]),
    "false_prune": mean(1 - r.rule_probability for r in held_out if r.success > 0),
    "survivors_fewest": min(survivors), "survivors_histogram": np.bincount(survivors).tolist(),  # groups by survivors
  }
