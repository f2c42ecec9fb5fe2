"""What runs of the trial say, from results' files alone: pairs, intervals, signal a second and what it would take to change it.

Differences are paired by seed: two runs of one seed see the same prompts in the same order while both have as many a step and
neither chooses among them. Their interval is 95% of Student's t over the pairs, so it holds what differs between seeds and,
problems being shared, not what differs between sets of problems. Budgets are seconds, so a pair needs one device and one host
where files name it (others are left out), and a comparison one version of the code (it is refused otherwise). Left out: words
and tables (trial_page.py), plots (trial_plots.py), how files are read (trial_files.py).
"""

from collections.abc import Callable, Iterable
import dataclasses

import numpy as np
from scipy import stats

from experiments.trial_arms import MODEL, PLAIN, Regime
from experiments.trial_files import Found, Results, load


def interval(values: Iterable[float]) -> tuple[float, float]:
  """Mean and half-width of its 95% interval of Student's t; NaN where there are fewer than one, or two."""
  x = np.array(list(values), float)
  half = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)) if len(x) > 1 else np.nan
  return float(x.mean()) if len(x) else float("nan"), float(half)


class Refused(Exception):
  """A comparison that its runs do not allow."""


def pairs(results: Results, arm: str, other: str) -> list[tuple[Found, Found]]:
  """Runs of both arms by seed, on one device of one host; Refused where they are of different versions of the code, or, of those
  that say so, of different models or data."""
  a, b = results.there.get(arm, {}), results.there.get(other, {})
  both = [(a[seed], b[seed]) for seed in sorted(a.keys() & b.keys())]
  versions = {found.version for pair in both for found in pair}
  if len(versions) > 1:
    raise Refused(f"refused: runs of several commits ({', '.join(sorted(f'{x} (code {y})' for x, y in versions))})")
  inputs = [found.about.get("inputs", {}) for pair in both for found in pair]
  models = {x.get("model.path", MODEL) for x in inputs}  # runs before November 29 do not say it, and had this one
  data = {tuple(sorted(item for item in x.items() if item[0] != "model.path")) for x in inputs if x}
  if len(models) > 1 or len(data) > 1:
    raise Refused("refused: runs of several models or data files (inputs in run.json)")
  return [pair for pair in both if together(pair)]


def allowed_pairs(results: Results, arm: str, other: str) -> list[tuple[Found, Found]]:
  """`pairs`; none where they are refused, or of an arm beside itself."""
  try:
    return pairs(results, arm, other) if arm != other else []
  except Refused:
    return []


def together(runs: Iterable[Found]) -> bool:
  """Whether all were on one kind of device, and of those that say so on one host: equal seconds are not equal work elsewhere."""
  runs = list(runs)
  hosts = {r.about["host"] for r in runs if r.about.get("host")}
  return len({r.about["device"] for r in runs}) == 1 and len(hosts) < 2 and not any("+" in host for host in hosts)


def accuracy(found: Found, when: str, sampled: bool = False) -> float | None:
  """Held-out, in percent; when: "half" or "full"."""
  result = found.about.get(when) or {}
  value = (result.get("sampled") or {}).get("accuracy") if sampled else result.get("accuracy")
  return None if value is None else 100 * value


def difference(both: list[tuple[Found, Found]], value: Callable[[Found], float | None]) -> list[float]:
  """The first of each pair less the second, where both have the value."""
  each = [(value(a), value(b)) for a, b in both]
  return [x - y for x, y in each if x is not None and y is not None]


def square_of(results: Results, value: Callable[[Found], float | None]) -> np.ndarray:
  """`value` of the regime's square of arms, a row for each seed that has all four on one device and of one version."""
  arms = [results.there.get(arm, {}) for arm in results.regime.square]
  rows = []
  for seed in sorted(set.intersection(*map(set, arms))) if arms else []:
    runs = [arm[seed] for arm in arms]
    values = [value(r) for r in runs]
    if len({r.version for r in runs}) == 1 and together(runs) and None not in values:
      rows.append(values)
  return np.array(rows, float).reshape(-1, 4)


def effects(results: Results, value: Callable[[Found], float | None]) -> dict[str, tuple[list[float], float]]:
  """Of the regime's square: what the first change does to `value`, averaged over without and with the second; the same of the
  second; what both do beyond the sum of each alone. By seed, and the half-width of the 95% interval of their mean as if seeds
  tied no run to another (NaN for one seed). {} where no seed has all four arms."""
  levels = square_of(results, value)
  if not len(levels):
    return {}
  neither, first, second, both = results.regime.square
  names = (f"{first} - {neither} and {both} - {second}, their mean", f"{second} - {neither} and {both} - {first}, their mean",
           f"{both} - {first} less {second} - {neither}")
  weights = np.array([[-1, 1, -1, 1], [-1, -1, 1, 1], [2, -2, -2, 2]]) / 2
  count = len(levels)
  variance = levels.var(axis=0, ddof=1).mean() / count if count > 1 else np.nan
  alone = stats.t.ppf(0.975, 4 * (count - 1)) * np.sqrt(variance * (weights ** 2).sum(axis=1))
  return {name: ((levels @ w).tolist(), float(half)) for name, w, half in zip(names, weights, alone, strict=True)}


def unpaired(both: list[tuple[Found, Found]], when: str) -> float:
  """Half-width of Welch's 95% interval of `difference` of greedy accuracies, as if seeds tied no run to another: arms that choose
  their own prompts share little but the seed's number. NaN where there is one pair."""
  known = [x for x in ([accuracy(r, when) for r in pair] for pair in both) if None not in x]
  if len(known) < 2:
    return float("nan")
  variances, n = np.var(known, axis=0, ddof=1) / len(known), len(known) - 1  # of the two means
  freedom = variances.sum() ** 2 / (variances ** 2 / n).sum() if variances.any() else n
  return float(stats.t.ppf(0.975, freedom) * np.sqrt(variances.sum()))


def decided(both: list[tuple[Found, Found]]) -> str:
  """What pairs say of the difference in greedy accuracy at the whole budget: "above 0", "below 0" or "undecided", by 95% of
  Student's t, and whether they agree better than answers to so many problems may."""
  center, half = interval(difference(both, lambda r: accuracy(r, "full")))
  if not abs(center) > half:  # also of one pair, whose half is NaN
    return "undecided"
  alone = problem_noise(both, "full")
  luck = f" by seeds that agree better than answers allow (± {alone:.1f})" if abs(center) < alone else ""
  return ("above 0" if center > 0 else "below 0") + luck


def primaries(regime: Regime) -> list[str]:
  """Each comparison that was set before its runs, the first of the regime's own arms less plain: on its seeds alone, and how it
  is decided once all of their pairs are there."""
  arm, out = regime.ours[0], []
  for first, last in regime.primary:
    head = f"{arm} - {PLAIN}, greedy at {regime.full:g} s, on seeds {first} to {last} alone: "
    wanted, said = last - first + 1, []
    try:
      both = pairs(load(regime, lambda run, seeds=range(first, last + 1): run.seed in seeds), arm, PLAIN)
    except Refused as e:
      out.append(f"{head}{e}.")
      continue
    if both:
      greedy, sampled = (difference(both, lambda r, s=sampled: accuracy(r, "full", s)) for sampled in (False, True))
      said = [f"{text(greedy, '+.1f')} points, with 4 samples {text(sampled, '+.1f')}, a step {text(speedup(both), '.2f')} times "
              "as fast"]
    said += [decided(both) if len(both) == wanted else f"{len(both)} of {wanted} pairs are there, so no verdict"]
    out.append(f"{head}{'; '.join(said)}.")
  return out


def _chance(variances: list[float]) -> float:
  """Half-width of the 95% interval of a mean of differences of these variances, in points."""
  return 196 * float(np.sqrt(np.mean(variances) / len(variances))) if variances else float("nan")


def problem_noise(both: list[tuple[Found, Found]], when: str) -> float:
  """Half-width of the 95% interval that chance may give the mean difference of greedy accuracies, in points, if each run answered
  each held-out problem by itself: p (1 - p) / n a run. Answers to one problem are alike from run to run, which makes it too large
  (on MATH by a quarter); what another set of problems would change, in all runs alike, is not in it.
  """
  known = [pair for pair in both if all(accuracy(r, when) is not None for r in pair)]
  rates = [[(accuracy(r, when) / 100, r.about[when]["problems"]) for r in pair] for pair in known]
  variances = [sum(p * (1 - p) / n for p, n in pair) for pair in rates]
  return _chance(variances)


def sampling_noise(both: list[tuple[Found, Found]], when: str) -> float:
  """Half-width of the 95% interval that the draws alone of the few samples a problem may give the mean difference of their
  accuracies, in points, whatever else varies: a problem's p (1 - p) / samples, whose mean is pass@2 less accuracy."""
  known = [[r.about[when]["sampled"] for r in pair] for pair in both if all(accuracy(r, when, True) is not None for r in pair)]
  known = [pair for pair in known if all("pass@2" in x for x in pair)]
  variances = [sum((x["pass@2"] - x["accuracy"]) / x["samples"] / x["problems"] for x in pair) for pair in known]
  return _chance(variances)


def speedup(both: list[tuple[Found, Found]], key: str = "sec_step") -> list[float]:
  """By pair: mean seconds of the second's steps (or a phase of them) over the first's, as equal seconds count them. (Medians,
  without a tail's long steps, scatter more from run to run.)"""
  return [b.column(key).mean() / a.column(key).mean() for a, b in both]


def clipped(found: Found) -> float:
  """Share of all steps whose gradient was cut down to optim.clip_norm."""
  return float(np.mean(found.column("grad_norm", 0) > found.about["settings"]["optim.clip_norm"]))


def groups(found: Found) -> float:
  """Groups that a step starts: its prompts, and with dynamic sampling, in the mean, those that replaced some."""
  given = found.about["settings"]
  if given.get("rollout.resampling", 1) == 1:
    return given["rollout.prompts"]
  sums = found.column("signal_per_1k_tokens") * found.column("tokens_generated") / 1000  # over all groups
  return float(np.nansum(sums) / np.nansum(found.column("signal")))


def learned_share(found: Found) -> float:
  """Of the rollouts that finish, by groups: below 1 where the half whose rewards vary most is learned from (PODS)."""
  given = found.about["settings"]
  return given.get("prune.keep", 0.5) if given.get("prune.rule") == "max_variance" else given.get("learn.keep", 1.0)


def signal(found: Found) -> float:
  """Mean over steps of the sum of squared centred rewards of a group's rollouts that finished: K rho (1 - rho)."""
  return float(np.nanmean(found.column("signal")))


def best_half(found: Found) -> tuple[float, float]:
  """Between what and what `signal` would be of the half of each group whose rewards vary most, where all of it finished. Files
  have sums over groups only: of r right among K, r (1 - r / K) falls to r (1 - 2 r / K), at most K / 8, a concave function of it,
  so groups that are all alike are the most, and groups at its two ends the least."""
  size = found.about["settings"].get("rollout.group_size", 16)
  few = np.arange(1, size // 2 + 1)  # right or wrong, whichever are fewer
  whole, half = few * (1 - few / size), np.where(few <= size // 4, few * (1 - 2 * few / size), size / 8)
  mixed = np.maximum(found.column("groups_mixed"), 1)
  of_one = found.column("signal") * groups(found) / mixed
  bounds = np.interp(of_one, whole[[0, -1]], half[[0, -1]]), np.interp(of_one, whole, half)
  return tuple(float(np.nanmean(x * mixed) / groups(found)) for x in bounds)


def signal_rate(found: Found) -> float:
  """Signal (sum over groups of K rho (1 - rho), of all that finished) a second of step."""
  return float(np.nansum(found.column("signal")) * groups(found) / np.sum(found.column("sec_step")))


@dataclasses.dataclass(frozen=True)
class Needs:
  """An arm beside another, means over their pairs, of a step. signal: summed over its groups; ratio: of signal a second."""
  signal: tuple[float, float]
  seconds: tuple[float, float]
  generating: tuple[float, float]
  ratio: float

  @property
  def signal_needed(self) -> float:
    """In as many seconds as it takes, for as much signal a second as the other."""
    return self.signal[1] * self.seconds[0] / self.seconds[1]

  @property
  def seconds_needed(self) -> float:
    """With the signal that it has."""
    return self.signal[0] * self.seconds[1] / self.signal[1]

  @property
  def lossless(self) -> float:
    """Times the other's signal a second, if it had all of the other's signal in the seconds that it takes."""
    return self.seconds[1] / self.seconds[0]

  def generating_needed(self, faster: float) -> float:
    """Seconds that generation may take in a step so many times faster than the other's, the rest staying as it is."""
    return self.seconds[1] / faster - (self.seconds[0] - self.generating[0])


def needs(both: list[tuple[Found, Found]]) -> Needs:
  """Means of each side, of at least one pair."""
  of = lambda value: tuple(float(np.mean([value(pair[i]) for pair in both])) for i in (0, 1))
  ratio = float(np.mean([signal_rate(a) / signal_rate(b) for a, b in both]))
  return Needs(of(lambda r: signal(r) * groups(r)), of(lambda r: r.column("sec_step").mean()),
               of(lambda r: r.column("sec_generate").mean()), ratio)


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


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
  """Markdown, a line each, and an empty one."""
  head = list(head)
  return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows), ""]


def accuracy_pairs(results: Results, other: str) -> dict[str, tuple[list[float], list[float]]]:
  """By arm: its pairs' signal a second in multiples of the other's, and greedy accuracy above its at the whole budget."""
  out = {}
  for arm in results.there:
    try:
      both = [pair for pair in pairs(results, arm, other) if all(accuracy(r, "full") is not None for r in pair)]
    except Refused:
      continue
    if arm != other and both:
      out[arm] = [signal_rate(a) / signal_rate(b) for a, b in both], difference(both, lambda r: accuracy(r, "full"))
  return out


def slope(results: Results, other: str) -> float:
  """Points of accuracy for signal a second as large again as the other's: least squares over pairs through the other itself. Arms
  that learn from a part of what finishes are left out: their signal is of all of it."""
  known = [x for arm, x in accuracy_pairs(results, other).items() if all(learned_share(r) == 1 for r in results.of(arm))]
  x, y = (np.array([v for one in known for v in one[i]]) for i in (0, 1))
  return float(np.sum((x - 1) * y) / np.sum((x - 1) ** 2)) if len(x) and np.any(x != 1) else float("nan")
