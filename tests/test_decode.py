"""Cached, segmented, fanned-out, gathered decoding gives what the plain full forward pass gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrol_jax.engine import programs
from arrol_jax.engine.sampling import Sampling, sample
from arrol_jax.models import transformer
from arrol_jax.models.attention import causal_attention
from arrol_jax.models.transformer import PolicyConfig, RopeScaling

SHAPES = {
  "qwen3": PolicyConfig("qwen3", 61, 48, 2, 4, 2, 20, 56, qk_norm=True, rope_theta=1e6),
  "qwen2": PolicyConfig("qwen2", 61, 48, 2, 6, 2, 8, 56, qkv_bias=True, tied=False),
  "llama": PolicyConfig("llama", 61, 48, 3, 4, 1, 12, 40, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16)),
}
SAMPLING = Sampling(1.0, (), "float32")


@functools.cache
def make(name):
  c = SHAPES[name]
  params = transformer.init_params(c, jax.random.key(1))
  shake = lambda x: x + 0.1 * jax.random.normal(jax.random.key(x.size), x.shape)  # norms and biases too
  params = jax.jit(lambda p: jax.tree.map(shake, p))(params)
  return c, params, transformer.unstack(params)


@functools.partial(jax.jit, static_argnames="c")
def full_forward(c, params, tokens):
  """Hidden states and logits of whole rows by the plain forward pass."""
  hidden = transformer.forward(c, params, tokens, transformer.default_positions(tokens), causal_attention("xla"))[0]
  return hidden, transformer.unembed(params, hidden)


def full(c, params, row):
  """(hidden f32[S,D], logits f32[S,V]) of one row of tokens."""
  tokens = np.zeros((1, 32), np.int32)
  tokens[0, :len(row)] = row
  return tuple(np.asarray(x[0, :len(row)]) for x in full_forward(c, params, tokens))


def full_logits(c, params, row):
  return full(c, params, row)[1]


PROMPTS = [[3, 9, 4], [7], [5, 5, 8, 2, 1, 60, 2], [11, 12]]


def start(c, params, rows=None, length=48, limit=20, key=None):
  """Slots with PROMPTS fanned out: row r has prompt rows[r]."""
  rows = list(range(len(PROMPTS))) if rows is None else rows
  tokens = np.zeros((len(PROMPTS), 8), np.int32)
  for i, p in enumerate(PROMPTS):
    tokens[i, :len(p)] = p
  prefix = programs.prefill(c, params, tokens, np.array([len(p) for p in PROMPTS], np.int32), sampling=SAMPLING)
  slots = programs.init_slots(c, len(rows), length, SAMPLING)
  keys = jax.vmap(lambda i: jax.random.fold_in(key if key is not None else jax.random.key(5), i))(jnp.arange(len(rows)))
  return programs.insert(slots, prefix, jnp.asarray(rows), keys, jnp.full(len(rows), limit), jnp.asarray(rows))


@pytest.mark.parametrize("name", SHAPES)
def test_cached_decode_equals_full_forward(name):
  c, params, layers = make(name)
  slots, tokens, logprobs, _ = programs.generate_segment(c, layers, start(c, layers), steps=12, sampling=SAMPLING)
  for i, prompt in enumerate(PROMPTS):
    row = prompt + tokens[i].tolist()
    logits = full_logits(c, params, row)[len(prompt) - 1:-1]
    expected = jax.nn.log_softmax(logits)[np.arange(12), np.asarray(tokens[i])]
    np.testing.assert_allclose(logprobs[i], expected, atol=2e-5)


def test_greedy_takes_the_most_likely_token():
  c, params, layers = make("qwen3")
  slots, tokens, *_ = programs.generate_segment(c, layers, start(c, layers), steps=6, sampling=Sampling(0.0, (), "float32"))
  for i, prompt in enumerate(PROMPTS):
    logits = full_logits(c, params, prompt + tokens[i].tolist())
    np.testing.assert_array_equal(tokens[i], logits[len(prompt) - 1:-1].argmax(-1))


def test_hidden_is_the_state_that_sampled_the_last_token():
  c, params, layers = make("qwen2")
  slots, tokens, *_ = programs.generate_segment(c, layers, start(c, layers), steps=5, sampling=SAMPLING)
  for i, prompt in enumerate(PROMPTS):
    hidden, _ = full(c, params, prompt + tokens[i].tolist())
    np.testing.assert_allclose(slots.hidden[i], hidden[len(prompt) + 5 - 2], atol=2e-5)


def test_segments_equal_one_long_decode():
  c, _, layers = make("llama")
  slots, long, long_logprobs, _ = programs.generate_segment(c, layers, start(c, layers), steps=12, sampling=SAMPLING)
  slots, parts = start(c, layers), []
  for _ in range(3):
    slots, *part = programs.generate_segment(c, layers, slots, steps=4, sampling=SAMPLING)
    parts.append(part)
  np.testing.assert_array_equal(np.concatenate([p[0] for p in parts], 1), long)
  np.testing.assert_allclose(np.concatenate([p[1] for p in parts], 1), long_logprobs, atol=1e-6)


def test_gather_then_decode_equals_decode_then_select():
  c, _, layers = make("qwen3")
  first = lambda: programs.generate_segment(c, layers, start(c, layers), steps=4, sampling=SAMPLING)[0]
  _, all_rows, *_ = programs.generate_segment(c, layers, first(), steps=6, sampling=SAMPLING)
  rows = np.array([2, 0, 0])
  taken = programs.take_rows(first(), rows, np.array([True, True, False]), length=32)
  after, some_rows, *_ = programs.generate_segment(c, layers, taken, steps=6, sampling=SAMPLING)
  np.testing.assert_array_equal(some_rows[:2], np.asarray(all_rows)[rows[:2]])
  assert after.generated.tolist() == [10, 10, 0] and not after.active[2]  # a copy is nobody's finished sibling


def test_rows_of_a_group_share_the_prompt_and_differ_by_key():
  c, params, layers = make("qwen3")
  rows = [2, 2, 2, 1]
  _, tokens, logprobs, _ = programs.generate_segment(c, layers, start(c, layers, rows), steps=8, sampling=SAMPLING)
  assert len({tuple(t) for t in tokens[:3].tolist()}) == 3
  for i, r in enumerate(rows):
    logits = full_logits(c, params, PROMPTS[r] + tokens[i].tolist())[len(PROMPTS[r]) - 1:-1]
    np.testing.assert_allclose(logprobs[i], jax.nn.log_softmax(logits)[np.arange(8), np.asarray(tokens[i])], atol=2e-5)


def test_rows_stop_at_stop_tokens_and_limits():
  c, _, layers = make("qwen3")
  _, free, *_ = programs.generate_segment(c, layers, start(c, layers), steps=12, sampling=SAMPLING)
  stop = int(free[0, 3])
  slots, tokens, *_ = programs.generate_segment(
    c, layers, start(c, layers, limit=9), steps=12, sampling=Sampling(1.0, (stop,), "float32"))
  for i in range(len(PROMPTS)):
    row = free[i].tolist()
    length = min(9, row.index(stop) + 1 if stop in row else 99)
    assert slots.generated[i] == length and not slots.active[i]
    assert tokens[i, :length].tolist() == row[:length]


def test_samples_follow_the_softmax():
  logits = jnp.log(jnp.array([0.5, 0.3, 0.2]))
  n = 20000
  keys = jax.random.split(jax.random.key(0), n)
  tokens, logprobs, _ = sample(SAMPLING, keys, jnp.broadcast_to(logits[None], (n, 3)))
  share = np.bincount(tokens, minlength=3) / n
  np.testing.assert_allclose(share, [0.5, 0.3, 0.2], atol=4 * np.sqrt(0.25 / n))
  np.testing.assert_allclose(jnp.exp(logprobs[:50]), np.array([0.5, 0.3, 0.2])[np.asarray(tokens[:50])], rtol=1e-5)
  half, logprobs, _ = sample(Sampling(0.5, (), "float32"), keys, jnp.broadcast_to(logits[None], (n, 3)))
  sharp = np.array([0.25, 0.09, 0.04]) / 0.38
  np.testing.assert_allclose(np.bincount(half, minlength=3) / n, sharp, atol=4 * np.sqrt(0.25 / n))
  np.testing.assert_allclose(jnp.exp(logprobs[:50]), sharp[np.asarray(half[:50])], rtol=1e-5)


@pytest.mark.parametrize("filters, left", [
  (dict(top_k=2), {0, 1}), (dict(top_p=0.5), {0}), (dict(top_p=0.51), {0, 1}), (dict(top_p=1.0), {0, 1, 2, 3}),
  (dict(min_p=0.39), {0, 1, 2}), (dict(min_p=0.41), {0, 1}), (dict(top_k=3, min_p=0.7), {0}), (dict(top_p=0.0), {0}),
  (dict(top_k=99), {0, 1, 2, 3})])
def test_filters_leave_the_likely_tokens(filters, left):
  """Probabilities 0.5, 0.25, 0.2, 0.05: what is left keeps its proportions, and log-probs stay unfiltered."""
  p = np.array([0.5, 0.25, 0.2, 0.05])
  n = 4000
  logits = jnp.broadcast_to(jnp.log(jnp.asarray(p, jnp.float32))[None] + 3.0, (n, 4))
  tokens, logprobs, _ = sample(Sampling(1.0, (), "float32", **filters), jax.random.split(jax.random.key(0), n), logits)
  share = np.bincount(tokens, minlength=4) / n
  want = np.where([i in left for i in range(4)], p, 0.0)
  np.testing.assert_allclose(share, want / want.sum(), atol=4 * np.sqrt(0.25 / n))
  assert set(np.flatnonzero(share)) == left
  np.testing.assert_allclose(jnp.exp(logprobs[:20]), p[np.asarray(tokens[:20])], rtol=1e-5)


def test_a_dead_neighbour_leaves_no_trace():
  """A slot that held a long, finished row gives a new request the tokens of a fresh slot."""
  c, _, layers = make("llama")
  slots, *_ = programs.generate_segment(c, layers, start(c, layers, limit=16), steps=16, sampling=SAMPLING)
  tokens = np.array([[4, 8, 15, 0]], np.int32)
  prefix = programs.prefill(c, layers, tokens, np.array([3], np.int32), sampling=SAMPLING)
  key = jax.random.split(jax.random.key(9), 4)
  put = lambda s, slot: programs.insert(s, prefix, jnp.where(jnp.arange(4) == slot, 0, -1), key, jnp.full(4, 10),
                                      jnp.zeros(4, jnp.int32))
  _, used, *_ = programs.generate_segment(c, layers, put(slots, 2), steps=10, sampling=SAMPLING)
  empty = programs.init_slots(c, 4, 48, SAMPLING)
  _, fresh, *_ = programs.generate_segment(c, layers, put(empty, 2), steps=10, sampling=SAMPLING)
  np.testing.assert_array_equal(used[2], fresh[2])
