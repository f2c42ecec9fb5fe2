"""The closed-form head: NumPy's solution, forgetting, fits within the prompt, what its score ranks, padding and meshes."""

import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import pytest

from arrol_jax.learning import ridge
from arrol_jax.learning.metrics import auc
from arrol_jax.pruning import linear_head
from arrol_jax.pruning.table import score_bin

F, PER_GROUP = 12, 8


def rollouts(seed, groups=40, width=F, scale=1.0, per_group=PER_GROUP):
  """Features, rewards, weights and groups: large means and scales that differ a thousandfold."""
  rng = np.random.default_rng(seed)
  group = np.repeat(np.arange(groups), per_group).astype(np.int32)
  x = rng.normal(size=(groups, width))[group] + rng.normal(size=(len(group), width))
  y = (x @ rng.normal(size=width) / width**0.5 + rng.normal(size=len(group)) > 0.5).astype(np.float32)
  x = x * np.geomspace(0.1, 100, width) * scale + rng.normal(size=width) * 30
  return x.astype(np.float32), y, rng.uniform(0.5, 3, len(group)).astype(np.float32), group


def numpy_fit(x, y, w, strength):
  """(mean, level, w on raw features) of weighted ridge regression on standardised features, in float64."""
  x, y, w = (np.asarray(a, float) for a in (x, y, w))
  mean, level = w @ x / w.sum(), w @ y / w.sum()
  dx, dy = x - mean, y - level
  sd = np.sqrt(w @ dx**2 / w.sum())
  z = dx / sd
  return mean, level, np.linalg.solve(z.T @ (w[:, None] * z) + strength * x.shape[1] * np.eye(x.shape[1]), z.T @ (w * dy)) / sd


def less_group_means(x, w, group):
  x = np.asarray(x, float).copy()
  for g in np.unique(group):
    x[group == g] -= np.average(x[group == g], axis=0, weights=w[group == g])
  return x


def close(got, wanted, rtol=2e-4):
  np.testing.assert_allclose(got, wanted, rtol=rtol, atol=rtol * np.max(np.abs(wanted)))


@pytest.mark.parametrize("strength", [0.3, 20.0])
def test_is_the_closed_form_whatever_the_batches(strength):
  x, y, w, group = rollouts(0)
  state = ridge.empty(F)
  for part in np.split(np.arange(len(y)), [PER_GROUP, 10 * PER_GROUP]):  # groups stay together
    state = ridge.add(state, x[part], y[part], w[part], group[part])
  head = ridge.solve(state, strength)
  inside_x, inside_y = less_group_means(x, w, group), less_group_means(y, w, group)
  mean, level, weights = numpy_fit(x - inside_x, y - inside_y, w, strength)
  close(head.mean, mean)
  close(head.level, level)
  close(head.between * x.std(0), weights * x.std(0))
  close(head.within * x.std(0), numpy_fit(inside_x, inside_y, w, strength)[2] * x.std(0))
  raw = ridge.solve(ridge.add(ridge.empty(F, center=False), x, y, w, group), strength)
  close(raw.between * x.std(0), numpy_fit(x, y, w, strength)[2] * x.std(0))


def test_forgetting_is_weighting_by_age():
  """The rows of an earlier call weigh half after as many new ones as the half-life, within prompts too."""
  (x, y, w, group), (x2, y2, w2, group2) = rollouts(1), rollouts(2)
  state = ridge.add(ridge.empty(F), x, y, w, group, half_life=100.0)
  state = ridge.add(state, x2, y2, w2, group2, half_life=100.0)
  head = ridge.solve(state)
  both, old = lambda a, b: np.concatenate([a, b]), 0.5**(len(y2) / 100)
  weights = both(w * old, w2)
  labels = both(group, group2 + 1000)
  inside = [less_group_means(both(*a), weights, labels) for a in ((x, x2), (y, y2))]
  mean, level, wanted = numpy_fit(both(x, x2) - inside[0], both(y, y2) - inside[1], weights, ridge.STRENGTH)
  close(head.mean, mean)
  close(head.level, level)
  close(head.between * x.std(0), wanted * x.std(0))
  close(head.within * x.std(0), numpy_fit(*inside, weights, ridge.STRENGTH)[2] * x.std(0))


def test_large_means_cost_no_digits():
  """A dimension of mean 3,000 and deviation 1, as language models have them: float32 sums of squares would lose it."""
  x, y, w, group = rollouts(3)
  x[:, 0] = 3000 + x[:, 0] / x[:, 0].std()
  state = ridge.empty(F, center=False)
  for part in np.split(np.arange(len(y)), 10):
    state = ridge.add(state, x[part], y[part], w[part], group[part])
  close(ridge.solve(state).between * x.std(0), numpy_fit(x, y, w, ridge.STRENGTH)[2] * x.std(0), 2e-3)


def test_padding_leaves_no_trace():
  x, y, w, group = rollouts(4)
  state = ridge.add(ridge.empty(F), x, y, w, group, half_life=50.0)
  junk = np.full((8, F), np.nan, np.float32)
  cat = lambda a, b: np.concatenate([a, b]).astype(a.dtype)
  padded = ridge.add(ridge.empty(F), cat(x, junk), cat(y, np.full(8, np.nan)), cat(w, np.zeros(8)), cat(group, np.arange(8)),
                     half_life=50.0)
  for got, wanted in zip(jax.tree.leaves(padded), jax.tree.leaves(state), strict=True):
    close(got, wanted, 1e-5)
  nothing = ridge.add(state, junk, np.zeros(8, np.float32), np.ones(8, np.float32), np.arange(8, dtype=np.int32), half_life=50.0)
  jax.tree.map(np.testing.assert_array_equal, nothing, state)


def test_nothing_seen_says_nothing():
  head = ridge.solve(ridge.empty(F))
  x = rollouts(0)[0]
  assert not np.any(linear_head.score(head, x)) and not np.any(linear_head.to_logit(head, jnp.ones(3)))
  assert jax.tree.structure(head) == jax.tree.structure(linear_head.empty_head(F))


def synthetic(seed, groups):
  """What tells prompts apart (columns 0-3) misleads within them, and the other way round; 16 columns of noise."""
  rng = np.random.default_rng(seed)
  group = np.repeat(np.arange(groups), 16).astype(np.int32)
  level, inside = rng.normal(size=(groups, 1))[group], rng.normal(size=(len(group), 1))
  mix = np.random.default_rng(0).normal(size=(2, 4))
  x = np.concatenate([level * mix[0] + 0.7 * inside * mix[1] - 0.5 * level * mix[1], rng.normal(size=(len(group), 16))], axis=1)
  x[:, :4] += 0.5 * rng.normal(size=(len(group), 4))
  y = rng.random(len(group)) < 1 / (1 + np.exp(-(1.5 * level + 1.0 * inside)[:, 0] + 1))
  return x.astype(np.float32), y.astype(np.float32), np.ones(len(group), np.float32), group


def test_ranks_within_by_one_fit_and_between_by_the_other():
  x, y, w, group = synthetic(1, 200)
  new_x, new_y, _, new_group = synthetic(2, 200)
  both = ridge.solve(ridge.add(ridge.empty(x.shape[1]), x, y, w, group))
  raw = ridge.solve(ridge.add(ridge.empty(x.shape[1], center=False), x, y, w, group))
  assert raw.within is None
  score, raw_score = linear_head.score(both, new_x, new_group), linear_head.score(raw, new_x, new_group)
  inside = lambda s: np.nanmean([auc(np.asarray(s)[new_group == g], new_y[new_group == g]) for g in range(200)])
  within_only = new_x @ np.asarray(both.within)
  assert inside(score) == pytest.approx(inside(within_only), abs=1e-6) and inside(score) > inside(raw_score) + 0.005
  assert auc(score, new_y) > auc(raw_score, new_y) + 0.05
  # a group's mean score is the second fit's, of the group's mean features, and so is a lone row's score
  mean = lambda a: np.stack([np.asarray(a)[new_group == g].mean(0) for g in range(200)])
  alone = linear_head.score(both, new_x)
  np.testing.assert_allclose(mean(score), mean(alone), atol=1e-5)
  np.testing.assert_allclose(linear_head.score(both, new_x, np.arange(len(new_x))), alone, atol=1e-5)
  # and it is a probability: rewards regress on it with a slope of about 1
  assert 0.9 < np.polyfit(mean(score), mean(new_y), 1)[0] < 1.2


def test_only_standing_siblings_enter_the_groups_means():
  x, y, w, group = synthetic(1, 20)
  head = ridge.solve(ridge.add(ridge.empty(x.shape[1]), x, y, w, group))
  standing = np.random.default_rng(0).random(len(y)) < 0.6
  some = linear_head.score(head, x, group, standing)
  np.testing.assert_allclose(np.asarray(some)[standing], linear_head.score(head, x[standing], group[standing]), atol=1e-5)
  alone = linear_head.score(head, x, group, np.zeros(len(y), bool))
  np.testing.assert_allclose(alone, linear_head.score(head, x), atol=1e-5)


def test_a_prompts_own_feature_takes_no_part_within():
  x, y, w, group = synthetic(1, 50)
  own = (500 + np.random.default_rng(5).normal(size=50))[group].astype(np.float32)
  head = ridge.solve(ridge.add(ridge.empty(x.shape[1] + 1), np.c_[x, own], y, w, group))
  assert head.within[-1] == 0 and head.between[-1] != 0


def test_logits_use_the_whole_table():
  x, y, w, group = synthetic(1, 400)
  head = ridge.solve(ridge.add(ridge.empty(x.shape[1]), x, y, w, group))
  score = np.asarray(linear_head.score(head, x, group))
  assert float(head.spread) == pytest.approx(np.std(score), rel=0.01)
  share = np.bincount(score_bin(linear_head.to_logit(head, score)), minlength=128) / len(y)
  assert share.max() < 3 / 128 and np.sum(share > 0.2 / 128) > 115
  assert auc(np.asarray(linear_head.to_logit(head, score)), y) == pytest.approx(auc(score, y), abs=1e-4)


def test_several_boundaries_are_a_leading_axis():
  one = [rollouts(seed) for seed in (5, 6)]
  state = jax.vmap(lambda *a: ridge.add(ridge.empty(F), *a))(*(np.stack(a) for a in zip(*one, strict=True)))
  heads = jax.vmap(ridge.solve, (0, None))(state, 3.0)
  x = one[1][0]
  for i, rows in enumerate(one):
    alone = ridge.solve(ridge.add(ridge.empty(F), *rows), 3.0)
    close(jax.vmap(linear_head.score, (0, None, None))(heads, x, rows[3])[i], linear_head.score(alone, x, rows[3]), 1e-3)


def test_eight_devices_fit_alike():
  x, y, w, group = rollouts(7)
  rows = NamedSharding(Mesh(np.array(jax.devices()), "x"), PartitionSpec("x"))
  spread = ridge.solve(ridge.add(ridge.empty(F), *(jax.device_put(a, rows) for a in (x, y, w, group))))
  alone = ridge.solve(ridge.add(ridge.empty(F), x, y, w, group))
  close(linear_head.score(spread, x, group), linear_head.score(alone, x, group), 1e-4)


def test_a_wide_solve_is_fast():
  """Three inputs of width 896, both fits, at an early step with fewer rows than features."""
  x, y, w, group = rollouts(8, groups=32, width=2688, per_group=16)
  state = jax.block_until_ready(ridge.add(ridge.empty(2688), x, y, w, group))
  solve = ridge.solve.lower(state, 0.5).compile()
  start = time.perf_counter()
  head = jax.block_until_ready(solve(state, 0.5))
  seconds = time.perf_counter() - start
  print(f"solve of width 2,688: {seconds:.2f} s")
  assert seconds < 60 and np.all(np.isfinite(head.within))
