"""JSON files of a run's folder: there whole or not at all, and one that something else has damaged is named with what to do."""

import json
import os
import re

from arrol_jax.running.rollout_lines import finite
from arrol_jax.types import UserError


def read_json(path: str) -> dict:
  """A JSON object that this program has written. UserError where it is damaged."""
  try:
    with open(path) as f:
      value = json.load(f)
  except ValueError as e:  # also bytes that are no text
    raise damaged(path, " ".join(str(e).split())) from e
  if not isinstance(value, dict):
    raise damaged(path, "no JSON object")
  return value


def damaged(path: str, how: str) -> UserError:
  """What to say of a file that is not as this program wrote it."""
  name = os.path.basename(path)
  do = "delete it, and the same command makes it again"
  if name == "config.json":
    do = "put it back, or delete it and give --config as the run's first command did (the checkpoints know their settings)"
  elif re.fullmatch(r"eval_(all_)?\d+\.json", name):
    do = ("put it back, or delete it: a run that goes on from its step makes it again, and with checkpoint.best a checkpoint has "
          "without it the score that it was saved with")
  return UserError(f"{path}: damaged ({how}); {do}")


def write_json(path: str, value: dict) -> None:
  """Writes in one move: a reader never sees half a file."""
  with open(path + ".part", "w") as f:
    json.dump({k: finite(v) for k, v in value.items()}, f, indent=2)
    f.write("\n")
  os.replace(path + ".part", path)
