"""Heads that read all states of a prefix: learned attention pooling and a small transformer, and how they are trained.

A head is one of HEADS, its weights a dict of arrays:

mean         linear in the mean state: what the ridge is, fitted by the other heads' means
attention    four queries, softmax over the prefix's tokens with a learned bias by place, a linear read-out of what they pool
attention+   the same, read by an MLP of 64
transformer  states projected to `width`, places added, two blocks that see all of the prefix, mean, a linear read-out

Trained by AdamW with dropout on whole groups of rollouts. loss "bce": binary cross-entropy. "pairs": for each right and wrong
rollout of a group the logistic loss of their difference, each mixed group counting alike, which is what AUC within a prompt
counts; it says nothing of a prompt's level. Training stops early by the same loss on prompts set aside, and the best weights are
taken. Left out: the prompt's own states, and log-probs.
"""

import functools
import math
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

QUERIES, HIDDEN, VALUES, BLOCKS, LANES = 4, 64, 32, 2, 32  # LANES: a block's head has so many
BATCH, ROUND = 16, 8       # prompts of an optimizer step; steps of a round, after which the loss is looked at
ROUNDS, PATIENCE = 60, 10  # at most, and without a better loss
ONLINE = 2                 # rounds after each step of a training
DROPOUT = 0.2
LOSSES = ("bce", "pairs")
OPTIMIZER = optax.adamw(1e-3, weight_decay=0.1)


class OutOfTime(Exception):
  """The time that was given is over."""


class Data(NamedTuple):
  """Rollouts of P prompts, G each."""
  states: jax.Array  # [P,G,T,D]
  reward: jax.Array  # f32[P,G]  in {0, 1}
  there: jax.Array   # f32[P,G]  1 where the response is longer than T


# ---- heads: init(key, length, states' width, width) -> weights; apply(weights, x f32[B,T,D], drop) -> logits f32[B]


def _normal(key, *shape):
  return jax.random.normal(key, shape, jnp.float32) / math.sqrt(shape[-2])


def init_mean(key, length, wide, width):
  return {"read": jnp.zeros((wide, 1), jnp.float32), "bias": jnp.zeros((1,), jnp.float32)}


def mean(weights, x, drop):
  return _read(weights, drop(jnp.mean(x, axis=1)))


def init_attention(key, length, wide, width):
  # Near the mean at first, and no two queries alike.
  return {"query": 0.5 * _normal(key, wide, QUERIES), "place": jnp.zeros((length, QUERIES), jnp.float32),
          **init_mean(key, length, QUERIES * wide, width)}


def attention(weights, x, drop):
  return _read(weights, drop(_pooled(weights, x).reshape(x.shape[0], -1)))


def init_attention_mlp(key, length, wide, width):
  value, hidden = jax.random.split(key)
  return init_attention(key, length, wide, width) | {
    "value": _normal(value, wide, VALUES), "hidden": _normal(hidden, QUERIES * VALUES, HIDDEN),
    "read": jnp.zeros((HIDDEN, 1), jnp.float32)}


def attention_mlp(weights, x, drop):
  values = (_pooled(weights, x) @ weights["value"]).reshape(x.shape[0], -1)
  return _read(weights, drop(jax.nn.gelu(drop(values) @ weights["hidden"])))


def init_transformer(key, length, wide, width):
  keys = jax.random.split(key, 2 + 6 * BLOCKS)
  block = lambda k: {"q": _normal(k[0], width, width), "k": _normal(k[1], width, width), "v": _normal(k[2], width, width),
                     "o": _normal(k[3], width, width), "up": _normal(k[4], width, 2 * width),
                     "down": _normal(k[5], 2 * width, width)}
  return {"project": _normal(keys[0], wide, width), "place": 0.1 * _normal(keys[1], length, width),
          "blocks": [block(keys[2 + 6 * i:8 + 6 * i]) for i in range(BLOCKS)], **init_mean(key, length, width, width)}


def transformer(weights, x, drop):
  norm = lambda x: x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
  heads = lambda x: x.reshape(*x.shape[:2], -1, LANES)
  x = norm(x @ weights["project"]) + weights["place"][None]
  for w in weights["blocks"]:
    y = norm(x)
    y = jax.nn.dot_product_attention(heads(y @ w["q"]), heads(y @ w["k"]), heads(y @ w["v"])).reshape(x.shape)
    x = x + drop(y @ w["o"])
    x = x + drop(jax.nn.gelu(norm(x) @ w["up"]) @ w["down"])
  return _read(weights, drop(jnp.mean(norm(x), axis=1)))


def _pooled(weights, x):
  """What each query pools of x f32[B,T,D]: f32[B,QUERIES,D]."""
  share = jax.nn.softmax(x @ weights["query"] + weights["place"][None], axis=1)
  return jnp.einsum("btk,btd->bkd", share, x)


def _read(weights, x):
  return (x @ weights["read"])[:, 0] + weights["bias"]


HEADS = {"mean": (init_mean, mean), "attention": (init_attention, attention),
         "attention+": (init_attention_mlp, attention_mlp), "transformer": (init_transformer, transformer)}


def parameters(weights: dict) -> int:
  """How many numbers are trained."""
  return sum(x.size for x in jax.tree.leaves(weights))


# ---- losses


def losses(logits: jax.Array, reward: jax.Array, there: jax.Array) -> tuple[jax.Array, jax.Array]:
  """"bce" and "pairs" of logits f32[P,G], f32[] each; 0 where there is nothing to compare."""
  per_row = optax.sigmoid_binary_cross_entropy(logits, reward) * there
  mixed = (reward * there)[:, :, None] * ((1 - reward) * there)[:, None, :]
  pair = jnp.sum(mixed * jax.nn.softplus(logits[:, None, :] - logits[:, :, None]), axis=(1, 2))
  count = jnp.sum(mixed, axis=(1, 2))
  over = lambda total, count: total / jnp.maximum(count, 1.0)
  return over(jnp.sum(per_row), jnp.sum(there)), over(jnp.sum(over(pair, count)), jnp.sum(count > 0))


def _logits(weights, states, head, drop):
  rows = states.reshape(-1, *states.shape[2:]).astype(jnp.float32)
  return HEADS[head][1](weights, rows, drop).reshape(states.shape[:2])


# ---- programs


class State(NamedTuple):
  """What training changes."""
  weights: dict
  optimizer: object
  key: jax.Array


@functools.partial(jax.jit, static_argnames=("head",))
def train(state: State, data: Data, batches: jax.Array, pairs: jax.Array, *, head: str) -> State:
  """One optimizer step for each of batches i32[ROUND,BATCH], numbers of prompts; pairs f32[]: 1 for "pairs", 0 for "bce"."""
  def loss(weights, key, states, reward, there):
    keys = iter(jax.random.split(key, 2 * BLOCKS + 2))
    drop = lambda x: jnp.where(jax.random.bernoulli(next(keys), 1 - DROPOUT, x.shape), x / (1 - DROPOUT), 0.0)
    bce, ranking = losses(_logits(weights, states, head, drop), reward, there)
    return bce + pairs * (ranking - bce)

  def one(state, batch):
    key, now = jax.random.split(state.key)
    slopes = jax.grad(loss)(state.weights, now, *(x[batch] for x in data))
    changes, optimizer = OPTIMIZER.update(slopes, state.optimizer, state.weights)
    return State(optax.apply_updates(state.weights, changes), optimizer, key), None

  return jax.lax.scan(one, state, batches)[0]


@functools.partial(jax.jit, static_argnames=("head",))
def score(weights: dict, data: Data, batches: jax.Array, *, head: str) -> jax.Array:
  """Logits f32[ROUND,BATCH,G]."""
  return jax.lax.map(lambda batch: _logits(weights, data.states[batch], head, lambda x: x), batches)


class Trainer:
  """One head on one place's data, compiled once for both losses, all folds and online."""

  def __init__(self, head: str, data: Data, width: int, deadline: float = math.inf):
    """width: the transformer's. deadline: time.monotonic() at which everything raises OutOfTime."""
    self.data, self.deadline = data, deadline
    self.check_time()
    self.first = HEADS[head][0](jax.random.key(0), *data.states.shape[2:], width)
    self.parameters = parameters(self.first)
    self.host = np.asarray(data.reward), np.asarray(data.there)
    started, batches = time.monotonic(), np.zeros((ROUND, BATCH), np.int32)
    self._train = train.lower(self.begun(np.arange(1)), data, batches, np.float32(0), head=head).compile()
    self._score = score.lower(self.first, data, batches, head=head).compile()
    self.compile_seconds = time.monotonic() - started

  def check_time(self) -> None:
    if time.monotonic() > self.deadline:
      raise OutOfTime

  def begun(self, prompts: np.ndarray, seed: int = 0) -> State:
    """Before any training, but that all are said to be right as often as those of `prompts` are."""
    reward, there = (x[prompts] for x in self.host)
    rate = (np.sum(reward * there) + 1) / (np.sum(there) + 2)
    weights = self.first | {"bias": jnp.full((1,), np.log(rate / (1 - rate)), jnp.float32)}
    return State(weights, OPTIMIZER.init(weights), jax.random.key(seed))

  def round(self, state: State, prompts: np.ndarray, loss: str, rng: np.random.Generator) -> State:
    """ROUND steps on `prompts`, gone over in an order of their own as often as it takes."""
    self.check_time()
    passes = -(-ROUND * BATCH // len(prompts))
    order = np.concatenate([rng.permutation(prompts) for _ in range(passes)])[:ROUND * BATCH]
    return self._train(state, self.data, order.reshape(ROUND, BATCH).astype(np.int32), np.float32(loss == "pairs"))

  def scores(self, weights: dict, prompts: np.ndarray) -> np.ndarray:
    """Logits f32[len(prompts),G]."""
    batches = np.resize(prompts, (-(-len(prompts) // (ROUND * BATCH)), ROUND, BATCH)).astype(np.int32)
    found = np.concatenate([np.asarray(self._score(weights, self.data, b)) for b in batches])
    return found.reshape(-1, found.shape[2])[:len(prompts)]

  def fit(self, prompts: np.ndarray, loss: str, seed: int = 0) -> dict:
    """The weights with the least loss on a sixth of `prompts`, trained on the rest."""
    rng = np.random.default_rng(seed)
    prompts = rng.permutation(prompts)
    aside, rest = np.split(prompts, [max(1, len(prompts) // 6)])
    state = self.begun(rest, seed)
    best, least, since = state.weights, math.inf, 0
    for _ in range(ROUNDS):
      state = self.round(state, rest, loss, rng)
      found = losses(self.scores(state.weights, aside), *(x[aside] for x in self.host))[LOSSES.index(loss)]
      since += 1
      if float(found) < least:
        best, least, since = state.weights, float(found), 0
      if since >= PATIENCE:
        break
    return best

  def folds(self, fold: np.ndarray, loss: str) -> np.ndarray:
    """Logits f32[P,G] of each prompt by a fit on the other folds; fold i32[P]."""
    out = np.zeros(self.data.reward.shape, np.float32)
    for f in np.unique(fold):
      mine = np.flatnonzero(fold == f)
      out[mine] = self.scores(self.fit(np.flatnonzero(fold != f), loss, int(f)), mine)
    return out

  def online(self, steps: int, loss: str) -> np.ndarray:
    """Logits f32[P,G] of each step's prompts, which follow each other, before the head learns from them: ONLINE rounds a step
    over all prompts so far."""
    state, rng, out = None, np.random.default_rng(0), np.zeros(self.data.reward.shape, np.float32)
    for mine in np.split(np.arange(len(out)), steps):
      if state is None:
        state = self.begun(mine)
      else:
        out[mine] = self.scores(state.weights, mine)
      for _ in range(ONLINE):
        state = self.round(state, np.arange(mine[-1] + 1), loss, rng)
    return out
