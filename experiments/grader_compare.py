"""Gradings a second of two versions of the grader, in turn: python -m experiments.grader_compare --before=DIR [--times=3]

DIR holds the older arrol_jax (git archive COMMIT arrol_jax | tar x -C DIR). A JSON line a version and time, in
results/rewards/compare.jsonl: gradings by the seconds of a core that this process and its one worker took, so other work on
the machine counts little.
"""

import argparse
import json
import os
from pathlib import Path
import random
import subprocess
import sys
import time

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "experiments/results/rewards/compare.jsonl"


def sets() -> dict[str, list[tuple[str, str]]]:
  """Pairs of an answer and a reference by what they are."""
  from experiments.grader_soak import MIXED
  rng = random.Random(3)
  fraction = lambda: f"\\frac{{{rng.randrange(1, 999)}}}{{{rng.randrange(1, 999)}}}"
  return {"integers": [(str(rng.randrange(10**6)), str(rng.randrange(10**6))) for _ in range(20_000)],
          "fractions": [(fraction(), fraction()) for _ in range(3000)],
          "sums": [(f"{i}+x+{i % 2}", f"x+{i}") for i in range(400)],
          "products": [(f"(x+{i})(x-{i % 7})", f"x^2+{i - i % 7}x-{i * (i % 7)}") for i in range(200)],
          "eight expressions": MIXED * 10}


def spent() -> float:
  """Seconds of a core of this process and its children."""
  ticks = 0
  for path in Path("/proc").glob("[0-9]*/stat"):
    try:
      fields = path.read_text().rpartition(")")[2].split()
    except OSError:  # it has ended
      continue
    ticks += (int(fields[1]) == os.getpid()) * (int(fields[11]) + int(fields[12]))
  return ticks / os.sysconf("SC_CLK_TCK") + time.process_time()


def measure(pairs_of: dict) -> dict:
  """Gradings a second and how many were right, by the arrol_jax that is imported."""
  from arrol_jax.rewards import Grader
  out = {}
  with Grader(1) as grader:
    box = lambda pair: (f"\\boxed{{{pair[0]}}}", pair[1])
    grader.grade_all([box(("1+x", "x+2"))])  # the worker is up
    for name, pairs in pairs_of.items():
      before = spent()
      rewards = [graded.reward for graded in grader.grade_all(map(box, pairs))]
      speed = round(len(pairs) / (spent() - before), 1)
      out[name] = {"gradings_s_of_a_core": speed, "right": sum(map(bool, rewards)), "of": len(pairs)}
  return out


def main():
  parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
  parser.add_argument("--before", help="folder of the older arrol_jax")
  parser.add_argument("--times", type=int, default=3)
  args = parser.parse_args()
  if not args.before:  # one measurement; its pairs come from the newer version
    print(json.dumps(measure(json.load(sys.stdin))))
    return
  pairs, lines = json.dumps(sets()), []
  for _ in range(args.times):
    for version, tree in (("before", Path(args.before).resolve()), ("now", ROOT)):
      done = subprocess.run([sys.executable, __file__], input=pairs, capture_output=True, text=True, check=True,
                            env=os.environ | {"PYTHONPATH": str(tree), "JAX_PLATFORMS": "cpu"})
      lines.append({"version": version, "command": f"python -m experiments.grader_compare --before=DIR --times={args.times}"}
                   | json.loads(done.stdout))
      print(json.dumps(lines[-1]), flush=True)
  OUT.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
  main()
