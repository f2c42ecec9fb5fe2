"""Rewards of any size and what counts as a success: advantages take the one, head, tables, AUC, votes and accuracy the other."""

import math
import textwrap

from helpers_rollouts import rollout_of
from helpers_train import arguments, assert_refused, command, in_process, read, run
import numpy as np
import pytest

from arrol_jax import evaluate
from arrol_jax.learning import evaluation
from arrol_jax.learning.batching import PackShape, head_examples, linear_examples, pack
from arrol_jax.learning.candidates import learn, nothing_known
from arrol_jax.learning.evaluation import measure
from arrol_jax.learning.generation import Grading
from arrol_jax.learning.head_training import update_calibration
from arrol_jax.learning.metrics import rollout_metrics
from arrol_jax.learning.resampling import mixed_groups
from arrol_jax.prune import Calibration
from arrol_jax.pruning.baselines import down_sample
from arrol_jax.pruning.head import Features

# A right answer in good form has 1.5, in bad form 1.0; a wrong one 0.5 or 0. The fifth was pruned, the sixth could not be graded.
REWARDS = (1.5, 1.0, 0.5, 0.0, math.nan, 0.0)
RIGHT = (1, 1, 0, 0)


def shaped(rewards=REWARDS, **fields):
  state = lambda i: Features(np.full(32, i, np.float32))
  return [rollout_of(i + 1, 0, 2, 4, reward=x, pruned=math.isnan(x), decided=True, score=float(i), features=(state(i),),
                     final_features=state(i), posteriors=(0.5,), reason="timeout" if i == 5 else "", **fields)
          for i, x in enumerate(rewards)]


def test_a_success_is_a_reward_of_at_least_the_threshold():
  assert [r.success for r in shaped()[:4]] == list(RIGHT) and math.isnan(shaped()[4].success)
  assert [r.success for r in shaped(success_at=0.5)[:4]] == [1, 1, 1, 0]
  assert [r.success for r in shaped((-1.0, 1.0, 0.3), success_at=-0.5)] == [0, 1, 1]
  assert shaped(success_at=-1.0)[5].success == 0.0  # whatever its reward of 0 is worth: nobody looked at the answer


def test_advantages_take_rewards_as_they_are(mesh):
  batches, _ = pack(shaped(REWARDS[:4]), PackShape(16, 64, 1), mesh)
  rewards = np.array(REWARDS[:4])
  want = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
  got = np.concatenate([np.asarray(b.advantages) for b in batches])
  np.testing.assert_allclose(np.sort(got[got != 0]), np.sort(want), rtol=1e-5)


def test_the_head_and_its_tables_learn_success(head):
  some = shaped()
  examples = head_examples(some, head, 32)
  np.testing.assert_array_equal(examples.reward[:5], [*RIGHT, 0])
  _, reward, _, _ = linear_examples(
    [rollout_of(i, 0, 2, 4, reward=x, features=(np.ones(3, np.float32),)) for i, x in enumerate(REWARDS[:4])], 1, 3)
  np.testing.assert_array_equal(reward[:4], RIGHT)
  table = update_calibration(Calibration.empty(8), some, None)
  assert (float(table.positive.sum()), float(table.negative.sum())) == (2.0, 3.0)


def test_the_choice_of_prompts_learns_the_share_of_successes():
  """Two of four are right, whatever their rewards add up to: the level that the model has seen is 1/2."""
  model = learn(nothing_known(3), shaped(REWARDS[:4]), np.ones((1, 3), np.float32), 0.5)
  assert float(model.sums.level) == pytest.approx(0.5)


def test_the_choice_of_prompts_forgets_with_the_heads_half_life():
  """Four rollouts a step and a half-life of four: a step weighs half of the next. Without one all weigh alike."""
  states = np.ones((1, 3), np.float32)
  for half_life, level in ((4.0, (0.5 * 1.0 + 1.0 * 0.0) / 1.5), (None, 0.5)):
    model = learn(nothing_known(3), shaped((1.5,) * 4), states, 0.5, half_life)
    model = learn(model, shaped((0.0,) * 4), states, 0.5, half_life)
    assert float(model.sums.level) == pytest.approx(level)
    assert float(model.sums.weight) == pytest.approx(6.0 if half_life else 8.0)


def test_metrics_of_right_ones_take_success_and_those_of_rewards_rewards():
  out = rollout_metrics(shaped(REWARDS[:4], holdout=True, rule_probability=0.25), None, (2,))
  assert out["reward"] == pytest.approx(0.75) and out["signal"] == pytest.approx(4 * np.var(REWARDS[:4]))
  assert out["pos_ratio"] == 0.5 and out["pos_var"] == 0.25 and out["head_auc"] == out["head_auc@2"] == 0.0
  assert out["head_ece"] == pytest.approx(0.0) and out["head_brier"] == pytest.approx(0.25) and out["false_prune"] == 0.75
  assert out["head_spearman"] == pytest.approx(-1.0)
  assert rollout_metrics(shaped((1.5, 1.0)))["groups_mixed"] == 1  # there is something to learn, though both are right


def test_what_is_about_variance_takes_rewards_as_they_are():
  assert mixed_groups(shaped((1.5, 1.0))) == [0] and mixed_groups(shaped((1.5, 1.5))) == []
  assert sorted(r.reward for r in down_sample(shaped(REWARDS[:4]), 0.5)) == [0.0, 1.5]


def test_held_out_accuracy_and_pass_count_successes(monkeypatch):
  monkeypatch.setattr(evaluation, "generate", lambda *a, **k: (shaped((1.5, 0.5, 0.0, 0.5)), 0.0))
  out, _ = measure(type("NoEngine", (), {"max_new": 8}), [None] * 2, 2, None, type("S", (), {"confidence": None}),
                   Grading(None, None))
  assert (out["accuracy"], out["pass"], out["pass@1"], out["pass@2"]) == (0.25, 0.5, 0.25, 0.5)
  assert out["reward"] == pytest.approx(2.5 / 4)


# ---- whole runs

FUNCTIONS = """
  import zlib
  from arrol_jax.rewards import grade

  def form(response, answer, weight=0.5):
    return grade(response, answer, PATTERN) + weight * (len(response) % 2)

  PATTERN = r"(?s)(.*)"

  def fails(response, answer):
    raise RuntimeError("no key\\nfor the judge")

  def nothing(response, answer):
    return None

  def mostly(response, answer):
    if zlib.crc32(response.encode()) % 3:
      raise ValueError("no such form")
    return float(len(response) % 2)

  def three(response, answer, more):
    return 1.0
"""
SHORT = {"steps": 2, "data__eval": "", "rollout__max_prompt": 16, "prune__cold_start": 1, "loss__kl_weight": 0.0}


@pytest.fixture
def functions(tmp_path, monkeypatch):
  (tmp_path / "shaped_rewards.py").write_text(textwrap.dedent(FUNCTIONS))
  monkeypatch.syspath_prepend(str(tmp_path))


def test_a_run_with_rewards_above_1_trains_on_them(tmp_path, functions):
  run(tmp_path / "run", **SHORT, reward__function="shaped_rewards.form")
  lines = read(tmp_path / "run" / "metrics.jsonl")
  seen = {x["reward"] for x in read(tmp_path / "run" / "rollouts.jsonl")}
  assert all(x["ungraded"] == 0 for x in lines) and seen <= {0.0, 0.5, 1.0, 1.5, None}
  assert any(x["reward"] > x["pos_ratio"] for x in lines) and any(x["grad_norm"] > 0 for x in lines)


def failed(result) -> str:
  """The line that a run ends with."""
  line, = [line for line in result.err.splitlines() if line.startswith("error: ")]
  assert result.status == 2 and "Traceback" not in result.err
  return line


@pytest.mark.parametrize("name, words", [("fails", ["128 error", "RuntimeError: no key for the judge"]),
                                         ("nothing", ["it returned None"])])
def test_a_function_that_fails_on_every_answer_ends_the_run_until_it_is_mended(tmp_path, functions, name, words):
  """After eight steps of 16 answers, of which the eighth is given up. What was evaluated by it is evaluated again."""
  long = SHORT | {"steps": 9, "prune__enabled": False, "checkpoint__every": 100, "eval__problems": 4,
                  "data__eval": "experiments/arithmetic/test.jsonl"}
  line = failed(command(*arguments(tmp_path / "run", **long, reward__function=f"shaped_rewards.{name}")))
  for word in ["after step 7, which is saved", f"shaped_rewards.{name}", "failed on all of the last 128 answers", *words]:
    assert word in line
  assert read(tmp_path / "run" / "eval_before.json")["test"]["ungraded"] == 1.0
  (tmp_path / "shaped_rewards.py").write_text(f"def {name}(response, answer): return 1.0")
  assert "going on after step 7" in run(tmp_path / "run", **long, reward__function=f"shaped_rewards.{name}").out
  assert [x["ungraded"] for x in read(tmp_path / "run" / "metrics.jsonl")] == [1.0] * 7 + [0.0] * 2
  assert read(tmp_path / "run" / "eval_before.json")["test"]["accuracy"] == 1.0


def test_a_short_run_of_which_no_answer_could_be_graded_is_no_success(tmp_path, functions):
  """Its results are there, and so is the policy; an evaluation says so too."""
  settings = SHORT | {"steps": 1, "reward__function": "shaped_rewards.fails", "checkpoint__export": True}
  line = failed(command(*arguments(tmp_path / "run", **settings)))
  assert "shaped_rewards.fails failed on all of the last" in line and "no key for the judge" in line
  assert read(tmp_path / "run" / "summary.json")["steps"] == 1 and (tmp_path / "run" / "policy" / "config.json").exists()
  said = in_process(evaluate, f"--workdir={tmp_path / 'run'}", "--config.data.eval=experiments/arithmetic/test.jsonl",
                    "--config.eval.problems=4")
  assert "reward.function=shaped_rewards.fails failed on all answers; first: " in failed(said)
  assert '"ungraded": 1.0' in said.out


def test_few_survivors_whose_answers_cannot_be_graded_end_nothing(tmp_path, functions):
  """Two answers in three raise; pruning leaves a handful: steps without a graded one come, 128 such answers in a row do not."""
  run(tmp_path / "run", **SHORT | {"steps": 12, "prune__keep": 0.15}, reward__function="shaped_rewards.mostly")
  lines = read(tmp_path / "run" / "metrics.jsonl")
  assert any(x["ungraded"] == 1 for x in lines) and any(x["ungraded"] < 1 for x in lines)


def test_an_evaluation_says_which_share_of_its_answers_was_not_graded(tmp_path, functions):
  """Each time the run goes on, until the function is mended."""
  (tmp_path / "shaped_rewards.py").write_text("def some(response, answer): return 1.0 if len(response) % 4 else None")
  settings = SHORT | {"data__eval": "experiments/arithmetic/test.jsonl", "eval__problems": 40}
  said = lambda steps: run(tmp_path / "run", **settings | {"steps": steps}, reward__function="shaped_rewards.some")
  first, before = said(1).err, tmp_path / "run" / "eval_before.json"
  share = read(before)["test"]["ungraded"]
  assert 0 < share <= 0.5 and f"eval before: {100 * share:.2g}% of the answers could not be graded" in first
  assert f"eval_before.json: {100 * share:.2g}% of its answers could not be graded" not in first
  assert f"eval_before.json: {100 * share:.2g}% of its answers could not be graded and count as wrong" in said(2).err
  assert read(before)["test"]["ungraded"] == share
  (tmp_path / "shaped_rewards.py").write_text("def some(response, answer): return 1.0")
  assert "could not be graded" not in said(3).err and "ungraded" not in read(before)["test"]


def test_a_failing_evaluation_keeps_what_a_finished_training_made(tmp_path, functions):
  """Enough held-out answers end the run after the policy is exported; it finishes once the function is mended. Few do not."""
  fails_after_step_2 = """
import pathlib
def not_held_out(response, answer):
  lines = [len(path.read_text().splitlines()) for path in pathlib.Path(__file__).parent.glob("FOLDER/metrics.jsonl")]
  return float(len(response) % 2) if lines < [2] else None
"""
  (tmp_path / "shaped_rewards.py").write_text(fails_after_step_2.replace("FOLDER", "few"))
  other = SHORT | {"data__eval": "experiments/arithmetic/test.jsonl", "eval__before": False,
                   "reward__function": "shaped_rewards.not_held_out"}
  run(tmp_path / "few", **other, eval__problems=4)
  assert read(tmp_path / "few" / "summary.json")["eval_after"]["test"]["ungraded"] == 1.0
  (tmp_path / "shaped_rewards.py").write_text(fails_after_step_2.replace("FOLDER", "run"))
  line = failed(command(*arguments(tmp_path / "run", **other, eval__problems=128)))
  assert "after step 2, which is saved" in line and "failed on all of the last 128 answers" in line
  assert (tmp_path / "run" / "policy" / "model.safetensors").exists() and not (tmp_path / "run" / "summary.json").exists()
  (tmp_path / "shaped_rewards.py").write_text("def not_held_out(response, answer): return 1.0")
  run(tmp_path / "run", **other, eval__problems=128)
  after = read(tmp_path / "run" / "summary.json")["eval_after"]["test"]
  assert after["accuracy"] == 1.0 and "ungraded" not in after


def test_a_signature_that_does_not_fit_is_refused_before_anything_is_loaded(tmp_path, functions, monkeypatch):
  from arrol_jax import assemble
  monkeypatch.setattr(assemble, "load", lambda *_: pytest.fail("the model was loaded"))
  assert_refused(command(*arguments(tmp_path / "run", **SHORT, reward__function="shaped_rewards.three")),
                 "shaped_rewards.three", "nothing to give more")
