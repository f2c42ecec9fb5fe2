"""Rules to compare with: trace confidence (DeepConf), and the choice after the rewards are known (PODS).

Random pruning, and keeping the least or most promising, are the published rule with another strength (rule.PruneRule).
"""


import jax.numpy as jnp
import numpy as np

from arrol_jax.pruning.rule import comes_before
from arrol_jax.types import Rollout


def down_sample(rollouts: list[Rollout], keep: float) -> list[Rollout]:
  """PODS (arXiv 2504.13818): of each group's finished rollouts the share `keep` whose raw rewards vary most, whatever counts as a
  success."""
  groups, out = {}, []
  for r in rollouts:
    if not r.pruned:
      groups.setdefault(r.prompt, []).append(r)
  for group in groups.values():
    chosen = best_subset([r.reward for r in group], max(1, round(keep * len(group))))
    out += [r for r, taken in zip(group, chosen, strict=True) if taken]
  return out


def top_share(order, group, decided, *, kappa, p_min, p_max):
  """Survival p_max for the first of each group by `order` f32[B], highest first, p_min for the rest, one between, mean kappa.

  The rule behind pruning by trace confidence (DeepConf, arXiv 2508.15260, keeps the most confident traces): f32[B]; kappa where
  not decided bool[B].
  """
  same = (group[:, None] == group[None, :]) & decided[None, :]
  size, rank = jnp.sum(same, axis=1), jnp.sum(comes_before(-order) & same, axis=1)
  share = jnp.clip(size * (kappa - p_min) / max(p_max - p_min, 1e-6) - rank, 0.0, 1.0)
  return jnp.where(decided, p_min + (p_max - p_min) * share, kappa)


def best_subset(reward, keep):
  """The `keep` rollouts of one group whose rewards vary most (PODS' max-variance rule, arXiv 2504.13818): bool[B], NumPy.

  They are the i lowest and the keep - i highest for some i; the first such i wins, ties among equal rewards go by position.
  """
  reward = np.asarray(reward, float)
  order = np.argsort(reward, kind="stable")
  picks = [np.r_[order[:i], order[len(reward) - (keep - i):]].astype(int) for i in range(keep + 1)]
  chosen = max(picks, key=lambda rows: np.var(reward[rows]) if len(rows) else 0.0)
  out = np.zeros(len(reward), bool)
  out[chosen] = True
  return out
