"""The trial's page: its statistics, tables and words, on made-up files."""

import dataclasses
import json

import numpy as np
import pytest
from scipy import stats

from experiments import report, trial_arms, trial_fading, trial_files, trial_page, trial_stats
from experiments.trial_arms import REGIMES, Run

CPU = REGIMES["arithmetic"]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
  for module in (trial_arms, trial_page):
    monkeypatch.setattr(module, "ROOT", tmp_path)
  return tmp_path


def made_up(arm, seed, accuracy, seconds=1.0, device="1 x H100", version=("abc", "123"), regime=CPU, **about):
  """A run of ten steps of `seconds` each (the first ones slower), half of whose gradients are above the limit of 10."""
  run = Run(regime, arm, seed)
  run.folder.mkdir(parents=True)
  steps = [{"step": i + 1, "sec_step": seconds * (9 if i < 4 else 1), "sec_generate": seconds / 4, "sec_total": seconds * (i + 1),
            "reward_ipw": 0.1 * i, "groups_mixed": 3 + i % 2, "tokens_generated": 2500 * seconds, "grad_norm": 9.0 + 2 * (i % 2),
            "signal": 1.5, "keep_ratio": 0.5, "head_auc_within": None}
           for i in range(10)]
  (run.folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in steps))
  result = lambda x: {"accuracy": x, "problems": 100, "truncated": 0.1, "sampled": {"accuracy": x / 2}}
  (run.folder / "run.json").write_text(json.dumps({
    "regime": regime.name, "arm": arm, "seed": seed, "settings": trial_arms.same(run.settings), "pieces": [{}], "steps": 10,
    "seconds": 10.0, "commit": version[0], "code": version[1], "device": device, "half": result(accuracy / 2),
    "full": result(accuracy)} | about))
  return run


def test_intervals_are_scipys():
  values = [0.3, 1.9, -0.4, 2.2, 0.8]
  mean, half = trial_stats.interval(values)
  low, high = stats.t.interval(0.95, 4, np.mean(values), stats.sem(values))
  assert (mean - half, mean + half) == (pytest.approx(low), pytest.approx(high))
  assert trial_stats.interval([2.0])[0] == 2.0 and np.isnan(trial_stats.interval([2.0])[1])
  assert np.isnan(trial_stats.interval([])).all()
  assert trial_stats.text([1.0, 3.0], "+.1f") == "+2.0 ± 12.7 (2)" and trial_stats.text([1.0]) == "1.0 (1)"


def test_pairs_are_by_seed(elsewhere):
  """Ours 30, 40; plain 28, 33 and a third seed that ours lacks: differences 2 and 7, as scipy's paired test has them."""
  regime = dataclasses.replace(CPU, queue=({"plain": 3, "budget": 2},))
  for seed, accuracy in ((1, 0.28), (2, 0.33), (3, 0.9)):
    made_up("plain", seed, accuracy, seconds=3.0)
  for seed, accuracy, seconds in ((1, 0.30, 1.5), (2, 0.40, 2.0)):
    made_up("budget", seed, accuracy, seconds)
  results = trial_files.load(regime)
  both = trial_stats.pairs(results, "budget", "plain")
  values = trial_stats.difference(both, lambda r: trial_stats.accuracy(r, "full"))
  assert values == pytest.approx([2.0, 7.0])
  expected = stats.ttest_rel([30, 40], [28, 33]).confidence_interval()
  mean, half = trial_stats.interval(values)
  assert (mean - half, mean + half) == (pytest.approx(expected.low), pytest.approx(expected.high))
  assert trial_stats.difference(both, lambda r: trial_stats.accuracy(r, "half", True)) == pytest.approx([0.5, 1.75])
  assert trial_stats.speedup(both) == pytest.approx([2.0, 1.5])
  assert trial_stats.clipped(both[0][0]) == 0.5
  assert trial_stats.signal_rate(both[0][0]) == pytest.approx(1.5 * 8 / 1.5)  # 8 groups a step of 1.5 s
  welch = stats.ttest_ind([30, 40], [28, 33], equal_var=False).confidence_interval()
  said = trial_page.verdict(results, "budget", "plain")
  assert f"+4.5 ± 31.8 (2) points, undecided (unpaired, by Welch, ± {(welch.high - welch.low) / 2:.1f}); the mean is 2.2" in said


def test_signal_a_second_is_of_all_groups_that_dynamic_sampling_starts(elsewhere):
  """8 prompts a step and twice as many more that replace groups: 24 in all, of 1.5 each, in 2 s."""
  regime = dataclasses.replace(CPU, queue=({"plain": 1, "resampled": 1},),
                               arms=CPU.arms | {"resampled": trial_arms.AHEAD4["resampled"]})
  for arm in regime.seeds:
    path = made_up(arm, 1, 0.3, seconds=2.0, regime=regime).folder / "metrics.jsonl"
    groups = 24 if arm == "resampled" else 8
    lines = [json.loads(x) | {"signal_per_1k_tokens": groups * 1.5 / 5} for x in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(x) + "\n" for x in lines))
  found = trial_files.load(regime)
  rates = {arm: trial_stats.signal_rate(found.there[arm][1]) for arm in regime.seeds}
  assert rates == {"plain": pytest.approx(8 * 1.5 / 2), "resampled": pytest.approx(24 * 1.5 / 2)}
  assert trial_stats.groups(found.there["resampled"][1]) == pytest.approx(24)


def test_either_change_is_averaged_over_both_levels_of_the_other(elsewhere):
  """Seed 6: 10, +4 by choosing, +1 by running ahead, +7 by both; seed 7: +2, +3, +3. Seed 8 lacks an arm, seed 9 has two devices,
  seed 10 two versions."""
  square = REGIMES["math_fresh"]
  neither, first, second, both = square.square
  for seed, levels in ((6, (0.10, 0.14, 0.11, 0.17)), (7, (0.10, 0.12, 0.13, 0.13)), (8, (0.10, 0.90, 0.90)), (9, (0.1,) * 4),
                       (10, (0.1,) * 4)):
    for arm, level in zip(square.square, levels, strict=False):
      made_up(arm, seed, level, regime=square, device="H200" if (seed, arm) == (9, first) else "H100",
              version=("abc", "999" if (seed, arm) == (10, both) else "123"))
  results = trial_files.load(square)
  found = trial_stats.effects(results, lambda r: trial_stats.accuracy(r, "full"))
  assert list(found) == ["chosen4 - plain and chosen4_ahead4 - plain_ahead4, their mean",
                         "plain_ahead4 - plain and chosen4_ahead4 - chosen4, their mean",
                         "chosen4_ahead4 - chosen4 less plain_ahead4 - plain"]
  assert [x for values, _ in found.values() for x in values] == pytest.approx([5, 1, 2, 2, 2, -2])
  # Unpaired, by scipy: two means of both levels each, whose four arms vary alike, have the pooled variance of these.
  levels = np.array([[10, 14, 11, 17], [10, 12, 13, 13]], float)
  half = stats.t.ppf(0.975, 4) * np.sqrt(levels.var(axis=0, ddof=1).mean() / 2)
  assert [alone for _, alone in found.values()] == pytest.approx([half, half, 2 * half])
  assert any(line.startswith("| plain_ahead4 - plain and") and line.endswith(f"| +2.0 ± 0.0 (2), unpaired ± {half:.1f} | "
             f"+1.0 ± 0.0 (2), unpaired ± {half / 2:.1f} |") for line in trial_page.effects_table(results))
  assert not trial_page.effects_table(trial_files.load(CPU))
  assert {square.arms[arm].settings.get("rollout.ahead", 0) for arm in (neither, first)} == {0}
  assert [square.arms[arm].looked_at for arm in square.square] == [None, 4.0, None, 4.0]
  assert {square.arms[arm].settings.get("rollout.ahead", 0) for arm in (second, both)} == {4}


def test_runs_of_two_commits_are_not_compared(elsewhere):
  regime = dataclasses.replace(CPU, queue=({"plain": 1, "plain8": 1, "budget": 1},))
  made_up("plain", 1, 0.3)
  made_up("plain8", 1, 0.3, version=("abc", "999"))
  made_up("budget", 1, 0.4, version=("def", "123"))
  results = trial_files.load(regime)
  for other in ("plain", "plain8"):
    with pytest.raises(trial_stats.Refused, match="several commits"):
      trial_stats.pairs(results, "budget", other)
  with pytest.raises(trial_stats.Refused):  # one name, two codes
    trial_stats.pairs(results, "plain8", "plain")
  text = trial_page.page([regime])
  assert "| budget - plain | refused: runs of several commits (abc (code 123), def (code 123)) |" in text


def test_what_a_step_takes_is_of_its_mean_step_and_says_what_files_lack(elsewhere):
  made_up("plain", 1, 0.3, seconds=1.0)
  made_up("plain", 2, 0.3, seconds=3.0)
  made_up("budget", 1, 0.4, seconds=2.0)
  rows = [x.strip("| ").split(" | ") for x in trial_page.steps_table(trial_files.load(CPU)) if x.startswith("| ")]
  plain, budget = (dict(zip(rows[0], row, strict=True)) for row in rows[1:])
  assert (plain["generating, s"], plain["all, s"], plain["thousand tokens generated"]) == ("0.50", "2.00", "5")
  assert plain["groups mixed, %"] == "44"  # 3.5 of 8
  assert plain["mixed groups a second"] == f"{(3.5 / 1 + 3.5 / 3) / 2:.1f}" and budget["mixed groups a second"] == "1.8"
  assert plain["updating, s"] == plain["rows trained"] == "nan"


def test_seconds_of_two_devices_are_not_compared(elsewhere):
  made_up("plain", 1, 0.3)
  made_up("plain", 2, 0.3)
  made_up("budget", 1, 0.4, device="1 x H200")
  made_up("budget", 2, 0.4)
  results = trial_files.load(CPU)
  assert [a.run.seed for a, _ in trial_stats.pairs(results, "budget", "plain")] == [2]
  assert any("different devices or hosts are left out" in note for note in trial_page.notes(results))


def test_seconds_of_two_hosts_are_not_compared_where_files_name_them(elsewhere):
  for seed, (mine, other) in enumerate(((None, None), ("a", None), ("a", "a"), ("a", "b"), ("a", "a+b")), 1):
    for arm, host in (("plain", mine), ("budget", other)):
      made_up(arm, seed, 0.3, **({"host": host} if host else {}))
  results = trial_files.load(dataclasses.replace(CPU, queue=({"plain": 5, "budget": 5},)))
  assert [a.run.seed for a, _ in trial_stats.pairs(results, "budget", "plain")] == [1, 2, 3]
  assert any("different devices or hosts are left out" in note for note in trial_page.notes(results))


@pytest.mark.parametrize(("levels", "words"), [
  ((0.31, 0.32), "+1.5 ± 6.4 (2) points, undecided (unpaired, by Welch, ± 6.4); the mean is 0.8 below the aim of +2.3, which the "
                 "interval holds."),
  ((0.30, 0.30), "+0.0 ± 0.0 (2) points, undecided (unpaired, by Welch, ± 0.0); the mean is 2.3 below the aim of +2.3, which the "
                 "interval excludes."),
  ((0.35, 0.35), "+5.0 ± 0.0 (2) points, above 0 by seeds that agree better than answers allow (± 9.2) (unpaired, by Welch, "
                 "± 0.0); the mean is 2.7 above the aim of +2.3, which the interval lies above."),
  ((0.35,), "+5.0 (1) points, undecided; the mean is 2.7 above the aim of +2.3, which one pair cannot tell.")])
def test_whether_the_aim_is_reached_is_said_of_the_interval(elsewhere, levels, words):
  for seed, level in enumerate(levels, 1):
    made_up("plain", seed, 0.3)
    made_up("budget", seed, level)
  assert trial_page.verdict(trial_files.load(CPU), "budget", "plain").endswith(words)


def test_samples_that_agree_better_than_their_draws_allow_are_told(elsewhere):
  """Two samples of 100 problems, right with 0.2 each and once in two with 0.32: a draw's variance is 0.12 / 2 / 100 a run."""
  sampled = {"accuracy": 0.2, "pass@2": 0.32, "samples": 2, "problems": 100}
  result = {"accuracy": 0.3, "problems": 100, "truncated": 0.0, "sampled": sampled}
  for arm in ("plain", "budget"):
    for seed in (1, 2):
      made_up(arm, seed, 0.3, full=result, half=result)
  results = trial_files.load(CPU)
  alone = trial_stats.sampling_noise(trial_stats.pairs(results, "budget", "plain"), "full")
  assert alone == pytest.approx(196 * np.sqrt(2 * 0.12 / 2 / 100 / 2))
  said = next(x for x in trial_page.narrow(results))
  assert f"at {CPU.full:g} s with 4 samples, +0.0 ± 0.0 by seeds, ± {alone:.1f} by draws" in said


def test_which_arms_a_rate_was_tuned_on(elsewhere):
  said = trial_page.rates(REGIMES["math_alone"])
  assert "for plain and for chosen4_ahead4 (regime `math_tuning`" in said and said.endswith("No other arm was tuned.")
  assert " None below 3e-6 was tried. No other" in said
  tuned = dataclasses.replace(REGIMES["math_alone"].tuned, rates=("1e-6", "3e-6", "6e-6"))
  assert "was tried" not in trial_page.rates(dataclasses.replace(REGIMES["math_alone"], tuned=tuned))


def test_the_page_says_what_failed_is_missing_or_was_made_otherwise(elsewhere):
  plain = made_up("plain", 1, 0.3)
  votes = {"samples": 16, "accuracy": 0.2, "maj@16": 0.3, "rank@16": 0.35, "rank@16_ci": [0.3, 0.4],
           "rank@16_gain_ci": [0.01, 0.09]}
  (plain.folder / "votes.json").write_text(json.dumps(votes))
  made_up("budget", 1, 0.4)
  made_up("plain8", 1, 0.35)
  made_up("max_variance", 1, 0.31)
  made_up("random", 1, 0.4, settings={"optim.lr": 1})
  failed = Run(CPU, "published", 1)
  failed.folder.mkdir(parents=True)
  about = {"arm": "published", "seed": 1, "steps": 3, "commit": "abc", "problem": "NaN"}
  (failed.folder / "failed.json").write_text(json.dumps(about))
  text = trial_page.page([CPU])
  assert "Failed: published_seed1 after 3 steps, commit abc: NaN" in text
  assert "made with other settings than the arm has now: random_seed1." in text
  assert "Not run (10): " in text and "plain_seed2" in text
  assert "budget - plain8, greedy at 10 s: +5.0 (1) points, undecided" in text  # the better of plain8 and max_variance
  assert "| plain | 16 | 20.0 (1) | 30.0 (1) | rank +5.0 (1.0 to 9.0) |" in text
  assert (elsewhere / trial_arms.RESULTS / "arithmetic.png").stat().st_size > 10_000


def test_a_regime_has_its_own_questions_and_says_where_it_has_one_null(elsewhere):
  regime = REGIMES["ahead"]
  for arm, values in {"plain": (0.3, 0.32), "plain_ahead": (0.33, 0.34), "budget_ahead": (0.31, 0.30)}.items():
    for seed, accuracy in enumerate(values, 1):
      made_up(arm, seed, accuracy, regime=regime)
  text = trial_page.page([regime])
  assert "Each arm minus plain_ahead (the regime's only null):" in text
  assert "- budget_ahead - plain, greedy at 120 s: -0.5 ± 19.1 (2) points, undecided" in text
  assert "- budget_ahead - plain_ahead, greedy at 120 s: -3.0 ± 12.7 (2) points, undecided" in text
  assert "chosen4_ahead -" not in text and "Learning rate 3e-6 in all arms" in text
  made_up("plain@3e-6", trial_arms.SPARE_SEED, 0.3, regime=REGIMES["math_tuning"])  # nothing to compare: no plot of it
  assert "(math_tuning.png)" in (text := trial_page.page([REGIMES["math_tuning"]])) and "_signal.png" not in text


def test_every_arm_is_compared_with_plain_and_with_the_better_null(elsewhere):
  """max_variance is better than plain8 on the seeds that both have, though not over all of plain8's."""
  levels = {"plain": (0.30, 0.32), "plain8": (0.28, 0.30, 0.90), "max_variance": (0.31, 0.33), "budget": (0.34, 0.37),
            "random": (0.29,)}
  regime = dataclasses.replace(REGIMES["gsm8k"], queue=({arm: len(x) for arm, x in levels.items()},))
  for arm, values in levels.items():
    for seed, accuracy in enumerate(values, 1):
      made_up(arm, seed, accuracy, seconds=2.0 if arm == "plain" else 1.0, regime=regime)
  lines = trial_page.page([regime]).splitlines()
  assert any(
    x.startswith("Each arm minus max_variance (the better of plain8 and max_variance at 120 s, chosen on these") for x in lines)
  row = lambda name: next(x.split(" | ")[1:] for x in lines if x.startswith(f"| {name} |"))
  t = stats.t.ppf(0.975, 1)
  pairs, half, _, full, _, faster, signal = row("budget - plain")  # differences 4 and 5 points; 2 seconds a step and 1
  assert (pairs, full) == ("2", f"+4.5 ± {t * 0.5:.1f} (2)") and half == f"+2.2 ± {t * 0.25:.1f} (2)"
  assert (faster, signal) == ("2.00 ± 0.00 (2)", "2.00 ± 0.00 (2) |")
  assert row("budget - max_variance")[3] == f"+3.5 ± {t * 0.5:.1f} (2)" and row("plain8 - plain")[0] == "2"
  assert row("random - plain")[3] == "-1.0 (1)"  # one pair has no interval
  assert row("budget - random")[0] == "1" and "- Learning rate 3e-6 in all arms, as in earlier runs: not tuned." in lines
  text = report.trial()
  assert text.startswith('<h2 id="trial">') and text.count("data:image/png;base64,") == 2 and "|" not in text
  assert f"<td>budget - plain</td><td>2</td><td>{half}</td>" in text and "<th>pairs</th>" in text


def test_how_differences_change_on_the_way(elsewhere):
  """Made-up runs have half of their accuracy halfway: budget - plain 2 and 3, and as much more at the end. Two pairs of one seed
  count once: on MATH, random falls from 1 to -3 beside the plain run that budget has +2 and +2 to."""
  levels = {("gsm8k", "plain"): (0.30, 0.30), ("gsm8k", "budget"): (0.34, 0.36), ("math_alone", "plain"): (0.30,),
            ("math_alone", "budget"): (0.34,)}
  for (name, arm), values in levels.items():
    for seed, accuracy in enumerate(values, REGIMES[name].first):
      made_up(arm, seed, accuracy, regime=REGIMES[name])
  halfway = {"accuracy": 0.16, "problems": 100, "truncated": 0.0, "sampled": {"accuracy": 0.1}}
  made_up("random", REGIMES["math_alone"].first, 0.27, regime=REGIMES["math_alone"], half=halfway)
  fading = lambda *regimes: trial_fading.fading([trial_files.load(regime) for regime in regimes])
  lines = fading(REGIMES["gsm8k"], REGIMES["math_alone"])
  row = lambda part: next(x.removesuffix(" |").split(" | ")[2:] for x in lines if f" | {part} |" in x)
  t = stats.t.ppf(0.975, 1)
  assert row("`gsm8k`: budget - plain") == [f"+2.5 ± {t * 0.5:.1f} (2)", f"+1.2 ± {t * 0.25:.1f} (2)"] * 2
  assert row("`math_alone`: random - plain") == ["+1.0 (1)", "+2.5 (1)", "-4.0 (1)", "-4.0 (1)"]
  assert row("math_train, one seed")[::2] == ["+1.5 (1)", "-1.0 (1)"]
  assert row("all, means of 3 seeds")[2] == trial_stats.text([2.0, 3.0, -1.0], "+.1f")
  assert not fading(CPU) and "math_train" not in "".join(fading(REGIMES["gsm8k"]))
  made_up("plain", 3, 0.30, regime=REGIMES["gsm8k"])
  made_up("budget", 3, 0.30, regime=REGIMES["gsm8k"], half=None)  # one step filled all of its time
  assert fading(REGIMES["gsm8k"], REGIMES["math_alone"]) == lines


def test_the_null_is_chosen_among_arms_with_two_runs(elsewhere):
  """max_variance is better with the one run that it has."""
  for arm, values in {"plain": (0.3, 0.3), "plain8": (0.2, 0.2), "max_variance": (0.4,)}.items():
    for seed, accuracy in enumerate(values, 1):
      made_up(arm, seed, accuracy)
  text = trial_page.page([CPU])
  assert "Each arm minus plain8 (of plain8 and max_variance the only one with two runs or more):" in text
  assert "One seed only, so without an interval and undecided whatever they show: max_variance." in text


# ---- what it would take


def with_lines(run, **columns):
  """The run's steps with other values; of sec_step also their sum."""
  path = run.folder / "metrics.jsonl"
  steps = [json.loads(x) | columns for x in path.read_text().splitlines()]
  if "sec_step" in columns:
    steps = [x | {"sec_total": columns["sec_step"] * (i + 1)} for i, x in enumerate(steps)]
  path.write_text("".join(json.dumps(x) + "\n" for x in steps))


def test_what_would_have_to_change(elsewhere):
  """Plain: 2 of signal a group in 4 s, 3 of them generating; ours 1 in 3 s: half of the signal in three quarters of the time."""
  for seed in (1, 2):
    with_lines(made_up("plain", seed, 0.40), signal=2.0, sec_step=4.0, sec_generate=3.0)
    with_lines(made_up("budget", seed, 0.35), signal=1.0, sec_step=3.0, sec_generate=2.5)
  results = trial_files.load(CPU)
  found = trial_stats.needs(trial_stats.pairs(results, "budget", "plain"))
  assert found.ratio == pytest.approx(2 / 3) and found.lossless == pytest.approx(4 / 3)
  assert found.signal_needed == pytest.approx(1.5 * 8) and found.seconds_needed == pytest.approx(2.0)  # 8 groups
  assert found.generating_needed(1.6) == pytest.approx(4 / 1.6 - 0.5)
  assert found.signal_needed / 3.0 == pytest.approx(2.0 * 8 / 4.0) and 8 / found.seconds_needed == pytest.approx(2.0 * 8 / 4.0)
  assert trial_stats.slope(results, "plain") == pytest.approx(15.0)  # -5 points for a third less
  text = trial_page.page([CPU])
  assert "| budget | 0.67 | 1.00 | 3.00 | 1.50 (1.50 times) | 2.00 (0.67 times) | 1.33 | 2.50 (0.83 times plain's) | 2.00" in text
  assert "Along it +2.3 points lie at 1.15 times plain's." in text


def test_the_half_that_varies_most_by_every_group():
  """Against groups written out, of which files have the sum alone: all alike, the upper bound is exact; mixed, both hold."""
  half = lambda right: max(np.var([1.0] * k + [0.0] * (8 - k)) * 8 for k in range(9) if k <= right and 8 - k <= 16 - right)
  whole = lambda right: 16 * np.var([1.0] * right + [0.0] * (16 - right))
  for groups in ([3, 3], [8, 8], [1, 15], [16, 2], [1, 8], [2, 5, 0, 12, 16, 9], [4, 4, 4, 13]):
    line = {"signal": np.mean([whole(g) for g in groups]), "groups_mixed": sum(0 < g < 16 for g in groups)}
    found = trial_files.Found(None, {"settings": {"rollout.prompts": len(groups)}}, [line])
    low, high = trial_stats.best_half(found)
    exact = np.mean([half(g) for g in groups])
    assert low - 1e-9 <= exact <= high + 1e-9 <= line["signal"]
    if len({min(g, 16 - g) for g in groups if 0 < g < 16}) == 1:
      assert high == pytest.approx(exact)


def test_an_arm_that_learns_from_half_of_what_finished_is_marked(elsewhere):
  for arm in ("plain", "max_variance"):
    with_lines(made_up(arm, 1, 0.3), groups_mixed=8, signal=3.0)
  text = trial_page.page([CPU])  # 4 of 16 right in each group: 3, of the best half 2
  assert "1.00 (1) of all that finished" in text and "keeps 1.63 to 2.00 (54% to 67%;" in text
  assert "max_variance learns from that half only: of what it learns from, signal a second is 0.54 to 0.67 times plain's" in text
  assert np.isnan(trial_stats.slope(trial_files.load(CPU), "plain"))


def test_pairs_that_agree_better_than_their_problems_allow_are_named(elsewhere):
  found = lambda p: trial_files.Found(None, {"full": {"accuracy": p, "problems": 100}}, [])
  noise = trial_stats.problem_noise([(found(0.3), found(0.4)), (found(0.5), found(0.4))], "full")
  assert noise == pytest.approx(196 * np.sqrt((0.21 + 0.24 + 0.25 + 0.24) / 100 / 2 / 2))
  assert np.isnan(trial_stats.problem_noise([], "full"))
  for seed, (a, b) in enumerate([(0.30, 0.40), (0.31, 0.41), (0.29, 0.391)], 1):
    made_up("plain", seed, a)
    made_up("budget", seed, b)
  results = trial_files.load(dataclasses.replace(CPU, queue=({"plain": 3, "budget": 3},)))
  (line,) = trial_page.narrow(results)  # 10, 10 and 10.1 points
  assert "budget - plain at 10 s, +10.0 ± 0.1 by seeds, ± " in line


def test_comparisons_are_counted(elsewhere):
  """Two arms at three seeds, so four differences with an interval, none of them twice."""
  for seed, (a, b) in enumerate([(0.30, 0.40), (0.31, 0.412), (0.29, 0.388)], 1):
    made_up("plain", seed, a)
    made_up("budget", seed, b)
  results = trial_files.load(dataclasses.replace(CPU, queue=({"plain": 3, "budget": 3},)))
  (line,) = trial_page.multiplicity(results)  # half of 10, 10.2 and 9.8 points has the same t as the whole
  assert "4 different differences of accuracy, 4 with an interval. At 95% each, 4 of these are apart from 0" in line
  assert line.endswith("(Bonferroni) 4.")


def test_a_page_of_nothing(elsewhere):
  (elsewhere / trial_arms.RESULTS).mkdir(parents=True)
  assert "Not run (16)" in trial_page.page([CPU])
