"""Logs of a line a step, JSONL: read whatever moment their run was killed at, and taken up again by it."""

from collections.abc import Iterator
import json
import math
import os

from arrol_jax.types import UserError

# What a run that goes on reads of its steps in metrics.jsonl. The mean reward of no survivors is null; older lines have no
# sec_total.
READ_AGAIN = ("reward", "reward_ipw", "tokens_generated", "tokens_trained", "sec_step", "sec_total")


def cut_back(path: str, start: int, keys: tuple[str, ...] = ()) -> None:
  """Leaves of a log the lines of `start` steps: later ones will be made again. UserError for a damaged line of those: no record,
  or one that lacks a number by one of `keys`."""
  lines = list(records(path))
  mine = [i for i, (_, x) in enumerate(lines) if x and x["step"] <= start]
  whole = not start or any(lines[i][1]["step"] == start for i in mine)  # else what is damaged may be the line of that step
  for number, record in lines[:max(mine, default=-1) + 1] if whole else lines:
    fault = "" if record is None else next((f" (no {key})" for key in keys if not _has(record, key)), None)
    if fault is not None and (record is None or record["step"] <= start):
      raise UserError(f"{path}, line {number}: damaged{fault}; delete that line, and the same command goes on without it")
  rewrite(path, [lines[i][1] for i in mine])


def rewrite(path: str, lines: list[dict]) -> None:
  """A log of these lines, in one move."""
  with open(path + ".part", "w") as f:
    f.writelines(json.dumps(line) + "\n" for line in lines)
  os.replace(path + ".part", path)


def _has(record: dict, key: str) -> bool:
  value = record.get(key, 0 if key == "sec_total" else "")
  return is_number(value) or value is None and key == "reward"


def is_number(value) -> bool:
  """Whether what a file says is a number, and finite; true and false are none."""
  return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_lines(path: str) -> list[dict]:
  """The whole lines of a log."""
  return [record for _, record in records(path) if record]


def records(path: str) -> Iterator[tuple[int, dict | None]]:
  """(line number, record) of a log's lines, None for one that a kill or a lost machine left half; no last line cut short."""
  if not os.path.exists(path):
    return
  with open(path, errors="replace") as f:
    for number, line in enumerate(f, 1):
      try:
        record = json.loads(line)
      except ValueError:
        record = None
      if line.endswith("\n"):
        yield number, record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def seconds_of(lines: list[dict]) -> float:
  """Seconds of the steps in metrics.jsonl, without compilation; lines of older versions say their own alone."""
  if not lines:
    return 0.0
  return lines[-1]["sec_total"] if "sec_total" in lines[-1] else sum(x["sec_step"] for x in lines)
