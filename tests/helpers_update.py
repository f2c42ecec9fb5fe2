"""What the tests of the update share: a small policy, a batch and examples for the head, and gradients read off a step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from arrol_jax.learning import update
from arrol_jax.learning.losses import DAPO, GRPO
from arrol_jax.models import transformer
from arrol_jax.models.attention import causal_attention
from arrol_jax.models.transformer import PolicyConfig
from arrol_jax.prune import Calibration
from arrol_jax.pruning.head import Features, init_head
from arrol_jax.types import Batch, Examples, TrainState

# Vocabulary, heads and feed-forward width divide by 8: on a mesh of (1, 1, 8) they really are cut.
C = PolicyConfig("qwen3", 32, 32, 2, 8, 2, 8, 40, qk_norm=True)
ROWS, LENGTH = 8, 16
COMPUTE = update.Compute("float32", "xla", remat="none", chunk_tokens=24)  # 2 positions of 8 rows at once
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


@jax.jit
def hidden_states(batch):
  positions = transformer.default_positions(batch.tokens)
  return transformer.forward(C, PARAMS["policy"], batch.tokens, positions, causal_attention("xla"))[0]


def make_batch(rows=ROWS):
  """Prompts of 2 to 5 tokens, responses of 1 to 10, old, reference and sampler log-probs near the policy's; and what the
  rows teach the head: the state at a position of each response, two rows of three counting."""
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
  batch = empty(tokens, mask).replace(sampler_logprobs=noisy(0.1), old_logprobs=noisy(0.3), ref_logprobs=noisy(0.5),
                                      advantages=np.where(reward > 0, 1.2, -0.8).astype(np.float32))
  read = np.asarray(hidden_states(batch))[np.arange(rows), position]
  return batch, Examples(Features(read), reward, (np.arange(rows) % 3 > 0).astype(np.float32))


def empty(tokens, mask):
  grid, row = np.zeros(tokens.shape, np.float32), np.zeros(len(tokens), np.float32)
  return Batch(tokens=tokens, response_mask=mask, sampler_logprobs=grid, old_logprobs=grid, ref_logprobs=grid, advantages=row)


BATCH, EXAMPLES = make_batch()
NO_EXAMPLES = EXAMPLES.replace(weight=np.zeros(ROWS, np.float32))


def totals(batch):
  return {"tokens": jnp.sum(batch.response_mask), "rows": jnp.sum(jnp.any(batch.response_mask > 0, axis=1).astype(jnp.float32))}


@functools.partial(jax.jit, static_argnums=(2, 3))
def micro_loss(params, batch, loss, temperature):
  """The loss of a batch that is one micro-batch; params: the policy's."""
  return update.micro_loss(C, params, batch, totals(batch), loss, temperature, COMPUTE)


def take(batch, index, pad=0):
  """The rows `index` of a batch and `pad` empty rows after them."""
  return jax.tree.map(lambda x: np.pad(np.asarray(x)[list(index)], ((0, pad),) + ((0, 0),) * (x.ndim - 1)), batch)


def state_of(params, optimizer=SGD):
  """A fresh state on copies: `apply` takes over the buffers that it is given."""
  params = jax.tree.map(jnp.copy, params)
  return TrainState(params, jax.jit(optimizer.init)(params), Calibration.empty(4), jnp.zeros((), jnp.int32))


def gradients(batches, loss=GRPO, examples=EXAMPLES, compute=COMPUTE, params=None):
  """What `step` takes as the gradient of a whole batch, and its metrics."""
  params = PARAMS if params is None else params
  state, metrics = update.step(C, state_of(params), batches, examples, loss, 1.0, compute, SGD)
  return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), params, state.params), jax.device_get(metrics)


def same(a, b, atol):
  for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
    np.testing.assert_allclose(x, y, atol=atol, rtol=1e-4)


def plain_logprobs(params, hidden, tokens, temperature):
  """Every logit at once."""
  logprobs = jax.nn.log_softmax(transformer.unembed(params, hidden[:, :-1]) / temperature, axis=-1)
  chosen = jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=2)[:, :, 0]
  return jnp.pad(chosen, ((0, 0), (1, 0))), jnp.pad(-jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1), ((0, 0), (1, 0)))
