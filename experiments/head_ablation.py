"""What the quality head should read, how early, and how it should be fitted, on a frozen policy.

  python -m experiments.head_ablation --config=configs/gsm8k_qwen05b.py --lengths=64,128,192,256 --prompts=640 --out=DIR \\
    --config.model.path=DIR/model.gguf --config.data.train=DIR/gsm8k_train.jsonl

One H100, about 10 minutes (untried). Rolls out `prompts` training problems once, unpruned, rollout.prompts at a time as in
training, and keeps what a head could read at each length and at the last token ("end"). Writes DIR/ablation.jsonl and
DIR/ablation.png; a line's part:

offline  out of fold, five folds by prompt: mean and standard deviation over folds. The published head (score "head": full-batch
         passes), the closed-form ridge ("ridge": `inputs`, centred or not), and plain scores: trace confidence, log-probs.
online   a step's rollouts are scored before the head learns from them, as in training: over the steps from the third on.
votes    a problem's traces vote, weighed by the ridge at the last token, out of fold, as in evaluation: share of problems whose
         answer is right, and what is gained on the majority, with 95% bootstrap intervals over problems, paired. Rank, posterior:
         as evaluate's; posteriors by a table of the other folds' scores. DeepConf: mean trace confidence.

AUC within a prompt, the mean over prompts with right and wrong rollouts, is the one that balance inside a group needs. Left out:
a head of several boundaries at once; heads that read all states of the prefix (pooled_heads.py).
"""

import json
import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from arrol_jax import assemble, config as configuration, prune
from arrol_jax.data.problems import Prompt
from arrol_jax.learning.evaluation import voted_right
from arrol_jax.learning.generation import generate
from arrol_jax.learning.metrics import bootstrap_interval
from arrol_jax.pruning import features, linear_head
from arrol_jax.pruning.decision import make_decide
from arrol_jax.pruning.rule import PruneRule
from arrol_jax.rewards import extract_answer
from arrol_jax.types import Rollout, UserError
from experiments.head_fits import FOLDS, Adam, Place, adam_folds, adam_online, ridge_folds, ridge_online

READ = ("last", "last@2/3", "mean@1/3", "mean@2/3", "mean@5/6", "mean", "prompt@2/3", "logprobs", "windows", "siblings")
STATED = ("mean@2/3", "prompt@2/3", "logprobs", "windows", "siblings")  # what configs with a ridge read
RIDGES = (("last",), ("last@2/3",), ("mean@1/3",), ("mean@2/3",), ("mean@5/6",), ("mean",), ("logprobs", "windows"),
          ("siblings",), ("mean@2/3", "logprobs", "windows"), ("mean@2/3", "siblings"), ("mean@2/3", "prompt@2/3"), STATED)
ADAMS = ((("last",), False), (("last", "logprobs"), False), (("mean", "logprobs"), False), (("mean", "logprobs"), True))
PASSES = 100  # of offline heads
# Passes, steps that the ring keeps, balanced.
ADAMS_ONLINE = ((("last",), 1, 1, False), (("last",), 1, 1, True), (("mean", "logprobs"), 8, 4, True))
VOTERS = (("last",), ("mean@2/3",), STATED)
FIRST = 2  # steps that online means leave out: a cold start


def drawn(c, loaded, count: int, source: str | None = None) -> list[Prompt]:
  """`count` prompts of data.train, or of `source`, by chance that the seed decides."""
  source = source or c.data.train
  prompts = assemble.prompts(c, loaded, source)
  if len(prompts) < count:
    raise UserError(f"{count} prompts are wanted, but {source} holds {len(prompts)}")
  return [prompts[i] for i in np.random.default_rng(c.seed).permutation(len(prompts))[:count]]


def collect(c, lengths: tuple[int, ...], count: int) -> tuple[list[list[Rollout]], int]:
  """Graded rollouts of `count` training problems by step, prompts numbered over all, with features at each length and at the last
  token; and the model's width."""
  mesh = assemble.make_mesh(c)
  with jax.set_mesh(mesh), assemble.grader(c) as grader:
    loaded = assemble.load(c, mesh, training=True)
    prompts = drawn(c, loaded, count)
    # So that sampling keeps what is read, and confidences.
    c.quality.fit, c.quality.inputs, c.prune.rule = "ridge", READ, "confidence"
    engine, width = assemble.engine(c, loaded, mesh, c.rollout.max_new, loaded.params), loaded.config.width
    engine.load(loaded.params, c.model.dtype)
    decide = reader(lengths, READ, width)
    sampling, grading = assemble.sampling(c, loaded, c.rollout.temperature), assemble.grading(c, loaded, grader)
    steps, size = [], c.rollout.prompts
    with tqdm(total=count * c.rollout.group_size, desc="rollouts", unit="response") as bar:
      for n in range(count // size):
        some = dict(enumerate(prompts[n * size:(n + 1) * size]))
        steps.append(generate(engine, some, c.rollout.group_size, assemble.key(c, assemble.TRAIN, n), sampling, grading, decide,
                              lambda _: bar.update())[0])
        for r in steps[-1]:
          r.prompt += n * size
  return steps, width


def reader(lengths: tuple[int, ...], inputs: tuple[str, ...], width: int):
  """A decision that keeps everybody and brings home what a linear head would read: `inputs` of a model of that width."""
  size = features.width(inputs, width)
  head, tables = linear_head.empty_head(size), prune.Calibration.empty(2)
  head, tables = jax.tree.map(lambda x: jnp.stack([x] * (len(lengths) + 1)), (head, tables))
  named = {name: getattr(head, name) for name in linear_head.NAMES}
  return make_decide(named, tables, PruneRule(lengths, inputs=inputs), False, features=True)


def places(steps: list[list[Rollout]], lengths: tuple[int, ...], width: int):
  """(name, Place) of each length and of the last token."""
  for which, length in enumerate(lengths):
    read = lambda r, w=which: r.features[w] if len(r.features) > w else None
    yield length, Place(steps, read, lambda r, n=length: r.confidences[:n].mean(), READ, width)
  yield "end", Place(steps, lambda r: r.final_features, lambda r: r.confidences.mean(), READ, width)


def offline(place: Place, c, optimizer) -> list[dict]:
  """Lines of all scores out of fold."""
  statistics = np.asarray(place.of(("logprobs",)))
  plain = {"trace confidence": place.confidence, "mean log-prob": statistics[..., 0], "lowest log-prob": statistics[..., 1]}
  lines = [{"score": name} | place.by_fold(score) for name, score in plain.items()]
  for inputs, balanced in ADAMS:
    score = adam_folds(place, inputs, c.quality.hidden, optimizer, PASSES, balanced)
    lines.append({"score": "head", "inputs": inputs, "passes": PASSES, "balanced": balanced} | place.by_fold(score))
  for inputs in RIDGES:
    for center in (False, True):
      score, _ = ridge_folds(place, inputs, center, c.quality.strength)
      lines.append({"score": "ridge", "inputs": inputs, "center": center} | place.by_fold(score))
  return lines


def online(place: Place, c, optimizer) -> list[dict]:
  """Lines of heads that are asked before they learn."""
  lines = []
  for inputs, passes, kept, balanced in ADAMS_ONLINE:
    head = Adam(place, inputs, c.quality.hidden, optimizer, kept * place.shape[1])
    lines.append({"score": "head", "inputs": inputs, "passes": passes, "balanced": balanced, "buffer": head.room} |
                 place.by_step(adam_online(place, head, passes, balanced), FIRST))
  lines.append({"score": "trace confidence"} | place.by_step(place.confidence, FIRST))
  for inputs in RIDGES:
    for center in (False, True):
      score = ridge_online(place, inputs, center, c.quality.strength)
      lines.append({"score": "ridge", "inputs": inputs, "center": center} | place.by_step(score, FIRST))
  return lines


def votes(end: Place, c) -> list[dict]:
  """Lines of each vote; `end` holds the rollouts' last tokens, all `there`."""
  group = c.rollout.group_size
  said = [extract_answer(r.text, c.reward.pattern) for r in end.rollouts]
  rows = lambda x: np.asarray(x).reshape(-1, group)
  right, said = rows(end.reward), [said[i:i + group] for i in range(0, len(said), group)]
  weights = [("majority", None, "majority", np.zeros(right.shape)), ("best mean confidence", None, "best", rows(end.confidence)),
             ("deepconf", None, "deepconf", rows(end.confidence))]
  for inputs in VOTERS:
    _, alone = ridge_folds(end, inputs, True, c.quality.strength)
    score, posterior = np.zeros((2, *end.shape))
    for f in range(FOLDS):
      mine = end.fold == f
      table = prune.update(prune.Calibration(), alone[f][~mine], end.reward[~mine])
      score[mine], posterior[mine] = alone[f][mine], np.asarray(prune.posterior(table, alone[f][mine]))
    weights += [(rule, inputs, rule, rows(x)) for rule, x in (("rank", score), ("posterior", posterior), ("best", score))]
  lines, base = [], None
  for name, inputs, rule, scores in weights:
    hits = np.array([voted_right(*row, rule) for row in zip(right, said, scores, strict=True)])
    base = hits if base is None else base
    lines.append({"part": "votes", "rule": name, "inputs": inputs, "samples": group, "problems": len(hits),
                  "accuracy": float(hits.mean()), "accuracy_ci": bootstrap_interval(hits),
                  "gain": float((hits - base).mean()), "gain_ci": bootstrap_interval(hits - base)})
  return lines


SHOWN = {"published head": ("head", ("last",), None), "ridge, its input": ("ridge", ("last",), True),
         "ridge, mean at 2/3 depth": ("ridge", ("mean@2/3",), True),
         "ridge, with prompt, statistics, siblings": ("ridge", STATED, True),
         "trace confidence": ("trace confidence", None, None)}


def plot(lines: list[dict], path: str) -> None:
  """AUC by place: offline of all prompts together and within a prompt, online within a prompt."""
  import matplotlib  # others take only what collects from here
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  fig, axes = plt.subplots(1, 3, figsize=(13, 4.2), sharey=True)
  names = list(dict.fromkeys(x["length"] for x in lines if x["part"] == "offline"))
  panels = (("offline", "auc", "offline, all prompts together"), ("offline", "auc_within", "offline, within a prompt"),
            ("online", "auc_within", f"online, within a prompt, steps {FIRST + 1} on"))
  for axis, (part, key, title) in zip(axes, panels, strict=True):
    for i, (label, (score, inputs, center)) in enumerate(SHOWN.items()):
      mine = {x["length"]: x for x in reversed(lines) if (x["part"], x.get("score")) == (part, score) and
              (inputs is None or tuple(x["inputs"]) == inputs) and (center is None or x["center"] == center)}
      at = [n for n, name in enumerate(names) if name in mine]
      axis.errorbar(np.array(at) + 0.06 * (i - 2), [mine[names[n]][key] for n in at], [mine[names[n]][f"{key}_sd"] for n in at],
                    label=label, marker="o", capsize=3, linestyle="-" if inputs else "--")
    axis.axhline(0.5, color="grey", linewidth=0.8)
    axis.set_xticks(range(len(names)), names)
    axis.set(xlabel="response tokens read", title=title)
  axes[0].set_ylabel("AUC of right against wrong")
  fig.legend(*axes[0].get_legend_handles_labels(), fontsize=9, ncol=5, loc="lower center")
  fig.tight_layout(rect=(0, 0.07, 1, 1))
  fig.savefig(path, dpi=110)


FLAGS = {"lengths": ("64,128,192,256", "response tokens at which the head reads"), "prompts": ("640", "how many"),
         "out": ("experiments/results/head", "folder for the results")}


def main():
  c, flags = configuration.parse(sys.argv, FLAGS, __doc__)
  c.data.eval = ""  # nothing here reads held-out problems: they need not be there
  configuration.check(c)
  try:
    lengths, count = tuple(int(x) for x in flags.lengths.split(",")), int(flags.prompts)
  except ValueError as e:
    raise UserError("--lengths and --prompts take whole numbers") from e
  if any(n % c.rollout.segment for n in lengths):
    raise UserError(f"--lengths: each must be a multiple of rollout.segment ({c.rollout.segment})")
  if count % c.rollout.prompts or count < FOLDS:
    raise UserError(f"--prompts: a multiple of rollout.prompts ({c.rollout.prompts}), {FOLDS} at least")
  os.makedirs(flags.out, exist_ok=True)
  steps, width = collect(c, lengths, count)
  optimizer = optax.adamw(c.optim.head_lr, weight_decay=c.quality.weight_decay)
  about = {"model": os.path.basename(c.model.path), "device": jax.devices()[0].device_kind, "jax": jax.__version__,
           "rollouts": sum(map(len, steps)), "steps": len(steps),
           "reward": float(np.mean([r.success for step in steps for r in step])),
           "command": "python -m experiments.head_ablation " +
           " ".join(a for a in sys.argv[1:] if "path" not in a and "data." not in a and "--out" not in a)}
  lines = []
  for length, place in places(steps, lengths, width):
    base = {"length": length, "examples": int(place.there.sum())}
    lines += [{"part": "offline"} | base | x for x in offline(place, c, optimizer)]
    if len(steps) > FIRST:
      lines += [{"part": "online"} | base | x for x in online(place, c, optimizer)]
    lines += votes(place, c) if length == "end" else []
    with open(f"{flags.out}/ablation.jsonl", "w") as f:  # after each place: what is done stays
      f.writelines(json.dumps(x | about) + "\n" for x in lines)
    print(f"{length} tokens: done", flush=True)
  plot(lines, f"{flags.out}/ablation.png")


if __name__ == "__main__":
  configuration.run(main)
