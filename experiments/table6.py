"""Table 6: keep ratios 0.25, 0.5, 0.75 and 1, accuracy and speed-up.

  python -m experiments.table6 [--scale=cpu|gpu|paper] [--run [--minutes=9]] [--model=PATH] [--data=DIR]
"""

from matplotlib.figure import Figure
import numpy as np

from arrol_jax import config
from experiments import runs, tables, trial_tables
from experiments.runs import Scale
from experiments.tables import NOT_RUN, Table, accuracy, cell, pair, seconds, speedup, step_mean, subtract

# arm: keep ratio, the paper's accuracy and speed-up
ARMS = {"keep025": (0.25, 32.46, 2.33), "published": (0.5, 33.34, 1.61), "keep075": (0.75, 32.68, 1.17),
        "none": (1.0, 32.36, 1.0)}


def build(scale: Scale, figure: Figure) -> Table:
  if scale.trial:
    return trial_tables.table6(scale, figure, {keep: theirs for keep, *theirs in ARMS.values()})
  jobs = {arm: runs.trainings(scale, arm) for arm in ARMS}
  right = {arm: accuracy(j) for arm, j in jobs.items()}
  ratios = {arm: speedup(seconds(jobs["none"]), seconds(j)) for arm, j in jobs.items()}
  rows = []
  for arm, (keep, paper_accuracy, paper_ratio) in ARMS.items():
    _, times = pair(seconds(jobs["published" if arm == "none" else "none"]), seconds(jobs[arm]))
    rows.append([f"{keep}", cell(step_mean(jobs[arm], "keep_ratio"), ".3f"), cell(right[arm]), f"{paper_accuracy}",
                 f"{np.mean(list(times.values())):.3g}" if times else NOT_RUN, cell(ratios[arm], ".2f", "x"), f"{paper_ratio}x"])
  notes = []
  for arm in ("keep025", "keep075", "none"):
    notes += tables.verdict(f"accuracy at 0.5 against {ARMS[arm][0]}", subtract(right["published"], right[arm]),
                            f"+{ARMS['published'][1] - ARMS[arm][1]:.2f} points", unit=" points")
  for arm in ("keep025", "published", "keep075"):
    notes += tables.faster(f"speed-up at {ARMS[arm][0]}", ratios[arm], f"{ARMS[arm][2]}x")
  if any(right.values()):
    axes, names = figure.subplots(1, 2), [f"{keep}" for keep, _, _ in ARMS.values()]
    tables.bars(axes[0], names, list(right.values()), f"Table 6 ({scale.name}), held-out accuracy by keep ratio", unit="% right")
    tables.bars(axes[1], names, list(ratios.values()), "speed-up of a step; crosses: the paper", "C1",
                "times as fast as keeping all")
    for arm, name in zip(ARMS, names, strict=True):
      axes[1].plot([name] if ratios[arm] else [], [ARMS[arm][2]] if ratios[arm] else [], "rx")
  notes += tables.device_note(*reversed(jobs.values())) + tables.load_note(sum(jobs.values(), []))
  columns = ("keep ratio asked", "kept", "accuracy, %", "paper", "seconds a step", "speed-up", "paper")
  return Table("table6", "Table 6: keep ratio", scale, columns, rows, notes, sum(jobs.values(), []))


if __name__ == "__main__":
  config.run(lambda: tables.main(build))
