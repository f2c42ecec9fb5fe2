"""Evaluations in a run's folder, a file each: eval_before.json; of eval.subset behind step NNNN eval_NNNN.json, of all problems
eval_all_NNNN.json; eval_after.json. Each maps sources to results (learning/evaluation.py).

A step's line and, with checkpoint.best, a checkpoint's score say what these files say. Left out: making them (course.py).
"""

from collections.abc import Iterable
import os
import re

from arrol_jax.running.json_files import damaged, read_json
from arrol_jax.running.lines import is_number


def steps(workdir: str) -> dict[str, int]:
  """Names of the evaluations behind steps, and the step of each."""
  found = map(re.compile(r"(eval_(?:all_)?(\d+))\.json").fullmatch, sorted(os.listdir(workdir)))
  return {match[1]: int(match[2]) for match in found if match}


def remove(workdir: str, names: Iterable[str]) -> list[str]:
  """Removes NAME.json of each that is there; their names."""
  there = [name for name in names if os.path.exists(f"{workdir}/{name}.json")]
  for name in there:
    os.remove(f"{workdir}/{name}.json")
  return there


def read_results(path: str, names: Iterable[str] = ()) -> dict:
  """An evaluation's results by source. UserError where its file is damaged, or has no accuracy of one of `names`, or of any."""
  results = read_json(path)
  for name in dict.fromkeys([*names, *results]):
    of = results.get(name)
    if not (isinstance(of, dict) and is_number(of.get("accuracy")) and is_number(of.get("problems")) and of["problems"] > 0):
      raise damaged(path, f"no accuracy of {name}")
  if not results:
    raise damaged(path, "no results")
  return results


def held_out_line(results: dict) -> dict:
  """What a step's line says of its evaluation: accuracy over all problems, and by source where there are several."""
  count = sum(x["problems"] for x in results.values())
  out = {"held_out_accuracy": sum(x["accuracy"] * x["problems"] for x in results.values()) / count}
  return out | ({f"held_out_accuracy/{name}": x["accuracy"] for name, x in results.items()} if len(results) > 1 else {})


def scores(workdir: str, best: str, saved: Iterable[int]) -> dict[int, float]:
  """The figure `best` of a step's line by step, of the `saved` steps with an evaluation of eval.subset. UserError where its file
  is damaged."""
  paths = {step: f"{workdir}/eval_{step:04d}.json" for step in saved}
  lines = {step: held_out_line(read_results(path)) for step, path in paths.items() if os.path.exists(path)}
  return {step: line[best] for step, line in lines.items() if best in line}
