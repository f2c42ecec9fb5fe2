"""Table 5: seconds a step by phase, without and with pruning.

  python -m experiments.table5 [--scale=cpu|gpu|paper] [--run [--minutes=9]] [--model=PATH] [--data=DIR]
"""

from matplotlib.figure import Figure
import numpy as np

from arrol_jax import config
from experiments import runs, tables, trial_tables
from experiments.runs import Scale
from experiments.tables import NOT_RUN, Table, cell, pair, seconds, speedup

# The paper's seconds for Qwen3-1.7B-Base; it gives no whole step.
PHASES = (("sec_generate", "generation", 106.82, 72.96), ("sec_logprob", "log-probs", 18.40, 10.02),
          ("sec_update", "update", 63.05, 30.26), ("sec_step", "whole step", None, None))


def build(scale: Scale, figure: Figure) -> Table:
  if scale.trial:
    return trial_tables.table5(scale, figure, PHASES)
  base, pruned = (runs.trainings(scale, arm) for arm in ("none", "published"))
  show = lambda x: f"{np.mean(list(x.values())):.3g} ({', '.join(f'{v:.3g}' for v in x.values())})" if x else NOT_RUN
  rows, notes, ratios = [], [], {}
  for key, what, slow, fast in PHASES:
    a, b = pair(seconds(base, key), seconds(pruned, key))
    ratios[what] = speedup(a, b)
    paper = tables.paper_phase(slow, fast)
    rows.append([what, show(a), paper[0], show(b), paper[1], cell(ratios[what], ".2f", "x"), paper[2]])
    notes += tables.faster(f"{what}", ratios[what], paper[2])
  if any(ratios.values()):
    axis = figure.subplots()
    tables.bars(axis, list(ratios), list(ratios.values()), f"Table 5, speed-up by phase ({scale.name}); crosses: the paper",
                unit="times as fast as without pruning")
    axis.plot(range(4), [slow / fast if slow else 1.61 for _, _, slow, fast in PHASES], "rx")
    axis.axhline(1, color="k", lw=0.8)
  notes += tables.device_note(base, pruned) + tables.load_note([*base, *pruned])
  columns = ("phase, median seconds", "GRPO", "paper", "+ pruning", "paper", "speed-up", "paper")
  return Table("table5", "Table 5: seconds a step by phase", scale, columns, rows, notes, [*base, *pruned])


if __name__ == "__main__":
  config.run(lambda: tables.main(build))
