"""The paper's tables at the gpu scale, which are the trial's runs, on made-up files."""

import dataclasses
import json

import pytest
from scipy import stats
from test_trial_page import elsewhere, made_up  # noqa: F401 (a fixture)

from arrol_jax.types import UserError
from experiments import figure2, figure4, runs, table1, table2, table3, table4, table5, table6, tables, trial_queue, trial_tables
from experiments.trial_arms import REGIMES

FIRST, SECOND, TABLES = REGIMES["gsm8k"], REGIMES["gsm8k_rest"], REGIMES["gsm8k_tables"]


@pytest.fixture
def scale(tmp_path):
  (tmp_path / "results").mkdir()
  return dataclasses.replace(runs.GPU, results=str(tmp_path / "results"))


def rows(build, scale):
  table, _ = tables.draw(build.build, scale)
  return {row[0]: row[1:] for row in table.rows}, table


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
  both = trial_tables.pairs(("gsm8k", "gsm8k_rest"), "published")
  assert [(a.run.regime.name, a.run.seed) for a, _ in both] == [("gsm8k", 1), ("gsm8k_rest", 2)]
  half = stats.t.ppf(0.975, 1) * 2  # of 2 and 6
  found, table = rows(table1, scale)
  assert found == {"GSM8K: the paper's rule and head": [
    "2", "25.0 ± 63.5", "34.79", "29.0 ± 38.1", "37.09", f"+4.0 ± {half:.1f} (+2.0, +6.0)", "+2.30",
    f"1.50x ± {stats.t.ppf(0.975, 1) / 2:.2f}", "1.61x"]}
  assert table.notes[0].startswith("Undecided") and "2 pairs" in table.notes[0] and table.notes[1].startswith("Undecided (seeds")
  assert "published_seed71" in table.notes[2] and "dapo" not in table.notes[2]  # what this table misses


def test_phases_and_keep_ratios(elsewhere, scale):  # noqa: F811
  """A phase that files do not have is left out; each keep ratio stands beside plain of its own seeds."""
  for arm, seed, accuracy, seconds in (("plain", 1, 0.3, 4.0), ("published", 1, 0.2, 2.0), ("plain", 2, 0.5, 4.0),
                                       ("budget035", 2, 0.4, 1.0)):
    made_up(arm, seed, accuracy, seconds, regime=SECOND)
  found, _ = rows(table5, scale)
  assert found == {"GSM8K: the paper's rule and head; generation": ["1", "106.82", "0.5", "72.96", "2.00x", "1.46x"],
                   "GSM8K: the paper's rule and head; whole step": ["4", "", "2", "", "2.00x", "1.61x"]}
  found, _ = rows(table6, scale)
  assert found == {"0.5 (GSM8K: the paper's rule and head)": ["1", "0.500", "30.0", "20.0", "-10.0", "+0.98", "2.00x", "1.61x"],
                   "0.35 (GSM8K: our budget)": ["1", "0.500", "50.0", "40.0", "-10.0", "", "4.00x", ""]}


def test_dapo_stands_beside_dapo_and_one_pair_decides_nothing(elsewhere, scale):  # noqa: F811
  made_up("plain", 71, 0.1, regime=TABLES)
  made_up("dapo", 71, 0.3, 3.0, regime=TABLES)
  made_up("dapo_published", 71, 0.4, 2.0, regime=TABLES)
  found, table = rows(table2, scale)
  assert found == {
    "GSM8K: the paper's rule and head": ["1", "30.0", "36.43", "40.0", "39.42", "+10.0", "+2.99", "1.50x", "1.70x"]}
  assert table.notes[0].startswith("One pair, so undecided") and not any("Agrees" in note for note in table.notes)


def test_votes_gain_over_the_majority_of_the_same_samples(elsewhere, scale):  # noqa: F811
  run = made_up("published", 71, 0.3, regime=TABLES)
  votes = {"problems": 640, "samples": 16, "tokens": 3000.0, "accuracy": 0.3, "ci95": 0.02}
  votes |= {f"{k}@16": v for k, v in (("maj", 0.4), ("rank", 0.43), ("deepconf_mean", 0.41), ("deepconf_bottom10", 0.4),
                                      ("posterior", 0.38), ("best", 0.3))}
  votes |= {f"{k}_ci": [v - 0.01, v + 0.03] for k, v in votes.items() if "@" in k}
  votes |= {"rank@16_gain_ci": [0.01, 0.05], "posterior@16_gain_ci": [-0.04, 0.0]}
  (run.folder / "votes.json").write_text(json.dumps(votes))
  found, table = rows(table3, scale)
  assert found["majority"][0] == "40.0 ± 2.0" and found["rank by the head (ARRoL)"][0] == "43.0 ± 2.0; +3.0 ± 2.0"
  assert found["posterior of the head"][0] == "38.0 ± 2.0; -2.0 ± 2.0" and found["tokens a problem"][0] == "3,000"
  assert table.columns[1] == "after published, seed 71"
  assert table.notes[0].startswith("Agrees") and "after published, seed 71, +3.0 ± 2.0 points" in table.notes[0]


def test_balance_is_signal_where_files_have_no_more(elsewhere, scale):  # noqa: F811
  for arm, signal, share in (("random", 1.0, None), ("published", 0.75, 0.4)):
    run = made_up(arm, 2, 0.3, regime=SECOND)
    path = run.folder / "metrics.jsonl"
    lines = [json.loads(x) | {"signal": signal, "pos_ratio": share} for x in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
  found, table = rows(table4, scale)
  assert found["random"][1] == "not run" and found["ARRoL"][1] == "0.400"
  assert (found["random"][5], found["ARRoL"][5]) == ("1.00", "0.75") and found["no pruning"][0] == "0"
  assert table.notes[0] == "Signal a group, ARRoL beside random: -25% (one pair); accuracy +0.0 points."


def test_rewards_are_of_each_half_of_the_seconds(elsewhere, scale):  # noqa: F811
  """Ten steps of 12 s with rewards 0, 0.1, ... 0.9: 0.2 in the first 60 s, 0.7 in the second; of 24 s 0.05 and 0.3."""
  for seed in (2, 3):
    made_up("plain", seed, 0.3, 24.0, regime=SECOND)
    made_up("published", seed, 0.3, 12.0, regime=SECOND)
  found, table = rows(figure4, scale)
  assert found["GRPO"] == ["2", "10 ± 0", "0.050 ± 0.000", "0.300 ± 0.000", "", ""]
  assert found["the paper's rule"][4:] == ["+0.150 ± 0.000", "+0.400 ± 0.000"]
  assert table.notes[0].startswith("Agrees") and "(2 pairs)" in table.notes[0]


def test_figure2_takes_the_scores_of_the_trials_unpruned_runs(elsewhere, scale):  # noqa: F811
  run = made_up("plain", 71, 0.3, regime=TABLES)
  logged = [{"step": s, "tokens": t, "score": 0.0, "reward": r} for s, t, r in ((1, 900, 1.0), (2, 128, 1.0), (2, 384, 0.0))]
  (run.folder / "scores.jsonl").write_text("".join(json.dumps(x) + "\n" for x in logged))
  table, _ = tables.draw(figure2.build, scale)
  assert [row[-1] for row in table.rows if row[0] == "128"] == ["75%"] * 4  # 128 + 128 + 256 / 2 of 512
  assert "of the trial's runs without pruning" in table.heading()


def test_a_trial_without_pairs_says_nothing(elsewhere, scale):  # noqa: F811
  made_up("plain", 1, 0.3, regime=FIRST)
  made_up("plain", 1, 0.3, regime=SECOND)
  made_up("published", 1, 0.3, regime=SECOND, version=("def", "456"))  # the page refuses it
  for build in (table1, table2, table5, table6):
    found, table = rows(build, scale)
    assert not found and not any(word in note for note in table.notes for word in ("Agrees", "Contradicts", "ndecided"))


def test_run_does_the_tables_regime_and_needs_model_and_data(elsewhere, scale, monkeypatch):  # noqa: F811
  monkeypatch.setattr(trial_queue, "start", lambda given, call: begun.append((given, call)) or True)
  monkeypatch.setattr(trial_queue, "commit_of", lambda given: "abc")
  begun = []
  with pytest.raises(UserError, match="--model"):
    tables.start(runs.with_paths(scale, None, None), [], None)
  assert tables.start(runs.with_paths(scale, "m.gguf", "d"), [], 1.0)
  (given, call), = begun
  assert {run.regime.name for run in given} == {"gsm8k_tables"} and (call.model, call.data, call.votes) == ("m.gguf", "d", True)
