"""The paper's tables 1 to 6 and figure 4 from the trial's runs: arms beside each other after as many seconds of steps.

Pairs are those of trial_stats.py, each of one seed, host and version of the code; of several regimes with the same arms all of
them, each seed once, that of the first regime that has it. ± is 95% of Student's t over pairs; of one pair there is none. Balance
is that of the runs whose files have it. What the regime TABLES misses is told. Left out: figure 2's heads (figure2.py), what is
not the paper's (trial_page.py).
"""

from collections.abc import Iterable
import contextlib
import dataclasses
import textwrap

from matplotlib.figure import Figure
import numpy as np

from experiments import tables, trial_stats
from experiments.runs import Scale
from experiments.tables import NOT_RUN, Estimate, Table, cell, faster, verdict
from experiments.trial_arms import REGIMES, SKIP, TABLES
from experiments.trial_plots import curve
from experiments.trial_stats import Found, Refused

PLAIN = "plain"
RULES = {"published": "the paper's rule and head", "budget": "our budget", "budget035": "our budget",
         "keep025": "the paper's rule and head", "keep075": "the paper's rule and head"}  # arms that prune and do nothing else
Pairs = list[tuple[Found, Found]]


# ---- runs


def pairs(names: tuple[str, ...], arm: str, other: str = PLAIN) -> Pairs:
  """Both arms over these regimes; none of a regime whose runs are of several versions (its page says so)."""
  by_seed = {}
  for results in (trial_stats.load(REGIMES[name]) for name in names):
    with contextlib.suppress(Refused):
      for pair in trial_stats.pairs(results, arm, other):
        by_seed.setdefault(pair[0].run.seed, pair)
  return [by_seed[seed] for seed in sorted(by_seed)]


def known(scale: Scale, arms: tuple[str, ...]) -> list[tuple[str, str, Pairs]]:
  """(data and rule, arm, its pairs with plain) of each of the scale's data in the trial, where there are any."""
  return [(f"{data}: {RULES[arm]}", arm, both) for data, names in scale.trial for arm in arms if (both := pairs(names, arm))]


def everyone(scale: Scale, arm: str) -> list[Found]:
  """All runs of an arm on the scale's first data, whichever code and host."""
  return [found for name in scale.trial[0][1] for found in trial_stats.load(REGIMES[name]).of(arm)]


# ---- figures of pairs


def level(found: Found) -> float | None:
  """Greedy accuracy at the end, in percent."""
  return trial_stats.accuracy(found, "full")


def over(values: Iterable[float], few: int = 0) -> Estimate:
  """Mean over pairs or runs; each beside it where they are fewer than `few`."""
  each = tuple(map(float, values))
  return Estimate(*trial_stats.interval(each), each if len(each) < few else ())


def accuracies(both: Pairs) -> tuple[Estimate, Estimate, Estimate]:
  """The second arm's greedy accuracy, the first's, and what the first gains, in percent."""
  return over(level(b) for _, b in both), over(level(a) for a, _ in both), over(trial_stats.difference(both, level), 4)


def times(both: Pairs, key: str = "sec_step") -> Estimate:
  """How many times faster the first arm's mean step (or phase of it) is than the second's."""
  return over(trial_stats.speedup(both, key))


def seconds(both: Pairs, key: str, side: int) -> str:
  return f"{np.mean([pair[side].column(key).mean() for pair in both]):.3g}"


def gained(what: str, both: Pairs, gain: Estimate, paper: str) -> list[str]:
  """A verdict on a difference; one pair has no interval and decides nothing."""
  if len(both) == 1:
    return [f"One pair, so undecided: {what} {gain.value:+.1f} points; paper {paper}."]
  return verdict(f"{what}, {counted(both)},", gain, paper, unit=" points")


def counted(both: Pairs) -> str:
  return "one pair" if len(both) == 1 else f"{len(both)} pairs"


# ---- tables


def made(name: str, title: str, scale: Scale, columns: tuple[str, ...], rows: list[list[str]], notes: list[str],
         arms: Iterable[str]) -> Table:
  """A table of the trial: where its runs are from, and what the tables' regime misses of these arms."""
  about = (f"Scale: {scale.name}. {scale.model}; {scale.data}; runs of the trial, whose page has their code, hosts and "
           f"settings; a run ends after {REGIMES[TABLES].full:g} s of steps, a pair is of one code, host and seed. Means leave "
           f"out the first {SKIP} steps; ± is 95% of Student's t over pairs or runs. The paper's figures: its "
           "models and data.")
  missing = [run for run in trial_stats.load(REGIMES[TABLES]).missing if run.rpartition("_seed")[0] in arms]
  if missing:
    notes = [*notes, f"Not run of regime {TABLES}: {', '.join(missing)}. `python -m experiments.trial --run --scale=gpu "
             f"--regime={TABLES} --votes --model=DIR/model.gguf --data=DIR` does it."]
  return Table(name, title, scale, columns, rows, notes, [], about)


def compare(scale: Scale, figure: Figure, title: str, found: list[tuple[str, Pairs]], theirs: tuple, arms: tuple) -> Table:
  """Tables 1 and 2: by row an arm that prunes beside the same without pruning; title: "Table 1, GRPO"."""
  rows, notes = [], []
  for label, both in found:
    without, pruned, gain = accuracies(both)
    rows.append([label, str(len(both)), without.text(), f"{theirs[0]}", pruned.text(), f"{theirs[1]}", gain.text("+.1f"),
                 f"+{theirs[1] - theirs[0]:.2f}", times(both).text(".2f", "x"), f"{theirs[2]:.2f}x"])
    notes += gained(f"accuracy with pruning less that without ({label})", both, gain, f"{rows[-1][7]} points")
    ratio = dataclasses.replace(times(both), each=tuple(trial_stats.speedup(both)))
    notes += faster(f"speed-up of a step ({label})", ratio, rows[-1][9]) if len(both) > 1 else []
  if found:
    axes, labels = figure.subplots(1, 2), [label for label, _ in found]
    tables.bars(axes[0], labels, [accuracies(both)[2] for _, both in found], f"{title}: gained by pruning", unit="points")
    tables.bars(axes[1], labels, [times(both) for _, both in found], "a step, mean", "C1", "times as fast")
    for axis, still in zip(axes, (0, 1), strict=True):
      axis.axhline(still, color="k", lw=0.8)
  columns = ("data: rule", "pairs", "without", "paper", "with pruning", "paper", "gain", "paper", "speed-up", "paper")
  name = title.partition(",")[0].replace(" ", "").lower()
  return made(name, f"{title}: accuracy (%) and speed-up", scale, columns, rows, notes, arms)


def table1(scale: Scale, figure: Figure, theirs: tuple[float, float, float]) -> Table:
  """theirs: the paper's accuracy without and with pruning, and its speed-up."""
  found = [(label, both) for label, _, both in known(scale, ("published", "budget"))]
  return compare(scale, figure, "Table 1, GRPO", found, theirs, (PLAIN, "published", "budget"))


def table2(scale: Scale, figure: Figure, theirs: tuple[float, float, float]) -> Table:
  both = pairs((TABLES,), "dapo_published", "dapo")
  found = [(f"{scale.trial[0][0]}: {RULES['published']}", both)] if both else []
  table = compare(scale, figure, "Table 2, DAPO", found, theirs, ("dapo", "dapo_published"))
  table.notes.append("Dynamic sampling: a step may take up to 3 rounds of prompts till enough groups are mixed, one after the "
                     "other, and its seconds count them all.")
  return table


def table3(scale: Scale, figure: Figure, rules: tuple[tuple[str, str, str], ...]) -> Table:
  """rules: key in a run's votes, what it is, the paper's accuracy. Gains are paired by problem."""
  voted = [found for name in scale.trial[0][1] for runs in trial_stats.load(REGIMES[name]).there.values()
           for found in runs.values() if found.votes]
  rows, notes, drawn = [], [], {}
  for key, what, paper in rules:
    cells = []
    for found in voted:
      votes, gain = found.votes, None
      value = Estimate(100 * votes[key], 100 * votes["ci95"]) if key == "accuracy" else centred(votes[key], votes[f"{key}_ci"])
      if f"{key}_gain_ci" in votes:
        gain = centred(votes[key] - votes["maj@16"], votes[f"{key}_gain_ci"])
        drawn.setdefault(what, []).append(gain)
        if key == "rank@16":
          notes += verdict(f"rank by the head above the majority after {found.run.arm}, seed {found.run.seed},", gain,
                           "+6.6 and +10.0 points (AIME'24)", unit=" points")
      cells.append(value.text() + (f"; {gain.text('+.1f')}" if gain else ""))
    rows.append([what, *cells, paper])
  rows.append(["tokens a problem", *(f"{found.votes['tokens']:,.0f}" for found in voted), ""])
  if voted:
    axis, names = figure.subplots(), [f"{found.run.arm}, seed {found.run.seed}" for found in voted]
    for i, name in enumerate(names):
      x = np.arange(len(drawn)) + 0.8 * ((i + 0.5) / len(names) - 0.5)
      gains = [each[i] for each in drawn.values()]
      axis.bar(x, [g.value for g in gains], 0.7 / len(names), yerr=[g.half for g in gains], capsize=3, label=f"after {name}")
    axis.set_xticks(range(len(drawn)), [textwrap.fill(what, 16) for what in drawn], fontsize=8)
    axis.axhline(0, color="k", lw=0.8)
    axis.set_ylabel("points above the majority, 95% over problems", fontsize=9)
    axis.set_title("Table 3: what weighing 16 samples adds", fontsize=10)
    axis.legend(fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
    notes.append(f"{voted[0].votes['problems']} problems, the same for all; behind the semicolon, points above the majority "
                 "of the same samples; intervals by bootstrap over problems, so they hold no spread of seeds.")
  columns = ("vote", *(f"after {found.run.arm}, seed {found.run.seed}" for found in voted), "paper (1.7B, 8B; AIME'24)")
  return made("table3", "Table 3: accuracy of the voted answer (%)", scale, columns, rows, notes, REGIMES[TABLES].votes)


def centred(value: float, interval: list[float]) -> Estimate:
  """In percent, half of a bootstrap interval's width beside it."""
  return Estimate(100 * value, 50 * (interval[1] - interval[0]))


def table4(scale: Scale, figure: Figure) -> Table:
  names, labels = scale.trial[0][1], {PLAIN: "no pruning", "random": "random", "published": "ARRoL", "budget": "our budget"}
  paper = {"random": ("", "0.21 or less"), "published": ("nearer 0.5 than random", "0.23 to 0.24")}
  rows, notes, signals = [], [], {}
  for arm, what in labels.items():
    runs = everyone(scale, arm)
    of = lambda key, runs=runs: [x for r in runs for x in [r.column(key)] if np.isfinite(x).any()]
    mean = lambda key, form, of=of: over(np.nanmean(x) for x in of(key)).text(form) if of(key) else NOT_RUN
    theirs = paper.get(arm, ("", ""))
    signals[what] = over(map(trial_stats.signal, runs)) if runs else None
    rows.append([what, str(len(runs)), mean("pos_ratio", ".3f"), theirs[0], mean("pos_var", ".3f"), theirs[1],
                 cell(signals[what], ".2f"), mean("keep_ratio", ".3f"), mean("groups_mixed", ".1f"),
                 mean("head_auc_within", ".3f"), over(map(level, runs)).text() if runs else NOT_RUN])
  for arm in ("published", "budget"):
    both = pairs(names, arm, "random")
    if both:
      share = over(100 * (trial_stats.signal(a) / trial_stats.signal(b) - 1) for a, b in both)
      notes += [f"Signal a group, {labels[arm]} beside random: {share.text('+.0f', '%')} ({counted(both)}); accuracy "
                f"{accuracies(both)[2].text('+.1f')} points."]
  notes.append("Signal: sum over a group's survivors of (r - mean r)², which is K ρ̂ (1 - ρ̂): all files have it. ρ̂ itself is in "
               "those of later runs alone. Arms have unequal runs, of several commits and hosts.")
  if any(signals.values()):
    tables.bars(figure.subplots(), list(signals), list(signals.values()), "Table 4: signal a group of what finishes", "C2",
                "Σ(r - mean r)²")
  columns = ("pruning", "runs", "E[ρ̂]", "paper", "E[ρ̂(1 - ρ̂)]", "paper", "signal a group", "keep ratio", "mixed groups a step",
             "head's AUC within a prompt", "accuracy, %")
  return made("table4", "Table 4: balance within groups of survivors, against random pruning", scale, columns, rows, notes,
              labels)


def table5(scale: Scale, figure: Figure, phases: tuple[tuple, ...]) -> Table:
  """phases: key, name, and the paper's seconds without and with pruning."""
  rows, drawn = [], {}
  for label, _, both in known(scale, ("published",)):
    for key, what, slow, fast in phases:
      if key in both[0][0].lines[0]:
        paper, ratio = tables.paper_phase(slow, fast), times(both, key)
        drawn[f"{label.partition(':')[0]}, {what}"] = ratio
        rows.append([f"{label}; {what}", seconds(both, key, 1), paper[0], seconds(both, key, 0), paper[1],
                     ratio.text(".2f", "x"), paper[2]])
  notes = ["Log-probs have no row: they are computed in the update here."] if rows else []
  if drawn:
    axis = figure.subplots()
    tables.bars(axis, list(drawn), list(drawn.values()), "Table 5, speed-up by phase, the paper's rule",
                unit="times as fast as without pruning")
    axis.axhline(1, color="k", lw=0.8)
  columns = ("phase, mean seconds", "GRPO", "paper", "+ pruning", "paper", "speed-up", "paper")
  return made("table5", "Table 5: seconds a step by phase", scale, columns, rows, notes, (PLAIN, "published"))


def table6(scale: Scale, figure: Figure, theirs: dict[float, tuple[float, float]]) -> Table:
  """theirs: by keep ratio the paper's accuracy and speed-up. Each row has a gain over plain of the same seeds."""
  rows, notes, drawn = [], [], {}
  for label, _, both in known(scale, tuple(RULES)):
    keep = both[0][0].about["settings"].get("prune.keep", 0.5)
    kept, (plain, pruned, gain) = over(a.column("keep_ratio").mean() for a, _ in both), accuracies(both)
    paper = theirs.get(keep, ("", ""))
    drawn[f"{keep}, {label}"] = times(both)
    rows.append([f"{keep} ({label})", str(len(both)), kept.text(".3f"), plain.text(), pruned.text(), gain.text("+.1f"),
                 f"{paper[0] - theirs[1.0][0]:+.2f}" if paper[0] else "", times(both).text(".2f", "x"),
                 f"{paper[1]}x" if paper[1] else ""])
  if drawn:
    axis = figure.subplots()
    tables.bars(axis, list(drawn), list(drawn.values()), "Table 6, speed-up of a step by keep ratio and rule", "C1",
                "times as fast as keeping all")
    axis.axhline(1, color="k", lw=0.8)
  columns = ("keep ratio asked", "pairs", "kept", "keeping all, %", "accuracy, %", "gain", "paper", "speed-up", "paper")
  return made("table6", "Table 6: keep ratio", scale, columns, rows, notes, (PLAIN, *RULES))


def figure4(scale: Scale, figure: Figure) -> Table:
  """Reward of all rollouts started against seconds of steps, over the scale's first data."""
  data, names = scale.trial[0]
  labels = {PLAIN: "GRPO", "published": "the paper's rule", "random": "random pruning", "budget": "our budget"}
  regime, rows, notes, drawn = REGIMES[names[0]], [], [], {}
  grid = np.linspace(0, regime.full, 121)
  halves = [(0, regime.half), (regime.half, regime.full)]
  for arm, what in labels.items():
    runs, row = everyone(scale, arm), [what]
    row += [str(len(runs)), over(len(r.lines) for r in runs).text(".0f") if runs else NOT_RUN]
    row += [over(reward(r, *half) for r in runs).text(".3f") if runs else NOT_RUN for half in halves]
    both = pairs(names, arm) if arm != PLAIN else []
    for half in halves:
      gain = over(trial_stats.difference(both, lambda r, half=half: reward(r, *half))) if both else None
      row.append(cell(gain, "+.3f") if arm != PLAIN else "")
    if both and arm == "published":
      notes += verdict(f"reward with pruning less that without in the second {regime.half:g} s ({counted(both)})", gain,
                       "above zero", ".3f")
    rows.append(row)
    drawn[arm] = [curve(r, grid) for r in runs]
  notes.append("reward_ipw: survivors count 1 / keep probability times, so that pruning does not flatter it. Differences are of "
               "pairs of a seed and host; means of all runs.")
  if any(drawn.values()):
    axis = figure.subplots()
    for i, (arm, curves) in enumerate(drawn.items()):
      for y in curves:
        axis.plot(grid, y, color=f"C{i}", lw=0.6, alpha=0.25)
      if curves:
        axis.plot(grid, np.mean(curves, axis=0), color=f"C{i}", lw=2.2, label=f"{labels[arm]}, {len(curves)} runs")
    axis.set(xlabel="seconds of steps, compilation and evaluations not counted",
             ylabel="reward of all rollouts started, 5-step mean",
             title=f"Figure 4 ({data}). Thin: each run; thick: their mean")
    axis.legend(fontsize=9)
    axis.spines[["top", "right"]].set_visible(False)
  of = [f"{a:g} to {b:g} s" for a, b in halves]
  columns = ("arm", "runs", "steps", *(f"reward, {x}" for x in of), *(f"above GRPO, {x}" for x in of))
  return made("figure4", "Figure 4: reward against wall clock", scale, columns, rows, notes, labels)


def reward(found: Found, begin: float, end: float) -> float:
  """Mean reward_ipw of the steps that end between these seconds."""
  at = found.column("sec_total", 0)
  return float(np.nanmean(found.column("reward_ipw", 0)[(begin < at) & (at <= end)]))
