"""How differences change from half of the seconds to all of them, where one arm learns from about half of the rollouts: the last
part of the trial's page (trial_page.py), over all regimes (`HALVED` in trial_arms.py).
"""

import numpy as np

from experiments.trial_arms import HALVED
from experiments.trial_files import Found, Results
from experiments.trial_stats import accuracy, allowed_pairs, table, text


def fading(known: list[Results]) -> list[str]:
  """Accuracy halfway, and how differences change from there to the end, where one arm learns from about half of the rollouts: by
  regime, and the mean over problem sets' seeds, each of which counts once whatever it has runs of."""
  by_name, rows = {results.regime.name: results for results in known}, []
  for what, cases in HALVED.items():
    by_seed: dict[tuple, list[list[float]]] = {}
    for name, arm, other in cases:
      both = allowed_pairs(by_name[name], arm, other) if name in by_name else []
      both = [pair for pair in both if all(r.about["half"] for r in pair)]  # one step may have filled all of the time
      values = np.array([[a - b for a, b in zip(*(_course(r) for r in pair), strict=True)] for pair in both])
      if len(values):
        rows.append([what, f"`{name}`: {arm} - {other}", *(text(x, "+.1f") for x in values.T)])
      for (found, _), one in zip(both, values, strict=True):
        by_seed.setdefault((found.run.regime.train, found.run.seed), []).append(one)
    for train in sorted({train for train, _ in by_seed}):
      means = np.array([np.mean(x, axis=0) for key, x in by_seed.items() if key[0] == train])
      rows.append([what, f"{train}, {_over(means)}", *(text(x, "+.1f") for x in means.T)])
    if by_seed:
      means = np.array([np.mean(x, axis=0) for x in by_seed.values()])
      rows.append([what, f"all, {_over(means)}", *(text(x, "+.1f") for x in means.T)])
  return ["## How differences change from half of the seconds to all of them", "",
          "Differences in accuracy, in points, halfway and what they are more at the end, of all pairs where one arm learns from "
          "about half of the other's rollouts; as a control the same of arms that drop nothing, beside plain. Pairs of a seed "
          "that share runs or prompts count once in the means of a row; rows share runs, so they are no independent evidence. "
          "Looked at after most of these runs, as `ahead` had suggested it; no interval is corrected for that.", "",
          *table(["", "part", "greedy halfway", "4 samples halfway", "greedy, more at the end", "4 samples, more at the end"],
                 rows)] if rows else []


def _over(seeds: np.ndarray) -> str:
  return f"means of {len(seeds)} seeds" if len(seeds) > 1 else "one seed"


def _course(found: Found) -> list[float]:
  """Accuracy halfway, greedy and sampled, and what it is more at the end."""
  half, full = ([accuracy(found, when, sampled) for sampled in (False, True)] for when in ("half", "full"))
  return [*half, *(end - begin for begin, end in zip(half, full, strict=True))]
