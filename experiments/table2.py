"""Table 2: DAPO against DAPO with pruning, accuracy and speed-up.

  python -m experiments.table2 [--scale=cpu|gpu|paper] [--run [--minutes=9]] [--model=PATH] [--data=DIR]
"""

from matplotlib.figure import Figure

from arrol_jax import config
from experiments import tables, trial_tables
from experiments.runs import Scale
from experiments.table1 import compare
from experiments.tables import Table

PAPER = {"qwen3_1b7": (36.43, 39.42, 1.70)}


def build(scale: Scale, figure: Figure) -> Table:
  if scale.trial:
    return trial_tables.table2(scale, figure, next(iter(PAPER.values())))
  table = compare(scale, figure, "table2", "Table 2, DAPO", ("dapo_none", "dapo"), PAPER)
  table.notes.append("Dynamic sampling: a step may take up to 3 batches of prompts till enough groups are mixed, and its seconds "
                     "count them all.")
  return table


if __name__ == "__main__":
  config.run(lambda: tables.main(build))
