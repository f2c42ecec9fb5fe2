"""The trial's page of files that are damaged, of several models or hosts, or only some of all; on made-up files."""

import dataclasses

import pytest
from test_trial_page import CPU, elsewhere, made_up  # noqa: F401 (a fixture)

from arrol_jax.types import UserError
from experiments import trial_arms, trial_page


@pytest.mark.parametrize("name, text", [
  ("run.json", None), ("run.json", "{}"), ("run.json", "[]"), ("metrics.jsonl", None), ("metrics.jsonl", ""),
  ("metrics.jsonl", "1\n"), ("failed.json", "{}"), ("votes.json", "[1]")])
def test_a_damaged_result_is_named(elsewhere, name, text):  # noqa: F811
  path = made_up("plain", 1, 0.3).folder / name
  path.write_text(path.read_text()[:-9] if text is None else text)
  with pytest.raises(UserError, match=f"plain_seed1/{name}: not what a run leaves .*; remove the folder and run it again"):
    trial_page.page([CPU])


def test_runs_of_two_models_or_of_two_hosts_are_in_no_pair(elsewhere):  # noqa: F811
  for arm, host, model in (("plain", "aa", "m1"), ("budget", "aa+bb", "m1"), ("plain8", "aa", "m2"), ("random", "aa", "m1")):
    made_up(arm, 1, 0.3, host=host, inputs={"model.path": model})
  text = trial_page.page([CPU])
  assert "| plain8 - plain | refused: runs of several models or data files" in text and "| random - plain | 1 | +0.0 (1) |" in text
  assert "- Begun on one host and ended on another, so in no pair: budget_seed1." in text and "| budget - plain |" not in text
  made_up("budget", 2, 0.4, host="aa+bb")
  made_up("plain", 2, 0.3, host="aa+bb")  # each was on both
  assert "| budget - plain |" not in trial_page.page([CPU])


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
