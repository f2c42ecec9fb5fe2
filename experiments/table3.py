"""Table 3: test-time voting over 16 samples: majority, DeepConf, the head's rank, on the same samples; and the same where the
head ends hopeless traces early, which costs fewer tokens.

  python -m experiments.table3 [--scale=cpu|gpu|paper] [--run [--minutes=9]] [--model=PATH] [--data=DIR]
"""

from matplotlib.figure import Figure
import numpy as np

from arrol_jax import config
from experiments import runs, tables, trial_tables
from experiments.runs import Scale
from experiments.tables import Estimate, Table

# key in an evaluation's line, what it is, the paper's accuracy for Qwen3-1.7B and Qwen3-8B on AIME'24
RULES = (("accuracy", "one sample", ""), ("maj@16", "majority", "16.7, 23.3"),
         ("deepconf_mean@16", "DeepConf, mean confidence", "16.7, 23.3"),
         ("deepconf_bottom10@16", "DeepConf, lowest tenth of windows", ""), ("rank@16", "rank by the head (ARRoL)", "23.3, 33.3"),
         ("posterior@16", "posterior of the head", ""), ("best@16", "highest score alone", ""))


def read(line: dict, key: str) -> Estimate | None:
  """A figure of an evaluation in percent."""
  if line.get(key) is None:
    return None
  half = line["ci95"] if key == "accuracy" else (line[f"{key}_ci"][1] - line[f"{key}_ci"][0]) / 2
  return Estimate(100 * line[key], 100 * half)


def pooled(values: list[Estimate]) -> Estimate | None:
  """Over policies; problems are shared, so the interval over them does not shrink."""
  return tables.over_seeds([v.value for v in values], float(np.mean([v.half for v in values]))) if values else None


def build(scale: Scale, figure: Figure) -> Table:
  if scale.trial:
    return trial_tables.table3(scale, figure, RULES)
  arms = [("published", seed) for seed in scale.seeds] + [("none", seed) for seed in scale.seeds]
  stopped = [runs.stopping(scale, "published", seed) for seed in scale.seeds if scale.name != "paper"]
  jobs = [*(runs.voting(scale, arm, seed) for arm, seed in arms), *stopped]
  read_lines = [runs.lines(job.result)[-1] if job.done else {} for job in jobs]
  rows, mean, early = [], {}, {}
  for key, what, paper in RULES:
    found = [read(line, key) for line in read_lines]
    rows.append([what, *(tables.cell(x) for x in found), paper])
    # The paper's heads come from training with pruning.
    mean[key] = pooled([x for x in found[:len(scale.seeds)] if x is not None]) or found[len(scale.seeds)]
    early[key] = pooled([x for x in found[len(arms):] if x is not None])
  rows.append(["tokens a problem", *(f"{line['tokens']:,.0f}" if line else tables.NOT_RUN for line in read_lines), ""])
  notes = tables.verdict("rank by the head against the majority", tables.subtract(mean["rank@16"], mean["maj@16"]),
                         "+6.6 and +10.0 points (AIME'24)", unit=" points")
  notes += tables.verdict("rank by the head against DeepConf", tables.subtract(mean["rank@16"], mean["deepconf_mean@16"]),
                          "+6.6 and +10.0 points (AIME'24), up to +8.33 on average", unit=" points")
  for seed, full, less in zip(scale.seeds, read_lines, read_lines[len(arms):]):
    if full and less:
      notes.append(f"Early stopping, seed {seed}: {100 * less['stopped']:.0f}% of the traces ended below a posterior of "
                   f"{runs.STOP_BELOW}, {100 * (1 - less['tokens'] / full['tokens']):.0f}% of the tokens saved.")
  difference = tables.subtract(early["rank@16"], mean["rank@16"]) if early["rank@16"] else None
  if difference:
    notes.append(f"Rank by the head with early stopping against without: {difference.text('+.1f')} points.")
  if any(read_lines):
    line = next(x for x in read_lines if x)
    notes.append(f"{line['problems']} problems, {line['samples']} samples at temperature {line['temperature']}; bootstrap "
                 "intervals over problems. Rules vote on the same samples, so intervals of differences are too wide.")
    tables.bars(figure.subplots(), [what for _, what, _ in RULES], [mean[key] for key, _, _ in RULES],
                f"Table 3, voted answers after training with pruning ({scale.name}); bars: 95% over problems and seeds",
                unit="% right")
  columns = ("vote", *(f"after {arm}, seed {seed}" for arm, seed in arms),
             *(f"published, seed {seed}, stopped early" for seed in scale.seeds[:len(stopped)]), "paper (1.7B, 8B; AIME'24)")
  return Table("table3", "Table 3: accuracy of the voted answer (%)", scale, columns, rows, notes, jobs)


if __name__ == "__main__":
  config.run(lambda: tables.main(build))
