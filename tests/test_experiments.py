"""The paper's tables from results: figures derived by hand, what was not run, verdicts, the report."""

import dataclasses
import json
from pathlib import Path
import sys
from unittest import mock

import pytest

from arrol_jax import config
from arrol_jax.types import UserError
from experiments import (
  compare_runs,
  figure2,
  figure4,
  plot_run,
  report,
  runs,
  signal_table,
  sim_ahead,
  table1,
  table2,
  table3,
  table4,
  table5,
  table6,
  tables,
  trial_arms,
)

ROOT = Path(__file__).resolve().parents[1]
MODULES = (table1, table2, table3, table4, table5, table6, figure2, figure4)


@pytest.fixture
def scale(tmp_path):
  """The cpu scale with an empty folder of results, and the first step left out."""
  return dataclasses.replace(runs.CPU, results=str(tmp_path / "results"), skip=1)


def put(job, accuracy=0.5, ci=0.03, steps=(), device="1 x test", busy=None):
  """Results of one training; `steps`: what its lines of metrics.jsonl hold, the first step's all wrong."""
  folder = job.result.parent
  folder.mkdir(parents=True)
  held_out = lambda x: {"gsm8k_test": {"accuracy": x, "ci95": ci}}
  first = {k: 999.0 for k in (steps or ({},))[0]}
  (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": i} | x) + "\n" for i, x in enumerate((first, *steps), 1)))
  (folder / "summary.json").write_text(json.dumps({"steps": len(steps) + 1, "seconds": 9.0, "device": device,
                                                   "eval_before": held_out(0.25), "eval_after": held_out(accuracy)}))
  (folder / "config.json").write_text('{"a_setting": 17}')
  if busy is not None:
    (folder / "run.jsonl").write_text(json.dumps({"command": "x", "others_cores": busy}) + "\n")


def seconds(generate, logprob, update, **more):
  return {"sec_generate": generate, "sec_logprob": logprob, "sec_update": update, "sec_step": generate + logprob + update} | more


def build(module, scale):
  return tables.draw(module.build, scale)[0]


def row(table, label):
  return next(r for r in table.rows if r[0] == label)


# ---- figures by hand


def test_table1_accuracy_gain_and_speedup(scale):
  for seed, (a, b) in enumerate(((0.50, 0.60), (0.54, 0.62))):
    put(runs.training(scale, "none", seed), a, steps=[seconds(1, 1, 2)] * 3)
    put(runs.training(scale, "published", seed), b, steps=[seconds(1, 0.5, 0.5)] * 3)
  table = build(table1, scale)
  # Seeds 50 and 54: standard error 2, t with one degree of freedom 12.71; with 3 over problems sqrt(3^2 + 25.41^2) = 25.59.
  # Seeds 60 and 62: sqrt(3^2 + 12.71^2) = 13.06. By pairs +10 and +8: standard error 1. Steps 4 s against 2 s.
  assert table.rows == [[scale.model, "52.0 ± 25.6 (50.0, 54.0)", "34.79", "61.0 ± 13.1 (60.0, 62.0)", "37.09",
                         "+9.0 ± 12.7 (+10.0, +8.0)", "+2.30", "2.00x (2.00, 2.00)", "1.61x"]]
  assert table.notes[0].startswith("Undecided (the interval holds 0): accuracy") and "+9.0 ± 12.7 points" in table.notes[0]
  assert table.notes[1].startswith("Agrees with the paper in direction: speed-up") and not table.missing


def test_a_loss_beyond_the_interval_contradicts_and_one_within_is_undecided(scale):
  put(runs.training(scale, "none", 0), 0.40, steps=[seconds(1, 1, 1)] * 2)
  put(runs.training(scale, "published", 0), 0.30, steps=[seconds(2, 1, 1)] * 2)
  notes = build(table1, scale).notes
  assert notes[0].startswith("Contradicts the paper") and "-10.0 ± 4.2" in notes[0]  # 3 * sqrt(2)
  assert notes[1].startswith("Contradicts the paper") and "0.75x" in notes[1]
  assert tables.verdict("x", tables.Estimate(1.0, 2.0), "+3") == ["Undecided (the interval holds 0): x +1.0 ± 2.0; paper +3."]
  assert tables.all_above([0.9, 1.1], 1.0) == "Undecided (seeds differ)"


def test_table2_reads_dapo_runs_alone(scale):
  put(runs.training(scale, "none", 0), 0.9)
  put(runs.training(scale, "dapo_none", 1), 0.40, steps=[seconds(3, 1, 1)] * 2)
  put(runs.training(scale, "dapo", 1), 0.45, steps=[seconds(2, 1, 1)] * 2)
  assert build(table2, scale).rows[0][1:8] == ["40.0 ± 3.0", "36.43", "45.0 ± 3.0", "39.42", "+5.0 ± 4.2", "+2.99", "1.25x"]


def test_table3_shows_each_rule_and_compares_them(scale):
  line = {"accuracy": 0.3, "ci95": 0.02, "problems": 10, "samples": 16, "temperature": 1.0, "tokens": 4000.0, "stopped": 0.0}
  line |= {f"{k}@16": v for k, v in (("maj", 0.5), ("rank", 0.4), ("deepconf_mean", 0.3), ("best", 0.2))}
  line |= {f"{k}_ci": [v - 0.01, v + 0.03] for k, v in line.items() if "@" in k}
  job = runs.voting(scale, "published", 0)
  job.result.parent.mkdir(parents=True)
  job.result.write_text(json.dumps(line) + "\n")
  table = build(table3, scale)
  assert row(table, "majority")[1:4] == ["50.0 ± 2.0", "not run", "not run"]
  assert row(table, "posterior of the head")[1] == "not run"
  assert table.notes[0].startswith("Contradicts the paper: rank by the head against the majority -10.0 ± 2.8 points")
  assert table.notes[1].startswith("Agrees with the paper in direction: rank by the head against DeepConf +10.0 ± 2.8 points")
  early = runs.stopping(scale, "published", 0)
  less = {"rank@16": 0.45, "rank@16_ci": [0.44, 0.48], "tokens": 3000.0, "stopped": 0.31}
  early.result.write_text(json.dumps(line | less) + "\n")
  table = build(table3, scale)
  assert row(table, "tokens a problem")[1:7] == ["4,000", *["not run"] * 3, "3,000", "not run"]
  assert row(table, "rank by the head (ARRoL)")[5] == "45.0 ± 2.0" and row(table, "majority")[5] == "50.0 ± 2.0"
  assert "Early stopping, seed 0: 31% of the traces ended below a posterior of 0.2, 25% of the tokens saved." in table.notes
  assert "Rank by the head with early stopping against without: +5.0 ± 2.8 points." in table.notes


def test_table4_compares_balance_with_random_pruning(scale):
  balance = lambda ratios, variances: [{"pos_ratio": r, "pos_var": v, "keep_ratio": 0.5, "groups_mixed": 20,
                                        "head_auc_within": 2 * r} for r, v in zip(ratios, variances, strict=True)]
  put(runs.training(scale, "random", 0), steps=balance((0.29, 0.31), (0.10, 0.20)))
  put(runs.training(scale, "published", 0), steps=balance((0.20, 0.20), (0.11, 0.23)))
  put(runs.training(scale, "ours", 0), steps=balance((0.40, 0.42), (0.15, 0.25)))
  put(runs.training(scale, "none", 0), steps=balance((0.40, 0.42, 0.90), (None, 0.24, 0.90)))  # random has no third step
  table = build(table4, scale)
  # Two steps 0.02 apart: standard deviation 0.0141, standard error 0.01, 1.96 of it 0.0196.
  assert row(table, "random")[1] == "0.300 ± 0.020" and row(table, "ARRoL")[3] == "0.170 ± 0.118"
  assert row(table, "random")[7] == "0.600 ± 0.039" and row(table, "the same, balanced head")[7] == "not run"
  # Differences are taken step by step: 0.20 - 0.29 and 0.20 - 0.31; 0.11 - 0.10 and 0.23 - 0.20; 0.05 twice.
  assert table.notes[0].startswith("Contradicts the paper") and "-0.100 ± 0.020" in table.notes[0]
  assert table.notes[1].startswith("Agrees with the paper") and "+0.0200 ± 0.0196" in table.notes[1]
  assert any("buffer; E[rho_hat (1 - rho_hat)] against random +0.0500 ± 0.0000" in note for note in table.notes)
  assert not any("no pruning against random" in note for note in table.notes)  # one step that both have: no interval


def test_table5_takes_medians_after_the_first_step_and_marks_a_busy_cpu(scale):
  put(runs.training(scale, "none", 0), steps=[seconds(4, 2, 6), seconds(4, 2, 6), seconds(90, 2, 6)], device="1 x cpu", busy=0.0)
  put(runs.training(scale, "published", 0), steps=[seconds(2, 1, 4)] * 3, device="1 x cpu", busy=0.05)
  table = build(table5, scale)
  assert row(table, "generation") == ["generation", "4 (4)", "106.82", "2 (2)", "72.96", "2.00x", "1.46x"]
  assert row(table, "update")[5] == "1.50x" and row(table, "whole step")[5] == "1.71x"
  assert not any("busy" in note for note in table.notes)
  runs.training(scale, "published", 0).result.with_name("run.jsonl").write_text('{"others_cores": 1.25}\n')
  assert any("up to 1.2 cores busy" in note for note in build(table5, scale).notes)


def test_table6_speeds_are_shares_of_keeping_all(scale):
  for arm, step in (("none", 6), ("published", 4), ("keep025", 3)):
    put(runs.training(scale, arm, 1), steps=[{"sec_step": step, "keep_ratio": 0.5}] * 2)
  table = build(table6, scale)
  assert [r[5] for r in table.rows] == ["2.00x", "1.50x", "not run", "1.00x"]
  assert [r[0] for r in table.rows] == ["0.25", "0.5", "0.75", "1.0"] and len(table.missing) == 3  # a second seed of two, keep075


def test_seconds_are_compared_on_one_device_alone(scale):
  """Seed 0 is three times as fast on another device: nothing that compares seconds reads it."""
  for arm, seed, device, step in (("none", 0, "old", 6.0), ("published", 0, "new", 2.0), ("none", 1, "new", 6.0),
                                  ("published", 1, "new", 4.0)):
    steps = [seconds(step - 2, 1, 1, reward_ipw=0.1 * step + 0.5 * seed * (arm == "none"), keep_ratio=0.5)] * 30
    put(runs.training(scale, arm, seed), steps=steps, device=device)
  said = "Seed 0 ran on different devices (old, new): its seconds are not compared."
  for module in (table1, table5, table6, figure4):
    assert build(module, scale).notes.count(said) == 1
  assert build(table1, scale).rows[0][7] == "1.50x"
  assert row(build(table5, scale), "whole step")[1:6] == ["6 (6)", "", "4 (4)", "", "1.50x"]
  assert [row(build(table6, scale), keep)[4:6] for keep in ("0.5", "1.0")] == [["4", "1.50x"], ["6", "1.00x (1.00, 1.00)"]]
  # At the end of the shortest run: published 0.4 at seed 1, none 0.6 + 0.5 there; at seed 0 they would be 0.2 and 0.6.
  assert "-0.700 ± 0.000" in build(figure4, scale).notes[0]


def test_figure2_takes_the_heads_line_and_the_lengths_of_unpruned_rollouts(scale):
  scale = dataclasses.replace(scale, head=("--lengths=32,64", "--prompts=4"))
  same = {"part": "offline", "rollouts": 64, "reward": 0.5, "device": "test"}
  judged = lambda x: {"auc": x, "auc_sd": 0.01, "auc_within": x, "auc_within_sd": 0.01, "spearman": x - 0.4, "spearman_sd": 0.0}
  lines = [same | {"length": 32, "score": "head", "inputs": ["last"], "passes": 100, "balanced": True} | judged(0.2)]
  lines += [same | {"length": n, "score": "head", "inputs": ["last"], "passes": p} | judged(x) for n, p, x in
           ((32, 100, 0.6), (32, 400, 0.9), (64, 100, 0.7))]
  lines += [same | {"length": n, "score": "head", "inputs": [x, "logprobs"], "passes": 100} | judged(y)
            for n in (32, 64) for x, y in (("last", 0.8), ("mean", 0.9))]
  lines += [same | {"length": n, "score": "trace confidence"} | judged(x) for n, x in ((32, 0.5), (64, 0.75))]
  job = runs.ablation(scale)
  job.result.parent.mkdir(parents=True)
  job.result.write_text("".join(json.dumps(x) + "\n" for x in lines))
  trained = runs.training(scale, "none", 0)
  put(trained)
  logged = [{"step": s, "tokens": t, "score": 0.0, "reward": r} for s, t, r in ((1, 900, 1.0), (2, 32, 1.0), (2, 96, 0.0))]
  trained.result.with_name("scores.jsonl").write_text("".join(json.dumps(x) + "\n" for x in logged))
  table = build(figure2, scale)
  # At 32 of 32 and 96 tokens: 32 + (32 + 64 / 2) = 96 of 128, 75%; at 64: 32 + 64 + 16 = 112, 88%. Step 1 is in the first half.
  assert [r[-1] for r in table.rows] == ["75%"] * 4 + ["88%"] * 4
  assert table.rows[0][:3] == ["32", "head as published", "0.600 ± 0.020"]
  assert table.notes[0].startswith("Agrees") and table.notes[1].startswith("Contradicts")
  assert any("mean 0.500 of 1 right and 0.500 of 1 wrong" in note for note in table.notes)


def test_figure4_compares_at_equal_time_without_compilation(scale):
  slow = [{"sec_step": 1.5, "reward_ipw": 0.1 * i} for i in range(10)]
  put(runs.training(scale, "none", 0), steps=slow)
  put(runs.training(scale, "published", 0), steps=[{"sec_step": 1.0, "reward_ipw": 0.1 * i} for i in range(10)])
  table = build(figure4, scale)
  # The first step (999 s) counts as any other: 11 steps of 1.5 s and of 1 s. After 11 s the slow one has 7 steps behind it.
  assert [r[2] for r in table.rows] == ["16", "not run", "11", *["not run"] * 7]
  # Its steps 3 to 7 have 0.1 to 0.5, the fast one's 7 to 11 0.5 to 0.9: standard error 0.158 / sqrt(5), 1.96 of it 0.139.
  assert [table.rows[i][5] for i in (0, 2)] == ["0.300 ± 0.139", "0.700 ± 0.139"]
  assert table.notes[0].startswith("Agrees with the paper in direction") and "+0.400 ± 0.196" in table.notes[0]


def test_figure4s_clock_compares_a_step_with_those_pruned_alike(scale):
  """4 s without pruning and 1 s with it: the 4 s are no compilation; 9 s of either kind are, and count as their like."""
  steps = [{"sec_step": t, "pruning": p} for t, p in ((4.0, False), (9.0, False), (4.0, False), (9.0, True), *[(1.0, True)] * 8)]
  job = runs.training(scale, "none", 0)
  put(job, steps=steps)
  lines = runs.metrics(job)[1:]  # without the first, which holds 999 everywhere
  job.result.with_name("metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
  assert figure4.clock(job).tolist() == [4, 8, 12, *range(13, 22)]


def test_runs_are_compared_with_what_was_cut_off(scale):
  """Shares of the first run's seconds, steps after the skipped ones, held-out length and share cut off."""
  for arm, step, share in (("none", 4.0, 0.07), ("published", 3.0, 0.175)):
    job = runs.training(scale, arm, 0)
    keys = (*compare_runs.PHASES, *compare_runs.MEANS, "tokens_generated", "tokens_trained")
    put(job, 0.4, steps=[dict.fromkeys(keys, step)] * 2)
    summary = runs.summary(job)
    summary["eval_after"]["gsm8k_test"] |= {"response_len": 248.4, "truncated": share}
    job.result.write_text(json.dumps(summary))
  folders = [str(ROOT / runs.training(scale, arm, 0).result.parent) for arm in ("none", "published")]
  table = {row[0]: row[1:] for row in compare_runs.rows(folders, 1)}
  assert table["gsm8k_test after, greedy"] == ["40.0% ± 3.0"] * 2
  assert table["- tokens, cut off, after"] == ["248, 7.0%", "248, 17.5%"] and table["- tokens, cut off, before"] == ["-", "-"]
  assert table["sec_step, median"] == ["4.00", "3.00 (0.75)"] and table["reward_ipw, mean"] == ["4", "3"]


def test_mistakes_of_commands_about_runs_are_one_line(tmp_path, monkeypatch, capsys):
  run = tmp_path / "run"
  run.mkdir()
  (run / "metrics.jsonl").write_text('{"step": 1}\n')
  (tmp_path / "metrics.jsonl").write_text('{"step": 1, "rew')  # a run that has just begun
  for module, arguments, word in ((plot_run, ["nowhere"], "nowhere"), (plot_run, [], "workdir"),
                                  (plot_run, [tmp_path], "no step"), (compare_runs, [tmp_path], "two runs"),
                                  (compare_runs, [tmp_path, "nowhere"], "nowhere"),
                                  (compare_runs, [tmp_path, tmp_path, "--skip=x"], "--skip"),
                                  (compare_runs, [tmp_path, tmp_path], "no step"), (plot_run, [tmp_path, "--otu=x"], "--otu"),
                                  (compare_runs, [tmp_path, tmp_path, "--skpi=4"], "--skpi"), (sim_ahead, ["--otu=x"], "--otu"),
                                  (compare_runs, [run, run, "--skip=1"], "leaves nothing"),
                                  (signal_table, [run, run, "--skip=1"], "leaves nothing"), (signal_table, [run], "two runs"),
                                  (signal_table, [run, run, "--skpi=0"], "--skpi"), (signal_table, [run, tmp_path], "no step")):
    monkeypatch.setattr(sys, "argv", ["prog", *map(str, arguments)])
    with pytest.raises(SystemExit) as e:
      config.run(module.main)
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: ") and word in err and len(err.splitlines()) == 1


# ---- what was not run


@pytest.mark.parametrize("module", MODULES, ids=lambda m: m.__name__.rpartition(".")[2])
@pytest.mark.parametrize("name", [name for name, scale in runs.SCALES.items() if not scale.trial])
def test_nothing_run_shows_no_figure_of_ours_and_all_commands(module, name, tmp_path):
  empty = dataclasses.replace(runs.SCALES[name], results=str(tmp_path))
  table, figure = tables.draw(module.build, empty)
  assert not figure.axes and table.missing == table.jobs
  text = table.markdown()
  assert f"Scale: {name}." in text and "nothing run" in text and table.title in text
  assert all(job.command in text for job in table.jobs)
  assert not any(word in text for word in ("Agrees", "Contradicts", "Undecided"))
  ours = [i for i, c in enumerate(table.columns) if i and not c.startswith("paper") and c not in ("keep ratio asked", "score")]
  assert {r[i] for r in table.rows for i in ours} == {"not run"}


def test_results_that_cannot_be_read_are_told_in_one_line(scale):
  job = runs.training(scale, "none", 0)
  put(job, steps=[seconds(1, 1, 1)])
  job.result.write_text("{")
  with pytest.raises(UserError, match="summary.json: cannot be read"):
    build(table1, scale)


# ---- report


def test_the_report_holds_every_table_plot_and_setting(scale, tmp_path):
  for arm in ("none", "published"):
    put(runs.training(scale, arm, 0), steps=[seconds(1, 1, 1, reward_ipw=0.5, pos_ratio=0.5, pos_var=0.2, keep_ratio=0.5)] * 2)
  empty = dataclasses.replace(runs.CPU, results=str(tmp_path / "none"))
  with mock.patch.dict(runs.SCALES, {"cpu": empty, "gpu": scale}), mock.patch.object(trial_arms, "ROOT", tmp_path):
    text = report.page()
    titles = [build(m, s).title for m in MODULES for s in (empty, scale)]
  assert all(text.count(f"<h3>{title}</h3>") == 3 for title in titles)  # once a scale
  assert text.count("data:image/png;base64,") == 5  # tables 1, 4, 5, 6 and figure 4: nothing drawn of what was not run
  assert "&quot;a_setting&quot;: 17" in text and "http" not in text  # settings; nothing is fetched
  assert text.count("not run") > 50 and 'id="paper"' in text
  assert '<a href="#trial">' in text and '<h2 id="trial">The trial</h2><p>Not run: ' in text
