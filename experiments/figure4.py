"""Figure 4: training reward against wall clock, GRPO without and with pruning; beside them random pruning and our setting.

  python -m experiments.figure4 [--scale=cpu|gpu|paper] [--run [--minutes=9]] [--model=PATH] [--data=DIR]

The reward is that of all rollouts started (reward_ipw: survivors count 1 / keep probability times), so that pruning does not
flatter it.
"""

import collections

from matplotlib.figure import Figure
import numpy as np

from arrol_jax import config
from experiments import runs, tables, trial_tables
from experiments.plot_run import smooth
from experiments.runs import Job, Scale
from experiments.tables import NOT_RUN, Estimate, Table

ARMS = {"none": "GRPO", "published": "GRPO with pruning", "random": "random pruning", "ours": "balance within the group",
        "balanced_head": "the same, balanced head"}
SLOW = 2.0  # a step that takes so many times the lower quartile of the like steps around it compiles; it counts as that quartile
LAST = 5    # steps whose mean reward counts as the reward at a moment


def clock(job: Job) -> np.ndarray:
  """Seconds since the start at the end of each step, compilation left out."""
  step = tables.column(job, "sec_step")
  pruned, place = np.nan_to_num(tables.column(job, "pruning")), np.arange(len(step))
  usual = np.array([np.quantile(step[(abs(place - i) <= 10) & (pruned == pruned[i])], 0.25) for i in place])
  return np.cumsum(np.where(step > SLOW * usual, usual, step))


def reward_at(job: Job, seconds: float) -> Estimate:
  """Mean reward of the last steps that ended by then, its interval over these steps."""
  done = tables.column(job, "reward_ipw")[clock(job) <= seconds + 1e-9][-LAST:]
  if len(done) < 2:
    return Estimate(float("nan"), float("nan"))
  return Estimate(float(done.mean()), float(1.96 * done.std(ddof=1) / np.sqrt(len(done))))


def build(scale: Scale, figure: Figure) -> Table:
  if scale.trial:
    return trial_tables.figure4(scale, figure)
  jobs = {arm: runs.trainings(scale, arm) for arm in ARMS}
  everyone = [job for each in jobs.values() for job in each]
  there = [job for job in everyone if job.done]
  together = min((clock(job)[-1] for job in there), default=0.0)
  moments, rewards = [together / 2, together], {}
  rows, notes = [], []
  for arm, what in ARMS.items():
    for job in jobs[arm]:
      seed = job.name.rpartition("_seed")[2]
      if not job.done:
        rows.append([f"{what}, seed {seed}", *[NOT_RUN] * 5])
        continue
      reward = tables.column(job, "reward_ipw")
      rewards[arm, seed] = [reward_at(job, t) for t in moments]
      rows.append([f"{what}, seed {seed}", f"{len(reward)}", f"{clock(job)[-1]:.0f}", f"{np.nanmean(reward[-LAST:]):.3f}",
                   *("too early" if np.isnan(x.value) else x.text(".3f") for x in rewards[arm, seed])])
  gap = lambda seed: rewards["published", seed][1] - rewards["none", seed][1]
  timed = [tables.seconds(jobs[arm]) for arm in ("none", "published")]
  pairs = [gap(seed) for seed, device in timed[0] if (seed, device) in timed[1]]
  if pairs:
    half = float(np.sqrt(np.sum([x.half**2 for x in pairs]))) / len(pairs)
    difference = Estimate(float(np.mean([x.value for x in pairs])), half)
    notes += tables.verdict(f"reward with pruning less that without at equal wall clock ({together:.0f} s), mean over seeds,",
                            difference, "above zero all along", ".3f")
  if there:
    draw(figure, scale, jobs)
  notes += tables.device_note(*jobs.values()) + tables.load_note(everyone)
  columns = ("run", "steps", "seconds", f"reward, last {LAST} steps", f"after {moments[0]:.0f} s", f"after {moments[1]:.0f} s")
  return Table("figure4", "Figure 4: reward against wall clock", scale, columns, rows, notes, everyone)


def draw(figure: Figure, scale: Scale, jobs: dict[str, list[Job]]) -> None:
  """Rewards over seconds, those of the commonest device alone, and over steps; each seed thin, the mean of seeds thick."""
  device = lambda job: runs.summary(job)["device"]
  done = {arm: [job for job in each if job.done] for arm, each in jobs.items()}
  commonest, _ = collections.Counter(device(job) for each in done.values() for job in each).most_common(1)[0]
  figure.set_size_inches(12, 5)
  axes = figure.subplots(1, 2, sharey=True)
  for i, arm in enumerate(ARMS):
    steps = [(np.arange(1.0, len(y) + 1), y) for job in done[arm] for y in [smooth(tables.column(job, "reward_ipw"), LAST)]]
    timed = [(clock(job), y) for job, (_, y) in zip(done[arm], steps, strict=True) if device(job) == commonest]
    for axis, lines in zip(axes, (timed, steps), strict=True):
      for x, y in lines:
        axis.plot(x, y, color=f"C{i}", lw=0.7, alpha=0.25)
      if lines:
        x = np.linspace(max(x[0] for x, _ in lines), min(x[-1] for x, _ in lines), 200)
        axis.plot(x, np.mean([np.interp(x, *line) for line in lines], axis=0), color=f"C{i}", lw=2.0, label=ARMS[arm])
  figure.suptitle(f"Figure 4 (scale {scale.name}). Thin: each seed; thick: the mean of the seeds shown", fontsize=11)
  axes[0].set_ylabel(f"reward of all rollouts started, {LAST}-step mean", fontsize=9)
  axes[0].set_title("against wall clock: runs on this device only", fontsize=10)
  axes[0].set_xlabel(f"seconds on {commonest}, compilation left out", fontsize=9)
  axes[1].set_title("against steps: all runs", fontsize=10)
  axes[1].set_xlabel("step", fontsize=9)
  for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)
  figure.legend(*axes[1].get_legend_handles_labels(), fontsize=10, ncols=len(ARMS), loc="outside lower center")


if __name__ == "__main__":
  config.run(lambda: tables.main(build))
