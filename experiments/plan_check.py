"""What the plan predicts for steps measured on one H100, and how far off it is: python -m experiments.plan_check [--fit]

Fitted are four numbers of planning/chips.py: `cache` and `layer` on the two static lines of decode_h100.jsonl (256 and 64 rows of
the 1.7B shape), `matrix` on today's update of that shape (update_once.jsonl) and of a pruned GSM8K step (0.5B,
preset_h100.jsonl), alike weighed, `rollout` on a GSM8K run's seconds on the host. `memory` is what the lines' own `floor`
measured of the data sheet. Every other line is held out. --fit fits them again and prints what chips.py should hold.

A line is predicted for the code that made it: whether a group's prompt was read once and computed once, and logits. Compilers
for GPUs are not at hand here: work is counted by hand (planning/work.py).
"""

import argparse
import functools
import json
from pathlib import Path
import statistics
from typing import NamedTuple

import numpy as np
from scipy import optimize

from arrol_jax import config as configuration
from arrol_jax.models.zoo import ZOO
from arrol_jax.planning import chips, rollout, work
from arrol_jax.planning.chips import Rates, Shares

RESULTS = Path(__file__).parent / "results"
PROMPT = 101  # mean tokens of a GSM8K prompt with its template
GSM8K = "qwen2.5-0.5b"


class Line(NamedTuple):
  """A measured time and what predicts it."""
  name: str
  measured: float    # seconds
  predict: object    # of Rates
  fitted: bool = False


def read(name: str) -> list[dict]:
  return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def counts_of(rows: int, buckets: int) -> list[int]:
  return sorted({n for n in (rows >> i for i in range(buckets)) if n == rows or n >= 64})


def generate(shape: str, line: dict, lengths: np.ndarray, how: rollout.Decoding, rates: Rates) -> float:
  """Seconds of prefill and decoding; line: "dtype", "cache", "shared", "load" (whether weights are loaded meanwhile)."""
  c, made = ZOO[shape], rollout.simulate(lengths, how)
  cost = work.decode_cost(c, "bfloat16", line.get("cache"), shared=line["shared"])
  texts = len(lengths) // how.group * line["padded"]
  return (cost.seconds(made, rates) + work.prefill_seconds(c, texts, rates) + line["load"] * work.load_seconds(c, rates))


def decode_lines() -> list[Line]:
  """W1: static and own lengths; the int8 line was measured before prompts were shared."""
  out = []
  for line in read("engine/decode_h100.jsonl"):
    rows, new, cache = line["rows"], line["max_new"], line["cache"]
    how = rollout.Decoding(line["prompt"], 16, counts_of(rows, 3), 32)
    extra = {"cache": cache, "shared": cache != "int8", "padded": line["prompt"], "load": False}
    for kind, lengths in (("static", np.full(rows, new)), ("useful", rollout.lognormal_lengths(rows, new, 0.4, 0.6))):
      seconds = int(lengths.sum()) / line[f"tok_s_{kind}"]
      out.append(Line(f"W1 {rows} rows, {kind}, {cache} cache", seconds,
                      functools.partial(generate, line["shape"], extra, lengths, how), kind == "static" and cache != "int8"))
  return out


def update_lines() -> list[Line]:
  """W2 before prompts were shared, then with them, logits computed twice and once; of a code's lines the first."""
  of_code = {line["code"]: line for line in reversed(read("engine/update_once.jsonl")) if "H100" in line["device"]}
  named = {"W2, prompts apart": read("engine/update_h100.jsonl")[0], "W2, logits twice": of_code["5256015"],
           "W2": of_code["34dbccd"]}
  out = []
  for name, line in named.items():
    c, rows = ZOO[line["shape"]], line["rows"]
    lengths = np.full(rows, line["max_new"])
    trained = (work.Trained(line["prompt"], rows, lengths) if name == "W2, prompts apart" else
               work.packed(line["prompt"], rows // 16, lengths, line["micro_tokens"]))
    tokens = rows * (line["prompt"] + line["max_new"])
    out += [Line(f"{name}: update", tokens / line["tokens_s"],
                 functools.partial(work.update_seconds, c, trained, again=name != "W2"), name == "W2"),
            Line(f"{name}: log-probs", tokens / line["logprob_tokens_s"], functools.partial(work.forward_seconds, c, trained))]
  return out


def preset_lines() -> list[Line]:
  """The update of a GSM8K step that was run, by later code; unpruned rows are as long as what was generated on average."""
  line = read("gsm8k_step/preset_h100.jsonl")[0]
  out = []
  unpruned = line["rows_trained"] / line["slots"] * line["tokens_generated"]
  for end, tokens in (("", unpruned), ("_pruned", line["tokens_trained_pruned"])):
    rows = line[f"rows_trained{end}"]
    trained = work.packed(PROMPT, rows // 16 if not end else -(-rows // 8), np.full(rows, round(tokens / rows)), 16384)
    out.append(Line(f"GSM8K preset{end.replace('_', ' ')}: update", line[f"sec_update{end}"],
                    functools.partial(work.update_seconds, ZOO[GSM8K], trained), bool(end)))
  return out


def step_lines() -> list[Line]:
  """W3, before prompts were shared; random scores kept half, at random as far as lengths go."""
  lines, out = read("engine/step_h100.jsonl"), []
  first = lines[0]
  c, lengths = ZOO[first["shape"]], rollout.lognormal_lengths(first["rows"], first["max_new"], 0.6, 0.5)
  extra = {"shared": False, "padded": first["prompt"], "load": True}
  for line, end in [(first, "")] + [(line, "_pruned") for line in lines]:
    detect, keep = ((line["detect"],), 0.5) if end else ((), 1.0)
    how = rollout.Decoding(line["prompt"], 16, counts_of(line["slots"], 3), 32, detect, keep)
    kept = rollout.simulate(lengths, how).kept
    trained = work.Trained(line["prompt"], len(kept), kept)
    parts = {"generate": functools.partial(generate, line["shape"], extra, lengths, how),
             "logprob": functools.partial(work.forward_seconds, c, trained),
             "update": functools.partial(work.update_seconds, c, trained, again=True)}
    name = "W3 " + (f"pruned at {line['detect']}" if end else "unpruned")
    out += phases(name, {k: line[f"sec_{k}{end}"] for k in (*parts, "step")}, parts, len(lengths))
  return out


def phases(name: str, measured: dict, parts: dict, rollouts: int, fitted: tuple = ()) -> list[Line]:
  """A line a phase and one for the whole step."""
  whole = lambda r: sum(f(r) for f in parts.values()) + rollouts * r.rollout
  return [Line(f"{name}: {k}", measured[k], f, k in fitted) for k, f in parts.items() if measured[k] > 1e-3] + [
    Line(f"{name}: step", measured["step"], whole)]


def gsm8k_lengths(steps: list[dict], count: int, longest: int) -> np.ndarray:
  """Lengths of a lognormal distribution with these unpruned steps' mean response and share cut at `longest`."""
  mean = statistics.mean(s["response_len"] for s in steps)
  cut = statistics.mean(s["truncated"] for s in steps)
  z = np.random.default_rng(0).standard_normal(100_000)
  def apart(x):
    drawn = np.exp(x[0] + abs(x[1]) * z)
    return np.minimum(drawn, longest).mean() / mean - 1, np.mean(drawn >= longest) - cut
  centre, spread = optimize.least_squares(apart, (np.log(mean), 0.5), diff_step=0.02).x
  drawn = np.exp(centre + abs(spread) * np.random.default_rng(1).standard_normal(count))
  return np.clip(drawn, 1, longest).astype(int)


def gsm8k_lines(run: str, pruning: bool, shared_update: bool, fitted: tuple = ()) -> list[Line]:
  """Medians of a GSM8K run's steps from the third on, with or without pruning; rows that taught something as measured."""
  rows, new = 512, 400
  every = [s for s in read(f"{run}/metrics.jsonl")[1:] if s.get("sec_compile", 0) < 0.5]
  steps = [s for s in every if s["pruning"] == pruning][(2 if len(every) > 10 else 0):]
  free = [s for s in every if not s["pruning"]] or steps
  median = lambda key: statistics.median(s[key] for s in steps)
  lengths = gsm8k_lengths(free, rows, new)
  how = rollout.Decoding(PROMPT, 16, counts_of(rows, 4), 32, (128,) if pruning else (), 0.5 if pruning else 1.0)
  tokens = median("tokens_trained")
  taught = int(median("rows_trained")) if "rows_trained" in steps[0] else int(median("rollouts_kept"))
  each = np.full(taught, round(tokens / taught))
  trained = work.packed(PROMPT, -(-taught // 8), each, 16384) if shared_update else work.Trained(PROMPT, taught, each)
  c = ZOO[GSM8K]
  parts = {"generate": functools.partial(generate, GSM8K, {"shared": True, "padded": 256, "load": True}, lengths, how),
           "logprob": functools.partial(work.forward_seconds, c, trained),
           "update": functools.partial(work.update_seconds, c, trained, again=True)}
  measured = {k: median(f"sec_{k}") for k in (*parts, "step")}
  if measured["logprob"] < 1e-3:
    del parts["logprob"]
  name = f"GSM8K {run.split('/', 1)[1]} {'pruned' if pruning else 'unpruned'}"
  out = phases(name, measured, parts, rows, fitted)
  if "sec_batch" in steps[0]:
    rest = measured["step"] - sum(measured[k] for k in parts)
    out.insert(-1, Line(f"{name}: rest", rest, lambda r: rows * r.rollout, "rest" in fitted))
  return out


def lines() -> list[Line]:
  return [*decode_lines(), *update_lines(), *preset_lines(), *step_lines(),
          *gsm8k_lines("gsm8k_budget/published", True, True),
          *gsm8k_lines("gsm8k_budget/random", True, True, ("rest",)),
          *gsm8k_lines("gsm8k_budget/probe", False, True), *gsm8k_lines("archive/gsm8k_arms/none_seed0", False, False),
          *gsm8k_lines("archive/gsm8k_arms/published_seed0", True, False)]


def fit(known: list[Line]) -> Shares:
  """The shares at which the fitted lines' relative errors are least."""
  used = [line for line in known if line.fitted]
  def shares(x):
    return Shares(matrix=round(x[0], 3), cache=round(x[1], 3), layer=round(x[2], 1) * 1e-6, rollout=round(x[3]) * 1e-6)
  def apart(x):
    exact = Shares(matrix=x[0], cache=x[1], layer=x[2] * 1e-6, rollout=x[3] * 1e-6)
    return [np.log(line.predict(chips.rates("h100", exact)) / line.measured) for line in used]
  return shares(optimize.least_squares(apart, (0.5, 0.65, 20, 40), bounds=([0.1, 0.1, 0, 0], [1, 1, 200, 500])).x.tolist())


def error(line: Line, rates: Rates) -> float:
  return line.predict(rates) / line.measured - 1


def main():
  p = argparse.ArgumentParser(prog="python -m experiments.plan_check", description=__doc__,
                              formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("--fit", action="store_true", help="fit the shares again and use them")
  a = p.parse_args()
  known = lines()
  shares = fit(known) if a.fit else chips.FITTED
  rates = chips.rates("h100", shares)
  print(shares, "\n")
  for cells in (("line", "measured, s", "predicted, s", "error", ""), ("---",) * 5,
                *((x.name, f"{x.measured:.3f}", f"{x.predict(rates):.3f}", f"{error(x, rates):+.0%}",
                   "fitted" if x.fitted else "") for x in known)):
    print("| " + " | ".join(cells) + " |")
  held = [abs(error(x, rates)) for x in known if not x.fitted]
  steps = [abs(error(x, rates)) for x in known if x.name.endswith("step")]
  print(f"\nHeld out: {sum(e <= 0.3 for e in held)} of {len(held)} within 30%, median {statistics.median(held):.0%}, largest "
        f"{max(held):.0%}. Whole steps: {sum(e <= 0.3 for e in steps)} of {len(steps)} within 30%, largest {max(steps):.0%}.")


if __name__ == "__main__":
  configuration.run(main)
