"""Reads what runs of the trial leave (trial_queue.py writes it): run.json, metrics.jsonl, failed.json, votes.json. What is
damaged, or of another run, is named, with what to do.
"""

from collections.abc import Callable
import dataclasses
import json
from typing import Any

import numpy as np

from arrol_jax.running.lines import is_number
from arrol_jax.types import UserError
from experiments.trial_arms import SKIP, Regime, Run, runs_of, same


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
    """A key of the steps' lines after the first `skip`, NaN where one lacks it; sec_step as the budget counts it, without what
    was compiled meanwhile."""
    if name == "sec_step" and all("sec_total" in x for x in self.lines):
      counted = np.diff([0.0] + [x["sec_total"] for x in self.lines])
      return counted[skip:] if len(counted) > skip else counted[-1:]
    return np.array([np.nan if x.get(name) is None else x[name] for x in self.lines[skip:] or self.lines[-1:]], float)

  def median(self, name: str) -> float:
    return float(np.nanmedian(self.column(name)))


@dataclasses.dataclass(frozen=True)
class Results:
  """Of a regime: runs by arm and seed; those that failed, were made with other settings than the arm has now (of a regime that
  waits all that are there), or are missing."""
  regime: Regime
  there: dict[str, dict[int, Found]]
  failed: list[dict]
  other: list[str]
  missing: list[str]

  def of(self, arm: str) -> list[Found]:
    return list(self.there.get(arm, {}).values())


def load(regime: Regime, wanted: Callable[[Run], bool] | None = None) -> Results:
  """What there is of its runs, or of those that are wanted alone. UserError where a file is damaged."""
  out = Results(regime, {}, [], [], [])
  for run in filter(wanted, runs_of(regime)):
    if (run.folder / "run.json").exists():
      about = told(run)
      if about["settings"] != same(run.settings) or regime.waits:
        out.other.append(run.name)
        continue
      lines = _read(run, "metrics.jsonl", lambda text, steps=about["steps"]: _lines(text, steps))
      votes = _read(run, "votes.json", _votes) if (run.folder / "votes.json").exists() else {"problem": "not there"}
      out.there.setdefault(run.arm, {})[run.seed] = Found(run, about, lines, None if "problem" in votes else votes)
    elif (run.folder / "failed.json").exists():
      out.failed.append(_read(run, "failed.json", lambda text, run=run: _checked(text, FAILED | _name(run))))
    else:
      out.missing.append(run.name)
  return out


def told(run: Run) -> dict:
  """What a finished run says of itself. UserError where that is damaged, or is of another run."""
  return _read(run, "run.json", lambda text: _checked(text, RUN | _name(run)))


# ---- what there has to be: by key, whether a value will do; a key that ends with "?" may lack

_words = lambda x: isinstance(x, str) and bool(x)
_share = lambda x: is_number(x) and 0 <= x <= 1
_count = lambda x: isinstance(x, int) and not isinstance(x, bool) and x > 0
_object = lambda x: isinstance(x, dict)
_ends = lambda x: isinstance(x, list) and len(x) == 2 and all(map(is_number, x))
SAMPLED = {"accuracy": _share, "pass@2?": _share, "samples?": _count, "problems?": _count}
RESULT = {"accuracy": _share, "truncated": _share, "problems": _count, "sampled": lambda x: _fits(x, SAMPLED)}
FAILED = {"steps": lambda x: x == 0 or _count(x), "commit": _words, "problem": _words}
RUN = {"settings": _object, "pieces": lambda x: isinstance(x, list) and all(map(_object, x)), "commit": _words, "code": _words,
       "steps": _count, "seconds": is_number, "device": _words,
       "half": lambda x: x is None or _fits(x, RESULT | {"seconds?": is_number}),
       "full": lambda x: _fits(x, RESULT), "host?": lambda x: isinstance(x, str),
       "inputs?": lambda x: _object(x) and all(map(_words, x.values()))}


def _name(run: Run) -> dict:
  """Which run a file has to be of."""
  return {"regime?": lambda x: x == run.regime.name, "arm": lambda x: x == run.arm, "seed": lambda x: x == run.seed}


def _fits(values: Any, shape: dict) -> bool:
  return _object(values) and not _wrong(values, shape)


def _wrong(values: dict, shape: dict) -> list[str]:
  """Keys that are not there or will not do."""
  return [key for key, fits in ((key.removesuffix("?"), fits) for key, fits in shape.items()
                                if not key.endswith("?") or key[:-1] in values) if key not in values or not fits(values[key])]


def _checked(text: str, shape: dict) -> dict:
  values = json.loads(text)
  if not _object(values):
    raise ValueError("no object")
  if wrong := _wrong(values, shape):
    raise ValueError(f"not as it should be: {', '.join(wrong)}")
  return values


def _lines(text: str, steps: int) -> list[dict]:
  """A line for each of so many steps."""
  lines = [json.loads(line) for line in text.splitlines()]
  if not all(map(_object, lines)) or [x.get("step") for x in lines] != list(range(1, steps + 1)):
    raise ValueError(f"not a line for each of {steps} steps")
  if wrong := {name for x in lines for name, value in x.items() if value is not None and not (
      is_number(value) or isinstance(value, bool))}:
    raise ValueError(f"no numbers: {', '.join(sorted(wrong))}")
  seconds = [x.get("sec_total") for x in lines]
  if any(x is not None for x in seconds) and (None in seconds or any(a >= b for a, b in zip([0, *seconds], seconds))):
    raise ValueError("sec_total does not grow from step to step")
  return lines


def _votes(text: str) -> dict:
  """With what the page reads of it, or why there is none."""
  values = _checked(text, {})
  shape = {"samples": _count, "accuracy": _share, f"maj@{values.get('samples')}": _share}
  shape |= {name: _ends if name.endswith("_ci") else _share for name in values if "@" in name}
  return _checked(text, {"problem": _words} if "problem" in values else shape)


def _read(run: Run, name: str, parse: Callable[[str], Any]) -> Any:
  try:
    return parse((run.folder / name).read_text())
  except (OSError, ValueError) as e:
    raise UserError(f"{run.folder / name}: not what this run leaves ({' '.join(str(e).split())}); put it back (git checkout -- "
                    f"{run.folder}), or remove the folder and run it again") from e
