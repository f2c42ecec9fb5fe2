"""What the paper's tables share: estimates with intervals, verdicts computed from them, Markdown, the command line.

A table's module has one function, build(scale, figure) -> Table, which reads results, draws into the figure and names the jobs it
needs; `main` prints it, writes the plot and, with --run, starts what is missing. Left out: which jobs there are (runs.py).
"""

from collections.abc import Callable, Iterable
import dataclasses
import html
import math
import sys
import textwrap
import time

from absl import flags
from matplotlib.figure import Figure
import numpy as np
from scipy import stats

from arrol_jax.types import UserError
from experiments import runs, trial_queue, trial_refused
from experiments.runs import ROOT, Job, Scale
from experiments.trial_arms import REGIMES, TABLES

NOT_RUN = "not run"
BUSY = 0.1  # cores that others kept busy while a run on a CPU was timed, from which its seconds are marked


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A figure with the half-width of its 95% interval (NaN: none; over seeds by Student's t) and, where there are several, that of
  each seed; seeds: whose these are."""
  value: float
  half: float
  each: tuple[float, ...] = ()
  seeds: tuple[str, ...] = ()

  def __sub__(self, other: "Estimate") -> "Estimate":
    """The difference. Where both have two seeds or more in common, that of these, paired, by Student's t over the pairs; else of
    both values as if they were independent, which is too wide where they share problems."""
    mine, theirs = (dict(zip(x.seeds, x.each, strict=True)) if x.seeds else {} for x in (self, other))
    pairs = [mine[seed] - theirs[seed] for seed in mine if seed in theirs]
    if len(pairs) > 1:
      return over_seeds(pairs, 0.0)
    return Estimate(self.value - other.value, float(np.hypot(self.half, other.half)))

  def text(self, form: str = ".1f", unit: str = "") -> str:
    out = format(self.value, form) + unit + ("" if np.isnan(self.half) else f" ± {format(self.half, form.replace('+', ''))}")
    return out + (f" ({', '.join(format(x, form) for x in self.each)})" if len(self.each) > 1 else "")


@dataclasses.dataclass
class Table:
  """name: module; notes: what the figures say, computed from them; jobs: all commands the table needs, done or not;
  about: what it is of, where that is not what the jobs say."""
  name: str
  title: str
  scale: Scale
  columns: tuple[str, ...]
  rows: list[list[str]]
  notes: list[str]
  jobs: list[Job]
  about: str = ""

  @property
  def missing(self) -> list[Job]:
    return [job for job in self.jobs if not job.done]

  def heading(self) -> str:
    """Scale, model, data, and what the runs themselves say of devices, steps and seeds."""
    if self.about:
      return self.about
    done = [trained for job in self.jobs if job.done for trained in [job.policy or job] if trained.workdir and trained.done]
    summaries = [runs.summary(job) for job in done]
    devices = " and ".join(sorted({s["device"] for s in summaries})) or "nothing run"
    steps = " or ".join(map(str, sorted({s["steps"] for s in summaries}))) or "no"
    seeds = sorted({job.name.rpartition("_seed")[2] for job in done})
    seeds = f"seed {seeds[0]} alone: intervals do not hold the spread of seeds" if len(seeds) == 1 else \
      f"seeds {', '.join(seeds) or 'none'}"
    text = f"Scale: {self.scale.name}. {self.scale.model}; {self.scale.data}; {devices}; {steps} steps; {seeds}"
    return text + f". Means leave out the first {self.scale.skip} steps. The paper's figures: its models and data."

  def markdown(self) -> str:
    out = [f"## {self.title}", "", self.heading(), "", f"| {' | '.join(self.columns)} |", "|" + "---|" * len(self.columns)]
    out += [f"| {' | '.join(row)} |" for row in self.rows]
    out += ["", *(f"- {note}" for note in self.notes)] if self.notes else []
    if self.missing:
      out += ["", f"Not run ({len(self.missing)} of {len(self.jobs)}):", "```",
              *(runs.hidden(runs.prefix(job) + job.command, self.scale) for job in self.missing), "```"]
    return "\n".join(out)

  def html(self) -> str:
    e = html.escape
    cells = lambda tag, row: "<tr>" + "".join(f"<{tag}>{e(x)}</{tag}>" for x in row) + "</tr>"
    out = [f"<h3>{e(self.title)}</h3><p>{e(self.heading())}</p>", '<div class="wide"><table>',
           cells("th", self.columns), *(cells("td", row) for row in self.rows), "</table></div>",
           "<ul>", *(f"<li>{e(note)}</li>" for note in self.notes), "</ul>"]
    if self.missing:
      commands = "\n".join(runs.hidden(runs.prefix(job) + job.command, self.scale) for job in self.missing)
      out.append(f"<details><summary>Not run ({len(self.missing)} of {len(self.jobs)})</summary><pre>{e(commands)}</pre>"
                 "</details>")
    return "\n".join(out)


# ---- estimates


def over_seeds(values: list[float], within: float, seeds: Iterable[str] = ()) -> Estimate:
  """Mean over seeds; its interval from `within` (the half-width over problems, which seeds share) and the spread of seeds."""
  n = len(values)
  spread = float(stats.t.ppf(0.975, n - 1) * np.std(values, ddof=1) / np.sqrt(n)) if n > 1 else 0.0
  return Estimate(float(np.mean(values)), float(np.hypot(within, spread)), tuple(values), tuple(seeds))


def accuracy(jobs: list[Job], when: str = "eval_after") -> Estimate | None:
  """Held-out accuracy in percent over the trainings that are done; at the paper scale the mean of its six benchmarks."""
  values, halves, seeds = [], [], []
  for job in jobs:
    if job.done and job.scale.name != "paper":
      result = next(iter(runs.summary(job).get(when, {}).values()), None)
      found = [] if result is None else [(result["accuracy"], result["ci95"])]
    elif all(b.done for b in runs.benchmarks(job)):
      greedy, sampled = (runs.lines(b.result) for b in runs.benchmarks(job))
      found = [(x["accuracy"], x["ci95"]) for x in greedy]
      found += [(x["pass@16"], (x["pass@16_ci"][1] - x["pass@16_ci"][0]) / 2) for x in sampled]
    else:
      found = []
    if found:
      seeds.append(job.name.rpartition("_seed")[2])
      values.append(100 * float(np.mean([x for x, _ in found])))
      halves.append(100 * float(np.sqrt(np.sum([half**2 for _, half in found]))) / len(found))
  return over_seeds(values, float(np.mean(halves)), seeds) if values else None


def column(job: Job, key: str) -> np.ndarray:
  """One key of metrics.jsonl, every step; null is NaN."""
  return np.array([np.nan if x.get(key) is None else x[key] for x in runs.metrics(job)], float)


def step_mean(jobs: list[Job], key: str) -> Estimate | None:
  """Mean over steps after the first and over seeds; its interval is over steps, taken as independent."""
  each = [column(job, key)[job.scale.skip:] for job in jobs if job.done]
  values = np.concatenate(each) if each else np.array([])
  values = values[np.isfinite(values)]
  if not len(values):
    return None
  return Estimate(float(values.mean()), float(1.96 * values.std(ddof=1) / np.sqrt(len(values))),
                  tuple(float(np.nanmean(x)) for x in each))


def step_difference(jobs: list[Job], others: list[Job], key: str) -> Estimate | None:
  """Mean of jobs' figure less others' at the same step of the same seed, where all train on the same prompts; its interval is
  over these steps, taken as independent. A step that lacks one of the two is left out."""
  there = {job.name.rpartition("_seed")[2]: job for job in others if job.done}
  pairs = [(job, there[seed]) for job in jobs for seed in [job.name.rpartition("_seed")[2]] if job.done and seed in there]
  steps = [min(len(column(job, key)) for job in both) for both in pairs]
  each = [(column(a, key)[:n] - column(b, key)[:n])[a.scale.skip:] for (a, b), n in zip(pairs, steps, strict=True)]
  values = np.concatenate(each) if each else np.array([])
  values = values[np.isfinite(values)]
  if len(values) < 2:
    return None
  return Estimate(float(values.mean()), float(1.96 * values.std(ddof=1) / np.sqrt(len(values))),
                  tuple(float(np.nanmean(x)) for x in each if np.isfinite(x).any()))


def seconds(jobs: list[Job], key: str = "sec_step") -> dict[tuple[str, str], float]:
  """Median seconds a step by seed and device, after the first steps, of the trainings that are done."""
  return {(job.name.rpartition("_seed")[2], runs.summary(job)["device"]): float(np.median(column(job, key)[job.scale.skip:]))
          for job in jobs if job.done}


def pair(base: dict[tuple[str, str], float], fast: dict[tuple[str, str], float]) -> tuple[dict, dict]:
  """Both sides' seconds of the seeds that ran on one device on both; all seconds where no seed did."""
  shared = [k for k in base if k in fast]
  return ({k: base[k] for k in shared}, {k: fast[k] for k in shared}) if shared else (base, fast)


def speedup(base: dict[tuple[str, str], float], fast: dict[tuple[str, str], float]) -> Estimate | None:
  """base / fast over the seeds that both have on one device; no interval, each seed's own."""
  each = tuple(base[k] / fast[k] for k in base if k in fast)
  return Estimate(float(np.mean(each)), float("nan"), each) if each else None


def device_note(base: list[Job], *others: list[Job]) -> list[str]:
  """Says which seeds' seconds are left out because the runs to compare were on different devices."""
  where = lambda jobs: {seed: device for seed, device in seconds(jobs)}
  first, apart = where(base), {}
  for jobs in others:
    apart |= {seed: f"{first[seed]}, {device}" for seed, device in where(jobs).items() if first.get(seed, device) != device}
  return [f"Seed {seed} ran on different devices ({devices}): its seconds are not compared." for seed, devices in apart.items()]


def paper_phase(slow: float | None, fast: float | None) -> list[str]:
  """The paper's seconds of a phase without and with pruning, and the ratio; of the whole step it gives the ratio alone."""
  return ["", "", "1.61x"] if slow is None else [f"{slow}", f"{fast}", f"{slow / fast:.2f}x"]


def cell(x: Estimate | None, form: str = ".1f", unit: str = "") -> str:
  return NOT_RUN if x is None else x.text(form, unit)


# ---- what the figures say


def verdict(what: str, difference: Estimate | None, paper: str, form: str = ".1f", unit: str = "") -> list[str]:
  """Whether a difference that the paper has above zero is so here: a line, none where it was not measured."""
  if difference is None:
    return []
  head = direction(difference.value - difference.half, difference.value + difference.half)
  measured = f"{format(difference.value, '+' + form)} ± {format(difference.half, form)}{unit}"
  return [f"{head}: {what} {measured}; paper {paper}."]


def direction(low: float, high: float) -> str:
  """What an interval says of a figure that the paper has above zero."""
  if low > 0 or high < 0:
    return "Agrees with the paper in direction" if low > 0 else "Contradicts the paper"
  return "Undecided (the interval holds 0)"


def by_seed(what: str, base: Estimate | None, other: Estimate | None) -> list[str]:
  """Each seed's own difference, where both sides have the same several seeds."""
  if not base or not other or len(base.each) < 2 or len(base.each) != len(other.each):
    return []
  each = ", ".join(f"{b - a:+.1f}" for a, b in zip(base.each, other.each, strict=True))
  return [f"{what}, seed by seed: {each}. ± is by Student's t over seeds, for two of them 12.7 standard errors."]


def all_above(values, bound: float) -> str:
  """The verdict on what the paper has above `bound`, by seeds that all are, all are not, or differ."""
  if min(values) > bound:
    return "Agrees with the paper in direction"
  return "Contradicts the paper" if max(values) < bound else "Undecided (seeds differ)"


def faster(what: str, ratio: Estimate | None, paper: str) -> list[str]:
  """The same for a speed-up, by its seeds."""
  if ratio is None:
    return []
  return [f"{all_above(ratio.each, 1.0)}: {what} {ratio.text('.2f', 'x')}; paper {paper}."]


def load_note(jobs: list[Job]) -> list[str]:
  """Says so where seconds were taken on a CPU that others used too, by what runs.py saw."""
  shares = [max(x["others_cores"] or 0.0 for x in runs.lines(path)) for job in jobs if job.done
            for path in [job.result.parent / "run.jsonl"] if (ROOT / path).exists() and "cpu" in runs.summary(job)["device"]]
  if not shares or max(shares) < BUSY:
    return []
  return [f"Timed on a busy machine: other programs kept up to {max(shares):.1f} cores busy during these runs, so seconds and "
          "speed-ups here are rough."]


def subtract(a: Estimate | None, b: Estimate | None) -> Estimate | None:
  return None if a is None or b is None else a - b


def bars(axis, labels: list[str], values: list[Estimate | None], title: str, color: str = "C0", unit: str = "") -> None:
  """Bars with their intervals and a dot a seed, hollow without an interval; what was not run has none."""
  there = [(label, v) for label, v in zip(labels, values, strict=True) if v is not None]
  width = 13 if len(there) < 6 else 11  # letters that fit below a bar
  drawn = axis.bar([textwrap.fill(label, width) for label, _ in there], [v.value for _, v in there], color=color, alpha=0.8,
                   capsize=5, yerr=[v.half for _, v in there])
  for bar, (_, v) in zip(drawn, there, strict=True):
    if np.isnan(v.half):  # of one run or pair: hollow
      bar.set(facecolor="none", edgecolor=color, linestyle="--", linewidth=1.5)
  for x, (_, v) in enumerate(there):
    axis.plot([x] * len(v.each), v.each, "k.", markersize=5)  # each seed
  axis.set_xlim(-0.7, max(len(there), 3) - 0.3)
  axis.tick_params(axis="x", labelsize=8)
  axis.set_title(title, fontsize=10)
  axis.set_ylabel(unit, fontsize=9)
  axis.spines[["top", "right"]].set_visible(False)


# ---- command line


def draw(build: Callable[[Scale, Figure], Table], scale: Scale) -> tuple[Table, Figure]:
  figure = Figure(figsize=(10, 3.6), layout="constrained")
  return build(scale, figure), figure


def save(table: Table, figure: Figure) -> bool:
  """Writes the plot beside the results it shows; False where there are none."""
  if figure.axes:
    figure.savefig(ROOT / table.scale.results / f"{table.name}.png", dpi=110)
  return bool(figure.axes)


def parse(argv: list[str]) -> tuple[Scale, bool, float | None]:
  """The scale with this machine's paths, whether to run, and for how many minutes at most."""
  values = flags.FlagValues()
  flags.DEFINE_enum("scale", "cpu", list(runs.SCALES), "see experiments/runs.py", flag_values=values)
  flags.DEFINE_bool("run", False, "start what is missing", flag_values=values)
  flags.DEFINE_float("minutes", None, "with --run: stop after so many", lower_bound=0, flag_values=values)
  flags.DEFINE_string("model", None, "the scale's model on this machine", flag_values=values)
  flags.DEFINE_string("data", None, "folder of the scale's data on this machine", flag_values=values)
  known = "--scale=cpu|gpu|paper, --run, --minutes=N, --model=PATH, --data=DIR"
  runs.read_flags(values, argv, sys.modules["__main__"].__doc__, known)
  return runs.with_paths(runs.SCALES[values.scale], values.model, values.data), values.run, values.minutes


def start(scale: Scale, jobs: list[Job], minutes: float | None) -> bool:
  """Does what is missing; False if time ran out before all of it was done. Of the trial: its regime for tables, votes too."""
  if not scale.trial:
    return runs.start(jobs, minutes)
  paths = dict(path.split("=", 1) for path in scale.paths)
  if not {"model.path", "data.folder"} <= paths.keys():
    raise UserError("the gpu scale needs --model=DIR/model.gguf and --data=DIR")
  version = {"commit": trial_queue.commit_of(None), "code": trial_queue.code_hash()}
  deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
  call = trial_queue.Call(version, paths["model.path"], paths["data.folder"], deadline, votes=True, platform="gpu")
  return trial_queue.start(trial_refused.ready([REGIMES[TABLES]], lambda run: True, call, None), call)


def main(build: Callable[[Scale, Figure], Table]) -> None:
  scale, run, minutes = parse(sys.argv)
  table, figure = draw(build, scale)
  if run:
    if not start(scale, table.jobs, minutes):
      print("time is over; the same command goes on", flush=True)
    table, figure = draw(build, scale)
  print(table.markdown())
  if save(table, figure):
    print(f"\n{scale.results}/{table.name}.png: written")
