"""What the quality head should read, how early, and how often it should go over what it has seen, on a frozen policy.

  python -m experiments.head_ablation --config=configs/gsm8k_qwen05b.py --lengths=32,64,128,192,256 --prompts=640 --out=DIR

Rolls out `prompts` training problems once, unpruned, and keeps what a head could read at each length. Part "offline": heads
trained on half of the prompts and asked about the other half, five splits, beside trace confidence and log-probs as plain
scores (the paper's figure 2). Part "online": a step's rollouts are scored before the head learns from them, as in training.
Writes DIR/ablation.jsonl and DIR/ablation.png; AUC within a prompt is the one that balance inside a group needs.
"""

import json
import os
import sys

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from tqdm import tqdm

from arrol_jax import assemble, config as configuration, quality, rollout
from arrol_jax.metrics import auc, mean, spearman
from arrol_jax.prune import Calibration
from arrol_jax.quality import INPUTS, Reading
from arrol_jax.rewards import Grader
from arrol_jax.rollout import PruneRule, make_decide
from arrol_jax.types import Rollout, UserError

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

COMBINATIONS = (("last",), ("mean",), ("logprobs",), ("last", "logprobs"), ("mean", "logprobs"), ("last", "mean", "logprobs"))
PASSES = (25, 100, 400)
SPLITS = 5


def collect(c, lengths: tuple[int, ...], count: int) -> list[Rollout]:
  """Graded rollouts of `count` training problems with readings of all inputs at each length."""
  mesh = assemble.make_mesh(c)
  with jax.set_mesh(mesh), Grader(c.reward.workers, c.reward.pattern, c.reward.timeout) as grader:
    loaded = assemble.load(c, mesh)
    prompts = assemble.prompts(c, loaded, c.data.train)
    if len(prompts) < count:
      raise UserError(f"--prompts={count}, but {c.data.train} holds {len(prompts)}")
    prompts = [prompts[i] for i in np.random.default_rng(c.seed).permutation(len(prompts))[:count]]
    c.quality.inputs, c.prune.rule = tuple(INPUTS), "confidence"  # so that sampling keeps what these need
    engine = assemble.engine(c, loaded, mesh, c.rollout.max_new, loaded.params)
    engine.load(loaded.params, c.model.dtype)
    head = quality.init_head(loaded.config.width, 1, jax.random.key(0), tuple(INPUTS))
    tables = jax.tree.map(lambda x: jnp.stack([x] * len(lengths)), Calibration.empty(2))
    decide = make_decide(head, tables, PruneRule(lengths), False, readings=True)
    with tqdm(total=count * c.rollout.group_size, desc="rollouts", unit="response") as bar:
      return rollout.generate(engine, prompts, c.rollout.group_size, assemble.key(c, assemble.TRAIN), assemble.sampling(
        c, loaded, c.rollout.temperature), loaded.tokenizer, grader, decide=decide, progress=lambda _: bar.update())[0]


class Examples:
  """The rollouts that reached one length: readings, rewards, prompts and trace confidence so far."""

  def __init__(self, rollouts: list[Rollout], which: int, length: int):
    there = [r for r in rollouts if len(r.readings) > which]
    self.reading = Reading(*(np.stack([getattr(r.readings[which], x) for r in there]).astype(np.float32) for x in INPUTS))
    self.reward = np.array([r.reward for r in there], np.float32)
    self.prompt = np.array([r.prompt for r in there])
    self.confidence = np.array([r.confidences[:length].mean() for r in there])

  def rows(self, mask: np.ndarray, inputs: tuple[str, ...], size: int) -> tuple[Reading, np.ndarray, np.ndarray]:
    """Readings of `inputs`, rewards and weights of the rows in `mask`, padded to `size`."""
    pad = lambda x: np.pad(x[mask], ((0, size - mask.sum()), *((0, 0),) * (x.ndim - 1)))
    return (Reading(**{x: pad(getattr(self.reading, x)) for x in inputs}), pad(self.reward), pad(np.ones_like(self.reward)))

  def judged(self, score: np.ndarray, mask: np.ndarray) -> dict:
    """How well a score tells right from wrong among the rows in `mask`."""
    score, reward, prompt = score[mask], self.reward[mask], self.prompt[mask]
    within = [auc(score[prompt == p], reward[prompt == p]) for p in np.unique(prompt)]
    return {"auc": auc(score, reward), "auc_within": mean(x for x in within if not np.isnan(x)),
            "spearman": spearman(score, reward)}


def summary(results: list[dict]) -> dict:
  """Mean and standard deviation over splits or steps."""
  out = {}
  for name in results[0]:
    values = [r[name] for r in results if not np.isnan(r[name])]
    out |= {name: float(np.mean(values)), f"{name}_sd": float(np.std(values))}
  return out


@jax.jit
def logits(head: dict, reading: Reading) -> jax.Array:
  return quality.quality_logit(head, reading)


def scores(head: dict, examples: Examples, size: int) -> np.ndarray:
  """The head's logits of all rows, in one compiled shape."""
  reading = examples.rows(np.ones(len(examples.reward), bool), quality.inputs_of(head), size)[0]
  return np.asarray(logits(head, reading))[:len(examples.reward)]


def offline(examples: Examples, width: int, hidden: int, optimizer, size: int) -> list[dict]:
  """Heads trained on half of the prompts, judged on the other half; plain scores on the same halves."""
  prompts, lines = np.unique(examples.prompt), []
  halves = [np.isin(examples.prompt, np.random.default_rng(seed).permutation(prompts)[::2]) for seed in range(SPLITS)]
  plain = {"trace confidence": examples.confidence, "mean log-prob": examples.reading.logprobs[:, 0],
           "lowest log-prob": examples.reading.logprobs[:, 1]}
  for name, score in plain.items():
    lines.append({"score": name} | summary([examples.judged(score, ~half) for half in halves]))
  for inputs in COMBINATIONS:
    for passes in PASSES:
      results = []
      for seed, half in enumerate(halves):
        head = quality.init_head(width, hidden, jax.random.key(seed), inputs)
        recent = quality.no_recent(head, width, size, optimizer)
        head, _ = quality.refit(head, recent, *examples.rows(half, inputs, size), passes=passes, optimizer=optimizer)
        results.append(examples.judged(scores(head, examples, size), ~half))
      lines.append({"score": "head", "inputs": inputs, "passes": passes} | summary(results))
  return lines


def online(examples: Examples, width: int, hidden: int, optimizer, size: int, prompts: int) -> list[dict]:
  """Steps of `prompts` prompts, each scored before it is learned from: means over the second half of the steps."""
  step, lines = examples.prompt // prompts, []
  for inputs in (("last",), ("mean", "logprobs"), ("last", "mean", "logprobs")):
    for passes, buffer in ((1, 1), (8, 1), (8, 4), (32, 4), (32, 8)):  # buffer: steps' worth of rollouts
      head = quality.init_head(width, hidden, jax.random.key(0), inputs)
      room = buffer * int(np.bincount(step).max())
      recent, results = quality.no_recent(head, width, room, optimizer), []
      for n in range(step.max() + 1):
        now = step == n
        results.append(examples.judged(scores(head, examples, size), now))
        head, recent = quality.refit(head, recent, *examples.rows(now, inputs, int(np.bincount(step).max())), passes=passes,
                                     optimizer=optimizer)
      lines.append({"inputs": inputs, "passes": passes, "buffer": room, "steps": int(step.max()) + 1}
                   | summary(results[len(results) // 2:]))
  return lines


def plot(lines: list[dict], path: str) -> None:
  """AUC over prefix length: all prompts together, and within a prompt."""
  fig, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
  best = {name: lambda x, p=PASSES[1], i=inputs: x["score"] == "head" and tuple(x["inputs"]) == i and x["passes"] == p
          for name, inputs in (("head: last state", ("last",)), ("head: mean state, log-probs", ("mean", "logprobs")),
                               ("head: all three", COMBINATIONS[-1]))}
  best |= {name: lambda x, n=name: x["score"] == n for name in ("trace confidence", "mean log-prob")}
  for axis, key, title in zip(axes, ("auc", "auc_within"), ("all prompts together", "within a prompt"), strict=True):
    for name, wanted in best.items():
      mine = [x for x in lines if x["part"] == "offline" and wanted(x)]
      axis.errorbar([x["length"] for x in mine], [x[key] for x in mine], [x[f"{key}_sd"] for x in mine], label=name, marker="o",
                    capsize=3, linestyle="-" if name.startswith("head") else "--")
    axis.axhline(0.5, color="grey", linewidth=0.8)
    axis.set_xlabel("response tokens read")
    axis.set_title(title)
  axes[0].set_ylabel("AUC of right against wrong")
  axes[1].legend(fontsize=8)
  fig.tight_layout()
  fig.savefig(path, dpi=110)


def main():
  c, flags = configuration.parse(sys.argv, {"lengths": "32,64,128,192,256", "prompts": "640", "out": "experiments/results/head"})
  configuration.check(c)
  try:
    lengths, count = tuple(int(x) for x in flags.lengths.split(",")), int(flags.prompts)
  except ValueError as e:
    raise UserError("--lengths and --prompts take whole numbers") from e
  if any(n % c.rollout.segment for n in lengths):
    raise UserError(f"--lengths: each must be a multiple of rollout.segment ({c.rollout.segment})")
  os.makedirs(flags.out, exist_ok=True)
  rollouts = collect(c, lengths, count)
  optimizer = optax.adamw(c.optim.head_lr, weight_decay=c.quality.weight_decay)
  size = len(rollouts)
  about = {"model": os.path.basename(c.model.path), "device": jax.devices()[0].device_kind, "rollouts": size,
           "reward": float(np.mean([r.reward for r in rollouts])), "command": "python -m experiments.head_ablation " +
           " ".join(a for a in sys.argv[1:] if "path" not in a and "data." not in a and "--out" not in a)}
  lines = []
  for which, length in enumerate(lengths):
    examples = Examples(rollouts, which, length)
    width = examples.reading.last.shape[1]
    base = {"length": length, "examples": len(examples.reward)}
    lines += [{"part": "offline"} | base | x for x in offline(examples, width, c.quality.hidden, optimizer, size)]
    lines += [{"part": "online"} | base | x
              for x in online(examples, width, c.quality.hidden, optimizer, size, c.rollout.prompts)]
    print(f"{length} tokens: done", flush=True)
  with open(f"{flags.out}/ablation.jsonl", "w") as f:
    f.writelines(json.dumps(x | about) + "\n" for x in lines)
  plot(lines, f"{flags.out}/ablation.png")


if __name__ == "__main__":
  configuration.run(main)
