"""The trial: its commands, its queue with stand-ins for runs, and all of it at a tiny size."""

import dataclasses
import hashlib
import json
import math
from pathlib import Path
import sys
import time

import pytest

from arrol_jax import config, step
from arrol_jax.running import hosts
from arrol_jax.types import UserError
from experiments import trial, trial_arms, trial_devices, trial_files, trial_page, trial_pieces, trial_queue
from experiments.trial_arms import REGIMES, Run, runs_of
from experiments.trial_queue import Call

CPU = REGIMES["arithmetic"]
VERSION = {"commit": "abc", "code": "123"}


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
  for module in (trial, trial_arms, trial_devices, trial_page, trial_pieces, trial_queue):
    monkeypatch.setattr(module, "ROOT", tmp_path)
  return tmp_path


# ---- arms


@pytest.mark.parametrize("regime", REGIMES.values(), ids=lambda r: r.name)
def test_every_command_is_understood_and_arms_share_their_settings(regime):
  read = {}
  for run in runs_of(regime):
    c = config.parse(list(run.training("", "")))[0]
    config.check(c, files=False)
    assert (c.seed, c.stop_seconds, tuple(c.eval.at_seconds)) == (run.seed, regime.full, (regime.half,))
    shared = (c.loss.aggregate, c.loss.overlong, c.prune.draw, c.prune.cold_start, c.eval.sampled, c.rollout.max_new,
              c.optim.clip_norm)
    assert shared[:5] == ("token", 0.2, "systematic", 2, 4) and read.setdefault("shared", shared) == shared
    read[run.arm] = c
    config.check(config.parse(list(run.voting("")))[0], files=False)
  read.pop("shared")
  four = regime.name in ("math4", "math_fresh", "math_halved", "math_halved_again", "math_long")
  if four or regime.name in ("ahead", "math"):
    pruned = [arm for arm in read if "budget" in arm]
    if "chosen4_8_ahead4" in read:
      assert read["chosen4_8_ahead4"].rollout.group_size == 8 and read["budget_chosen4_ahead4"].rollout.group_size == 16
    if "resampled" in read:
      assert read.pop("resampled").rollout.resampling == 3
    if regime.name == "math_fresh":
      assert read.pop("plain8").rollout.group_size == 8 and read.pop("max_variance").prune.rule == "max_variance"
    assert {arm: (c.rollout.ahead, c.loss.correction) for arm, c in read.items()} == {
      arm: (4 if four else 2, "truncate") if "ahead" in arm else (0, "none") for arm in read}
    assert [arm for arm, c in read.items() if c.prune.enabled] == pruned and len(pruned) == 1 + (regime.name == "math4")
    assert all(c.rollout.candidates == (128 if "chosen4" in arm else None) for arm, c in read.items())
  elif "tuning" not in regime.name:
    plain, prompts = read["plain"], read["plain"].rollout.prompts
    assert not plain.prune.enabled and plain.rollout.group_size == 16
    means = {  # what of an arm's settings is not plain's
      "plain8": lambda c: (c.prune.enabled, c.rollout.group_size) == (False, 8),
      "budget": lambda c: (c.prune.rule, c.quality.fit) == ("budget", "ridge"),
      "budget_wide": lambda c: c.rollout.prompts == 1.5 * prompts,
      "budget_chosen": lambda c: c.rollout.candidates == 2 * prompts,
      "chosen": lambda c: (c.rollout.candidates, c.rollout.prompts, c.rollout.group_size) == (2 * prompts, prompts, 16),
      **{f"keep0{n}": lambda c, n=n: (c.prune.rule, c.prune.keep) == ("published", n / 100) for n in (25, 75)},
      "dapo": lambda c: (c.loss.name, c.rollout.resampling, c.prune.enabled) == ("dapo", 3, False),
      "dapo_published": lambda c: c.prune.enabled and (c.loss.name, c.rollout.resampling, c.prune.rule) == (
        "dapo", 3, "published"),
      "budget035": lambda c: c.prune.keep == 0.35, "budget_max_variance": lambda c: c.learn.keep == 0.5}
    assert [arm for arm, is_so in means.items() if arm in read and not is_so(read[arm])] == []
    assert [arm for arm in read if "chosen" in arm and read[arm].prune.enabled != ("budget" in arm)] == []
    assert [arm for arm in ("random", "published", "max_variance") if arm in read and read[arm].prune.rule != arm] == []


def test_the_queue_goes_round_by_seeds_and_the_main_arms_first():
  order = [(run.arm, run.seed) for run in runs_of(REGIMES["gsm8k"])]
  assert len(order) == len(set(order)) == 20 + 5 + 4
  arms = ["plain", "plain8", "budget", "chosen"]
  assert order[:8] == [*((arm, 1) for arm in arms), *((arm, 2) for arm in arms[1:] + arms[:1])]  # each seed begins with another
  assert [{order[4 * i + j] for j in range(4)} for i in range(5)] == [{(arm, seed) for arm in arms} for seed in range(1, 6)]
  assert order[20:25] == [("chosen4", seed) for seed in range(1, 6)]
  others = ("published", "max_variance", "random", "budget_chosen")
  assert sorted(order[25:]) == sorted((arm, 1) for arm in others)
  rest = [(run.arm, run.seed) for run in runs_of(REGIMES["gsm8k_rest"])]  # the same settings, on another host
  assert len(rest) == len(set(rest)) == 15 + 9 and {arm for arm, _ in order + rest} == trial_arms.ARMS.keys()
  assert Run(REGIMES["gsm8k"], "plain", 1).settings == Run(REGIMES["gsm8k_rest"], "plain", 1).settings
  both = ("gsm8k_tables", "gsm8k")
  few = lambda *argv: [(run.arm, run.seed) for name in both for run in filter(
    trial.selection(trial.parse(["trial", "--scale=gpu", *argv])), runs_of(REGIMES[name]))]
  assert few("--arms=plain,random", "--seeds=1") == [("plain", 71), ("random", 71), ("plain", 1), ("random", 1)]
  assert few("--arms=budget,plain8", "--seeds=3-71") == [("budget", 71), ("budget", 3), ("plain8", 3), ("plain8", 4),
                                                         ("budget", 4), ("plain8", 5), ("budget", 5)]
  tuned = {(run.arm, run.seed) for run in runs_of(REGIMES["gsm8k_tuned"])}
  assert {arm: sorted(seed for a, seed in tuned if a == arm) for arm in ("budget", "plain8", "max_variance")} == {
    "budget": list(range(81, 99)), "plain8": [82, 83, 84, 85, 86], "max_variance": [82, 83, 84]}  # 81's host is gone
  assert sorted(seed for a, seed in tuned if a == "published") == [81, 97, 98]  # the others' hosts are gone
  assert REGIMES["gsm8k_tuned"].primary == ((82, 86), (87, 98)) and REGIMES["gsm8k_tuned"].ours[0] == "budget"
  assert [(run.arm, run.seed) for run in runs_of(REGIMES["gsm8k_tuning"])][0] == ("plain@1.5e-6", trial_arms.SPARE_SEED)


@pytest.mark.parametrize("name, arm", [
  ("math_qwen05b_chosen", "chosen4_ahead4"), ("math_qwen05b_pruned", "budget_chosen4_ahead4")])
def test_the_shipped_configs_of_math_are_the_arms_that_their_results_are_of(name, arm):
  """But for seed, logs, evaluations halfway, and how pruning would go where there is none."""
  arm = config.parse(list(Run(REGIMES["math_fresh"], arm, 6).training("", "")))[0]
  shipped = config.parse(["train.py", f"--config={name}"])[0]
  for section in ("model", "rollout", "quality", "loss", "optim", "reward", "learn", "mesh", "steps", "stop_seconds"):
    assert shipped[section] == arm[section], section
  assert shipped.prune.enabled == arm.prune.enabled == (name == "math_qwen05b_pruned")
  assert not shipped.prune.enabled or shipped.prune == arm.prune
  assert shipped.data.template == arm.data.template and shipped.eval.sampled == arm.eval.sampled


def test_paths_are_given_and_not_kept():
  run = Run(REGIMES["math"], "budget_ahead", 1)
  argv = run.training("/here/model.gguf", "/here")
  assert {"--config.model.path=/here/model.gguf", "--config.data.train=/here/math_train.jsonl",
          "--config.data.eval=/here/math500.jsonl"} <= set(argv)
  assert "/here" not in json.dumps(run.settings)


@pytest.mark.parametrize("tuning, levels, best", [
  ("_ALONE_HEIGHTS", (0.30, 0.34, 0.35, 0.35), ("6e-6", "3e-6")),  # plain's, ours; the lower of two alike
  ("_MATH_RATES", (0.10, 0.12, 0.14, 0.15, 0.13, 0.11), ("1.2e-5", "3e-6"))])
def test_rates_are_the_best_of_the_tuning_runs_and_wait_for_all_of_them(elsewhere, tuning, levels, best):
  tuning = getattr(trial_arms, tuning)
  for arm, level in zip(REGIMES[tuning.name].seeds, levels, strict=True):
    assert tuning.chosen() == {"waits": tuning.name}
    folder = elsewhere / trial_arms.RESULTS / tuning.name / f"{arm}_seed{trial_arms.SPARE_SEED}"
    folder.mkdir(parents=True)
    last = VERSION | {"full": {"accuracy": level, "sampled": {"accuracy": level / 2}},
                      "settings": {"optim.lr": arm.partition("@")[2]}}
    (folder / "run.json").write_text(json.dumps(last))
  assert tuning.chosen() == {"rates": best, "tuned": tuning}
  nothing = last["full"] | {"accuracy": math.nan}
  for wrong in ('{"full": ', "[]", "{}", *map(json.dumps, (last | {"full": nothing}, last | {"code": "other"},
                                                           last | {"settings": {"optim.lr": "1e-3"}}))):
    (folder / "run.json").write_text(wrong)
    assert tuning.chosen() == {"waits": tuning.name}, wrong


def test_tuning_is_held_out_on_training_problems_that_it_does_not_train_on(elsewhere, tmp_path):
  run, lines = Run(REGIMES["gsm8k_tuning"], "plain@3e-6", 100), [f'{{"id": {i}}}\n' for i in range(2 * 1319 + 1)]
  (tmp_path / "gsm8k_train.jsonl").write_text("".join(lines))
  run.folder.mkdir(parents=True)
  (elsewhere / run.split[0]).parent.mkdir(parents=True)
  trial_queue.split(run, str(tmp_path))
  given = dict(a.removeprefix("--config.").partition("=")[::2] for a in run.training("m", str(tmp_path)))
  fit, spare = ((elsewhere / given[name]).read_text() for name in ("data.train", "data.eval"))
  assert spare == "".join(lines[::2][:run.regime.spare])  # evenly: a file may be sorted by subject
  assert sorted((fit + spare).splitlines()) == sorted("".join(lines).splitlines())
  trial_queue.split(Run(REGIMES["gsm8k_tuned"], "plain", 81), "nowhere")
  (tmp_path / "gsm8k_train.jsonl").write_text("".join(reversed(lines)))  # other data: not those of the first call
  trial_queue.split(run, str(tmp_path))
  assert (elsewhere / run.split[1]).read_text() == "".join(lines[::-1][::2][:1319])
  (tmp_path / "gsm8k_train.jsonl").write_text("".join(lines[:1319]))
  with pytest.raises(UserError, match="gsm8k_train.jsonl: 1319 problems, of which gsm8k_tuning holds 1319 out"):
    trial_queue.split(run, str(tmp_path))


def test_a_regime_may_ask_each_fourth_problem_of_a_test_file(elsewhere, tmp_path):
  run, lines = Run(REGIMES["math_alone"], "plain", 41), [f'{{"id": {i}}}\n' for i in range(8)]
  (tmp_path / "math_test.jsonl").write_text("".join(lines))
  (elsewhere / run.thinned).parent.mkdir(parents=True)
  trial_queue.split(run, str(tmp_path))
  for argv in (run.training("m", str(tmp_path)), run.voting(str(tmp_path))):
    given = dict(a.removeprefix("--config.").partition("=")[::2] for a in argv)
    assert given["data.train"] == f"{tmp_path}/math_train.jsonl"
    assert (elsewhere / given["data.eval"]).read_text() == "".join(lines[::4])


# ---- the queue


class Trained:
  """Stands for a command: leaves what a run leaves, or does what `how` says of its arm."""

  def __init__(self, **how):
    self.how, self.began = how, []

  def main(self):
    flags = dict(a.partition("=")[::2] for a in sys.argv)
    where = flags.get("--workdir", flags.get("--config.model.path"))
    self.began.append(sys.argv[0].rpartition(".")[2] + " " + where.split("/", 3)[3])
    if "evaluate" in sys.argv[0]:
      print('{"benchmark": "/secret/test.jsonl", "samples": 16, "accuracy": 0.5, "maj@16": 0.625}')
      return
    folder = Path(trial_queue.ROOT, flags["--workdir"])
    how = next((x for arm, x in self.how.items() if f"/{arm}_seed" in flags["--workdir"]), None)
    if isinstance(how, UserError):
      raise how
    (folder / "checkpoints" / "2").mkdir(parents=True, exist_ok=True)
    if int(flags.get("--config.log.rollouts", 0)):
      one = dict.fromkeys(trial_queue.SCORES, 1.23456789) | {"step": 1, "text": "long"}
      (folder / "rollouts.jsonl").write_text(json.dumps(one) + "\n")
    lines = [{"step": i, "sec_total": 6.0 * i, "reward_ipw": 0.123456789, "survivors_histogram": [1]} for i in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    if how:
      raise how
    if flags["--config.checkpoint.export"] == "True":
      (folder / "policy").mkdir(exist_ok=True)
    result = {"test": {"accuracy": 0.25, "truncated": 0.0, "problems": 4, "sampled": {"accuracy": 0.125}}}
    (folder / "eval_all_0001.json").write_text(json.dumps(result))
    (folder / "summary.json").write_text(json.dumps({"steps": 2, "device": "1 x cpu", "eval_after": result}))


@pytest.fixture
def queue(elsewhere, monkeypatch):
  def start(trained, runs, minutes=None, version=VERSION, **how):
    monkeypatch.setattr(trial_queue.importlib, "import_module", lambda name: trained)
    deadline = math.inf if minutes is None else time.monotonic() + 60 * minutes
    return trial_queue.start(runs, Call(version, deadline=deadline, **how))
  return start


def test_a_finished_run_leaves_two_small_files(queue, elsewhere):
  trained, run = Trained(), Run(CPU, "budget", 1)
  assert queue(trained, [run]) and trained.began == ["train budget_seed1"]
  assert sorted(p.name for p in run.folder.iterdir()) == ["metrics.jsonl", "run.json"] and not (elsewhere / run.workdir).exists()
  about = json.loads((run.folder / "run.json").read_text())
  assert (about["commit"], about["code"], about["device"], about["steps"]) == ("abc", "123", "1 x cpu", 2)
  assert about["host"] == trial_pieces.host() and len(about["host"]) == 8
  assert (about["half"]["seconds"], about["half"]["accuracy"], about["full"]["sampled"]["accuracy"]) == (6.0, 0.25, 0.125)
  assert about["settings"]["prune.rule"] == "budget"
  first = json.loads((run.folder / "metrics.jsonl").read_text().splitlines()[0])
  assert first == {"step": 1, "reward_ipw": 0.1234568, "sec_total": 6.0}
  assert queue(trained, [run]) and len(trained.began) == 1  # nothing is run twice


def test_what_a_run_logs_of_single_rollouts_is_kept_without_texts(queue):
  run = Run(REGIMES["gsm8k_tables"], "plain", 71)
  assert queue(Trained(), [run])
  (line,) = map(json.loads, (run.folder / "scores.jsonl").read_text().splitlines())
  assert line == dict.fromkeys(trial_queue.SCORES, 1.234568) | {"step": 1}


def test_votes_come_behind_all_runs_where_they_are_wanted_and_time_allows_them(queue, elsewhere):
  trained, runs = Trained(), [Run(CPU, "budget", 1), Run(CPU, "plain", 1)]
  assert not queue(trained, runs, 1.0, votes=True)  # a minute is too little for votes
  assert trained.began == ["train budget_seed1", "train plain_seed1"]
  assert [p.name for p in (elsewhere / runs[0].workdir).iterdir()] == ["policy"] and not (elsewhere / runs[1].workdir).exists()
  assert queue(trained, runs, votes=True) and trained.began[2:] == ["evaluate budget_seed1/policy"]
  assert json.loads((runs[0].folder / "votes.json").read_text()) == {"samples": 16, "accuracy": 0.5, "maj@16": 0.625, **VERSION}
  assert not (elsewhere / runs[0].workdir).exists() and queue(trained, runs, votes=True) and len(trained.began) == 3


def test_a_failed_run_is_noted_and_the_others_go_on(queue):
  trained, runs = Trained(plain8=RuntimeError("out of\nmemory")), list(runs_of(CPU))[:3]
  assert queue(trained, runs) and [(run.folder / "run.json").exists() for run in runs] == [True, False, True]
  failed = json.loads((runs[1].folder / "failed.json").read_text())
  assert (failed["problem"], failed["steps"], failed["commit"]) == ("RuntimeError: out of memory", 2, "abc")
  before = len(trained.began)
  assert queue(trained, runs) and len(trained.began) == before  # not tried again


def test_a_wrong_path_ends_the_queue(queue):
  with pytest.raises(UserError, match="model.path"):
    queue(Trained(plain=UserError("model.path: no such file")), [Run(CPU, "plain", 1), Run(CPU, "plain8", 1)])
  assert not Run(CPU, "plain", 1).folder.exists()


def test_a_run_that_time_cuts_off_goes_on_and_remembers_both_versions(queue):
  run = Run(CPU, "random", 1)
  assert not queue(Trained(random=hosts.Preempted("SIGTERM")), [run], 1.0) and not run.folder.exists()
  assert queue(Trained(), [run], 1.0, {"commit": "def", "code": "123"})
  about = json.loads((run.folder / "run.json").read_text())
  assert (about["commit"], about["code"], len(about["pieces"])) == ("abc+def", "123", 2)
  assert not queue(Trained(), [Run(CPU, "published", 1)], 1e-9)


def test_a_kill_at_any_moment_leaves_a_run_that_can_be_gone_on_with(queue, monkeypatch):
  run, finish = Run(CPU, "random", 1), trial_queue.end_piece
  other = {"commit": "def", "code": "456"}

  def killed(*_):
    raise KeyboardInterrupt

  for _ in range(2):  # in its training, after it saved step 2; in its next at once
    with pytest.raises(KeyboardInterrupt):
      queue(Trained(random=KeyboardInterrupt()), [run], 1.0)
    assert trial_queue.state(run) == "begun" and "step" not in trial_pieces.pieces(run)[-1]
  monkeypatch.setattr(trial_queue, "end_piece", killed)
  with pytest.raises(KeyboardInterrupt):  # between the run's summary and its piece's end
    queue(Trained(), [run], 1.0, other)
  monkeypatch.setattr(trial_queue, "end_piece", finish)
  assert queue(Trained(), [run]) and trial_queue.state(run) == "done"
  about = trial_files.told(run)
  assert (about["commit"], about["code"]) == ("abc+def", "123+456") and [x["from"] for x in about["pieces"]] == [0, 2]
  assert "step" not in about["pieces"][0]


def test_what_begins_from_nothing_has_no_piece_of_what_was_killed_before(queue, elsewhere):
  run = Run(CPU, "random", 1)
  trial_pieces.pieces_of(run).parent.mkdir(parents=True)
  trial_pieces.begin_piece(run, {"commit": "other", "code": "456", "from": 0})  # killed before it saved anything
  assert trial_queue.state(run) == "missing"
  with pytest.raises(UserError, match="model.path"):  # what the user mends leaves none
    queue(Trained(random=UserError("model.path: no such file")), [run])
  assert trial_queue.state(run) == "missing" and not trial_pieces.pieces(run)
  assert queue(Trained(), [run])
  assert (about := trial_files.told(run))["commit"] == "abc" and len(about["pieces"]) == 1 and about["pieces"][0]["step"] == 2
  (run.folder / "failed.json").write_text("{}")
  assert trial_queue.state(run) == "done"


def test_a_run_notes_what_files_it_read(queue, elsewhere, tmp_path):
  (tmp_path / "model.gguf").write_bytes(b"weights")
  (tmp_path / "gsm8k_train.jsonl").write_text('{"problem": 1}\n')
  run = Run(REGIMES["gsm8k"], "plain", 1)
  assert queue(Trained(), [run], model=str(tmp_path / "model.gguf"), data=str(tmp_path))
  assert json.loads((run.folder / "run.json").read_text())["inputs"] == {
    "model.path": hashlib.sha256(b"weights").hexdigest()[:12],
    "data.train": hashlib.sha256(b'{"problem": 1}\n').hexdigest()[:12]}  # the test file is not there: this run is a stand-in
  second = Run(REGIMES["gsm8k"], "plain", 2)
  assert not queue(Trained(plain=hosts.Preempted("SIGTERM")), [second], model=str(tmp_path / "model.gguf"))
  (tmp_path / "model.gguf").write_bytes(b"others")
  assert queue(Trained(), [second], model=str(tmp_path / "model.gguf"))
  both = "+".join(hashlib.sha256(x).hexdigest()[:12] for x in (b"weights", b"others"))
  assert json.loads((second.folder / "run.json").read_text())["inputs"] == {"model.path": both}


@pytest.mark.slow
def test_two_arms_run_and_make_a_page(tmp_path, monkeypatch):
  """Three steps, a second each, of a tiny size of everything: both of ours, through the commands themselves."""
  small = {"rollout.prompts": 4, "rollout.group_size": 4, "rollout.slots": 24, "rollout.row_buckets": 1,
           "optim.micro_tokens": 1024, "eval.problems": 4}
  monkeypatch.setattr(step.Clock, "total", lambda self: 1.0)
  monkeypatch.setattr(hosts.Compiling, "_note", lambda *a, **k: None)
  regime = dataclasses.replace(CPU, half=1.0, full=3.0, settings=small, queue=({"budget": 1, "chosen": 1},))
  monkeypatch.setattr(trial_arms, "RESULTS", str(tmp_path / "results"))
  monkeypatch.setattr(trial_page, "RESULTS", str(tmp_path / "results"))
  monkeypatch.setattr(Run, "workdir", property(lambda self: tmp_path / "runs" / self.name))
  runs = list(runs_of(regime))
  assert trial_queue.start(runs, Call(VERSION))
  for run in runs:
    about = json.loads((run.folder / "run.json").read_text())
    assert about["half"]["problems"] == 4 and about["full"]["sampled"]["samples"] == 4
    assert (about["half"]["seconds"], about["seconds"]) == (1.0, 3.0)
  chosen = [json.loads(line) for line in (runs[1].folder / "metrics.jsonl").read_text().splitlines()]
  # Nothing is known of prompts before the first step, and what it taught chooses without any pruning.
  assert chosen[0]["prompt_variance"] == 0 and all(x["prompt_variance"] > 0 for x in chosen[1:])
  assert [x["keep_ratio"] for x in chosen] == [1.0] * 3
  text = trial_page.page([regime])
  assert "| budget - chosen | 1 |" in text and (tmp_path / "results" / "arithmetic.png").exists()
