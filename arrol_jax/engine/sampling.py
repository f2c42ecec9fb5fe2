"""How a token is drawn from logits: temperature, filters, log-prob and DeepConf's token confidence.
"""


import dataclasses
import math
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

_LANES = 128  # tokens of a vocabulary block


class Taps(NamedTuple):
  """What is kept of each row beside the final state, for whoever judges it. Layer n: the residual stream after n layers."""
  states: tuple = ()         # (("mean" or "last", layer), ...): over the response's tokens
  prompt: int | None = None  # layer of the state of the prompt's last token
  counts: bool = False       # hashed counts of the response's tokens


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are drawn and computed. temperature 0 is greedy. Tokens are left that pass every filter which is not None.

  Log-probs are those of the tempered distribution before filtering (at temperature 0: of T = 1), so that they compare with the
  trainer's. temperature None: it is each row's own, see `SamplingParams`, and so is top_p where that is None too; the other
  filters are everybody's.
  """
  temperature: float | None = 1.0
  stop_ids: tuple[int, ...] = ()
  dtype: str = "bfloat16"
  cache: str | None = None     # "int8" halves the cache; None: as dtype
  attention: str = "auto"      # over the cache, see kv_cache.py
  top_k: int | None = None     # the k most likely (more where the last ties)
  top_p: float | None = None   # the fewest most likely ones whose probabilities sum to at least p; 1: off
  min_p: float | None = None   # at least min_p times as likely as the most likely
  confidence: int | None = None  # k of DeepConf's token confidence, the mean -log-prob of the k likeliest tokens; None: 0
  pool: bool = False           # keep the sum of each row's hidden states
  taps: Taps = Taps()

  @property
  def cache_dtype(self) -> str:
    return self.cache or self.dtype


@flax.struct.dataclass
class SamplingParams:
  """What rows that serve different users choose for themselves (Sampling.temperature is None)."""
  temperature: jax.Array  # f32[B]  0: greedy
  top_p: jax.Array        # f32[B]  1: off
  keep: jax.Array         # f32[B]  posterior below which rule.PruneRule's "threshold" stops the row
  ignore_stop: jax.Array | None = None  # f32[B]  not 0: stop tokens do not end the row


def _filtered(sampling: Sampling, logits: jax.Array, top_p: jax.Array | float | None) -> jax.Array:
  """logits f32[B,V] with -inf where a filter takes the token out; the most likely token always stays. top_p: one, or f32[B,1]."""
  least = jnp.full_like(logits[:, :1], -jnp.inf)  # a token stays if its logit is at least this
  if sampling.top_k is not None:
    least = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[1]))[0][:, -1:]
  if top_p is not None:
    least = jnp.maximum(least, _least_of(logits, top_p))
  if sampling.min_p is not None:
    least = jnp.maximum(least, jnp.max(logits, axis=1, keepdims=True) + math.log(max(sampling.min_p, 1e-30)))
  return jnp.where(logits >= least, logits, -jnp.inf)


def _least_of(logits: jax.Array, top_p: jax.Array | float) -> jax.Array:
  """The smallest logit that top_p (one, or f32[B,1]) leaves in f32[B,V], f32[B,1]: the smallest above which lies less than top_p
  of the mass. By bisection over a float's bits, which is exact and costs a fraction of sorting the vocabulary."""
  ordered = lambda bits: jnp.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)  # as integers in the floats' order, and back
  place, mass = ordered(jax.lax.bitcast_convert_type(logits, jnp.int32)), jax.nn.softmax(logits, axis=1)

  def halve(_, bounds):
    low, high = bounds
    middle = (low & high) + ((low ^ high) >> 1)
    enough = jnp.sum(jnp.where(place > middle, mass, 0.0), axis=1, keepdims=True) < top_p
    return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

  start = jnp.min(place, axis=1, keepdims=True), jnp.max(place, axis=1, keepdims=True)
  return jax.lax.bitcast_convert_type(ordered(jax.lax.fori_loop(0, 32, halve, start)[1]), jnp.float32)


def _least_where_asked(logits: jax.Array, top_p: jax.Array) -> jax.Array:
  """`_least_of` of the rows whose top_p f32[B] is below 1, -inf for the others: a few rows at a time, so that only those who ask
  pay. Always as many, so that a row's result does not depend on how many ask."""
  rows, asks = logits.shape[0], top_p < 1
  few = min(rows, max(4, rows // 4))
  order = jnp.argsort(~asks)  # those who ask first
  order = jnp.concatenate([order, jnp.repeat(order[-1:], -rows % few)])

  def some(i, least):
    at = jax.lax.dynamic_slice(order, (i * few,), (few,))
    return least.at[at].set(jnp.where(asks[at][:, None], _least_of(logits[at], top_p[at][:, None]), -jnp.inf))

  return jax.lax.fori_loop(0, (jnp.sum(asks) + few - 1) // few, some, jnp.full_like(logits[:, :1], -jnp.inf))


def _prefix_sums(x: jax.Array) -> jax.Array:
  """Inclusive sums along the last axis: one small product instead of a ladder of additions."""
  return jnp.dot(x, jnp.triu(jnp.ones((x.shape[-1],) * 2, x.dtype)), precision=jax.lax.Precision.HIGHEST)


def _first_past(weight: jax.Array, u: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Index i32[B] drawn with probability proportional to weight f32[B,K] >= 0 by u f32[B] in [0, 1), never one of weight 0;
  and the weights' sum."""
  sums = _prefix_sums(weight)
  past = (sums > (u * sums[:, -1])[:, None]) & (weight > 0)
  index = jnp.where(jnp.any(past, axis=1), jnp.argmax(past, axis=1), jnp.argmax(weight, axis=1))
  return index.astype(jnp.int32), sums[:, -1]


def _top(blocks: jax.Array, k: int) -> jax.Array:
  """The k largest of f32[B,blocks,128], f32[B,k]: they lie in the k blocks with the largest maxima."""
  k = min(k, blocks.shape[1] * blocks.shape[2])
  where = jax.lax.top_k(jnp.max(blocks, axis=2), min(k, blocks.shape[1]))[1]
  inside = jnp.take_along_axis(blocks, where[:, :, None], axis=1)
  return jax.lax.top_k(inside.reshape(inside.shape[0], -1), k)[0]


def sample(sampling: Sampling, key: jax.Array, logits: jax.Array,
           params: SamplingParams | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Tokens i32[B], their log-probs and DeepConf's confidence there, f32[B], from logits f32[B,V]; key[B], one a row. params: what
  rows choose where sampling.temperature is None.

  By inversion in two levels, a block of the vocabulary and a token in it, each with a uniform number of its own: two
  random numbers a token, and the blocks' sums are the softmax's denominator.
  """
  rows, vocab = logits.shape
  if params is not None:
    logits = logits / jnp.where(params.temperature > 0, params.temperature, 1.0)[:, None]
    greedy = jnp.argmax(logits, axis=1).astype(jnp.int32)  # instead of the maximum: the same pass
    top = jnp.take_along_axis(logits, greedy[:, None], axis=1)
  else:
    logits = logits / sampling.temperature if sampling.temperature > 0 else logits
    top = jnp.max(logits, axis=1, keepdims=True)
  blocks = lambda x: jnp.pad(x - top, ((0, 0), (0, -vocab % _LANES)), constant_values=-jnp.inf).reshape(rows, -1, _LANES)
  sums = lambda x: jnp.sum(jnp.exp(x), axis=2)
  u = jax.vmap(lambda k: jax.random.uniform(k, (2,)))(key)
  kept = blocks(logits)
  block, total = _first_past(sums(kept), u[:, 0])
  confidence = jnp.zeros_like(total)
  if sampling.confidence:  # before filtering, which would make log-probs infinite
    confidence = jnp.log(total) - jnp.mean(_top(kept, min(sampling.confidence, vocab)), axis=1)
  if sampling.temperature == 0:
    token = jnp.argmax(logits, axis=1).astype(jnp.int32)
  else:
    for_all = sampling.top_k is not None or sampling.top_p not in (None, 1.0) or sampling.min_p is not None
    if params is not None and sampling.top_p is None:
      # A row's own filter: only for those who ask for it. A branch costs a GPU a word with the host.
      everybody = lambda: _filtered(sampling, logits, None)
      filtered = lambda: blocks(jnp.where(logits >= _least_where_asked(logits, params.top_p), everybody(), -jnp.inf))
      kept = jax.lax.cond(jnp.any(params.top_p < 1) | for_all, filtered, lambda: kept)
      block, _ = _first_past(sums(kept), u[:, 0])
    elif for_all:
      kept = blocks(_filtered(sampling, logits, None if sampling.top_p == 1.0 else sampling.top_p))
      block, _ = _first_past(sums(kept), u[:, 0])
    inside = jnp.take_along_axis(kept, block[:, None, None], axis=1)[:, 0]
    token = block * _LANES + _first_past(jnp.exp(inside), u[:, 1])[0]
    token = token if params is None else jnp.where(params.temperature > 0, token, greedy)
  return token, jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - top[:, 0] - jnp.log(total), confidence
