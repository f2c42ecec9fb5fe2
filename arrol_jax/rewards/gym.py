"""Tasks of reasoning-gym as problems with a reward: the config's reward.function=arrol_jax.rewards.gym.score.

A problem's answer is a JSON object that says which entry of which data set it is; the worker makes the same entry
again and asks the task's own `score_answer`. That gives partial credit, even for an answer somewhere in a longer
text, so the final answer is extracted first and only a score of exactly 1 counts. Some tasks evaluate an answer as
an expression: workers bound time and memory, and guard against mistakes, not against hostile code. What a task takes
for right is the task's: game_of_life_halting takes any text that is not True for False. Reading such problems is
sources.py's; importing this module imports reasoning-gym, which only workers do.
"""

import contextlib
import functools
import hashlib
import json
import sys

import reasoning_gym  # an extra, and seconds to import: here, so that a worker has it before an item's time runs

from arrol_jax.rewards.extract import extract_answer
from arrol_jax.rewards.grade import grade


def print_entries(task: str, options: str) -> None:
  """[question, its digest] of all entries as one line of JSON. `options`: the config's fields, as sorted JSON."""
  with contextlib.redirect_stdout(sys.stderr):  # some tasks print
    dataset = _dataset(task, options)
    questions = [dataset[i]["question"] for i in range(len(dataset))]
  print(json.dumps([(question, _digest(question)) for question in questions]))


def score(response: str, answer: str, pattern: str | None = None) -> float:
  """1.0 if the task accepts the response's final answer in full, else 0.0; other problems go to `grade`.

  Raises RuntimeError where the installed reasoning-gym makes another entry than the problem was read from.
  """
  try:
    entry_of = json.loads(answer)
  except ValueError:
    entry_of = None
  if not isinstance(entry_of, dict) or "reasoning_gym" not in entry_of:
    return grade(response, answer, pattern)
  found = extract_answer(response, pattern)
  if found is None:
    return 0.0
  dataset = _dataset(entry_of["reasoning_gym"], json.dumps(entry_of["options"], sort_keys=True))
  entry = dataset[entry_of["index"]]
  if _digest(entry["question"]) != entry_of["question"]:
    raise RuntimeError("reasoning-gym does not make the entry again that the problem was read from")
  return float(dataset.score_answer(found.strip(), entry) == 1.0)


@functools.lru_cache(maxsize=8)
def _dataset(task: str, options: str):
  return reasoning_gym.create_dataset(task, **json.loads(options))


def _digest(text: str) -> str:
  return hashlib.sha256(text.encode()).hexdigest()[:12]
