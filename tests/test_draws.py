"""Draws of who survives: marginals, sizes, floors, groups, rows that move."""

import functools

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrol_jax import prune
from arrol_jax.pruning import decision
from arrol_jax.pruning.rule import PruneRule

quick = settings(max_examples=30, deadline=None)

unit = st.floats(0.0, 1.0, width=32, allow_subnormal=False)  # float32 programs flush those to zero


@functools.partial(jax.jit, static_argnames=("method", "n"))
def draws(p, groups, seed, *, method, n):
  keys = jax.random.split(jax.random.key(seed), n)
  return jax.vmap(lambda key: prune.draw(key, p, method=method, groups=groups))(keys)


def many_draws(p, groups=None, *, method, n, seed=0):
  """n draws: bool[n, rows]. Up to 16 rows are drawn 6,000 times, with others of p = 0 in a group of their own, so that all
  share one compiled shape."""
  rows = p.shape[0]
  if rows > 16:
    return draws(p, groups, seed, method=method, n=n)
  labels = jnp.zeros(rows, jnp.int32) if groups is None else groups
  more = 16 - rows
  return draws(jnp.pad(p, (0, more)), jnp.pad(labels, (0, more), constant_values=99), seed, method=method, n=6000)[:n, :rows]


@pytest.mark.parametrize("method", ["bernoulli", "systematic"])
def test_marginals(method):
  p = jnp.array([0.0, 0.1, 0.25, 0.37, 0.5, 0.61, 0.9, 1.0], jnp.float32)
  n = 4000
  kept = np.asarray(many_draws(p, method=method, n=n))
  assert kept.dtype == bool and kept.shape == (n, 8)
  se = np.sqrt(np.asarray(p) * (1 - np.asarray(p)) / n)
  assert np.all(np.abs(kept.mean(axis=0) - np.asarray(p)) <= 4 * se)  # p = 0 and p = 1 hold exactly


def test_bernoulli_draws_are_independent():
  # Var of the number of survivors is sum p (1 - p) = 16 / 4 = 4, where a systematic draw has 0.
  kept = np.asarray(many_draws(jnp.full(16, 0.5), method="bernoulli", n=4000))
  assert abs(kept.sum(axis=1).var() - 4.0) < 4 * 4.0 * np.sqrt(2 / 4000)
  assert prune.draw(jax.random.key(0), jnp.full((3, 4), 0.5)).shape == (3, 4)  # independent: any shape


@pytest.mark.parametrize("p, size", [
  ([0.5] * 16, 8),
  ([0.1] * 10, 1),  # 0.1 in float32 is a little more than a tenth, and
  ([0.7] * 10, 7),  # 0.7 a little less: still exactly 1 and 7
  ([1 / 3] * 12, 4),
  ([0.9, 0.2, 0.4, 0.5], 2),
  ([1.0, 1.0, 0.0, 0.5, 0.5], 3),
  ([1.0] * 4, 4),
  ([0.0] * 4, 0),
])
def test_systematic_size_is_an_integer_sum(p, size):
  p = jnp.array(p + [0.0] * (16 - len(p)), jnp.float32)  # p = 0 changes nothing: one shape for all
  kept = np.asarray(many_draws(p, method="systematic", n=500))
  assert np.all(kept.sum(axis=1) == size)


def test_systematic_size_of_a_large_batch():
  # Far more rows than float32 could add up to the last unit: 4000 * 0.3 = 1200.
  kept = np.asarray(many_draws(jnp.full(4000, 0.3), method="systematic", n=20))
  assert np.all(kept.sum(axis=1) == 1200)


@quick
@given(st.lists(unit, min_size=12, max_size=12), st.integers(0, 2**31 - 1))
def test_systematic_size_is_floor_or_ceil(p, seed):
  sizes = np.asarray(many_draws(jnp.array(p, jnp.float32), method="systematic", n=20, seed=seed)).sum(axis=1)
  total = np.sum(np.array(p, np.float64))
  assert np.all((sizes >= np.floor(total - 1e-5)) & (sizes <= np.ceil(total + 1e-5)))


def test_systematic_pairs_are_not_locked():
  # Two of four, all alike: each of the six pairs has 1/6. In a fixed order neighbours would never meet.
  n = 6000
  kept = np.asarray(many_draws(jnp.full(4, 0.5), method="systematic", n=n))
  for i in range(4):
    for j in range(i):
      together = np.mean(kept[:, i] & kept[:, j])
      assert abs(together - 1 / 6) < 4 * np.sqrt(1 / 6 * 5 / 6 / n)


def test_systematic_groups_are_drawn_apart():
  # Interleaved labels: group 7 has 4 * 0.5 = 2, group 3 has 0.25 + 0.75 = 1, group 5 has 0.3: 0 or 1.
  groups = jnp.array([7, 3, 7, 5, 7, 3, 7], jnp.int32)
  p = jnp.array([0.5, 0.25, 0.5, 0.3, 0.5, 0.75, 0.5], jnp.float32)
  n = 4000
  kept = np.asarray(many_draws(p, groups, method="systematic", n=n))
  assert np.all(kept[:, [0, 2, 4, 6]].sum(axis=1) == 2)
  assert np.all(kept[:, [1, 5]].sum(axis=1) == 1)
  se = np.sqrt(np.asarray(p) * (1 - np.asarray(p)) / n)
  assert np.all(np.abs(kept.mean(axis=0) - np.asarray(p)) <= 4 * se)
  # Groups have starts of their own: rows 3 and 1 (0.3 and 0.25) are independent.
  assert abs(np.mean(kept[:, 3] & kept[:, 1]) - 0.075) < 4 * np.sqrt(0.075 * 0.925 / n)


def test_systematic_draws_do_not_depend_on_where_rows_lie():
  """With a key a row: rows in another order, and rows without a decision anywhere among them, with keys of their own."""
  rng = np.random.default_rng(0)
  groups, p = np.repeat(np.arange(5), 6).astype(np.int32), jnp.asarray(rng.uniform(0.1, 0.9, 30), jnp.float32)
  keys = jax.random.split(jax.random.key(3), 30)
  draw = jax.jit(lambda keys, p, groups: prune.draw(keys, p, method="systematic", groups=groups))
  kept = np.asarray(draw(keys, p, jnp.asarray(groups)))
  assert 5 < kept.sum() < 25
  for seed in range(5):
    order = np.random.default_rng(seed).permutation(30)
    np.testing.assert_array_equal(draw(keys[order], p[order], jnp.asarray(groups[order])), kept[order])
    idle = jax.random.split(jax.random.key(seed + 9), 30)
    place = np.random.default_rng(seed).permutation(60)
    all_keys, all_p = jnp.concatenate([keys, idle])[place], jnp.concatenate([p, jnp.ones(30)])[place]
    both = draw(all_keys, all_p, jnp.asarray(np.r_[groups, groups][place]))
    np.testing.assert_array_equal(both, np.r_[kept, [True] * 30][place])


def test_a_floors_survival_is_that_with_which_rows_survive():
  """Weighed 1 / keep probability, survivors stand for all: for 3,000 groups of 5 with values that go with p. By p alone they do
  not."""
  rng = np.random.default_rng(0)
  group, decided = jnp.repeat(jnp.arange(20), 5), jnp.asarray(rng.random(100) < 0.9)
  survive = jax.jit(jax.vmap(lambda u, p: (
    ((u < p) | prune.at_least(2, u / p, group, decided)) & decided, prune.survival_with_floor(2, u, p, group, decided))))
  u, p = jnp.asarray(rng.random((150, 100)), jnp.float32), jnp.asarray(rng.uniform(0.05, 0.5, (150, 100)), jnp.float32)
  kept, survival = survive(u, p)
  some = np.asarray(decided)
  sizes = np.asarray(kept).reshape(-1, 5).sum(1)
  assert np.all(sizes >= np.minimum(2, np.tile(some.reshape(-1, 5).sum(1), 150)))
  value = np.asarray(p)[:, some]  # rows that survive more often are worth more
  estimate = (np.asarray(kept) / np.asarray(survival))[:, some] * value
  by_rule = (np.asarray(kept) / np.asarray(p))[:, some] * value
  error = lambda x: (x.mean() - value.mean()) / (x.std() / np.sqrt(x.size))
  assert abs(error(estimate)) < 4 < 40 < error(by_rule)
  alone = prune.survival_with_floor(2, u[0, :2], p[0, :2], group[:2], jnp.array([True, True]))
  assert alone.tolist() == [1.0, 1.0]  # two rows, a floor of two


def test_lifted_systematic_draws_keep_the_floor_and_the_size():
  """Sums of 0.8, 3.2 and 2 of a group of one kind each; of two decided rows no more than two can be kept."""
  p = jnp.array([0.2] * 4 + [0.8] * 4 + [0.5] * 4 + [0.3] * 4, jnp.float32)
  group, decided = jnp.repeat(jnp.arange(4), 4), jnp.array([True] * 12 + [True, True, False, False])
  lifted = prune.lift(2, p, group, decided)
  np.testing.assert_allclose(lifted.reshape(4, 4).sum(1), [2.0, 3.2, 2.0, 2.6], rtol=1e-6)
  np.testing.assert_allclose(lifted[:4], 0.5, rtol=1e-6)
  kept = np.asarray(many_draws(jnp.where(decided, lifted, 1.0), group, method="systematic", n=500)).reshape(500, 4, 4)
  assert [set(sizes) for sizes in kept.sum(2).T.tolist()] == [{2}, {3, 4}, {2}, {4}]


def test_unknown_method():
  with pytest.raises(ValueError, match="method"):
    prune.draw(jax.random.key(0), jnp.full(4, 0.5), method="poisson")


@pytest.mark.parametrize("floor", [0, 1, 2, 5])
def test_a_threshold_with_a_floor_says_who_goes_on_for_sure(floor):
  """Nothing is drawn: whoever goes on does so with probability 1, whoever is stopped with 0, and never NaN."""
  posterior = jnp.array([0.9, 0.1, 0.3, 0.2, 0.1, 0.2])
  group, decided = jnp.array([0, 0, 0, 1, 1, 1]), jnp.array([True] * 5 + [False])
  rule = PruneRule((8,), keep=0.5, kind="threshold", floor=floor)
  keep, p = decision._draw(rule, jax.random.split(jax.random.key(0), 6), (posterior >= 0.5).astype(jnp.float32), posterior, group,
                           decided, floor)
  np.testing.assert_array_equal(p[:5], keep[:5].astype(np.float32))
  want = {0: [1, 0, 0, 0, 0], 1: [1, 0, 0, 1, 0], 2: [1, 0, 1, 1, 1], 5: [1] * 5}[floor]
  assert keep[:5].astype(int).tolist() == want and bool(keep[5])


def test_a_probability_of_0_with_a_floor_is_no_nan():
  """Rows of probability 0 come last and survive only where the floor has room for them."""
  p, u = jnp.array([0.0, 0.5, 0.0, 1.0]), jnp.array([0.0, 0.9, 0.3, 0.2])
  group, decided = jnp.zeros(4, jnp.int32), jnp.ones(4, bool)
  for floor, want in ((1, [0, 0.5, 0, 1]), (2, [0, 1, 0, 1]), (3, [1, 1, 0, 1]), (4, [1, 1, 1, 1])):
    np.testing.assert_allclose(prune.survival_with_floor(floor, u, p, group, decided), want)
