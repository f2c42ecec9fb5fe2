"""The update: the loss is the loop one would write down, and neither micro-batches nor meshes change it."""

import dataclasses
import math

from helpers_update import (
  BATCH,
  COMPUTE,
  EXAMPLES,
  KL,
  LENGTH,
  NO_EXAMPLES,
  PARAMS,
  ROWS,
  SGD,
  TABLE,
  WHOLE,
  C,
  batch_of,
  config,
  gradients,
  micro_loss,
  same,
  scalars,
  state_of,
)
import jax
import numpy as np
import optax
import pytest

from arrol_jax.learning import optimizers, update
from arrol_jax.learning.batching import BinShape
from arrol_jax.learning.losses import GRPO, LossConfig
from arrol_jax.models import sharding, transformer
from arrol_jax.pruning.head import Features


@pytest.fixture(scope="module")
def whole():
  """Gradient and metrics of the batch in one piece, with every term of the loss in play."""
  return gradients([BATCH], config(KL))


# ---- the loss is a loop


def head_by_hand(hidden):
  """The quality head in NumPy: unit root-mean-square, one hidden layer with (tanh) GELU."""
  w = {k: np.asarray(v, np.float64) for k, v in PARAMS["head"].items()}
  x = hidden / math.sqrt(np.mean(hidden**2) + 1e-6) @ w["w1"] + w["b1"]
  return float(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) @ w["w2"] + w["b2"])


def loop(loss: LossConfig, temperature):
  """The loss and its metrics, token by token, in double precision."""
  logits = TABLE.hidden @ np.asarray(PARAMS["policy"]["embed"], np.float64).T / temperature
  mask, count = TABLE.response_mask, TABLE.response_mask.sum()
  out = dict.fromkeys(update.METRICS, 0.0)
  weighted_kl = 0.0
  for b, s in zip(*np.nonzero(mask), strict=True):
    row = logits[b, s - 1] - logits[b, s - 1].max()
    probs = np.exp(row) / np.exp(row).sum()
    logprob, a = math.log(probs[TABLE.tokens[b, s]]), float(TABLE.advantages[b])
    ratio = math.exp(logprob - TABLE.old_logprobs[b, s])
    inside = min(max(ratio, 1 - loss.clip_low), 1 + loss.clip_high)
    weight = 1 / count if loss.aggregate == "token" else 1 / mask[b].sum() / len(mask)
    out["policy_loss"] -= weight * min(ratio * a, inside * a)
    out["clip_frac"] += (inside * a < ratio * a) / count
    out["entropy"] -= np.sum(probs * np.log(probs)) / count
    out["logprob_gap"] += abs(TABLE.old_logprobs[b, s] - TABLE.sampler_logprobs[b, s]) / count
    d = TABLE.ref_logprobs[b, s] - logprob
    if loss.kl_weight:
      out["kl"] += (math.exp(d) - d - 1) / count
      weighted_kl += weight * (math.exp(d) - d - 1)
  return out["policy_loss"] + loss.kl_weight * weighted_kl, out


def head_loop(examples):
  """The head's loss, example by example, in double precision."""
  out = 0.0
  for state, reward, weight in zip(np.asarray(examples.features.last, np.float64), examples.reward, examples.weight, strict=True):
    p = 1 / (1 + math.exp(-head_by_hand(state)))
    out -= weight * math.log(p if reward else 1 - p)
  return out / examples.weight.sum()


@pytest.mark.parametrize("loss, temperature", [
  (GRPO, 1.0), (KL, 0.6), (dataclasses.replace(GRPO, kl_weight=0.3, clip_low=0.05, clip_high=0.4), 1.7)])
def test_micro_loss_is_the_loop(loss, temperature):
  """Against old log-probs that are not the policy's, so that clips bind."""
  total, metrics = micro_loss(config(loss), PARAMS["policy"], BATCH, scalars(temperature=temperature))
  expected, by_hand = loop(loss, temperature)
  assert float(total) == pytest.approx(expected, rel=2e-4)
  assert set(metrics) == set(by_hand)
  for name, value in by_hand.items():
    assert float(metrics[name]) == pytest.approx(value, rel=2e-4, abs=1e-6), name
  assert 0.1 < by_hand["clip_frac"] < 0.9


def test_a_fresh_policy_is_its_own_old_one():
  """One optimizer step a batch: no log-probs need be filled, the ratio is 1, and the gradient is that with them filled."""
  filled = update.fill_logprobs(config(KL), PARAMS["policy"], None, [BATCH], np.float32(1))
  want, metrics = gradients(filled, config(KL))
  got, fresh = gradients([BATCH], config(KL, fresh=True))  # its old log-probs are others
  same(got, want, 1e-5)
  for name, value in metrics.items():
    assert fresh[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
  assert metrics["clip_frac"] == 0 and metrics["grad_norm"] > 1


@pytest.mark.parametrize("weight", [EXAMPLES.weight, np.ones(ROWS, np.float32), np.arange(ROWS, dtype=np.float32) / 2,
                                    0.01 * EXAMPLES.weight])
def test_head_loss_is_the_loop(weight):
  """A weighted mean over the examples; those of weight 0 are not there."""
  examples = EXAMPLES.replace(weight=weight)
  expected = head_loop(examples)
  assert float(update.head_loss(PARAMS["head"], examples)) == pytest.approx(expected, rel=2e-4) and expected > 0.05
  spoilt = np.where(weight[:, None] > 0, EXAMPLES.features.last, 1e3).astype(np.float32)
  again = examples.replace(features=Features(spoilt), reward=np.where(weight > 0, EXAMPLES.reward, 1 - EXAMPLES.reward))
  assert float(update.head_loss(PARAMS["head"], again)) == float(update.head_loss(PARAMS["head"], examples))


def test_the_batch_is_a_fair_one():
  lengths = TABLE.response_mask.sum(axis=1)
  assert lengths.min() == 1 and lengths.max() >= 8 and 0 < EXAMPLES.reward.sum() < ROWS
  assert 0 < EXAMPLES.weight.sum() < ROWS


# ---- how it is cut does not matter


SMALL, SHORT = BinShape(48, 5, LENGTH), BinShape(64, 6, 10)
CUTS = {"halves": [(range(4), WHOLE), (range(4, 8), WHOLE)],
        "shuffled, part-filled": [([3, 4, 1, 0, 5], WHOLE), ([6, 2, 7], SMALL)],
        "rows one by one": [([b], SMALL) for b in (7, 2, 5, 0, 6, 1, 3, 4)]}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_micro_batches_do_not_change_the_gradient(whole, cut):
  grads, metrics = gradients([batch_of(rows, shape=shape)[0] for rows, shape in cut], config(KL))
  same(grads, whole[0], 1e-5)
  for name, value in whole[1].items():
    assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name


def test_shorter_rows_do_not_change_the_gradient(whole):
  """Rows of different lengths in one step, as `pack` makes them: columns of padding cut away."""
  short = [b for b in range(ROWS) if not TABLE.response_mask[b, 10:].any()]
  long = [b for b in range(ROWS) if b not in short]
  assert short and long
  grads, _ = gradients([batch_of(short, shape=SHORT)[0], batch_of(long, shape=SMALL)[0]], config(KL))
  same(grads, whole[0], 1e-5)


def test_a_mean_over_rows_counts_rows_that_are_there():
  """GRPO divides by the number of rows: the 8 of the batch, not the 16 of two part-filled micro-batches."""
  cut = [batch_of([3, 4, 1, 0, 5])[0], batch_of([2, 6, 7])[0]]
  assert gradients(cut)[1]["policy_loss"] == pytest.approx(loop(GRPO, 1.0)[1]["policy_loss"], rel=2e-4)


@pytest.mark.parametrize("scan", [True, False])
def test_remat_chunks_and_layers_one_by_one_do_not_change_the_gradient(whole, scan):
  grads, _ = gradients([BATCH], config(KL, update.Compute("float32", "xla", "full", 10**6, scan)))
  same(grads, whole[0], 1e-5)


def test_gradient_is_the_slope_of_the_loss(whole):
  """Walking a little along the gradient of the policy (of the head) changes its loss by the squared norm a unit."""
  losses = {"policy": lambda params: micro_loss(config(KL), params, BATCH, scalars())[0],
            "head": lambda params: update.head_loss(params, EXAMPLES)}
  for part, loss in losses.items():
    grads = whole[0][part]
    norm = math.sqrt(sum(float(np.sum(g**2)) for g in jax.tree.leaves(grads)))
    ends = []
    for far in (1e-4 / norm, -1e-4 / norm):
      ends.append(float(loss(jax.tree.map(lambda p, g, far=far: p + far * g, PARAMS[part], grads))))
    assert (ends[0] - ends[1]) / 2e-4 == pytest.approx(norm, rel=0.02), part


# ---- policy and head


def test_head_loss_does_not_reach_the_policy():
  still = BATCH.replace(advantages=np.zeros(ROWS, np.float32))
  grads, metrics = gradients([still])
  assert all(np.all(x == 0) for x in jax.tree.leaves(grads["policy"])) and metrics["grad_norm"] == 0
  assert all(np.any(x != 0) for x in jax.tree.leaves(grads["head"])) and metrics["head_loss"] > 0


def test_policy_loss_does_not_reach_the_head():
  grads, metrics = gradients([BATCH], config(KL), examples=NO_EXAMPLES)
  assert all(np.all(x == 0) for x in jax.tree.leaves(grads["head"])) and metrics["head_loss"] == 0
  assert all(np.any(x != 0) for x in jax.tree.leaves(grads["policy"]))


def test_each_learns_as_if_the_other_were_not_there(whole):
  """The policy's gradient is the same without examples, the head's the same without rows."""
  grads, _ = gradients([BATCH], config(KL), examples=NO_EXAMPLES)
  jax.tree.map(np.testing.assert_array_equal, grads["policy"], whole[0]["policy"])
  grads, metrics = gradients([], config(KL))
  jax.tree.map(np.testing.assert_array_equal, grads["head"], whole[0]["head"])
  assert metrics["head_loss"] == whole[1]["head_loss"] == pytest.approx(head_loop(EXAMPLES), rel=2e-4)


def test_the_head_weight_scales_the_heads_gradient_alone(whole):
  state, metrics = update.apply(state_of(PARAMS), whole[0]["policy"], scalars(), EXAMPLES, head_weight=0.5, optimizer=SGD)
  grads = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), PARAMS, state.params)
  same(grads["policy"], whole[0]["policy"], 1e-5)
  same(grads["head"], jax.tree.map(lambda x: 0.5 * x, whole[0]["head"]), 1e-6)
  assert metrics["head_loss"] == whole[1]["head_loss"]


def test_grad_norm_is_the_policy_gradients(whole):
  squares = sum(float(np.sum(np.square(x, dtype=np.float64))) for x in jax.tree.leaves(whole[0]["policy"]))
  assert whole[1]["grad_norm"] == pytest.approx(math.sqrt(squares), rel=1e-3)


# ---- the step


def test_learning_rate_warms_up():
  """By optimizer steps taken; then constant, or down to 0 at the last step. Traced and on the host alike."""
  rates = lambda *args, **kw: [float(optimizers.RateSchedule(*args, **kw)(s)) for s in range(6)]
  assert rates("constant", 8.0, 4, 6) == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]
  assert [optimizers.RateSchedule("constant", 8.0, warmup, 6)(0) for warmup in (0, 1)] == [8.0, 8.0]
  assert rates("constant", 8.0, 2, 6, per_step=2) == [4.0, 4.0, 8.0, 8.0, 8.0, 8.0]
  np.testing.assert_allclose(rates("linear", 8.0, 2, 6), [4.0, 8.0, 8.0, 6.0, 4.0, 2.0])
  np.testing.assert_allclose(rates("cosine", 8.0, 0, 4)[:5], [4 + 4 * np.cos(np.pi * s / 4) for s in range(5)], atol=1e-9)
  for name in ("constant", "linear", "cosine"):
    rate = optimizers.RateSchedule(name, 8.0, 2, 6)
    np.testing.assert_allclose(jax.jit(jax.vmap(rate))(np.arange(6)), [rate(s) for s in range(6)], rtol=1e-6)


def adam(grads, lr, b1, b2, decay, param):
  """Parameters after Adam's steps with these gradients, in NumPy; lr(t) of 0-based t."""
  m = v = 0.0
  for t, g in enumerate(grads):
    m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
    step = m / (1 - b1**(t + 1)) / (np.sqrt(v / (1 - b2**(t + 1))) + 1e-8)
    param = param - lr(t) * (step + decay * param)
  return param


def test_one_optimizer_step_on_both_with_their_own_rates():
  """Two steps: AdamW with warm-up and clipping on the policy, plain Adam on the head, each as written in NumPy."""
  lr, head_lr, clip, decay, b1, b2 = 1e-3, 2e-2, 0.5, 0.1, 0.8, 0.95
  optimizer = optimizers.Optimizer(optimizers.RateSchedule("constant", lr, 4, 100, 1), head_lr, clip, decay, b1, b2)
  state, seen = state_of(PARAMS, optimizer), []
  for _ in range(2):
    grads, metrics = gradients([BATCH], params=jax.device_get(state.params))
    assert metrics["grad_norm"] > clip
    seen.append((grads["head"], jax.tree.map(lambda x, n=metrics["grad_norm"]: x * (clip / n), grads["policy"])))
    state, _ = update.step(config(GRPO), state, [BATCH], EXAMPLES, scalars(), optimizer)
  assert int(state.step) == 2
  plan = {"policy": (1, lambda t: lr * (t + 1) / 4, b1, b2, decay), "head": (0, lambda t: head_lr, 0.9, 0.999, 0.0)}
  for part, (place, *settings) in plan.items():
    got, start = jax.tree.leaves(state.params[part]), jax.tree.leaves(PARAMS[part])
    for x, p, a, b in zip(got, start, *(jax.tree.leaves(s[place]) for s in seen), strict=True):
      # Adam divides each gradient by its own size: where that is rounding noise the step is too.
      p, real = np.asarray(p), (np.abs(a) > 1e-5) & (np.abs(b) > 1e-5)
      want = adam([a, b], *settings, p)
      assert real.any()
      np.testing.assert_allclose((np.asarray(x) - p)[real], (want - p)[real], rtol=0.02, atol=1e-6)


def test_a_small_step_favours_rows_with_positive_advantage():
  ask = lambda params: np.asarray(update.batch_logprobs(config(GRPO), params["policy"], BATCH, np.float32(1)))
  before = ask(PARAMS)
  fresh = BATCH.replace(old_logprobs=before)
  state, _ = update.step(config(GRPO), state_of(PARAMS), [fresh], EXAMPLES, scalars(), optax.sgd(1e-4))
  rise = (ask(state.params) - before).sum(axis=1) / np.asarray(BATCH.response_mask).sum(axis=1)
  good = BATCH.advantages > 0
  assert rise[good].mean() > rise[~good].mean() + 1e-5 and np.sum(rise * BATCH.advantages) > 0


@pytest.fixture
def moving():
  """A state whose optimizer has momentum, and the optimizer."""
  optimizer = optimizers.Optimizer(lambda count: 1e-2, 1e-2, 1.0, 0.1, 0.9, 0.999)
  return update.step(config(GRPO), state_of(PARAMS, optimizer), [BATCH], EXAMPLES, scalars(), optimizer)[0], optimizer


def test_decay_is_of_the_policys_step_alone(moving):
  """Momentum and the head's step are as without it; weight decay has the same share."""
  state, optimizer = moving
  copy = lambda: jax.tree.map(lambda x: x.copy(), state)  # a step takes its state's arrays
  learn = lambda decay: update.step(config(GRPO), copy(), [BATCH], EXAMPLES, scalars(), optimizer, decay)[0]
  before, whole, part = map(jax.device_get, (state, learn(1.0), learn(0.25)))
  jax.tree.map(np.testing.assert_array_equal, (part.params["head"], part.opt_state), (whole.params["head"], whole.opt_state))
  for old, all_of_it, some in zip(*(jax.tree.leaves(x.params["policy"]) for x in (before, whole, part)), strict=True):
    np.testing.assert_allclose(some - old, 0.25 * (all_of_it - old), rtol=1e-3, atol=4e-7)


def test_without_survivors_nothing_is_learnt(moving):
  state, optimizer = moving
  before = jax.device_get(state)
  after, metrics = update.step(config(GRPO), state, [], NO_EXAMPLES, scalars(rows=0), optimizer)
  assert int(after.step) == int(before.step) + 1 and float(metrics["grad_norm"]) == 0.0
  jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (before.params, before.opt_state))


@pytest.mark.parametrize("batches, examples, learns, stays", [([], EXAMPLES, "head", "policy"),
                                                              ([BATCH], NO_EXAMPLES, "policy", "head")])
def test_what_has_nothing_to_learn_from_stays_while_the_other_learns(moving, batches, examples, learns, stays):
  """Whatever the momentum and the weight decay."""
  state, optimizer = moving
  before = jax.device_get(state)
  after, metrics = update.step(config(GRPO), state, batches, examples, scalars() if batches else scalars(rows=0), optimizer)
  jax.tree.map(np.testing.assert_array_equal, after.params[stays], before.params[stays])
  assert all(np.any(np.asarray(a) != b) for a, b in zip(jax.tree.leaves(after.params[learns]),
                                                        jax.tree.leaves(before.params[learns]), strict=True))
  assert int(after.step) == int(before.step) + 1
  assert (float(metrics["grad_norm"]) > 0, float(metrics["head_loss"]) > 0) == (learns == "policy", learns == "head")


# ---- meshes


@pytest.mark.parametrize("shape, scan", [((8, 1, 1), True), ((2, 2, 2), True), ((1, 1, 8), True), ((2, 2, 2), False)])
def test_sharded_is_unsharded(whole, shape, scan):
  """Same loss terms and gradients on eight devices as on one, up to float32 summation order."""
  mesh = sharding.make_mesh(*shape)
  bins = {8: [[b] for b in range(ROWS)], 4: [[0], [1, 2], [3, 4, 5], [6, 7]], 1: [range(ROWS)]}[shape[0] * shape[1]]
  batch, _ = batch_of(*bins, shape=WHOLE if len(bins) == 1 else BinShape(48, 3, LENGTH))
  with jax.set_mesh(mesh):
    target = sharding.shardings(transformer.logical_axes(C), PARAMS["policy"], mesh, sharding.TRAIN)
    params = {"policy": jax.device_put(PARAMS["policy"], target),
              "head": jax.device_put(PARAMS["head"], sharding.replicated(mesh))}
    sums = update.zeros(C, params["policy"])[0]
    batches = [sharding.put(batch, sharding.rows(mesh))]
    u = config(KL, dataclasses.replace(COMPUTE, scan_layers=scan))
    state, metrics = update.step(u, state_of(params), batches, EXAMPLES, scalars(), SGD)
  on_a_device = lambda tree: [x.addressable_shards[0].data.shape for x in jax.tree.leaves(tree)]
  assert on_a_device(sums) == on_a_device(params["policy"])  # not whole everywhere
  grads = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), PARAMS, state.params)
  for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(whole[0]), strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=3e-5 * np.abs(b).max())  # small elements are sums that cancel
  for name, value in whole[1].items():
    assert float(metrics[name]) == pytest.approx(value, rel=1e-4, abs=1e-6), name
  cut = lambda x: max(x.addressable_shards[0].data.shape) < max(x.shape)
  assert cut(params["policy"]["layers"]["up"]) == (shape != (8, 1, 1))
  assert state.params["policy"]["layers"]["up"].sharding.is_equivalent_to(target["layers"]["up"], 3)
