"""Held-out accuracy, votes and early stopping, by hand and through the engine."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rollout import KEY, SAMPLING, Words, engine, plain_hidden, prompts, rollout_of

from arrol_jax.engine.sampling import Sampling
from arrol_jax.learning import evaluation
from arrol_jax.learning.evaluation import measure, voted_right
from arrol_jax.learning.generation import Grading
from arrol_jax.prune import Calibration
from arrol_jax.pruning.decision import Voters
from arrol_jax.pruning.head import Features, quality_logit
from arrol_jax.rewards import Grader

NOTHING = types.SimpleNamespace(max_new=9)  # an engine that is not asked to generate


def test_measure_by_hand(monkeypatch):
  """3 problems, 2 samples: 2, 1 and 0 right. Means 1, 1/2, 0: accuracy 1/2, standard deviation 1/2."""
  plan = [(0, 1, 4, True), (0, 1, 6, True), (1, 0, 10, False), (1, 1, 4, True), (2, 0, 8, True), (2, 0, 10, False)]
  rollouts = [rollout_of(i, p, 2, n, reward=float(r), stopped=s) for i, (p, r, n, s) in enumerate(plan)]

  def given(engine, prompts, samples, key, sampling, grading, decide=None, progress=None):
    assert decide is None  # nothing is pruned in an evaluation
    return rollouts[:len(prompts) * samples], 0.0

  monkeypatch.setattr(evaluation, "generate", given)
  result, behind = measure(NOTHING, [None] * 3, 2, KEY, SAMPLING, Grading(None, None))
  assert behind == rollouts
  plain = {k: v for k, v in result.items() if "@" not in k}
  assert plain == {"accuracy": 0.5, "ci95": pytest.approx(1.96 * 0.5 / math.sqrt(3)), "problems": 3, "samples": 2,
                   "pass": pytest.approx(2 / 3), "response_len": pytest.approx(7.0), "truncated": pytest.approx(1 / 3),
                   "tokens": 14.0, "stopped": 0.0}
  assert (result["pass@1"], result["pass@2"]) == (0.5, pytest.approx(2 / 3))
  assert result["pass@2_ci"][0] <= 2 / 3 <= result["pass@2_ci"][1]
  alone, _ = measure(NOTHING, [None], 2, KEY, SAMPLING, Grading(None, None))
  assert alone["accuracy"] == 1.0 and math.isnan(alone["ci95"])


def test_votes_by_hand(monkeypatch, head):
  """Three say 7 (wrong), in two spellings; two say 5 (right) with the best scores. Weights by rank: 0, 1/4, 1/2; 3/4, 1."""
  said = [("7", -3.0), ("7.0", -2.0), ("7", -1.0), ("5", 1.0), ("5", 2.0)]
  rollouts = [rollout_of(i, 0, 2, 4, reward=float(a == "5"), text=f"so \\boxed{{{a}}}", final=s) for i, (a, s) in enumerate(said)]
  monkeypatch.setattr(evaluation, "generate", lambda *a, **k: (rollouts, 0.0))
  table = Calibration(jnp.array([0.0, 0.0, 0.0, 9.0]), jnp.array([9.0, 0.0, 0.0, 0.0]))
  result, _ = measure(NOTHING, [None], 5, KEY, SAMPLING, Grading(None, None), voters=Voters(head, table))
  assert [result[f"{rule}@5"] for rule in ("maj", "rank", "posterior", "logit", "best")] == [0.0, 1.0, 1.0, 1.0, 1.0]
  assert result["rank@5_gain_ci"] == [1.0, 1.0] and "maj@5_gain_ci" not in result
  no_head, _ = measure(NOTHING, [None], 5, KEY, SAMPLING, Grading(None, None))
  assert no_head["maj@5"] == 0.0 and "rank@5" not in no_head


def test_the_last_score_is_the_heads_at_the_last_token(mesh, head):
  with jax.set_mesh(mesh), Grader(1) as grader:
    _, out = measure(engine(mesh), prompts()[:2], 2, KEY, SAMPLING, Grading(Words(), grader), voters=Voters(head))
  for r in out:
    tokens = np.zeros((1, 28), np.int32)
    tokens[0, :len(r.prompt_tokens) + len(r.tokens)] = np.r_[r.prompt_tokens, r.tokens]
    hidden = plain_hidden(tokens)[0, len(r.prompt_tokens) + len(r.tokens) - 2]
    assert r.final == pytest.approx(float(quality_logit(head, Features(hidden[None]))[0]), abs=1e-4)


def test_measure_generates_and_grades(mesh):
  with jax.set_mesh(mesh), Grader(1) as grader:
    result, rollouts = measure(engine(mesh), prompts(), 2, KEY, SAMPLING, Grading(Words(), grader))
  right = np.array([int(np.sum(r.tokens)) % 3 == r.prompt % 3 for r in rollouts]).reshape(5, 2)
  assert result["accuracy"] == pytest.approx(right.mean()) and result["pass"] == pytest.approx(right.any(axis=1).mean())
  assert not any(r.pruned for r in rollouts)


def test_confident_traces_outvote_the_others(monkeypatch):
  """Two say 7 (wrong), confidence 1; one says 5 (right), 3 at its end: by tails 3 to 2, by means 2 to 2, a tie for the first."""
  rollouts = [rollout_of(i, 0, 2, 4, reward=float(a == "5"), text=f"\\boxed{{{a}}}") for i, a in enumerate("775")]
  for r, last in zip(rollouts, (1.0, 1.0, 3.0), strict=True):
    r.confidences = np.array([1.0, 1.0, last, last], np.float32)
  monkeypatch.setattr(evaluation, "generate", lambda *a, **k: (rollouts, 0.0))
  out, _ = measure(NOTHING, [None], 3, KEY, Sampling(confidence=2), Grading(None, None), voters=Voters(window=2))
  assert (out["deepconf_tail@3"], out["deepconf_mean@3"], out["deepconf_lowest@3"]) == (1.0, 0.0, 0.0)


def test_hopeless_traces_end_and_a_problems_best_goes_on(mesh, head):
  """With a posterior that no trace reaches, each problem's best trace alone goes past the detection length, and votes."""
  scores = Calibration(jnp.array([1.0, 2.0, 3.0, 4.0]), jnp.array([4.0, 3.0, 2.0, 1.0]))
  tables = jax.tree.map(lambda x: x[None], scores)
  with jax.set_mesh(mesh), Grader(1) as grader:
    ask = lambda voters: measure(engine(mesh, 24), prompts(), 4, KEY, SAMPLING, Grading(Words(), grader), voters)
    free, plain = ask(Voters(head, tables, (8,)))
    out, rollouts = ask(Voters(head, tables, (8,), stop=0.99))
  assert out["stopped"] > 0 and out["tokens"] < free["tokens"] and "pass@4" not in out and "pass@4" in free
  for p in range(5):
    group, before = rollouts[4 * p:4 * p + 4], plain[4 * p:4 * p + 4]
    late = [r for r in group if r.decided]
    assert sum(not r.pruned for r in late) == min(1, len(late)), "one of those that were asked goes on"
    for r, b in zip(group, before, strict=True):
      np.testing.assert_array_equal(r.tokens, b.tokens[:8] if r.pruned else b.tokens)
    if late:
      best = max(late, key=lambda r: r.posterior)
      assert best.posterior == pytest.approx(max(r.posterior for r in late if not r.pruned))
  assert out["pass"] <= free["pass"]


def test_best_of_n_takes_the_highest_score_among_answers():
  rewards, answers = np.array([0.0, 1.0, 0.0]), ["7", "5", None]
  assert voted_right(rewards, answers, np.array([0.1, 0.2, 0.9]), "best") == 1.0
  assert voted_right(rewards, [None] * 3, np.zeros(3), "best") == 0.0
