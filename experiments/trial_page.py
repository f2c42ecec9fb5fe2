"""The trial's page, from results' files alone: what each arm did, paired differences, votes, what failed, what is missing; plots.

Differences are paired by seed: two runs of one seed see the same prompts in the same order while both have as many a step and
neither chooses among them. Their interval is 95% of Student's t over the pairs, so it holds what differs between seeds and,
problems being shared, not what differs between sets of problems. Budgets are seconds, so a pair needs one device (others are
left out), and a comparison one version of the code (it is refused otherwise). No interval is corrected for how many comparisons
there are. Left out: runs (trial_queue.py), arms and budgets (trial_arms.py).
"""

from collections.abc import Callable, Iterable
import dataclasses
import json

from matplotlib.figure import Figure
import numpy as np
from scipy import stats

from arrol_jax.types import UserError
from experiments.trial_arms import RESULTS, ROOT, SKIP, TUNED, Regime, Run, runs_of, same

OURS, PLAIN = ("budget", "chosen"), "plain"  # which rollouts, and which prompts: the first is compared with all arms
NULLS = ("plain8", "max_variance")  # all arms are compared with the better of them too
AIM = 2.3  # points of accuracy, the paper's


@dataclasses.dataclass(frozen=True)
class Found:
  """A run's results: run.json, a step's line each, and votes.json where it voted."""
  run: Run
  about: dict
  lines: list[dict]
  votes: dict | None = None

  @property
  def version(self) -> tuple[str, str]:
    return self.about["commit"], self.about["code"]

  def column(self, name: str, skip: int = SKIP) -> np.ndarray:
    return np.array([np.nan if x.get(name) is None else x[name] for x in self.lines[skip:] or self.lines[-1:]], float)

  def median(self, name: str) -> float:
    return float(np.nanmedian(self.column(name)))


@dataclasses.dataclass(frozen=True)
class Results:
  """Of a regime: runs by arm and seed; those that failed, were made with other settings than the arm has now, or are missing."""
  regime: Regime
  there: dict[str, dict[int, Found]]
  failed: list[dict]
  other: list[str]
  missing: list[str]

  def of(self, arm: str) -> list[Found]:
    return list(self.there.get(arm, {}).values())


def load(regime: Regime) -> Results:
  out = Results(regime, {}, [], [], [])
  for run in runs_of(regime):
    if (run.folder / "failed.json").exists():
      out.failed.append(_json(run, "failed.json"))
    elif not (run.folder / "run.json").exists():
      out.missing.append(run.name)
    elif (about := _json(run, "run.json"))["settings"] != same(run.settings):
      out.other.append(run.name)
    else:
      lines = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
      votes = _json(run, "votes.json") if (run.folder / "votes.json").exists() else {"problem": "not there"}
      out.there.setdefault(run.arm, {})[run.seed] = Found(run, about, lines, None if "problem" in votes else votes)
  return out


def _json(run: Run, name: str) -> dict:
  try:
    return json.loads((run.folder / name).read_text())
  except ValueError as e:
    raise UserError(f"{run.folder / name}: cannot be read as JSON ({e}); remove the folder and run it again") from e


# ---- statistics


def interval(values: Iterable[float]) -> tuple[float, float]:
  """Mean and half-width of its 95% interval of Student's t; NaN where there are fewer than one, or two."""
  x = np.array(list(values), float)
  half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)) if len(x) > 1 else np.nan
  return float(x.mean()) if len(x) else float("nan"), float(half)


class Refused(Exception):
  """A comparison that its runs do not allow."""


def pairs(results: Results, arm: str, other: str) -> list[tuple[Found, Found]]:
  """Runs of both arms by seed, on one device; Refused where they are of different versions of the code."""
  a, b = results.there.get(arm, {}), results.there.get(other, {})
  both = [(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())]
  versions = {found.version for pair in both for found in pair}
  if len(versions) > 1:
    raise Refused(f"refused: runs of several commits ({', '.join(sorted(f'{x} (code {y})' for x, y in versions))})")
  return [(x, y) for x, y in both if x.about["device"] == y.about["device"]]


def accuracy(found: Found, when: str, sampled: bool = False) -> float | None:
  """Held-out, in percent; when: "half" or "full"."""
  result = found.about.get(when) or {}
  value = (result.get("sampled") or {}).get("accuracy") if sampled else result.get("accuracy")
  return None if value is None else 100 * value


def difference(both: list[tuple[Found, Found]], value: Callable[[Found], float | None]) -> list[float]:
  """The first of each pair less the second, where both have the value."""
  each = [(value(a), value(b)) for a, b in both]
  return [x - y for x, y in each if x is not None and y is not None]


def speedup(both: list[tuple[Found, Found]]) -> list[float]:
  """By pair: median seconds of the second's steps over the first's."""
  return [b.median("sec_step") / a.median("sec_step") for a, b in both]


def clipped(found: Found) -> float:
  """Share of all steps whose gradient was cut down to optim.clip_norm."""
  return float(np.mean(found.column("grad_norm", 0) > found.about["settings"]["optim.clip_norm"]))


def signal_rate(found: Found) -> float:
  """Signal (sum over groups of K rho (1 - rho)) a second of step."""
  groups = found.about["settings"]["rollout.prompts"]
  return float(np.nansum(found.column("signal")) * groups / np.sum(found.column("sec_step")))


def mean(values: Iterable[float]) -> float:
  """Of those that are defined; NaN where none is."""
  x = np.array(list(values), float)
  return float(x[np.isfinite(x)].mean()) if np.isfinite(x).any() else float("nan")


def text(values: Iterable[float], form: str = ".1f") -> str:
  """Mean ± half-width (number of values)."""
  values = list(values)
  if not values:
    return ""
  center, half = interval(values)
  return f"{center:{form}}" + ("" if np.isnan(half) else f" ± {half:{form.replace('+', '')}}") + f" ({len(values)})"


# ---- tables


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
  head = list(head)
  return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows), ""]


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
      of(lambda r: r.median("sec_step")), of(lambda r: 100 * r.column("sec_generate").sum() / r.column("sec_step").sum(), ".0f"),
      average("keep_ratio"), average("signal"), of(signal_rate), average("head_auc_within"),
      of(lambda r: 100 * clipped(r), ".0f"), of(lambda r: r.median("grad_norm")),
      *(text(known(when, sampled)) for when in ("half", "full") for sampled in (False, True)),
      of(lambda r: 100 * r.about["full"]["truncated"], ".1f")])
  return table(["arm", "runs", "steps", "seconds", "a step, s", "generating, %", "kept", "signal a group", "signal a second",
                "AUC within", "steps clipped, %", "gradient's norm", *moments(results.regime),
                f"cut off at {results.regime.full:g} s, %"], rows)


def moments(regime: Regime) -> list[str]:
  """Heads of the columns of accuracy."""
  return [f"{how} at {seconds:g} s" for seconds in (regime.half, regime.full) for how in ("greedy", "4 samples")]


def differences_tables(results: Results) -> list[str]:
  """Each arm less plain, each less the better of NULLS, and the first of OURS less each other."""
  arms, better = list(results.regime.seeds), better_null(results)
  heads = {f"Each arm minus {PLAIN}": [(arm, PLAIN) for arm in arms]}
  if better:
    heads[f"Each arm minus {better}, the better of {' and '.join(NULLS)} at {results.regime.full:g} s"] = [
      (arm, better) for arm in arms]
  heads[f"{OURS[0]} minus each other arm"] = [(OURS[0], arm) for arm in arms if arm not in (PLAIN, better)]
  out = []
  for head, compared in heads.items():
    rows = [row for arm, other in compared if arm != other and (row := difference_row(results, arm, other))]
    out += [f"{head}:", "", *table(["points of accuracy", "pairs", *moments(results.regime), "a step, times faster",
                                    "signal a second, times"], rows)] if rows else []
  return out


def difference_row(results: Results, arm: str, other: str) -> list[str]:
  """[] where there is no pair on one device."""
  try:
    both = pairs(results, arm, other)
  except Refused as e:
    return [f"{arm} - {other}", str(e), *[""] * 6]
  cells = [text(difference(both, lambda r, w=when, s=sampled: accuracy(r, w, s)), "+.1f")
           for when in ("half", "full") for sampled in (False, True)]
  signal = [signal_rate(a) / signal_rate(b) for a, b in both]
  return [f"{arm} - {other}", str(len(both)), *cells, text(speedup(both), ".2f"), text(signal, ".2f")] if both else []


def votes_table(results: Results) -> list[str]:
  """Of the trained policies: the majority's accuracy, and what weighted votes add to it, paired by run."""
  rows = []
  for arm in results.regime.seeds:
    votes = [r.votes for r in results.of(arm) if r.votes]
    if votes:
      n = votes[0]["samples"]
      names = [k for k in votes[0] if k.endswith(f"@{n}") and not k.startswith(("pass", "maj"))]
      of = lambda name, less=0.0, votes=votes: [100 * (v[name] - (v[less] if less else 0.0)) for v in votes]
      more = ", ".join(f"{name.partition('@')[0]} {text(of(name, f'maj@{n}'), '+.1f')}" for name in names)
      rows.append([arm, str(n), text(of("accuracy")), text(of(f"maj@{n}")), more])
  return ["Votes, by rule what it adds to the majority:", "",
          *table(["arm", "samples", "one sample", "majority", "adds"], rows)] if rows else []


# ---- what it says


def verdict(results: Results, arm: str, other: str) -> str:
  """An arm less another at the whole budget, in words."""
  try:
    values = difference(pairs(results, arm, other), lambda r: accuracy(r, "full"))
  except Refused as e:
    return f"- {arm} - {other}: {e}."
  if not values:
    return f"- {arm} - {other}: no pair on one device."
  center, half = interval(values)
  apart = abs(center) > half  # False where there is one pair
  said = "undecided" if not apart else "above 0" if center > 0 else "below 0"
  aim = f"missed by {AIM - center:.1f}" if center < AIM else "reached" if said == "above 0" else "not borne out"
  return (f"- {arm} - {other}, greedy at {results.regime.full:g} s: {text(values, '+.1f')} points, {said}; the aim of +{AIM} is "
          f"{aim}.")


def better_null(results: Results) -> str | None:
  """That of NULLS with the higher accuracy at the whole budget on the seeds that both have: a choice in its favour."""
  both = [arm for arm in NULLS if results.there.get(arm)]
  seeds = set.intersection(*(set(results.there[arm]) for arm in both)) if both else set()
  level = lambda arm: mean(accuracy(results.there[arm][seed], "full") or 0.0 for seed in seeds)
  return max(both, key=level) if seeds else None


def notes(results: Results) -> list[str]:
  runs = [r for arm in results.there for r in results.of(arm)]
  cards = sorted({r.about["device"] for r in runs})
  commits = sorted({r.version[0] for r in runs})
  out = [f"- {len(runs)} runs on {' and '.join(cards)}, commit {', '.join(commits)}."] if runs else []
  out += [verdict(results, arm, other) for arm in OURS if results.of(arm)
          for other in (PLAIN, better_null(results)) if results.of(other)]
  if len(cards) > 1:
    out += ["- Pairs whose runs were on different devices are left out of differences."]
  if runs and results.regime.rates and not TUNED:
    out += [f"- Learning rate {' and '.join(dict.fromkeys(results.regime.rates))} in all arms, as in earlier runs: not tuned."]
  parts = [f"{r.run.name} ({len(r.about['pieces'])})" for r in runs if len(r.about["pieces"]) > 1]
  out += [f"- Made in several pieces, each of which begins with slower steps: {', '.join(parts)}."] if parts else []
  out += [f"- Failed: {x['arm']}_seed{x['seed']} after {x['steps']} steps, commit {x['commit']}: {x['problem']}"
          for x in results.failed]
  out += [f"- Left out, made with other settings than the arm has now: {', '.join(results.other)}."] if results.other else []
  out += [f"- Not run ({len(results.missing)}): {', '.join(results.missing)}."] if results.missing else []
  return out


def page(regimes: list[Regime]) -> str:
  """Markdown of all regimes; writes their plots."""
  out = ["# The trial: accuracy after as many seconds of steps", "",
         "Accuracy in percent, ± 95% of Student's t over seeds (number of runs or pairs; one has no interval). Seconds are those "
         f"of steps, without compilation and evaluations. Means and medians of steps leave out the first {SKIP}. Made by "
         "`python -m experiments.trial --table`.", ""]
  for regime in regimes:
    results = load(regime)
    out += [f"## {regime.name}: {regime.what}", "", *notes(results), ""]
    if results.there:
      out += [*arms_table(results), *differences_tables(results), *votes_table(results)]
      name = f"{regime.name}.png"
      plot(results).savefig(ROOT / RESULTS / name, dpi=110)
      out += [f"![Reward and held-out accuracy against seconds of steps]({name})", "",
              *(f"- `{arm}`: {regime.arms[arm].what}" for arm in regime.seeds if results.of(arm)), ""]
  return "\n".join(out)


# ---- plot


def curve(found: Found, grid: np.ndarray, window: int = 5) -> np.ndarray:
  """Trailing mean of reward_ipw over `window` steps at the seconds of `grid`; NaN before the first and after the last step."""
  reward, seconds = found.column("reward_ipw", 0), found.column("sec_total", 0)
  smooth = [mean(reward[max(0, i - window + 1):i + 1]) for i in range(len(reward))]
  return np.interp(grid, seconds, smooth, left=np.nan, right=np.nan)


def plot(results: Results) -> Figure:
  figure = Figure(figsize=(12, 5), layout="constrained")
  rewards, held_out = figure.subplots(1, 2)
  grid = np.linspace(0, results.regime.full, 121)
  for i, arm in enumerate(arm for arm in results.regime.seeds if results.of(arm)):
    look = {"color": f"C{i % 10}", "ls": "-" if i < 10 else "--"}
    curves = [curve(r, grid) for r in results.of(arm)]
    points = [[accuracy(r, when) for when in ("half", "full")] for r in results.of(arm)]
    points = np.array([[np.nan if x is None else x for x in row] for row in points])
    budgets = [results.regime.half, results.regime.full]
    for axis, x, lines in ((rewards, grid, curves), (held_out, budgets, points)):
      for y in lines:
        axis.plot(x, y, lw=0.7, alpha=0.5, marker="." if axis is held_out else None, **look)
      whole = np.isfinite(lines).all(axis=0)  # where all runs of the arm have a value
      axis.plot(x, np.where(whole, np.nansum(lines, axis=0) / len(lines), np.nan), lw=2.5, label=arm, **look)
  rewards.set_xlim(0, results.regime.full)
  rewards.set(title="Reward of all rollouts started, mean of five steps", ylabel="reward (reward_ipw)")
  held_out.set(title="Held-out accuracy, greedy", ylabel="accuracy, %", xticks=[results.regime.half, results.regime.full])
  for axis in (rewards, held_out):
    axis.set_xlabel("seconds of steps, compilation and evaluations not counted")
    axis.spines[["top", "right"]].set_visible(False)
  figure.legend(*rewards.get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9, frameon=False)
  return figure
