"""What the quality head should read, how early, and how often it should go over what it has seen, on a frozen policy.

  python -m experiments.head_ablation --config=configs/gsm8k_qwen05b.py --lengths=32,64,128,192,256 --prompts=640 --out=DIR

Rolls out `prompts` training problems once, unpruned, and keeps what a head could read at each length. Part "offline": heads
trained on half of the prompts and asked about the other half, five splits, beside trace confidence and log-probs as plain
scores (the paper's figure 2). Part "online": a step's rollouts are scored before the head learns from them, as in training.
"balanced" heads learn with `quality.balance`. Writes DIR/ablation.jsonl and DIR/ablation.png; AUC within a prompt is the one
that balance inside a group needs.
"""

import itertools
import json
import os
import sys

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import optax
from tqdm import tqdm

from arrol_jax import assemble, config as configuration
from arrol_jax.learning import head_training
from arrol_jax.learning.batching import head_weights
from arrol_jax.learning.generation import Grading, generate
from arrol_jax.learning.metrics import auc, mean, spearman
from arrol_jax.prune import Calibration
from arrol_jax.pruning.decision import make_decide
from arrol_jax.pruning.head import INPUTS, Features, init_head, inputs_of, quality_logit
from arrol_jax.pruning.rule import PruneRule
from arrol_jax.rewards import Grader
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
    head = init_head(loaded.config.width, 1, jax.random.key(0), tuple(INPUTS))
    tables = jax.tree.map(lambda x: jnp.stack([x] * len(lengths)), Calibration.empty(2))
    decide = make_decide(head, tables, PruneRule(lengths), False, features=True)
    with tqdm(total=count * c.rollout.group_size, desc="rollouts", unit="response") as bar:
      sampling, grading = assemble.sampling(c, loaded, c.rollout.temperature), Grading(loaded.tokenizer, grader)
      return generate(engine, dict(enumerate(prompts)), c.rollout.group_size, assemble.key(c, assemble.TRAIN), sampling, grading,
                      decide, lambda _: bar.update())[0]


class Examples:
  """The rollouts that reached one length: readings (on the device), rewards, prompts and trace confidence so far."""

  def __init__(self, rollouts: list[Rollout], which: int, length: int, size: int):
    self.rollouts = there = [r for r in rollouts if len(r.features) > which]
    pad = lambda x: np.pad(x, ((0, size - len(x)), *((0, 0),) * (x.ndim - 1)))  # one compiled shape for all lengths
    self.features = jax.device_put(Features(*(pad(np.stack([getattr(r.features[which], x) for r in there]).astype(np.float32))
                                            for x in INPUTS)))
    self.reward = np.array([r.reward for r in there], np.float32)
    self.padded_reward = jax.device_put(pad(self.reward))
    self.prompt = np.array([r.prompt for r in there])
    self.confidence = np.array([r.confidences[:length].mean() for r in there])
    self.size = size

  def fit(self, head: dict, recent: head_training.Recent, mask: np.ndarray, balanced: bool,
          **how) -> tuple[dict, head_training.Recent]:
    """`head_training.refit` on the rows in `mask`."""
    weight = np.zeros(self.size, np.float32)
    weight[np.flatnonzero(mask)] = head_weights([r for r, used in zip(self.rollouts, mask, strict=True) if used], (), balanced)
    return head_training.refit(head, recent, self.of(head), self.padded_reward, weight, **how)

  def of(self, head: dict) -> Features:
    """What `head` reads of the rows."""
    return Features(**{x: getattr(self.features, x) for x in inputs_of(head)})

  def scores(self, head: dict) -> np.ndarray:
    return np.asarray(logits(head, self.of(head)))[:len(self.reward)]

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
def logits(head: dict, reading: Features) -> jax.Array:
  return quality_logit(head, reading)


def offline(examples: Examples, width: int, hidden: int, optimizer) -> list[dict]:
  """Heads trained on half of the prompts, judged on the other half; plain scores on the same halves."""
  prompts, lines = np.unique(examples.prompt), []
  halves = [np.isin(examples.prompt, np.random.default_rng(seed).permutation(prompts)[::2]) for seed in range(SPLITS)]
  logprobs = np.asarray(examples.features.logprobs)[:len(examples.reward)]
  plain = {"trace confidence": examples.confidence, "mean log-prob": logprobs[:, 0], "lowest log-prob": logprobs[:, 1]}
  for name, score in plain.items():
    lines.append({"score": name} | summary([examples.judged(score, ~half) for half in halves]))
  for inputs in COMBINATIONS:
    for passes, balanced in (*((n, False) for n in PASSES), (PASSES[1], True)):
      results = []
      for seed, half in enumerate(halves):
        head = init_head(width, hidden, jax.random.key(seed), inputs)
        recent = head_training.no_recent(head, width, examples.size, optimizer)
        head, _ = examples.fit(head, recent, half, balanced, passes=passes, optimizer=optimizer)
        results.append(examples.judged(examples.scores(head), ~half))
      lines.append({"score": "head", "inputs": inputs, "passes": passes, "balanced": balanced} | summary(results))
  return lines


def online(examples: Examples, width: int, hidden: int, optimizer, prompts: int, group: int) -> list[dict]:
  """Steps of `prompts` prompts, each scored before it is learned from: means over the second half of the steps."""
  step, lines = examples.prompt // prompts, []
  for inputs in (("last",), ("last", "logprobs"), ("mean", "logprobs")):
    for passes, buffer, balanced in itertools.product((1, 8, 32), (1, 4), (False, True)):  # buffer: steps' worth of rollouts
      head = init_head(width, hidden, jax.random.key(0), inputs)
      room = buffer * prompts * group
      recent, results = head_training.no_recent(head, width, room, optimizer), []
      for n in range(step.max() + 1):
        results.append(examples.judged(examples.scores(head), step == n))
        head, recent = examples.fit(head, recent, step == n, balanced, passes=passes, optimizer=optimizer)
      lines.append({"inputs": inputs, "passes": passes, "balanced": balanced, "buffer": room, "steps": int(step.max()) + 1}
                   | summary(results[len(results) // 2:]))
  return lines


def plot(lines: list[dict], path: str) -> None:
  """AUC over prefix length: all prompts together, and within a prompt."""
  fig, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
  heads = {"head: last state": (("last",), False), "head: last state, log-probs": (("last", "logprobs"), False),
           "head: mean state, log-probs, balanced": (("mean", "logprobs"), True)}
  best = {name: lambda x, h=h: x["score"] == "head" and (tuple(x["inputs"]), x["balanced"], x["passes"]) == (*h, PASSES[1])
          for name, h in heads.items()}
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
  fig.legend(*axes[0].get_legend_handles_labels(), fontsize=7, ncol=5, loc="lower center")
  fig.tight_layout(rect=(0, 0.06, 1, 1))
  fig.savefig(path, dpi=110)


FLAGS = {"lengths": ("32,64,128,192,256", "response tokens at which the head reads"), "prompts": ("640", "how many"),
         "out": ("experiments/results/head", "folder for the results")}


def main():
  c, flags = configuration.parse(sys.argv, FLAGS, __doc__)
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
    examples = Examples(rollouts, which, length, size)
    width = examples.features.last.shape[1]
    base = {"length": length, "examples": len(examples.reward)}
    lines += [{"part": "offline"} | base | x for x in offline(examples, width, c.quality.hidden, optimizer)]
    lines += [{"part": "online"} | base | x for x in online(examples, width, c.quality.hidden, optimizer, c.rollout.prompts,
                                                                c.rollout.group_size)]
    with open(f"{flags.out}/ablation.jsonl", "w") as f:  # after each length: what is done stays
      f.writelines(json.dumps(x | about) + "\n" for x in lines)
    print(f"{length} tokens: done", flush=True)
  plot(lines, f"{flags.out}/ablation.png")


if __name__ == "__main__":
  configuration.run(main)
