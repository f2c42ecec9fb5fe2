"""What should a trace's vote weigh? Heads of the last token, weights and DeepConf, chosen on training problems, then tested.

  python -m experiments.vote_weights DIR --out=experiments/results/gsm8k_votes    # DIR: what experiments.vote_samples wrote

A CPU, five minutes or so and 4 GB; from the files alone. Heads (vote_fits.py: what they read, centred within the problem or not,
on all traces or on those that vote, strengths, stacks), weights (vote_rules.py) and DeepConf's variants are tried on the training
problems, each trace scored by a fit on other folds of problems, each posterior by a table of other folds. The pair of head and
weights that gets most training problems right is chosen, and the DeepConf variant that does; both are written to
OUT/choice.json, and only then are test problems read. What is counted on training problems: the vote of all traces and of DRAWS
random three quarters of them, which makes the choice less a matter of chance.

Lines of OUT/votes.jsonl, a line's part:
problems  pass@1, pass@k, and the majority, of training and test problems
chosen    the choice on test problems: accuracy, gain on the majority and on the chosen DeepConf, 95% intervals by bootstrap over
          problems, paired
after     the same of variants that were not chosen, looked at afterwards, so that the best of them flatters: all weights with the
          chosen head, all heads with the chosen weights and with rank, what ships, DeepConf's, the policy's own head
head      AUC of each head's score at the last token, out of fold and on test problems: of all traces, within a problem, and
          there of the traces that vote
size      gain on test problems of the chosen pair and of what ships, fitted on fewer training traces; means over up to REPEATS
          draws of problems
OUT/votes.png shows chosen, after and size.

To ask fresh problems (--skip of vote_samples) whether something seen afterwards holds: --choice=FILE, as choice.json, in place
of choosing.
"""

import functools
import json
import os
import shlex
import sys
from typing import NamedTuple

import numpy as np

from arrol_jax import config as configuration, usage
from arrol_jax.learning.metrics import auc, bootstrap_interval, mean, pass_at_k
from arrol_jax.types import UserError
from experiments import vote_fits, vote_rules, vote_samples
from experiments.vote_fits import FOLDS, SHIPPED, Fit, Trainer, known
from experiments.vote_rules import Ballots, Known, hits

DRAWS, SHARE = 8, 0.75
SIZES, REPEATS = (1024, 2048, 4096, 8192), 4


class Choice(NamedTuple):
  """What training problems say is best."""
  fit: Fit
  rule: str
  deepconf: str
  right: float           # share of training problems, as they are counted here
  deepconf_right: float


class Split(NamedTuple):
  """Training or test problems."""
  samples: vote_samples.Samples
  votes: Ballots
  deepconf: dict         # scores f[P,G] by name


def split(samples: vote_samples.Samples, test: bool) -> Split:
  some = samples.part(samples.test == test)
  if not len(some.success):
    raise UserError(f"there are no {'test' if test else 'training'} problems among the samples")
  votes = vote_rules.ballots(vote_rules.pools_of(some.answers), some.success)
  return Split(some, votes, vote_rules.deepconf_scores(some.confidences, some.tokens))


# ---- the choice: reads training problems alone


def draws(pools: np.ndarray) -> list[np.ndarray]:
  """Which traces vote, bool[P,G], in each of the votes that are counted."""
  rng, size = np.random.default_rng(0), max(1, round(SHARE * pools.shape[1]))
  order = [np.argsort(rng.random(pools.shape), axis=1) for _ in range(DRAWS)]
  return [np.ones(pools.shape, bool), *(x < size for x in order)]


def counted(totals, votes: Ballots, some: list[np.ndarray]) -> float:
  """Share of problems that are right over the votes of `some`; totals: of pools i32[P,G]."""
  return mean(hits(totals(np.where(here, votes.pools, -1)), votes, here).mean() for here in some)


def choose(train: Split, trainer: Trainer, tried: list[Fit]) -> tuple[Choice, dict]:
  """The best of all, the first of equals; and the share right f by (fit, rule)."""
  some, rules = draws(train.votes.pools), vote_rules.rules()
  found = {}
  for fit in tried:
    says = known(trainer, trainer.out_of_fold(fit))
    for name, rule in rules.items():
      found[fit, name] = counted(functools.partial(rule, says), train.votes, some)
  fit, rule = max(found, key=found.get)
  others = {name: counted(of, train.votes, some) for name, of in vote_rules.deepconf(train.deepconf).items()}
  best = max(others, key=others.get)
  return Choice(fit, rule, best, found[fit, rule], others[best]), found


# ---- figures of test problems


def judged(right: np.ndarray, base: np.ndarray, confident: np.ndarray) -> dict:
  """Accuracy and gains of votes f[P], on the majority's and on the chosen DeepConf's."""
  out = {"accuracy": float(right.mean()), "accuracy_ci": bootstrap_interval(right)}
  for name, other in (("gain", base), ("gain_deepconf", confident)):
    out |= {name: float((right - other).mean()), f"{name}_ci": bootstrap_interval(right - other)}
  return out


def problems(part: Split, which: str) -> dict:
  """What is known without any head."""
  right, size = part.samples.success, part.samples.success.shape[1]
  majority = hits(vote_rules.summed(np.ones(right.shape), part.votes.pools), part.votes)
  return {"part": "problems", "which": which, "problems": len(right), "traces": size, "pass@1": float(right.mean()),
          f"pass@{size}": mean(pass_at_k(row, size) for row in right), "majority": float(majority.mean()),
          "majority_ci": bootstrap_interval(majority), "answered": float((part.votes.pools >= 0).mean()),
          "tokens": float(part.samples.tokens.mean())}


def aucs(score: np.ndarray, part: Split) -> dict:
  """AUC of scores f[P,G]: all, within a problem, and there of the traces that vote."""
  right, voters = part.samples.success, part.votes.pools >= 0
  within = lambda counts: mean(a for a in (auc(s[c], r[c]) for s, r, c in zip(score, right, counts, strict=True))
                               if not np.isnan(a))
  return {"auc": auc(score.reshape(-1), right.reshape(-1)), "auc_within": within(np.ones(right.shape, bool)),
          "auc_within_voters": within(voters)}


class Tested:
  """Test problems and what each head says of them."""

  def __init__(self, part: Split, trainer: Trainer, choice: Choice):
    self.part, self.trainer, self.rules = part, trainer, vote_rules.rules()
    self.x, self.says = trainer.columns(part.samples, part.votes.pools), {}
    self.deepconf = vote_rules.deepconf(part.deepconf)
    self.base = hits(self.rules["majority"](Known(*[np.zeros(part.votes.pools.shape)] * 3), part.votes.pools), part.votes)
    self.confident = hits(self.deepconf[choice.deepconf](part.votes.pools), part.votes)

  def known(self, fit: Fit) -> tuple[Known, dict]:
    """What votes take, and the AUCs."""
    if fit not in self.says:
      train = self.trainer.out_of_fold(fit)
      scored = self.trainer.of_others(fit, self.x, self.part.votes.pools)
      figures = {name: value for name, value in aucs(scored.levelled, self.part).items() if name == "auc"}
      figures |= {name: value for name, value in aucs(scored.alone, self.part).items() if name != "auc"}
      self.says[fit] = known(self.trainer, train, scored), figures
    return self.says[fit]

  def vote(self, says: Known, rule: str) -> dict:
    return judged(hits(self.rules[rule](says, self.part.votes.pools), self.part.votes), self.base, self.confident)


def lines_of(train: Split, test: Split, trainer: Trainer, choice: Choice, found: dict):
  """Yields all lines of test problems."""
  tested, tried = Tested(test, trainer, choice), list(dict.fromkeys(fit for fit, _ in found))
  yield problems(train, "train")
  yield problems(test, "test")
  line = lambda part, head, rule, result, **more: {"part": part, "head": head, "rule": rule} | more | result
  of = lambda part, fit, rule: line(part, str(fit), rule, tested.vote(tested.known(fit)[0], rule), train=found[fit, rule])
  yield of("chosen", choice.fit, choice.rule)
  yield line("chosen", None, f"deepconf: {choice.deepconf}", judged(tested.confident, tested.base, tested.confident),
             train=choice.deepconf_right)
  yield from (of("after", choice.fit, rule) for rule in tested.rules)
  ships = shipped(tried)
  yield from (of("after", fit, rule) for fit in tried for rule in dict.fromkeys((choice.rule, "rank")) if fit != choice.fit)
  yield from (of("after", ships, rule) for rule in ("posterior", "logit", "best") if ships not in (None, choice.fit))
  yield from own_head(tested)
  for name, totals in tested.deepconf.items():
    yield line("after", None, f"deepconf: {name}", judged(hits(totals(test.votes.pools), test.votes), tested.base,
                                                          tested.confident))
  for fit in tried:
    scored, figures = trainer.out_of_fold(fit), tested.known(fit)[1]
    yield {"part": "head", "head": str(fit), "train_auc": aucs(scored.levelled, train)["auc"]} | {
      f"train_{k}": v for k, v in aucs(scored.alone, train).items() if k != "auc"} | figures
  yield from sizes(train, tested, [(choice.fit, choice.rule)] + [(ships, "rank")] * (ships is not None))


def shipped(tried: list[Fit]) -> Fit | None:
  """What configs with a ridge fit."""
  return next((fit for fit in tried if fit == Fit(SHIPPED)), None)


def own_head(tested: Tested):
  """Yields lines of the head that the policy brought, which saw other policies' traces."""
  own = tested.part.samples.own
  if own is not None:
    logit, q = own[..., 0], own[..., 1]
    scale = float(np.std(logit - logit.mean(axis=1, keepdims=True))) or 1.0
    for rule in (name for name in tested.rules if name != "majority" and not name.startswith("levelled")):
      yield {"part": "after", "head": "the policy's own", "rule": rule} | tested.vote(Known(logit / scale, q, q), rule)
    yield {"part": "head", "head": "the policy's own"} | aucs(logit, tested.part)


def sizes(train: Split, tested: Tested, pairs: list[tuple[Fit, str]]):
  """Yields lines of (head, weights) fitted on fewer training problems."""
  count, group = train.samples.success.shape
  rng = np.random.default_rng(1)
  for size in [n for n in SIZES if FOLDS <= n // group < count] + [count * group]:
    draw = [rng.permutation(count) < size // group for _ in range(REPEATS if size < count * group else 1)]
    for fit, rule in pairs:
      right = []
      for some in draw:
        trainer = Trainer(train.samples.part(some), train.votes.pools[some], [fit])
        x = trainer.columns(tested.part.samples, tested.part.votes.pools)
        says = known(trainer, trainer.out_of_fold(fit), trainer.of_others(fit, x, tested.part.votes.pools))
        right.append(hits(tested.rules[rule](says, tested.part.votes.pools), tested.part.votes))
      yield {"part": "size", "size": size, "head": str(fit), "rule": rule, "draws": len(draw)} | judged(
        np.mean(right, axis=0), tested.base, tested.confident)


# ---- output


def told(line: dict) -> str:
  """A line for the screen."""
  share = lambda name: f"{line[name]:+.1%} ({line[name + '_ci'][0]:+.1%} to {line[name + '_ci'][1]:+.1%})"
  if line["part"] == "problems":
    return f"{line['which']}: {line['problems']} problems, a trace {line['pass@1']:.1%} right, majority {line['majority']:.1%}"
  if line["part"] == "head":
    return f"AUC {line['auc']:.3f}, within {line['auc_within']:.3f}: {line['head']}"
  size = f"{line['size']} traces, " if "size" in line else ""
  return (f"{line['part']}: {size}{line['accuracy']:.1%}, {share('gain')} on the majority, {share('gain_deepconf')} on DeepConf: "
          f"{line['rule']}" + (f" of {line['head']}" if line["head"] else ""))


def plot(lines: list[dict], path: str) -> None:
  """Gains on the majority: weights with the chosen head, and by how many traces it was fitted on."""
  import matplotlib
  matplotlib.use("Agg")
  import matplotlib.pyplot as plt
  chosen = [x for x in lines if x["part"] == "chosen"]
  shown = [x for x in lines if x["part"] == "after" and x["head"] == chosen[0]["head"]]
  fig, axes = plt.subplots(1, 2, figsize=(13, 7), width_ratios=(3, 2))
  bars = lambda some: 100 * np.abs(np.array([np.array(x["gain_ci"]) - x["gain"] for x in some]).reshape(-1, 2).T)
  rows = sorted(shown, key=lambda x: x["gain"]) + chosen[1:] + chosen[:1]
  axes[0].errorbar([100 * x["gain"] for x in rows], range(len(rows)), xerr=bars(rows), fmt="o", capsize=2)
  axes[0].set_yticks(range(len(rows)), [("chosen: " if x in chosen else "") + x["rule"] for x in rows], fontsize=7)
  axes[0].set(xlabel="points over the majority, test problems", title=chosen[0]["head"])
  axes[0].title.set_fontsize(8)
  for name in dict.fromkeys((x["head"], x["rule"]) for x in lines if x["part"] == "size"):
    mine = [x for x in lines if x["part"] == "size" and (x["head"], x["rule"]) == name]
    axes[1].errorbar([x["size"] for x in mine], [100 * x["gain"] for x in mine], bars(mine), marker="o", capsize=3,
                     label=f"{name[1]}\n{name[0]}")
  ticks = sorted({x["size"] for x in lines if x["part"] == "size"})
  axes[1].set(xlabel="training traces", ylabel="points over the majority, test problems", xscale="log")
  axes[1].set_xticks(ticks, ticks)
  axes[1].minorticks_off()
  axes[1].legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0))
  for axis, line in zip(axes, ("axvline", "axhline"), strict=True):
    getattr(axis, line)(0, color="grey", linewidth=0.8)
  fig.tight_layout()
  fig.savefig(path, dpi=90, bbox_inches="tight")
  plt.close(fig)


def read_choice(path: str, tried: list[Fit]) -> Choice:
  """What OUT/choice.json holds."""
  try:
    with open(path) as f:
      found = json.load(f)
    fit = found["fit"] | {name: tuple(found["fit"][name]) for name in ("inputs", "above")}
    choice = Choice(Fit(**fit), found["rule"], found["deepconf"], float("nan"), found["deepconf_right"])
  except (OSError, ValueError, KeyError, TypeError) as e:
    raise UserError(f"--choice={path}: {type(e).__name__}: {e}") from e
  if choice.fit not in tried or choice.rule not in vote_rules.rules():
    raise UserError(f"--choice={path}: {choice.rule} of {choice.fit} is nothing that is tried on these samples")
  return choice


def main():
  p = usage.Parser(prog="python -m experiments.vote_weights", description=__doc__.partition("\n")[0])
  p.add_argument("samples", help="folder that experiments.vote_samples wrote")
  p.add_argument("--out", default="experiments/results/votes", help="folder for the results")
  p.add_argument("--choice", help="a file as OUT/choice.json: nothing is chosen")
  a = p.parse_args()
  samples = vote_samples.load(a.samples)
  os.makedirs(a.out, exist_ok=True)
  train = split(samples, False)
  if len(train.votes.pools) < 2 * FOLDS:
    raise UserError(f"{len(train.votes.pools)} training problems are too few: {2 * FOLDS} at least")
  trainer = Trainer(train.samples, train.votes.pools)
  tried = vote_fits.fits(train.samples)
  given = a.choice and read_choice(a.choice, tried)
  choice, found = choose(train, trainer, [given.fit] if given else tried)
  choice = given._replace(right=found[given.fit, given.rule]) if given else choice
  print(f"{'given' if given else f'chosen of {len(found)}'}, on {len(train.votes.pools)} training problems, {choice.right:.1%} "
        f"right: {choice.rule} of {choice.fit}; of DeepConf's, {choice.deepconf_right:.1%}: {choice.deepconf}", flush=True)
  with open(f"{a.out}/choice.json", "w") as f:  # before test problems are read
    json.dump(choice._asdict() | {"fit": choice.fit._asdict()}, f, indent=1)
  about = samples.about | {"analysis": f"python -m experiments.vote_weights {shlex.join(x for x in sys.argv[1:] if x[0] == '-')}"}
  lines = []
  for line in lines_of(train, split(samples, True), trainer, choice, found):
    lines.append(line)
    if line["part"] != "after":
      print(told(line), flush=True)
  with open(f"{a.out}/votes.jsonl", "w") as f:
    f.writelines(json.dumps(x) + "\n" for x in [{"part": "about"} | about, *lines])
  plot(lines, f"{a.out}/votes.png")


if __name__ == "__main__":
  configuration.run(main)
