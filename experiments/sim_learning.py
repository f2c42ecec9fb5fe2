"""What pruning does to learning, without a model: a policy that chooses a beginning and an ending, and rewards by chance.

  python -m experiments.sim_learning [--out=experiments/results/sim_learning] [--seeds=10] [--steps=60]

A prompt is of one of four kinds. The policy draws one of 12 beginnings and one of 12 endings; its logits are the prompt's own,
fixed, plus the kind's, learned. Chances of success depend on prompt, beginning and ending. A step is 32 prompts x 16 rollouts, of
which a rule keeps half by the posterior of the beginning (calibrated, NOISE on its logit), through arrol_jax's own rules, draws
and advantages; then one step of Adam. A line an arm in OUT/results.jsonl: points of success gained over all prompts, with 95% of
Student's t over seeds, and of the differences to "plain" and to the survivors' baseline, paired; rows with an advantage a step.
Less than a minute on two cores.
"""

import argparse
import functools
import json
from pathlib import Path
import shlex
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from scipy import stats

from arrol_jax import config, prune
from arrol_jax.learning.losses import group_advantages, started_levels
from arrol_jax.pruning.budget import budget_probability

KINDS, CHOICES, PROMPTS = 4, 12, 400
BATCH, GROUP, RATE, NOISE = 32, 16, 0.03, 1.0
ARMS = ("plain", "eight", "random", "published", "budget")
BASELINES = {"plain": ("survivors",), "eight": ("survivors",)}  # where nothing is pruned there is one
EVERYBODY = np.ones(BATCH * GROUP, bool)


class World(NamedTuple):
  """kind i[P]; chance f[P,12,12] of success by beginning and ending; first, last f[P,12]: fixed logits of either."""
  kind: np.ndarray
  chance: np.ndarray
  first: np.ndarray
  last: np.ndarray


def make_world(seed: int) -> World:
  rng = np.random.default_rng(seed)
  kind = rng.integers(0, KINDS, PROMPTS)
  of_kind = lambda scale: scale * rng.normal(size=(KINDS, CHOICES))[kind]
  logit = rng.normal(-2.2, 1.3, PROMPTS)[:, None, None] + of_kind(1.0)[:, :, None] + of_kind(0.8)[:, None, :]
  chance = sigmoid(logit + 0.5 * rng.normal(size=logit.shape))
  return World(kind, chance, rng.normal(size=(PROMPTS, CHOICES)), rng.normal(size=(PROMPTS, CHOICES)))


def sigmoid(x):
  return 1.0 / (1.0 + np.exp(-x))


def softmax(x):
  e = np.exp(x - x.max(-1, keepdims=True))
  return e / e.sum(-1, keepdims=True)


def posteriors(rng, chance: np.ndarray) -> np.ndarray:
  """What a head with noise on its logit may believe at best, about chances f[B]: shrunk towards their mean, for all that it may
  be between (MacKay's approximation of a sigmoid's mean)."""
  logit = np.log(chance / (1 - chance))
  seen, share = logit + NOISE * rng.normal(size=logit.shape), np.var(logit) / (np.var(logit) + NOISE**2)
  return sigmoid((logit.mean() + share * (seen - logit.mean())) / np.sqrt(1 + np.pi / 8 * share * NOISE**2))


@jax.jit
def budget(q: jax.Array, groups: jax.Array) -> jax.Array:
  everybody = jnp.asarray(EVERYBODY)
  return budget_probability(q, groups, everybody, ~everybody, kappa=0.5, p_min=0.02, p_max=1.0)


@jax.jit
def published(q: jax.Array) -> jax.Array:
  """delta, for a mean of kappa, by bisection."""
  survival = functools.partial(prune.survival, q, kappa=0.5, rho=0.5, lam=0.5, p_min=0.1, p_max=0.9)

  def halve(_, ends):
    middle = (ends[0] + ends[1]) / 2
    low = survival(delta=middle).mean() < 0.5
    return jnp.where(low, middle, ends[0]), jnp.where(low, ends[1], middle)

  return survival(delta=jax.lax.fori_loop(0, 30, halve, (-1.0, 1.0))[0])


draw = jax.jit(functools.partial(prune.draw, method="systematic"))


def keep(rng, arm: str, q: np.ndarray, groups: np.ndarray) -> np.ndarray:
  """Who is kept, bool[B]."""
  if arm == "plain":
    return EVERYBODY
  if arm == "eight":
    return np.arange(len(q)) % GROUP < GROUP // 2
  key, all_of_them = jax.random.key(rng.integers(2**31)), jnp.zeros_like(groups)
  p = published(q) if arm == "published" else budget(q, groups) if arm == "budget" else jnp.full(len(q), 0.5)
  return np.asarray(draw(key, p, groups=all_of_them if arm == "budget" else groups))


def learn(seed: int, arm: str, baseline: str, steps: int) -> tuple[list[float], float]:
  """Mean chance of success over all prompts after 0, 1, ... steps, and rows with an advantage a step."""
  world, rng = make_world(seed), np.random.default_rng(seed + 1000)
  learned = {name: np.zeros((KINDS, CHOICES)) for name in ("first", "last")}
  optimizer = optax.adam(RATE, b2=0.99)
  state, update = optimizer.init(learned), jax.jit(optimizer.update)
  policy = lambda: [softmax(getattr(world, name) + learned[name][world.kind]) for name in ("first", "last")]
  value = lambda: float(np.einsum("pa,pb,pab->p", *policy(), world.chance).mean())
  out, rows = [value()], 0
  groups = np.repeat(np.arange(BATCH, dtype=np.int32), GROUP)
  for _ in range(steps):
    prompts = np.repeat(rng.choice(PROMPTS, BATCH, replace=False), GROUP)
    first, last = (x[prompts] for x in policy())
    a, b = ((x.cumsum(1) > rng.random((len(x), 1)) * x.sum(1, keepdims=True)).argmax(1) for x in (first, last))
    rewards = (rng.random(len(prompts)) < world.chance[prompts, a, b]).astype(float)
    q = posteriors(rng, np.einsum("rb,rb->r", world.chance[prompts, a], last))
    kept = keep(rng, arm, q.astype(np.float32), groups)
    seen = np.where(kept, rewards, np.nan)
    levels = started_levels(seen, seen, q, groups) if baseline == "started" else None
    advantages = np.zeros(len(prompts))
    advantages[kept] = group_advantages(rewards[kept], groups[kept], levels=levels)
    rows += np.count_nonzero(advantages)
    gradient = {}
    for name, chosen, chances in (("first", a, first), ("last", b, last)):
      slope = advantages[:, None] * (np.eye(CHOICES)[chosen] - chances)
      gradient[name] = -np.stack([slope[world.kind[prompts] == k].sum(0) for k in range(KINDS)]) / kept.sum()
    change, state = update(gradient, state)
    learned = {name: learned[name] + np.asarray(change[name]) for name in learned}
    out.append(value())
  return out, rows / steps


def interval(values: np.ndarray) -> list[float]:
  """Mean and half of the 95% interval."""
  return [round(float(values.mean()), 3), round(float(stats.sem(values) * stats.t.ppf(0.975, len(values) - 1)), 3)]


def plot(curves: dict[str, np.ndarray], path: Path) -> None:
  import matplotlib
  matplotlib.use("Agg")
  from matplotlib import pyplot as plt
  figure, axes = plt.subplots(figsize=(7, 4.5))
  for (arm, baseline), gained in curves.items():
    axes.plot(gained.mean(0), "--" if baseline == "started" else "-", color=f"C{ARMS.index(arm)}",
              label=f"{arm}, baseline of all started" if baseline == "started" else arm)
  axes.set(xlabel="steps", ylabel="points of success gained, all prompts")
  axes.legend(frameon=False)
  figure.savefig(path, dpi=110, bbox_inches="tight")


def main():
  parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  parser.add_argument("--out", type=Path, default=Path("experiments/results/sim_learning"))
  parser.add_argument("--seeds", type=int, default=10)
  parser.add_argument("--steps", type=int, default=60)
  a = parser.parse_args()
  a.out.mkdir(parents=True, exist_ok=True)
  curves, lines = {}, []
  for arm in ARMS:
    for baseline in BASELINES.get(arm, ("survivors", "started")):
      found = [learn(seed, arm, baseline, a.steps) for seed in range(a.seeds)]
      gained = 100 * np.array([np.subtract(levels, levels[0]) for levels, _ in found])
      curves[arm, baseline] = gained
      less = lambda *other, gained=gained: interval((gained - curves[other])[:, -1])
      lines.append({"arm": arm, "baseline": baseline, "gained": interval(gained[:, -1]),
                    "gained_half_way": interval(gained[:, a.steps // 2]),
                    "rows_trained": round(float(np.mean([n for _, n in found])), 1),
                    **({"minus_plain": less("plain", "survivors")} if arm != "plain" else {}),
                    **({"minus_survivors": less(arm, "survivors")} if baseline == "started" else {}),
                    "seeds": a.seeds, "steps": a.steps})
      print(json.dumps(lines[-1]), flush=True)
  lines[0]["command"] = "python -m experiments.sim_learning " + shlex.join(sys.argv[1:])
  (a.out / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
  plot(curves, a.out / "sim_learning.png")


if __name__ == "__main__":
  config.run(main)
