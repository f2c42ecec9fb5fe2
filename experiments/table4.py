"""Table 4: balance of the survivors and accuracy, against random pruning at the same keep ratio.

  python -m experiments.table4 [--scale=cpu|gpu|paper] [--run [--minutes=9]] [--model=PATH] [--data=DIR]
"""

from matplotlib.figure import Figure

from arrol_jax import config
from experiments import runs, tables
from experiments.runs import Scale
from experiments.tables import Estimate, Table, accuracy, cell, step_mean, subtract

ARMS = {"none": ("no pruning", "", ""), "random": ("random", "", "0.21 or less"),
        "published": ("ARRoL", "nearer 0.5 than random", "0.23 to 0.24"), "ours": ("within the group", "", ""),
        "balanced_head": ("the same, balanced head", "", "")}


def off_balance(ratio: Estimate | None) -> Estimate | None:
  """Distance of E[rho_hat] from 0.5, with the same interval."""
  return ratio and Estimate(abs(ratio.value - 0.5), ratio.half)


def build(scale: Scale, figure: Figure) -> Table:
  jobs = {arm: runs.trainings(scale, arm) for arm in ARMS}
  ratio, variance, right = ({arm: f(j) for arm, j in jobs.items()} for f in (
    lambda j: step_mean(j, "pos_ratio"), lambda j: step_mean(j, "pos_var"), accuracy))
  rows = [[what, cell(ratio[arm], ".3f"), paper_ratio, cell(variance[arm], ".3f"), paper_variance,
           cell(step_mean(jobs[arm], "keep_ratio"), ".3f"), cell(step_mean(jobs[arm], "groups_mixed")),
           cell(step_mean(jobs[arm], "head_auc_within"), ".3f"), cell(right[arm])]
          for arm, (what, paper_ratio, paper_variance) in ARMS.items()]
  notes = tables.verdict("E[rho_hat] nearer 0.5 than with random pruning, by",
                         subtract(off_balance(ratio["random"]), off_balance(ratio["published"])), "nearer", ".3f")
  notes += tables.verdict("E[rho_hat (1 - rho_hat)] against random", subtract(variance["published"], variance["random"]),
                          "+0.02 or more", ".3f")
  notes += tables.verdict("accuracy against random", subtract(right["published"], right["random"]), "better", unit=" points")
  if variance["none"] and variance["random"]:
    notes.append("Fewer rollouts a group lower rho_hat (1 - rho_hat) by themselves: random pruning against none "
                 f"{(variance['random'] - variance['none']).text('+.3f')}.")
  for arm, what in (("ours", "balance solved within the group, fixed sizes, weighted survivors, log-probs and a buffer"),
                    ("balanced_head", "the same, its head reading mean state and log-probs, right and wrong weighing alike")):
    if variance[arm] and variance["random"]:
      notes.append(f"Not in the paper: {what}; E[rho_hat (1 - rho_hat)] against random "
                   f"{(variance[arm] - variance['random']).text('+.3f')}.")
  if any(ratio.values()):
    axes, names = figure.subplots(1, 3), [what for what, _, _ in ARMS.values()]
    tables.bars(axes[0], names, list(ratio.values()), f"Table 4, E[ρ̂] of survivors ({scale.name})")
    axes[0].axhline(0.5, color="k", lw=0.8, ls="--")
    tables.bars(axes[1], names, list(variance.values()), "E[ρ̂(1 - ρ̂)]", "C2")
    tables.bars(axes[2], names, list(right.values()), "held-out accuracy, %", "C1")
  columns = ("pruning", "E[ρ̂]", "paper", "E[ρ̂(1 - ρ̂)]", "paper", "keep ratio", "mixed groups a step",
             "head's AUC within a prompt", "accuracy, %")
  return Table("table4", "Table 4: balance within groups of survivors, against random pruning", scale, columns, rows, notes,
               sum(jobs.values(), []))


if __name__ == "__main__":
  config.run(lambda: tables.main(build))
