"""The paper's tables at the gpu scale, which are the trial's runs, on made-up files."""

import dataclasses
import json

import pytest
from scipy import stats
from test_trial_page import elsewhere, made_up  # noqa: F401 (a fixture)

from arrol_jax.types import UserError
from experiments import figure2, figure4, runs, table1, table2, table3, table4, table5, table6, tables, trial_queue, trial_tables
from experiments.trial_arms import REGIMES, Run

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


def changed(run, skip=4, **keys):
  """Other values in a made-up run's lines after the first `skip`."""
  path = run.folder / "metrics.jsonl"
  lines = [json.loads(x) for x in path.read_text().splitlines()]
  path.write_text("".join(json.dumps(x | (keys if i >= skip else {})) + "\n" for i, x in enumerate(lines)))


def test_each_data_of_the_scale_has_its_rows(elsewhere, scale):  # noqa: F811
  for regime in (FIRST, REGIMES["math_alone"]):
    for arm, accuracy in (("plain", 0.3), ("budget", 0.4)):
      made_up(arm, regime.first, accuracy, regime=regime)
  found, table = rows(table1, scale)
  assert list(found) == ["GSM8K: our budget", "MATH: our budget"]
  assert "on MATH of 1,190" in table.heading()


def test_our_rule_is_not_held_against_the_paper(elsewhere, scale):  # noqa: F811
  for seed in (1, 2, 3):
    for arm, accuracy in (("plain", 0.3), ("budget", 0.2), ("published", 0.25)):
      regime = SECOND if arm == "published" and seed > 1 else FIRST
      made_up(arm, seed, accuracy + seed / 1000 * (arm == "plain"), regime=regime)
    made_up("plain", seed, 0.3 + seed / 1000, regime=SECOND)
  table, _ = tables.draw(table1.build, scale)
  said = {note.partition(":")[0] for note in table.notes if "accuracy with" in note}
  assert said == {"Contradicts the paper", "Below plain"}


def test_a_regimes_failures_and_missing_votes_are_told(elsewhere, scale):  # noqa: F811
  made_up("plain", 71, 0.3, regime=TABLES)
  made_up("published", 71, 0.3, regime=TABLES, settings={"optim.lr": 1})
  failed = Run(TABLES, "budget", 71)
  failed.folder.mkdir(parents=True)
  about = {"arm": "budget", "seed": 71, "steps": 3, "commit": "abc", "problem": "NaN"}
  (failed.folder / "failed.json").write_text(json.dumps(about))
  notes = tables.draw(table3.build, scale)[0].notes
  for said in ("Failed", "budget_seed71"), ("Without votes", "plain_seed71"), ("Made with other settings", "published_seed71"):
    assert f"{said[0]} of regime gsm8k_tables: {said[1]}." in notes
  assert notes[-1].startswith("Not run of regime gsm8k_tables: ") and "--votes" in notes[-1] and "dapo" not in notes[-1]


def test_a_step_counts_as_the_budget_counts_it(elsewhere, scale):  # noqa: F811
  """What is compiled within a step is in sec_step and not in sec_total."""
  changed(made_up("plain", 1, 0.3, 2.0, regime=FIRST), sec_step=50.0)
  made_up("published", 1, 0.3, 1.0, regime=FIRST)
  found, _ = rows(table5, scale)
  assert found["GSM8K: the paper's rule and head; whole step"][4] == "2.00x"


def test_phases_and_keep_ratios(elsewhere, scale):  # noqa: F811
  """A phase that files do not have is left out; each keep ratio stands beside plain of its own seeds."""
  for arm, seed, accuracy, seconds in (("plain", 1, 0.3, 4.0), ("published", 1, 0.2, 2.0), ("plain", 2, 0.5, 4.0),
                                       ("budget035", 2, 0.4, 1.0)):
    changed(made_up(arm, seed, accuracy, seconds, regime=SECOND), sec_generate=seconds / (4 if arm == "plain" else 3),
            keep_ratio=1.0 if arm == "plain" else 0.5)
  found, _ = rows(table5, scale)
  assert found == {"GSM8K: the paper's rule and head; generation": ["1", "106.82", "0.667", "72.96", "1.50x", "1.46x"],
                   "GSM8K: the paper's rule and head; whole step": ["4", "", "2", "", "2.00x", "1.61x"]}
  assert tables.draw(table5.build, scale)[0].notes[0].startswith("Log-probs have no row")
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
  assert table.notes[-1].startswith("Dynamic sampling")


def test_votes_gain_over_the_majority_of_the_same_samples(elsewhere, scale):  # noqa: F811
  run = made_up("published", 71, 0.3, regime=TABLES)
  votes = {"problems": 640, "samples": 16, "tokens": 3000.0, "accuracy": 0.3, "ci95": 0.025}
  votes |= {f"{k}@16": v for k, v in (("maj", 0.4), ("rank", 0.43), ("deepconf_mean", 0.41), ("deepconf_bottom10", 0.4),
                                      ("posterior", 0.38))}
  votes |= {f"{k}_ci": [v - 0.01, v + 0.03] for k, v in votes.items() if "@" in k}
  votes |= {"rank@16_gain_ci": [0.01, 0.04], "posterior@16_gain_ci": [-0.04, 0.005]}
  (run.folder / "votes.json").write_text(json.dumps(votes))
  found, table = rows(table3, scale)
  assert found["majority"][0] == "40.0 ± 2.0" and found["rank by the head (ARRoL)"][0] == "43.0 ± 2.0; +3.0 (1.0 to 4.0)"
  assert found["posterior of the head"][0] == "38.0 ± 2.0; -2.0 (-4.0 to 0.5)" and found["tokens a problem"][0] == "3,000"
  assert found["one sample"][0] == "30.0 ± 2.5" and found["highest score alone"][0] == "not run"
  assert table.columns[1] == "after published, seed 71"
  assert table.notes[0].startswith("Agrees") and "after published, seed 71, +3.0 points (1.0 to 4.0)" in table.notes[0]
  other = made_up("plain", 71, 0.3, regime=TABLES)  # whose interval holds 0, though half of its width is less than the gain
  (other.folder / "votes.json").write_text(json.dumps(votes | {"rank@16_gain_ci": [-0.002, 0.038]}))
  table, figure = tables.draw(table3.build, scale)
  assert table.notes[0].startswith("Undecided") and table.notes[1].startswith("Agrees")
  (axis,) = figure.axes  # by policy: rank, posterior
  bars = [bar.get_height() for policy in axis.containers if hasattr(policy, "patches") for bar in policy.patches]
  assert bars == pytest.approx([3, -2, 3, -2])


def test_balance_is_signal_where_files_have_no_more(elsewhere, scale):  # noqa: F811
  for arm, signal, share in (("random", 1.0, None), ("published", 0.75, 0.4)):
    changed(made_up(arm, 2, 0.3, regime=SECOND), 0, signal=signal, pos_ratio=share, pos_var=share and 0.1, keep_ratio=0.55,
            groups_mixed=7, head_auc_within=0.6)
  made_up("random", REGIMES["math_alone"].first, 0.9, regime=REGIMES["math_alone"])  # other data
  found, table = rows(table4, scale)
  assert found["random"][1] == "not run" and found["ARRoL"][1] == "0.400"
  assert found["ARRoL"][:1] + found["ARRoL"][3:4] + found["ARRoL"][5:] == ["1", "0.100", "0.75", "0.550", "7.0", "0.600", "30.0"]
  assert found["random"][5] == "1.00" and found["no pruning"][0] == "0"
  changed(made_up("published", 3, 0.3, regime=SECOND), 0, pos_ratio=None)
  assert rows(table4, scale)[0]["ARRoL"][1] == "0.400 (one run)"
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
  assert call.platform == "gpu"
  made_up("plain", 71, 0.3, regime=TABLES)
  with pytest.raises(UserError, match="--regime=gsm8k_tables: its runs are of commit abc"):
    tables.start(dataclasses.replace(scale, paths=("model.path=m.gguf", "data.folder=d")), [], None)


def test_what_was_set_before_it_ran_is_told_whatever_becomes_of_the_row(elsewhere, scale):  # noqa: F811
  tuned = REGIMES["gsm8k_tuned"]
  (first, last), _ = tuned.primary
  for seed in range(first, last + 1):
    made_up("plain", seed, 0.3, regime=tuned)
    made_up("budget", seed, 0.3 + seed / 1000, regime=tuned)
  label = "GSM8K at 1.5e-6: our budget"
  for late in (False, True):
    if late:
      made_up("plain", 87, 0.3, regime=tuned)
      made_up("budget", 87, 0.4, regime=tuned, version=("def", "456"))
    of, table = rows(table1, scale)
    notes = [note for note in table.notes if note.startswith("Set before it ran (GSM8K at 1.5e-6)")]
    assert len(notes) == 2 and "on seeds 82 to 86 alone: +8.4 ± 0.2 (5) points" in notes[0]
    assert (label in of) != late and not any("accuracy with pruning" in note and label in note for note in table.notes)
    assert ("no verdict" in notes[1]) != late and ("refused" in notes[1]) == late
