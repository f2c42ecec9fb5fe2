"""Figure 2: scores of right and wrong rollouts; the head and trace confidence as predictors, and the cost, by prefix length.

  python -m experiments.figure2 [--scale=cpu|gpu|paper] [--run [--minutes=9]] [--model=PATH] [--data=DIR]

Predictors come from experiments.head_ablation on the policy before training, heads judged on prompts that they have not seen.
Scores and lengths come from the unpruned runs, where every rollout has a reward: those logged in the second half of the steps.
"""

from pathlib import Path

from matplotlib.figure import Figure
import numpy as np

from arrol_jax import config
from experiments import runs, tables, trial_tables
from experiments.runs import ROOT, Scale
from experiments.tables import NOT_RUN, Estimate, Table

PASSES = 100  # full-batch steps of the heads shown; the ablation's file has more
PREDICTORS = {"head as published": ("head", ["last"]),
              "head, log-probs too": ("head", ["last", "logprobs"]),
              "head, mean state and log-probs": ("head", ["mean", "logprobs"]), "trace confidence": ("trace confidence", None)}
JUDGES = {"auc": "AUC", "auc_within": "AUC within a prompt", "spearman": "Spearman"}
JUDGED = {"auc": "right against wrong,\nall prompts together", "auc_within": "right against wrong,\nwithin a prompt",
          "spearman": "rank correlation of\nscore and reward"}  # the panels' titles; 0.5 and 0 are chance


def predictor(lines: list[dict], length: int, name: str, judge: str) -> Estimate | None:
  """How well a score tells right from wrong at a length: mean over splits, twice their standard deviation as interval."""
  score, inputs = PREDICTORS[name]
  for x in lines:
    if (x["part"], x["length"], x["score"] if x["part"] == "offline" else None) == ("offline", length, score) and \
        (inputs is None or (x["inputs"] == inputs and x["passes"] == PASSES and not x.get("balanced"))):
      return Estimate(x[judge], 2 * x[f"{judge}_sd"])
  return None


def rollouts(folders: list[Path]) -> list[dict]:
  """What the unpruned runs of these folders logged of single rollouts in the second half of their steps."""
  out = []
  for folder in folders:
    found = next((path for name in ("scores.jsonl", "rollouts.jsonl") if (ROOT / (path := folder / name)).exists()), None)
    logged = runs.lines(found) if found else []
    out += [x for x in logged if x["step"] > max(x["step"] for x in logged) / 2 and x["reward"] is not None]
  return out


def share(lengths: np.ndarray, detect: int, keep: float = 0.5) -> Estimate | None:
  """Tokens generated, as a share of all, were `keep` of the rollouts longer than `detect` to go on past it: arithmetic on
  the lengths of rollouts that nothing cut."""
  if not len(lengths):
    return None
  cut = np.where(lengths > detect, detect + keep * (lengths - detect), lengths)
  return Estimate(float(cut.sum() / lengths.sum()), float("nan"))


def build(scale: Scale, figure: Figure) -> Table:
  ablation = runs.ablation(scale)
  unpruned = [] if scale.trial else runs.trainings(scale, "none")
  folders = [found.run.folder for found in trial_tables.everyone(scale, "plain")] if scale.trial else \
    [job.result.parent for job in unpruned if job.done]
  lines = runs.lines(ablation.result) if ablation.done else []
  logged = rollouts(folders)
  tokens = np.array([x["tokens"] for x in logged], float)
  lengths = [int(n) for n in scale.head[0].partition("=")[2].split(",")]
  rows, notes = [], []
  for length in lengths:
    cost = share(tokens, length)
    rows += [[f"{length}", name, *(tables.cell(predictor(lines, length, name, judge), ".3f") for judge in JUDGES),
              NOT_RUN if cost is None else f"{100 * cost.value:.0f}%"] for name in PREDICTORS]
  head, confidence = list(PREDICTORS)[0], list(PREDICTORS)[-1]
  for length in lengths if lines else []:
    gap = tables.subtract(*(predictor(lines, length, name, "spearman") for name in (head, confidence)))
    notes += tables.verdict(f"Spearman of the published head above trace confidence at {length} tokens, by", gap, "above", ".3f")
  if lines:
    notes.append(f"{lines[0]['rollouts']:,} rollouts, share right {lines[0]['reward']:.2f}, {lines[0]['device']}; ± is twice the "
                 f"standard deviation over five splits by prompt; heads after {PASSES} full-batch steps. Paper: the head's "
                 "Spearman correlation rises until about 512 tokens, and its accuracy is about 80%.")
  right, wrong = ([1 / (1 + np.exp(-x["score"])) for x in logged if x["score"] is not None and (x["reward"] > 0.5) == w]
                  for w in (True, False))
  if right and wrong:
    notes.append(f"Scores of unpruned runs at their detection length, second half of the steps: mean {np.mean(right):.3f} of "
                 f"{len(right)} right and {np.mean(wrong):.3f} of {len(wrong)} wrong rollouts, prompts mixed.")
  if lines or logged:
    draw(figure, scale, lines, lengths, right, wrong)
  notes.append("Tokens: computed from the lengths of unpruned rollouts at keep ratio 0.5, not timed.")
  columns = ("tokens read", "score", *JUDGES.values(), "tokens generated")
  of_trial = (f"Scale: {scale.name}. {scale.model}; {scale.data.partition(',')[0]}. Heads: of the policy before training; scores "
              "and lengths: of the trial's runs without pruning that logged them. The paper's figures: its models and data.")
  return Table("figure2", "Figure 2: what scores tell, and when", scale, columns, rows, notes, [ablation, *unpruned],
               of_trial if scale.trial else "")


def draw(figure: Figure, scale: Scale, lines: list[dict], lengths: list[int], right: list[float], wrong: list[float]) -> None:
  """Score distributions, and each judge over prefix length, where points of one length stand side by side."""
  figure.set_size_inches(13, 4.4)
  axes = figure.subplots(1, 4)
  for values, label in ((right, "right"), (wrong, "wrong")):
    if values:
      axes[0].hist(values, np.linspace(0, 1, 26), density=True, histtype="step", lw=1.8, label=f"{label} ({len(values)})")
  axes[0].set_title(f"scores of the published head\n(unpruned runs, scale {scale.name})", fontsize=10)
  axes[0].set_xlabel("sigmoid of the score", fontsize=9)
  axes[0].set_ylabel("density of rollouts", fontsize=9)
  step = min(np.diff(lengths), default=1) / 10
  for axis, (judge, title) in zip(axes[1:], JUDGES.items(), strict=True):
    for i, name in enumerate(PREDICTORS if lines else ()):
      y = [predictor(lines, n, name, judge) for n in lengths]
      x = np.array(lengths) + step * (i - (len(PREDICTORS) - 1) / 2)
      axis.errorbar(x, [v.value for v in y], [v.half for v in y], marker="o", markersize=4, capsize=2, lw=1.2, label=name)
    if not lines:
      axis.text(0.5, 0.6, NOT_RUN, ha="center", transform=axis.transAxes)
    axis.axhline(0.0 if judge == "spearman" else 0.5, color="k", lw=0.8)
    axis.set_title(JUDGED[judge], fontsize=10)
    axis.set_xlabel("response tokens read", fontsize=9)
    axis.set_ylabel(title, fontsize=9)
  for axis in axes:
    axis.spines[["top", "right"]].set_visible(False)
  if right or wrong:
    axes[0].legend(fontsize=9, loc="upper right")
  if lines:
    figure.legend(*axes[1].get_legend_handles_labels(), fontsize=10, ncols=len(PREDICTORS), loc="outside lower center")


if __name__ == "__main__":
  config.run(lambda: tables.main(build))
