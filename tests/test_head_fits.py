"""The ablation's fits on made-up rollouts: columns, fits that do not see what they score."""

import types

from helpers_rollouts import rollout_of
import numpy as np
import optax
import pytest

from arrol_jax.learning import ridge
from arrol_jax.pruning import linear_head
from experiments import head_ablation, head_fits
from experiments.head_fits import FOLDS, Adam, Place

INPUTS, WIDTH = ("last", "logprobs", "siblings"), 4  # 7 columns
STEPS, PROMPTS, GROUP = 6, 5, 4


def made(signal: float, seed: int = 0) -> list[list]:
  """Rollouts whose first feature tells right from wrong by `signal` deviations, and whose fifth column knows the prompt's level;
  every seventh ended early."""
  rng, steps = np.random.default_rng(seed), []
  for n in range(STEPS):
    steps.append([])
    for i in range(PROMPTS * GROUP):
      prompt = n * PROMPTS + i // GROUP
      r = rollout_of(i, prompt, 3, 6, reward=float(rng.random() < 0.5))
      x = rng.normal(size=7).astype(np.float32)
      x[0] += signal * r.reward
      r.features = () if i % 7 == 6 else (x,)
      r.final_features, r.confidences = x, rng.random(6)
      r.text = f"\\boxed{{{int(r.reward)}}}"
      steps[-1].append(r)
  return steps


def place(steps, end=False):
  read = (lambda r: r.final_features) if end else (lambda r: r.features[0] if r.features else None)
  return Place(steps, read, lambda r: r.confidences.mean(), INPUTS, WIDTH)


def test_columns_go_by_input():
  steps = made(1.0)
  here = place(steps)
  assert here.there.shape == (STEPS, PROMPTS * GROUP) and not here.there[0, 6] and here.there[0, 5]
  x = steps[1][2].features[0]
  np.testing.assert_array_equal(here.of(("siblings", "last"))[1, 2], [x[6], *x[:4]])
  np.testing.assert_array_equal(here.of(("logprobs",))[1, 2], x[4:6])


def test_a_prompt_is_in_one_fold():
  here = place(made(1.0))
  for p in np.unique(here.prompt):
    assert len(set(here.fold[here.prompt == p])) == 1
  assert set(np.bincount(here.fold.reshape(-1)) // GROUP) == {STEPS * PROMPTS // FOLDS}


@pytest.mark.parametrize("center", [False, True])
def test_out_of_fold_scores_are_those_of_a_fit_on_the_others(center):
  here = place(made(1.0))
  score, alone = head_fits.ridge_folds(here, ("last",), center, 2.0)
  assert len(alone) == FOLDS and alone[0].shape == here.shape
  mine, sums = here.fold == 2, ridge.empty(WIDTH, center)
  x = np.asarray(here.of(("last",)))
  for n in range(STEPS):
    sums = ridge.add(sums, x[n], here.reward[n], (here.there & ~mine)[n].astype(np.float32), here.prompt[n])
  head = ridge.solve(sums, 2.0)
  for n in range(STEPS):
    wanted = linear_head.score(head, x[n], here.prompt[n], here.there[n])
    np.testing.assert_allclose(score[n][mine[n]], np.asarray(wanted)[mine[n]], atol=1e-5)


def test_a_step_is_scored_before_it_is_learned_from():
  here = place(made(2.0))
  score = head_fits.ridge_online(here, ("last",), True, 2.0)
  assert not score[0].any()  # nothing known
  sums = ridge.add(ridge.empty(WIDTH), here.of(("last",))[0], here.reward[0], here.there[0].astype(np.float32), here.prompt[0])
  wanted = linear_head.score(ridge.solve(sums, 2.0), here.of(("last",))[1], here.prompt[1], here.there[1])
  np.testing.assert_allclose(score[1], wanted, atol=1e-5)
  line = here.by_step(score, 2)
  assert line["auc_within"] > 0.75 and len(line["steps_auc_within"]) == STEPS and line["steps_auc_within"][0] == 0.5


def test_noise_has_no_auc_out_of_fold():
  def auc(signal, seed):
    here = place(made(signal, seed))
    return here.by_fold(head_fits.ridge_folds(here, ("last",), True, 2.0)[0])["auc"]

  noise, told = (np.mean([auc(signal, seed) for seed in range(4)]) for signal in (0.0, 2.0))
  assert abs(noise - 0.5) < 0.08 and told > 0.85


def test_the_published_head_learns_out_of_fold_and_online():
  here, optimizer = place(made(2.0)), optax.adamw(1e-2)
  score = head_fits.adam_folds(here, ("last",), 8, optimizer, 60, False)
  assert here.by_fold(score)["auc"] > 0.8
  head = Adam(here, ("last", "logprobs"), 8, optimizer, 2 * PROMPTS * GROUP)
  score = head_fits.adam_online(here, head, 30, True)
  assert not score[0].any() and here.by_step(score, 2)["auc"] > 0.7


def test_votes_by_a_head_that_knows_beat_the_majority(monkeypatch):
  """Answers 1 (right) and 0 (wrong), a coin each: the majority is right where the right ones are more, or came first of a tie."""
  monkeypatch.setattr(head_ablation, "VOTERS", (("last",),))

  c = types.SimpleNamespace(rollout=types.SimpleNamespace(group_size=GROUP), reward=types.SimpleNamespace(pattern=None),
                            quality=types.SimpleNamespace(strength=0.5))
  lines = {(x["rule"], x["inputs"]): x for x in head_ablation.votes(place(made(6.0), end=True), c)}
  majority = lines["majority", None]
  assert majority["gain"] == 0 and majority["gain_ci"] == [0, 0] and majority["problems"] == STEPS * PROMPTS
  some = np.mean([any(r.reward for r in step[i:i + GROUP]) for step in made(6.0) for i in range(0, PROMPTS * GROUP, GROUP)])
  assert lines["best", ("last",)]["accuracy"] == pytest.approx(some)
  assert lines["rank", ("last",)]["gain"] > 0.1 and lines["posterior", ("last",)]["gain_ci"][0] > 0


def test_lines_can_be_drawn(tmp_path):
  lines = [{"part": part, "length": n, "score": score, "inputs": list(inputs or ()), "center": center, "auc": 0.6, "auc_sd": 0.1,
            "auc_within": 0.5, "auc_within_sd": 0.1}
           for part in ("offline", "online") for n in (8, "end") for score, inputs, center in head_ablation.SHOWN.values()]
  head_ablation.plot(lines, str(tmp_path / "a.png"))
  head_ablation.plot([x for x in lines if x["part"] == "offline"], str(tmp_path / "b.png"))  # too few steps for the other
  assert (tmp_path / "a.png").stat().st_size > 10_000
