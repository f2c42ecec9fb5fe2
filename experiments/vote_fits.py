"""Heads of the last token fitted on samples of training problems, and what they say of others (experiments/vote_weights.py).

The closed-form fit of training (learning/ridge.py) for many inputs and strengths: the sums over all columns are made once a fold,
and a fit takes its part of them. Out of fold: folds of whole problems, each scored by a fit on the others.
"""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from arrol_jax import prune
from arrol_jax.learning import ridge
from arrol_jax.pruning import linear_head
from experiments.vote_rules import Known
from experiments.vote_samples import STEP, Samples, is_state

FOLDS = 5
SMALL = ("logprobs", "windows", "siblings")
SHIPPED = ("mean@2/3", "prompt@2/3", *SMALL)  # what configs with a ridge read
STRENGTHS = (2.0, 8.0, 32.0)
VOTES = "votes"  # the share of its siblings' votes that a trace's answer has


class Fit(NamedTuple):
  """A ridge; center: within the problem, and its level by another. voters: on the traces that have an answer only. above: it
  reads a first ridge's score on these inputs, fitted as this one, and its own inputs."""
  inputs: tuple[str, ...]
  center: bool = True
  strength: float = 8.0
  voters: bool = False
  above: tuple[str, ...] = ()

  def __str__(self):
    how = ("centred" if self.center else "not centred") + (", traces that vote" if self.voters else "")
    first = f"ridge({'+'.join(self.above)})+" if self.above else ""
    return f"{first}{'+'.join(self.inputs)}; {how}; {self.strength:g}"


class Scored(NamedTuple):
  """Logits f32[P,G] of traces."""
  alone: np.ndarray     # as votes take them: within the problem
  levelled: np.ndarray  # with the group's level


def fits(samples: Samples) -> list[Fit]:
  """All that are tried, as far as their inputs are there."""
  states = [name for name, x in samples.inputs.items() if is_state(name) and x.shape[1] > 1]
  small = tuple(name for name in SMALL if name in samples.inputs)
  sets = [(s,) for s in states] + [(s, *small) for s in states] + [small, tuple(states), (*states, *small), SHIPPED]
  sets = [s for s in dict.fromkeys(sets) if s and set(s) <= set(samples.inputs)]
  hows = ((True, False), (True, True), (False, False))
  out = [Fit(s, center, strength, voters) for s in sets for center, voters in hows for strength in STRENGTHS]
  firsts = dict.fromkeys([*((s,) for s in states), tuple(states)])
  return out + [Fit((*small, VOTES), True, strength, voters, s) for s in firsts if s for voters in (False, True)
                for strength in STRENGTHS]


def share_of_votes(pools: np.ndarray) -> np.ndarray:
  """f32[P,G,1]: the share of its siblings' votes that a trace's answer has; 0 without an answer."""
  same = np.sum((pools[:, :, None] == pools[:, None, :]) & (pools >= 0)[:, :, None], axis=2) - 1
  return (np.maximum(same, 0) / np.maximum(np.sum(pools >= 0, axis=1, keepdims=True) - 1, 1)).astype(np.float32)[..., None]


# ---- sums


class Moments(NamedTuple):
  """Sums over traces that count, n to a group; x is centred so far that float32 holds them."""
  count: float
  x: np.ndarray          # f32[F]
  y: float
  between: np.ndarray    # f32[F,F]  sum over groups of n m m', m the group's mean x
  between_y: np.ndarray  # f32[F]    of n m times the mean y
  within: np.ndarray     # f32[F,F]  of the products of differences from these means
  within_y: np.ndarray   # f32[F]


def moments(x: np.ndarray, y: np.ndarray, counts: np.ndarray) -> Moments:
  """Of x f32[P,G,F], y f32[P,G], counts bool[P,G]."""
  n = counts.sum(axis=1, keepdims=True).astype(np.float32)
  over = lambda v: np.einsum("pg...,pg->p...", v, counts.astype(np.float32)) / np.maximum(n, 1).reshape(-1, *[1] * (v.ndim - 2))
  mean, level = over(x), over(y)
  dx = ((x - mean[:, None]) * counts[..., None]).reshape(-1, x.shape[2])
  dy = ((y - level[:, None]) * counts).reshape(-1)
  weighed = n * mean
  return Moments(float(n.sum()), weighed.sum(axis=0), float(n[:, 0] @ level), weighed.T @ mean, weighed.T @ level, dx.T @ dx,
                 dx.T @ dy)


def together(parts: list[Moments]) -> Moments:
  return Moments(*(sum(x) for x in zip(*parts, strict=True)))


def head(sums: Moments, columns: np.ndarray, center: bool, strength: float) -> linear_head.LinearHead:
  """The fit on some columns, i[K]."""
  square, n = np.ix_(columns, columns), np.float32(sums.count)
  mean, level = sums.x[columns] / n, np.float32(sums.y / n)
  xx, xy = sums.between[square] - n * np.outer(mean, mean), sums.between_y[columns] - n * mean * level
  within = (sums.within[square], sums.within_y[columns])
  parts = (xx, xy, *within) if center else (xx + within[0], xy + within[1], None, None)
  return ridge.solve(ridge.Ridge(n, mean, level, *parts), np.float32(strength))


def scores(made: linear_head.LinearHead, x: np.ndarray, standing: np.ndarray) -> Scored:
  """linear_head.score and .alone of x f32[P,G,K]; group means over those that stand bool[P,G]."""
  x = x - np.asarray(made.mean)
  between = x @ np.asarray(made.between)
  within = between if made.within is None else x @ np.asarray(made.within)
  count = standing.sum(axis=1, keepdims=True)
  apart = np.sum((between - within) * standing, axis=1, keepdims=True) / np.maximum(count, 1)
  levelled = within + (np.where(count > 0, apart, between - within) if made.within is not None else 0.0)
  logit = lambda s: np.asarray(linear_head.to_logit(made, s + made.level))
  return Scored(logit(within), logit(levelled))


# ---- training problems, and what follows for others


class Trainer:
  """Training samples, their folds, and the heads fitted on them. pools i32[P,G]: of their answers."""

  def __init__(self, samples: Samples, pools: np.ndarray, only: list[Fit] | None = None, seed: int = 0):
    """only: the fits that will be asked for; None: any."""
    self.y, self.fold = samples.success, np.random.default_rng(seed).permutation(len(pools)) % FOLDS
    wanted = None if only is None else {name for fit in only for name in (*fit.inputs, *fit.above)}
    names = [name for name in (*samples.inputs, VOTES) if wanted is None or name in wanted]
    self.scale, self.places, end = {}, {}, 0
    for name in names:
      x = self._raw(name, samples, pools)
      self.scale[name] = x.mean(axis=(0, 1)), np.maximum(x.std(axis=(0, 1)), 1e-6)
      self.places[name], end = np.arange(end, end + x.shape[2]), end + x.shape[2]
    self.x, self.pools, self.sums, self.scored = self.columns(samples, pools), pools, {}, {}

  def _raw(self, name: str, samples: Samples, pools: np.ndarray) -> np.ndarray:
    if name == VOTES:
      return share_of_votes(pools)
    x = samples.inputs[name]
    return np.broadcast_to(x, (*pools.shape, x.shape[2])).astype(np.float32) / (STEP if is_state(name) else 1)

  def columns(self, samples: Samples, pools: np.ndarray) -> np.ndarray:
    """All inputs of samples, f32[P,G,F], by the training traces' mean and deviation."""
    parts = [(self._raw(name, samples, pools) - mean) / deviation for name, (mean, deviation) in self.scale.items()]
    return np.concatenate(parts, axis=2)

  def counts(self, fit: Fit) -> np.ndarray:
    return self.pools >= 0 if fit.voters else np.ones(self.pools.shape, bool)

  def parts(self, fit: Fit, x: np.ndarray | None = None) -> list[Moments]:
    """Sums of each fold; of all columns, once, or of x."""
    of = lambda x: [moments(x[self.fold == f], self.y[self.fold == f], self.counts(fit)[self.fold == f]) for f in range(FOLDS)]
    if x is not None:
      return of(x)
    if fit.voters not in self.sums:
      self.sums[fit.voters] = of(self.x)
    return self.sums[fit.voters]

  def places_of(self, inputs: tuple[str, ...]) -> np.ndarray:
    return np.concatenate([self.places[name] for name in inputs])

  def out_of_fold(self, fit: Fit) -> Scored:
    """Of the training traces, by fits on the other folds."""
    if fit not in self.scored:
      if fit.above:
        x = self._stacked(fit, self.x, self.out_of_fold(self.first(fit)))
        self.scored[fit] = self._cross(fit, x, np.arange(x.shape[2]), self.parts(fit, x))
      else:
        self.scored[fit] = self._cross(fit, self.x, self.places_of(fit.inputs), self.parts(fit))
    return self.scored[fit]

  def _cross(self, fit, x, columns, parts) -> Scored:
    out = Scored(*np.zeros((2, *self.pools.shape), np.float32))
    for f in range(FOLDS):
      mine = self.fold == f
      made = head(together([p for g, p in enumerate(parts) if g != f]), columns, fit.center, fit.strength)
      for whole, part in zip(out, scores(made, x[mine][:, :, columns], self.counts(fit)[mine]), strict=True):
        whole[mine] = part
    return out

  def first(self, fit: Fit) -> Fit:
    """The ridge that `fit` stands on."""
    return fit._replace(inputs=fit.above, above=())

  def _stacked(self, fit: Fit, x: np.ndarray, below: Scored) -> np.ndarray:
    return np.concatenate([np.stack(below, axis=2), x[:, :, self.places_of(fit.inputs)]], axis=2)

  def of_others(self, fit: Fit, x: np.ndarray, pools: np.ndarray) -> Scored:
    """Of other problems' `columns` x f32[P,G,F], by a fit on all training problems."""
    standing = pools >= 0 if fit.voters else np.ones(pools.shape, bool)
    if not fit.above:
      columns, parts = self.places_of(fit.inputs), self.parts(fit)
    else:
      parts = self.parts(fit, self._stacked(fit, self.x, self.out_of_fold(self.first(fit))))
      x = self._stacked(fit, x, self.of_others(self.first(fit), x, pools))
      columns = np.arange(x.shape[2])
    return scores(head(together(parts), columns, fit.center, fit.strength), x[:, :, columns], standing)


def known(trainer: Trainer, train: Scored, others: Scored | None = None) -> Known:
  """What votes take, of the training traces out of fold (posteriors by the other folds' tables), or of others."""
  deviation = float(np.std(train.alone - train.alone.mean(axis=1, keepdims=True))) or 1.0
  if others is not None:
    return Known(others.alone / deviation, *(posterior(s, trainer.y, o) for s, o in zip(train, others, strict=True)))
  out = Known(train.alone / deviation, *np.zeros((2, *train.alone.shape), np.float32))
  for f in range(FOLDS):
    mine = trainer.fold == f
    for whole, score in zip(out[1:], train, strict=True):
      whole[mine] = posterior(score[~mine], trainer.y[~mine], score[mine])
  return out


def posterior(score: np.ndarray, success: np.ndarray, of: np.ndarray) -> np.ndarray:
  """The posterior f32[..] of logits `of` by a table of other traces' logits and successes."""
  table = prune.update(prune.Calibration(), jnp.asarray(score.reshape(-1)), jnp.asarray(success.reshape(-1)))
  return np.asarray(prune.posterior(table, jnp.asarray(of.reshape(-1)))).reshape(of.shape)
