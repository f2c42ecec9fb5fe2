"""Heads fitted on rollouts of a frozen policy, and how well their scores tell right from wrong (experiments/head_ablation.py).

`Place` holds what was read at one length, or at the last token, step by step as a training would have seen it. Scores are
f[N, M]: steps, rollouts of a step; offline by folds of prompts, each scored by a fit on the others; online each step by a fit on
the steps before it. Fits are those of training: learning/ridge.py, and head_training.refit for the published head.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from arrol_jax.learning import head_training, ridge
from arrol_jax.learning.batching import head_weights
from arrol_jax.learning.metrics import auc, mean, spearman
from arrol_jax.pruning import features, linear_head
from arrol_jax.pruning.head import STATISTICS, Features, init_head, inputs_of, quality_logit
from arrol_jax.types import Rollout

FOLDS = 5


class Place:
  """What rollouts were like at one place: N steps of M rollouts, in their order; those that ended before are not `there`."""

  def __init__(self, steps: list[list[Rollout]], read, confidence, inputs: tuple[str, ...], width: int):
    """read(rollout) gives its features f32[F] of `inputs` or None; confidence(rollout) its trace confidence there."""
    self.rollouts = [r for step in steps for r in step]
    seen = [read(r) for r in self.rollouts]
    self.shape = len(steps), len(steps[0])
    self.there = np.array([x is not None for x in seen]).reshape(self.shape)
    blank = np.zeros(features.width(inputs, width), np.float32)
    self.x = jax.device_put(np.stack([blank if x is None else np.asarray(x, np.float32) for x in seen]).reshape(*self.shape, -1))
    self.confidence = np.array([confidence(r) if x is not None else 0.0 for r, x in zip(self.rollouts, seen, strict=True)])
    self.confidence = self.confidence.reshape(self.shape)
    self.reward = np.array([r.success for r in self.rollouts], np.float32).reshape(self.shape)
    self.prompt = np.array([r.prompt for r in self.rollouts], np.int32).reshape(self.shape)
    self.inputs, self.width = inputs, width
    self.fold = np.random.default_rng(0).permutation(int(self.prompt.max()) + 1)[self.prompt] % FOLDS

  def of(self, inputs: tuple[str, ...]) -> jax.Array:
    """The columns of `inputs`, f32[N,M,F]."""
    ends = np.cumsum([features.width((name,), self.width) for name in self.inputs])
    part = {name: self.x[..., end - features.width((name,), self.width):end]
            for name, end in zip(self.inputs, ends.tolist(), strict=True)}
    return jnp.concatenate([part[name] for name in inputs], axis=2)

  def judged(self, score: np.ndarray, mask: np.ndarray) -> dict:
    """How well scores f[N,M] tell right from wrong among the rollouts in `mask` bool[N,M]."""
    score, reward, prompt = score[mask], self.reward[mask], self.prompt[mask]
    within = [auc(score[prompt == p], reward[prompt == p]) for p in np.unique(prompt)]
    return {"auc": auc(score, reward), "auc_within": mean(x for x in within if not np.isnan(x)),
            "spearman": spearman(score, reward)}

  def by_fold(self, score: np.ndarray) -> dict:
    """Mean and standard deviation of `judged` over the folds."""
    return summary([self.judged(score, self.there & (self.fold == f)) for f in range(FOLDS)])

  def by_step(self, score: np.ndarray, first: int) -> dict:
    """The same over the steps from number `first`, from 0, on; and each step's AUC within a prompt."""
    step = np.arange(self.shape[0])[:, None]
    results = [self.judged(score, self.there & (step == n)) for n in range(self.shape[0])]
    return summary(results[first:]) | {"steps_auc_within": [None if np.isnan(r["auc_within"]) else round(r["auc_within"], 3)
                                                            for r in results]}


def summary(results: list[dict]) -> dict:
  """Mean and standard deviation of each figure where it is defined; NaN where it never is."""
  out = {}
  for name in results[0]:
    values = [r[name] for r in results if not np.isnan(r[name])]
    out |= {name: mean(values), f"{name}_sd": float(np.std(values)) if values else float("nan")}
  return out


# ---- the ridge


@functools.partial(jax.jit, static_argnames=("center",))
def _ridge_online(x, reward, weight, prompt, strength, center: bool):
  """Scores f32[N,M] of each step by a fit on the steps before it."""
  def one(sums, step):
    x, reward, weight, prompt = step
    score = linear_head.score(ridge.solve(sums, strength), x, prompt, weight > 0)
    return ridge.add(sums, x, reward, weight, prompt), score

  return jax.lax.scan(one, ridge.empty(x.shape[-1], center), (x, reward, weight, prompt))[1]


@functools.partial(jax.jit, static_argnames=("center",))
def _ridge_fit(x, reward, weight, prompt, strength, center: bool):
  """The head fitted on all steps' rollouts of weight f32[N,M] above 0."""
  add = lambda sums, step: (ridge.add(sums, *step), None)
  return ridge.solve(jax.lax.scan(add, ridge.empty(x.shape[-1], center), (x, reward, weight, prompt))[0], strength)


@jax.jit
def _ridge_scores(head, x, prompt, there):
  return jax.lax.map(lambda step: linear_head.score(head, *step), (x, prompt, there))


@jax.jit
def _ridge_alone(head, x):
  return jax.lax.map(lambda x: linear_head.alone(head, x), x)


def ridge_online(place: Place, inputs: tuple[str, ...], center: bool, strength: float) -> np.ndarray:
  """The first step's scores are those of a head that knows nothing."""
  return np.asarray(_ridge_online(place.of(inputs), place.reward, place.there.astype(np.float32), place.prompt,
                                  np.float32(strength), center=center))


def ridge_folds(place: Place, inputs: tuple[str, ...], center: bool, strength: float) -> tuple[np.ndarray, list[np.ndarray]]:
  """Scores f32[N,M] out of fold; and by fold the logits f32[N,M] of all rollouts as votes take them, each row by itself."""
  return ridge_folds_of(place, place.of(inputs), center, strength)


def ridge_folds_of(place: Place, x: jax.Array, center: bool, strength: float) -> tuple[np.ndarray, list[np.ndarray]]:
  """The same of any features f32[N,M,F] of the place's rollouts."""
  score, alone = np.zeros(place.shape, np.float32), []
  for f in range(FOLDS):
    mine = place.fold == f
    weight = (place.there & ~mine).astype(np.float32)
    head = _ridge_fit(x, place.reward, weight, place.prompt, np.float32(strength), center=center)
    score[mine] = np.asarray(_ridge_scores(head, x, place.prompt, place.there))[mine]
    alone.append(np.asarray(_ridge_alone(head, x)))
  return score, alone


# ---- the published head, with Adam


class Adam:
  """A published head on one place: reads `inputs`, fits by full-batch steps over a ring of `room` rollouts."""

  def __init__(self, place: Place, inputs: tuple[str, ...], hidden: int, optimizer: optax.GradientTransformation, room: int):
    self.place, self.optimizer, self.room = place, optimizer, room
    self.head = init_head(place.width, hidden, jax.random.key(0), inputs)
    self.recent = head_training.no_recent(self.head, place.width, room, optimizer)
    wide = lambda name: place.of((name,))
    self.features = Features(**{name: wide(name) for name in inputs_of(self.head)})
    assert all(x.shape[-1] == (STATISTICS if name == "logprobs" else place.width)
               for name, x in self.features._asdict().items() if x is not None)

  def fit(self, mask: np.ndarray, balanced: bool, passes: int, step: int | None = None) -> None:
    """Takes in the rollouts in `mask` bool[N,M], of one `step` where given, and goes over the ring `passes` times."""
    rows = slice(None) if step is None else slice(step, step + 1)
    mask = mask[rows].reshape(-1)
    part = np.arange(self.place.reward.size).reshape(self.place.shape)[rows].reshape(-1)
    weight = np.zeros(mask.size, np.float32)
    weight[mask] = head_weights([self.place.rollouts[i] for i in part[mask]], (), balanced)
    seen = jax.tree.map(lambda x: x[rows].reshape(-1, x.shape[-1]), self.features)
    self.head, self.recent = head_training.refit(self.head, self.recent, seen, self.place.reward[rows].reshape(-1), weight,
                                                 passes=passes, optimizer=self.optimizer)

  def scores(self, step: int | None = None) -> np.ndarray:
    """f32[N,M], or f32[M] of one step."""
    some = self.features if step is None else jax.tree.map(lambda x: x[step], self.features)
    return np.asarray(_logits(self.head, some))


@jax.jit
def _logits(head: dict, seen: Features) -> jax.Array:
  return quality_logit(head, seen)


def adam_folds(place: Place, inputs: tuple[str, ...], hidden: int, optimizer, passes: int, balanced: bool) -> np.ndarray:
  """Scores f32[N,M] out of fold."""
  out = np.zeros(place.shape, np.float32)
  for f in range(FOLDS):
    head = Adam(place, inputs, hidden, optimizer, place.reward.size)
    head.fit(place.there & (place.fold != f), balanced, passes)
    out[place.fold == f] = head.scores()[place.fold == f]
  return out


def adam_online(place: Place, head: Adam, passes: int, balanced: bool) -> np.ndarray:
  """Scores f32[N,M] of each step before `head` learns from it."""
  out = np.zeros(place.shape, np.float32)
  for n in range(place.shape[0]):
    out[n] = head.scores(n)
    head.fit(place.there, balanced, passes, step=n)
  return out
