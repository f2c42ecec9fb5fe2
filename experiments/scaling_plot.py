"""Weak and strong scaling as `arrol-bench scale` measured them, beside the linear line and the prediction.

  arrol-bench scale --shape=qwen3-1.7b ... > scale.jsonl
  python -m experiments.scaling_plot scale.jsonl [--out=scale.png]

Speed is that of one device with the same code: rollouts a second over one device's, for steps without and with pruning. The
prediction is of the chip that the lines name, relative to its own single device.
"""

import argparse
import json
from pathlib import Path

import matplotlib

from arrol_jax import config as configuration
from arrol_jax.types import UserError

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)

ENDS = {"": "nothing pruned", "_pruned": "pruned"}


def read(path: str) -> list[dict]:
  """The lines of `arrol-bench scale` in a file. Raises UserError where there are none, or none of one device."""
  try:
    lines = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
    lines = [line for line in lines if line.get("case") == "scale"]
  except (OSError, ValueError, AttributeError) as e:
    raise UserError(f"{path}: not readable as JSON lines ({e})") from e
  if not any(line["devices"] == 1 for line in lines):
    raise UserError(f"{path}: no line of `arrol-bench scale` on one device, which the others are compared with")
  return lines


def speeds(lines: list[dict], kind: str, seconds) -> tuple[list[int], list[float]]:
  """Devices, and rollouts a second over one device's; seconds(line) -> float or None, which leaves the line out."""
  alone = next(line for line in lines if line["devices"] == 1)
  chosen = sorted((line for line in lines if line["devices"] == 1 or line["scaling"] == kind), key=lambda x: x["devices"])
  chosen = [line for line in chosen if seconds(line) and seconds(alone)]
  rate = lambda line: line["rows"] / seconds(line)
  return [line["devices"] for line in chosen], [rate(line) / rate(alone) for line in chosen]


def plot(lines: list[dict], out: str) -> None:
  """A panel a kind of scaling."""
  figure, axes = plt.subplots(1, 2, figsize=(11, 5), constrained_layout=True, sharey=True)
  most = max(line["devices"] for line in lines)
  ticks = [n for n in (1, 2, 4, 8, 16) if n <= most]
  for axis, kind in zip(axes, ("weak", "strong"), strict=True):
    axis.plot(ticks, ticks, color="0.6", lw=1, label="linear")
    for i, (end, name) in enumerate(ENDS.items()):
      axis.plot(*speeds(lines, kind, lambda x, end=end: x[f"sec_step{end}"]), "o-", color=f"C{i}", label=f"{name}, measured")
      predicted = speeds(lines, kind, lambda x, end=end: (x.get("prediction") or {}).get(f"sec_step{end}"))
      if predicted[0]:
        axis.plot(*predicted, "--", color=f"C{i}", label=f"{name}, predicted")
    one = next(line for line in lines if line["devices"] == 1)
    each = f"{one['rows']} rollouts a device" if kind == "weak" else f"{one['rows']} rollouts in all"
    axis.set(title=f"{kind} scaling, {each}", xlabel="devices")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    axis.set_xticks(ticks, ticks)
    axis.yaxis.set_major_formatter("{x:g}")  # a speed may lie below 1
    axis.grid(alpha=0.3)
  axes[0].set_ylabel("speed, one device = 1")
  axes[1].legend(loc="center left", bbox_to_anchor=(1.02, 0.5), frameon=False)
  chip = (lines[0].get("prediction") or {}).get("chip")
  figure.suptitle(f"A training step of {lines[0]['shape']} on {lines[0]['device']}" + (f"; predicted for {chip}" if chip else ""))
  figure.savefig(out, dpi=110)
  plt.close(figure)


def main():
  p = argparse.ArgumentParser(prog="python -m experiments.scaling_plot", description=__doc__,
                              formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("lines", help="file of JSON lines")
  p.add_argument("--out", help="PNG; beside the lines if not given")
  a = p.parse_args()
  lines, out = read(a.lines), a.out or str(Path(a.lines).with_suffix(".png"))
  plot(lines, out)
  print(out)


if __name__ == "__main__":
  configuration.run(main)
