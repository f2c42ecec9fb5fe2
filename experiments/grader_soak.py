"""Soaks the grader, and asks how often it accepts a wrong answer. Needs the JSONL files of README.md's table.

  python -m experiments.grader_soak --data=DIR [--case=references,counted,pairs,mutated,speed,soak]
                                    [--items=20000] [--pairs=10000]
                                    [--out=experiments/results/rewards]

References: every reference answer in FORMS, graded against itself: all must be right. Writes references.jsonl.
Counted: integers with what the problem asks for ("how many red apples did" gives 5\\text{ red apples}), up to five words, each
against the integer: all are right, and some are missed. Writes counted.jsonl: counts, then every phrase that is missed.
Soak: `items` gradings, 2% hostile, 2 workers, default limits, in batches as a training step makes them, while workers are
killed at random moments. Each item's right grade is known and differs from its neighbours', so a lost, repeated or reordered
result shows as an unexpected one. Writes soak.jsonl: the soak, and the same without hostile items and kills.
Wrong pairs: the reference answer of one problem, boxed, graded against that of another of the same file, where the texts
differ: `pairs` drawn from all problems, and as many from those whose answers are no integers. Writes wrong_pairs.jsonl: counts,
then every accepted pair.
Speed: gradings a second, and the seconds of what takes long (speed.jsonl).
Mutated: `mutated` reference answers with one digit, sign, bracket, function or operation changed, each against itself unchanged:
none may be right unless the change says the same (-0 for 0). Writes mutated.jsonl: counts, then every accepted pair.
"""

import argparse
from collections import Counter
import itertools
import json
import os
from pathlib import Path
import platform
import random
import re
import signal
import threading
import time

from arrol_jax import config
from arrol_jax.data.problems import load_problems
from arrol_jax.rewards import Grader
from arrol_jax.rewards.grade import CORRECT, judge
from arrol_jax.types import UserError

BATCH = 512
HOSTILE = ["9**9**9**9", "9^{9^{9^{9}}}", "9!!!!!!!!", "(((((((9!)!)!)!)!)!)!", "{" * 500 + "1" + "}" * 500,
           "+".join(["x^2"] * 2000), "x" * 100_000, r"\boxed{" * 500, "1e999999999", r"\frac{1}{1e-999999999}",
           r"\sum_{n=1}^{10^{9}} \frac{1}{n!}", "(" * 140 + "x" + ")" * 140, "1/0", r"\int_0^1 e^{e^{e^{x^9}}} dx",
           "\x00\ud800", r"\input{/etc/passwd}", "12} wait \\boxed{11", r"10^{10^{10}}!", "x^{x^{x^{x^{x^{x}}}}}",
           "+".join(f"\\frac{{{i}}}{{x+{i}}}" for i in range(1, 18))]


FORMS = (r"\boxed{%s}", r"$\boxed{$ %s $}$", r"\boxed{\left. %s.}", r"\boxed{\displaystyle %s}")


def references(files: dict[str, list]) -> list[dict]:
  """A line a file: reference answers, and those that are not right in some form, inline, without math-verify."""
  out = []
  for name, problems in files.items():
    start = time.monotonic()
    missed = [[form % p.answer, p.answer] for p in problems for form in FORMS if judge(form % p.answer, p.answer) != CORRECT]
    out.append({"case": "references", "file": name, "answers": len(problems), "forms": len(FORMS), "missed": missed,
                "seconds": round(time.monotonic() - start, 1)})
  return out


_ASKED = re.compile(r"[Hh]ow many ((?:[a-z-]+ ?){1,5})")
_AFTER = frozenset("did does do are is were was will can could would has have had should must in of at on for to if per from "
                   "that the a an and he she it they there you i left be still remain less than with who more each".split())


def counted(files: dict[str, list]) -> tuple[dict, list[dict]]:
  """Counts, and the phrases that are missed, of integers with the words that the problem asks for."""
  asked, missed = 0, Counter()
  for problem in (problem for problems in files.values() for problem in problems if re.fullmatch("-?[0-9]+", problem.answer)):
    words = (_ASKED.findall(problem.problem) or [""])[-1].split()
    phrase = " ".join(itertools.takewhile(lambda word: word not in _AFTER, words))
    if phrase:
      asked += 1
      missed[phrase] += judge(f"\\boxed{{{problem.answer}\\text{{ {phrase}}}}}", problem.answer) != CORRECT
  return ({"case": "counted", "answers": asked, "missed": missed.total()},
          [{"case": "counted", "phrase": phrase, "missed": times} for phrase, times in missed.most_common() if times])


def soak_items(golds: list[str], count: int, hostile: float, rng: random.Random) -> list[tuple[str, str, float, str]]:
  """(response, gold, the right grade, kind) of `count` items."""
  out = []
  for i in range(count):
    if rng.random() < hostile:
      out.append((f"\\boxed{{{rng.choice(HOSTILE)}}}", rng.choice(["12", r"\sqrt{2}", "x^2+1"]), 0.0, "hostile"))
    elif rng.random() < 0.5:  # the answer of a file, or a number that none has: settled inline, most of them
      gold, right = rng.choice(golds), rng.random() < 0.5
      out.append((f"\\boxed{{{gold if right else f'{i}.123'}}}", gold, float(right), "file"))
    else:  # settled by math-verify in a worker
      right = rng.random() < 0.5
      out.append((f"\\boxed{{{i + (not right)}+x}}", f"x+{i}", float(right), "worker"))
  return out


def resident_mb(pid: int | str) -> float:
  """Resident memory of a process in MiB; 0.0 if it is gone."""
  try:
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024
  except (OSError, TypeError):
    return 0.0


class Assassin(threading.Thread):
  """Kills a random worker every `mean_s` seconds on average (None: never) and notes the largest memory seen."""

  def __init__(self, grader: Grader, mean_s: float | None, rng: random.Random):
    super().__init__(daemon=True)
    self.grader, self.mean_s, self.rng = grader, mean_s, rng
    self.kills, self.largest_worker, self.largest_parent, self.over = 0, 0.0, 0.0, threading.Event()

  def run(self):
    due = time.monotonic() + (self.rng.expovariate(1 / self.mean_s) if self.mean_s else 1e9)
    while not self.over.wait(0.1):
      processes = [w.process for w in self.grader._shared.workers if w.process is not None]
      self.largest_worker = max([self.largest_worker, *(resident_mb(p.pid) for p in processes)])
      self.largest_parent = max(self.largest_parent, resident_mb("self"))
      if processes and time.monotonic() > due:
        os.kill(self.rng.choice(processes).pid, signal.SIGKILL)
        self.kills += 1
        due = time.monotonic() + self.rng.expovariate(1 / self.mean_s)


def soak(golds: list[str], count: int, hostile: float, mean_s: float | None, workers: int, seed: int) -> dict:
  items = soak_items(golds, count, hostile, random.Random(seed))
  unexpected, slowest, before = [], 0.0, resident_mb("self")
  with Grader(workers) as grader:
    grader.grade_all([(r"\boxed{1+x}", "x+1")] * workers)  # workers are up before the clock starts
    assassin = Assassin(grader, mean_s, random.Random(seed + 1))
    assassin.start()
    start = time.monotonic()
    for first in range(0, count, BATCH):
      batch, began = items[first:first + BATCH], time.monotonic()
      grades = grader.grade_all([item[:2] for item in batch])
      slowest = max(slowest, time.monotonic() - began)
      unexpected += [{"item": first + i, "gold": item[1], "answer": item[0][:80], "kind": item[3], "reason": graded.reason}
                     for i, (item, graded) in enumerate(zip(batch, grades, strict=True))
                     if graded.reward != item[2] or item[3] != "hostile" and graded.reason not in ("correct", "wrong")]
      print(f"{first + len(batch)} of {count}, {time.monotonic() - start:.0f} s, {assassin.kills} kills", flush=True)
    seconds = time.monotonic() - start
    assassin.over.set()
    assassin.join()
    counts = grader.counts
  kinds = Counter(item[3] for item in items)
  return {"case": "soak", "items": count, "kinds": dict(kinds), "workers": workers, "kills": assassin.kills,
          "graded": counts.total() - workers, "unexpected": unexpected, "reasons": dict(counts), "seconds": round(seconds, 1),
          "gradings_s": round(count / seconds, 1), "slowest_batch_s": round(slowest, 1),
          "parent_mb": [round(before), round(assassin.largest_parent)], "largest_worker_mb": round(assassin.largest_worker)}


def wrong_pairs(files: dict[str, list], count: int, hard: bool, seed: int) -> tuple[dict, list[dict]]:
  """Counts, and the accepted ones, of pairs that are taken for wrong because their reference answers differ as texts."""
  rng, pairs = random.Random(seed), []
  pools = {name: [p.answer for p in problems if not hard or not re.fullmatch(r"-?[\d,]+", p.answer)]
           for name, problems in files.items()}
  names = [name for name, pool in pools.items() for _ in pool if len(set(pool)) > 20]
  while len(pairs) < count:
    name = rng.choice(names)
    gold, answer = rng.sample(pools[name], 2)
    if gold != answer:
      pairs.append((name, gold, answer))
  start = time.monotonic()
  with Grader(2) as grader:
    grades = grader.grade_all([(f"\\boxed{{{answer}}}", gold) for _, gold, answer in pairs])
    reasons = dict(grader.counts)
  accepted = [{"file": name, "gold": gold, "answer": answer}
              for (name, gold, answer), graded in zip(pairs, grades, strict=True) if graded.reward]
  line = {"case": "wrong pairs, no integers" if hard else "wrong pairs", "pairs": count, "accepted": len(accepted),
          "reasons": reasons, "seconds": round(time.monotonic() - start, 1)}
  return line, accepted


SWAPS = ((r"\sin", r"\cos"), (r"\pi", r"\pi^2"), (r"\sqrt", r"\sqrt[3]"), (r"\frac", r"\binom"), (r"\le", r"\ge"), ("<", ">"),
         (r"\cup", r"\cap"), (r"\infty", "1"), ("[", "("), ("(", "["), ("]", ")"), ("cm", "mm"), (r"\ln", r"\log_3 "), ("^", "_"))


def mutation(answer: str, rng: random.Random) -> str | None:
  """`answer` with one thing changed; None where this change finds nothing to change."""
  kind = rng.randrange(4)
  places = [m.start() for m in re.finditer(r"\d" if kind < 2 else "[+-]", answer)]
  if kind < 2 and places:
    i = rng.choice(places)
    return f"{answer[:i]}{(int(answer[i]) + rng.randrange(1, 10)) % 10}{answer[i + 1:]}"
  if kind == 2 and places:
    i = rng.choice(places)
    return answer[:i] + {"+": "-", "-": "+"}[answer[i]] + answer[i + 1:]
  found = [(old, new) for old, new in SWAPS if old in answer]
  return answer.replace(*rng.choice(found), 1) if kind == 3 and found else None


def mutated(golds: list[str], count: int, seed: int) -> tuple[dict, list[dict]]:
  """Counts, and the accepted ones, of answers that are a reference answer with one thing changed."""
  rng, pairs = random.Random(seed), []
  hard = [gold for gold in golds if not re.fullmatch(r"-?[\d,]+", gold)]
  while len(pairs) < count:
    gold = rng.choice(hard if rng.random() < 0.6 else golds)
    answer = mutation(gold, rng)
    if answer is not None and answer != gold:
      pairs.append((gold, answer))
  start = time.monotonic()
  with Grader(2) as grader:
    grades = grader.grade_all([(f"\\boxed{{{answer}}}", gold) for gold, answer in pairs])
    reasons = dict(grader.counts)
  accepted = [{"gold": gold, "answer": answer} for (gold, answer), graded in zip(pairs, grades, strict=True) if graded.reward]
  return {"case": "mutated", "pairs": count, "accepted": len(accepted), "reasons": reasons,
          "seconds": round(time.monotonic() - start, 1)}, accepted


# What algebra takes long over: (response's answer, reference answer).
SLOW = {"definite integral": (r"\int_0^1 e^{-x^2} dx", r"\int_{0}^{1} \frac{1}{e^{x^2}} dx"),
        "sum of 20 sines": ("+".join(rf"\sin({i}x)" for i in range(1, 21)), "+".join(rf"\sin({i}x)" for i in range(20, 0, -1))),
        "16 radicals reversed": ("+".join(rf"\sqrt{{{i}}}" for i in range(2, 18)),
                                 "+".join(rf"\sqrt{{{i}}}" for i in range(17, 1, -1)))}
MIXED = [(r"\binom{n}{2}", r"\frac{n(n-1)}{2}"),
         (r"\sqrt{12}+1", r"1+2\sqrt3"), (r"\sin^2 x", r"1-\cos^2 x"), (r"(x+1)^3", "x^3+3x^2+3x+1"),
         (r"\frac{1}{\sqrt2+1}", r"\sqrt2-1"), (r"2^{n+1}", r"2\cdot 2^n"), (r"\ln 8", r"3\ln 2"), ("x^2-1", "x^2+1")]


def worker_seconds(grader: Grader) -> float:
  """Seconds of a core that the workers have had; a machine shared with other work stretches all others."""
  fields = [Path(f"/proc/{w.process.pid}/stat").read_text().rpartition(")")[2].split() for w in grader._shared.workers]
  return sum(int(x[11]) + int(x[12]) for x in fields) / os.sysconf("SC_CLK_TCK")


def speed(count: int = 100_000) -> list[dict]:
  """Gradings a second, of one core inline and of one worker, and the seconds of what takes long."""
  rng, out = random.Random(5), []
  integers = [(f"So \\boxed{{{rng.randrange(10**6)}}}", str(rng.randrange(10**6))) for _ in range(count)]
  begun = time.process_time()
  for response, gold in integers:
    judge(response, gold)
  out.append({"case": "speed", "of": "integers, inline", "gradings_s_of_a_core": round(count / (time.process_time() - begun))})
  with Grader(1) as grader:
    box = lambda pair: (f"\\boxed{{{pair[0]}}}", pair[1])
    grader.grade_all([box(("1+x", "x+2"))])  # the worker is up
    begun, spent = time.monotonic(), worker_seconds(grader)
    first, = grader.grade_all([box((r"\frac{3x}{2}+y", "1.5x+y"))])
    out.append({"case": "speed", "of": "first expression, worker up", "seconds": round(time.monotonic() - begun, 3),
                "reason": first.reason, "cpu_seconds": round(worker_seconds(grader) - spent, 2)})
    for name, pairs in (("sums", [(f"{i}+x+{i % 2}", f"x+{i}") for i in range(200)]), ("eight expressions", MIXED * 5)):
      spent = worker_seconds(grader)
      grades = grader.grade_all(map(box, pairs))
      out.append({"case": "speed", "of": f"{name}, one worker", "reasons": dict(Counter(graded.reason for graded in grades)),
                  "gradings_s_of_a_core": round(len(pairs) / (worker_seconds(grader) - spent), 1)})
    for name, pair in SLOW.items():
      begun, spent = time.monotonic(), worker_seconds(grader)
      graded, = grader.grade_all([box(pair)])
      out.append({"case": "speed", "of": name, "seconds": round(time.monotonic() - begun, 3), "reason": graded.reason,
                  "cpu_seconds": round(worker_seconds(grader) - spent, 2)})
  return out


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--data", required=True)
  parser.add_argument("--out", default="experiments/results/rewards")
  parser.add_argument("--case", default="references,counted,pairs,mutated,speed,soak")
  parser.add_argument("--items", type=int, default=20_000)
  parser.add_argument("--pairs", type=int, default=10_000)
  parser.add_argument("--mutated", type=int, default=4_000)
  parser.add_argument("--kill_every", type=float, default=5.0, help="seconds, mean")
  args = parser.parse_args()
  files = {path.stem: load_problems(str(path)) for path in sorted(Path(args.data).glob("*.jsonl"))}
  if not files:
    raise UserError(f"--data={args.data}: no .jsonl files there")
  golds = [problem.answer for problems in files.values() for problem in problems]
  machine = {"device": f"{os.cpu_count()} CPU cores, Python {platform.python_version()}",
             "command": f"python -m experiments.grader_soak --items={args.items} --pairs={args.pairs}"}
  out = Path(args.out)
  out.mkdir(parents=True, exist_ok=True)
  if "references" in args.case:
    write(out / "references.jsonl", (line | machine for line in references(files)))
  if "counted" in args.case:
    line, missed = counted(files)
    write(out / "counted.jsonl", [line | machine, *missed])
  if "pairs" in args.case:
    found = [wrong_pairs(files, args.pairs, hard, seed=2 + hard) for hard in (False, True)]
    accepted = [{"case": line["case"]} | pair for line, pairs in found for pair in pairs]
    write(out / "wrong_pairs.jsonl", [*(line | machine for line, _ in found), *accepted])
  if "mutated" in args.case:
    line, accepted = mutated(golds, args.mutated, seed=4)
    write(out / "mutated.jsonl", [line | machine, *({"case": "mutated"} | pair for pair in accepted)])
  if "speed" in args.case:
    write(out / "speed.jsonl", (line | machine for line in speed()))
  if "soak" in args.case:
    write(out / "soak.jsonl", ({"name": name} | soak(golds, args.items, hostile, mean_s, workers=2, seed=0) | machine
                               for name, hostile, mean_s in (("clean", 0.0, None),
                                                             ("hostile, workers killed", 0.02, args.kill_every))))


def write(path: Path, lines) -> None:
  with open(path, "w") as file:
    for line in lines:
      print(json.dumps(line), flush=True)
      file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
  config.run(main)
