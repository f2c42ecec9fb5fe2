"""The update: the loss is the loop one would write down, and neither chunks, micro-batches nor meshes change it."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from arrol_jax.learning import update
from arrol_jax.learning.losses import DAPO, GRPO, LossConfig
from arrol_jax.models import sharding, transformer
from arrol_jax.models.attention import causal_attention
from arrol_jax.models.transformer import PolicyConfig
from arrol_jax.planning import hlo
from arrol_jax.prune import Calibration
from arrol_jax.pruning.head import Features, init_head, quality_logit
from arrol_jax.types import Batch, TrainState

# Vocabulary, heads and feed-forward width divide by 8: on a mesh of (1, 1, 8) they really are cut.
C = PolicyConfig("qwen3", 32, 32, 2, 8, 2, 8, 40, qk_norm=True)
ROWS, LENGTH = 8, 16
COMPUTE = update.Compute("float32", "xla", remat="none", chunk_tokens=24)  # 2 positions of 8 rows at once
SGD = optax.sgd(1.0)  # with this optimizer a step's change is minus the gradient


@jax.jit
def make_params():
  """Weights three times their usual size, so that log-probs differ; a head that has an opinion."""
  weights = jax.tree.map(lambda x: x * 3.0, transformer.init_params(C, jax.random.key(0)))
  head = init_head(C.width, 16, jax.random.key(1))
  head["w2"] = jax.random.normal(jax.random.key(2), head["w2"].shape)
  return {"policy": weights, "head": head}


PARAMS = make_params()


def make_batch(rows=ROWS):
  """Prompts of 2 to 5 tokens, responses of 1 to 10, old, reference and sampler log-probs near the policy's."""
  rng = np.random.default_rng(3)
  tokens = rng.integers(0, C.vocab, (rows, LENGTH)).astype(np.int32)
  mask, position = np.zeros((rows, LENGTH), np.float32), np.zeros(rows, np.int32)
  for b in range(rows):
    start, count = rng.integers(2, 6), rng.integers(1, 11) if b else 1
    mask[b, start:start + count] = 1
    tokens[b, start + count:] = 0
    position[b] = start + rng.integers(0, count) - 1
  near = np.asarray(update.batch_logprobs(C, PARAMS["policy"], empty(tokens, mask), temperature=1.0, compute=COMPUTE))
  noisy = lambda scale: np.where(mask > 0, near + rng.normal(0, scale, mask.shape), 0).astype(np.float32)
  reward = rng.integers(0, 2, rows).astype(np.float32)
  return empty(tokens, mask).replace(
    sampler_logprobs=noisy(0.1), old_logprobs=noisy(0.3), ref_logprobs=noisy(0.5), rewards=reward,
    advantages=np.where(reward > 0, 1.2, -0.8).astype(np.float32), head_position=position[:, None],
    head_weight=(np.arange(rows) % 3 > 0).astype(np.float32)[:, None])


def empty(tokens, mask):
  grid, row = np.zeros(tokens.shape, np.float32), np.zeros(len(tokens), np.float32)
  return Batch(tokens=tokens, response_mask=mask, sampler_logprobs=grid, old_logprobs=grid, ref_logprobs=grid,
               advantages=row, rewards=row, head_position=np.zeros((len(tokens), 1), np.int32), head_weight=row[:, None])


BATCH = make_batch()


def totals(batch):
  return {"tokens": jnp.sum(batch.response_mask), "head": jnp.sum(batch.head_weight),
          "rows": jnp.sum(jnp.any(batch.response_mask > 0, axis=1).astype(jnp.float32))}


@functools.partial(jax.jit, static_argnums=(2, 3))
def micro_loss(params, batch, loss, temperature):
  """The loss of a batch that is one micro-batch."""
  return update.micro_loss(C, params, batch, totals(batch), loss, temperature, COMPUTE)


def take(batch, index, pad=0):
  """The rows `index` of a batch and `pad` empty rows after them."""
  return jax.tree.map(lambda x: np.pad(np.asarray(x)[list(index)], ((0, pad),) + ((0, 0),) * (x.ndim - 1)), batch)


def state_of(params, optimizer=SGD):
  """A fresh state on copies: `apply` takes over the buffers that it is given."""
  params = jax.tree.map(jnp.copy, params)
  return TrainState(params, jax.jit(optimizer.init)(params), Calibration.empty(4), jnp.zeros((), jnp.int32))


def gradients(batches, loss=GRPO, temperature=1.0, compute=COMPUTE, params=None):
  """What `step` takes as the gradient of a whole batch, and its metrics."""
  params = PARAMS if params is None else params
  state, metrics = update.step(C, state_of(params), batches, loss, temperature, compute, SGD)
  return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), params, state.params), jax.device_get(metrics)


def same(a, b, atol):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4)


@pytest.fixture(scope="module")
def whole():
  """Gradient and metrics of the batch in one piece, with every term of the loss in play."""
  return gradients([BATCH], loss=KL)


KL = dataclasses.replace(DAPO, kl_weight=0.05)  # averages over tokens, as the metrics do

# ---- log-probs


def plain_logprobs(params, hidden, tokens, temperature):
  """Every logit at once."""
  logprobs = jax.nn.log_softmax(transformer.unembed(params, hidden[:, :-1]) / temperature, axis=-1)
  chosen = jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=2)[:, :, 0]
  return jnp.pad(chosen, ((0, 0), (1, 0))), jnp.pad(-jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1), ((0, 0), (1, 0)))


@pytest.mark.parametrize("temperature, chunk", [(1.0, 1), (0.7, 6), (1.0, 8), (1.3, 20), (1.0, 10**9)])
def test_chunked_logprobs_are_log_softmax_in_value_and_gradient(temperature, chunk):
  """3 rows of 13 tokens, a long, a short and an empty response, in chunks of 1, 2, 4 and all positions: most do not divide."""
  hidden = jax.random.normal(jax.random.key(5), (3, 13, C.width))
  tokens = jax.random.randint(jax.random.key(6), (3, 13), 0, C.vocab)
  weight = jax.random.normal(jax.random.key(7), (3, 13))
  mask = np.zeros((3, 13), np.float32)
  mask[0, 1:], mask[1, 6:11] = 1, 1
  params = {"embed": PARAMS["policy"]["embed"]}

  def slopes(f):
    value = lambda params, hidden: (jnp.sum(weight * f(params, hidden)[0]), f(params, hidden))
    return jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(params, hidden)

  (_, (got, entropy)), got_slopes = slopes(lambda p, h: update.token_logprobs(p, h, tokens, mask, temperature, chunk))
  (_, (want, want_entropy)), want_slopes = slopes(lambda p, h: [x * mask for x in plain_logprobs(p, h, tokens, temperature)])
  np.testing.assert_allclose(got, want, atol=2e-6, rtol=1e-5)
  np.testing.assert_allclose(entropy, want_entropy, atol=2e-6, rtol=1e-5)
  same(got_slopes, want_slopes, 2e-6)
  assert np.all(np.asarray(got)[mask == 0] == 0) and np.all(np.asarray(got)[mask > 0] < 0)
  assert np.any(np.asarray(want_slopes[0]["embed"]) != 0)


def test_entropy_sends_no_gradient():
  hidden, tokens, mask = jnp.ones((1, 5, C.width)), jnp.zeros((1, 5), jnp.int32), jnp.ones((1, 5)).at[0, 0].set(0.0)
  slope = jax.grad(lambda h: jnp.sum(update.token_logprobs(PARAMS["policy"], h, tokens, mask, 1.0, 2)[1]))(hidden)
  np.testing.assert_array_equal(slope, 0.0)


def test_batch_logprobs_are_those_of_the_response_and_zero_elsewhere():
  hidden = np.asarray(hidden_states(BATCH))
  out = np.asarray(update.batch_logprobs(C, PARAMS["policy"], BATCH, temperature=0.8, compute=COMPUTE))
  want = np.asarray(plain_logprobs(PARAMS["policy"], hidden, BATCH.tokens, 0.8)[0])
  np.testing.assert_allclose(out, np.where(BATCH.response_mask > 0, want, 0), atol=1e-5)


def test_fill_logprobs_keeps_old_and_reference_apart():
  other = jax.tree.map(lambda x: x * 0.5, PARAMS["policy"])
  ask = lambda params: update.batch_logprobs(C, params, BATCH, temperature=1.0, compute=COMPUTE)
  own, others = np.asarray(ask(PARAMS["policy"])), np.asarray(ask(other))
  assert np.abs(own - others).max() > 0.1
  blank = BATCH.replace(old_logprobs=np.zeros_like(own), ref_logprobs=np.zeros_like(own))
  for reference, ref in ((None, np.zeros_like(own)), (other, others)):
    filled, = update.fill_logprobs(C, PARAMS["policy"], reference, [blank], 1.0, COMPUTE)
    np.testing.assert_array_equal(filled.old_logprobs, own)
    np.testing.assert_array_equal(filled.ref_logprobs, ref)


# ---- the loss is a loop


@jax.jit
def hidden_states(batch):
  positions = transformer.default_positions(batch.tokens)
  return transformer.forward(C, PARAMS["policy"], batch.tokens, positions, causal_attention("xla"))[0]


def head_by_hand(hidden):
  """The quality head in NumPy: unit root-mean-square, one hidden layer with (tanh) GELU."""
  w = {k: np.asarray(v, np.float64) for k, v in PARAMS["head"].items()}
  x = hidden / math.sqrt(np.mean(hidden**2) + 1e-6) @ w["w1"] + w["b1"]
  return float(0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) @ w["w2"] + w["b2"])


def loop(batch, loss: LossConfig, temperature):
  """The loss and its metrics, token by token, in double precision."""
  hidden = np.asarray(hidden_states(batch), np.float64)
  logits = hidden @ np.asarray(PARAMS["policy"]["embed"], np.float64).T / temperature
  mask, count = np.asarray(batch.response_mask), batch.response_mask.sum()
  out = dict.fromkeys(update.METRICS, 0.0)
  weighted_kl = 0.0
  for b, s in zip(*np.nonzero(mask), strict=True):
    row = logits[b, s - 1] - logits[b, s - 1].max()
    probs = np.exp(row) / np.exp(row).sum()
    logprob, a = math.log(probs[batch.tokens[b, s]]), float(batch.advantages[b])
    ratio = math.exp(logprob - batch.old_logprobs[b, s])
    inside = min(max(ratio, 1 - loss.clip_low), 1 + loss.clip_high)
    weight = 1 / count if loss.aggregate == "token" else 1 / mask[b].sum() / len(mask)
    out["policy_loss"] -= weight * min(ratio * a, inside * a)
    out["clip_frac"] += (inside * a < ratio * a) / count
    out["entropy"] -= np.sum(probs * np.log(probs)) / count
    out["logprob_gap"] += abs(logprob - batch.sampler_logprobs[b, s]) / count
    d = batch.ref_logprobs[b, s] - logprob
    if loss.kl_weight:
      out["kl"] += (math.exp(d) - d - 1) / count
      weighted_kl += weight * (math.exp(d) - d - 1)
  for b in np.flatnonzero(batch.head_weight[:, 0]):
    p = 1 / (1 + math.exp(-head_by_hand(hidden[b, batch.head_position[b, 0]])))
    out["head_loss"] -= math.log(p if batch.rewards[b] else 1 - p) / batch.head_weight.sum()
  return out["policy_loss"] + loss.kl_weight * weighted_kl + loss.head_weight * out["head_loss"], out


@pytest.mark.parametrize("loss, temperature", [
  (GRPO, 1.0), (DAPO, 1.0), (dataclasses.replace(GRPO, kl_weight=0.3, head_weight=0.5), 1.0),
  (dataclasses.replace(DAPO, kl_weight=0.1), 0.6), (dataclasses.replace(GRPO, clip_low=0.05, clip_high=0.4), 1.7)])
def test_micro_loss_is_the_loop(loss, temperature):
  total, metrics = micro_loss(PARAMS, BATCH, loss, temperature)
  expected, by_hand = loop(BATCH, loss, temperature)
  assert float(total) == pytest.approx(expected, rel=2e-4)
  assert set(metrics) == set(by_hand)
  for name, value in by_hand.items():
    assert float(metrics[name]) == pytest.approx(value, rel=2e-4, abs=1e-6), name
  assert 0.1 < by_hand["clip_frac"] < 0.9 and by_hand["head_loss"] > 0.05


def test_the_batch_is_a_fair_one():
  lengths = BATCH.response_mask.sum(axis=1)
  assert lengths.min() == 1 and lengths.max() >= 8 and 0 < BATCH.rewards.sum() < ROWS
  assert 0 < BATCH.head_weight.sum() < ROWS


# ---- how it is cut does not matter


@pytest.mark.parametrize("cut", [[(range(4), 0), (range(4, 8), 0)], [([3, 1, 4, 0, 5], 3), ([2, 6, 7], 5)],
                                 [([7, 2, 5], 1), ([0], 3), ([6, 1, 3, 4], 0)]],
                         ids=["halves", "padding rows", "shuffled, part-filled"])
def test_micro_batches_do_not_change_the_gradient(whole, cut):
  grads, metrics = gradients([take(BATCH, rows, pad) for rows, pad in cut], loss=KL)
  same(grads, whole[0], 1e-5)
  for name, value in whole[1].items():
    assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name


def test_a_mean_over_rows_counts_rows_that_are_there():
  """GRPO divides by the number of rows: the 8 of the batch, not the 16 of two part-filled micro-batches."""
  cut = [take(BATCH, [3, 1, 4, 0, 5], 3), take(BATCH, [2, 6, 7], 5)]
  assert gradients(cut)[1]["policy_loss"] == pytest.approx(loop(BATCH, GRPO, 1.0)[1]["policy_loss"], rel=2e-4)


def test_shorter_rows_do_not_change_the_gradient(whole):
  """Rows of different lengths in one step, as `pack` makes them: columns of padding cut away."""
  short = [b for b in range(ROWS) if not BATCH.response_mask[b, 10:].any()]
  long = [b for b in range(ROWS) if b not in short]
  assert short and long
  cut = jax.tree.map(lambda x: x[:, :10] if x.ndim == 2 else x, take(BATCH, short, ROWS - len(short)))
  grads, _ = gradients([cut, take(BATCH, long, ROWS - len(long))], loss=KL)
  same(grads, whole[0], 1e-5)


def test_remat_and_chunks_do_not_change_the_gradient(whole):
  grads, _ = gradients([BATCH], loss=KL, compute=update.Compute("float32", "xla", remat="full", chunk_tokens=10**6))
  same(grads, whole[0], 1e-5)


def test_gradient_is_the_slope_of_the_loss(whole):
  """Walking a little along the gradient of the policy (of the head) changes its loss by the squared norm a unit."""
  kl = KL.kl_weight
  for part, term in (("policy", lambda m: m["policy_loss"] + kl * m["kl"]), ("head", lambda m: m["head_loss"])):
    grads = whole[0][part]
    norm = math.sqrt(sum(float(np.sum(g**2)) for g in jax.tree.leaves(grads)))
    ends = []
    for far in (1e-4 / norm, -1e-4 / norm):
      moved = jax.tree.map(lambda p, g, far=far: p + far * g, PARAMS[part], grads)
      ends.append(float(term(micro_loss(PARAMS | {part: moved}, BATCH, KL, 1.0)[1])))
    assert (ends[0] - ends[1]) / 2e-4 == pytest.approx(norm, rel=0.02), part


# ---- policy and head


def test_head_loss_does_not_reach_the_policy():
  still = BATCH.replace(advantages=np.zeros(ROWS, np.float32))
  grads, metrics = gradients([still])
  assert all(np.all(x == 0) for x in jax.tree.leaves(grads["policy"])) and metrics["grad_norm"] == 0
  assert all(np.any(x != 0) for x in jax.tree.leaves(grads["head"])) and metrics["head_loss"] > 0


def test_policy_loss_does_not_reach_the_head():
  grads, metrics = gradients([BATCH.replace(head_weight=np.zeros((ROWS, 1), np.float32))], loss=KL)
  assert all(np.all(x == 0) for x in jax.tree.leaves(grads["head"])) and metrics["head_loss"] == 0
  assert all(np.any(x != 0) for x in jax.tree.leaves(grads["policy"]))


def test_grad_norm_is_the_policy_gradients(whole):
  squares = sum(float(np.sum(np.square(x, dtype=np.float64))) for x in jax.tree.leaves(whole[0]["policy"]))
  assert whole[1]["grad_norm"] == pytest.approx(math.sqrt(squares), rel=1e-3)


# ---- the step


def test_learning_rate_warms_up():
  assert [float(update.learning_rate(8.0, 4, s)) for s in range(6)] == [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]
  assert [float(update.learning_rate(8.0, warmup, 0)) for warmup in (0, 1)] == [8.0, 8.0]


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
  optimizer = update.make_optimizer(lr, head_lr, 4, clip, decay, b1, b2)
  state, seen = state_of(PARAMS, optimizer), []
  for _ in range(2):
    grads, metrics = gradients([BATCH], params=jax.device_get(state.params))
    assert metrics["grad_norm"] > clip
    seen.append((grads["head"], jax.tree.map(lambda x, n=metrics["grad_norm"]: x * (clip / n), grads["policy"])))
    state, _ = update.step(C, state, [BATCH], GRPO, 1.0, COMPUTE, optimizer)
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
  ask = lambda params: np.asarray(update.batch_logprobs(C, params["policy"], BATCH, temperature=1.0, compute=COMPUTE))
  before = ask(PARAMS)
  fresh = BATCH.replace(old_logprobs=before)
  state, _ = update.step(C, state_of(PARAMS), [fresh], GRPO, 1.0, COMPUTE, optax.sgd(1e-4))
  rise = (ask(state.params) - before).sum(axis=1) / BATCH.response_mask.sum(axis=1)
  good = BATCH.advantages > 0
  assert rise[good].mean() > rise[~good].mean() + 1e-5 and np.sum(rise * BATCH.advantages) > 0


def test_without_survivors_nothing_is_learnt():
  optimizer = optax.adam(1e-2)
  state, _ = update.step(C, state_of(PARAMS, optimizer), [BATCH], GRPO, 1.0, COMPUTE, optimizer)  # Adam has momentum now
  before = jax.device_get(state)
  after, metrics = update.step(C, state, [], GRPO, 1.0, COMPUTE, optimizer)
  assert int(after.step) == int(before.step) + 1 and float(metrics["grad_norm"]) == 0.0
  jax.tree.map(np.testing.assert_array_equal, (after.params, after.opt_state), (before.params, before.opt_state))


# ---- meshes


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 1, 8)])
def test_sharded_is_unsharded(whole, shape):
  """Same loss terms and gradients on eight devices as on one, up to float32 summation order."""
  mesh = sharding.make_mesh(*shape)
  chunks = dataclasses.replace(COMPUTE, chunk_tokens=2 * ROWS // (shape[0] * shape[1]))  # 2 positions at once, as on one device
  with jax.set_mesh(mesh):
    target = sharding.shardings(transformer.logical_axes(C), PARAMS["policy"], mesh, sharding.TRAIN)
    params = {"policy": jax.device_put(PARAMS["policy"], target),
              "head": jax.device_put(PARAMS["head"], sharding.replicated(mesh))}
    batches = [jax.device_put(BATCH, sharding.rows(mesh))]
    sums = update.zeros(C, params)[0]
    state, metrics = update.step(C, state_of(params), batches, KL, 1.0, chunks, SGD)
  on_a_device = lambda tree: [x.addressable_shards[0].data.shape for x in jax.tree.leaves(tree)]
  assert on_a_device(sums) == on_a_device(params)  # not whole everywhere
  grads = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), PARAMS, state.params)
  same(grads, whole[0], 1e-5)
  for name, value in whole[1].items():
    assert float(metrics[name]) == pytest.approx(value, rel=1e-4, abs=1e-6), name
  cut = lambda x: max(x.addressable_shards[0].data.shape) < max(x.shape)
  assert cut(params["policy"]["layers"]["up"]) == (shape != (8, 1, 1))
  assert state.params["policy"]["layers"]["up"].sharding.is_equivalent_to(target["layers"]["up"], 3)


@pytest.mark.parametrize("tied", [False, True])
def test_chunks_gather_the_unembedding_once(tied):
  """With fsdp a device holds a part of it: what the update gathers must not grow with the number of chunks."""
  c, mesh = dataclasses.replace(C, tied=tied), sharding.make_mesh(1, 8, 1)
  with jax.set_mesh(mesh):
    place = lambda tree, at: jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, at)
    weights = transformer.abstract_params(c)
    params = {"policy": place(weights, sharding.shardings(transformer.logical_axes(c), weights, mesh, sharding.TRAIN)),
              "head": place(PARAMS["head"], jax.tree.map(lambda _: sharding.replicated(mesh), PARAMS["head"]))}
    batch = place(BATCH, jax.tree.map(lambda _: sharding.rows(mesh), BATCH))
    metrics = dict.fromkeys(update.METRICS, jax.ShapeDtypeStruct((), jnp.float32))

    def gathered(chunk_tokens):
      compute = dataclasses.replace(COMPUTE, chunk_tokens=chunk_tokens)
      lowered = update.accumulate.lower(c, params, params, metrics, batch, totals(BATCH), loss=KL, temperature=1.0,
                                        compute=compute)
      module = hlo.parse(lowered.compile().as_text())
      return hlo.collective_counts(module, hlo.trips(module))["all-gather"]

    assert gathered(1) == gathered(10**6)


@pytest.mark.parametrize("shape, positions", [((1, 1, 1), 2), ((1, 1, 8), 2), ((2, 2, 2), 8), ((8, 1, 1), 16)])
def test_a_chunk_counts_the_tokens_of_a_chip(monkeypatch, shape, positions):
  seen, real = [], transformer.unembed
  monkeypatch.setattr(transformer, "unembed", lambda params, hidden: seen.append(hidden.shape) or real(params, hidden))
  with jax.set_mesh(sharding.make_mesh(*shape)):
    jax.eval_shape(lambda h, t, m: update.token_logprobs(PARAMS["policy"], h, t, m, 1.0, 2 * ROWS),
                   jnp.zeros((ROWS, LENGTH, C.width)), BATCH.tokens, BATCH.response_mask)
  assert seen == [(ROWS, positions, C.width)]


def test_chunks_cover_the_row_and_little_more():
  for length in (1, 7, 13, 16, 1376, 2736, 4096):
    for most in (0, 1, 2, 5, 100, 682, 2048, 10**6):
      size, chunks = update._chunks(length, most)
      assert size <= max(1, most, 8) and (chunks - 1) * size < length <= chunks * size < length + max(8 * chunks, size)
  assert update._chunks(2736, 2048) == (1368, 2) and update._chunks(1280, 341) == (256, 5)


def test_head_reads_the_hidden_state_at_its_position():
  """Of two positions in the same row, the head's loss follows the one that is named."""
  hidden = np.asarray(hidden_states(BATCH))
  only = BATCH.replace(head_weight=np.eye(ROWS, dtype=np.float32)[4][:, None])
  for position in (1, 7):
    _, metrics = micro_loss(PARAMS, only.replace(head_position=np.full((ROWS, 1), position, np.int32)), GRPO, 1.0)
    logit = float(quality_logit(PARAMS["head"], Features(hidden[4:5, position]))[0])
    expected = math.log1p(math.exp(-logit if BATCH.rewards[4] else logit))
    assert float(metrics["head_loss"]) == pytest.approx(expected, rel=1e-4)
