"""Table 1: GRPO against GRPO with pruning, accuracy and speed-up.

  python -m experiments.table1 [--scale=cpu|gpu|paper] [--run [--minutes=9]] [--model=PATH] [--data=DIR]
"""

from matplotlib.figure import Figure

from arrol_jax import config
from experiments import runs, tables, trial_tables
from experiments.runs import PAPER_MODELS, Scale
from experiments.tables import Table, accuracy, cell, pair, seconds, speedup, subtract

# The paper's average over six benchmarks without and with pruning, and its speed-up.
PAPER = {"qwen3_1b7": (34.79, 37.09, 1.61), "qwen3_4b": (51.01, 53.54, 1.63), "qwen3_8b": (56.66, 59.53, 1.62),
         "llama32_1b": (14.63, 17.49, 1.67)}


def compare(scale: Scale, figure: Figure, name: str, title: str, arms: tuple[str, str], paper: dict) -> Table:
  """Two arms, without and with pruning; at the paper scale a row a model, elsewhere one row beside the paper's smallest."""
  models = list(paper) if scale.name == "paper" else list(paper)[:1]
  rows, notes, jobs = [], [], []
  axes = None
  for model in models:
    base, pruned = (runs.trainings(scale, arm, model) for arm in arms)
    mine = [*base, *pruned]
    jobs += mine if scale.name != "paper" else [x for job in mine for x in (job, *runs.benchmarks(job))]
    a, b = accuracy(base), accuracy(pruned)
    gain, ratio = subtract(b, a), speedup(seconds(base), seconds(pruned))
    theirs, label = paper[model], PAPER_MODELS[model] if scale.name == "paper" else scale.model
    rows.append([label, cell(a), f"{theirs[0]}", cell(b), f"{theirs[1]}", cell(gain, "+.1f"), f"+{theirs[1] - theirs[0]:.2f}",
                 cell(ratio, ".2f", "x"), f"{theirs[2]:.2f}x"])
    notes += tables.verdict(f"accuracy with pruning against without ({label})", gain, rows[-1][6] + " points", unit=" points")
    notes += tables.faster(f"speed-up of a step ({label})", ratio, rows[-1][8])
    notes += tables.by_seed("Accuracy with pruning less that without", a, b)
    notes += tables.device_note(base, pruned) + tables.load_note(mine)
    if a or b:
      axes = figure.subplots(1, 2) if axes is None else axes
      before = accuracy(mine, "eval_before") if scale.name != "paper" else None
      tables.bars(axes[0], ["before", "without", "with pruning"], [before, a, b], f"{title}: held-out accuracy", unit="% right")
      tables.bars(axes[1], ["without", "with pruning"], [_mean(x) for x in pair(seconds(base), seconds(pruned))],
                  "a step, median", "C1", "seconds")
  if scale.name != "paper":
    notes.append(f"The paper's columns are {PAPER_MODELS[models[0]]}, the average of six benchmarks: another scale, there to "
                 "compare directions.")
  columns = ("model", "without", "paper", "with pruning", "paper", "gain", "paper", "speed-up", "paper")
  return Table(name, f"{title}: accuracy (%) and speed-up", scale, columns, rows, notes, jobs)


def _mean(by_seed: dict) -> tables.Estimate | None:
  each = tuple(by_seed.values())
  return tables.Estimate(sum(each) / len(each), float("nan"), each) if each else None


def build(scale: Scale, figure: Figure) -> Table:
  if scale.trial:
    return trial_tables.table1(scale, figure, next(iter(PAPER.values())))
  return compare(scale, figure, "table1", "Table 1, GRPO", ("none", "published"), PAPER)


if __name__ == "__main__":
  config.run(lambda: tables.main(build))
