"""The budget over the batch: greedy by a loop over all rows, its price against the best set, order of slots, draws, prompts."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
import pytest

from arrol_jax.pruning import budget
from arrol_jax.pruning.draws import draw

LIMITS = {"kappa": 0.5, "p_min": 0.02, "p_max": 1.0}
budget_probability = jax.jit(budget.budget_probability, static_argnames=("p_min", "p_max"))
carried_probability = jax.jit(functools.partial(budget.carried_probability, limits=LIMITS))


def keep_set(q, group, decided, settled, count, identity=None):
  """The `count` decided rows that the greedy rule drops last, and all that are not decided: bool[B]."""
  kappa = count / max(np.sum(decided), 1)
  p = budget_probability(q, group, decided, settled, kappa=kappa, p_min=0.0, p_max=1.0, identity=identity)
  return np.where(decided, np.asarray(p) > 0.5, True)


def prices(q, group, decided, settled):
  """What each decided row costs, in their order; a price does not depend on a budget."""
  nothing = np.full((2, 1, len(q)), np.nan, np.float32)
  past = carried_probability(q, group, decided, settled, np.zeros(len(q), np.int32), nothing)[1]
  return np.asarray(past)[0, 0, :np.sum(decided)]


def signal(q, group, rows):
  """The definition: sum over groups of (K s - s^2 - sum q (1 - q)) / K."""
  total = 0.0
  for g in np.unique(group[rows]):
    x = q[rows & (group == g)].astype(float)
    total += (len(x) * x.sum() - x.sum()**2 - (x * (1 - x)).sum()) / len(x)
  return total


def greedy(q, group, decided, settled, count):
  """Drops one by one the row whose loss costs least, ties by group and index."""
  rows = decided | settled
  while (rows & decided).sum() > count:
    now = signal(q, group, rows)
    options = [(round((now - signal(q, group, rows & (np.arange(len(q)) != i))) * 2**20), group[i], i)
               for i in np.flatnonzero(rows & decided)]
    rows[min(options)[-1]] = False
  return rows | ~decided


def batch(seed, groups=5, each=6, settled_share=0.2, absent_share=0.1):
  """q f32[B], group i32[B], decided bool[B], settled bool[B]; labels have holes, and rows come in any order."""
  rng = np.random.default_rng(seed)
  group = rng.permutation(np.repeat(np.arange(groups) * 7 - 3, each)).astype(np.int32)
  level = dict(zip(np.unique(group), rng.beta(0.5, 1, groups), strict=True))
  q = np.clip([rng.normal(level[g], 0.2) for g in group], 0.001, 0.999).astype(np.float32)
  kind = rng.choice(3, len(q), p=[1 - settled_share - absent_share, settled_share, absent_share])
  q = np.where((kind == 1) & (rng.random(len(q)) < 0.7), np.round(q), q).astype(np.float32)  # finished, most of them graded
  return q, group, kind == 0, kind == 1


# ---- the choice


@pytest.mark.parametrize("seed", range(12))
def test_equals_dropping_one_by_one(seed):
  q, group, decided, settled = batch(seed)
  for share in (0.0, 0.3, 0.5, 0.8, 1.0):
    count = round(share * decided.sum())
    keep = keep_set(q, group, decided, settled, count)
    np.testing.assert_array_equal(keep, greedy(q, group, decided, settled, count))
    assert np.sum(keep & decided) == count


def test_by_hand():
  """Group 0 holds one likely right row among wrong ones: it keeps that and loses wrong ones, which cost least. Group 1 is all
  wrong, worth nothing, and goes first, its last row too."""
  q = np.array([0.9, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0], np.float32)
  group, everyone, nobody = np.array([0, 0, 0, 0, 1, 1, 1], np.int32), np.ones(7, bool), np.zeros(7, bool)
  assert keep_set(q, group, everyone, nobody, 4).tolist() == [True] * 4 + [False] * 3
  keep = keep_set(q, group, everyone, nobody, 2)
  assert keep.tolist() == [True, False, False, True] + [False] * 3
  # 3 rows have (3 * 0.9 - 0.81 - 0.09) / 3 = 0.6, 2 have (1.8 - 0.9) / 2 = 0.45
  assert prices(q, group, everyone, nobody)[~keep].max() == pytest.approx(0.15, abs=1e-5)


def test_finished_rows_count_and_stay():
  """A finished right answer makes wrong ones worth keeping; among right ones the third is the cheapest."""
  q = np.array([1.0, 1.0, 0.1, 0.1, 1.0, 1.0], np.float32)
  group = np.array([0, 0, 0, 1, 1, 1], np.int32)
  settled = np.array([True, False, False, False, True, True])
  assert keep_set(q, group, ~settled, settled, 2).tolist() == [True, False, True, True, True, True]
  assert np.all(keep_set(q, group, ~settled, settled, 0) == settled)


@pytest.mark.parametrize("levels", [5, 1000])
def test_independent_of_slots_and_ties_by_identity(levels):
  """The same rows chosen wherever they lie: among equal rows, those of the lowest identity go first."""
  rng = np.random.default_rng(0)
  group, identity = np.repeat(np.arange(9), 7).astype(np.int32), rng.permutation(63).astype(np.int32)
  q = (rng.integers(0, levels + 1, 63) / levels).astype(np.float32)
  decided, settled = np.split(rng.random((2, 63)) < np.array([[0.9], [0.1]]), 2)
  decided, settled = decided[0], settled[0] & ~decided[0]
  for count in (10, 30):
    keep = keep_set(q, group, decided, settled, count, identity)
    for seed in range(5):
      at = np.random.default_rng(seed).permutation(63)
      moved = keep_set(q[at], group[at], decided[at], settled[at], count, identity[at])
      np.testing.assert_array_equal(moved, keep[at])
  everyone, nobody = np.ones(63, bool), np.zeros(63, bool)
  keep = keep_set(np.full(63, 0.3, np.float32), group, everyone, nobody, 9 * 7 - 3, identity)
  assert np.flatnonzero(~keep).tolist() == sorted(np.argsort(identity[:7])[:3])


def test_gap_to_the_best_set():
  """Over all sets of the size, in groups of four, of which whole ones go: greedy has 96% of the best one's signal on average."""
  shares = []
  for seed in range(60):
    q, group, decided, settled = batch(seed, groups=3, each=4, settled_share=0.0, absent_share=0.0)
    sets = [np.isin(np.arange(12), rows) for rows in itertools.combinations(range(12), 6)]
    best = max(signal(q, group, rows) for rows in sets)
    mine = signal(q, group, keep_set(q, group, decided, settled, 6))
    shares.append(mine / best)
  print(f"greedy / best: mean {np.mean(shares):.4f}, lowest {np.min(shares):.3f}")
  assert 0.95 < np.mean(shares) <= 1.0 + 1e-6 and np.min(shares) > 0.75


def test_more_signal_than_random_at_full_size():
  q, group, decided, settled = batch(0, groups=256, each=16, settled_share=0.1, absent_share=0.0)
  count = int(decided.sum()) // 2
  keep, rng = keep_set(q, group, decided, settled, count), np.random.default_rng(0)
  assert np.sum(keep & decided) == count
  by_chance = [np.isin(np.arange(len(q)), rng.permutation(np.flatnonzero(decided))[:count]) for _ in range(20)]
  assert signal(q, group, keep) > 1.2 * np.mean([signal(q, group, some | settled) for some in by_chance])


def test_eight_devices_choose_alike():
  q, group, decided, settled = batch(1, groups=32, each=16)
  rows = NamedSharding(Mesh(np.array(jax.devices()), "x"), PartitionSpec("x"))
  spread = [jax.device_put(x, rows) for x in (q, group, decided, settled)]
  np.testing.assert_array_equal(keep_set(*spread, 150), keep_set(q, group, decided, settled, 150))


# ---- thresholds


def test_the_threshold_of_a_decision_makes_the_same_decision():
  for seed in range(8):
    q, group, decided, settled = batch(seed, groups=8)
    for share in (0.2, 0.5, 0.9, 1.0):
      keep = keep_set(q, group, decided, settled, round(share * decided.sum()))[decided]
      price = prices(q, group, decided, settled)
      threshold = price[~keep].max(initial=-np.inf)
      tie = price == threshold  # a group's last two, which go together
      np.testing.assert_array_equal(price > threshold, keep & ~tie)
      assert np.sum(keep & tie) <= 2


def test_a_carried_threshold_meets_the_budget_of_rows_that_come_one_by_one():
  """Rows decide alone, the rest of the group standing; the threshold is that of the last 500 decisions."""
  losses, kept, rng = np.full(500, np.nan, np.float32), [], np.random.default_rng(0)
  carried = jax.jit(budget.carried_threshold)
  assert float(carried(losses, 0.5)[0]) == -np.inf
  for i in range(1500):
    q, group, _, _ = batch(int(rng.integers(1 << 30)), groups=1, each=8)
    decided = np.arange(8) == rng.integers(8)
    threshold = float(carried(losses, 0.4)[0])
    price = float(prices(q, group, decided, ~decided)[0])
    kept.append(price > threshold)
    losses[i % 500] = price
  assert np.mean(kept[500:]) == pytest.approx(0.4, abs=0.05)
  assert float(carried(losses, 1.0)[0]) == -np.inf


def test_those_that_tie_at_the_threshold_share_what_is_left():
  losses = np.array([0.0, 0.1, 0.1, 0.1, 0.3, np.nan], np.float32)
  for kappa, threshold, share in ((0.4, 0.1, 1 / 3), (0.8, 0.0, 0.0), (0.9, 0.0, 0.5), (0.2, 0.1, 0.0), (0.1, 0.3, 0.5)):
    got = budget.carried_threshold(losses, kappa)
    np.testing.assert_allclose(got, (threshold, share), atol=1e-5)


systematic = jax.jit(lambda keys, p: draw(keys, p, method="systematic", groups=jnp.zeros(p.shape, jnp.int32)))


def test_without_a_past_the_batch_has_its_own_budget():
  """And what it was is remembered by boundary, the latest first."""
  q, group, decided, settled = batch(5, groups=6)
  which, nothing = (np.arange(len(q)) % 2).astype(np.int32), np.full((2, 2, 40), np.nan, np.float32)
  p, after = carried_probability(q, group, decided, settled, which, nothing)
  np.testing.assert_array_equal(p, budget.budget_probability(q, group, decided, settled, **LIMITS))
  price = np.zeros(len(q), np.float32)
  price[decided] = prices(q, group, decided, settled)
  for seen, values in zip(np.asarray(after), (price, np.asarray(p)), strict=True):
    for boundary in range(2):
      mine = values[decided & (which == boundary)]
      np.testing.assert_array_equal(seen[boundary], np.r_[mine, np.full(40 - len(mine), np.nan)])
  first = decided & (which == 0)
  later, again = carried_probability(q, group, first, settled, which, after)
  np.testing.assert_array_equal(again[:, 1], after[:, 1])  # nobody stood at the second
  np.testing.assert_array_equal(again[1, 0], np.r_[np.asarray(later)[first], after[1, 0]][:40])


def test_a_loop_of_known_length_does_the_same():
  """Steps that find nothing to drop change nothing: the largest group here has fewer rows than 16."""
  nothing = np.full((2, 1, 40), np.nan, np.float32)
  for seed in range(8):
    q, group, decided, settled = batch(seed, groups=6)
    which = np.zeros(len(q), np.int32)
    known = [budget.carried_probability(q, group, decided, settled, which, nothing, LIMITS | {"group_size": size})
             for size in (None, 16, 4096)]
    for p, past in known[1:]:
      np.testing.assert_array_equal(p, known[0][0])
      np.testing.assert_array_equal(past, known[0][1])


@pytest.mark.parametrize("adjacent", [True, False])
def test_rows_that_come_a_few_at_a_time_keep_the_share_and_more_signal_than_by_few_budgets(adjacent):
  """Waves of 6 rows of 32 groups of 16; who has been kept stands as settled. The whole batch at once keeps most."""
  rng, kept, won = np.random.default_rng(1), [], []
  for n in range(5):
    chance = rng.beta(0.6, 1.2, 32)
    q = np.clip(np.repeat(chance, 16) + rng.normal(0, 0.15, 512), 0, 1).astype(np.float32)
    group, order = np.repeat(np.arange(32, dtype=np.int32), 16), np.arange(512) if adjacent else rng.permutation(512)
    signals = []
    for carries, size in ((False, 6), (True, 6), (False, 512)):
      past, stands = np.full((2, 1, 512), np.nan, np.float32), np.zeros(512, bool)
      for start in range(0, 512, size):
        now = np.isin(np.arange(512), order[start:start + size])
        p, after = carried_probability(q, group, now, stands, np.zeros(512, np.int32), past)
        past = after if carries else past
        stands |= now & np.asarray(systematic(jax.random.split(jax.random.key(1000 * n + start), 512), jnp.where(now, p, 1.0)))
      signals.append(signal(q, group, stands))
      kept += [stands.mean()] * carries
    won.append([signals[1] / signals[0], signals[1] / signals[2]])
  few, all_at_once = np.mean(won, axis=0)
  assert np.mean(kept) == pytest.approx(0.5, abs=0.02) and np.ptp(kept) < 0.1
  assert few > 1.03 and 0.8 < all_at_once < 1.0


# ---- probabilities


@pytest.mark.parametrize("kappa", [0.1, 0.35, 0.5, 0.77, 0.9])
def test_probabilities_have_the_mean_and_follow_the_order(kappa):
  q, group, decided, settled = batch(5)
  p = np.asarray(budget.budget_probability(q, group, decided, settled, kappa=kappa, p_min=0.1, p_max=0.9))
  assert p[decided].mean() == pytest.approx(kappa, abs=1e-5) and np.all(p[~decided] == np.float32(kappa))
  assert np.sum((p[decided] > 0.1 + 1e-5) & (p[decided] < 0.9 - 1e-5)) <= 1
  likely = decided & (p > 0.9 - 1e-5)
  np.testing.assert_array_equal(keep_set(q, group, decided, settled, int(likely.sum())) & decided, likely)


@pytest.mark.parametrize("method", ["bernoulli", "systematic"])
def test_draws_have_these_marginals(method):
  """Chi-square over rows, each kept n p times of n draws. Systematic: half of the batch in every draw."""
  q, group, decided, settled = batch(6, groups=4, each=6, settled_share=0.0, absent_share=0.0)
  p = budget.budget_probability(q, group, decided, settled, kappa=0.5, p_min=0.2, p_max=0.8)
  n = 4000
  kept = np.asarray(jax.vmap(functools.partial(draw, p=p, method=method))(jax.random.split(jax.random.key(0), n)))
  expected = n * np.asarray(p, float)
  chi = np.sum((kept.sum(0) - expected)**2 / (expected * (1 - np.asarray(p))))
  assert chi < 24 + 4 * np.sqrt(2 * 24)  # 24 degrees of freedom, four standard deviations
  assert method == "bernoulli" or np.all(kept.sum(1) == 12)
  right = (q > 0.5) & kept  # 1 / p over survivors is unbiased
  estimate = (right / np.asarray(p)).sum(1)
  assert estimate.mean() == pytest.approx(np.sum(q > 0.5), abs=4 * estimate.std() / np.sqrt(n) + 1e-6)


# ---- prompts


def test_prompts_of_the_largest_variance_and_some_by_chance():
  q = jnp.array([0.5, 0.02, 0.4, 0.98, 0.6, 0.1, 0.9, 0.0])
  choose = jax.jit(budget.choose_prompts)
  keys = jax.random.split(jax.random.key(0), 2000)
  assert np.flatnonzero(choose(q, 3, 0.0, keys[0])).tolist() == [0, 2, 4]
  assert np.all(choose(q, 9, 0.3, keys[0]))
  drawn = np.asarray(jax.vmap(choose, (None, None, None, 0))(q, 4, 0.5, keys))
  assert np.all(drawn.sum(1) == 4) and np.all(drawn[:, 0])
  best = [0, 2]  # 0.4 before 0.6: ties by index
  assert np.all(drawn[:, best])
  others = np.delete(drawn, best, axis=1).mean(0)  # two of six
  np.testing.assert_allclose(others, 1 / 3, atol=4 * np.sqrt(2 / 9 / 2000))
  np.testing.assert_array_equal(choose(q, 4, 0.5, keys[3]), drawn[3])


@pytest.mark.parametrize("count, explore, fewest", [(4, 0.1, 0), (4, 0.4, 1), (32, 0.1, 3), (30, 0.1, 3), (10, 0.7, 7)])
def test_a_share_of_exploration_holds_in_expectation(count, explore, fewest):
  """0.4 of a prompt is one in two steps of five, not none; a whole number is that number in every step."""
  q = jnp.linspace(0.01, 0.5, 64)  # the best are the last
  keys = jax.random.split(jax.random.key(0), 2000)
  drawn = jax.jit(jax.vmap(budget.choose_prompts, (None, None, None, 0)))(q, count, explore, keys)
  assert np.all(np.asarray(drawn).sum(1) == count)
  sure = count - fewest - (count * explore > fewest + 1e-6)  # chosen whatever is drawn
  assert np.all(np.asarray(drawn)[:, 64 - sure:])
  among = count - np.asarray(drawn)[:, 64 - count:].sum(1)  # explored, and none of the best `count`
  share = [n * (64 - count) / (64 - count + n) for n in (fewest, fewest + 1)]  # where n are explored
  wanted = share[0] + (count * explore - fewest) * (share[1] - share[0])
  assert among.mean() == pytest.approx(wanted, abs=4 * among.std() / np.sqrt(2000) + 1e-6)


def test_equal_prompts_go_by_index():
  assert np.flatnonzero(budget.choose_prompts(jnp.full(5, 0.3), 2, 0.0, jax.random.key(1))).tolist() == [0, 1]
