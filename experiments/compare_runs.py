"""Compares runs in a Markdown table: accuracy before and after, seconds a phase, keep ratio, balance, the head.

  python -m experiments.compare_runs WORKDIR WORKDIR [WORKDIR ...] [--skip=14]

Reads metrics.jsonl and summary.json ("-" where a run has not come to its end). The first `skip` steps (compilation, cold
start) are left out of phases and means. Seconds and tokens of the later runs also stand as a share of the first's.
"""

import json
import os
from pathlib import Path

import numpy as np

from arrol_jax import config
from experiments.plot_run import read, to_compare

PHASES = ("sec_generate", "sec_reward", "sec_logprob", "sec_update", "sec_step")
MEANS = ("reward", "reward_ipw", "keep_ratio", "pos_ratio", "pos_var", "groups_mixed", "head_auc", "head_auc_within", "head_ece",
         "logprob_gap", "response_len", "truncated")


def relative(values: list[float | None], form: str) -> list[str]:
  """Figures as text, those after the first with their share of it."""
  first = values[0]
  share = lambda v: f" ({v / first:.2f})" if first and first > 0.005 else ""
  return ["-" if v is None else format(v, form) + (share(v) if i else "") for i, v in enumerate(values)]


def rows(workdirs: list[str], skip: int) -> list[list[str]]:
  """Label and each run's figure, of every line of the table, as text."""
  runs = [read(w) for w in workdirs]
  ends = [Path(w, "summary.json") for w in workdirs]
  summaries = [json.loads(path.read_text()) if path.exists() else {} for path in ends]
  cell = lambda x: "-" if x is None else f"{100 * x['accuracy']:.1f}% ± {100 * x['ci95']:.1f}"
  out = []
  for when in ("eval_before", "eval_after"):
    for name in dict.fromkeys(n for s in summaries for n in s.get(when, {})):
      held_out = [s.get(when, {}).get(name) for s in summaries]
      out.append([f"{name} {when[5:]}, greedy", *(cell(x) for x in held_out)])
      out.append([f"- tokens, cut off, {when[5:]}", *(f"{x['response_len']:.0f}, {100 * x['truncated']:.1f}%"
                                                       if x and "truncated" in x else "-" for x in held_out)])
  for name in PHASES:
    out.append([f"{name}, median", *relative([float(np.median(m[name][skip:])) for m in runs], ".2f")])
  for name in MEANS:
    values = [m[name][skip:] for m in runs]
    out.append([f"{name}, mean", *(f"{np.nanmean(v):.3g}" if np.isfinite(v).any() else "-" for v in values)])
  for name in ("tokens_generated", "tokens_trained"):
    out.append([f"{name}, whole run", *relative([float(np.sum(m[name])) for m in runs], ",.0f")])
  out.append(["seconds, whole run", *relative([s.get("seconds") for s in summaries], ",.0f")])
  return out


def main():
  workdirs, skip = to_compare("compare_runs", __doc__, 14)
  found, names = rows(workdirs, skip), [os.path.basename(os.path.normpath(w)) for w in workdirs]
  print(f"| steps {skip + 1} to the end | {' | '.join(names)} |\n|{'---|' * (len(names) + 1)}")
  for row in found:
    print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
  config.run(main)
