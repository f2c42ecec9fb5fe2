"""The trial's plots: reward and held-out accuracy of all runs; accuracy against signal a second."""

from matplotlib.figure import Figure
import numpy as np

from experiments.trial_files import Found, Results
from experiments.trial_stats import accuracy, accuracy_pairs, interval, learned_share, mean, slope


def curve(found: Found, grid: np.ndarray, window: int = 5) -> np.ndarray:
  """Trailing mean of reward_ipw over `window` steps at the seconds of `grid`; NaN before the first and after the last step."""
  reward, seconds = found.column("reward_ipw", 0), found.column("sec_total", 0)
  smooth = [mean(reward[max(0, i - window + 1):i + 1]) for i in range(len(reward))]
  return np.interp(grid, seconds, smooth, left=np.nan, right=np.nan)


def looks(results: Results) -> dict[str, dict]:
  """Colour and line of each arm that has runs."""
  return {arm: {"color": f"C{i % 10}", "ls": "-" if i < 10 else "--"}
          for i, arm in enumerate(arm for arm in results.regime.seeds if results.of(arm))}


def course(results: Results) -> Figure:
  """Reward while training, and held-out accuracy by arm: all runs thin or small, their mean thick."""
  figure = Figure(figsize=(13, 5.5), layout="constrained")
  rewards, held_out = figure.subplots(1, 2)
  grid = np.linspace(0, results.regime.full, 121)
  for i, (arm, look) in enumerate(looks(results).items()):
    runs = results.of(arm)
    curves = [curve(r, grid) for r in runs]
    for y in curves if len(curves) > 1 else ():
      rewards.plot(grid, y, lw=0.6, alpha=0.3, **look)
    whole = np.isfinite(curves).all(axis=0)  # where all runs of the arm have a value
    name = arm + (", one run" if len(runs) == 1 else "") + (" *" if "rollout.candidates" in runs[0].about["settings"] else "")
    rewards.plot(grid, np.where(whole, np.nansum(curves, axis=0) / len(curves), np.nan), lw=2.5 if len(runs) > 1 else 1.2,
                 label=name, **look)
    moments = {when: np.array([np.nan if (x := accuracy(r, when)) is None else x for r in runs]) for when in ("half", "full")}
    jitter = 0.05 * (np.arange(len(runs)) - (len(runs) - 1) / 2) / max(1, len(runs) / 5)  # none hides another
    held_out.plot(i + np.array([jitter - 0.17, jitter + 0.17]), list(moments.values()), color=look["color"], lw=0.5, alpha=0.4)
    for values, aside, fill in zip(moments.values(), (-0.17, 0.17), ("none", look["color"]), strict=True):
      held_out.scatter(i + aside + jitter, values, s=22, facecolors=fill, edgecolors=look["color"], lw=1, zorder=3)
      center, half = interval(values[np.isfinite(values)])
      if len(runs) > 1:
        held_out.errorbar(i + 1.9 * aside, center, yerr=half, color=look["color"], marker="_", ms=10, lw=2, capsize=3)
  rewards.set_xlim(0, results.regime.full)
  rewards.set(title="Reward of all rollouts started, mean of five steps\n(*: of prompts that it chose, so beside its like only)",
              xlabel="seconds of steps, compilation and evaluations not counted", ylabel="reward (reward_ipw)")
  held_out.set(title="Held-out accuracy, greedy: runs, and means with 95% over seeds\n"
               f"(open: after {results.regime.half:g} s of steps, filled: after {results.regime.full:g} s)", ylabel="accuracy, %")
  held_out.set_xticks(range(len(looks(results))), list(looks(results)), rotation=30, ha="right")
  held_out.grid(axis="y", lw=0.4)
  for axis in (rewards, held_out):
    axis.spines[["top", "right"]].set_visible(False)
  figure.legend(*rewards.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=9, frameon=False)
  return figure


def against_signal(results: Results, plain: str) -> Figure:
  """Accuracy above plain's against signal a second in multiples of plain's: a small point a pair, a large one an arm's mean."""
  figure = Figure(figsize=(8.5, 6), layout="constrained")
  axis = figure.subplots()
  known = accuracy_pairs(results, plain)
  for arm, look in looks(results).items():
    if arm in known:
      x, y = known[arm]
      part = any(learned_share(r) < 1 for r in results.of(arm))
      fill = {"facecolors": "none" if part else look["color"], "edgecolors": look["color"]}
      axis.scatter(x, y, s=16, alpha=0.5, **fill)
      name = arm + (", one pair" if len(x) == 1 else f", {len(x)} pairs") + (" (of all that finished)" if part else "")
      axis.scatter(np.mean(x), np.mean(y), s=110, label=name, **fill)
  points, ends = slope(results, plain), np.array(axis.get_xlim())
  if np.isfinite(points):
    axis.plot(ends, points * (ends - 1), color="grey", lw=1, ls=":", label="least squares through plain, filled points")
  axis.axhline(0, color="k", lw=0.6)
  axis.axvline(1, color="k", lw=0.6)
  axis.set(xlabel=f"signal a second, times {plain}'s of the same seed", ylabel=f"accuracy above {plain}'s, points",
           title=f"Greedy accuracy after {results.regime.full:g} s of steps")
  axis.spines[["top", "right"]].set_visible(False)
  if known:
    figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
  return figure
