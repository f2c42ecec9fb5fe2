"""What the simulator shows at a small scale: theory holds, weights mend the bias, fixed sizes, balance, several decisions."""

import numpy as np
import pytest

from experiments import sim_pruning as sim


@pytest.fixture
def rng():
  return np.random.default_rng(0)


def test_the_papers_statements_hold(rng):
  out = sim.theory(rng, 500)
  assert out["lemma_4_1"] == out["lemma_a_1"] == out["lemma_a_2"] == 0
  assert out["theorem_4_2_exceeded"] <= out["theorem_4_2_delta"]


def test_the_published_prior_is_biased_and_the_weighted_one_is_not(rng):
  out = sim.bias(rng, 120_000)
  assert out["published"]["bias_in_errors"] < -10 and out["published"]["keep_ratio"] < 0.49
  assert abs(out["weighted"]["bias_in_errors"]) < 3 and abs(out["weighted"]["keep_ratio"] - 0.5) < 0.005


def test_systematic_draws_keep_marginals_at_a_fixed_size(rng):
  out = sim.draws(rng, 4000)
  assert out["systematic"]["smallest_p_value"] > 1e-3 and out["bernoulli"]["smallest_p_value"] > 1e-3
  assert out["systematic"]["fewest"] == out["systematic"]["most"] == 8 and out["bernoulli"]["fewest"] < 7


def test_balance_within_the_group_beats_the_published_rule(rng):
  out = sim.balance(rng, 640)
  for hardness in sim.HARDNESS:
    cell = out[hardness]
    assert cell["group"]["pos_var"] > cell["published"]["pos_var"] + 3 * cell["published"]["standard_error"]
    assert cell["group"]["pos_var"] > cell["random"]["pos_var"]


def test_several_decisions_save_more_at_the_same_keep_ratio(rng):
  out = sim.lengths(rng, 640)
  assert out["four"]["saved"] > out["one"]["saved"] + 0.05
  assert abs(out["four"]["kept"] - out["one"]["kept"]) < 0.02


def test_the_batchs_budget_keeps_more_signal(rng):
  """At any AUC, and with 35% of the rollouts as much as random pruning with half of them, where the score knows something."""
  out = sim.signal(rng, 640)
  for wanted in sim.AUCS:
    cell = out[str(wanted)]
    assert abs(cell["auc"] - wanted) < 0.03 and 0.5 < cell["auc_within"] < cell["auc"]
    for kappa in sim.SHARES:
      rules = cell[str(kappa)]
      assert all(abs(x["kept"] - kappa) < 0.02 for name, x in rules.items() if name != "published")  # whose share is its table's
      best, error = rules["budget"], rules["budget"]["standard_error"]
      assert all(best["signal"] > x["signal"] + error for name, x in rules.items() if name != "budget")
      assert best["signal"] < out["all"]["signal"]
  known = out["0.8"]
  assert known["0.35"]["budget"]["signal"] > known["0.5"]["random"]["signal"]
  # Eight of 16 at random have the whole group's variance in expectation, of 7 in place of 15 degrees of freedom.
  assert abs(known["0.5"]["random"]["signal"] - out["all"]["signal"] * 7 / 15) < 0.08


def test_noise_is_found_for_an_auc(rng):
  assert sim.noise_for(rng, 0.6) > sim.noise_for(rng, 0.8) > 0.2
