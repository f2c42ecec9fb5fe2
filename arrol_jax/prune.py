"""The public functions of pruning under one name, `arrol_jax.prune`; they live in `arrol_jax.pruning`.

  table = update(table, score, reward)            # past rollouts, once their rewards are known
  delta = solve_delta(table, kappa=...)           # once per step
  p     = survival(posterior(table, score), delta=delta, kappa=...)
  keep  = draw(key, p)                            # True = survives

The defaults are the published rule. Departures from it (METHOD section 9) are switches or functions of their own.
"""

from arrol_jax.pruning.baselines import best_subset, top_share
from arrol_jax.pruning.draws import draw
from arrol_jax.pruning.rule import at_least, group_survival, lift, solve_delta, survival, survival_with_floor
from arrol_jax.pruning.table import ALPHA, BINS, Calibration, bin_posterior, posterior, prior, score_bin, update

__all__ = ["ALPHA", "BINS", "Calibration", "at_least", "best_subset", "bin_posterior", "draw", "group_survival", "lift",
           "posterior", "prior", "score_bin", "solve_delta", "survival", "survival_with_floor", "top_share", "update"]
