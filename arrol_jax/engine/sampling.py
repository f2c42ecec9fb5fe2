"""How a token is drawn from logits: temperature, filters, log-prob and DeepConf's token confidence.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from arrol_jax.models import softmax

_LANES = 128  # tokens of a vocabulary block
_PART = 32    # of a sum of many, see _prefix_sums


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
  attention: str = "auto"      # over the cache, see decode_attention.py
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
  """Inclusive sums along the last axis of f32[B,K], by small products instead of a ladder of additions: within parts, then over
  parts."""
  many = x.shape[-1]
  ones = lambda n, k=0: jnp.triu(jnp.ones((n, n), x.dtype), k)
  product = functools.partial(jnp.dot, precision=jax.lax.Precision.HIGHEST)
  if many <= 2 * _PART:
    return product(x, ones(many))
  parts = jnp.pad(x, ((0, 0), (0, -many % _PART))).reshape(x.shape[0], -1, _PART)
  inner = product(parts, ones(_PART))
  before = product(inner[:, :, -1], ones(parts.shape[1], 1))
  return (before[:, :, None] + inner).reshape(x.shape[0], -1)[:, :many]


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
  if params is not None:
    logits = logits / jnp.where(params.temperature > 0, params.temperature, 1.0)[:, None]
  elif sampling.temperature > 0:
    logits = logits / sampling.temperature
  u = jax.vmap(lambda k: jax.random.uniform(k, (2,)))(key)
  kept = _blocks(logits)
  tops, sums = softmax.sums(kept)
  top, share = _of_all(tops, sums)
  block, total = _first_past(share, u[:, 0])
  confidence = jnp.zeros_like(total)
  if sampling.confidence:  # before filtering, which would make log-probs infinite
    confidence = top + jnp.log(total) - jnp.mean(_top(kept, min(sampling.confidence, logits.shape[1])), axis=1)
  greedy = lambda: _likeliest(kept, tops)
  if sampling.temperature == 0:
    token = greedy()
  else:
    for_all = sampling.top_k is not None or sampling.top_p not in (None, 1.0) or sampling.min_p is not None
    draw = lambda kept: _draw(kept, _first_past(_of_all(*softmax.sums(kept))[1], u[:, 0])[0], top, u[:, 1])
    if params is not None and sampling.top_p is None:
      # A row's own filter: only for those who ask for it. A branch costs a GPU a word with the host.
      everybody = lambda: _filtered(sampling, logits, None)
      filtered = lambda: draw(_blocks(jnp.where(logits >= _least_where_asked(logits, params.top_p), everybody(), -jnp.inf)))
      token = jax.lax.cond(jnp.any(params.top_p < 1) | for_all, filtered, lambda: _draw(kept, block, top, u[:, 1]))
    elif for_all:
      token = draw(_blocks(_filtered(sampling, logits, None if sampling.top_p == 1.0 else sampling.top_p)))
    else:
      token = _draw(kept, block, top, u[:, 1])
    token = token if params is None else jnp.where(params.temperature > 0, token, greedy())
  return token, jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - top - jnp.log(total), confidence


def _blocks(logits: jax.Array) -> jax.Array:
  """f32[B,V] -> f32[B,V/128,128], filled up with tokens that are never drawn."""
  return jnp.pad(logits, ((0, 0), (0, -logits.shape[1] % _LANES)), constant_values=-jnp.inf).reshape(len(logits), -1, _LANES)


def _of_all(tops: jax.Array, sums: jax.Array) -> tuple[jax.Array, jax.Array]:
  """The largest logit f32[B] and the blocks' sums of exponentials below it f32[B,blocks], from each block's own."""
  top = jnp.max(tops, axis=1)
  return top, sums * jnp.exp(tops - top[:, None])


def _inside(blocks: jax.Array, block: jax.Array) -> jax.Array:
  """Block i32[B] of f32[B,blocks,128], f32[B,128]."""
  return jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]


def _draw(blocks: jax.Array, block: jax.Array, top: jax.Array, u: jax.Array) -> jax.Array:
  """Tokens i32[B] of block i32[B], each with its probability, by u f32[B]."""
  return block * _LANES + _first_past(jnp.exp(_inside(blocks, block) - top[:, None]), u)[0]


def _likeliest(blocks: jax.Array, tops: jax.Array) -> jax.Array:
  """The first token i32[B] with the largest logit, from the blocks' maxima f32[B,blocks]."""
  block = jnp.argmax(tops, axis=1).astype(jnp.int32)
  return block * _LANES + jnp.argmax(_inside(blocks, block), axis=1).astype(jnp.int32)
