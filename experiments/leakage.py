"""Problems that training and evaluation sources share, exactly or nearly, as a Markdown table.

  python -m experiments.leakage --folder=DIR [--train=gsm8k,math,dapo_math_17k] [--eval=gsm8k,...] [--near=0.5]
                                [--out=experiments/results/leakage]

A text is its tokens: LaTeX commands, words in lower case, numbers, single CJK characters; spacing, punctuation and $ are
nothing. Exact: the same tokens. Near: Jaccard similarity of the sets of 5 consecutive tokens of at least --near with some
training problem, found through an inverted index, so no pair that shares anything is missed. Of the near ones it tells how
many have the same numbers in the same order and how many the same answer: the others are mostly the same exercise with other
numbers. Writes table.md and pairs.jsonl (ids, similarity, no texts). Sources as in arrol_jax/data/sources.py.
"""

import argparse
from collections import defaultdict
import json
from pathlib import Path
import re

import numpy as np

from arrol_jax import config
from arrol_jax.data import sources
from arrol_jax.rewards.grade import CORRECT, judge

TOKEN = re.compile(r"\\[A-Za-z]+|[\u3400-\u9fff]|[^\W_\u3400-\u9fff]+|[-+*/=<>^]")
LAYOUT = {"\\left", "\\right", "\\text", "\\mathrm", "\\displaystyle", "\\quad", "\\qquad", "\\mbox", "\\textbf", "\\rm"}
SIZE = 5


def tokens(text: str) -> list[str]:
  text = re.sub(r"\\[dt]frac", r"\\frac", text)
  return [t if t[0] == "\\" else t.casefold() for t in TOKEN.findall(text) if t not in LAYOUT]


def shingles(words: list[str]) -> set[tuple[str, ...]]:
  """Every SIZE consecutive tokens; of a shorter text the whole."""
  return {tuple(words[i:i + SIZE]) for i in range(max(1, len(words) - SIZE + 1))}


class Index:
  """Training problems by their shingles."""

  def __init__(self, problems: list):
    self.problems = problems
    self.words = [tokens(p.problem) for p in problems]
    postings, self.sizes = defaultdict(list), np.zeros(len(problems), int)
    for i, words in enumerate(self.words):
      own = shingles(words)
      self.sizes[i] = len(own)
      for shingle in own:
        postings[shingle].append(i)
    self.postings = {shingle: np.array(where, np.int32) for shingle, where in postings.items()}

  def nearest(self, words: list[str]) -> tuple[int, float]:
    """The training problem of the largest Jaccard similarity to a text's tokens; (-1, 0.0) where nothing is shared."""
    own = shingles(words)
    found = [self.postings[shingle] for shingle in own if shingle in self.postings]
    if not found:
      return -1, 0.0
    where, shared = np.unique(np.concatenate(found), return_counts=True)
    similarity = shared / (self.sizes[where] + len(own) - shared)
    best = int(np.argmax(similarity))
    return int(where[best]), float(similarity[best])


def overlaps(index: Index, problems: list, near: float) -> list[dict]:
  """For each evaluation problem with a near or exact counterpart: ids and what they share."""
  exact = {tuple(words): i for i, words in reversed(list(enumerate(index.words)))}
  out = []
  for problem in problems:
    words = tokens(problem.problem)
    i, similarity = index.nearest(words)
    same = exact.get(tuple(words))
    if same is None and similarity < near:
      continue
    i = i if same is None else same
    other = index.problems[i]
    numbers = [[w for w in text if w.isdecimal()] for text in (words, index.words[i])]
    out.append({"eval": problem.id, "train": other.id, "exact": same is not None, "similarity": round(similarity, 3),
                "same_numbers": numbers[0] == numbers[1],
                "same_answer": judge(f"\\boxed{{{problem.answer}}}", other.answer) == CORRECT})
  return out


def table(rows: list[dict]) -> str:
  lines = ["| train | problems | evaluation | problems | exact | near | of these same numbers | same numbers and answer |",
           "|---|---|---|---|---|---|---|---|"]
  for row in rows:
    near = [pair for pair in row["pairs"] if not pair["exact"]]
    cells = [row["train"], row["train_problems"], row["eval"], row["eval_problems"], len(row["pairs"]) - len(near), len(near),
             sum(p["same_numbers"] for p in near), sum(p["same_numbers"] and p["same_answer"] for p in near)]
    lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
  return "\n".join(lines)


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--folder", default="", help="where benchmarks' files are")
  parser.add_argument("--train", default="gsm8k,math,dapo_math_17k")
  parser.add_argument("--eval", default="gsm8k,math,math500,amc23,aime24,aime25,minerva_math,olympiadbench")
  parser.add_argument("--near", type=float, default=0.5)
  parser.add_argument("--out", default="experiments/results/leakage")
  args = parser.parse_args()
  rows = []
  held_out = {name: sources.load_problems(name, "test", args.folder) for name in sources.split_list(args.eval)}
  for train in sources.split_list(args.train):
    index = Index(sources.load_problems(train, "train", args.folder))
    rows += [{"train": train, "train_problems": len(index.problems), "eval": name, "eval_problems": len(problems),
              "pairs": overlaps(index, problems, args.near)} for name, problems in held_out.items()]
  out = Path(args.out)
  out.mkdir(parents=True, exist_ok=True)
  print(table(rows))
  (out / "table.md").write_text(table(rows) + f"\n\nNear: similarity of at least {args.near}; `python -m experiments.leakage`.\n")
  with open(out / "pairs.jsonl", "w") as file:
    for row in rows:
      file.writelines(json.dumps({"benchmarks": [row["train"], row["eval"]]} | pair) + "\n" for pair in row["pairs"])


if __name__ == "__main__":
  config.run(main)
