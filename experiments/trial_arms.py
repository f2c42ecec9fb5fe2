"""The trial as data: which arms, seeds, settings and budgets of step seconds each regime has, and the command of each run.

Does pruning win at equal wall clock? All arms of a regime share its settings (SHARED and the regime's own): token-mean loss with
a penalty for overlong responses, a gradient norm that clips no arm, systematic draws, a cold start of two steps. They differ in
what ARMS says. A run ends after `full` seconds of steps, compilation and evaluations not counted, and is evaluated after `half`
of them and at its end: greedily, and with four samples a problem. Left out: how runs are started (trial_queue.py), what they
showed (trial_page.py).
"""

from collections.abc import Iterator
import dataclasses
import json
import math
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "experiments/results/trial"
SKIP = 4  # first steps left out of medians and means: two of the cold start, and those that follow are the first of their kind

SHARED = {
  "steps": 100000, "loss.aggregate": "token", "loss.overlong": 0.2, "optim.clip_norm": 10.0, "prune.draw": "systematic",
  "prune.cold_start": 2, "eval.before": False, "eval.samples": 1, "eval.temperature": 0.0, "eval.sampled": 4,
  "checkpoint.every": 100000, "checkpoint.last": False, "log.backends": "jsonl", "log.rollouts": 0}

PLAIN = "plain"  # GRPO with 16 rollouts a prompt, nothing pruned: what all arms stand beside
RATE = "3e-6"  # of all arms where a regime says nothing else: not tuned, what earlier runs had
MODEL = "1d9614638d18"  # of the gpu scale's model: the first digits of its file's SHA-256
SPARE_SEED = 100  # of runs that choose a learning rate: no other run has it

_OURS = {
  "prune.rule": "budget", "prune.p_max": 1.0, "prune.p_min": 0.02, "prune.half_life": 4096.0, "quality.fit": "ridge",
  "quality.inputs": "('mean@2/3','prompt@2/3','logprobs','windows','siblings')", "quality.half_life": 8192.0}


@dataclasses.dataclass(frozen=True)
class Arm:
  """what: in the page's words; ours: takes our learning rate. prompts: a step, as a share of the regime's; looked_at: the same of
  those that prompts are chosen from."""
  what: str
  settings: dict
  ours: bool = False
  prompts: float = 1.0
  looked_at: float | None = None


ARMS = {
  "plain": Arm("GRPO, 16 rollouts a prompt", {"prune.enabled": False}),
  "plain8": Arm("GRPO, 8 rollouts a prompt", {"prune.enabled": False, "rollout.group_size": 8}),
  "random": Arm("half dropped by chance", {"prune.rule": "random"}),
  "published": Arm("the paper's rule and head", {"prune.rule": "published"}),
  "budget": Arm("ours: the batch's budget, half kept", _OURS, True),
  "budget035": Arm("ours, 0.35 kept", _OURS | {"prune.keep": 0.35}, True),
  "max_variance": Arm("PODS: all finish, the half whose rewards vary most is learned from", {"prune.rule": "max_variance"}),
  "budget_max_variance": Arm("ours, and of the survivors PODS' half is learned from", _OURS | {"learn.keep": 0.5}, True),
  "chosen": Arm("ours without pruning: GRPO on the half of twice as many prompts that promises most",
                {"prune.enabled": False, "quality.half_life": _OURS["quality.half_life"]}, True, looked_at=2.0),
  "chosen4": Arm("ours without pruning: GRPO on the quarter of four times as many prompts that promises most",
                 {"prune.enabled": False, "quality.half_life": _OURS["quality.half_life"]}, True, looked_at=4.0),
  "budget_chosen": Arm("ours, on the half of twice as many prompts that promises most", _OURS, True, looked_at=2.0),
  "budget_wide": Arm("ours, with half as many prompts again a step: as many seconds a step as plain", _OURS, True, prompts=1.5)}


def running_ahead(steps: int, words: str, suffix: str, arms: dict[str, Arm]) -> dict[str, Arm]:
  """Plain, and arms where a step's free slots begin the next `steps` (in words) steps' rollouts: as many updates old at most,
  weighed as such."""
  more = {"rollout.ahead": steps, "loss.correction": "truncate"}
  return {"plain": ARMS["plain"]} | {
    name + suffix: dataclasses.replace(arm, what=f"{arm.what}; the next {words} steps' begin in free slots",
                                       settings=arm.settings | more) for name, arm in arms.items()}


_THREE = {name: ARMS[name] for name in ("plain", "budget", "chosen4")}
_BOTH = dataclasses.replace(ARMS["budget_chosen"], what="ours, on the quarter of four times as many prompts that promises most",
                            looked_at=4.0)
AHEAD = running_ahead(2, "two", "_ahead", _THREE)
_EIGHT = dataclasses.replace(ARMS["chosen4"], what="GRPO, 8 rollouts a prompt of the quarter that promises most",
                             settings=ARMS["chosen4"].settings | {"rollout.group_size": 8})
# A step lasts at least its longest response's decode steps divided by one more than that, whoever is pruned: sim_ahead.py.
AHEAD4 = running_ahead(4, "four", "_ahead4", _THREE | {"budget_chosen4": _BOTH, "chosen4_8": _EIGHT}) | {
  "chosen4": ARMS["chosen4"], "resampled": Arm("DAPO's dynamic sampling: groups that are all alike are replaced, in three rounds",
                                               {"prune.enabled": False, "rollout.resampling": 3})}
# How many seeds each has (from 1 on), in the queue's order: the pairs that the question is about first, and most of them.
SEEDS = (dict.fromkeys(("plain", "plain8", "budget", "chosen"), 5), {"chosen4": 5},
         dict.fromkeys(("published", "max_variance", "random", "budget_chosen"), 3),
         dict.fromkeys(("budget035", "budget_max_variance", "budget_wide"), 3))


@dataclasses.dataclass(frozen=True)
class Tuning:
  """A choice among `rates` by the runs of a regime of this name, which has both arms of `on` with each of them: on a seed that
  only such runs have, held out on training problems that none of its runs trains on. All arms but ours get the best rate of the
  first of `on`, ours that of the second. One run each: which of two near ones is better is not certain. arms: those of the regime
  that is tuned. That list is not to grow: runs at the rates that were chosen would be no longer those of their regime."""
  name: str
  on: tuple[str, str]
  rates: tuple[str, ...]
  arms: dict[str, Arm]

  def by_rate(self) -> dict[str, Arm]:
    """Both arms with each rate: "plain@3e-6"."""
    return {f"{name}@{rate}": dataclasses.replace(self.arms[name], settings=self.arms[name].settings | {"optim.lr": rate})
            for name in self.on for rate in self.rates}

  def chosen(self) -> dict:
    """Of a Regime: `rates`, each the one with the highest mean of greedy and sampled accuracy at the end, the lower of two alike,
    and as `tuned` this; until all these runs are there `waits`."""
    found, versions = {}, set()
    for name in self.by_rate():
      path = ROOT / RESULTS / self.name / f"{name}_seed{SPARE_SEED}" / "run.json"
      try:
        about = json.loads(path.read_text())
        found[name] = about["full"]["accuracy"] + about["full"]["sampled"]["accuracy"]
        versions.add((about["commit"], about["code"]))
        right = math.isfinite(found[name]) and about["settings"]["optim.lr"] == name.partition("@")[2] and len(versions) == 1
      except (OSError, ValueError, KeyError, TypeError):  # not there; or damaged, which the page tells
        right = False
      if not right:
        return {"waits": self.name}
    lowest_first = sorted(self.rates, key=float)
    return {"rates": tuple(max(lowest_first, key=lambda rate, arm=arm: found[f"{arm}@{rate}"]) for arm in self.on), "tuned": self}


_ALONE = {name: dataclasses.replace(ARMS[name], settings=ARMS[name].settings | {"optim.schedule": "linear"})
          for name in ("plain", "budget", "plain8")}
_BATCHES = {name: ARMS[name] for name in ("plain", "budget", "plain8")} | {
  "half_prompts": Arm("GRPO, 16 rollouts of half as many prompts", {"prune.enabled": False}, prompts=0.5),
  "budget_gentle": dataclasses.replace(ARMS["budget"], what="ours, at the rate divided by the square root of 2",
                                       settings=_OURS | {"optim.lr": "2.12e-6"})}
# What the paper's tables compare and the trial's first regimes have not.
_DAPO = {"loss.name": "dapo", "rollout.resampling": 3}
_TABLES = {name: ARMS[name] for name in ("published", "budget", "random", "budget_wide")} | {
  "plain": dataclasses.replace(ARMS["plain"], settings=ARMS["plain"].settings | {"log.rollouts": 32}),
  "dapo": Arm("DAPO: groups that are all alike are replaced, in three rounds", _DAPO | {"prune.enabled": False}),
  "dapo_published": Arm("DAPO, and the paper's rule and head", _DAPO | {"prune.rule": "published"}),
  "keep025": Arm("the paper's rule and head, 0.25 kept", {"prune.rule": "published", "prune.keep": 0.25}),
  "keep075": Arm("the paper's rule and head, 0.75 kept", {"prune.rule": "published", "prune.keep": 0.75})}
_ALONE_HEIGHTS = Tuning("math_falling_tuning", ("plain", "budget"), ("3e-6", "6e-6"), _ALONE)
_GSM8K_RATES = Tuning("gsm8k_tuning", (PLAIN, "budget"), ("1.5e-6", "3e-6", "6e-6"), ARMS)
_ALONE_RATES = Tuning("math_alone_tuning", (PLAIN, "budget"), ("7.5e-7", "1.5e-6", "3e-6"), ARMS)
_MATH_RATES = Tuning("math_tuning", ("plain", "chosen4_ahead4"), ("3e-6", "6e-6", "1.2e-5"), AHEAD4)


@dataclasses.dataclass(frozen=True)
class Regime:
  """scale: what it runs on. half, full: seconds of steps. queue: numbers of seeds by arm, those that run first, then the next;
  first: the first seed; gone: runs that are not to be made, as the host of the others of their seed is gone. ours: the arms that
  the question is about, of which the first is compared with each other; nulls: all arms are compared with plain, and with the
  better of these; primary: first and last seed of each comparison of the first of ours with plain that was set before it ran.
  square: four arms, with neither of two changes, the first, the second, both. rates: learning rate of all arms but ours, and of
  ours; tuned: by what they were chosen, if they were; waits: the regime that has to be run before, as it chooses them. train,
  test: files of the data's folder, "" where the config has its own; spare: so many problems, evenly over `train`, are held out in
  place of `test`; every: of `test` each so-manieth problem is asked. votes: so many seeds of these arms may also vote, as
  `voting` says."""
  name: str
  scale: str
  what: str
  config: str
  half: float
  full: float
  settings: dict
  queue: tuple[dict[str, int], ...]
  arms: dict[str, Arm] = dataclasses.field(default_factory=lambda: ARMS)
  first: int = 1
  rates: tuple[str, str] | None = (RATE, RATE)
  tuned: Tuning | None = None
  waits: str = ""
  train: str = ""
  test: str = ""
  spare: int = 0
  every: int = 1
  ours: tuple[str, ...] = ("budget", "chosen")
  nulls: tuple[str, ...] = ("plain8", "max_variance")
  square: tuple[str, ...] = ()
  voting: dict = dataclasses.field(default_factory=dict)
  votes: dict[str, int] = dataclasses.field(default_factory=dict)
  gone: tuple[str, ...] = ()
  primary: tuple[tuple[int, int], ...] = ()

  @property
  def seeds(self) -> dict[str, int]:
    """Number of seeds by arm."""
    return {arm: count for part in self.queue for arm, count in part.items()}


_GSM8K = {"rollout.prompts": 32, "rollout.group_size": 16, "rollout.max_new": 600, "prune.detect": "(128,)"}
_VOTING = {"eval.samples": 16, "eval.temperature": 1.0, "eval.deepconf": True, "eval.window": 64, "eval.problems": 640}
_MATH = _GSM8K | {"rollout.max_new": 1024}
_MATH_VOTING = _VOTING | {"eval.problems": 0}
_SQUARE = ("plain", "chosen4", "plain_ahead4", "chosen4_ahead4")


def _tuning(tuning: Tuning, what: str, settings: dict, train: str, spare: int) -> Regime:
  arms = tuning.by_rate()
  return Regime(tuning.name, "gpu", f"{what}, on a spare seed and spare training problems", "configs/gsm8k_qwen05b.py", 60.0,
                120.0, settings, (dict.fromkeys(arms, 1),), arms, SPARE_SEED, None, train=train, spare=spare)


REGIMES = {regime.name: regime for regime in (
  Regime("gsm8k", "gpu", "GSM8K, at most 600 tokens: the update is a large part of a step", "configs/gsm8k_qwen05b.py", 60.0,
         120.0, _GSM8K, (*SEEDS[:2], dict.fromkeys(SEEDS[2], 1)), train="gsm8k_train", test="gsm8k_test", voting=_VOTING,
         votes={"plain": 3, "budget": 3}),
  Regime("gsm8k_rest", "gpu", "GSM8K as above, same code and seeds on a later and faster host: the other arms, plain beside them",
         "configs/gsm8k_qwen05b.py", 60.0, 120.0, _GSM8K, ({"plain": 3, **SEEDS[2]}, SEEDS[3]), train="gsm8k_train",
         test="gsm8k_test", ours=("published", *SEEDS[3], "budget_chosen"), nulls=("max_variance",)),
  Regime("gsm8k_tables", "gpu", "GSM8K as above by later code on fresh seeds: what the paper's tables compare, DAPO and votes",
         "configs/gsm8k_qwen05b.py", 60.0, 120.0, _GSM8K,
         (dict.fromkeys(("plain", "published", "dapo", "dapo_published"), 2), {"budget": 2},
          dict.fromkeys(("random", "keep025", "keep075", "budget_wide"), 1)),
         _TABLES, 71, train="gsm8k_train", test="gsm8k_test", ours=("published", "dapo_published", "budget"), nulls=("dapo",),
         voting=_VOTING, votes=dict.fromkeys(("plain", "published", "budget"), 2)),
  Regime("gsm8k_tuned", "gpu", "GSM8K as above by later code on fresh seeds, at a learning rate that was chosen on a spare one",
         "configs/gsm8k_qwen05b.py", 60.0, 120.0, _GSM8K, (dict.fromkeys((PLAIN, "budget", "plain8"), 6),
                                                           {"max_variance": 4, "budget_wide": 3},
                                                           dict.fromkeys((PLAIN, "budget", "published"), 18)),
         first=81, train="gsm8k_train", test="gsm8k_test", ours=("budget", "budget_wide", "published"),
         primary=((82, 86), (87, 98)),
         gone=("plain8_seed81", "max_variance_seed81", *(f"published_seed{seed}" for seed in range(82, 97))),
         **_GSM8K_RATES.chosen()),
  Regime("ahead", "gpu", "GSM8K as above by later code, whose segments ask nobody, and with rollouts that run ahead",
         "configs/gsm8k_qwen05b.py", 60.0, 120.0, _GSM8K,
         (dict.fromkeys(("plain", "budget_ahead", "chosen4_ahead", "plain_ahead"), 5),), AHEAD, train="gsm8k_train",
         test="gsm8k_test", ours=("chosen4_ahead", "budget_ahead"), nulls=("plain_ahead",)),
  Regime("math", "gpu", "MATH, at most 1,024 tokens: generation is most of a step", "configs/gsm8k_qwen05b.py", 60.0, 120.0,
         _MATH, (dict.fromkeys(("plain", "plain_ahead", "budget_ahead", "chosen4_ahead"), 3),
                 dict.fromkeys(("plain", "chosen4_ahead", "plain_ahead"), 8)),
         AHEAD, train="math_train", test="math500", ours=("budget_ahead", "chosen4_ahead"), nulls=("plain_ahead",)),
  Regime("math4", "gpu", "MATH as above by later code, whose decisions ask nobody, up to four steps ahead, learning rates chosen",
         "configs/gsm8k_qwen05b.py", 60.0, 120.0, _MATH,
         (dict.fromkeys(("plain", "chosen4_ahead4"), 5), dict.fromkeys(("plain_ahead4", "chosen4"), 5),
          dict.fromkeys(("budget_chosen4_ahead4", "resampled"), 5), {"budget_ahead4": 3}),
         AHEAD4, train="math_train", test="math500", ours=("chosen4_ahead4", "budget_chosen4_ahead4", "budget_ahead4"),
         nulls=("plain_ahead4", "resampled"), square=_SQUARE, **_MATH_RATES.chosen()),
  Regime("math_fresh", "gpu", "MATH by later code on fresh seeds: ours beside other ways to halve the work or to mixed groups",
         "configs/gsm8k_qwen05b.py", 60.0, 120.0, _MATH,
         (dict.fromkeys(("plain", "chosen4_ahead4", "budget_chosen4_ahead4", "plain8", "max_variance", "resampled"), 5),
          {"chosen4_8_ahead4": 5}, dict.fromkeys(("chosen4", "plain_ahead4"), 5)),
         AHEAD4 | {arm: ARMS[arm] for arm in ("plain8", "max_variance")}, 6, train="math_train",
         test="math500", ours=("chosen4_ahead4", "budget_chosen4_ahead4"), nulls=("plain8", "max_variance", "resampled"),
         square=_SQUARE, **_MATH_RATES.chosen()),
  Regime("math_long", "gpu", "MATH as above, three times as long: is the lead more than a head start?",
         "configs/gsm8k_qwen05b.py", 180.0, 360.0, _MATH,
         (dict.fromkeys(("plain", "chosen4_ahead4", "budget_chosen4_ahead4"), 4),),
         {arm: AHEAD4[arm] for arm in ("plain", "chosen4_ahead4", "budget_chosen4_ahead4")}, 11, train="math_train",
         test="math500", ours=("chosen4_ahead4", "budget_chosen4_ahead4"), nulls=(), **_MATH_RATES.chosen()),
  Regime("math_halved", "gpu", "MATH as above: chosen prompts, rollouts halved by dropping some of 16 or by starting 8",
         "configs/gsm8k_qwen05b.py", 60.0, 120.0, _MATH,
         (dict.fromkeys(("budget_chosen4_ahead4", "chosen4_8_ahead4"), 6), dict.fromkeys(("chosen4_ahead4", "plain"), 6)),
         {arm: AHEAD4[arm] for arm in ("plain", "chosen4_ahead4", "budget_chosen4_ahead4", "chosen4_8_ahead4")}, 21,
         train="math_train", test="math500", ours=("budget_chosen4_ahead4",), nulls=("chosen4_8_ahead4",),
         **_MATH_RATES.chosen()),
  Regime("math_halved_again", "gpu", "the same question on fresh seeds by later code, both arms that it is about",
         "configs/gsm8k_qwen05b.py", 60.0, 120.0, _MATH, (dict.fromkeys(("budget_chosen4_ahead4", "chosen4_8_ahead4"), 8),),
         {arm: AHEAD4[arm] for arm in ("plain", "budget_chosen4_ahead4", "chosen4_8_ahead4")}, 31, train="math_train",
         test="math500", ours=("budget_chosen4_ahead4",), nulls=("chosen4_8_ahead4",), **_MATH_RATES.chosen()),
  Regime("math_alone", "gpu", "MATH, what the paper compares: pruning alone, no prompt chosen, nothing ahead; a larger test set",
         "configs/gsm8k_qwen05b.py", 60.0, 120.0, _MATH, (dict.fromkeys(("plain", "budget", "published"), 5), {"plain8": 5},
                                                          dict.fromkeys(("random", "max_variance", "budget035"), 3)),
         first=41, train="math_train", test="math_test", every=4, ours=("budget", "published"), nulls=("plain8",),
         voting=_MATH_VOTING, votes={"plain": 3, "budget": 3}, **_MATH_RATES.chosen()),
  Regime("math_tuned", "gpu", "MATH as above at learning rates that were chosen on a spare seed, lower ones among them",
         "configs/gsm8k_qwen05b.py", 60.0, 120.0, _MATH, (dict.fromkeys((PLAIN, "budget"), 5), {"plain8": 5},
                                                          dict.fromkeys(("published", "max_variance"), 3)),
         first=91, train="math_train", test="math_test", every=4, ours=("budget", "published"), **_ALONE_RATES.chosen()),
  Regime("math_batch", "gpu", "MATH: is it the batch's size at the rate that lets an early lead go?", "configs/gsm8k_qwen05b.py",
         60.0, 120.0, _MATH, (dict.fromkeys(("plain", "half_prompts", "budget_gentle"), 5), {"budget": 5, "plain8": 5}), _BATCHES,
         61, train="math_train", test="math_test", every=4, ours=("budget_gentle", "budget"), nulls=("half_prompts", "plain8"),
         **_MATH_RATES.chosen()),
  Regime("math_falling", "gpu", "MATH, pruning alone, and the learning rate falls linearly to 0 at the end: is a lead kept?",
         "configs/gsm8k_qwen05b.py", 60.0, 120.0, _MATH, (dict.fromkeys(("plain", "budget"), 5), {"plain8": 5}), _ALONE, 51,
         train="math_train", test="math_test", every=4, ours=("budget",), nulls=("plain8",), **_ALONE_HEIGHTS.chosen()),
  _tuning(_GSM8K_RATES, "GSM8K: learning rates", _GSM8K, "gsm8k_train", 1319),
  _tuning(_MATH_RATES, "MATH: learning rates", _MATH, "math_train", 720),
  _tuning(_ALONE_RATES, "MATH: learning rates of plain and of pruning alone", _MATH, "math_train", 1200),
  _tuning(_ALONE_HEIGHTS, "MATH: heights of the falling learning rate", _MATH, "math_train", 1200),
  Regime("arithmetic", "cpu", "The shipped arithmetic model: shows that the trial runs, decides nothing", "configs/quickstart.py",
         5.0, 10.0, {"rollout.prompts": 8, "rollout.group_size": 16, "eval.problems": 100},
         (dict.fromkeys(SEEDS[0], 2), {arm: 1 for part in SEEDS[1:] for arm in part}), rates=None,
         voting={"eval.samples": 16, "eval.temperature": 1.0, "eval.window": 8, "eval.problems": 64}, votes={"budget": 1}))}
TABLES = "gsm8k_tables"  # the regime that is there for the paper's tables
DEFAULT = {"gpu": ("gsm8k", "gsm8k_rest", "gsm8k_tables", "gsm8k_tuned", "ahead", "math", "math4", "math_fresh", "math_halved",
                   "math_halved_again", "math_alone", "math_tuned", "math_batch", "math_falling", "math_long"),
           "cpu": ("arithmetic",)}

# All pairs of arms that differ in that one learns from about half as many rollouts as the other, or in how it comes to that half;
# and, as a control, all that drop nothing beside plain: (regime, arm, other).
HALVED = {
  "pruned, beside the same without pruning": (
    *(("gsm8k", arm, "plain") for arm in ("budget", "published", "random")), ("gsm8k", "budget_chosen", "chosen"),
    *(("gsm8k_rest", arm, "plain") for arm in ("published", "random", "budget035")),
    *(("gsm8k_tables", arm, "plain") for arm in ("published", "budget", "random")), ("gsm8k_tables", "dapo_published", "dapo"),
    ("ahead", "budget_ahead", "plain_ahead"), ("math", "budget_ahead", "plain_ahead"),
    *((name, "budget_chosen4_ahead4", "chosen4_ahead4") for name in ("math_fresh", "math_halved")),
    *((name, arm, "plain") for name in ("gsm8k_tuned", "math_tuned") for arm in ("budget", "published")),
    *(("math_alone", arm, "plain") for arm in ("budget", "published", "random"))),
  "8 rollouts, beside 16": (*((name, "plain8", "plain") for name in ("gsm8k", "gsm8k_tuned", "math_fresh", "math_alone")),
                            ("math_halved", "chosen4_8_ahead4", "chosen4_ahead4")),
  "half learned from (PODS), beside all": tuple(
    (name, "max_variance", "plain") for name in ("gsm8k", "gsm8k_rest", "gsm8k_tuned", "math_fresh", "math_alone")),
  "16 pruned, beside 8": (*((name, "budget", "plain8") for name in ("gsm8k", "gsm8k_tuned", "math_alone")),
                          *((name, "budget_chosen4_ahead4", "chosen4_8_ahead4")
                            for name in ("math_halved", "math_halved_again"))),
  "control: nothing dropped, beside plain": (
    *(("gsm8k", arm, "plain") for arm in ("chosen", "chosen4")),
    *((name, arm, "plain") for name in ("ahead", "math") for arm in ("plain_ahead", "chosen4_ahead")),
    *(("math4", arm, "plain") for arm in ("chosen4_ahead4", "chosen4", "plain_ahead4")),
    ("math_fresh", "chosen4_ahead4", "plain"), ("math_halved", "chosen4_ahead4", "plain"))}


@dataclasses.dataclass(frozen=True)
class Run:
  """One arm of a regime with one seed. Its results are run.json and metrics.jsonl below `folder`, or failed.json; votes.json."""
  regime: Regime
  arm: str
  seed: int

  @property
  def name(self) -> str:
    return f"{self.arm}_seed{self.seed}"

  @property
  def folder(self) -> Path:
    return ROOT / RESULTS / self.regime.name / self.name

  @property
  def workdir(self) -> Path:
    return Path("runs/trial") / self.regime.name / self.name

  @property
  def split(self) -> tuple[Path, Path]:
    """Where the parts of the training file stand that a regime with `spare` trains on, and is evaluated on."""
    return tuple(Path("runs/trial") / self.regime.name / f"{self.regime.train}_{part}.jsonl" for part in ("fit", "spare"))

  @property
  def thinned(self) -> Path:
    """Where each `every`-th problem of the test file stands."""
    return Path("runs/trial") / self.regime.name / f"{self.regime.test}_every{self.regime.every}.jsonl"

  @property
  def votes(self) -> bool:
    return self.seed < self.regime.first + self.regime.votes.get(self.arm, 0)

  @property
  def settings(self) -> dict:
    """All that shapes the run's course and its evaluations."""
    r, arm = self.regime, self.regime.arms[self.arm]
    prompts = r.settings["rollout.prompts"]
    out = SHARED | r.settings | {"stop_seconds": r.full, "eval.at_seconds": f"({r.half},)", "seed": self.seed,
                                 "rollout.prompts": int(prompts * arm.prompts)}
    out |= {"rollout.candidates": int(prompts * arm.looked_at)} if arm.looked_at else {}
    out |= {"optim.lr": r.rates[arm.ours]} if r.rates else {}
    return out | arm.settings

  def training(self, model: str, data: str, export: bool = False) -> tuple[str, ...]:
    """argv of `python -m`; model, data: where they are here, "" for the config's own; export: keeps the policy, to vote with."""
    return ("arrol_jax.train", f"--config={self.regime.config}", f"--workdir={self.workdir}",
            *options(self.paths(model, data) | self.settings | {"checkpoint.export": export}))

  def voting(self, data: str) -> tuple[str, ...]:
    """argv of the evaluation whose samples vote."""
    r = self.regime
    paths = self.paths("", data) | {"model.path": f"{self.workdir}/policy"}
    kept = {k: v for k, v in self.settings.items() if k.startswith(("rollout.max_new", "prune.detect", "quality."))}
    return ("arrol_jax.evaluate", f"--config={r.config}", *options(paths | kept | r.voting))

  def paths(self, model: str, data: str) -> dict:
    """Options that say where model and data are."""
    r, found = self.regime, {"model.path": model} if model else {}
    if data and r.train:
      held_out = self.thinned if r.every > 1 else f"{data}/{r.test}.jsonl"
      paths = map(str, self.split if r.spare else (f"{data}/{r.train}.jsonl", held_out))
      found |= {"data.folder": data} | dict(zip(("data.train", "data.eval"), paths, strict=True))
    return found


def options(settings: dict) -> list[str]:
  """As a command line has them."""
  return [f"--config.{name}={value}" for name, value in settings.items()]


def runs_of(regime: Regime) -> Iterator[Run]:
  """Seed by seed within each part of the regime's queue, so that what is there at any moment is balanced over its arms; each seed
  begins with another arm, so that none is always on the same of several devices."""
  seen = set()
  for seeds in regime.queue:
    for i in range(max(seeds.values())):
      arms = [arm for arm, count in seeds.items() if i < count]
      for run in (Run(regime, arm, regime.first + i) for arm in arms[i % len(arms):] + arms[:i % len(arms)]):
        if run.name not in seen and run.name not in regime.gone:  # an arm may come again with more seeds
          seen.add(run.name)
          yield run


def same(settings: dict) -> dict:
  """Settings as they are after a way through JSON."""
  return json.loads(json.dumps(settings))
