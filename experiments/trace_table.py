"""Where the time of a profiled run went: python -m experiments.trace_table DIR

Reads the trace that `python -m arrol_jax.bench ... --profile=DIR` wrote and prints device time by operation (numbers in
names dropped), how often each ran, how long the device was busy and idle between its first and last operation, and what it
waited for.
"""

import collections
import gzip
import json
from pathlib import Path
import re
import sys

from arrol_jax import config
from arrol_jax.types import UserError


def device_events(path: Path) -> list[dict]:
  """Events of the device streams, in order of time."""
  events = json.loads(gzip.open(path).read())["traceEvents"]
  names = {e["pid"]: e["args"]["name"] for e in events if e.get("name") == "process_name"}
  threads = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e.get("name") == "thread_name"}
  device = lambda e: "/device:" in names.get(e["pid"], "") and "Stream" in threads.get((e["pid"], e.get("tid")), "")
  return sorted((e for e in events if e.get("ph") == "X" and device(e)), key=lambda e: e["ts"])


def main():
  if len(sys.argv) < 2 or not Path(sys.argv[1]).is_dir():
    raise UserError("give the folder that --profile wrote: python -m experiments.trace_table DIR")
  files = sorted(Path(sys.argv[1]).rglob("*.trace.json.gz"))
  events = device_events(files[-1]) if files else []
  if not events:
    raise UserError(f"{sys.argv[1]}: no device events in it (a CPU writes none)")
  total, count, idle, last, busy = collections.Counter(), collections.Counter(), collections.Counter(), events[0]["ts"], 0.0
  for e in events:
    name = re.sub(r"[._]*\d+", "", f"{e.get('args', {}).get('hlo_op', '')} [{e['name'][:60]}]")
    total[name] += e["dur"]
    count[name] += 1
    idle[name] += max(0.0, e["ts"] - last)
    busy += max(0.0, e["ts"] + e["dur"] - max(last, e["ts"]))
    last = max(last, e["ts"] + e["dur"])
  span = last - events[0]["ts"]
  print(f"device busy {busy / 1e3:.2f} ms of {span / 1e3:.2f} ms ({100 * busy / span:.1f}%), {len(events)} operations\n")
  print("| ms | share | times | us each | operation |\n|---|---|---|---|---|")
  for name, us in total.most_common(40):
    print(f"| {us / 1e3:.2f} | {100 * us / busy:.1f}% | {count[name]} | {us / count[name]:.1f} | {name} |")
  print("\n| idle ms | before operation |\n|---|---|")
  for name, us in idle.most_common(8):
    print(f"| {us / 1e3:.2f} | {name} |")


if __name__ == "__main__":
  config.run(main)
