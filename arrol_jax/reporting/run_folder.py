"""A run's folder as a page shows it: what was set, a line a step, evaluations, and as many rollouts as a page can hold.

Reads whatever is there: runs that have just begun, are running or were killed, and those of older versions, whose lines have
fewer keys. Left out: checkpoints, and files of other loggers.
"""

import dataclasses
import datetime
import json
import os
from pathlib import Path
import re

import numpy as np

from arrol_jax.running.json_files import read_json
from arrol_jax.running.workdir import flat, is_run, read_lines, records, stored_config
from arrol_jax.types import UserError

MOST_ROLLOUTS = 400
MOST_CHARACTERS = 4_000_000  # of all texts together,
LONGEST = 20_000             # and of one
MOST_MEMBERS = 128           # of a group


@dataclasses.dataclass(frozen=True)
class RunFolder:
  """evaluations: "before", "after" or a step -> source -> results. written: when the newest log was written."""
  name: str
  config: dict
  lines: list[dict]
  summary: dict
  evaluations: dict[str, dict]
  rollouts: list[dict]
  found: int          # rollouts in rollouts.jsonl, of which `rollouts` are shown
  written: str

  @property
  def steps(self) -> int:
    return self.lines[-1]["step"] if self.lines else 0

  def columns(self) -> dict[str, np.ndarray]:
    return columns(self.lines)


def load(folder: str | os.PathLike) -> RunFolder:
  """Raises UserError where the folder is none of a run, or holds a damaged file."""
  path = Path(folder)
  if not path.is_dir():
    raise UserError(f"{folder}: no such folder; give that of a run")
  logs = [path / name for name in ("metrics.jsonl", "config.json", "rollouts.jsonl") if (path / name).is_file()]
  config = stored_config(str(path)) or {}
  if not (path / "metrics.jsonl").is_file() and not is_run(path):
    raise UserError(f"{folder} is not the folder of a run: it has neither metrics.jsonl nor a run's config.json")
  lines = {x["step"]: x for x in read_lines(str(path / "metrics.jsonl"))}
  rollouts, found = sampled(path / "rollouts.jsonl")
  written = datetime.datetime.fromtimestamp(max(x.stat().st_mtime for x in logs))
  return RunFolder(path.resolve().name, config, [lines[step] for step in sorted(lines)], _json(path / "summary.json"),
                   evaluations(path), rollouts, found, f"{written:%Y-%m-%d %H:%M}")


def columns(lines: list[dict]) -> dict[str, np.ndarray]:
  """Columns of metrics.jsonl, f64[steps] each: NaN where a line has no number of that name, lists left out."""
  number = lambda x: float(x) if isinstance(x, int | float) else np.nan
  names = dict.fromkeys(name for line in lines for name, value in line.items() if not isinstance(value, list | dict | str))
  return {name: np.array([number(line.get(name)) for line in lines]) for name in names}


def evaluations(path: Path) -> dict[str, dict]:
  """Results by when they were measured, in that order; files that are not results are left out."""
  names = [file.name for file in path.glob("eval_*.json")]
  steps = sorted((int(found[1]), found[0]) for found in map(re.compile(r"eval_(?:all_)?(\d+)\.json").fullmatch, names) if found)
  named = [("before", "eval_before.json"), *((f"step {step}", name) for step, name in steps), ("after", "eval_after.json")]
  summary = _json(path / "summary.json")  # has the first and the last too
  found = {when: _json(path / name) or summary.get(name.removesuffix(".json")) for when, name in named}
  out = {when: {source: x for source, x in results.items() if isinstance(x, dict) and "accuracy" in x}
         for when, results in found.items() if isinstance(results, dict)}
  return {when: results for when, results in out.items() if results}


def _json(path: Path) -> dict:
  return read_json(str(path)) if path.is_file() else {}


def sampled(path: Path, most: int = MOST_ROLLOUTS) -> tuple[list[dict], int]:
  """At most `most` lines of rollouts.jsonl, and how many there are: all of evenly spaced steps, the last among them, with texts
  cut short where they are long. Holds no more than these at once."""
  counts: dict[int, int] = {}
  for _, record in records(str(path)):
    if record:
      counts[record["step"]] = counts.get(record["step"], 0) + 1
  found = sum(counts.values())
  if not found:
    return [], 0
  steps = sorted(counts)
  taken = set(spaced(steps, max(1, most // max(counts.values())))) if found > most else set(steps)
  room = min(LONGEST, MOST_CHARACTERS // min(found, most))
  out = [shortened(x, room) for _, x in records(str(path)) if x and x["step"] in taken]
  return spaced(out, most), found


def spaced(items: list, most: int) -> list:
  """At most `most` of the items, evenly spaced, first and last among them."""
  if len(items) <= most:
    return items
  return [items[i] for i in np.linspace(0, len(items) - 1, most).astype(int)] if most > 1 else items[-1:]


def shortened(record: dict, room: int) -> dict:
  """The record with texts of at most `room` characters, and groups of at most MOST_MEMBERS."""
  out = {k: short(v, room) if isinstance(v, str) else v for k, v in record.items()}
  if isinstance(out.get("group"), dict):
    out["group"] = {k: v[:MOST_MEMBERS] for k, v in out["group"].items() if isinstance(v, list)}
  return out


def short(text: str, room: int) -> str:
  """Begin and end of a text that is longer than `room` characters, with how much is missing between them."""
  if len(text) <= room:
    return text
  half = room // 2
  return f"{text[:half]}\n[... {len(text) - 2 * half:,} characters are not shown ...]\n{text[-half:]}"


def smooth(y: np.ndarray, window: int = 5) -> np.ndarray:
  """Trailing mean over up to `window` points, NaN left out."""
  parts = [y[max(0, i - window + 1):i + 1] for i in range(len(y))]
  return np.array([np.nanmean(part) if np.isfinite(part).any() else np.nan for part in parts])


def to_text(config: dict) -> str:
  """The config as lines of KEY = VALUE."""
  plain_first = dict(sorted(config.items(), key=lambda x: isinstance(x[1], dict)))
  return "\n".join(f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in flat(plain_first).items())
