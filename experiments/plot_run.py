"""Plots runs: reward against steps and wall clock, rollouts kept and pruned, the head's AUC.

  python -m experiments.plot_run WORKDIR [WORKDIR ...] [--out=FILE.png]

Several workdirs share the reward panels; the rollout panel shows the first. Without --out the plot goes to WORKDIR/plot.png.
"""

import argparse
import os

import matplotlib
import numpy as np

from arrol_jax import config
from arrol_jax.reporting.run_folder import columns, smooth
from arrol_jax.running.workdir import read_lines
from arrol_jax.types import UserError
from arrol_jax.usage import Parser

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)


def parser(name: str, doc: str) -> Parser:
  """Of the command experiments.NAME about runs."""
  return Parser(prog=f"python -m experiments.{name}", description=doc.partition("\n")[0], allow_abbrev=False)


def to_compare(name: str, doc: str, skip: int) -> tuple[list[str], int]:
  """The folders and --skip that experiments.NAME is given: two runs or more, each with more steps than are left out at first."""
  p = parser(name, doc)
  p.add_argument("workdirs", nargs="*", help="folders of runs, two or more; the first is what others are compared with")
  p.add_argument("--skip", type=_steps, default=skip, help="steps to leave out at the start")
  given = p.parse_args()
  if len(given.workdirs) < 2:
    raise UserError("give the workdirs of two runs or more")
  fewest = min(len(steps_of(w)) for w in sorted(given.workdirs, key=_is_there))  # what is not there is told first
  if given.skip >= fewest:
    raise UserError(f"--skip={given.skip} leaves nothing of a run of {fewest} steps")
  return given.workdirs, given.skip


def _steps(text: str) -> int:
  if not text.isdigit():
    raise argparse.ArgumentTypeError(f"{text!r} is no number of steps")
  return int(text)


def _is_there(workdir: str) -> bool:
  return os.path.exists(f"{workdir}/metrics.jsonl")


def steps_of(workdir: str) -> list[dict]:
  """Lines of metrics.jsonl; UserError where there is none."""
  path = f"{workdir}/metrics.jsonl"
  if not _is_there(workdir):
    raise UserError(f"{path} does not exist")
  if not (lines := read_lines(path)):
    raise UserError(f"{path} holds no step yet")
  return lines


def read(workdir: str) -> dict[str, np.ndarray]:
  """Columns of metrics.jsonl as float arrays; null becomes NaN."""
  return columns(steps_of(workdir))


def plot(workdirs: list[str], out: str) -> None:
  runs = {os.path.basename(os.path.normpath(w)): read(w) for w in workdirs}
  figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), constrained_layout=True)
  figure.get_layout_engine().set(w_pad=0.1, h_pad=0.1)
  for i, (name, m) in enumerate(runs.items()):
    color = f"C{i}"
    for axis, x in ((axes[0, 0], m["step"]), (axes[0, 1], np.cumsum(m["sec_step"]) / 60)):
      axis.plot(x, m["reward_ipw"], color=color, alpha=0.25, lw=1)
      axis.plot(x, smooth(m["reward_ipw"]), color=color, lw=2, label=name)
    axes[1, 1].plot(m["step"], smooth(m["head_auc"]), color=color, lw=2, label=f"{name}: all rollouts")
    axes[1, 1].plot(m["step"], smooth(m["head_auc_within"]), color=color, lw=2, ls=":", label=f"{name}: within a prompt")
  axes[0, 0].set(title="Reward of all rollouts started", xlabel="step", ylabel="reward (reward_ipw)")
  axes[0, 1].set(title="The same against wall clock", xlabel="minutes of steps", ylabel="reward (reward_ipw)")
  m = next(iter(runs.values()))
  axes[1, 0].stackplot(m["step"], m["rollouts_kept"], m["rollouts_pruned"], step="mid", colors=("C2", "lightgrey"),
                       labels=("kept", "pruned"))
  axes[1, 0].set(title=f"Rollouts per step ({next(iter(runs))})", xlabel="step", ylabel="rollouts",
                 ylim=(0, 1.2 * np.max(m["rollouts_kept"] + m["rollouts_pruned"])))  # room for the legend
  axes[1, 1].axhline(0.5, color="k", lw=0.8)
  axes[1, 1].set(title="Quality head (5-step mean; 0.5 is chance)", xlabel="step", ylabel="AUC, right against wrong",
                 ylim=(0.2, 1.0))
  for axis in axes.flat:
    below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.17), "ncols": 2} if axis is axes[1, 1] else \
      {"loc": "upper right", "ncols": 2} if axis is axes[1, 0] else {"loc": "upper left"}  # the head's lines leave no room inside
    axis.legend(fontsize=9, **below)
    axis.spines[["top", "right"]].set_visible(False)
  figure.savefig(out, dpi=120)
  plt.close(figure)


def main():
  p = parser("plot_run", __doc__)
  p.add_argument("workdirs", nargs="*", help="folders of runs, one or more")
  p.add_argument("--out", help="the plot's file; default plot.png in the first folder")
  given = p.parse_args()
  if not given.workdirs:
    raise UserError("give the workdir of a run")
  out = given.out or f"{given.workdirs[0]}/plot.png"
  plot(given.workdirs, out)
  print(f"{out}: written")


if __name__ == "__main__":
  config.run(main)
