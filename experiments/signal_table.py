"""What pruning rules keep of the learning signal, and what their heads know: a Markdown table of runs of one seed.

  python -m experiments.signal_table experiments/results/gsm8k_budget/random experiments/results/gsm8k_budget/ours ... [--skip=4]

Reads DIR/metrics.jsonl alone. The first run is what the others are compared with, step by step: runs of one seed see the same
prompts at the same step, unless one of them chooses its prompts (rollout.candidates): then the difference is not a paired
one. Intervals are 95% of Student's t over blocks of ten steps, since steps that follow each other are not independent; they
say how a figure varies within these runs, not between seeds. AUC: steps 3 to 20, as they were scored.
"""

from pathlib import Path

import numpy as np
from scipy import stats

from arrol_jax import config
from experiments.plot_run import steps_of, to_compare

BLOCK = 10


def interval(values: np.ndarray) -> tuple[float, float]:
  """Mean of the values, and the half-width of its 95% interval over means of blocks of BLOCK; NaN with one block."""
  blocks = [b.mean() for b in np.array_split(values, max(1, len(values) // BLOCK))]
  half = stats.t.ppf(0.975, len(blocks) - 1) * np.std(blocks, ddof=1) / np.sqrt(len(blocks)) if len(blocks) > 1 else np.nan
  return float(values.mean()), float(half)


def column(lines: list[dict], first: list[dict], skip: int) -> dict[str, str]:
  """A run's cell in each row of the table."""
  get = lambda run, name, part=slice(skip, None): np.array([np.nan if x.get(name) is None else x[name] for x in run[part]], float)
  show = lambda pair, form=".2f": f"{pair[0]:{form}}" + (f" ± {pair[1]:{form}}" if np.isfinite(pair[1]) else "")
  signal, count = get(lines, "signal"), min(len(lines), len(first)) - skip
  apart = interval(signal[:count] - get(first, "signal")[:count])
  out = {"signal K rho (1 - rho) a group": show(interval(signal)),
         "- less the first run's, same steps": show(apart) if lines is not first else "",
         "- over the first run's": f"{signal[:count].mean() / get(first, 'signal')[:count].mean():.2f}",
         "signal per 1,000 tokens generated": show(interval(get(lines, "signal_per_1k_tokens")), ".3f"),
         "share kept": f"{get(lines, 'keep_ratio').mean():.3f}", "mixed groups": f"{get(lines, 'groups_mixed').mean():.1f}",
         "rows trained": f"{get(lines, 'rows_trained').mean():.0f}",
         "reward of all that started, first and last ten steps": " to ".join(
           f"{get(lines, 'reward_ipw', part).mean():.3f}" for part in (slice(0, 10), slice(-10, None)))}
  for name in ("step", "generate", "update"):
    out[f"seconds: {name}, median"] = f"{np.median(get(lines, f'sec_{name}')):.2f}"
  places = sorted({k.partition("@")[2] for k in lines[0] if k.startswith("head_auc@")}, key=lambda k: (k == "end", k.zfill(9)))
  for place in places:
    pair = [np.nanmean(get(lines, f"{kind}@{place}", slice(2, 20))) for kind in ("head_auc", "head_auc_within")]
    out[f"AUC at {place}: all / within a prompt"] = " / ".join(f"{x:.3f}" for x in pair)
  return out


def main():
  runs, skip = to_compare("signal_table", __doc__, 4)
  read = [steps_of(run) for run in runs]
  columns = [column(lines, read[0], skip) for lines in read]
  print(f"| steps {skip + 1} on | {' | '.join(Path(run).name for run in runs)} |\n|{'---|' * (len(runs) + 1)}")
  for name in dict.fromkeys(name for c in columns for name in c):
    print(f"| {name} | {' | '.join(c.get(name, '') for c in columns)} |")


if __name__ == "__main__":
  config.run(main)
