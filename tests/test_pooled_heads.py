"""Heads that read all states of a prefix, on made-up states whose truth is known (experiments/pooled_heads.py)."""

import json
import sys

from helpers_rollouts import rollout_of
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from arrol_jax import assemble
from arrol_jax.learning.metrics import auc
from arrol_jax.models import transformer
from arrol_jax.models.layers import rms_norm
from configs import quickstart
from experiments import pooled_heads, prefix_heads, prefix_states
from experiments.head_fits import FOLDS
from experiments.prefix_heads import LOSSES, Trainer
from experiments.prefix_states import Collected

STEPS, PROMPTS, GROUP, LENGTH, WIDE = 4, 15, 8, 6, 8  # prompts of a step


def made(seed: int = 0) -> Collected:
  """One token of each, at any place, is marked in its first dimension; the sign of its second decides. Other tokens' second
  dimension is noise that drowns it in the mean. Every ninth response ended early."""
  rng, steps, count = np.random.default_rng(seed), [], STEPS * PROMPTS * GROUP
  x = rng.normal(size=(count, LENGTH, WIDE)).astype(np.float32)
  x[..., 1] *= 4
  at, right = rng.integers(0, LENGTH, count), rng.random(count) < 0.4
  x[np.arange(count), at, 0] += 8
  x[np.arange(count), at, 1] = np.where(right, 2.0, -2.0)
  for n in range(STEPS):
    rows = range(n * PROMPTS * GROUP, (n + 1) * PROMPTS * GROUP)
    steps.append([rollout_of(i, i // GROUP, 3, LENGTH if i % 9 == 8 else LENGTH + 2, reward=float(right[i])) for i in rows])
  return Collected(steps, {"1/2": jnp.asarray(x.reshape(-1, GROUP, LENGTH, WIDE))})


@pytest.fixture(scope="module")
def found():
  return made()


@pytest.fixture(scope="module")
def place(found):
  return pooled_heads.place_of(found, "1/2", LENGTH)


@pytest.fixture
def few_rounds(monkeypatch):
  monkeypatch.setattr(prefix_heads, "ROUNDS", 2)


def fold_of(place):
  return place.fold.reshape(-1, GROUP)[:, 0]


def test_what_is_read_gives_the_log_probs_that_the_sampler_gave(monkeypatch):
  """The last layer's states, normed and unembedded: so they are of the right tokens, and padding does not matter."""
  monkeypatch.setattr(prefix_states, "standardised", lambda x, count, *_: x)
  c = quickstart.get_config()
  c.rollout.prompts, c.rollout.group_size, c.rollout.slots, c.rollout.row_buckets = 4, 2, 8, 1
  steps, states = prefix_states.collect(c, ("1/2", "1"), 12, 8)
  rollouts = [r for step in steps for r in step]
  assert len(steps) == 2 and [r.prompt for r in rollouts] == np.repeat(np.arange(8), 2).tolist()
  assert states["1"].shape == states["1/2"].shape == (8, 2, 12, 128)
  policy = assemble.load(c, assemble.make_mesh(c))
  hidden = rms_norm(states["1"].reshape(16, 12, 128), policy.params["final_norm"], policy.config.norm_eps)
  logprobs = np.asarray(jax.nn.log_softmax(transformer.unembed(policy.params, hidden), axis=-1))
  for r, row in zip(rollouts, logprobs, strict=True):
    n = min(12, len(r.tokens))
    np.testing.assert_allclose(row[np.arange(n), r.tokens[:n]], r.logprobs[:n], atol=2e-4)


def test_states_are_standardised_over_real_tokens_and_0_behind_them():
  rng, count = np.random.default_rng(0), jnp.array([2, 5, 3], jnp.int32)
  x = jnp.asarray(rng.normal(1000.0, 3.0, (3, 5, 2)), jnp.float32)
  out = np.asarray(prefix_states.standardised(x, count, *prefix_states.moments(x, count)))
  real = np.concatenate([row[:n] for row, n in zip(out, count.tolist(), strict=True)])
  np.testing.assert_allclose(real.mean(0), 0.0, atol=1e-3)
  np.testing.assert_allclose(real.std(0), 1.0, atol=1e-3)
  assert not out[0, 2:].any() and not out[2, 3:].any()


def test_a_place_has_what_is_longer_and_its_means(found, place):
  here, data = place
  assert (here.there.reshape(-1) == (np.arange(STEPS * PROMPTS * GROUP) % 9 != 8)).all()
  np.testing.assert_array_equal(np.asarray(data.there).reshape(-1), here.there.reshape(-1))
  np.testing.assert_array_equal(np.asarray(data.reward).reshape(-1), here.reward.reshape(-1))
  mean = np.asarray(found.states["1/2"]).reshape(-1, LENGTH, WIDE)[5].mean(0)
  np.testing.assert_allclose(here.of(("mean@1/2",))[0, 5], mean, atol=1e-6)
  told = np.asarray(pooled_heads.place_of(found, "1/2", LENGTH, True)[1].states)
  np.testing.assert_allclose(told[0, 3, :, WIDE], found.steps[0][3].logprobs[:LENGTH] + 0.5, atol=1e-6)
  np.testing.assert_array_equal(told[..., :WIDE], data.states)


def test_figures_are_those_of_the_ablation(place):
  here, _ = place
  score = np.round(np.random.default_rng(1).normal(size=here.shape) + here.reward, 1)  # with ties
  out, wanted = pooled_heads.judged(here, score, here.there, score), here.judged(score, here.there)
  assert out["auc"] == wanted["auc"] and out["auc_within"] == pytest.approx(wanted["auc_within"])
  assert out["gain"] == 0 and out["gain_ci"] == [0, 0] and out["examples"] == here.there.sum()
  assert out["auc_ci"][0] < out["auc"] < out["auc_ci"][1]


def test_concordance_counts_pairs(place):
  here, _ = place
  score = np.round(np.random.default_rng(2).normal(size=here.reward.size), 1)
  right, prompt = here.reward.reshape(-1) > 0.5, here.prompt.reshape(-1)
  pairs = pooled_heads.concordance(score, right, prompt)
  assert pairs.sum() / (right.sum() * (~right).sum()) == pytest.approx(auc(score, right))
  high, low = score[right & (prompt == 3)], score[~right & (prompt == 7)]
  assert pairs[3, 7] == sum((h > s) + 0.5 * (h == s) for h in high for s in low)


def test_losses_are_those_of_a_loop():
  rng = np.random.default_rng(3)
  logits, reward, there = rng.normal(size=(4, 5)), (rng.random((4, 5)) < 0.5) * 1.0, (rng.random((4, 5)) < 0.8) * 1.0
  reward[2] = 1.0  # nothing to compare
  cross, groups = [], []
  for s, y, w in zip(logits, reward, there, strict=True):
    cross += [np.log1p(np.exp(-a if b else a)) for a, b, c in zip(s, y, w, strict=True) if c]
    pairs = [np.log1p(np.exp(s[j] - s[i])) for i in range(5) for j in range(5) if y[i] > y[j] and w[i] * w[j]]
    groups += [np.mean(pairs)] if pairs else []
  found = prefix_heads.losses(*(jnp.asarray(x, jnp.float32) for x in (logits, reward, there)))
  assert len(groups) < 4
  np.testing.assert_allclose(found, [np.mean(cross), np.mean(groups)], rtol=1e-5)


def auc_within(head, place, loss, data=None):
  """Of scores by two folds: half of the fits."""
  here, given = place
  score = Trainer(head, data or given, 32).folds(fold_of(here) % 2, loss).reshape(here.shape)
  return float(np.nanmean(pooled_heads.within(here, score, here.there)))


@pytest.fixture
def fast(monkeypatch):
  monkeypatch.setattr(prefix_heads, "OPTIMIZER", optax.adamw(1e-2))
  monkeypatch.setattr(prefix_heads, "ROUNDS", 20)


@pytest.mark.parametrize("loss", LOSSES)
def test_attention_finds_the_token_that_decides_where_the_mean_does_not(place, fast, loss):
  assert auc_within("attention", place, loss) > 0.9 and auc_within("mean", place, loss) < 0.75


@pytest.mark.parametrize("head", ["attention+", "transformer"])
def test_the_other_heads_find_it_too(place, fast, monkeypatch, head):
  monkeypatch.setattr(prefix_heads, "ROUNDS", 8)
  assert auc_within(head, place, "bce") > 0.85


def test_nothing_is_found_in_shuffled_labels(place, fast, monkeypatch):
  here, data = place
  shuffled = np.random.default_rng(4).permuted(here.reward.reshape(-1, GROUP), axis=1)
  monkeypatch.setattr(here, "reward", shuffled.reshape(here.shape))
  assert abs(auc_within("attention", place, "bce", data._replace(reward=jnp.asarray(shuffled))) - 0.5) < 0.08


def test_a_fold_is_scored_by_what_did_not_see_it(place, few_rounds):
  here, data = place
  fold = fold_of(here)
  assert set(fold) == set(range(FOLDS)) and all(len(set(here.fold[here.prompt == p])) == 1 for p in range(len(fold)))
  other = data._replace(reward=jnp.where(jnp.asarray(fold == 2)[:, None], 1 - data.reward, data.reward))
  one, two = (Trainer("mean", x, 32).folds(fold, "bce") for x in (data, other))
  np.testing.assert_array_equal(one[fold == 2], two[fold == 2])
  assert not (one[fold != 2] == two[fold != 2]).any()


def test_a_step_is_scored_before_it_is_learned_from(place):
  here, data = place
  late = jnp.asarray(np.arange(STEPS * PROMPTS) >= 2 * PROMPTS)[:, None]
  other = data._replace(reward=jnp.where(late, 1 - data.reward, data.reward))
  one, two = (Trainer("mean", x, 32).online(STEPS, "bce") for x in (data, other))
  assert not one[:PROMPTS].any() and one[PROMPTS:].all()
  np.testing.assert_array_equal(one[:3 * PROMPTS], two[:3 * PROMPTS])
  assert not (one[3 * PROMPTS:] == two[3 * PROMPTS:]).any()


def command(monkeypatch, out, *flags):
  monkeypatch.setattr(sys, "argv", ["pooled_heads", "--config=configs/quickstart.py", f"--lengths={LENGTH}", "--depths=1/2",
                                    "--prompts=64", "--heads=attention", f"--out={out}",
                                    "--config.data.eval=nowhere.jsonl", *flags])  # which is not read
  pooled_heads.main()
  with open(f"{out}/pooled.jsonl") as f:
    return [json.loads(x) for x in f]


def test_the_command_writes_a_line_a_head_and_ends_in_time(found, few_rounds, monkeypatch, tmp_path, capsys):
  monkeypatch.setattr(pooled_heads, "collect", lambda *_: found)
  lines = command(monkeypatch, tmp_path)
  assert [(x["part"], x["head"]) for x in lines] == [
    ("offline", "ridge"), ("online", "ridge"), ("offline", "ridge"), ("online", "ridge"),
    *[("offline", "attention"), ("offline", "stack of ridge, attention"), ("online", "attention")] * 2]
  attention = lines[4]
  assert attention["parameters"] == 4 * (2 * WIDE + LENGTH) + 1 and attention["loss"] == "bce" and attention["rollouts"] == 480
  assert attention["gain"] == pytest.approx(attention["auc_within"] - lines[0]["auc_within"])
  assert lines[6]["gain"] == pytest.approx(lines[6]["auc_within"] - lines[1]["auc_within"])
  assert (tmp_path / "pooled.png").stat().st_size > 10_000
  assert len(command(monkeypatch, tmp_path, "--seconds=1e-9")) == 4  # the ridge alone
  assert "seconds are over" in capsys.readouterr().out


def test_mistakes_are_one_line(monkeypatch, capsys):
  monkeypatch.setattr(pooled_heads.os, "makedirs", lambda *_, **__: None)
  for flag, word in (("--lengths=8,48", "max_new"), ("--lengths=x", "numbers"), ("--prompts=20", "multiple"),
                     ("--width=40", "32"), ("--heads=mean,best", "transformer"),
                     ("--seconds=0", "more than 0"), ("--logprobs=1", "yes or no"),
                     ("--losses=bce,mse", "pairs"), ("--depths=2", "--depths"), ("--prompts=9600", "holds 2000")):
    monkeypatch.setattr(sys, "argv", ["pooled_heads", "--config=configs/quickstart.py", "--lengths=8", flag])
    with pytest.raises(SystemExit) as e:
      pooled_heads.configuration.run(pooled_heads.main)
    err = capsys.readouterr().err
    assert e.value.code == 2 and word in err.splitlines()[-1] and "Traceback" not in err
