"""Training end to end on the shipped arithmetic model: what a run writes, how it goes on, and what leaves it alone."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

from helpers_train import METRICS, ROOT, STEPS, SUMMARY, arguments, assert_refused, command, read, run, timeless
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrol_jax import config, step
from arrol_jax.data import problems
from arrol_jax.engine import scheduler
from arrol_jax.prune import Calibration
from arrol_jax.running.checkpoint import Checkpoints
from arrol_jax.running.workdir import fingerprint, to_json
from arrol_jax.types import TrainState, UserError


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
  """A run from start to end; its folder."""
  folder = tmp_path_factory.mktemp("whole")
  result = run(folder)
  (folder / "out.txt").write_text(result.out)
  return folder


# ---- what a run writes


def test_metrics_hold_every_key_once_a_step(whole):
  lines = read(whole / "metrics.jsonl")
  assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
  for line in lines:
    assert set(METRICS) <= set(line)
    assert all(v is None or isinstance(v, (int, float)) for k, v in line.items() if k != "survivors_histogram")
    assert sum(line["survivors_histogram"]) == 4
    assert line["rollouts_started"] == 16 == line["rollouts_kept"] + line["rollouts_pruned"]
    assert line["keep_ratio"] == line["rollouts_kept"] / 16 and line["tokens_trained"] <= line["tokens_generated"]
    assert line["sec_step"] >= line["sec_generate"] + line["sec_logprob"] + line["sec_update"] - 1e-6
  assert any(0 < line["reward"] < 1 for line in lines) and any(line["groups_mixed"] for line in lines)


def test_numbers_of_a_run_make_sense(whole):
  lines = read(whole / "metrics.jsonl")
  assert lines[0]["head_loss"] == pytest.approx(np.log(2), rel=1e-5)  # an untrained head says 0 of everything
  assert lines[0]["kl"] == pytest.approx(0, abs=1e-8) and all(line["kl"] > 0 for line in lines[1:])
  assert all(line["logprob_gap"] < 1e-4 and line["clip_frac"] == 0 for line in lines)
  np.testing.assert_allclose([line["lr"] for line in lines], [5e-4] + [1e-3] * (STEPS - 1), rtol=1e-6)
  assert any(line["grad_norm"] > 0 for line in lines) and all(line["entropy"] > 0 for line in lines)


def test_no_step_compiles_anything(whole):
  """By jax's own count: what was compiled from shapes, before any weight was read, is what the first step runs; nothing else
  comes when pruning starts after the second, nor for a checkpoint."""
  assert [line["sec_compile"] for line in read(whole / "metrics.jsonl")] == [0.0] * STEPS


@pytest.mark.parametrize("rule", ["published", "budget"])
def test_on_a_mesh_no_step_compiles_anything_either(tmp_path, monkeypatch, caplog, rule):
  """But for the root key's own arithmetic and pieces of a checkpoint: slots lie on the devices as they did before, whichever
  program they come from, also where living rows are gathered."""
  plain, begun = step.TrainingStep.__call__, []
  monkeypatch.setattr(step.TrainingStep, "__call__", lambda *args: (begun.append(len(caplog.records)), plain(*args))[1])
  gathered, take = [], scheduler.Run.take
  monkeypatch.setattr(scheduler.Run, "take", lambda *args: (gathered.append(1), take(*args))[1])
  with jax.log_compiles():
    run(tmp_path, steps=3, mesh__fsdp=2, rollout__row_buckets=2, prune__cold_start=1, eval__before=False, data__eval="",
        prune__rule=rule, checkpoint__export=False)
    jax.jit(jnp.cbrt)(jnp.ones(len(rule)))  # that it is seen
  said = [record.getMessage() for record in caplog.records[begun[0]:]]
  compiled = {text.split()[1] for text in said if text.startswith("Compiling ")}
  small = {f"jit({name})" for name in ("_threefry_fold_in", "convert_element_type", "slice", "broadcast_in_dim")}
  assert gathered and compiled - small == {"jit(cbrt)"}


def test_head_and_table_learn_from_step_to_step(whole):
  """At first every score is 0 and every posterior 1/2; then the head has been trained and the table filled."""
  texts = [r for r in read(whole / "rollouts.jsonl") if r["score"] is not None]
  assert all((r["score"], r["posterior"]) == (0.0, 0.5) for r in texts if r["step"] == 1)
  assert all(r["score"] != 0.0 and r["posterior"] != 0.5 for r in texts if r["step"] > 1)
  assert any(r["step"] == 1 for r in texts) and any(r["step"] > 2 for r in texts)


def test_nothing_is_pruned_in_the_cold_start_and_some_is_after_it(whole):
  lines = read(whole / "metrics.jsonl")
  assert [line["rollouts_pruned"] for line in lines[:2]] == [0, 0] and not any(line["pruning"] for line in lines[:2])
  assert all(line["rollouts_pruned"] > 0 and line["pruning"] for line in lines[2:])
  assert all(line["reward"] == line["reward_ipw"] for line in lines[:2])  # everyone survived, each stands for one
  for r in read(whole / "rollouts.jsonl"):
    scored = r["score"] is not None
    assert r["survival"] == 1.0 if r["step"] <= 2 or not scored else 0.1 <= r["survival"] <= 0.9
    assert (r["reward"] is None) == r["pruned"] and (not r["pruned"] or r["tokens"] == 16)


def test_texts_are_logged_each_step(whole):
  texts = read(whole / "rollouts.jsonl")
  assert [r["step"] for r in texts] == [s for s in range(1, STEPS + 1) for _ in range(4)]
  assert all(r["text"] for r in texts)


def test_a_logged_rollout_tells_its_problem_decisions_and_group(whole):
  problems_of = {p.id: p for p in problems.load_problems(str(ROOT / "experiments/arithmetic/train.jsonl"))}
  for r in read(whole / "rollouts.jsonl"):
    problem = problems_of[r["problem_id"]]
    assert (r["problem"], r["answer"]) == (problem.problem, problem.answer)
    assert len(r["scores"]) == len(r["posteriors"]) == len(r["keep_probabilities"]) == (r["score"] is not None)
    assert r["scores"] == [] or (r["scores"][-1], r["posteriors"][-1]) == (r["score"], r["posterior"])
    assert np.prod(r["keep_probabilities"]) == pytest.approx(r["survival"])
    group = r["group"]
    assert {len(column) for column in group.values()} == {4} and r["right"] == r["reward"]
    assert (group["tokens"][r["member"]], group["pruned"][r["member"]]) == (r["tokens"], r["pruned"])
    assert [reward is None for reward in group["reward"]] == group["pruned"]


def test_summary(whole):
  lines, summary = read(whole / "metrics.jsonl"), read(whole / "summary.json")
  assert set(SUMMARY) <= set(summary)
  assert summary["steps"] == STEPS and summary["seconds"] > 0 and "cpu" in summary["device"].lower()
  for name in ("tokens_generated", "tokens_trained"):
    assert summary[name] == sum(line[name] for line in lines)
  assert summary["final_reward"] == lines[-1]["reward"]
  for name in ("eval_before", "eval_after"):
    assert summary[name] == read(whole / f"{name}.json") and list(summary[name]) == ["test"]
    result = summary[name]["test"]
    assert 0 <= result["accuracy"] <= result["pass"] <= 1 and (result["problems"], result["samples"]) == (4, 1)


def test_config_json_is_the_config(whole):
  stored = read(whole / "config.json")
  assert stored["prune"]["detect"] == [16] and stored["steps"] == STEPS and stored["loss"]["kl_weight"] == 0.05
  c, _ = config.parse(["train.py", *(a.replace("configs/", f"{ROOT}/configs/") for a in arguments(whole))])
  assert stored == json.loads(to_json(c))
  assert read(whole / "summary.json")["config_hash"] == fingerprint(c)


def test_the_end_is_announced(whole):
  last = (whole / "out.txt").read_text().splitlines()
  assert "; loading " in last[0] and "M parameters, 2,000 problems to train on and 4 held out" in last[1]
  assert last[2].startswith("compiled ") and last[3].startswith("held-out accuracy before: test ")
  assert last[-2].startswith("held-out accuracy after:  test ")
  assert last[-1] == f"{whole}: {STEPS} steps done; metrics.jsonl, rollouts.jsonl and summary.json are there"


def test_the_exported_policy_is_the_trained_one(tmp_path, whole):
  """A run that starts from it finds, before its first step, the accuracy that the other found after its last."""
  run(tmp_path, model__path=whole / "policy", steps=1)
  assert read(tmp_path / "eval_before.json") == read(whole / "eval_after.json")
  assert read(whole / "eval_after.json") != read(whole / "eval_before.json")


# ---- resume = uninterrupted


def test_a_finished_folder_says_so_and_is_left_alone(whole):
  before = {f: f.read_bytes() for f in whole.iterdir() if f.is_file()}
  for steps in (STEPS, STEPS - 2):
    result = command(*arguments(whole, steps=steps))
    assert (result.status, result.err) == (0, "")
    assert result.out == f"{whole}: finished ({STEPS} steps); its results are in summary.json\n"
  assert {f: f.read_bytes() for f in whole.iterdir() if f.is_file()} == before


def assert_same_course(folder, whole):
  assert timeless(read(folder / "metrics.jsonl")) == timeless(read(whole / "metrics.jsonl"))
  assert read(folder / "rollouts.jsonl") == read(whole / "rollouts.jsonl")
  for name in ("eval_before.json", "eval_after.json"):
    assert read(folder / name) == read(whole / name)
  summary, other = read(folder / "summary.json"), read(whole / "summary.json")
  assert {k: v for k, v in summary.items() if k != "seconds"} == {k: v for k, v in other.items() if k != "seconds"}


@pytest.mark.slow
def test_a_longer_run_takes_over_exactly(tmp_path, whole):
  """3 steps, to the end with its evaluation; then the same folder with 5."""
  run(tmp_path, steps=3)
  first = read(tmp_path / "summary.json")
  assert first["steps"] == 3
  assert timeless(read(tmp_path / "metrics.jsonl")) == timeless(read(whole / "metrics.jsonl"))[:3]
  with mock.patch.object(problems, "batch_at", wraps=problems.batch_at) as batches:
    assert f"{tmp_path}: going on after step 3" in run(tmp_path).out
  assert [call.args[1] for call in batches.call_args_list] == [3, 4]
  assert_same_course(tmp_path, whole)


@pytest.mark.slow
def test_killed_in_mid_run_and_resumed_is_exactly_the_same(tmp_path, whole):
  """SIGKILL after step 3, with checkpoints every 2 steps: step 3 is done again, and its lines are there once."""
  environment = os.environ | {"PYTHONPATH": str(ROOT)}
  with open(tmp_path / "log.txt", "w") as log:
    process = subprocess.Popen([sys.executable, "-m", "arrol_jax.train", *arguments(tmp_path, steps=10**6)], cwd=ROOT,
                               stdout=log, stderr=log, env=environment)
  deadline, lines = time.monotonic() + 240, tmp_path / "metrics.jsonl"
  try:
    while not (lines.exists() and lines.read_bytes().count(b"\n") >= 3 and (tmp_path / "checkpoints" / "2").exists()):
      assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log.txt").read_text()
      time.sleep(0.01)
  finally:
    process.send_signal(signal.SIGKILL)
    process.wait()
  with open(lines, "a") as f:
    f.write('{"step": 99, "rew')  # and the kill cut a line short
  assert re.search("going on after step [2468]", run(tmp_path).out)
  assert_same_course(tmp_path, whole)


def test_killed_before_the_first_checkpoint_starts_again(tmp_path, whole):
  """Nothing but config, evaluation and a line are there: the run begins at step 1, the evaluation is not repeated."""
  for name in ("config.json", "eval_before.json"):
    shutil.copy(whole / name, tmp_path)
  (tmp_path / "metrics.jsonl").write_text((whole / "metrics.jsonl").read_text().splitlines(True)[0])
  (tmp_path / "rollouts.jsonl").write_text((whole / "rollouts.jsonl").read_text().splitlines(True)[0])
  stamp = (tmp_path / "eval_before.json").stat().st_mtime_ns
  run(tmp_path)
  assert_same_course(tmp_path, whole)
  assert (tmp_path / "eval_before.json").stat().st_mtime_ns == stamp


@pytest.mark.slow
def test_evaluated_in_another_way_both_evaluations_are_made_again(tmp_path, whole):
  """Before and after must compare; "before" is the policy that training started from, also in a resumed run."""
  shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
  run(tmp_path, steps=STEPS + 1, eval__problems=6)
  summary = read(tmp_path / "summary.json")
  assert summary["eval_before"]["test"]["problems"] == summary["eval_after"]["test"]["problems"] == 6
  fresh = tmp_path / "fresh"
  run(fresh, steps=1, eval__problems=6)
  assert read(fresh / "eval_before.json") == summary["eval_before"]
  assert timeless(read(tmp_path / "metrics.jsonl"))[:STEPS] == timeless(read(whole / "metrics.jsonl"))


def test_a_checkpoint_is_the_state_at_its_step(tmp_path):
  """Saving goes on in the background while the next step takes over the buffers: what is on disk must not change."""
  @jax.jit
  def make():
    policy = jnp.arange(1 << 20, dtype=jnp.float32)
    return TrainState({"policy": policy}, (jnp.ones(3),), Calibration.empty(4), jnp.int32(7))

  later = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
  checkpoints, state, saved = Checkpoints(str(tmp_path), 2), make(), jax.device_get(make())
  assert checkpoints.latest() is None
  checkpoints.save(4, state)
  for _ in range(5):
    state = later(state)
  checkpoints.save(5, state)
  checkpoints.save(6, state)
  checkpoints.manager.wait_until_finished()
  assert checkpoints.latest() == 6 and sorted(checkpoints.manager.all_steps()) == [5, 6]  # the newest 2
  checkpoints.close()
  again = Checkpoints(str(tmp_path), 2)
  for got, want in zip(jax.tree.leaves(again.restore(make(), 5)[1]), jax.tree.leaves(saved), strict=True):
    np.testing.assert_array_equal(got, np.asarray(want) + 5)
  again.close()


# ---- other arms


@pytest.fixture(scope="module")
def unpruned(tmp_path_factory):
  folder = tmp_path_factory.mktemp("unpruned")
  run(folder, prune__enabled=False, prune__cold_start=0, steps=3, loss__name="dapo", loss__kl_weight=0.0,
      log__backends="tensorboard", data__eval="")
  return folder


def test_pruning_off_prunes_nothing(unpruned):
  for line in read(unpruned / "metrics.jsonl"):
    assert line["rollouts_pruned"] == 0 and line["keep_ratio"] == 1.0 and line["kl"] == 0
    assert line["rows_trained"] <= line["rollouts_started"] and line["tokens_trained"] <= line["tokens_generated"]
    assert (line["rows_trained"] > 0) == (line["tokens_trained"] > 0) == (line["grad_norm"] > 0)
    assert line["rollouts_decided"] > 0 and not line["pruning"]  # scored all the same: the head's figures compare


def test_without_evaluation_and_with_tensorboard(unpruned):
  summary = read(unpruned / "summary.json")
  assert summary["eval_before"] == summary["eval_after"] == {}
  assert any(f.stat().st_size > 1000 for f in (unpruned / "tensorboard").iterdir())


def test_prompts_too_long_are_skipped_with_a_count(tmp_path):
  """Prompts of 10 characters, the last two of more than 16."""
  problems = [f"{i}+1+2+3+4>" for i in range(5)] + ["1+2+3+4+5+6+7+8+9>", "1+2+3+4+5+6+7+8+9+1>"]
  path = tmp_path / "some.jsonl"
  path.write_text("".join(json.dumps({"id": str(i), "problem": p, "answer": "1", "source": "t"}) + "\n"
                          for i, p in enumerate(problems)))
  result = run(tmp_path / "run", data__train=path, steps=1)
  assert f"{path}: skipped 2 of 7 prompts longer than 16 tokens (rollout.max_prompt)\n" in result.out
  assert len(read(tmp_path / "run" / "metrics.jsonl")) == 1


# ---- mistakes that need a run


def test_the_workdir_of_another_run_is_refused_and_left_alone(whole):
  before = {f: f.read_bytes() for f in whole.iterdir() if f.is_file()}
  result = command(*arguments(whole, optim__lr=2e-3, prune__keep=0.4, steps=9))
  assert_refused(result, "other settings (optim.lr, prune.keep);", "--workdir")
  assert {f: f.read_bytes() for f in whole.iterdir() if f.is_file()} == before


def test_a_mistake_in_a_longer_run_leaves_the_finished_one_alone(tmp_path, whole):
  """The data file is gone when the run is to be extended: its results stay."""
  shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
  with mock.patch("arrol_jax.data.sources.load_problems", side_effect=UserError("gone")):
    assert_refused(command(*arguments(tmp_path, steps=9)), "gone")
  assert (tmp_path / "summary.json").read_bytes() == (whole / "summary.json").read_bytes()
  assert read(tmp_path / "config.json")["steps"] == STEPS


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
  """The first step throws the weights out of range: the second stops, unsaved, and says which checkpoint is good."""
  result = command(*arguments(tmp_path, optim__lr=1e30, optim__warmup=0, checkpoint__every=1))
  assert result.status == 2 and "Traceback" not in result.err
  assert result.err.splitlines()[-1].startswith("error: step 2: the loss or gradient is not finite")
  assert "last checkpoint: step 1" in result.err
  assert os.listdir(tmp_path / "checkpoints") == ["1"] and not (tmp_path / "summary.json").exists()


def test_steps_that_pruning_leaves_nothing_are_told(tmp_path):
  result = run(tmp_path, steps=3, data__eval="", checkpoint__export=False, prune__keep=1e-4, prune__p_min=1e-4,
               prune__cold_start=0, rollout__prompts=1)
  empty = [x for x in read(tmp_path / "metrics.jsonl") if not x["rollouts_kept"]]
  assert empty and all(x["tokens_saved"] is None for x in empty)
  told = [line for line in result.err.replace("\r", "\n").splitlines() if line.startswith("warning: ")]
  assert told[0].startswith(f"warning: step {empty[0]['step']}: pruning left none of its 4 rollouts")
  assert told[1:] == ([f"warning: {len(empty)} steps had no survivors (rollouts_kept in metrics.jsonl), steps "
                       f"{empty[0]['step']} to {empty[-1]['step']}"] if len(empty) > 1 else [])
