"""Pruning without a model: rollouts with known chances of success and noisy scores, through the real prune.py.

  python -m experiments.sim_pruning [--out=experiments/results/sim_pruning] [--rollouts=1000000] [--seed=0]

Six questions, each a JSON line in OUT/results.jsonl and a panel of OUT/sim_pruning.png; about a minute on a CPU:
theory    do Lemmas 4.1, A.1, A.2 and Theorem 4.2 hold on random groups (METHOD section 8)?
bias      what does the published table get wrong under its own pruning, and do inverse-propensity weights mend it?
draws     do systematic draws keep each rollout's probability at a fixed number of survivors?
balance   E[rho_hat (1 - rho_hat)] of the survivors by rule, for hard, even and easy prompts
lengths   tokens saved by decisions at several lengths against one at the last, at the same final keep ratio
signal    sum of (r - mean r)^2 over the survivors of a group, by rule, AUC of the score and kept share
A rollout's chance q* is its prompt's logit plus its own; its score is logit(q*) plus noise.
"""

import argparse
import functools
import json
from pathlib import Path
import shlex
import sys

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from arrol_jax import config, prune
from arrol_jax.learning.metrics import auc
from arrol_jax.pruning.budget import budget_probability

RULE = dict(kappa=0.5, rho=0.5, lam=0.5, p_min=0.1, p_max=0.9)
GROUP = 16
HARDNESS = {"hard": -1.5, "even": 0.0, "easy": 1.5}  # mean logit of a prompt


def rollouts(rng, prompts: int, hardness: float = 0.0, between: float = 1.0, within: float = 1.0, noise: float = 1.0):
  """Chances q*, scores and rewards, each [prompts, GROUP]."""
  logit = hardness + between * rng.normal(size=(prompts, 1)) + within * rng.normal(size=(prompts, GROUP))
  chance = 1.0 / (1.0 + np.exp(-logit))
  return chance, logit + noise * rng.normal(size=logit.shape), (rng.random(logit.shape) < chance).astype(np.float32)


# ---- theory


def theory(rng, instances: int) -> dict:
  """Counts of random groups that break each statement; all should be 0 (the theorem's: at most its delta)."""
  broken = dict.fromkeys(("lemma_4_1", "lemma_a_1", "lemma_a_2"), 0)
  over, slack, delta, rho = 0, [], 0.1, 0.5
  for _ in range(instances):
    n = int(rng.integers(3, 17))
    true = rng.random(n)
    eps = rng.uniform(0.0, 0.2)
    seen = np.clip(true + rng.uniform(-eps, eps, n), 0.0, 1.0)
    without = lambda x, n=n: (x.sum() - x) / (n - 1)
    mean, left = true.mean(), without(true)
    for j in range(n):  # Lemma 4.1: dropping one on the far side of the mean moves it toward rho, unless past it
      toward = (mean > rho and true[j] > mean) or (mean < rho and true[j] < mean)
      overshoots = (left[j] - rho) * (mean - rho) < 0
      broken["lemma_4_1"] += bool(toward and not overshoots and abs(left[j] - rho) > abs(mean - rho) + 1e-12)
    broken["lemma_a_1"] += bool(np.max(np.abs(without(seen) - left)) > eps + 1e-12)
    pick = int(np.argmin(np.abs(without(seen) - rho)))
    best = np.min(np.abs(left - rho))
    broken["lemma_a_2"] += bool(abs(left[pick] - rho) > best + 2 * eps + 1e-12)
    rewards = rng.random(n) < true
    error = abs(np.delete(rewards, pick).mean() - rho)
    bound = best + 2 * eps + np.sqrt(np.log(2 / delta) / (2 * (n - 1)))
    over += bool(error > bound)
    slack.append((error, bound))
  return {"question": "theory", "instances": instances, **broken, "theorem_4_2_exceeded": over / instances,
          "theorem_4_2_delta": delta, "points": [[round(float(x), 4) for x in p] for p in slack[:400]]}


# ---- bias


@functools.partial(jax.jit, static_argnames="weighted")
def prune_steps(key, score, reward, weighted: bool):
  """Steps of the published rule, [steps, rollouts]: the last table, and by step the probabilities and who survived."""
  def step(table, x):
    key, score, reward = x
    p = prune.survival(prune.posterior(table, score), delta=prune.solve_delta(table, **RULE), **RULE)
    keep = prune.draw(key, p)
    weight = jnp.where(keep, 1.0 / p if weighted else 1.0, 0.0)
    return prune.update(table, score, reward, weight), (p, keep)

  return jax.lax.scan(step, prune.Calibration(), (jax.random.split(key, len(score)), score, reward))


def bias(rng, total: int) -> dict:
  """The prior, the keep ratio and the bins' posteriors after `total` rollouts, unweighted and weighted."""
  step, out = 1024, {"question": "bias", "rollouts": total}
  chance, score, reward = (x.reshape(-1) for x in rollouts(rng, total // GROUP, hardness=0.5, noise=0.5))
  truth = prune.update(prune.Calibration(), jnp.asarray(score), jnp.asarray(reward))
  share = np.asarray(truth.positive + truth.negative)
  for name, weighted in (("published", False), ("weighted", True)):
    shaped = lambda x: jnp.asarray(x[:total // step * step].reshape(-1, step), jnp.float32)
    table, (p, keep) = prune_steps(jax.random.key(0), shaped(score), shaped(reward), weighted)
    ratio, p, keep = np.asarray(jnp.mean(p, axis=1)), np.asarray(p, float).reshape(-1), np.asarray(keep).reshape(-1)
    r, w = reward[:p.size], keep / p if weighted else keep
    prior = float((w * r).sum() / w.sum())
    error = float(np.sqrt(np.sum((w * (r - prior))**2)) / w.sum())  # delta method
    off = np.abs(np.asarray(prune.bin_posterior(table)) - np.asarray(prune.bin_posterior(truth)))
    out[name] = {"prior": prior, "standard_error": error, "bias": prior - float(chance.mean()),
                 "bias_in_errors": (prior - float(chance.mean())) / error, "keep_ratio": float(ratio[20:].mean()),
                 "posterior_error": float((off * share).sum() / share.sum())}
  return out


# ---- draws


def draws(rng, repeats: int) -> dict:
  """Chi-square of survivors' counts against their probabilities, and the numbers of survivors seen."""
  p = rng.uniform(0.1, 0.9, GROUP // 2)
  p = np.r_[p, 1 - p]  # sums to 8
  keys = jax.random.split(jax.random.key(1), repeats)
  out = {"question": "draws", "repeats": repeats}
  for method in ("bernoulli", "systematic"):
    keep = np.asarray(jax.jit(jax.vmap(lambda k, m=method: prune.draw(k, jnp.asarray(p, jnp.float32), method=m)))(keys))
    # One z-score a rollout: under a right marginal its square is chi-square with one degree of freedom.
    z = (keep.sum(0) - repeats * p) / np.sqrt(repeats * p * (1 - p))
    size = keep.sum(1)
    out[method] = {"largest_z": float(np.abs(z).max()), "smallest_p_value": float(2 * stats.norm.sf(np.abs(z).max()) * GROUP),
                   "fewest": int(size.min()), "most": int(size.max()), "sizes": np.bincount(size, minlength=GROUP + 1).tolist()}
  return out


# ---- balance


def survivors(rule: str, key, table, score: np.ndarray) -> np.ndarray:
  """Which of [prompts, GROUP] survive under `rule`."""
  flat = jnp.asarray(score.reshape(-1), jnp.float32)
  group = jnp.repeat(jnp.arange(score.shape[0], dtype=jnp.int32), GROUP)
  limits = {k: RULE[k] for k in ("kappa", "rho", "p_min", "p_max")}
  q, method = prune.posterior(table, flat), "bernoulli"
  if rule == "none":
    return np.ones(score.shape, bool)
  if rule == "random":
    p = jnp.full_like(q, RULE["kappa"])
  elif rule == "published":
    p = prune.survival(q, delta=prune.solve_delta(table, **RULE), **RULE)
  else:
    by_group = jax.vmap(lambda q: prune.group_survival(q, jnp.zeros(GROUP, jnp.int32), jnp.ones(GROUP, bool), **limits))
    p = jax.jit(by_group)(q.reshape(-1, GROUP)).reshape(-1)
    method = "systematic" if rule == "group, fixed size" else "bernoulli"
  return np.asarray(jax.jit(prune.draw, static_argnames="method")(key, p, method=method, groups=group)).reshape(score.shape)


RULES = ("none", "random", "published", "group", "group, fixed size")


def balance(rng, prompts: int) -> dict:
  """E[rho_hat], E[rho_hat (1 - rho_hat)] and the share of mixed groups, by hardness and rule."""
  out = {"question": "balance", "prompts": prompts}
  for name, hardness in HARDNESS.items():
    _, score, reward = rollouts(rng, 4 * prompts, hardness)
    table = prune.update(prune.Calibration(), jnp.asarray(score.reshape(-1)), jnp.asarray(reward.reshape(-1)))
    _, score, reward = rollouts(rng, prompts, hardness)
    for rule in RULES:
      keep = survivors(rule, jax.random.key(2), table, score)
      count = keep.sum(1)
      ratio = np.where(count > 0, (keep * reward).sum(1) / np.maximum(count, 1), np.nan)
      value = np.nan_to_num(ratio * (1 - ratio))  # a group without survivors teaches nothing
      out.setdefault(name, {})[rule] = {
        "pos_ratio": float(np.nanmean(ratio)), "pos_var": float(value.mean()),
        "standard_error": float(value.std() / np.sqrt(prompts)), "mixed": float((value > 0).mean()),
        "kept": float(keep.mean())}
  return out


# ---- lengths


def lengths(rng, prompts: int) -> dict:
  """Tokens generated and trained on with one decision at 512, and with four whose keep ratios multiply to the same."""
  total = np.clip(rng.lognormal(np.log(0.6 * 2048), 0.5, (prompts, GROUP)), 128, 2048)
  logit = rng.normal(size=(prompts, 1)) + rng.normal(size=(prompts, GROUP))
  reward = (rng.random(logit.shape) < 1 / (1 + np.exp(-logit))).astype(np.float32)
  out = {"question": "lengths", "rollouts": prompts * GROUP, "unpruned": float(total.sum())}
  for name, stops in (("one", (512,)), ("four", (64, 128, 256, 512))):
    rule = RULE | {"kappa": RULE["kappa"]**(1 / len(stops))}
    alive, tokens, reached = np.ones(total.shape, bool), total.copy(), total >= stops[-1]
    for c, stop in enumerate(stops):
      score = logit + rng.normal(size=logit.shape) * np.sqrt(512 / stop)  # a shorter prefix says less
      up = alive & (total > stop)
      table = prune.update(prune.Calibration(), jnp.asarray(score[up]), jnp.asarray(reward[up]))
      p = prune.survival(prune.posterior(table, jnp.asarray(score)), delta=prune.solve_delta(table, **rule), **rule)
      cut = up & ~np.asarray(prune.draw(jax.random.key(c), p))
      tokens[cut], alive[cut] = stop, False
    out[name] = {"tokens": float(tokens.sum()), "saved": float(1 - tokens.sum() / total.sum()),
                 "kept": float(alive[reached].mean()), "detect": stops}
  return out


# ---- signal


SIGNAL_RULES = ("published", "random", "group", "budget")
SHARES, AUCS, BATCH = (0.5, 0.35), (0.6, 0.7, 0.8), 32  # kept shares; AUCs over all rollouts; groups decided together
# Right at 18%, 64% of groups mixed, signal 1.5: much as Qwen2.5-Coder-0.5B on GSM8K before training (17%, 64%, 1.53).
POLICY = {"hardness": -2.9, "between": 2.3, "within": 1.2}


def noise_for(rng, wanted: float) -> float:
  """Standard deviation of the score's noise at which its AUC over all rollouts is `wanted`, by bisection on 3,200 groups."""
  low, high = 0.0, 30.0
  chance, logit, _ = rollouts(rng, 3200, noise=0.0, **POLICY)
  unit, reward = rng.normal(size=logit.shape), rng.random(logit.shape) < chance
  for _ in range(20):
    middle = (low + high) / 2
    above = auc((logit + middle * unit).reshape(-1), reward.reshape(-1)) > wanted
    low, high = (middle, high) if above else (low, middle)
  return middle


@functools.partial(jax.jit, static_argnames=("rule", "kappa"))
def kept_of_batches(key, table, score, rule: str, kappa: float):
  """Who survives, bool[N, BATCH * GROUP], of N batches of scores: probabilities by `rule`, systematic draws, a group's number of
  survivors fixed; under "budget" the batch's."""
  group, everybody = jnp.repeat(jnp.arange(BATCH, dtype=jnp.int32), GROUP), jnp.ones(BATCH * GROUP, bool)
  limits = {"kappa": kappa, "p_min": RULE["p_min"], "p_max": RULE["p_max"]}
  constants = limits | {"rho": RULE["rho"], "lam": RULE["lam"] if rule == "published" else 0.0}
  delta = prune.solve_delta(table, **constants)

  def one(key, score):
    q = prune.posterior(table, score)
    if rule == "budget":
      p = budget_probability(q, group, everybody, ~everybody, kappa=kappa, p_min=0.02, p_max=1.0)
    elif rule == "group":
      p = prune.group_survival(q, group, everybody, rho=RULE["rho"], **limits)
    else:
      p = prune.survival(q, delta=delta, **constants)
    return prune.draw(key, p, method="systematic", groups=jnp.zeros_like(group) if rule == "budget" else group)

  return jax.lax.map(lambda x: one(*x), (jax.random.split(key, len(score)), score))


def signal(rng, prompts: int) -> dict:
  """Signal a group, survivors' share of mixed groups and kept share, by AUC, kept share and rule; and what all rollouts hold."""
  count = prompts // BATCH * BATCH
  chance, _, reward = rollouts(rng, count, **POLICY)
  spread = lambda keep: np.sum(keep * (reward - (keep * reward).sum(1, keepdims=True) / np.maximum(
    keep.sum(1, keepdims=True), 1))**2, axis=1)
  whole = spread(np.ones_like(reward))
  out = {"question": "signal", "prompts": count, "groups_a_batch": BATCH, "success": float(reward.mean()),
         "all": {"signal": float(whole.mean()), "mixed": float((whole > 0).mean())}}
  for wanted in AUCS:
    noise = noise_for(rng, wanted)
    _, past, known = rollouts(rng, 4 * count, noise=noise, **POLICY)
    level = np.log(known.mean() / (1 - known.mean()))  # scores near 0 use the table's bins
    table = prune.update(prune.Calibration(), jnp.asarray(past.reshape(-1) - level), jnp.asarray(known.reshape(-1)))
    score = np.log(chance / (1 - chance)) + noise * rng.normal(size=chance.shape)
    within = [auc(s, r) for s, r in zip(score, reward, strict=True) if 0 < r.sum() < GROUP]
    cell = {"auc": auc(score.reshape(-1), reward.reshape(-1)), "auc_within": float(np.mean(within))}
    batches = jnp.asarray((score - level).reshape(-1, BATCH * GROUP), jnp.float32)
    for kappa in SHARES:
      for rule in SIGNAL_RULES:
        keep = np.asarray(kept_of_batches(jax.random.key(3), table, batches, rule, kappa)).reshape(reward.shape)
        value = spread(keep)
        cell.setdefault(str(kappa), {})[rule] = {
          "signal": float(value.mean()), "standard_error": float(value.std() / np.sqrt(count)),
          "rows_in_mixed": float(keep[value > 0].sum() / keep.sum()), "kept": float(keep.mean())}
    out[str(wanted)] = cell
  return out


# ---- plots


def plot(results: dict, path: Path) -> None:
  import matplotlib
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  figure, axes = plt.subplots(2, 3, figsize=(14, 8), layout="constrained")
  axes = axes.flat
  x, y = np.array(results["theory"]["points"]).T
  axes[0].scatter(y, x, s=5, alpha=0.5)
  axes[0].plot([0, y.max()], [0, y.max()], color="k", lw=1)
  axes[0].set(xlabel="bound of Theorem 4.2 (delta = 0.1)", ylabel="|positive ratio - rho|",
              title="theory: below the line, the bound holds")
  names = ("published", "weighted")
  b = results["bias"]
  axes[1].bar(names, [b[n]["bias"] for n in names], yerr=[2 * b[n]["standard_error"] for n in names], capsize=6,
              color=["C3", "C0"])
  axes[1].axhline(0, color="k", lw=1)
  keep = ", ".join(f"{n} {b[n]['keep_ratio']:.3f}" for n in names)
  axes[1].set(ylabel="prior less truth (bars: 2 standard errors)", title=f"bias of the table's prior\n(mean p, aim 0.5: {keep})")
  for method, shift in (("bernoulli", -0.2), ("systematic", 0.2)):
    sizes = np.array(results["draws"][method]["sizes"]) / results["draws"]["repeats"]
    axes[2].bar(np.arange(GROUP + 1) + shift, sizes, width=0.4, label=method)
  axes[2].set(xlabel="survivors of 16, sum p = 8", ylabel="share of draws", title="survivors of a group, by draw")
  axes[2].set_xticks(range(0, GROUP + 1, 2))
  axes[2].legend()
  width = 0.8 / len(RULES)
  for i, rule in enumerate(RULES):
    cells = [results["balance"][h][rule] for h in HARDNESS]
    axes[3].bar(np.arange(3) + (i - 2) * width, [c["pos_var"] for c in cells], width, label=rule,
                yerr=[2 * c["standard_error"] for c in cells])
  axes[3].set_xticks(range(3), HARDNESS)
  axes[3].set(ylabel="E[rho_hat (1 - rho_hat)]", title="balance of survivors (bars: 2 standard errors)", ylim=(0, 0.3))
  axes[3].legend(ncols=2, fontsize=8)
  n = results["lengths"]
  axes[4].bar(["512", "64, 128, 256, 512"], [100 * n[k]["saved"] for k in ("one", "four")])
  axes[4].set(ylabel="tokens saved, %", xlabel="decided at so many tokens",
              title=f"one decision and four\n({n['one']['kept']:.3f} and {n['four']['kept']:.3f} of the long kept)")
  draw_signal(axes[5], results["signal"])
  figure.savefig(path, dpi=80)


def draw_signal(axis, s: dict) -> None:
  for kappa, line in zip(SHARES, ("-", "--"), strict=True):
    for i, rule in enumerate(SIGNAL_RULES):
      cells = [s[str(a)][str(kappa)][rule] for a in AUCS]
      axis.errorbar(AUCS, [c["signal"] for c in cells], [2 * c["standard_error"] for c in cells], color=f"C{i}", linestyle=line,
                    marker="o", markersize=3, label=f"{rule}, {kappa:g} kept")
  axis.set(xticks=AUCS, xlabel="AUC of the score over all rollouts", ylabel="sum of (r - mean r)$^2$ a group", ylim=(0, None),
           title=f"signal of survivors (all rollouts: {s['all']['signal']:.2f})")
  axis.legend(ncols=2, fontsize=7)


def main():
  p = argparse.ArgumentParser(prog="python -m experiments.sim_pruning", description=__doc__.partition("\n")[0])
  p.add_argument("--out", default="experiments/results/sim_pruning")
  p.add_argument("--rollouts", type=int, default=1_000_000)
  p.add_argument("--seed", type=int, default=0)
  a = p.parse_args()
  rng, out = np.random.default_rng(a.seed), Path(a.out)
  out.mkdir(parents=True, exist_ok=True)
  results = {r["question"]: r for r in (
    theory(rng, max(100, a.rollouts // 200)), bias(rng, a.rollouts), draws(rng, max(1000, a.rollouts // 25)),
    balance(rng, max(320, a.rollouts // 250)), lengths(rng, max(320, a.rollouts // 250)),
    signal(rng, max(320, a.rollouts // 250)))}
  command = "python -m experiments.sim_pruning " + shlex.join(sys.argv[1:])
  with open(out / "results.jsonl", "w") as f:
    for r in results.values():
      f.write(json.dumps(r | {"seed": a.seed, "command": command.strip()}) + "\n")
      print(json.dumps({k: v for k, v in r.items() if k != "points"}))
  plot(results, out / "sim_pruning.png")


if __name__ == "__main__":
  config.run(main)
