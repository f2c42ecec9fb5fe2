"""Table 4: balance of the survivors and accuracy, against random pruning at the same keep ratio.

  python -m experiments.table4 [--scale=cpu|gpu|paper] [--run [--minutes=9]] [--model=PATH] [--data=DIR]
"""

from matplotlib.figure import Figure

from arrol_jax import config
from experiments import runs, tables, trial_tables
from experiments.runs import Job, Scale
from experiments.tables import Estimate, Table, accuracy, cell, step_mean, subtract

ARMS = {"none": ("no pruning", "", ""), "random": ("random", "", "0.21 or less"),
        "published": ("ARRoL", "nearer 0.5 than random", "0.23 to 0.24"), "ours": ("within the group", "", ""),
        "balanced_head": ("the same, balanced head", "", "")}


def nearer(jobs: list[Job], others: list[Job]) -> Estimate | None:
  """By how much E[rho_hat] of `jobs` is nearer 0.5 than that of `others`; its interval is that of their difference."""
  difference = tables.step_difference(jobs, others, "pos_ratio")
  off = lambda x: abs(step_mean(x, "pos_ratio").value - 0.5)
  return difference and Estimate(off(others) - off(jobs), difference.half)


def build(scale: Scale, figure: Figure) -> Table:
  if scale.trial:
    return trial_tables.table4(scale, figure)
  jobs = {arm: runs.trainings(scale, arm) for arm in ARMS}
  ratio, variance, right = ({arm: f(j) for arm, j in jobs.items()} for f in (
    lambda j: step_mean(j, "pos_ratio"), lambda j: step_mean(j, "pos_var"), accuracy))
  rows = [[what, cell(ratio[arm], ".3f"), paper_ratio, cell(variance[arm], ".3f"), paper_variance,
           cell(step_mean(jobs[arm], "keep_ratio"), ".3f"), cell(step_mean(jobs[arm], "groups_mixed")),
           cell(step_mean(jobs[arm], "head_auc_within"), ".3f"), cell(right[arm])]
          for arm, (what, paper_ratio, paper_variance) in ARMS.items()]
  gain = {arm: tables.step_difference(jobs[arm], jobs["random"], "pos_var") for arm in ARMS}
  notes = tables.verdict("E[rho_hat] nearer 0.5 than with random pruning, by", nearer(jobs["published"], jobs["random"]),
                         "nearer", ".3f")
  notes += tables.verdict("E[rho_hat (1 - rho_hat)] against random", gain["published"], "+0.02 or more", ".4f")
  notes += tables.verdict("accuracy against random", subtract(right["published"], right["random"]), "better", unit=" points")
  if gain["none"]:
    notes.append("Fewer rollouts a group lower rho_hat (1 - rho_hat) by themselves: no pruning against random "
                 f"{gain['none'].text('+.4f')}.")
  for arm, what in (("ours", "balance solved within the group, fixed sizes, weighted survivors, log-probs and a buffer"),
                    ("balanced_head", "the same, its head reading mean state and log-probs, right and wrong weighing alike")):
    if gain[arm]:
      notes.append(f"Not in the paper: {what}; E[rho_hat (1 - rho_hat)] against random {gain[arm].text('+.4f')}.")
  if any(gain.values()):
    notes.append("Differences in balance are between the same steps of the same seeds, which have the same prompts; ± takes "
                 "steps as independent; in brackets, each seed. Random and published draw each rollout by itself, the two arms "
                 "that are not in the paper a fixed number, so they differ in the draw too.")
  if any(ratio.values()):
    figure.set_size_inches(13, 4)
    axes, names = figure.subplots(1, 3), [what for what, _, _ in ARMS.values()]
    tables.bars(axes[0], names, list(ratio.values()), f"Table 4 ({scale.name}): share right", unit="E[ρ̂] of survivors")
    axes[0].axhline(0.5, color="k", lw=0.8, ls="--")
    tables.bars(axes[1], names, list(variance.values()), "balance", "C2", "E[ρ̂(1 - ρ̂)] of survivors")
    tables.bars(axes[2], names, list(right.values()), "held-out accuracy", "C1", "% right")
  columns = ("pruning", "E[ρ̂]", "paper", "E[ρ̂(1 - ρ̂)]", "paper", "keep ratio", "mixed groups a step",
             "head's AUC within a prompt", "accuracy, %")
  return Table("table4", "Table 4: balance within groups of survivors, against random pruning", scale, columns, rows, notes,
               sum(jobs.values(), []))


if __name__ == "__main__":
  config.run(lambda: tables.main(build))
