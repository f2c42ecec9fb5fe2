"""What users meet, tried as they would: 20 kinds of mistakes and surprises of training, data and models, a line each.

  python -m experiments.user_cases [--only=1,7,19] [--out=experiments/results/user_cases/cases.txt]

Each row is tried with the example that was reported and a few others of its kind, through the commands on the quickstart's model
(CPU), or through functions where no command shows it (3, 20). It prints `OK row name: what was seen`, `FAILED ...` or
`skipped ...: why` (7 needs root and chattr, 12 pip). The status is 1 if any row failed. The rows are functions of
user_cases_runs.py, user_cases_inputs.py and user_cases_statistics.py.
"""

import argparse
import os
from pathlib import Path
import signal
import sys
import tempfile
import time
import traceback

from experiments import user_cases_inputs as inputs, user_cases_runs as runs, user_cases_statistics as figures

ROWS = {
  1: ("rewards of any size", runs.rewards_of_any_size), 2: ("signatures of reward functions", runs.reward_signatures),
  3: ("rope_scaling beside rope_parameters", inputs.rope_scaling), 4: ("longer than the model's positions", inputs.positions),
  5: ("token ids beyond the embedding", inputs.ids_beyond_the_embedding),
  6: ("several chat templates", runs.several_chat_templates), 7: ("checkpoints that cannot be written", runs.unwritable),
  8: ("two runs in one folder", runs.two_runs), 9: ("checkpoints that are gone", runs.lost_checkpoints),
  10: ("other memory and speed", runs.memory_and_speed_may_change), 11: ("data or weights that changed", runs.inputs_changed),
  12: ("the wheel in an empty folder", inputs.wheel), 13: ("make with an old Python", inputs.old_python),
  14: ("numbers out of range", inputs.numbers_out_of_range), 15: ("-h of each command", inputs.help_texts),
  16: ("Ctrl-C, SIGHUP, SIGTERM", runs.signals), 17: ("paths and files of other kinds", inputs.paths),
  18: ("machines, damaged files, NaN", inputs.machines_and_damage),
  19: ("no stop, two BOS, prompts that are over", inputs.stops_and_begins),
  20: ("statistics", figures.statistics),
}


def tried(number: int) -> str:
  """A row's line."""
  name, row = ROWS[number]
  with tempfile.TemporaryDirectory() as folder:
    try:
      seen = f"OK {number} {name}: {row(Path(folder).resolve())}"
    except runs.Skipped as e:
      seen = f"skipped {number} {name}: {e}"
    except Exception as e:
      traceback.print_exc()
      seen = f"FAILED {number} {name}: {type(e).__name__}: {e}"
    return " ".join(seen.split()).replace(folder, "DIR")


def main():
  parser = argparse.ArgumentParser(prog="python -m experiments.user_cases", description=__doc__.partition("\n")[0])
  parser.add_argument("--only", default=",".join(map(str, ROWS)), help="rows, separated by commas (default: all)")
  parser.add_argument("--out", default="", help="a file for the lines")
  a = parser.parse_args()
  for number in (signal.SIGINT, signal.SIGHUP):  # ignored in the background, and by what is started there
    signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
  begun, lines = time.monotonic(), []
  for number in map(int, a.only.split(",")):
    started = time.monotonic()
    lines.append(tried(number))
    print(lines[-1], flush=True)
    print(f"  {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
  count = lambda word: sum(x.startswith(word) for x in lines)
  lines.append(f"{count('OK')} OK, {count('FAILED')} FAILED, {count('skipped')} skipped in {time.monotonic() - begun:.0f} s "
               f"(python -m experiments.user_cases, {os.cpu_count()} CPU cores)")
  print(lines[-1])
  if a.out:
    Path(a.out).parent.mkdir(parents=True, exist_ok=True)
    Path(a.out).write_text("\n".join(lines) + "\n")
  sys.exit(int(count("FAILED") > 0))


if __name__ == "__main__":
  main()
