"""Rows of the paper's tables 1, 5 and 6 from the trial's runs: arms beside plain GRPO after as many seconds of steps.

Pairs are those of trial_stats.py, each of one seed, host and version of the code; of several regimes with the same arms all of
them, each seed once, that of the first regime that has it. ± is 95% of Student's t over pairs.
"""

from collections.abc import Iterable
import contextlib

import numpy as np

from experiments import tables, trial_stats
from experiments.runs import Scale
from experiments.tables import Estimate
from experiments.trial_arms import REGIMES
from experiments.trial_stats import Found, Refused

PLAIN = "plain"
NOTE = ("Rows of the trial: other settings, ended after so many seconds of steps, not after so many steps; means over pairs of a "
        "seed on one host, ± 95% of Student's t over pairs. Its page says more.")
ARMS = {"published": "the paper's rule and head", "budget": "our budget", "budget035": "our budget"}  # all they do is prune


def pairs(names: tuple[str, ...], arm: str) -> list[tuple[Found, Found]]:
  """The arm beside plain, over these regimes; none of a regime whose runs are of several versions (its page says so)."""
  by_seed = {}
  for results in (trial_stats.load(REGIMES[name]) for name in names):
    with contextlib.suppress(Refused):
      for pair in trial_stats.pairs(results, arm, PLAIN):
        by_seed.setdefault(pair[0].run.seed, pair)
  return [by_seed[seed] for seed in sorted(by_seed)]


def known(scale: Scale, arms: tuple[str, ...]) -> list[tuple[str, list[tuple[Found, Found]]]]:
  """By label, the pairs of each of `arms` on each of the scale's data in the trial, where there are any."""
  out = []
  for data, names in scale.trial:
    for arm in arms:
      if both := pairs(names, arm):
        out.append((f"the trial: {data}, {both[0][0].run.regime.full:g} s of steps, {ARMS[arm]}", both))
  return out


def _over(values: Iterable[float]) -> Estimate:
  each = tuple(map(float, values))
  return Estimate(*trial_stats.interval(each), each if len(each) < 4 else ())


def accuracies(both: list[tuple[Found, Found]]) -> tuple[Estimate, Estimate, Estimate]:
  """Plain's greedy accuracy at the end, the arm's, and what the arm gains, in percent."""
  level = lambda found: trial_stats.accuracy(found, "full")
  return _over(level(b) for _, b in both), _over(level(a) for a, _ in both), _over(trial_stats.difference(both, level))


def times(both: list[tuple[Found, Found]], key: str = "sec_step") -> str:
  """How many times faster the arm's mean step (or phase of it) is than plain's."""
  return _over(trial_stats.speedup(both, key)).text(".2f", "x")


def table1(scale: Scale, theirs: tuple[float, float, float]) -> tuple[list[list[str]], list[str]]:
  """Rows and what they say, beside the paper's accuracy without and with pruning and its speed-up."""
  rows, notes = [], []
  for label, both in known(scale, ("published", "budget")):
    without, pruned, gain = accuracies(both)
    rows.append([label, without.text(), f"{theirs[0]}", pruned.text(), f"{theirs[1]}", gain.text("+.1f"),
                 f"+{theirs[1] - theirs[0]:.2f}", times(both), f"{theirs[2]:.2f}x"])
    notes += tables.verdict(f"accuracy with pruning against without ({label}; {len(both)} pairs)", gain, f"{rows[-1][6]} points",
                            unit=" points")
  return rows, [*notes, *([NOTE] if rows else [])]


def table5(scale: Scale, phases: tuple[tuple, ...]) -> tuple[list[list[str]], list[str]]:
  """Rows and a note: mean seconds by phase where the published rule prunes; `phases`: key, name, and the paper's seconds without
  and with it."""
  rows = []
  for label, both in known(scale, ("published",)):
    for key, what, slow, fast in phases:
      if key in both[0][0].lines[0]:
        without, pruned = (f"{np.mean([pair[i].column(key).mean() for pair in both]):.3g}" for i in (1, 0))
        paper = tables.paper_phase(slow, fast)
        rows.append([f"{what}, means ({label})", without, paper[0], pruned, paper[1], times(both, key), paper[2]])
  return rows, [NOTE] if rows else []


def table6(scale: Scale) -> tuple[list[list[str]], list[str]]:
  """Rows and a note: by what of the rollouts a rule was asked to keep, and plain of the same seeds."""
  rows = []
  for label, both in known(scale, tuple(ARMS)):
    keep = both[0][0].about["settings"].get("prune.keep", 0.5)
    kept, (plain, pruned, _) = _over(a.column("keep_ratio").mean() for a, _ in both), accuracies(both)
    seconds = [f"{np.mean([pair[i].column('sec_step').mean() for pair in both]):.3g}" for i in (0, 1)]
    rows.append([f"{keep} ({label})", kept.text(".3f"), pruned.text(), "", seconds[0], times(both), ""])
    rows.append([f"1.0 ({label}: plain of the same seeds)", "1.000", plain.text(), "", seconds[1], "1.00x", ""])
  return rows, [NOTE] if rows else []
