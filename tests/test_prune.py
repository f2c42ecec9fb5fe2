"""Calibration, posterior and survival: numbers worked by hand, then properties on random tables."""

import itertools

from hypothesis import given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrol_jax import prune

PAPER = dict(kappa=0.5, rho=0.5, lam=0.5, p_min=0.1, p_max=0.9)
quick = settings(max_examples=30, deadline=None)

# One shape each, so that each compiles once: 8 bins, batches of 12.
update_jit = jax.jit(prune.update)
score_bin_jit = jax.jit(prune.score_bin, static_argnums=1)
bin_posterior_jit = jax.jit(prune.bin_posterior)
solve_delta_jit = jax.jit(prune.solve_delta)
survival_jit = jax.jit(prune.survival)

counts = st.lists(st.integers(0, 50), min_size=8, max_size=8)
tables = st.tuples(counts, counts).map(lambda pair: make_table(*pair))
unit = st.floats(0.0, 1.0, width=32, allow_subnormal=False)  # float32 programs flush those to zero
batches = st.lists(
  st.tuples(st.floats(-30.0, 30.0, width=32), st.integers(0, 1), st.integers(0, 3)), min_size=12, max_size=12
)


def make_table(positive, negative):
  return prune.Calibration(jnp.array(positive, jnp.float32), jnp.array(negative, jnp.float32))


def columns(rows):
  score, reward, weight = zip(*rows)
  return jnp.array(score, jnp.float32), jnp.array(reward, jnp.float32), jnp.array(weight, jnp.float32)


def assert_tables_equal(a, b, rtol=0.0):
  np.testing.assert_allclose(a.positive, b.positive, rtol=rtol, atol=rtol)
  np.testing.assert_allclose(a.negative, b.negative, rtol=rtol, atol=rtol)


# ---- table -------------------------------------------------------------------------------------------------


def test_empty_table():
  table = prune.Calibration()
  assert table.positive.shape == table.negative.shape == (128,)
  assert table.positive.dtype == table.negative.dtype == jnp.float32
  assert float(jnp.sum(table.positive) + jnp.sum(table.negative)) == 0.0
  assert prune.Calibration.empty(bins=5).positive.shape == (5,)
  assert len(jax.tree.leaves(table)) == 2
  assert float(prune.prior(table)) == 0.5
  np.testing.assert_array_equal(prune.bin_posterior(table), np.full(128, 0.5, np.float32))


def test_update_puts_scores_in_their_bins():
  # sigmoid(-inf) = 0: bin 0. sigmoid(-1) = 0.269, times 4 is 1.08: bin 1. sigmoid(0) = 1/2 exactly, the lower
  # edge of bin 2; just below it is bin 1. sigmoid(2) = 0.881, 3.52: bin 3. sigmoid(inf) = 1: not bin 4 but 3.
  score = jnp.array([-jnp.inf, -1e4, -1.0, -1e-5, 0.0, 2.0, 1e4, jnp.inf], jnp.float32)
  np.testing.assert_array_equal(prune.score_bin(score, 4), [0, 0, 1, 1, 2, 3, 3, 3])
  reward = jnp.array([1, 0, 0, 1, 1, 0, 1, 1], jnp.int32)
  table = prune.update(prune.Calibration.empty(4), score, reward)
  np.testing.assert_array_equal(table.positive, [1, 1, 1, 2])
  np.testing.assert_array_equal(table.negative, [1, 1, 0, 1])
  assert int(prune.score_bin(jnp.float32(0.0))) == 64  # the middle edge of 128 bins


def test_update_with_scalars_and_weights():
  table = prune.update(prune.Calibration.empty(4), 0.0, 1)
  np.testing.assert_array_equal(table.positive, [0, 0, 1, 0])
  table = prune.update(table, jnp.zeros(3), jnp.array([1, 0, 0]), 2.5)
  np.testing.assert_array_equal(table.positive, [0, 0, 3.5, 0])
  np.testing.assert_array_equal(table.negative, [0, 0, 5, 0])
  assert float(prune.prior(table)) == pytest.approx(3.5 / 8.5)


def test_inverse_propensity_weights_undo_the_pruning():
  # 8 rollouts in one bin, half of them right. Those of reward 1 survive with 1/4, those of reward 0 with 1/2:
  # 1 and 2 survivors, a fraction of 1/3; weighted by 1/p they count 4 and 4 again.
  table = prune.update(
    prune.Calibration.empty(4), jnp.zeros(3), jnp.array([1, 0, 0]), 1.0 / jnp.array([0.25, 0.5, 0.5])
  )
  assert float(prune.prior(table)) == 0.5
  np.testing.assert_array_equal(table.positive + table.negative, [0, 0, 8, 0])


def test_bad_rows_leave_no_trace():
  nan = jnp.nan
  before = make_table([1, 2, 3, 4], [4, 3, 2, 1])
  score = jnp.array([nan, nan, 0.5, 0.5, 0.5], jnp.float32)
  reward = jnp.array([1, 0, nan, 1, nan], jnp.float32)
  weight = jnp.array([1, 1, 1, nan, 0], jnp.float32)
  assert_tables_equal(prune.update(before, score, reward, weight), before)


@quick
@given(tables, batches, st.permutations(range(12)))
def test_order_of_rollouts_does_not_matter(table, rows, order):
  straight = update_jit(table, *columns(rows))
  shuffled = update_jit(table, *columns([rows[i] for i in order]))
  assert_tables_equal(straight, shuffled, rtol=1e-6)


@quick
@given(tables, batches)
def test_update_equals_a_loop_over_rollouts(table, rows):
  score, reward, weight = columns(rows)
  positive, negative = np.array(table.positive), np.array(table.negative)
  for b, r, w in zip(np.asarray(score_bin_jit(score, 8)), reward.tolist(), weight.tolist()):
    if r == 1:
      positive[b] += w  # weight 0 adds nothing, weight 2 counts twice
    else:
      negative[b] += w
  assert_tables_equal(update_jit(table, score, reward, weight), make_table(positive, negative))


# ---- posterior ---------------------------------------------------------------------------------------------


def test_posterior_by_hand():
  # c+ = 0 1 2 3 (sum 6), c- = 3 1 0 0 (sum 4): pi = 6/10.
  # P(b|1) = (c+ + 1) / (6 + 4) = 1 2 3 4 tenths; P(b|0) = (c- + 1) / (4 + 4) = 4 2 1 1 eighths.
  # pi P(b|1) = 6 12 18 24 hundredths; (1 - pi) P(b|0) = 20 10 5 5 hundredths.
  # q = 6/26, 12/22, 18/23, 24/29.
  table = make_table([0, 1, 2, 3], [3, 1, 0, 0])
  expected = np.array([6 / 26, 12 / 22, 18 / 23, 24 / 29])
  np.testing.assert_allclose(prune.bin_posterior(table), expected, rtol=1e-6)
  score = jnp.array([[-9.0, -0.5], [0.5, jnp.nan]], jnp.float32)  # bins 0, 1, 2; a NaN gets the prior
  expected = [[6 / 26, 12 / 22], [18 / 23, 0.6]]
  np.testing.assert_allclose(prune.posterior(table, score), expected, rtol=1e-6)
  # Without smoothing q is the plain fraction of each bin.
  np.testing.assert_allclose(prune.bin_posterior(table, alpha=0.0), [0, 0.5, 1, 1], atol=1e-6)
  # alpha = 2: P(b|1) = 2 3 4 5 / 14, P(b|0) = 5 3 2 2 / 12; bin 0: 0.6 * 2/14 = 3/35, 0.4 * 5/12 = 1/6.
  alpha_two = prune.posterior(table, -9.0, alpha=2.0)
  np.testing.assert_allclose(alpha_two, (3 / 35) / (3 / 35 + 1 / 6), rtol=1e-6)


@pytest.mark.parametrize("alpha", [1.0, 0.0])
def test_posterior_of_one_sided_histories(alpha):
  some, none = [0, 3, 1, 0], [0, 0, 0, 0]
  np.testing.assert_array_equal(prune.bin_posterior(make_table(some, none), alpha), np.ones(4))
  np.testing.assert_array_equal(prune.bin_posterior(make_table(none, some), alpha), np.zeros(4))
  np.testing.assert_array_equal(prune.bin_posterior(make_table(none, none), alpha), np.full(4, 0.5))


@quick
@given(tables, st.sampled_from([0.0, 0.5, 1.0]))
def test_posterior_is_a_probability(table, alpha):
  q = np.asarray(bin_posterior_jit(table, alpha))
  assert np.all((q >= 0.0) & (q <= 1.0))  # false for NaN


@quick
@given(tables)
def test_posterior_rises_with_the_likelihood_ratio(table):
  ratio = (np.asarray(table.positive) + 1.0) / (np.asarray(table.negative) + 1.0)
  order = np.argsort(ratio)
  table = prune.Calibration(table.positive[order], table.negative[order])
  assert np.all(np.diff(bin_posterior_jit(table, 1.0)) >= -1e-6)


# ---- survival and delta ------------------------------------------------------------------------------------


def test_survival_by_hand():
  # kappa + delta + lam (rho - q) = 0.5 + 0.1 + 0.5 (0.4 - q) = 0.8 - q / 2, clipped to [0.35, 0.7].
  q = jnp.array([0.0, 0.2, 0.4, 0.6, 1.0], jnp.float32)
  p = prune.survival(q, kappa=0.5, rho=0.4, lam=0.5, delta=0.1, p_min=0.35, p_max=0.7)
  np.testing.assert_allclose(p, [0.7, 0.7, 0.6, 0.5, 0.35], rtol=1e-6)


def test_delta_by_hand():
  # c+ = 1 5, c- = 2 0: pi = 6/8; P(b|1) = 2/8 6/8; P(b|0) = 3/4 1/4.
  # q_0 = 0.1875 / (0.1875 + 0.1875) = 0.5; q_1 = 0.5625 / (0.5625 + 0.0625) = 0.9.
  # The bins' shares of the counts are 3/8 and 5/8.
  table = make_table([1, 5], [2, 0])
  np.testing.assert_allclose(prune.bin_posterior(table), [0.5, 0.9], rtol=1e-6)
  # Nothing clipped: kappa + delta + lam (rho - mean q) = kappa, mean q = 0.75, delta = 0.5 * 0.25 = 0.125:
  # p = 0.625, 0.425.
  delta = prune.solve_delta(table, **PAPER)
  assert delta.shape == () and delta.dtype == jnp.float32
  np.testing.assert_allclose(delta, 0.125, atol=1e-6)
  # lam = 2: unclipped it would be 0.5 and p_0 = 1. So p_0 = 0.9, p_1 = (0.5 - 0.9 * 3/8) / (5/8) = 0.26,
  # and 0.5 + delta + 2 (0.5 - 0.9) = 0.26 gives delta = 0.56.
  delta = prune.solve_delta(table, **{**PAPER, "lam": 2.0})
  np.testing.assert_allclose(delta, 0.56, atol=1e-5)
  p = prune.survival(prune.bin_posterior(table), delta=delta, **{**PAPER, "lam": 2.0})
  np.testing.assert_allclose(p, [0.9, 0.26], atol=1e-5)


def test_delta_of_an_empty_table_is_zero():
  assert float(prune.solve_delta(prune.Calibration(), **PAPER)) == 0.0
  assert float(prune.solve_delta(prune.Calibration(), **{**PAPER, "rho": 0.7})) == 0.0


@pytest.mark.parametrize("table", [prune.Calibration.empty(8), make_table(range(8), range(7, -1, -1))])
@pytest.mark.parametrize("p_min, p_max, kappa, expected", [
  (0.1, 0.9, 0.95, 0.9),
  (0.1, 0.9, 0.9, 0.9),
  (0.1, 0.9, 0.05, 0.1),
  (0.1, 0.9, 0.1, 0.1),
  (0.0, 1.0, 1.0, 1.0),
])
@pytest.mark.parametrize("rho", [0.3, 0.8])  # tilts p down and up
def test_kappa_beyond_an_end_is_that_end_for_every_score(table, p_min, p_max, kappa, expected, rho):
  plan = dict(kappa=kappa, rho=rho, lam=0.5, p_min=p_min, p_max=p_max)
  p = survival_jit(bin_posterior_jit(table, 1.0), delta=solve_delta_jit(table, **plan), **plan)
  np.testing.assert_array_equal(p, np.full(p.shape, expected, np.float32))


@quick
@given(tables, unit, unit, st.floats(0.0, 4.0, width=32), unit, unit)
def test_survival_stays_in_range_and_keeps_kappa_on_average(table, kappa, rho, lam, end, other_end):
  p_min, p_max = sorted([end, other_end])
  plan = dict(kappa=kappa, rho=rho, lam=lam, p_min=p_min, p_max=p_max)
  delta = solve_delta_jit(table, **plan)
  p = np.asarray(survival_jit(bin_posterior_jit(table, 1.0), delta=delta, **plan))
  assert np.all((p >= np.float32(p_min)) & (p <= np.float32(p_max)))
  count = np.asarray(table.positive + table.negative)
  if count.sum() > 0:
    assert abs(np.average(p, weights=count) - np.clip(kappa, p_min, p_max)) < 1e-3


def test_lower_posteriors_survive_more():
  # Prune what is likely right, keep what is rare: with more right than wrong, survivors are nearer balance.
  table = make_table([0, 1, 2, 30], [3, 1, 0, 0])
  q = prune.bin_posterior(table)
  p = prune.survival(q, delta=prune.solve_delta(table, **PAPER), **PAPER)
  assert np.all(np.diff(p) < 0)
  count = np.asarray(table.positive + table.negative)
  assert abs(np.average(q, weights=count * np.asarray(p)) - 0.5) < abs(np.average(q, weights=count) - 0.5)


# ---- transformations ---------------------------------------------------------------------------------------


def whole_step(table, score, reward, weight, key):
  table = prune.update(table, score, reward, weight)
  delta = prune.solve_delta(table, **PAPER)
  p = prune.survival(prune.posterior(table, score), delta=delta, **PAPER)
  return table, delta, p, prune.draw(key, p), prune.draw(key, p, method="systematic")


def test_jit_and_vmap_equal_eager():
  key = jax.random.key(3)
  score = 2.0 * jax.random.normal(key, (2, 12))
  reward = (score + jax.random.normal(jax.random.key(4), (2, 12)) > 0).astype(jnp.float32)
  tables = jax.tree.map(lambda x: jnp.stack([x, x + 1.0]), make_table([0, 1, 2, 3], [3, 1, 0, 0]))
  args = (tables, score, reward, jnp.ones((2, 12)), jax.random.split(key, 2))
  at_once = jax.jit(jax.vmap(whole_step))(*args)
  for i in range(2):
    one = whole_step(*jax.tree.map(lambda x, i=i: x[i], args))
    jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, atol=1e-6), at_once, one)


# ---- within the group


@quick
@given(st.integers(0, 10**6), st.floats(0.1, 0.9), st.sampled_from([0.3, 0.5, 0.7]))
def test_group_survival_keeps_kappa_in_each_group_and_steers_to_rho(seed, hardness, kappa):
  rng = np.random.default_rng(seed)
  q = np.clip(rng.normal(hardness, 0.25, 12), 0.01, 0.99).astype(np.float32)
  group, decided = np.repeat([4, 7, 9], 4).astype(np.int32), rng.random(12) < 0.9
  order = rng.permutation(12)
  p = np.asarray(group_survival_jit(q, group, decided, kappa))
  shuffled = np.asarray(group_survival_jit(q[order], group[order], decided[order], kappa))
  np.testing.assert_allclose(shuffled, p[order], atol=1e-4)
  assert np.all((p >= 0.1 - 1e-6) & (p <= 0.9 + 1e-6)) and np.all(p[~decided] == np.float32(kappa))
  for g in (4, 7, 9):
    rows = (group == g) & decided
    if rows.any():
      assert abs(p[rows].mean() - kappa) < 1e-3
      ratio, plain = (p[rows] * q[rows]).sum() / p[rows].sum(), q[rows].mean()
      assert abs(ratio - 0.5) <= abs(plain - 0.5) + 1e-3  # never farther from rho than keeping all alike


group_survival_jit = jax.jit(lambda q, g, d, kappa: prune.group_survival(q, g, d, kappa=kappa, rho=0.5, p_min=0.1, p_max=0.9))


def test_equal_posteriors_survive_alike():
  p = group_survival_jit(np.full(4, 0.8, np.float32), np.zeros(4, np.int32), np.ones(4, bool), 0.5)
  np.testing.assert_allclose(p, 0.5, atol=1e-4)


def test_group_survival_by_hand():
  """Posteriors 0, 0, 1, 1, 1, 1 and three to keep: 1.5 expected of each kind, so 0.75 each and 0.375 each."""
  p = group_survival_jit(np.array([0, 0, 1, 1, 1, 1], np.float32), np.zeros(6, np.int32), np.ones(6, bool), 0.5)
  np.testing.assert_allclose(p, [0.75, 0.75, 0.375, 0.375, 0.375, 0.375], atol=2e-3)


def test_at_least_keeps_those_who_were_nearest():
  order = jnp.array([1.4, 1.1, 1.2, 3.0, 2.0, 0.1])
  group, decided = jnp.array([0, 0, 0, 1, 1, 1], jnp.int32), jnp.array([True, True, True, True, True, False])
  assert prune.at_least(2, order, group, decided).tolist() == [False, True, True, True, True, False]


def test_best_subset_has_the_largest_variance():
  rng = np.random.default_rng(0)
  for _ in range(50):
    reward, keep = rng.integers(0, 4, 7) / 3, int(rng.integers(1, 7))
    chosen = prune.best_subset(reward, keep)
    assert chosen.sum() == keep
    best = max(np.var(reward[list(rows)]) for rows in itertools.combinations(range(7), keep))
    assert np.var(reward[chosen]) == pytest.approx(best)


def test_the_published_rule_is_the_default_and_lists_will_do():
  table = prune.update(prune.Calibration.empty(), [-1.0, 0.5, 2.0], [0, 1, 1])
  published = {"rho": 0.5, "lam": 0.5, "p_min": 0.1, "p_max": 0.9}
  delta = prune.solve_delta(table, kappa=0.5, **published)
  assert float(prune.solve_delta(table, kappa=0.5)) == float(delta)
  q = prune.posterior(table, jnp.array([-1.0, 2.0]))
  np.testing.assert_array_equal(prune.survival(q, delta=delta), prune.survival(q, delta=delta, kappa=0.5, **published))
  np.testing.assert_array_equal(
    prune.group_survival([0.9, 0.8, 0.7, 0.2], [0, 0, 0, 0], [True] * 4, kappa=0.5, rho=0.5, p_min=0.1, p_max=0.9),
    prune.group_survival(jnp.array([0.9, 0.8, 0.7, 0.2]), jnp.zeros(4, int), jnp.ones(4, bool), kappa=0.5, rho=0.5, p_min=0.1,
                         p_max=0.9))
