"""What the tests of the update share: a small policy, a batch and examples for the head, and gradients read off a step."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax

from arrol_jax.learning import batching, update
from arrol_jax.learning.batching import BinShape
from arrol_jax.learning.losses import DAPO, GRPO
from arrol_jax.models import transformer
from arrol_jax.models.attention import causal_attention
from arrol_jax.models.transformer import PolicyConfig
from arrol_jax.prune import Calibration
from arrol_jax.pruning.head import Features, init_head
from arrol_jax.types import Examples, Rollout, TrainState

# Vocabulary, heads and feed-forward width divide by 8: on a mesh of (1, 1, 8) they really are cut.
C = PolicyConfig("qwen3", 32, 32, 2, 8, 2, 8, 40, qk_norm=True)
ROWS, LENGTH = 8, 16
GROUPS = ((0, 1, 2), (3, 4), (5, 6, 7))  # rows with one prompt
WHOLE = BinShape(64, ROWS, LENGTH)  # holds all rows
COMPUTE = update.Compute("float32", "xla", remat="none", chunk_tokens=24)
SGD = optax.sgd(1.0)  # with this optimizer a step's change is minus the gradient


KL = dataclasses.replace(DAPO, kl_weight=0.05)  # averages over tokens, as the metrics do


@jax.jit
def make_params():
  """Weights three times their usual size, so that log-probs differ; a head that has an opinion."""
  weights = jax.tree.map(lambda x: x * 3.0, transformer.init_params(C, jax.random.key(0)))
  head = init_head(C.width, 16, jax.random.key(1))
  head["w2"] = jax.random.normal(jax.random.key(2), head["w2"].shape)
  return {"policy": weights, "head": head}


PARAMS = make_params()


def make_rows():
  """Eight padded rows [8,16] of three groups: prompts of 2 to 5 tokens, responses of 1 to 10; old, reference and sampler
  log-probs near the policy's; and what they teach the head: the state at a place in each response, two rows of three counting."""
  rng = np.random.default_rng(3)
  tokens, mask, starts = np.zeros((ROWS, LENGTH), np.int32), np.zeros((ROWS, LENGTH), np.float32), []
  for group in GROUPS:
    prompt = rng.integers(0, C.vocab, rng.integers(2, 6))
    for b in group:
      start, count = len(prompt), rng.integers(1, 11) if b else 1
      tokens[b, :start + count] = np.r_[prompt, rng.integers(0, C.vocab, count)]
      mask[b, start:start + count] = 1
      starts.append(start)
  hidden = jax.jit(lambda tokens: hidden_states(PARAMS["policy"], tokens))(tokens)
  near = np.asarray(plain_logprobs(PARAMS["policy"], hidden, tokens, 1.0)[0])
  noisy = lambda scale: np.where(mask > 0, near + rng.normal(0, scale, mask.shape), 0).astype(np.float32)
  reward = rng.integers(0, 2, ROWS).astype(np.float32)
  rows = SimpleNamespace(tokens=tokens, response_mask=mask, sampler_logprobs=noisy(0.1), old_logprobs=noisy(0.5),
                         ref_logprobs=noisy(0.5), advantages=np.where(reward > 0, 1.2, -0.8).astype(np.float32), starts=starts,
                         hidden=np.asarray(hidden, np.float64), logprobs=np.where(mask > 0, near, 0))
  position = [start + rng.integers(0, mask[b].sum()) - 1 for b, start in enumerate(starts)]
  read = np.asarray(hidden)[np.arange(ROWS), position]
  return rows, Examples(Features(read), reward, (np.arange(ROWS) % 3 > 0).astype(np.float32))


def hidden_states(params, tokens):
  return transformer.forward(C, params, tokens, transformer.default_positions(tokens), causal_attention("xla"))[0]


def plain_logprobs(params, hidden, tokens, temperature):
  """Every logit at once."""
  logprobs = jax.nn.log_softmax(transformer.unembed(params, hidden[:, :-1]) / temperature, axis=-1)
  chosen = jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=2)[:, :, 0]
  return jnp.pad(chosen, ((0, 0), (1, 0))), jnp.pad(-jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1), ((0, 0), (1, 0)))


def batch_of(*bins, shape=WHOLE):
  """A micro-batch of these bins, each a list of rows' numbers, members of a group one after the other; and which row of TABLE
  stands where, i32[B], -1 for none."""
  rollouts, order, filled = [], [], []
  for b in range(ROWS):
    start, end = TABLE.starts[b], TABLE.starts[b] + int(TABLE.response_mask[b].sum())
    group = next(g for g, members in enumerate(GROUPS) if b in members)
    rollouts.append(Rollout(b, group, TABLE.tokens[b, :start], TABLE.tokens[b, start:end], TABLE.sampler_logprobs[b, start:end]))
  for rows in bins:
    filled.append(batching._Bin(shape))
    assert all(filled[-1].takes(b, rollouts[b]) for b in rows)
    seated = [b for members in filled[-1].groups.values() for b in members]
    order += seated + [-1] * (shape.rows - len(seated))
  batch = batching._micro_batch(rollouts, np.stack([TABLE.advantages, np.ones(ROWS)]), filled, shape, len(bins))
  by_row = lambda x: np.pad(x, ((0, 1), (0, 0)))[order, :shape.length]
  return batch.replace(old_logprobs=by_row(TABLE.old_logprobs), ref_logprobs=by_row(TABLE.ref_logprobs)), np.array(order)


TABLE, EXAMPLES = make_rows()
BATCH, ORDER = batch_of(range(ROWS))
NO_EXAMPLES = EXAMPLES.replace(weight=np.zeros(ROWS, np.float32))


def scalars(rows=ROWS, temperature=1.0):
  """What the update is told of a batch of all rows, or of none."""
  tokens = TABLE.response_mask.sum() * (rows > 0)
  return {k: np.float32(v) for k, v in dict(tokens=tokens, rows=rows, trained=tokens, temperature=temperature).items()}


def config(loss, compute=COMPUTE, fresh=False):
  return update.UpdateConfig(C, loss, compute, fresh)


micro_loss = jax.jit(update.micro_loss, static_argnums=0)


def state_of(params, optimizer=SGD):
  """A fresh state on copies: `apply` takes over the buffers that it is given."""
  params = jax.tree.map(jnp.copy, params)
  return TrainState(params, jax.jit(optimizer.init)(params), Calibration.empty(4), jnp.zeros((), jnp.int32))


def gradients(batches, u=None, examples=EXAMPLES, params=None):
  """What `step` takes as the gradient of a whole batch, and its metrics."""
  params, told = PARAMS if params is None else params, scalars() if batches else scalars(rows=0)
  state, metrics = update.step(u or config(GRPO), state_of(params), batches, examples, told, SGD)
  return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), params, state.params), jax.device_get(metrics)


def same(a, b, atol):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4)
