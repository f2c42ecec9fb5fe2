"""The quality head: what it reads in the engine, and its passes over recent rollouts."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_rollout import KEY, PARAMS, SAMPLING, C, engine, plain_hidden, requests

from arrol_jax.engine.sampling import Sampling
from arrol_jax.learning.batching import head_examples, head_weights
from arrol_jax.learning.head_training import no_recent, refit, refit_head
from arrol_jax.learning.metrics import auc
from arrol_jax.models import transformer
from arrol_jax.prune import Calibration
from arrol_jax.pruning.decision import make_decide
from arrol_jax.pruning.head import INPUTS, Features, init_head, inputs_of, quality_logit
from arrol_jax.pruning.rule import PruneRule
from arrol_jax.types import Rollout, TrainState

ALL = tuple(INPUTS)
HEAD = init_head(C.width, 8, jax.random.key(1), ALL)
HEAD = HEAD | {"w2": jax.random.normal(jax.random.key(2), HEAD["w2"].shape)}
LENGTHS = (4, 8)


@pytest.fixture(scope="module")
def rollouts(mesh):
  """Twenty rollouts with the readings, scores and confidences of their decisions at 4 and 8 tokens, none pruned."""
  sampling = Sampling(SAMPLING.temperature, SAMPLING.stop_ids, "float32", confidence=5, pool=True)
  tables = jax.tree.map(lambda x: jnp.stack([x, x]), Calibration.empty(8))
  with jax.set_mesh(mesh):
    out = engine(mesh).run(requests(), KEY, sampling, decide=make_decide(HEAD, tables, PruneRule(LENGTHS), False, features=True))
  for r in out:
    r.reward = float(r.request % 2)
  assert sum(len(r.features) for r in out) > 20
  return out


def whole(r: Rollout):
  tokens = np.zeros((1, 28), np.int32)
  tokens[0, :len(r.prompt_tokens) + len(r.tokens)] = np.r_[r.prompt_tokens, r.tokens]
  return tokens


def test_readings_are_those_of_a_plain_forward_pass(rollouts):
  """Last state, mean of the states that sampled the tokens so far, mean and lowest log-prob of these tokens."""
  for r in rollouts:
    hidden, start = np.asarray(plain_hidden(whole(r))[0]), len(r.prompt_tokens) - 1
    for reading, score, n in zip(r.features, r.scores, LENGTHS, strict=False):
      np.testing.assert_allclose(reading.last, hidden[start + n - 1], atol=2e-4)
      np.testing.assert_allclose(reading.mean, hidden[start:start + n].mean(0), atol=2e-4)
      np.testing.assert_allclose(reading.logprobs, [r.logprobs[:n].mean(), r.logprobs[:n].min()], atol=1e-5)
      assert float(quality_logit(HEAD, reading)) == pytest.approx(score, abs=1e-4)


def test_the_last_reading_is_that_of_the_last_token(rollouts):
  """Booked for all, also for those that ended before a decision."""
  for r in rollouts:
    hidden, start, n = np.asarray(plain_hidden(whole(r))[0]), len(r.prompt_tokens) - 1, len(r.tokens)
    np.testing.assert_allclose(r.final_features.last, hidden[start + n - 1], atol=2e-4)
    np.testing.assert_allclose(r.final_features.mean, hidden[start:start + n].mean(0), atol=2e-4)
    np.testing.assert_allclose(r.final_features.logprobs, [r.logprobs.mean(), r.logprobs.min()], atol=1e-5)
  assert any(not r.features for r in rollouts)


def test_confidence_is_that_of_the_full_softmax(rollouts):
  """The mean -log-prob of the five likeliest tokens, at each token."""
  for r in rollouts[:6]:
    logits = transformer.unembed(PARAMS, plain_hidden(whole(r)))[0, len(r.prompt_tokens) - 1:][:len(r.tokens)]
    top = np.sort(np.asarray(jax.nn.log_softmax(logits)), axis=1)[:, -5:]
    np.testing.assert_allclose(r.confidences, -top.mean(1), atol=2e-4)


def test_the_likeliest_tokens_lie_in_the_blocks_with_the_highest_maxima():
  from arrol_jax.engine.sampling import _top
  x = jax.random.normal(jax.random.key(4), (3, 9, 128))
  x = x.at[0, 2].add(5.0)  # one block holds them all
  np.testing.assert_array_equal(_top(x, 7), -np.sort(-np.asarray(x).reshape(3, -1))[:, :7])
  np.testing.assert_array_equal(_top(x, 20), -np.sort(-np.asarray(x).reshape(3, -1))[:, :20])


@pytest.mark.parametrize("inputs", [("last",), ("mean", "logprobs"), ALL])
def test_a_heads_weights_say_what_it_reads(inputs):
  head = init_head(C.width, 8, jax.random.key(1), inputs)
  assert inputs_of(head) == inputs and {INPUTS[x] for x in inputs} == set(head) - {"b1", "w2", "b2"}
  reading = Features(*(jnp.ones((5, 2 if x == "logprobs" else C.width)) for x in ALL))
  np.testing.assert_array_equal(quality_logit(head, reading), 0.0)  # knows nothing yet


def test_an_unknown_input_is_refused():
  with pytest.raises(ValueError, match="last, mean, logprobs"):
    init_head(4, 2, jax.random.key(0), ("first",))


# ---- further passes


def readings(n, seed=0):
  rng = np.random.default_rng(seed)
  states = rng.normal(size=(2, n, C.width)).astype(np.float32)
  return Features(states[0], states[1], rng.normal(size=(n, 2)).astype(np.float32))


def test_the_ring_keeps_the_last_readings_that_count():
  optimizer = optax.sgd(0.0)
  recent, many = no_recent(HEAD, C.width, 5, optimizer), readings(8)
  part = lambda rows: jax.tree.map(lambda x: x[np.array(rows)], many)
  reward = np.arange(8.0, dtype=np.float32)
  weight = np.array([1, 0, 1, 2], np.float32)
  _, recent = refit(HEAD, recent, part([0, 1, 2, 3]), reward[:4], weight, passes=1, optimizer=optimizer)
  np.testing.assert_array_equal(recent.reward, [0, 2, 3, 0, 0])
  np.testing.assert_array_equal(recent.weight, [1, 1, 2, 0, 0])
  _, recent = refit(HEAD, recent, part([4, 5, 6, 7]), reward[4:], np.ones(4, np.float32), passes=1, optimizer=optimizer)
  np.testing.assert_array_equal(recent.reward, [6, 7, 3, 4, 5])
  np.testing.assert_array_equal(recent.features.mean, many.mean[np.array([6, 7, 3, 4, 5])])


def test_passes_are_gradient_steps_on_the_weighted_loss_of_the_ring():
  optimizer, many = optax.adam(0.01), readings(6)
  reward, weight = np.array([1, 0, 1, 1, 0, 0], np.float32), np.array([1, 2, 0, 1, 3, 1], np.float32)
  after, _ = refit(HEAD, no_recent(HEAD, C.width, 8, optimizer), many, reward, weight, passes=3, optimizer=optimizer)

  def loss(head):
    chance = jax.nn.sigmoid(quality_logit(head, many))
    return -jnp.sum(weight * jnp.log(jnp.where(reward > 0, chance, 1 - chance))) / weight.sum()

  head, state = HEAD, optimizer.init(HEAD)
  for _ in range(3):
    updates, state = optimizer.update(jax.grad(loss)(head), state)
    head = optax.apply_updates(head, updates)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), after, head)


def test_refit_learns_from_scored_survivors_alone(rollouts):
  optimizer = optax.adam(0.02)
  recent = no_recent(HEAD, C.width, 64, optimizer)
  state = TrainState({"policy": PARAMS, "head": HEAD}, None, None, jnp.int32(0), recent)
  for r in rollouts[:5]:
    r.pruned, r.keep_probability = True, 0.5
  kept = [r for r in rollouts if not r.pruned]
  after = refit_head(state, head_examples(rollouts, HEAD, C.width), passes=60, optimizer=optimizer)
  wanted = [r.reward for r in kept for _ in r.features]
  np.testing.assert_array_equal(after.recent.reward[:len(wanted)], wanted)
  assert int(after.recent.next) == len(wanted) == int(after.recent.weight.sum())
  chance = lambda head, reading: 1 / (1 + np.exp(-float(quality_logit(head, reading))))
  error = lambda head: np.mean([(chance(head, x) - r.reward)**2 for r in kept for x in r.features])
  assert error(after.params["head"]) < 0.5 * error(HEAD)
  for r in rollouts[:5]:
    r.pruned, r.keep_probability = False, 1.0
  assert refit_head(state, head_examples([], HEAD, C.width), passes=1, optimizer=optimizer) is state


def test_balanced_weights_give_right_and_wrong_half_each():
  """Whatever their shares, beside 1 / keep probability; one class alone keeps its half."""
  one = np.zeros(1, np.int32)
  make = lambda reward, p=1.0: Rollout(0, 0, one, one, np.zeros(1), reward=reward, keep_probability=p)
  some = [make(1.0, 0.5), make(0.0), make(0.0, 0.25), make(0.0)]
  np.testing.assert_allclose(head_weights(some, (), False), np.ones(4))
  np.testing.assert_allclose(head_weights(some, ("head",), False), [2, 1, 4, 1])
  np.testing.assert_allclose(head_weights(some, (), True), [2, 2 / 3, 2 / 3, 2 / 3])
  np.testing.assert_allclose(head_weights(some, ("head",), True), [4, 4 / 6, 16 / 6, 4 / 6], rtol=1e-6)
  np.testing.assert_allclose(head_weights(some[1:3], (), True), [0.5, 0.5])
  assert head_weights([], (), True).shape == (0,)


def test_two_decisions_are_each_balanced():
  """Three right of nine reach the first decision, one of seven the second: at each, right and wrong weigh alike, and a decision
  as much as without balance."""
  one, states = np.zeros(1, np.int32), lambda n: tuple(Features(np.full(C.width, c, np.float32)) for c in range(n))
  make = lambda reward, n, p=1.0: Rollout(0, 0, one, one, np.zeros(1), reward=reward, keep_probability=p, features=states(n))
  some = [make(1.0, 1), make(1.0, 1, 0.5), make(1.0, 2), *(make(0.0, 2) for _ in range(6))]
  head = init_head(C.width, 8, jax.random.key(1))
  for weigh, total in (((), (9, 7)), (("head",), (10, 7))):
    e = head_examples(some, head, C.width, weigh, balance=True, decisions=2)
    place = np.asarray(e.features.last[:, 0])
    for c in (0, 1):
      weight = [e.weight[(place == c) & (e.weight > 0) & (e.reward == kind)].sum() for kind in (0.0, 1.0)]
      np.testing.assert_allclose(weight, [total[c] / 2] * 2, rtol=1e-6)


def test_a_decision_that_only_wrong_ones_reach_does_not_tip_the_balance():
  """Right answers are short and end before the second decision: overall, too, right and wrong weigh 1:1."""
  one, states = np.zeros(1, np.int32), lambda n: tuple(Features(np.full(C.width, c, np.float32)) for c in range(n))
  some = [Rollout(0, 0, one, one, np.zeros(1), reward=float(n == 1), features=states(n)) for n in (1, 1, 2, 2, 2, 2)]
  e = head_examples(some, init_head(C.width, 8, jax.random.key(1)), C.width, (), balance=True, decisions=2)
  right, wrong = (float(e.weight[e.reward == kind].sum()) for kind in (1.0, 0.0))
  assert right == pytest.approx(wrong) and right == pytest.approx(3.0)


def test_a_balanced_head_learns_ranks_where_the_other_still_learns_the_share():
  """One in ten is right and the state tells which: after ten steps of Adam the plain loss has moved the bias only."""
  optimizer, n = optax.adam(1e-3), 512
  rng = np.random.default_rng(3)
  reward = (rng.random(n) < 0.1).astype(np.float32)
  states = rng.normal(size=(n, C.width)).astype(np.float32)
  states[:, 0] += 2 * reward
  rollouts_ = [Rollout(0, 0, np.zeros(1, np.int32), np.zeros(1, np.int32), np.zeros(1), reward=float(r)) for r in reward]
  head = init_head(C.width, 64, jax.random.key(0))
  found = {}
  for balance in (False, True):
    weight = head_weights(rollouts_, (), balance)
    empty = no_recent(head, C.width, n, optimizer)
    after, _ = refit(head, empty, Features(states), reward, weight, passes=10, optimizer=optimizer)
    score = np.asarray(quality_logit(after, Features(states)))
    found[balance] = auc(score, reward), score.mean()
  assert found[True][0] > 0.85 > found[False][0] + 0.05
  assert abs(found[True][1]) < abs(found[False][1])


def test_log_probs_are_read_by_their_size_and_a_certain_rollout_is_finite():
  """Twice the log-prob moves what is read as far from -0.1 as from -1; zero and rounding above it stay finite."""
  head = init_head(C.width, 8, jax.random.key(1), ("logprobs",)) | {"w2": jnp.ones(8)}
  slope = {k: v for k, v in head.items()} | {"w1_logprobs": jnp.zeros((2, 8)).at[0].set(1e-3)}  # gelu is straight there
  at = lambda x: float(quality_logit(slope, Features(logprobs=jnp.array([x, -5.0]))))
  assert abs((at(-2.0) - at(-1.0)) - (at(-0.4) - at(-0.2))) < 0.05 * abs(at(-2.0) - at(-1.0))
  for x in ([0.0, 0.0], [1e-7, 0.0], [-50.0, -90.0]):
    assert np.isfinite(float(quality_logit(head, Features(logprobs=jnp.array(x)))))
