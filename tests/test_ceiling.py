"""Estimators of what a prefix explains (experiments/ceiling.py), on made-up outcomes whose truth is known."""

import sys

import numpy as np
import pytest

from configs import quickstart
from experiments import ceiling


def made(chances, outcomes, rng):
  """Bernoulli outcomes f[S,N] for each row of chances f[P,S]."""
  return [(rng.random((len(p), outcomes)) < p[:, None]).astype(float) for p in chances]


def test_components_by_hand():
  # Means 1, 1/2, 0 of two outcomes: given the prefix (0 + 2 * 1/4 / 1 + 0) / 3 = 1/6; between 1/4 - (1/6) / 2.
  between, given = ceiling.components(np.array([[1.0, 1.0], [1.0, 0.0], [0.0, 0.0]]))
  assert given == pytest.approx(1 / 6) and between == pytest.approx(1 / 4 - 1 / 12)


def test_cells_by_hand():
  outcomes = np.array([[1.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
  # Column 1 says (1, 1, 0) of column 0, (1, 0, 0): AUC 3/4; column 2 (1, 1, 1) of column 1: 1/2; column 2 is not mixed.
  assert ceiling.auc_cells(outcomes, 1) == (pytest.approx(1.25), 2)
  # Columns (1, 2) sum to (2, 2, 1) and (2, 0) to (2, 1, 1): AUC 3/4 of (1, 0, 0), and 3/4 of (1, 1, 0).
  assert ceiling.auc_cells(outcomes, 2) == (pytest.approx(1.5), 2)


@pytest.mark.parametrize("outcomes", [2, 5])
def test_the_share_is_unbiased_at_few_outcomes(outcomes):
  """Chances uniform in [0, 1]: of the variance 1/4 within a prompt 1/12 lies between prefixes."""
  rng = np.random.default_rng(0)
  out = ceiling.ceiling(made(rng.random((4000, 6)), outcomes, rng))
  assert out["share"]["value"] == pytest.approx(1 / 3, abs=0.015)
  assert out["share"]["low"] < 1 / 3 < out["share"]["high"] and out["variance_within"] == pytest.approx(1 / 4, abs=0.005)


def test_what_differs_between_prompts_is_no_merit_of_prefixes():
  rng = np.random.default_rng(1)
  out = ceiling.ceiling(made(np.repeat(rng.random((2000, 1)), 8, axis=1), 4, rng))
  assert out["share"]["value"] == pytest.approx(0.0, abs=0.02) and out["auc"]["2"]["value"] == pytest.approx(0.5, abs=0.01)


def test_the_auc_rises_to_that_of_the_chances():
  """Two kinds of prefix, chances 0.2 and 0.8: the right of a pair has the higher chance with 0.8 * 0.8, the same with
  2 * 0.8 * 0.2, so the AUC of the chance is 0.64 + 0.16 = 0.8."""
  rng = np.random.default_rng(2)
  chances = np.where(rng.random((600, 64)) < 0.5, 0.2, 0.8)
  out = ceiling.ceiling(made(chances, 17, rng))["auc"]
  values = [out[k]["value"] for k in ("1", "2", "4", "8", "16")]
  assert values == sorted(values) and values[-1] == pytest.approx(0.8, abs=0.005)
  # One outcome says 1 of P(1 | right) = 0.8^2 + 0.2^2 = 0.68 of the right and 0.32 of the wrong: 0.5 + (0.68 - 0.32) / 2.
  assert values[0] == pytest.approx(0.68, abs=0.005)


def test_intervals_cover():
  rng, inside = np.random.default_rng(3), 0
  for _ in range(40):
    share = ceiling.ceiling(made(rng.random((60, 6)), 5, rng))["share"]
    inside += share["low"] < 1 / 3 < share["high"]
  assert inside >= 33  # 38 expected; 0.5% of binomials are lower


def test_prompts_without_a_pair_are_left_out():
  groups = [np.ones((1, 3)), np.zeros((0, 3)), np.array([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])]
  out = ceiling.ceiling(groups)
  assert out["prompts"] == 1 and out["share"]["value"] == 1.0 and out["auc"]["2"]["value"] == 1.0
  with pytest.raises(ceiling.UserError, match="prefixes"):
    ceiling.ceiling(groups[:2])


def test_greedy_continuations_end_as_the_response_did():
  """At temperature 0 nothing is left to chance: each continuation of a prefix has the response's own outcome."""
  c = quickstart.get_config()
  c.rollout.temperature, c.rollout.group_size, c.rollout.slots, c.rollout.row_buckets = 0.0, 2, 32, 1
  found = {length: np.concatenate(groups) for length, groups in ceiling.measure(c, (5, 13), 8, 2)}
  for outcomes in found.values():
    assert outcomes.shape[1] == 3 and len(outcomes) >= 12
    np.testing.assert_array_equal(outcomes, np.repeat(outcomes[:, :1], 3, axis=1))
  assert 0 < found[5].mean() < 1


def test_mistakes_are_one_line(monkeypatch, capsys):
  monkeypatch.setattr(ceiling.os, "makedirs", lambda *_, **__: None)
  for flag, word in (("--lengths=8,48", "max_new"), ("--lengths=x", "whole"), ("--prefixes=1", "prefixes"),
                     ("--prompts=9000", "holds 2000")):
    monkeypatch.setattr(sys, "argv", ["ceiling", "--config=configs/quickstart.py", "--lengths=8",
                                      "--config.data.eval=nowhere.jsonl", flag])  # which is not read
    with pytest.raises(SystemExit) as e:
      ceiling.configuration.run(ceiling.main)
    err = capsys.readouterr().err
    assert e.value.code == 2 and word in err.splitlines()[-1] and "Traceback" not in err
