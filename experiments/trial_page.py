"""The trial's page, from results' files alone: what each arm did, paired differences, what it would take to change them, votes,
what failed, what is missing; plots (trial_plots.py).

No interval is corrected for how many comparisons there are; the page counts them. Left out: runs (trial_queue.py), arms and
budgets (trial_arms.py), statistics (trial_stats.py), what becomes of differences (trial_fading.py).
"""

from collections.abc import Callable

import numpy as np
from scipy import stats

from experiments import trial_plots
from experiments.trial_arms import PLAIN, RESULTS, ROOT, SKIP, Regime, Run
from experiments.trial_fading import fading
from experiments.trial_files import Results, load
from experiments.trial_stats import (
  Refused,
  accuracy,
  accuracy_pairs,
  allowed_pairs,
  best_half,
  clipped,
  decided,
  difference,
  effects,
  groups,
  interval,
  learned_share,
  mean,
  needs,
  pairs,
  primaries,
  problem_noise,
  sampling_noise,
  signal,
  signal_rate,
  slope,
  speedup,
  table,
  text,
  together,
  unpaired,
)

AIM, FASTER = 2.3, 1.6  # points of accuracy, the paper's; times as fast a step
FEW = 6  # pairs


# ---- tables


def arms_table(results: Results) -> list[str]:
  """What each arm did, means over its runs with intervals over seeds."""
  rows = []
  for arm in results.regime.seeds:
    runs = results.of(arm)
    if not runs:
      continue
    known = lambda when, sampled=False, runs=runs: [x for x in (accuracy(r, when, sampled) for r in runs) if x is not None]
    of = lambda value, form=".2f", runs=runs: f"{mean(value(r) for r in runs):{form}}"
    average = lambda name, of=of: of(lambda r: mean(r.column(name)))
    name = arm if len({x.version for x in runs}) == 1 else f"{arm} (of several commits)"
    rows.append([
      name, str(len(runs)), of(lambda r: r.about["steps"], ".0f"), of(lambda r: r.about["seconds"], ".1f"),
      of(lambda r: r.column("sec_step").mean()),
      of(lambda r: 100 * r.column("sec_generate").sum() / r.column("sec_step").sum(), ".0f"),
      average("keep_ratio"), average("signal"), of(signal_rate), average("head_auc_within"),
      of(lambda r: 100 * clipped(r), ".0f"), of(lambda r: r.median("grad_norm")),
      *(text(known(when, sampled)) for when in ("half", "full") for sampled in (False, True)),
      of(lambda r: 100 * r.about["full"]["truncated"], ".1f")])
  return table(["arm", "runs", "steps", "seconds", "mean step, s", "generating, %", "kept", "signal a group", "signal a second",
                "AUC within", "steps clipped, %", "gradient's norm", *moments(results.regime),
                f"cut off at {results.regime.full:g} s, %"], rows)


def steps_table(results: Results) -> list[str]:
  """What a step of each arm takes and is of: means over steps, then over runs; "nan" for what its files do not have."""
  rows = []
  for arm, runs in ((arm, results.of(arm)) for arm in results.regime.seeds if results.of(arm)):
    each = lambda name, runs=runs: [mean(r.column(name)) for r in runs]
    mixed = [(mean(r.column("groups_mixed")), groups(r), mean(r.column("sec_step"))) for r in runs]
    rows.append([
      arm, *(f"{mean(each(f'sec_{name}')):.2f}" for name in ("generate", "reward", "batch", "update", "step")),
      *(f"{mean(each(f'tokens_{name}')) / 1000:.0f}" for name in ("generated", "trained")), f"{mean(each('rows_trained')):.0f}",
      f"{mean(100 * n / prompts for n, prompts, _ in mixed):.0f}", f"{mean(n / seconds for n, _, seconds in mixed):.1f}",
      f"{mean(each('reward')):.2f}", f"{mean(each('entropy')):.2f}", f"{mean(each('baseline_shift')):.3f}"])
  return ["What a step takes and is of:", "", *table([
    "arm", "generating, s", "grading, s", "batching, s", "updating, s", "all, s", "thousand tokens generated", "and trained",
    "rows trained", "groups mixed, %", "mixed groups a second", "reward", "entropy", "shift of the baseline"], rows)]


def moments(regime: Regime) -> list[str]:
  """Heads of the columns of accuracy."""
  return [f"{how} at {seconds:g} s" for seconds in (regime.half, regime.full) for how in ("greedy", "4 samples")]


def compared(results: Results) -> dict[str, list[tuple[str, str]]]:
  """By heading, arms less another: each less plain, each less the better of the nulls, and the first of ours less each other."""
  arms, better, first = list(results.regime.seeds), better_null(results), results.regime.ours[0]
  out = {f"Each arm minus {PLAIN}": [(arm, PLAIN) for arm in arms]}
  if better:
    out[f"Each arm minus {better} ({why(results)})"] = [(arm, better) for arm in arms]
  out[f"{first} minus each other arm"] = [(first, arm) for arm in arms if arm not in (PLAIN, better)]
  return {head: [(a, b) for a, b in x if a != b] for head, x in out.items()}


def differences_tables(results: Results) -> list[str]:
  out = []
  for head, arms in compared(results).items():
    rows = [row for arm, other in arms if (row := difference_row(results, arm, other))]
    out += [f"{head}:", "", *table(["points of accuracy", "pairs", *moments(results.regime), "a step, times faster",
                                    "signal a second, times"], rows)] if rows else []
  return out


def effects_table(results: Results) -> list[str]:
  """What either of two changes does to accuracy on the average over without and with the other, and whether they add up."""
  cells = [effects(results, lambda r, w=when, s=sampled: accuracy(r, w, s)) for when in ("half", "full")
           for sampled in (False, True)]
  one = lambda values, alone: text(values, "+.1f") + ("" if np.isnan(alone) else f", unpaired ± {alone:.1f}")
  rows = [[name, *(one(*cell[name]) if name in cell else "" for cell in cells)] for name in cells[0]]
  return ["Either change, on the average over without and with the other, and whether they add up (of differences above, not "
          "counted again; unpaired: as if seeds tied none to another):", "",
          *table(["points of accuracy", *moments(results.regime)], rows)] if rows else []


def difference_row(results: Results, arm: str, other: str) -> list[str]:
  """[] where there is no pair on one device."""
  try:
    both = pairs(results, arm, other)
  except Refused as e:
    return [f"{arm} - {other}", str(e), *[""] * 6]
  cells = [text(difference(both, lambda r, w=when, s=sampled: accuracy(r, w, s)), "+.1f")
           for when in ("half", "full") for sampled in (False, True)]
  signals = text([signal_rate(a) / signal_rate(b) for a, b in both], ".2f")
  signals += " of all that finished" if any(learned_share(r) < 1 for pair in both for r in pair) else ""
  return [f"{arm} - {other}", str(len(both)), *cells, text(speedup(both), ".2f"), signals] if both else []


def votes_table(results: Results) -> list[str]:
  """Of the trained policies: the majority's accuracy, and what weighted votes add to it, paired by run; of one run with its own
  interval over problems."""
  rows = []
  for arm in results.regime.seeds:
    there = [r.votes for r in results.of(arm) if r.votes]
    for n in sorted({v["samples"] for v in there}):
      votes = [v for v in there if v["samples"] == n]
      names = [k for k in votes[0] if k.endswith(f"@{n}") and not k.startswith(("pass", "maj")) and all(k in v for v in votes)]
      of = lambda name, less=0.0, votes=votes: [100 * (v[name] - (v[less] if less else 0.0)) for v in votes]
      alone = lambda name, votes=votes: "" if len(votes) > 1 or f"{name}_gain_ci" not in votes[0] else \
        " ({:.1f} to {:.1f})".format(*(100 * x for x in votes[0][f"{name}_gain_ci"]))
      gain = lambda name, of=of, n=n: text(of(name, f"maj@{n}"), "+.1f").removesuffix(" (1)")
      more = ", ".join(f"{name.partition('@')[0]} {gain(name)}{alone(name)}" for name in names)
      rows.append([arm, str(n), text(of("accuracy")), text(of(f"maj@{n}")), more])
  return ["Votes, by rule what it adds to the majority (of one run in brackets 95% over problems):", "",
          *table(["arm", "samples", "one sample", "majority", "adds"], rows)] if rows else []


# ---- what it says


def verdict(results: Results, arm: str, other: str) -> str:
  """An arm less another at the whole budget, in words."""
  regime = results.regime
  try:
    both = pairs(results, arm, other)
  except Refused as e:
    return f"- {arm} - {other}: {e}."
  values = difference(both, lambda r: accuracy(r, "full"))
  if not values:
    return f"- {arm} - {other}: no pair of one seed on one device."
  center, half = interval(values)
  far = f"the mean is {abs(AIM - center):.1f} {'below' if center < AIM else 'above'} the aim of +{AIM}, which "
  far += ("one pair cannot tell" if np.isnan(half) else "the interval excludes" if center + half < AIM else
          "the interval lies above" if center - half > AIM else "the interval holds")
  seeds = {a.run.seed for a, _ in both}
  if not (regime.primary and (arm, other) == (regime.ours[0], PLAIN)):
    said = decided(both)
  elif any(first <= min(seeds) and max(seeds) <= last for first, last in regime.primary):
    said = "as above"  # of one set alone
  else:
    said = "an estimate over all pairs, of which some were seen before others were planned: the verdict is above"
  welch = f" (unpaired, by Welch, ± {unpaired(both, 'full'):.1f})" if len(values) > 1 else ""
  return f"- {arm} - {other}, greedy at {regime.full:g} s: {text(values, '+.1f')} points, {said}{welch}; {far}."


def rates(regime: Regime) -> str:
  """The learning rates, and where they are from."""
  if not regime.tuned:
    return f"- Learning rate {' and '.join(dict.fromkeys(regime.rates))} in all arms, as in earlier runs: not tuned."
  ours = ", ".join(arm for arm in regime.seeds if regime.arms[arm].ours)
  tuned = regime.tuned
  lowest, highest = min(tuned.rates, key=float), max(tuned.rates, key=float)
  edges = {lowest: f" None below {lowest} was tried.", highest: f" None above {highest} was tried."}
  beyond = "".join(edges.get(rate, "") for rate in dict.fromkeys(regime.rates))
  return (f"- Learning rate {regime.rates[0]}, of {ours} {regime.rates[1]}: scored highest of {', '.join(tuned.rates)} for "
          f"{tuned.on[0]} and for {tuned.on[1]} (regime `{tuned.name}`: one seed that only such runs have, training problems "
          f"that were held out).{beyond} No other arm was tuned.")


def better_null(results: Results) -> str | None:
  """That of the nulls with the higher accuracy at the whole budget on the seeds that both have, among those with two runs or
  more, where there is one."""
  there = [arm for arm in results.regime.nulls if results.there.get(arm)]
  both = [arm for arm in there if len(results.there[arm]) > 1] or there
  seeds = set.intersection(*(set(results.there[arm]) for arm in both)) if both else set()
  level = lambda arm: mean(accuracy(results.there[arm][seed], "full") or 0.0 for seed in seeds)
  return max(both, key=level) if seeds else None


def why(results: Results) -> str:
  """How better_null came about."""
  nulls = results.regime.nulls
  if len(nulls) == 1:
    return "the regime's only null"
  counts = {arm: len(results.of(arm)) for arm in nulls}
  if sum(n > 1 for n in counts.values()) == 1 and min(counts.values()) < 2:
    return f"of {' and '.join(nulls)} the only one with two runs or more"
  return f"the better of {' and '.join(nulls)} at {results.regime.full:g} s, chosen on these very results, which favours it"


def changes_table(results: Results) -> list[str]:
  """What of arms with two pairs or more would have to change by how much, for plain's signal a second and for a step FASTER times
  as fast as plain's."""
  rows = []
  for arm in results.regime.seeds:
    both = allowed_pairs(results, arm, PLAIN)
    if len(both) > 1 and all(learned_share(a) == 1 for a, _ in both):
      x, prompts = needs(both), groups(both[0][1])
      rows.append([arm, f"{x.ratio:.2f}", f"{x.signal[0] / prompts:.2f}", f"{x.seconds[0]:.2f}",
                   f"{x.signal_needed / prompts:.2f} ({x.signal_needed / x.signal[0]:.2f} times)",
                   f"{x.seconds_needed:.2f} ({x.seconds_needed / x.seconds[0]:.2f} times)", f"{x.lossless:.2f}",
                   f"{x.generating[0]:.2f} ({x.generating[0] / x.generating[1]:.2f} times {PLAIN}'s)",
                   f"{max(x.generating_needed(FASTER), 0):.2f}"])
  return [f"What would have to change, means over pairs with {PLAIN} (a group: of {PLAIN}'s number of groups):", "", *table([
    "arm", f"signal a second, times {PLAIN}'s", "signal a group", "mean step, s", "for 1 time: signal a group", "or a step of, s",
    f"if all of {PLAIN}'s signal were kept, times", "generating, s", f"generating for a step {FASTER:g} times faster, s"],
    rows)] if rows else []


def halves(results: Results) -> list[str]:
  """What the best half of each group would keep, and the signal that arms learn from where that half is all they learn from."""
  runs = results.of(PLAIN)
  if not runs or "groups_mixed" not in runs[0].lines[0]:
    return []
  low, high = (mean(best_half(r)[i] for r in runs) for i in (0, 1))
  all_of_it = mean(signal(r) for r in runs)
  out = [f"- Ceiling of halves: of {PLAIN}'s {all_of_it:.2f} a group the half whose rewards vary most, known only when all have "
         f"finished, keeps {low:.2f} to {high:.2f} ({low / all_of_it:.0%} to {high / all_of_it:.0%}; files have sums over "
         "groups). Halves of the batch may keep more, and never more than all."]
  for arm in results.there:
    both = [(a, b) for a, b in allowed_pairs(results, arm, PLAIN) if learned_share(a) == 0.5]
    if both:
      low, high = (mean(best_half(a)[i] * groups(a) / a.column("sec_step").mean() / signal_rate(b) for a, b in both)
                   for i in (0, 1))
      out.append(f"- {arm} learns from that half only: of what it learns from, signal a second is {low:.2f} to {high:.2f} times "
                 f"{PLAIN}'s ({mean(signal_rate(a) / signal_rate(b) for a, b in both):.2f} in the tables: of all that finished).")
  return out


def reach(results: Results) -> list[str]:
  """How much signal a second AIM would take, if accuracy went on as it goes with it."""
  points = slope(results, PLAIN)
  if not points > 0:
    return []
  return [f"- Accuracy against signal a second, a line through {PLAIN} over the pairs of arms that learn from all that finished: "
          f"{points / 10:+.1f} points for a tenth of {PLAIN}'s more. Along it {AIM:+} points lie at {1 + AIM / points:.2f} times "
          f"{PLAIN}'s. Arms differ in more than their signal, pairs of a seed share their {PLAIN} run, and the line leads beyond "
          "where there are points: a rough guide."]


def distinct(results: Results) -> list[tuple[str, str]]:
  """The comparisons of arms that the tables show, each once."""
  return list({frozenset(x): x for arms in compared(results).values() for x in arms}.values())


def multiplicity(results: Results) -> list[str]:
  """How many comparisons of accuracy the tables show, and what is left of them when all count at once (Bonferroni)."""
  values = [difference(allowed_pairs(results, *x), lambda r, w=when, s=sampled: accuracy(r, w, s)) for x in distinct(results)
            for when in ("half", "full") for sampled in (False, True)]
  tested = [x for x in values if len(x) > 1]
  apart = lambda level: sum(bool(abs(np.mean(x)) > stats.sem(x) * stats.t.ppf(1 - level / 2, len(x) - 1)) for x in tested)
  count = sum(bool(x) for x in values)
  return [f"- The tables show {count} different differences of accuracy, {len(tested)} with an interval. At 95% each, "
          f"{apart(0.05)} of these are apart from 0 (by chance alone one in 20 is); at 95% for all of them together (Bonferroni) "
          f"{apart(0.05 / len(tested))}."] if tested else []


def narrow(results: Results) -> list[str]:
  """Differences whose pairs, few of them, agree better than answers to so many problems may: not to be relied on. Of more the
  seeds' own spread is known well enough, and what answers make alone is not (`problem_noise` is too large)."""
  found = []
  for a, b in distinct(results):
    both = allowed_pairs(results, a, b)
    if len(both) > FEW:
      continue
    for when, seconds in (("half", results.regime.half), ("full", results.regime.full)):
      (center, half), alone = interval(difference(both, lambda r, w=when: accuracy(r, w))), problem_noise(both, when)
      if half < alone:
        found.append(f"{a} - {b} at {seconds:g} s, {center:+.1f} ± {half:.1f} by seeds, ± {alone:.1f} by answers")
      (center, half), alone = interval(difference(both, lambda r, w=when: accuracy(r, w, True))), sampling_noise(both, when)
      if half < alone:
        found.append(f"{a} - {b} at {seconds:g} s with 4 samples, {center:+.1f} ± {half:.1f} by seeds, ± {alone:.1f} by draws")
  return [f"- Of {FEW} pairs or fewer, narrower by seeds than chance allows, so not to be relied on: greedy, if each run "
          "answered each held-out problem by itself; with 4 samples, by their draws alone (what another set of problems would "
          f"change is in none): {'; '.join(found)}."] if found else []


def notes(results: Results) -> list[str]:
  runs = [r for arm in results.there for r in results.of(arm)]
  cards = sorted({r.about["device"] for r in runs})
  commits = sorted({r.version[0] for r in runs})
  out = [f"- {len(runs)} runs on {' and '.join(cards)}, commit {', '.join(commits)}."] if runs else []
  out += [f"- **Set before it ran**: {line}" for line in primaries(results.regime)]
  out += [verdict(results, arm, other) for arm in results.regime.ours if results.of(arm)
          for other in (PLAIN, better_null(results)) if results.of(other)]
  out += [*halves(results), *reach(results), *multiplicity(results), *narrow(results)]
  single = [arm for arm in results.there if len(results.of(arm)) == 1]
  out += [f"- One seed only, so without an interval and undecided whatever they show: {', '.join(single)}."] if single else []
  if runs and not together(runs):
    out += ["- Pairs whose runs were on different devices or hosts are left out of differences; all runs are in their arm's "
            "means."]
  if runs and results.regime.rates:
    out += [rates(results.regime)]
  parts = [f"{r.run.name} ({len(r.about['pieces'])})" for r in runs if len(r.about["pieces"]) > 1]
  out += [f"- Made in several pieces, each of which begins with slower steps: {', '.join(parts)}."] if parts else []
  moved = [r.run.name for r in runs if "+" in r.about.get("host", "")]
  out += [f"- Begun on one host and ended on another, so in no pair: {', '.join(moved)}."] if moved else []
  out += [f"- Failed: {x['arm']}_seed{x['seed']} after {x['steps']} steps, commit {x['commit']}: {x['problem']}"
          for x in results.failed]
  waits = results.regime.waits
  left_out = ", ".join(results.other)
  if waits:
    out += [f"- Its learning rates are chosen by `{waits}`, of whose runs not all are there and alike: nothing of it is shown "
            "before."]
  elif left_out:
    out += [f"- Left out, made with other settings than the arm has now: {left_out}."]
  out += [f"- Not run ({len(results.missing)}): {', '.join(results.missing)}."] if results.missing else []
  return out


def page(regimes: list[Regime], wanted: Callable[[Run], bool] | None = None) -> str:
  """Markdown of all regimes; writes their plots. Of the runs that are wanted alone, where that is said: without plots."""
  out = ["# The trial: accuracy after as many seconds of steps", "",
         "Accuracy in percent, ± 95% of Student's t over seeds, on the same held-out problems (number of runs or pairs; one has "
         "no interval). Seconds are those "
         f"of steps, without compilation and evaluations. Means and medians of steps leave out the first {SKIP}. Made by "
         "`python -m experiments.trial --table`.", ""]
  known = [load(regime, wanted) for regime in regimes]
  for results in known:
    regime = results.regime
    out += [f"## {regime.name}: {regime.what}", "", *notes(results), ""]
    if results.there:
      for part in (arms_table, steps_table, differences_tables, effects_table, changes_table, votes_table):
        out += part(results)
      plots = {"": ("Reward against seconds of steps, and held-out accuracy", trial_plots.course)}
      if accuracy_pairs(results, PLAIN):
        plots["_signal"] = "Accuracy against signal a second", lambda x: trial_plots.against_signal(x, PLAIN)
      for name, (what, draw) in ({} if wanted else plots).items():
        draw(results).savefig(ROOT / RESULTS / f"{regime.name}{name}.png", dpi=110)
        out += [f"![{what}]({regime.name}{name}.png)", ""]
      out += [*(f"- `{arm}`: {regime.arms[arm].what}" for arm in regime.seeds if results.of(arm)), ""]
  return "\n".join(out + fading(known))
