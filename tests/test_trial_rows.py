"""Rows of the paper's tables that are the trial's runs, on made-up files."""

import dataclasses

import pytest
from scipy import stats
from test_trial_page import elsewhere, made_up  # noqa: F401 (a fixture)

from experiments import runs, table1, table5, table6, tables, trial_rows
from experiments.trial_arms import REGIMES

FIRST, SECOND = REGIMES["gsm8k"], REGIMES["gsm8k_rest"]


@pytest.fixture
def scale(tmp_path):
  return dataclasses.replace(runs.GPU, results=str(tmp_path / "results"), trial=(("GSM8K", ("gsm8k", "gsm8k_rest")),))


def rows(build, scale):
  table, _ = tables.draw(build.build, scale)
  return {row[0].replace("the trial: GSM8K, 120 s of steps, ", ""): row[1:] for row in table.rows if "trial" in row[0]}, table


def test_pairs_are_each_seeds_first_of_one_host(elsewhere, scale):  # noqa: F811
  """Seed 1 of the first regime, seed 2 of the second; seed 1 of the second is not counted again, seed 3 is of two hosts."""
  made_up("plain", 1, 0.30, seconds=3.0, regime=FIRST)
  made_up("published", 1, 0.32, seconds=1.5, regime=FIRST)
  made_up("plain", 2, 0.40, seconds=3.0, regime=FIRST)  # whose partner is not there
  made_up("plain", 2, 0.20, seconds=2.0, regime=SECOND)
  made_up("published", 2, 0.26, seconds=2.0, regime=SECOND)
  made_up("plain", 1, 0.90, regime=SECOND)
  made_up("published", 1, 0.10, regime=SECOND)
  made_up("plain", 3, 0.90, regime=SECOND, host="a")
  made_up("published", 3, 0.10, regime=SECOND, host="b")
  both = trial_rows.pairs(("gsm8k", "gsm8k_rest"), "published")
  assert [(a.run.regime.name, a.run.seed) for a, _ in both] == [("gsm8k", 1), ("gsm8k_rest", 2)]
  half = stats.t.ppf(0.975, 1) * 2  # of 2 and 6
  found, table = rows(table1, scale)
  assert found.keys() == {"the paper's rule and head"}
  assert found["the paper's rule and head"][4:] == [
    f"+4.0 ± {half:.1f} (+2.0, +6.0)", "+2.30", f"1.50x ± {stats.t.ppf(0.975, 1) / 2:.2f} (2.00, 1.00)", "1.61x"]
  assert any(note.startswith("Undecided") and "2 pairs" in note for note in table.notes) and trial_rows.NOTE in table.notes


def test_phases_and_keep_ratios(elsewhere, scale):  # noqa: F811
  """A phase that files do not have is left out; each keep ratio stands beside plain of its own seeds."""
  for arm, seed, accuracy, seconds in (("plain", 1, 0.3, 4.0), ("published", 1, 0.2, 2.0), ("plain", 2, 0.5, 4.0),
                                       ("budget035", 2, 0.4, 1.0)):
    made_up(arm, seed, accuracy, seconds, regime=SECOND)
  found, table = rows(table5, scale)
  assert found == {"generation, means (the paper's rule and head)": ["1", "106.82", "0.5", "72.96", "2.00x", "1.46x"],
                   "whole step, means (the paper's rule and head)": ["4", "", "2", "", "2.00x", "1.61x"]}
  assert table.notes[-1] == trial_rows.NOTE
  found, table = rows(table6, scale)
  assert found == {"0.5 (the paper's rule and head)": ["0.500", "20.0", "", "2", "2.00x", ""],
                   "1.0 (the paper's rule and head: plain of the same seeds)": ["1.000", "30.0", "", "4", "1.00x", ""],
                   "0.35 (our budget)": ["0.500", "40.0", "", "1", "4.00x", ""],
                   "1.0 (our budget: plain of the same seeds)": ["1.000", "50.0", "", "4", "1.00x", ""]}


def test_a_trial_without_pairs_says_nothing(elsewhere, scale):  # noqa: F811
  made_up("plain", 1, 0.3, regime=FIRST)
  made_up("plain", 1, 0.3, regime=SECOND)
  made_up("published", 1, 0.3, regime=SECOND, version=("def", "456"))  # the page refuses it
  for build in (table1, table5, table6):
    found, table = rows(build, scale)
    assert not found and trial_rows.NOTE not in table.notes
