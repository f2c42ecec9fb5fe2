"""How much of a rollout's success its first tokens explain, for any policy: the ceiling of every head that reads a prefix.

  python -m experiments.ceiling --config=configs/gsm8k_qwen05b.py --lengths=64,128,192,256 --prompts=64 --prefixes=16 \\
    --continuations=16 --out=DIR --config.model.path=DIR/model.gguf --config.data.train=DIR/gsm8k_train.jsonl

That is 66,000 responses of Qwen2.5-Coder-0.5B; one H100, about 6 minutes (untried). On a CPU, a minute or two:
--config=configs/quickstart.py --lengths=8,16,24 --prompts=48 --continuations=8.

Rolls out `prefixes` responses to each of `prompts` training problems, unpruned. Of each response longer than a length, the first
`length` tokens are continued `continuations` times with keys of their own, as far as the response itself might have gone
(rollout.max_new tokens in all), and graded with the prefix. The response itself is one more continuation of its prefix, so there
are N = continuations + 1 outcomes, exchangeable given the prefix. Responses that ended by then are left out.
Writes DIR/ceiling.jsonl (a line a length) and DIR/ceiling.png. Intervals: 95%, percentile bootstrap over prompts.

Estimators, for prompts p of at least two prefixes s with successes x_psn, n = 1..N, m_ps their mean:
share   Var_s(P(success | prefix)) / Var(success) within a prompt, as sum_p B_p / sum_p (B_p + W_p) with the unbiased
        W_p = mean_s N m (1 - m) / (N - 1)  and  B_p = var_s(m_ps, ddof 1) - W_p / N; prompts weigh alike. It may be below 0.
auc[k]  AUC of the mean of k outcomes of a prefix against another outcome of it, over a prompt's prefixes, ties counting half:
        the mean over all (p, n) whose outcomes x_p.n are mixed, the k being n + 1, ..., n + k modulo N. It grows to that of
        P(success | prefix) itself, which no function of the prefix exceeds when prompts are averaged.
"""

import json
import os
import sys

import jax
import matplotlib
import numpy as np

from arrol_jax import assemble, config as configuration
from arrol_jax.engine.scheduler import Request
from arrol_jax.learning.generation import generate
from arrol_jax.learning.metrics import auc
from arrol_jax.types import UserError
from experiments.head_ablation import drawn

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the backend is chosen)

RESAMPLES = 2000


# ---- estimators; outcomes f[S,N] of one prompt: prefixes, exchangeable outcomes of each


def components(outcomes: np.ndarray) -> tuple[float, float]:
  """Unbiased variance of success within a prompt: between its prefixes, and given the prefix. At least two of both."""
  n = outcomes.shape[1]
  means = outcomes.mean(axis=1)
  given = float(np.mean(n * means * (1 - means) / (n - 1)))
  return float(means.var(ddof=1)) - given / n, given


def auc_cells(outcomes: np.ndarray, k: int) -> tuple[float, int]:
  """Sum and number of the AUCs of k outcomes' means against another outcome, over the outcomes that are mixed."""
  n, out = outcomes.shape[1], []
  for held in range(n):
    if 0 < outcomes[:, held].sum() < len(outcomes):
      others = (held + 1 + np.arange(k)) % n
      out.append(auc(outcomes[:, others].sum(axis=1), outcomes[:, held]))
  return float(sum(out)), len(out)


def ratio(pairs: np.ndarray, seed: int = 0) -> dict:
  """Sum of numerators over sum of denominators, pairs f[P,2], and its interval by bootstrap over prompts; NaN over 0."""
  index = np.random.default_rng(seed).integers(0, len(pairs), (RESAMPLES, len(pairs)))
  over = lambda sums: np.divide(sums[..., 0], sums[..., 1], out=np.full(sums.shape[:-1], np.nan), where=sums[..., 1] > 0)
  spread = over(pairs[index].sum(axis=1))
  low, high = np.nanpercentile(spread, [2.5, 97.5]) if np.isfinite(spread).any() else (np.nan, np.nan)
  return {"value": float(over(pairs.sum(axis=0))), "low": float(low), "high": float(high)}


def ceiling(groups: list[np.ndarray]) -> dict:
  """What prefixes explain: share and AUCs as above, from the outcomes f[S,N] of each prompt."""
  groups = [g for g in groups if len(g) > 1]
  if not groups:
    raise UserError("no prompt has two prefixes of that length: take shorter --lengths, or more --prefixes")
  variance = np.array([components(g) for g in groups])
  most = groups[0].shape[1] - 1
  counts = [k for k in (1, 2, 4, 8, 16, 32, 64) if k <= most]
  return {"prompts": len(groups), "prefixes": sum(map(len, groups)), "continuations": most,
          "success": float(np.mean([g.mean() for g in groups])), "variance_within": float(variance.sum(axis=1).mean()),
          "share": ratio(np.stack([variance[:, 0], variance.sum(axis=1)], axis=1)),
          "auc": {str(k): ratio(np.array([auc_cells(g, k) for g in groups], float)) for k in counts}}


# ---- sampling


def continue_prefixes(engine, cut: list, each: int, key: jax.Array, sampling, grading, answers: list[str]) -> np.ndarray:
  """Success f[len(cut), each] of continuations of (prompt number, prompt tokens, prefix tokens, tokens left)."""
  requests = [Request(i * each + k, i, np.concatenate([prompt, prefix]), left)
              for i, (_, prompt, prefix, left) in enumerate(cut) for k in range(each)]
  waiting = {}

  def on_done(r):
    number, _, prefix, _ = cut[r.prompt]
    text = grading.tokenizer.decode(np.concatenate([prefix, r.tokens]), skip_special_tokens=True)
    waiting[r.request] = grading.grader.grade_async([(text, answers[number])])

  rollouts = engine.run(requests, key, sampling, on_done=on_done)
  for r in rollouts:
    (r.reward, r.reason), r.success_at = waiting[r.request].result()[0], grading.success
  return np.array([r.success for r in rollouts]).reshape(len(cut), each)


def measure(c, lengths: tuple[int, ...], count: int, each: int):
  """Yields (length, outcomes f[S, each + 1] by prompt) for each length; count prompts of rollout.group_size prefixes."""
  mesh = assemble.make_mesh(c)
  with jax.set_mesh(mesh), assemble.grader(c) as grader:
    loaded = assemble.load(c, mesh, training=True)
    prompts = drawn(c, loaded, count)
    answers = [p.problem.answer for p in prompts]
    # The same slots serve responses and continuations, whose prompts are longer by the prefix.
    c.rollout.max_prompt += max(lengths)
    engine = assemble.engine(c, loaded, mesh, c.rollout.max_new, loaded.params)
    engine.load(loaded.params, c.model.dtype)
    sampling, grading = assemble.sampling(c, loaded, c.rollout.temperature), assemble.grading(c, loaded, grader)
    key = lambda n: assemble.key(c, assemble.EVAL, n)
    rollouts, _ = generate(engine, dict(enumerate(prompts)), c.rollout.group_size, key(0), sampling, grading)
    for length in lengths:
      longer = [r for r in rollouts if len(r.tokens) > length]
      cut = [(r.prompt, r.prompt_tokens, r.tokens[:length], c.rollout.max_new - length) for r in longer]
      more = continue_prefixes(engine, cut, each, key(length), sampling, grading, answers) if cut else np.zeros((0, each))
      outcomes = np.concatenate([np.array([r.success for r in longer]).reshape(-1, 1), more], axis=1)
      number = np.array([r.prompt for r in longer])
      yield length, [outcomes[number == p] for p in range(count)]


def plot(lines: list[dict], path: str) -> None:
  """Share of variance by length, and AUC by number of continuations."""
  fig, axes = plt.subplots(1, 2, figsize=(10, 4))
  bars = lambda xs: [[x["value"] - x["low"] for x in xs], [x["high"] - x["value"] for x in xs]]
  shares = [x["share"] for x in lines]
  style = {"marker": "o", "capsize": 3}
  axes[0].errorbar([x["length"] for x in lines], [100 * s["value"] for s in shares], 100 * np.array(bars(shares)), **style)
  axes[0].set(xlabel="response tokens of the prefix", ylabel="% of the variance of success within a prompt", ylim=(0, 100),
              title="explained by the prefix", xticks=[x["length"] for x in lines])
  for i, x in enumerate(lines):
    k, points = [int(k) for k in x["auc"]], list(x["auc"].values())
    aside = 1.03 ** (i - (len(lines) - 1) / 2)
    axes[1].errorbar(np.array(k) * aside, [p["value"] for p in points], bars(points), label=f"{x['length']} tokens", **style)
  axes[1].set_xscale("log", base=2)
  axes[1].set_xticks(k, k)
  axes[1].set(xlabel="continuations averaged", ylabel="AUC within a prompt", title="of their mean against one more")
  axes[1].legend(loc="upper left", fontsize=8)
  fig.tight_layout()
  fig.savefig(path, dpi=110)


FLAGS = {"lengths": ("64,128,192,256", "response tokens of the prefixes"), "prompts": ("64", "how many"),
         "prefixes": ("16", "responses of a prompt that are cut"), "continuations": ("16", "of each prefix"),
         "out": ("experiments/results/ceiling", "folder for the results")}


def main():
  c, flags = configuration.parse(sys.argv, FLAGS, __doc__)
  c.data.eval = ""  # nothing here reads held-out problems: they need not be there
  configuration.check(c)
  try:
    lengths = tuple(int(x) for x in flags.lengths.split(","))
    count, prefixes, each = int(flags.prompts), int(flags.prefixes), int(flags.continuations)
  except ValueError as e:
    raise UserError("--lengths, --prompts, --prefixes and --continuations take whole numbers") from e
  if min(lengths) < 1 or max(lengths) >= c.rollout.max_new or prefixes < 2 or each < 1 or count < 1:
    raise UserError(f"--lengths lie between 1 and rollout.max_new ({c.rollout.max_new}); --prefixes is 2 or more, the rest 1")
  os.makedirs(flags.out, exist_ok=True)
  c.rollout.group_size = prefixes
  about = {"model": os.path.basename(c.model.path), "device": jax.devices()[0].device_kind, "jax": jax.__version__,
           "seed": c.seed, "command": "python -m experiments.ceiling " +
           " ".join(a for a in sys.argv[1:] if "path" not in a and "data." not in a and "--out" not in a)}
  lines = []
  for length, groups in measure(c, lengths, count, each):
    lines.append({"length": length} | ceiling(groups))
    with open(f"{flags.out}/ceiling.jsonl", "w") as f:  # after each length: what is done stays
      f.writelines(json.dumps(x | about) + "\n" for x in lines)
    print(json.dumps(lines[-1]), flush=True)
  plot(lines, f"{flags.out}/ceiling.png")


if __name__ == "__main__":
  configuration.run(main)
