"""Does a head that reads all states of a prefix know more than the ridge on their mean? On a frozen policy.

  python -m experiments.pooled_heads --config=configs/gsm8k_qwen05b.py --lengths=128,64,192 --prompts=640 --out=DIR \\
    --config.model.path=DIR/model.gguf --config.data.train=DIR/gsm8k_train.jsonl

170 s on one H200; --seconds, 280 unless said, ends it with what is done by then. On a CPU, two or three minutes:
--config=configs/quickstart.py --lengths=16 --prompts=96 --width=32.

Rolls out `prompts` training problems once, unpruned, keeps the states of their first tokens at shares of the depth
(prefix_states.py) and fits heads on them (prefix_heads.py). A line of DIR/pooled.jsonl is one head on one place:

part     offline: out of fold, five folds by prompt. online: a step's rollouts are scored before the head learns from them; of the
         third step on. Both as in head_ablation.
head     ridge: the closed form on the mean state, centred within the prompt or not, of strength quality.strength; the others are
         prefix_heads.HEADS, by both losses. stack: the centred ridge on the scores, out of fold, of ridge and head.
auc, auc_within, and gain: on the centred ridge's AUC within a prompt of the same part and place; all with 95% intervals by
         bootstrap over prompts, the gain's paired.

A gain whose interval is above 0 says that the mean hides something. One that is not says so of these heads at this number of
rollouts only. DIR/pooled.png shows AUC within a prompt by length.
"""

import itertools
import json
import math
import os
import sys
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

from arrol_jax import config as configuration
from arrol_jax.learning.metrics import auc, bootstrap_interval
from arrol_jax.types import UserError
from experiments.head_ablation import FIRST
from experiments.head_fits import FOLDS, Place, ridge_folds, ridge_folds_of, ridge_online
from experiments.prefix_heads import HEADS, LANES, LOSSES, Data, OutOfTime, Trainer
from experiments.prefix_states import Collected, collect

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

RESAMPLES = 2000
LOGPROB = -0.5, 1.0  # about the mean and the deviation of a token's log-prob


# ---- figures


def within(place: Place, score: np.ndarray, mask: np.ndarray) -> np.ndarray:
  """AUC f[P] of scores f[N,M] among each prompt's rollouts in `mask`, NaN where they are not mixed."""
  rows = lambda x: x.reshape(place.prompt.max() + 1, -1)
  return np.array([auc(s[m], y[m]) for s, y, m in zip(rows(score), rows(place.reward), rows(mask), strict=True)])


def concordance(score: np.ndarray, right: np.ndarray, prompt: np.ndarray) -> np.ndarray:
  """f[P,P]: over the right rollouts of prompt p and the wrong ones of prompt q, how many pairs the right one leads; ties half."""
  count = int(prompt.max()) + 1
  out, high = np.zeros((count, count)), score[right]
  for q in range(count):
    low = np.sort(score[~right & (prompt == q)])
    leads = (np.searchsorted(low, high, "left") + np.searchsorted(low, high, "right")) / 2
    out[:, q] = np.bincount(prompt[right], leads, count)
  return out


def overall_interval(score: np.ndarray, right: np.ndarray, prompt: np.ndarray) -> list[float]:
  """95% percentile interval of the AUC over all rollouts, by bootstrap over prompts; arrays [R], right bool."""
  pairs = concordance(score, right, prompt)
  size = len(pairs)
  times = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), RESAMPLES).astype(float)
  positive, negative = (times @ np.bincount(prompt[some], minlength=size) for some in (right, ~right))
  led = np.sum((times @ pairs) * times, axis=1)
  return [float(x) for x in np.percentile(led / np.maximum(positive * negative, 1), [2.5, 97.5])]


def judged(place: Place, score: np.ndarray, mask: np.ndarray, base: np.ndarray | None = None) -> dict:
  """Figures of scores f[N,M] over the rollouts in `mask`; base: the scores that the gain is over."""
  here = within(place, score, mask)
  mixed = ~np.isnan(here)
  if not mixed.any():
    raise UserError("no prompt has right and wrong rollouts of that length: take shorter --lengths, or more --prompts")
  right = place.reward > 0.5
  out = {"examples": int(mask.sum()), "mixed": int(mixed.sum()), "auc": auc(score[mask], right[mask]),
         "auc_ci": overall_interval(score[mask], right[mask], place.prompt[mask]),
         "auc_within": float(here[mixed].mean()), "auc_within_ci": bootstrap_interval(here[mixed])}
  if base is not None:
    gain = here[mixed] - within(place, base, mask)[mixed]
    out |= {"gain": float(gain.mean()), "gain_ci": bootstrap_interval(gain)}
  return out


# ---- places and heads


def place_of(found: Collected, depth: str, length: int, logprobs: bool = False) -> tuple[Place, Data]:
  """What the ridge and what the other heads are fitted on: rollouts longer than `length` tokens. logprobs: a token's log-prob is
  one dimension more of its state."""
  x = found.states[depth][:, :, :length]
  if logprobs:
    surprise = np.zeros((*x.shape[:3], 1), np.float32)
    for row, r in zip(surprise.reshape(-1, length), (r for step in found.steps for r in step), strict=True):
      row[:len(r.logprobs)] = (r.logprobs[:length] - LOGPROB[0]) / LOGPROB[1]
    x = jnp.concatenate([x, jnp.asarray(surprise, x.dtype)], axis=3)
  means = iter(np.asarray(jnp.mean(x, axis=2, dtype=jnp.float32)).reshape(-1, x.shape[3]))

  def read(r):  # Place asks once for each, in their order
    mean = next(means)
    return mean if len(r.tokens) > length else None

  place = Place(found.steps, read, lambda _: 0.0, (f"mean@{depth}",), x.shape[3])
  rows = lambda y: jnp.asarray(y.reshape(x.shape[:2]), jnp.float32)
  return place, Data(x, rows(place.reward), rows(place.there))


def timed(fit, *args):
  """(what fit(*args) gives, the seconds it took)."""
  started = time.monotonic()
  out = fit(*args)
  return out, time.monotonic() - started


def ridges(place: Place, strength: float):
  """Yields (line, scores f[N,M]) of the ridge on the mean state; the centred ones first."""
  later = place.there & (np.arange(place.shape[0]) >= FIRST)[:, None]
  base = {}
  for center in (True, False):
    for part, mask, fit in (("offline", place.there, lambda *a: ridge_folds(*a)[0]), ("online", later, ridge_online)):
      if not mask.any():
        continue
      score, seconds = timed(fit, place, place.inputs, center, strength)
      base.setdefault(part, score)
      yield {"part": part, "head": "ridge", "center": center, "parameters": place.width * (2 if center else 1),
             "seconds": seconds} | judged(place, score, mask, None if center else base[part]), score


def learned(place: Place, data: Data, head: str, asked: "Asked", deadline: float, base: dict):
  """Yields lines of one of HEADS by each loss, and of its stacks; base: the centred ridge's scores f[N,M] by part."""
  trainer = Trainer(head, data, asked.width, deadline)
  about = {"head": head, "parameters": trainer.parameters, "compile_seconds": trainer.compile_seconds}
  fold = place.fold.reshape(data.reward.shape)[:, 0]
  later = place.there & (np.arange(place.shape[0]) >= FIRST)[:, None]
  for loss in asked.losses:
    score, seconds = timed(trainer.folds, fold, loss)
    score = score.reshape(place.shape)
    yield {"part": "offline"} | about | {"loss": loss, "seconds": seconds} | judged(place, score, place.there, base["offline"])
    both = np.stack([base["offline"], score], axis=2)
    stacked = ridge_folds_of(place, jnp.asarray(both), True, 1.0)[0]
    yield {"part": "offline", "head": f"stack of ridge, {head}", "loss": loss} | judged(place, stacked, place.there,
                                                                                         base["offline"])
    if later.any():
      score, seconds = timed(trainer.online, place.shape[0], loss)
      yield {"part": "online"} | about | {"loss": loss, "seconds": seconds} | judged(
        place, score.reshape(place.shape), later, base["online"])


def lines_of(found: Collected, asked: "Asked", strength: float, deadline: float):
  """Yields all lines, place by place; strength: of the ridge; deadline: time.monotonic() at which it raises OutOfTime."""
  for depth, length in itertools.product(asked.depths, asked.lengths):
    place, data = place_of(found, depth, length, asked.logprobs)
    here, base = {"depth": depth, "length": length, "logprobs": asked.logprobs}, {}
    for line, score in ridges(place, strength):
      base.setdefault(line["part"], score)
      yield here | line
    for head in asked.heads:
      for line in learned(place, data, head, asked, deadline, base):
        yield here | line


def told(line: dict) -> str:
  """A line for the screen."""
  interval = lambda name: "{:+.3f} ({:+.3f} to {:+.3f})".format(line[name], *line[f"{name}_ci"])
  kind = line.get("loss") or ("centred" if line["center"] else "not centred")
  gain = f", {interval('gain')} on the centred ridge" if "gain" in line else ""
  return (f"{line['depth']} depth, {line['length']} tokens, {line['part']}: {line['head']} ({kind}): {line['auc']:.3f} overall, "
          f"{line['auc_within']:.3f} within{gain}; {line.get('seconds', 0.0):.1f} s")


def plot(lines: list[dict], path: str) -> None:
  """AUC within a prompt by length at the first depth: each head by its better loss, which flatters it a little."""
  lines = [x for x in lines if x["depth"] == lines[0]["depth"]]
  fig, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True)
  lengths = sorted({x["length"] for x in lines})
  heads = list(dict.fromkeys(x["head"] for x in lines if "stack" not in x["head"]))
  for axis, part in zip(axes, ("offline", "online"), strict=True):
    for i, head in enumerate(heads):
      mine = [x for x in lines if (x["part"], x["head"]) == (part, head)]
      best = [max((x for x in mine if x["length"] == n), key=lambda x: x["auc_within"], default=None) for n in lengths]
      at = [n for n, x in enumerate(best) if x]
      value = np.array([best[n]["auc_within"] for n in at])
      bars = np.abs(np.array([best[n]["auc_within_ci"] for n in at]).reshape(-1, 2).T - value[None])
      axis.errorbar(np.array(at) + 0.06 * (i - 2), value, bars, label=head, marker="o", capsize=3)
    axis.axhline(0.5, color="grey", linewidth=0.8)
    axis.set_xticks(range(len(lengths)), lengths)
    axis.set(xlabel="response tokens read", title=part)
  axes[0].set_ylabel("AUC within a prompt")
  axes[0].legend(fontsize=9)
  fig.tight_layout()
  fig.savefig(path, dpi=110)
  plt.close(fig)


class Asked(NamedTuple):
  """The flags' values."""
  lengths: tuple[int, ...]
  depths: tuple[str, ...]
  prompts: int
  heads: tuple[str, ...]
  width: int
  seconds: float
  logprobs: bool
  losses: tuple[str, ...]


FLAGS = {"lengths": ("128,64,192", "response tokens at which heads read, in the order in which they are done"),
         "depths": ("2/3", "shares of the policy's depth whose states they read"), "prompts": ("640", "how many"),
         "heads": (",".join(HEADS), "which of them"), "width": ("128", f"of the transformer, a multiple of {LANES}"),
         "losses": (",".join(LOSSES), "by which of them"),
         "logprobs": ("no", "yes: each state has its token's log-prob as one dimension more"),
         "seconds": ("280", "ends after so many, with what is done"),
         "out": ("experiments/results/pooled", "folder for the results")}


def settings(c, flags) -> Asked:
  """What the flags say. Raises UserError."""
  try:
    lengths = tuple(int(x) for x in flags.lengths.split(","))
    count, width, seconds = int(flags.prompts), int(flags.width), float(flags.seconds)
  except ValueError as e:
    raise UserError("--lengths, --prompts, --width and --seconds take numbers") from e
  if min(lengths) < 1 or max(lengths) >= c.rollout.max_new:
    raise UserError(f"--lengths lie between 1 and rollout.max_new ({c.rollout.max_new})")
  if count % c.rollout.prompts or count < 2 * FOLDS:
    raise UserError(f"--prompts: a multiple of rollout.prompts ({c.rollout.prompts}), {2 * FOLDS} at least")
  if width < LANES or width % LANES:
    raise UserError(f"--width: a multiple of {LANES}")
  if not 0 < seconds < math.inf:
    raise UserError("--seconds: more than 0")
  heads, losses = tuple(flags.heads.split(",")), tuple(flags.losses.split(","))
  for name, given, known in (("heads", heads, HEADS), ("losses", losses, LOSSES)):
    if set(given) - set(known):
      raise UserError(f"--{name}: of {', '.join(known)}")
  if flags.logprobs not in ("yes", "no"):
    raise UserError("--logprobs: yes or no")
  return Asked(lengths, tuple(flags.depths.split(",")), count, heads, width, seconds, flags.logprobs == "yes",
               losses)


def main():
  started = time.monotonic()
  c, flags = configuration.parse(sys.argv, FLAGS, __doc__)
  c.data.eval = ""  # nothing here reads held-out problems: they need not be there
  configuration.check(c)
  asked = settings(c, flags)
  os.makedirs(flags.out, exist_ok=True)
  found = collect(c, asked.depths, max(asked.lengths), asked.prompts)
  about = {"model": os.path.basename(c.model.path), "device": jax.devices()[0].device_kind, "jax": jax.__version__,
           "rollouts": sum(map(len, found.steps)), "steps": len(found.steps), "collect_seconds": time.monotonic() - started,
           "reward": float(np.mean([r.success for step in found.steps for r in step])),
           "command": "python -m experiments.pooled_heads " +
           " ".join(a for a in sys.argv[1:] if "path" not in a and "data." not in a and "--out" not in a)}
  print(f"{about['rollouts']} rollouts and their states after {about['collect_seconds']:.0f} s", flush=True)
  lines = []
  try:
    for line in lines_of(found, asked, c.quality.strength, started + asked.seconds):
      lines.append(line)
      with open(f"{flags.out}/pooled.jsonl", "w") as f:  # after each line: what is done stays
        f.writelines(json.dumps(x | about) + "\n" for x in lines)
      print(told(line), flush=True)
  except OutOfTime:
    print(f"{asked.seconds:g} seconds are over: what is missing is left out", flush=True)
  if lines:
    plot(lines, f"{flags.out}/pooled.png")
  print(f"{len(lines)} lines in {flags.out}/pooled.jsonl after {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
  configuration.run(main)
