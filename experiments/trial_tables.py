"""The paper's tables 1 to 6 and figure 4 from the trial's runs: arms beside each other after as many seconds of steps.

Pairs are those of trial_stats.py, each of one seed and version of the code, and where files name it of one host; of several
regimes with the same arms all of them, each seed once, that of the first regime that has it. ± is 95% of Student's t over pairs;
of one pair there is none. Balance is that of the runs whose files have it. What the regime TABLES misses is told. Left out:
figure 2's heads (figure2.py), what is not the paper's (trial_page.py).
"""

from collections.abc import Iterable
import contextlib
import textwrap

from matplotlib.figure import Figure
import numpy as np

from experiments import tables, trial_files, trial_stats
from experiments.runs import Scale
from experiments.tables import NOT_RUN, Estimate, Table, cell, faster, verdict
from experiments.trial_arms import PLAIN, REGIMES, SKIP, TABLES
from experiments.trial_files import Found
from experiments.trial_plots import curve
from experiments.trial_stats import Refused

HELD_OUT = ("held-out accuracy greedy, on GSM8K of 1,319 test problems, on MATH of 1,190; learning rate 3e-6 unless said")
RULES = {"published": "the paper's rule and head", "budget": "our budget", "budget035": "our budget",
         "keep025": "the paper's rule and head", "keep075": "the paper's rule and head"}  # arms that prune and do nothing else
Pairs = list[tuple[Found, Found]]


# ---- runs


def pairs(names: tuple[str, ...], arm: str, other: str = PLAIN) -> Pairs:
  """Both arms over these regimes; none of a regime whose runs are of several versions (its page says so)."""
  by_seed = {}
  for results in (trial_files.load(REGIMES[name]) for name in names):
    with contextlib.suppress(Refused):
      for pair in trial_stats.pairs(results, arm, other):
        by_seed.setdefault(pair[0].run.seed, pair)
  return [by_seed[seed] for seed in sorted(by_seed)]


def known(scale: Scale, arms: tuple[str, ...]) -> list[tuple[str, str, Pairs]]:
  """(data and rule, arm, its pairs with plain) of each of the scale's data in the trial, where there are any."""
  return [(f"{data}: {RULES[arm]}", arm, both) for data, names in scale.trial for arm in arms if (both := pairs(names, arm))]


def everyone(scale: Scale, arm: str) -> list[Found]:
  """An arm's runs on the scale's first data, each seed's first, whichever code and host."""
  by_seed = {}
  for name in scale.trial[0][1]:
    for seed, found in trial_files.load(REGIMES[name]).there.get(arm, {}).items():
      by_seed.setdefault(seed, found)
  return list(by_seed.values())


# ---- figures


def level(found: Found) -> float | None:
  """Greedy accuracy at the end, in percent."""
  return trial_stats.accuracy(found, "full")


def over(values: Iterable[float | None], few: int = 0) -> Estimate | None:
  """Mean over the pairs or runs that have the value, with each beside it where they are fewer than `few`; None without one."""
  each = tuple(float(x) for x in values if x is not None and np.isfinite(x))
  return Estimate(*trial_stats.interval(each), each if len(each) < few else ()) if each else None


def gain_of(both: Pairs) -> Estimate | None:
  """What the first arm's greedy accuracy has above the second's, in points."""
  return over(trial_stats.difference(both, level), 4)


def times(both: Pairs, key: str = "sec_step") -> Estimate:
  """How many times faster the first arm's mean step (or phase of it) is than the second's."""
  return over(trial_stats.speedup(both, key))


def seconds(both: Pairs, key: str, side: int) -> str:
  return f"{np.mean([pair[side].column(key).mean() for pair in both]):.3g}"


def mean_of(runs: list[Found], key: str, form: str) -> str:
  """Mean over runs of a column's mean; how many have it, where some do not."""
  have = [x for x in (r.column(key) for r in runs) if np.isfinite(x).any()]
  return cell(over(np.nanmean(x) for x in have), form) + (f" ({counted(have, 'run')})" if 0 < len(have) < len(runs) else "")


def reward(found: Found, begin: float, end: float) -> float:
  """Mean reward_ipw of the steps that end between these seconds."""
  at = found.column("sec_total", 0)
  return trial_stats.mean(found.column("reward_ipw", 0)[(begin < at) & (at <= end)])


def counted(some: list, what: str = "pair") -> str:
  return f"one {what}" if len(some) == 1 else f"{len(some)} {what}s"


def above(what: str, both: Pairs, gain: Estimate | None, paper: str, ours: bool) -> list[str]:
  """A verdict on the gain of a rule: the paper's against the paper's figure, ours by itself; of one pair none."""
  if gain is None:
    return []
  if len(both) == 1:
    return [f"One pair, so undecided: {what} {gain.value:+.1f} points; paper {paper}."]
  text = verdict(f"{what}, {counted(both)},", gain, paper, unit=" points")[0]
  if ours:
    text = text.replace("Agrees with the paper in direction", "Above plain").replace("Contradicts the paper", "Below plain")
  return [text]


# ---- tables


def made(name: str, title: str, scale: Scale, columns: tuple[str, ...], rows: list[list[str]], notes: list[str],
         arms: Iterable[str], data: str = "") -> Table:
  """A table of the trial: where its runs are from, what of these arms the tables' regime misses or has otherwise. data: what is
  held out, in place of the scale's."""
  about = (f"Scale: {scale.name}. {scale.model}; {data or scale.data}; runs of the trial, whose page has their code, hosts and "
           f"settings; a run ends after {REGIMES[TABLES].full:g} s of steps, a pair is of one code, seed and, where files name "
           f"it, host. Means leave out the first {SKIP} steps; ± is 95% of Student's t over pairs or runs unless said. The "
           "paper's figures: its models and data.")
  results = trial_files.load(REGIMES[TABLES])
  of = lambda runs: [run for run in runs if run.rpartition("_seed")[0] in arms]
  silent = [found.run.name for arm in arms for found in results.of(arm) if name == "table3" and not found.votes]
  missing = of(results.missing)
  lacks = {"Failed": of(f"{x['arm']}_seed{x['seed']}" for x in results.failed), "Made with other settings": of(results.other),
           "Without votes": silent, "Not run": missing}
  notes = notes + [f"{what} of regime {TABLES}: {', '.join(runs)}." for what, runs in lacks.items() if runs]
  if missing or silent:
    notes[-1] += (f" `python -m experiments.trial --run --scale=gpu --regime={TABLES} --votes --model=DIR/model.gguf --data=DIR` "
                  "does it, by the code of those that are there (experiments/README.md).")
  return Table(name, title, scale, columns, rows, notes, [], about)


def compare(scale: Scale, figure: Figure, name: str, found: dict[str, tuple[str, Pairs]], theirs: tuple, arms: tuple) -> Table:
  """Tables 1 and 2, by row an arm that prunes beside the same without pruning. name: "Table 1, GRPO"; found: arm and pairs by
  label; theirs: the paper's accuracy without and with pruning, and its speed-up."""
  rows, notes, paper = [], [], f"+{theirs[1] - theirs[0]:.2f}"
  gains, ratios = {x: gain_of(both) for x, (_, both) in found.items()}, {x: times(both) for x, (_, both) in found.items()}
  for label, (arm, both) in found.items():
    without, pruned = (over(level(pair[side]) for pair in both) for side in (1, 0))
    rows.append([label, str(len(both)), cell(without), f"{theirs[0]}", cell(pruned), f"{theirs[1]}", cell(gains[label], "+.1f"),
                 paper, cell(ratios[label], ".2f", "x"), f"{theirs[2]:.2f}x"])
    regime = both[0][0].run.regime
    if not (regime.primary and arm == regime.ours[0]):  # some of those pairs were seen before others were planned
      notes += above(f"accuracy with pruning less that without ({label})", both, gains[label], f"{paper} points", arm == "budget")
    if len(both) > 1:
      each = over(trial_stats.speedup(both), len(both) + 1)
      notes += faster(f"speed-up of a step ({label})", each, f"{theirs[2]:.2f}x")
  notes += set_before(scale, arms)
  if found:
    axes = figure.subplots(1, 2)
    tables.bars(axes[0], list(gains), list(gains.values()), f"{name}: gained by pruning", unit="points")
    tables.bars(axes[1], list(ratios), list(ratios.values()), "a step, mean", "C1", "times as fast")
    for axis, still in zip(axes, (0, 1), strict=True):
      axis.axhline(still, color="k", lw=0.8)
  columns = ("data: rule", "pairs", "without", "paper", "with pruning", "paper", "gain", "paper", "speed-up", "paper")
  module = name.partition(",")[0].replace(" ", "").lower()
  return made(module, f"{name}: accuracy (%) and speed-up", scale, columns, rows, notes, arms, HELD_OUT)


def set_before(scale: Scale, arms: tuple) -> list[str]:
  """What was set before its runs of comparisons whose rows are over all pairs."""
  regimes = [(data, REGIMES[name]) for data, names in scale.trial for name in names]
  return [f"Set before it ran ({data}): {line} The row is over all pairs, an estimate." for data, regime in regimes
          if regime.primary and regime.ours[0] in arms and trial_files.load(regime).there
          for line in trial_stats.primaries(regime)]


def table1(scale: Scale, figure: Figure, theirs: tuple[float, float, float]) -> Table:
  found = {label: (arm, both) for label, arm, both in known(scale, ("published", "budget"))}
  return compare(scale, figure, "Table 1, GRPO", found, theirs, (PLAIN, "published", "budget"))


def table2(scale: Scale, figure: Figure, theirs: tuple[float, float, float]) -> Table:
  both = pairs((TABLES,), "dapo_published", "dapo")
  found = {f"{scale.trial[0][0]}: {RULES['published']}": ("published", both)} if both else {}
  table = compare(scale, figure, "Table 2, DAPO", found, theirs, ("dapo", "dapo_published"))
  table.notes.append("Dynamic sampling: a step may take up to 3 rounds of prompts till enough groups are mixed, one after the "
                     "other, and its seconds count them all.")
  return table


def table3(scale: Scale, figure: Figure, rules: tuple[tuple[str, str, str], ...]) -> Table:
  """rules: key in a run's votes, what it is, the paper's accuracy."""
  voted = [found for name in scale.trial[0][1] for runs in trial_files.load(REGIMES[name]).there.values()
           for found in runs.values() if found.votes]
  rows = [[what, *(vote_cell(found.votes, key) for found in voted), paper] for key, what, paper in rules]
  rows.append(["tokens a problem", *(f"{found.votes['tokens']:,.0f}" for found in voted), ""])
  names, notes = [f"{found.run.arm}, seed {found.run.seed}" for found in voted], []
  for name, found in zip(names, voted, strict=True):
    if "rank@16_gain_ci" in found.votes:
      gain, low, high = gained(found.votes, "rank@16")
      notes.append(f"{tables.direction(low, high)}: rank by the head above the majority after {name}, {gain:+.1f} points "
                   f"({low:.1f} to {high:.1f}); paper +6.6 and +10.0 points (AIME'24).")
  if voted:
    draw_votes(figure, {what: key for key, what, _ in rules}, names, voted)
    notes.append("Behind the semicolon: points above the majority of the same samples, in brackets 95% by bootstrap over "
                 "problems, so without the spread of seeds; the problems are the same for all.")
  data = f"GSM8K, {voted[0].votes['problems']} test problems, 16 samples each at temperature 1" if voted else ""
  return made("table3", "Table 3: accuracy of the voted answer (%)", scale, ("vote", *(f"after {x}" for x in names),
              "paper (1.7B, 8B; AIME'24)"), rows, notes, REGIMES[TABLES].votes, data)


def gained(votes: dict, key: str) -> tuple[float, float, float]:
  """Points that a vote has above the majority of the same samples, and the ends of their 95% interval."""
  return 100 * (votes[key] - votes["maj@16"]), *(100 * x for x in votes[f"{key}_gain_ci"])


def vote_cell(votes: dict, key: str) -> str:
  """A vote's accuracy, and what it has above the majority."""
  if key not in votes:
    return NOT_RUN
  half = votes["ci95"] if key == "accuracy" else (votes[f"{key}_ci"][1] - votes[f"{key}_ci"][0]) / 2
  more = "; {:+.1f} ({:.1f} to {:.1f})".format(*gained(votes, key)) if f"{key}_gain_ci" in votes else ""
  return Estimate(100 * votes[key], 100 * half).text() + more


def draw_votes(figure: Figure, rules: dict[str, str], names: list[str], voted: list[Found]) -> None:
  """By rule, what each policy's vote has above its majority."""
  axis = figure.subplots()
  shown = {what: key for what, key in rules.items() if any(f"{key}_gain_ci" in found.votes for found in voted)}
  for i, (name, found) in enumerate(zip(names, voted, strict=True)):
    there = [(x, *gained(found.votes, key)) for x, key in enumerate(shown.values()) if f"{key}_gain_ci" in found.votes]
    x, gain, low, high = np.array(there).reshape(-1, 4).T
    axis.bar(x + 0.8 * ((i + 0.5) / len(names) - 0.5), gain, 0.7 / len(names), yerr=[gain - low, high - gain], capsize=3,
             label=f"after {name}")
  axis.set_xticks(range(len(shown)), [textwrap.fill(what, 16) for what in shown], fontsize=8)
  axis.axhline(0, color="k", lw=0.8)
  axis.set_ylabel("points above the majority, 95% over problems", fontsize=9)
  axis.set_title("Table 3: what weighing 16 samples adds", fontsize=10)
  axis.legend(fontsize=9)
  axis.spines[["top", "right"]].set_visible(False)


def table4(scale: Scale, figure: Figure) -> Table:
  names, labels = scale.trial[0][1], {PLAIN: "no pruning", "random": "random", "published": "ARRoL", "budget": "our budget"}
  paper = {"random": ("", "0.21 or less"), "published": ("nearer 0.5 than random", "0.23 to 0.24")}
  rows, notes, signals = [], [], {}
  for arm, what in labels.items():
    runs, theirs = everyone(scale, arm), paper.get(arm, ("", ""))
    signals[what] = over(map(trial_stats.signal, runs))
    rows.append([what, str(len(runs)), mean_of(runs, "pos_ratio", ".3f"), theirs[0], mean_of(runs, "pos_var", ".3f"), theirs[1],
                 cell(signals[what], ".2f"), mean_of(runs, "keep_ratio", ".3f"), mean_of(runs, "groups_mixed", ".1f"),
                 mean_of(runs, "head_auc_within", ".3f"), cell(over(map(level, runs)))])
  for arm in ("published", "budget"):
    if both := pairs(names, arm, "random"):
      share = over(100 * (trial_stats.signal(a) / trial_stats.signal(b) - 1) for a, b in both)
      notes += [f"Signal a group, {labels[arm]} beside random: {share.text('+.0f', '%')} ({counted(both)}); accuracy "
                f"{cell(gain_of(both), '+.1f')} points."]
  notes.append("Signal: sum over a group's survivors of (r - mean r)², which is K ρ̂ (1 - ρ̂): all files have it, ρ̂ itself those "
               "of later runs alone. Arms have unequal runs, of several commits and hosts.")
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
  draw_speeds(figure, drawn, "Table 5, speed-up by phase, the paper's rule")
  columns = ("phase, mean seconds", "GRPO", "paper", "+ pruning", "paper", "speed-up", "paper")
  return made("table5", "Table 5: seconds a step by phase", scale, columns, rows, notes, (PLAIN, "published"), HELD_OUT)


def table6(scale: Scale, figure: Figure, theirs: dict[float, tuple[float, float]]) -> Table:
  """theirs: by keep ratio the paper's accuracy and speed-up. Each row has a gain over plain of the same seeds."""
  rows, drawn = [], {}
  for label, _, both in known(scale, tuple(RULES)):
    keep, ratio = both[0][0].about["settings"].get("prune.keep", 0.5), times(both)
    paper = theirs.get(keep)
    drawn[f"{keep}, {label}"] = ratio
    rows.append([f"{keep} ({label})", str(len(both)), cell(over(a.column("keep_ratio").mean() for a, _ in both), ".3f"),
                 *(cell(over(level(pair[side]) for pair in both)) for side in (1, 0)), cell(gain_of(both), "+.1f"),
                 f"{paper[0] - theirs[1.0][0]:+.2f}" if paper else "", ratio.text(".2f", "x"), f"{paper[1]}x" if paper else ""])
  draw_speeds(figure, drawn, "Table 6, speed-up of a step by keep ratio and rule")
  columns = ("keep ratio asked", "pairs", "kept", "keeping all, %", "accuracy, %", "gain", "paper", "speed-up", "paper")
  return made("table6", "Table 6: keep ratio", scale, columns, rows, set_before(scale, tuple(RULES)), (PLAIN, *RULES), HELD_OUT)


def draw_speeds(figure: Figure, speeds: dict[str, Estimate], title: str) -> None:
  if speeds:
    axis = figure.subplots()
    tables.bars(axis, list(speeds), list(speeds.values()), title, "C1", "times as fast as without pruning")
    axis.axhline(1, color="k", lw=0.8)


def figure4(scale: Scale, figure: Figure) -> Table:
  """Reward of all rollouts started against seconds of steps, over the scale's first data."""
  data, names = scale.trial[0]
  labels = {PLAIN: "GRPO", "published": "the paper's rule", "random": "random pruning", "budget": "our budget"}
  regime, rows, notes, curves = REGIMES[names[0]], [], [], {}
  grid = np.linspace(0, regime.full, 121)
  halves = [lambda r: reward(r, 0, regime.half), lambda r: reward(r, regime.half, regime.full)]
  for arm, what in labels.items():
    runs, both = everyone(scale, arm), pairs(names, arm) if arm != PLAIN else []
    gains = [over(trial_stats.difference(both, half)) for half in halves]
    rows.append([what, str(len(runs)), cell(over(len(r.lines) for r in runs), ".0f"),
                 *(cell(over(map(half, runs)), ".3f") for half in halves),
                 *("" if arm == PLAIN else cell(gain, "+.3f") for gain in gains)])
    if len(both) > 1 and arm == "published":
      notes += verdict(f"reward with pruning less that without in the second {regime.half:g} s ({counted(both)})", gains[1],
                       "above zero", ".3f")
    curves[labels[arm]] = [curve(r, grid) for r in runs]
  notes.append("reward_ipw: survivors count 1 / keep probability times, so that pruning does not flatter it. Differences are of "
               "pairs; means of all runs, each seed's first.")
  if any(curves.values()):
    draw_rewards(figure, f"Figure 4 ({data}). Thin: each run; thick: their mean", grid, curves)
  of = [f"0 to {regime.half:g} s", f"{regime.half:g} to {regime.full:g} s"]
  columns = ("arm", "runs", "steps", *(f"reward, {x}" for x in of), *(f"above GRPO, {x}" for x in of))
  return made("figure4", "Figure 4: reward against wall clock", scale, columns, rows, notes, labels)


def draw_rewards(figure: Figure, title: str, grid: np.ndarray, curves: dict[str, list[np.ndarray]]) -> None:
  axis = figure.subplots()
  for i, (label, each) in enumerate(curves.items()):
    for y in each:
      axis.plot(grid, y, color=f"C{i}", lw=0.6, alpha=0.25)
    if each:
      axis.plot(grid, np.mean(each, axis=0), color=f"C{i}", lw=2.2, label=f"{label}, {counted(each, 'run')}")
  axis.set(xlabel="seconds of steps, compilation and evaluations not counted",
           ylabel="reward of all rollouts started, 5-step mean", title=title)
  axis.legend(fontsize=9)
  axis.spines[["top", "right"]].set_visible(False)
