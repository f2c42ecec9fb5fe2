"""Compares two runs in a Markdown table: accuracy before and after, seconds a phase, keep ratio, balance, the head.

  python -m experiments.compare_runs WORKDIR WORKDIR [--skip=14]

Reads metrics.jsonl and summary.json. The first `skip` steps (compilation, cold start) are left out of all but the first rows.
The last column is the second run's figure over the first's, for seconds and tokens.
"""

import json
import os
import sys

import numpy as np

from experiments.plot_run import read

PHASES = ("sec_generate", "sec_reward", "sec_logprob", "sec_update", "sec_step")
MEANS = ("reward", "reward_ipw", "keep_ratio", "pos_ratio", "pos_var", "groups_mixed", "head_auc", "head_auc_within", "head_ece",
         "logprob_gap", "response_len", "truncated")


def rows(workdirs: list[str], skip: int) -> list[tuple]:
  """(label, figure of the first, figure of the second, ratio or "") of every line of the table, as text."""
  runs = [{k: v[skip:] for k, v in read(w).items()} for w in workdirs]
  summaries = [json.load(open(f"{w}/summary.json")) for w in workdirs]
  out = []
  for when in ("eval_before", "eval_after"):
    for name in summaries[0][when]:
      cells = [f"{100 * s[when][name]['accuracy']:.1f}% ± {100 * s[when][name]['ci95']:.1f}" for s in summaries]
      out.append((f"{name} {when[5:]} ({summaries[0][when][name]['problems']} problems)", *cells, ""))
  for name in PHASES:
    a, b = (float(np.median(m[name])) for m in runs)
    out.append((f"{name}, median", f"{a:.2f}", f"{b:.2f}", f"{b / a:.2f}" if a > 0.005 else ""))
  for name in MEANS:
    out.append((f"{name}, mean", *(f"{np.nanmean(m[name]):.3g}" for m in runs), ""))
  for name in ("tokens_generated", "tokens_trained", "seconds"):
    a, b = (s[name] for s in summaries)
    out.append((f"{name}, whole run", f"{a:,.0f}", f"{b:,.0f}", f"{b / a:.2f}"))
  return out


def main():
  workdirs = [a for a in sys.argv[1:] if not a.startswith("--")]
  skip = int(next((a.partition("=")[2] for a in sys.argv[1:] if a.startswith("--skip=")), 14))
  if len(workdirs) != 2:
    sys.exit("error: give the workdirs of two runs")
  missing = [f"{w}/{f}" for w in workdirs for f in ("metrics.jsonl", "summary.json") if not os.path.exists(f"{w}/{f}")]
  if missing:
    sys.exit(f"error: {missing[0]} does not exist; both runs must have finished")
  names = [os.path.basename(os.path.normpath(w)) for w in workdirs]
  print(f"| steps {skip + 1} to the end | {names[0]} | {names[1]} | ratio |\n|---|---|---|---|")
  for row in rows(workdirs, skip):
    print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
  main()
