"""Bins and rows: a shared prompt is computed once, rows without an advantage not at all, and neither changes the gradient."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from arrol_jax.engine.sampling import Sampling
from arrol_jax.learning import batching, losses, update
from arrol_jax.learning.batching import PackShape, pack
from arrol_jax.learning.losses import DAPO, DR_GRPO, GRPO, GSPO
from arrol_jax.models import sharding, sharing, transformer
from arrol_jax.models.attention import causal_attention
from arrol_jax.models.transformer import PolicyConfig
from arrol_jax.prune import Calibration
from arrol_jax.pruning.head import init_head
from arrol_jax.pruning.rule import PruneRule
from arrol_jax.step import Clock, RolledOut, StepConfig, TrainingStep
from arrol_jax.types import Rollout, TrainState

C = PolicyConfig("qwen3", 32, 32, 2, 8, 2, 8, 40, qk_norm=True)
PARAMS = jax.jit(lambda k: jax.tree.map(lambda x: x * 3.0, transformer.init_params(C, k)))(jax.random.key(0))
COMPUTE = update.Compute("float32", "xla", "none", 24)


def rollouts(groups=5, size=4, seed=0):
  """Groups with prompts of 2 to 6 tokens and responses of 1 to 12; the first group is all right, the second all wrong."""
  rng = np.random.default_rng(seed)
  out = []
  for p in range(groups):
    prompt = rng.integers(1, C.vocab, rng.integers(2, 7)).astype(np.int32)
    for g in range(size):
      n = int(rng.integers(1, 13))
      reward = {0: 1.0, 1: 0.0}.get(p, float(g < 1 + p % 3))
      out.append(Rollout(p * size + g, p, prompt, rng.integers(0, C.vocab, n).astype(np.int32),
                         rng.normal(-2, 1, n).astype(np.float32), stopped=True, reward=reward))
  return out


def plain(params, some, loss, temperature, advantages, old=None):
  """The loss as one would write it down: a padded row a rollout, its prompt in each, all rows, nothing skipped. old: log-probs
  under the policy that the batch began with, where it is not this one."""
  length = max(len(r.prompt_tokens) + len(r.tokens) for r in some)
  tokens, mask, sampled = (np.zeros((len(some), length), t) for t in (np.int32, np.float32, np.float32))
  for i, r in enumerate(some):
    start, end = len(r.prompt_tokens), len(r.prompt_tokens) + len(r.tokens)
    tokens[i, :end], mask[i, start:end], sampled[i, start:end] = np.concatenate([r.prompt_tokens, r.tokens]), 1, r.logprobs
  hidden, _ = transformer.forward(C, params, tokens, transformer.default_positions(tokens), causal_attention("xla"))
  logits = jax.nn.log_softmax(transformer.unembed(params, hidden[:, :-1]) / temperature, axis=-1)
  logprobs = jnp.pad(jnp.take_along_axis(logits, tokens[:, 1:, None], axis=2)[:, :, 0], ((0, 0), (1, 0))) * mask
  weight = losses.token_weights(mask, loss.aggregate, mask.sum(), float(len(some)), loss.longest)
  old = jax.lax.stop_gradient(logprobs) if old is None else old[:, :length]
  term, _ = losses.surrogate(logprobs, old, advantages, mask, clip_low=loss.clip_low,
                             clip_high=loss.clip_high, ratio=loss.ratio)
  correction = losses.correction_weights(old, sampled, mask, loss.correction, loss.correction_cap)
  return jnp.sum(weight * correction * term), logprobs


def learned(some, shape, mesh, loss, temperature=1.0, compute=COMPUTE):
  """Sum of the micro-batches' gradients, and metrics."""
  u = update.UpdateConfig(C, loss, compute)
  with jax.set_mesh(mesh):
    batches, counts = pack(some, shape, mesh, loss)
    params = jax.device_put(PARAMS, sharding.shardings(transformer.logical_axes(C), PARAMS, mesh, sharding.TRAIN))
    sums, scalars = update.zeros(C, params), {k: np.float32(v) for k, v in (counts | {"temperature": temperature}).items()}
    for batch in batches:
      sums = update.accumulate(u, params, *sums, batch, scalars)
  return jax.device_get(sums), batches, counts


@pytest.mark.parametrize("loss", [GRPO, DAPO, dataclasses.replace(DR_GRPO, longest=12), GSPO,
                                  dataclasses.replace(GRPO, correction="truncate"),
                                  dataclasses.replace(GRPO, correction="mask", correction_cap=3.0)],
                         ids=["grpo", "dapo", "dr_grpo", "gspo", "truncate", "mask"])
def test_shared_prompts_and_dropped_rows_give_the_plain_gradient(mesh, loss):
  loss, some = dataclasses.replace(loss, overlong=0.0), rollouts()
  advantages = losses.group_advantages(np.array([r.reward for r in some]), np.array([r.prompt for r in some]), loss.normalize_std)
  value, want = jax.value_and_grad(lambda p: plain(p, some, loss, 0.8, advantages)[0])(PARAMS)
  (grads, metrics), batches, counts = learned(some, PackShape(18, 64, 1), mesh, loss, 0.8)
  assert len(batches) > 1 and counts == {"tokens": sum(len(r.tokens) for r in some), "rows": 20,
                                         "trained": sum(len(r.tokens) for r in some[8:]), "rows_trained": 12}
  assert metrics["policy_loss"] == pytest.approx(float(value), abs=2e-6) and metrics["clip_frac"] == 0
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=2e-4), grads, jax.device_get(want))


def test_a_shared_prompt_stands_once_and_no_padding_between(mesh):
  some = rollouts()
  batches, _ = pack(some, PackShape(18, 400, 1), mesh)
  batch, = batches
  unique = sum(len(g[0].prompt_tokens) - 1 + sum(1 + len(r.tokens) for r in g)
               for g in (some[4 * p:4 * p + 4] for p in range(2, 5)))
  assert int(batch.used[0]) == unique < sum(len(r.prompt_tokens) + len(r.tokens) for r in some[8:])


def test_log_probs_of_rows_are_those_of_a_plain_forward(mesh):
  some = rollouts()
  loss = dataclasses.replace(GRPO, kl_weight=0.1)  # so that no row is left out
  _, want = plain(PARAMS, some, loss, 0.7, np.zeros(20, np.float32))
  u, found = update.UpdateConfig(C, loss, COMPUTE), {}
  batches, _ = pack(some, PackShape(18, 64, 1), mesh, loss)
  for batch in batches:
    got, mask = update.batch_logprobs(u, PARAMS, batch, np.float32(0.7)), np.asarray(batch.response_mask)
    tokens = np.stack([t[at] for t, at in zip(np.asarray(batch.tokens), np.asarray(batch.layout.take))]).reshape(mask.shape)
    for row in np.flatnonzero(mask.any(1)):
      end = np.flatnonzero(mask[row])[-1] + 1
      found[tuple(tokens[row, :end])] = np.asarray(got)[row][mask[row] > 0]
  for r, row in zip(some, np.asarray(want), strict=True):
    start, end = len(r.prompt_tokens), len(r.prompt_tokens) + len(r.tokens)
    np.testing.assert_allclose(found[tuple(np.concatenate([r.prompt_tokens, r.tokens]))], row[start:end], atol=2e-5)


def test_the_kernel_gathers_and_sums_as_xla_does():
  """Vectors of a width that is no power of two, some of nothing, some the sum of several that stand a stride apart."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 24, 3, 8)), jnp.float32)
  index, count = rng.integers(-1, 6, (2, 10)).astype(np.int32), rng.integers(0, 4, (2, 10)).astype(np.int32)
  want = np.zeros((2, 10, 3, 8), np.float32)
  for i, n in np.ndindex(2, 10):
    if index[i, n] >= 0:
      want[i, n] = sum((np.asarray(x)[i, index[i, n] + 6 * j] for j in range(count[i, n])), np.zeros((3, 8)))
  np.testing.assert_allclose(sharing._gather_kernel(x, index, count, 6, interpret=True), want, atol=1e-6)
  np.testing.assert_allclose(sharing.gather(x, index, count, 6), want, atol=1e-6)


# ---- several optimizer steps a batch


def after_steps(mesh, loss, epochs=2, minibatches=2, rate=0.005):
  """Policy parameters after a TrainingStep's learning from `rollouts()`, and its metrics."""
  sgd = optax.sgd(rate)
  params = jax.tree.map(jnp.copy, {"policy": PARAMS, "head": init_head(C.width, 4, jax.random.key(1))})
  one_step = epochs * minibatches == 1
  config = StepConfig("float32", Sampling(), 1.0, PruneRule((4,)), update.UpdateConfig(C, loss, COMPUTE, one_step),
                      PackShape(18, 64, 1), sgd, epochs=epochs, minibatches=minibatches, seed=3)
  one = TrainingStep(SimpleNamespace(config=C, mesh=mesh), config)
  some = rollouts()
  with jax.set_mesh(mesh):
    state = TrainState(params, sgd.init(params), Calibration.empty(4), jnp.int32(7))
    state, metrics = one.learn(state, RolledOut(some, some), Clock())
  return jax.device_get(state.params["policy"]), metrics


def by_hand(loss, epochs=2, minibatches=2, rate=0.005):
  """The same as a loop: groups dealt to minibatches by (seed, step), in an order by (seed, step, epoch); old log-probs are those
  before the first step; plain gradient descent."""
  some, params = rollouts(), PARAMS
  parts = batching.minibatches(some, minibatches, (3, 7))
  advantages = [losses.group_advantages(np.array([r.reward for r in p]), np.array([r.prompt for r in p]), loss.normalize_std)
                for p in parts]
  old = [jax.lax.stop_gradient(plain(params, p, loss, 1.0, a)[1]) for p, a in zip(parts, advantages, strict=True)]
  for epoch in range(epochs):
    for i in np.random.default_rng((3, 7, epoch)).permutation(minibatches) if minibatches > 1 else (0,):
      grads = jax.grad(lambda p, i=i: plain(p, parts[i], loss, 1.0, advantages[i], old[i])[0])(params)
      params = jax.tree.map(lambda x, g: np.asarray(x) - rate * np.asarray(g), params, grads)
  return params


def same_tree(a, b, atol=1e-5):
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=2e-3), a, b)


def apart(a, b):
  return max(float(np.max(np.abs(x - y))) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


TIGHT = dataclasses.replace(GRPO, clip_low=0.01, clip_high=0.01, overlong=0.0)
WIDE = dataclasses.replace(TIGHT, clip_low=0.99, clip_high=1e9)


@pytest.mark.parametrize("loss", [WIDE, TIGHT, dataclasses.replace(TIGHT, ratio="sequence"),
                                  dataclasses.replace(WIDE, correction="truncate", aggregate="token")],
                         ids=["unclipped", "clipped", "gspo", "truncated"])
def test_epochs_and_minibatches_are_a_plain_loop(mesh, loss):
  got, metrics = after_steps(mesh, loss)
  same_tree(got, by_hand(loss))
  assert (metrics["clip_frac"] > 0) == (loss.clip_low == 0.01) and metrics["rows_trained"] == 12


def test_clips_and_gspo_change_the_gradient_only_after_the_first_step(mesh):
  sequence = lambda loss: dataclasses.replace(loss, ratio="sequence")
  once = [after_steps(mesh, loss, 1, 1)[0] for loss in (WIDE, TIGHT, sequence(TIGHT))]
  assert apart(once[0], once[1]) == 0.0 and apart(once[0], once[2]) < 1e-6
  twice = [after_steps(mesh, loss)[0] for loss in (WIDE, TIGHT, sequence(WIDE))]
  assert apart(twice[0], twice[1]) > 2e-5 and apart(twice[0], twice[2]) > 2e-5
