"""The trial's page of files that are damaged, of several models or hosts, or only some of all; on made-up files."""

import dataclasses
import json

import pytest
from test_trial_page import CPU, elsewhere, made_up  # noqa: F401 (a fixture)

from arrol_jax.types import UserError
from experiments import trial_arms, trial_files, trial_page, trial_stats


@pytest.mark.parametrize("name, text", [
  ("run.json", None), ("run.json", "{}"), ("run.json", "[]"), ("metrics.jsonl", None), ("metrics.jsonl", ""),
  ("metrics.jsonl", "1\n"), ("metrics.jsonl", '{"step": 1}\n'), ("failed.json", "{}"), ("failed.json", '{"arm": "budget"}'),
  ("votes.json", "[1]"), ("votes.json", '{"samples": 16}'),
  *(("votes.json", json.dumps({"samples": 16, "accuracy": 0.3, "maj@16": 0.4, name: None}))
    for name in ("rank@16", "rank@16_gain_ci")),
  ("votes.json", '{"problem": 3}'),
  *(("metrics.jsonl", "".join(json.dumps({"step": i, "signal": 1.0, "sec_total": i} | ({"step": 5} | x if i == 5 else {})) + "\n"
                              for i in range(1, 11))) for x in ({"signal": "x"}, {"sec_total": None}, {"sec_total": 3},
                                                                {"sec_total": float("nan")}, {"sec_total": 4}, {"step": 6}))])
def test_a_damaged_result_is_named(elsewhere, name, text):  # noqa: F811
  path = made_up("plain", 1, 0.3).folder / name
  path.write_text(path.read_text()[:-9] if text is None else text)
  if name == "failed.json":
    (path.parent / "run.json").unlink()  # a run that is there has not failed
  with pytest.raises(UserError, match=f"plain_seed1/{name}: not what this run leaves .*; put it back .*, or remove the folder"):
    trial_page.page([CPU])


@pytest.mark.parametrize("changed, key", [
  ({"full": None}, "full"), ({"full": {}}, "full"), ({"half": {"accuracy": 37.0}}, "half"), ({"device": None}, "device"),
  ({"commit": 27}, "commit"), ({"pieces": 3}, "pieces"), ({"host": ["a"]}, "host"), ({"inputs": ["a"]}, "inputs"),
  ({"steps": "ten"}, "steps"), ({"steps": 11}, "11 steps"), ({"seconds": float("nan")}, "seconds"), ({"arm": "budget"}, "arm"),
  ({"seed": 2}, "seed"), ({"regime": "math"}, "regime"), ({"settings": None}, "settings"),
  *(({"full": {"accuracy": x, "problems": 9, "truncated": 0.0, "sampled": {"accuracy": 0.1}}}, "full")
    for x in (None, "0.3", float("nan"), 37.0, -0.1, True)),
  *(({"full": {"accuracy": 0.3, "problems": 9, "truncated": 0.0, "sampled": x}}, "full") for x in (None, {}, {"accuracy": 3}))])
def test_a_result_of_another_kind_or_run_is_named(elsewhere, changed, key):  # noqa: F811
  path = made_up("plain", 1, 0.3).folder / "run.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | changed))
  with pytest.raises(UserError, match=rf"plain_seed1/(run.json|metrics.jsonl): not what this run leaves \(.*({key})"):
    trial_page.page([CPU])


def test_runs_of_two_models_or_of_two_hosts_are_in_no_pair(elsewhere):  # noqa: F811
  for arm, host, model in (("plain", "aa", "m1"), ("budget", "aa+bb", "m1"), ("plain8", "aa", "m2"), ("random", "aa", "m1")):
    made_up(arm, 1, 0.3, host=host, inputs={"model.path": model})
  text = trial_page.page([CPU])
  assert "| plain8 - plain | refused: runs of several models or data files" in text
  assert "| random - plain | 1 | +0.0 (1) |" in text
  assert "- Begun on one host and ended on another, so in no pair: budget_seed1." in text and "| budget - plain |" not in text
  made_up("budget", 2, 0.4, host="aa+bb", inputs={"model.path": "m1"})
  made_up("plain", 2, 0.3, host="aa+bb", inputs={"model.path": "m1"})  # each was on both
  assert "| budget - plain |" not in trial_page.page([dataclasses.replace(CPU, queue=({"plain": 2, "budget": 2},))])


def test_a_page_of_some_runs_is_of_these_alone_and_draws_nothing(elsewhere):  # noqa: F811
  for seed, accuracy in ((1, 0.3), (2, 0.5)):
    made_up("plain", seed, 0.3)
    made_up("budget", seed, accuracy)
  text = trial_page.page([CPU], lambda run: run.seed == 2)
  assert "| budget - plain | 1 | +10.0 (1) | +5.0 (1) | +20.0 (1) |" in text and ".png" not in text
  assert not list((elsewhere / trial_arms.RESULTS).glob("*.png"))


def test_a_regime_that_waits_shows_nothing_of_its_own(elsewhere):  # noqa: F811
  waits = dataclasses.replace(CPU, waits="gsm8k_tuning")
  made_up("plain", 1, 0.3)
  text = trial_page.page([waits])
  assert "chosen by `gsm8k_tuning`, of whose runs not all are there and alike: nothing of it is shown before." in text
  assert "| plain |" not in text


def test_other_data_are_not_compared_and_runs_that_say_no_model_had_that_of_the_trial(elsewhere):  # noqa: F811
  made_up("plain", 1, 0.3)
  files = {"model.path": trial_arms.MODEL, "data.train": "a"}
  for arm, inputs in (("budget", files), ("random", files | {"model.path": "m2"}), ("plain8", {"data.train": "b"}),
                      ("chosen", files | {"data.train": "b"})):
    made_up(arm, 1, 0.3, inputs=inputs)
  results = trial_files.load(CPU)
  assert len(trial_stats.pairs(results, "budget", "plain")) == 1
  for arm, other in (("random", "plain"), ("plain8", "budget"), ("chosen", "budget")):
    with pytest.raises(trial_stats.Refused, match="several models or data files"):
      trial_stats.pairs(results, arm, other)


def test_a_run_that_is_there_has_not_failed_and_votes_of_other_numbers_have_a_row_each(elsewhere):  # noqa: F811
  for seed, n in ((1, 16), (2, 8)):
    folder = made_up("plain", seed, 0.3).folder
    (folder / "failed.json").write_text("{}")
    votes = {"samples": n, "accuracy": 0.3, f"maj@{n}": 0.4, f"rank@{n}": 0.5}
    (folder / "votes.json").write_text(json.dumps(votes))
  results = trial_files.load(CPU)
  assert len(results.of("plain")) == 2 and not results.failed
  rows = [line for line in trial_page.votes_table(results) if line.startswith("| plain |")]
  assert rows == [f"| plain | {n} | 30.0 (1) | 40.0 (1) | rank +10.0 |" for n in (8, 16)]


def test_a_late_run_of_other_code_hides_no_primary_that_is_there(elsewhere):  # noqa: F811
  for seed in (1, 2, 3):
    made_up("plain", seed, 0.3)
    made_up("budget", seed, 0.4, version=("abc" if seed < 3 else "def", "123"))
  regime = dataclasses.replace(CPU, queue=({"plain": 3, "budget": 3},), primary=((1, 2), (2, 3)))
  first, second = trial_stats.primaries(regime)
  assert "+10.0 ± 0.0 (2) points" in first and "alone: refused: runs of several commits" in second


def test_a_primary_is_of_its_seeds_alone_and_waits_for_all_of_them(elsewhere):  # noqa: F811
  regime = dataclasses.replace(CPU, queue=({"plain": 4, "budget": 4},), primary=((2, 3), (3, 5)))
  for seed, accuracy in ((1, 0.9), (2, 0.4), (3, 0.5), (4, 0.3)):
    made_up("plain", seed, 0.3)
    made_up("budget", seed, accuracy)
  lines = trial_stats.primaries(regime)
  assert [line.partition("alone: ")[2] for line in lines] == [
    "+15.0 ± 63.5 (2) points, with 4 samples +7.5 ± 31.8 (2), a step 1.00 ± 0.00 (2) times as fast; undecided.",
    "+10.0 ± 127.1 (2) points, with 4 samples +5.0 ± 63.5 (2), a step 1.00 ± 0.00 (2) times as fast; 2 of 3 pairs are there, so "
    "no verdict."]
  text = trial_page.page([regime], lambda run: run.seed == 1)
  assert "on seeds 2 to 3 alone" in lines[0] and lines[0] in text
  assert "- budget - plain, greedy at 10 s: +60.0 (1) points, an estimate over all pairs, of which some" in text
  for seed in (5, 6):
    made_up("plain", seed, 0.3)
    made_up("budget", seed, 0.35 + seed / 1000)
  regime = dataclasses.replace(regime, queue=({"plain": 6, "budget": 6},), primary=((5, 6), (4, 6)))
  decided, undecided = (line.rpartition("; ")[2] for line in trial_stats.primaries(regime))
  assert decided.startswith("above 0 by seeds that agree better than answers allow") and undecided == "undecided."


def test_a_verdict_of_few_pairs_that_agree_by_luck_is_marked(elsewhere):  # noqa: F811
  """100 problems at 30 and 36%: answers alone allow some 9 points over two pairs; seeds differ by a tenth."""
  for seed in (1, 2):
    made_up("plain", seed, 0.3)
    made_up("budget", seed, 0.36 + seed / 1000)
  results = trial_files.load(CPU)
  (alone,) = {trial_stats.problem_noise(trial_stats.pairs(results, "budget", "plain"), "full")}
  assert 6.15 + 0.6 < alone
  assert f"points, above 0 by seeds that agree better than answers allow (± {alone:.1f})" in trial_page.verdict(
    results, "budget", "plain")
