"""One HTML page of a run, with nothing outside it: curves, evaluations with their votes, rollouts to page through, the config.

Texts of models go into the page as JSON alone, in which no tag can end, and page.js shows them as text, never as HTML; control
characters are shown as symbols. Left out: any other server or script, and what a step's other rollouts said.
"""

import html
import json
import math
from pathlib import Path

import numpy as np

from arrol_jax.reporting import charts, evaluations
from arrol_jax.reporting.charts import Chart, Series
from arrol_jax.reporting.run_folder import MOST_MEMBERS, RunFolder, to_text
from arrol_jax.types import FAILED

HERE = Path(__file__).parent
PHASES = ("generate", "reward", "batch", "logprob", "update")
HUGE = 1e30  # values beyond are not drawn
FACTS = (("problem_id", "problem"), ("problem_source", "source"), ("answer", "right answer"))


def style() -> str:
  return (HERE / "page.css").read_text()


def page(run: RunFolder) -> str:
  drawn = all_charts(run)
  figures = "".join(charts.figure(chart, i) for i, chart in enumerate(drawn)) or "<p>No step has been logged yet.</p>"
  state = {"charts": [charts.data(chart) if _some(chart) else None for chart in drawn],
           "rollouts": [rollout(x, run) for x in run.rollouts]}
  return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
          f"<title>{html.escape(run.name)}: a run of arrol_jax</title><style>{style()}</style></head>\n<body>"
          f"<header><h1>{html.escape(run.name)}</h1><p>{html.escape(state_of(run))}</p>"
          '<nav><a href="#curves">Curves</a> <a href="#evaluations">Evaluations</a> <a href="#rollouts">Rollouts</a> '
          '<a href="#config">Config</a></nav></header>\n'
          f'<section id="curves"><h2>Curves</h2><p class="note">{html.escape(curves_note(run))}</p>'
          f'<div class="charts">{figures}</div></section>\n'
          f'<section id="evaluations"><h2>Evaluations on held-out problems</h2>{evaluation_tables(run)}</section>\n'
          f'<section id="rollouts"><h2>Rollouts</h2><p class="note">{html.escape(rollouts_note(run))}</p>'
          '<div id="browser"></div></section>\n'
          f'<section id="config"><h2>Config</h2><details><summary>All keys</summary><pre>{html.escape(to_text(run.config))}</pre>'
          "</details></section>\n"
          f'<script type="application/json" id="data">{as_json(state)}</script>\n'
          f"<script>{(HERE / 'page.js').read_text()}</script></body></html>\n")


def as_json(value) -> str:
  """JSON that may stand in a script element: ASCII without < > &, and null for what is no number."""
  text = json.dumps(_clean(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
  return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _clean(value):
  if isinstance(value, dict):
    return {str(k): _clean(v) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [_clean(v) for v in value]
  return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- what a reader is told


def state_of(run: RunFolder) -> str:
  total = run.config.get("steps")
  told = [f"finished: {run.steps:,} steps" if run.summary else
          f"step {run.steps:,}" + (f" of {total:,}" if isinstance(total, int) else "") + ", not finished"]
  told.append(f"last written {run.written}")
  model = run.config.get("model")
  if isinstance(model, dict) and isinstance(model.get("path"), str):
    told.append(f"model {model['path']}")
  if isinstance(run.summary.get("device"), str):
    told.append(run.summary["device"])
  if isinstance(run.summary.get("seconds"), int | float):
    told.append(f"{run.summary['seconds'] / 60:,.1f} minutes of the last start")
  return "; ".join(told)


def curves_note(run: RunFolder) -> str:
  many = f" Each point is a mean over about {run.steps / charts.MOST_POINTS:.1f} steps." if run.steps > charts.MOST_POINTS else ""
  return ("Faint: each step; strong: the mean over 5. Point at a chart to read its values. What each figure is: docs/metrics.md."
          + many)


def rollouts_note(run: RunFolder) -> str:
  if not run.rollouts:
    return "rollouts.jsonl holds none (log.rollouts says how many of a step's are written there)."
  log = run.config.get("log")
  each = log.get("rollouts") if isinstance(log, dict) else None
  logged = f"of each step {each if isinstance(each, int) else 'a few'} are logged, evenly spaced (log.rollouts)"
  shown = f"all {run.found:,}" if len(run.rollouts) == run.found else \
    f"{len(run.rollouts):,} of {run.found:,}, those of evenly spaced steps"
  return (f"Here are {shown} in rollouts.jsonl; {logged}. Long texts are cut in their middle. Keys: left and right, n and p by "
          "step.")


# ---- curves


def _some(chart: Chart) -> bool:
  return any(np.isfinite(s.y).any() for s in chart.series)


def all_charts(run: RunFolder) -> list[Chart]:
  """In the order of the page."""
  m = {name: np.where(np.abs(y) < HUGE, y, np.nan) for name, y in run.columns().items()}
  steps = m.get("step", np.zeros(0))
  line = lambda name, label=None, scale=1.0: Series(label or name, steps, scale * m.get(name, np.full(len(steps), np.nan)))
  places = lambda kind: tuple(line(name, _boundary(name)) for name in m if name.startswith(f"{kind}@"))
  auc = lambda kind: places(kind) or (line(kind, "last decision"),)
  seconds = tuple(line(f"sec_{name}", name) for name in PHASES)
  return [
    Chart("Reward", "reward", (line("reward_ipw", "all started (estimate)"), line("reward", "survivors")), smoothed=True),
    Chart("Held-out accuracy", "right, %", held_out(run, m), least=0.0),
    Chart("Learning signal", "signal, K ρ(1−ρ) a group", (
      line("signal", "measured"), line("signal_expected", "expected of those kept"),
      line("signal_expected_random", "expected of as many at random")), smoothed=True, least=0.0),
    Chart("Rollouts kept", "kept, %", (line("keep_ratio", "of those started", 100.0),), least=0.0, most=100.0),
    Chart("Quality head, all rollouts", "AUC (0.5 is chance)", auc("head_auc"), smoothed=True, level=0.5,
          note="Chance that a right survivor scores above a wrong one, by where it was scored."),
    Chart("Quality head, within a prompt", "AUC (0.5 is chance)", auc("head_auc_within"), smoothed=True, level=0.5,
          note="The same among answers to one prompt."),
    Chart("Time", "seconds a step", tuple(s for s in seconds if np.isfinite(s.y).any()), stacked=True, least=0.0,
          note="Peaks far above the others are cut off at the top: compilation, say."),
    Chart("Response length", "tokens, mean of survivors", (line("response_len", "response"),), smoothed=True),
    Chart("Cut off by the length limit", "survivors, %", (line("truncated", "truncated", 100.0),), smoothed=True, least=0.0),
    Chart("Gradient", "norm before clipping", (line("grad_norm", "policy's gradient"),), smoothed=True, least=0.0),
    Chart("Learning rate", "learning rate", (line("lr", "policy"),), least=0.0),
  ]


def _boundary(name: str) -> str:
  place = name.partition("@")[2]
  return "last token" if place == "end" else f"{place} tokens"


def held_out(run: RunFolder, m: dict) -> tuple[Series, ...]:
  """Accuracy by source, in percent: before, during and after."""
  points: dict[str, dict[float, float]] = {}
  for when, results in run.evaluations.items():
    step = 0 if when == "before" else run.steps if when == "after" else int(when.split()[1])
    for source, x in results.items():
      if isinstance(x["accuracy"], int | float):
        points.setdefault(source, {})[float(step)] = 100.0 * x["accuracy"]
  if not points and "held_out_accuracy" in m:
    points["all"] = {float(a): 100.0 * b for a, b in zip(m["step"], m["held_out_accuracy"], strict=True) if math.isfinite(b)}
  return tuple(Series(source, np.array(sorted(at)), np.array([at[x] for x in sorted(at)]), points=True)
               for source, at in points.items())


# ---- evaluations


def evaluation_tables(run: RunFolder) -> str:
  rows = [(f"{when}: {name}", x) for when, results in run.evaluations.items() for name, x in evaluations.with_sampled(results)]
  if not rows:
    return "<p>None yet.</p>"
  votes, note = evaluations.votes(rows), '<p class="note">± is half of a 95% interval over problems.</p>'
  return html_table(evaluations.table(rows)) + note + (
    "<h3>Votes over a problem's samples</h3>" + html_table(votes) +
    '<p class="note">maj counts answers; rank, posterior and logit weigh them by the quality head; best takes the answer '
    "with the highest score; pass@k: one of k samples is right.</p>" if votes else "")


def html_table(rows: list[list[str]]) -> str:
  cells = lambda tag, row: "".join(f"<{tag}>{html.escape(x)}</{tag}>" for x in row)
  body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows[1:])
  return f'<div class="wide"><table><thead><tr>{cells("th", rows[0])}</tr></thead><tbody>{body}</tbody></table></div>'


# ---- rollouts


def rollout(record: dict, run: RunFolder) -> dict:
  """What page.js shows of a line of rollouts.jsonl; lines of older versions lack most of it."""
  scores = _numbers(record.get("scores")) or _numbers([record.get("score")])
  posteriors = _numbers(record.get("posteriors")) or _numbers([record.get("posterior")])
  kept = _numbers(record.get("keep_probabilities")) or _numbers([record.get("survival")])
  lengths = _lengths(run.config, len(scores), record)
  group = record.get("group") if isinstance(record.get("group"), dict) else None
  facts = [[label, str(record[key])] for key, label in FACTS if record.get(key) is not None]
  return {"step": record["step"], "prompt": record.get("prompt"), "facts": facts, "problem": _text(record.get("problem")),
          "text": _text(record.get("text")), "fate": fate(record, run.config), "why": why(record, lengths, posteriors, kept),
          "tokens": record.get("tokens"), "member": record.get("member"), "group": group,
          "shown": MOST_MEMBERS, "decisions": [list(x) for x in zip(lengths, scores, posteriors, kept)]}


def _numbers(values) -> list[float]:
  """The list, if it holds numbers alone."""
  fine = isinstance(values, list) and all(isinstance(x, int | float) and not isinstance(x, bool) for x in values)
  return [float(x) for x in values] if fine else []


def _text(value) -> str:
  return value if isinstance(value, str) else ""


def _lengths(config: dict, count: int, record: dict) -> list:
  """Response tokens at each decision of a rollout, None where that is not known."""
  prune = config.get("prune")
  detect = prune.get("detect") if isinstance(prune, dict) else None
  known = [n for n in detect if n] if isinstance(detect, list) else []
  if isinstance(record.get("scores"), list) or len(known) == 1:
    return (known + [None] * count)[:count]
  return [None] * count  # the last of several


def fate(record: dict, config: dict) -> str:
  """"cut", "right", "wrong" or, where the grader failed, "ungraded"."""
  reward, section = record.get("reward"), config.get("reward")
  least = section.get("success", 1.0) if isinstance(section, dict) else 1.0
  if record.get("pruned"):
    return "cut"
  if record.get("reason") in FAILED:
    return "ungraded"
  right = record.get("right", isinstance(reward, int | float) and reward >= least)
  return "right" if right else "wrong"


def why(record: dict, lengths: list, posteriors: list, kept: list) -> str:
  """How it ended, in a sentence."""
  tokens, last = record.get("tokens"), (posteriors or [None])[-1]
  if record.get("pruned"):
    given = "" if last is None or not kept else (
      f": its posterior of being right was {last:.2f}, it was to go on with probability {kept[-1]:.2f}, and the draw said no")
    return f"Cut at {tokens} tokens{given}."
  ended = {True: "ended by itself", False: "was cut off by the length limit"}.get(record.get("stopped"), "ended")
  reward = record.get("reward")
  graded = f"reward {reward:g}" if isinstance(reward, int | float) else "no reward"
  said = f" ({record['reason']})" if record.get("reason") and isinstance(record["reason"], str) else ""
  if not posteriors:
    return f"It {ended} at {tokens} tokens, before any decision: {graded}{said}."
  all_on = all(p >= 1 for p in kept)
  went = "was scored, with nothing pruned there" if all_on else f"went on {'each time ' if len(lengths) > 1 else ''}by the draw"
  return f"It {went}, and {ended} at {tokens} tokens: {graded}{said}."
