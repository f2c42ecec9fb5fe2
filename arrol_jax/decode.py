"""The jitted programs that generate text on slots, in JetStream's words: prefill, insert, generate_segment, free_resource.

A slot is a row of a fixed-shape batch with its own KV cache, position, random key and limits; `Slots` is the whole
state, donated from program to program so that the cache is updated in place. A segment is a fixed number of steps in one
program: no host synchronisation per token. Prefill runs once per prompt and `insert` fans its cache out to the rows of a group.
Layers are unrolled here (one cache array a layer): a scanned cache would be copied at every step.

Which rows live, and in which shapes, is the host's business (engine.py); what a hidden state is worth, rollout.py's.
"""

import dataclasses
import functools
import math

import flax.struct
import jax
import jax.numpy as jnp

from arrol_jax import kv_cache, policy, sharding
from arrol_jax.attention import causal_attention
from arrol_jax.norms import split_qkv
from arrol_jax.policy import PolicyConfig

_LANES = 128  # tokens of a vocabulary block
STRIDE = 8   # steps between two looks at whether any row is active


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How tokens are drawn and computed. temperature 0 is greedy. Tokens are left that pass every filter which is not None.

  Log-probs are those of the tempered distribution before filtering (at temperature 0: of T = 1), so that they compare with the
  trainer's. temperature None: temperature and top_p are each row's own, see `Own`; the other filters are everybody's.
  """
  temperature: float | None = 1.0
  stop_ids: tuple[int, ...] = ()
  dtype: str = "bfloat16"
  cache: str | None = None     # "int8" halves the cache; None: as dtype
  attention: str = "auto"      # over the cache, see kv_cache.py
  top_k: int | None = None     # the k most likely (more where the last ties)
  top_p: float | None = None   # the fewest most likely ones whose probabilities sum to at least p
  min_p: float | None = None   # at least min_p times as likely as the most likely
  confidence: int | None = None  # k of DeepConf's token confidence, the mean -log-prob of the k likeliest tokens; None: 0
  pool: bool = False           # keep the sum of each row's hidden states

  @property
  def cache_dtype(self) -> str:
    return self.cache or self.dtype


@flax.struct.dataclass
class Prefix:
  """Caches of prompts, to be inserted into slots."""
  cache: tuple           # kv_cache.Columns by layer, P rows of L columns
  last_token: jax.Array  # i32[P]
  length: jax.Array      # i32[P]


@flax.struct.dataclass
class Own:
  """What rows that serve different users choose for themselves (Sampling.temperature is None)."""
  temperature: jax.Array  # f32[B]  0: greedy
  top_p: jax.Array        # f32[B]  1: off
  keep: jax.Array         # f32[B]  posterior below which rollout.PruneRule's "threshold" stops the row


@flax.struct.dataclass
class Slots:
  """The state of B rows. `token` at `position` is the next to be fed; columns before `position` of the cache are valid."""
  cache: tuple           # kv_cache.Columns by layer, B rows of S columns
  token: jax.Array       # i32[B]
  position: jax.Array    # i32[B]
  generated: jax.Array   # i32[B]   response tokens so far
  limit: jax.Array       # i32[B]   response tokens at most
  active: jax.Array      # bool[B]  still generating
  group: jax.Array       # i32[B]   the request's prompt: active rows of one group have the same
  key: jax.Array         # key[B]   the request's own: its tokens depend on no other row
  hidden: jax.Array      # [B,D]    final hidden state of the last step in which the row was active
  hidden_sum: jax.Array  # f32[B,D] of all steps that gave a response token ([B,0] where Sampling.pool is off)
  logprob_sum: jax.Array     # f32[B]  over the response's tokens so far
  logprob_min: jax.Array     # f32[B]
  confidence_sum: jax.Array  # f32[B]
  own: Own | None = None     # where Sampling.temperature is None


@functools.partial(jax.jit, static_argnames=("c", "rows", "length", "sampling"))
def init_slots(c: PolicyConfig, rows: int, length: int, sampling: Sampling) -> Slots:
  """`rows` empty slots with room for `length` tokens each."""
  zeros, sums = (functools.partial(jnp.zeros, (rows,), dtype) for dtype in (jnp.int32, jnp.float32))
  cache = tuple(kv_cache.empty(c.kv_heads, rows, length, c.head_dim, sampling.cache_dtype) for _ in range(c.layers))
  return Slots(cache=cache, token=zeros(), position=zeros(), generated=zeros(), limit=zeros(), group=zeros(),
               active=jnp.zeros((rows,), bool), key=jax.random.split(jax.random.key(0), rows),
               hidden=jnp.zeros((rows, c.width), sampling.dtype), logprob_sum=sums(), logprob_min=sums(), confidence_sum=sums(),
               hidden_sum=jnp.zeros((rows, c.width if sampling.pool else 0), jnp.float32),
               own=Own(sums(), sums(), sums()) if sampling.temperature is None else None)


@functools.partial(jax.jit, static_argnames=("c", "sampling"))
def prefill(c: PolicyConfig, params: dict, tokens: jax.Array, length: jax.Array, *, sampling: Sampling) -> Prefix:
  """Runs prompts i32[P,L] (right-padded, `length` i32[P] >= 1) and keeps their keys and values."""
  attention = causal_attention("auto")

  def attend(layer, qkv, turn):
    q, k, v = split_qkv(qkv)
    q, k = turn(q, k)
    return attention(q, k, v)[0], kv_cache.store(k, v, sampling.cache_dtype)

  _, cache = policy.forward(c, params, tokens, policy.default_positions(tokens), attend, dtype=sampling.dtype)
  last = jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)[:, 0]
  return Prefix(cache=tuple(cache), last_token=last, length=length)


@functools.partial(jax.jit, donate_argnames=("slots",))
def insert(slots: Slots, prefix: Prefix, source: jax.Array, key: jax.Array, limit: jax.Array, group: jax.Array,
           own: Own | None = None) -> Slots:
  """Puts prompt source[b] into slot b with key[b], limit[b], group[b] and its `own`; a slot whose source is negative stays as it
  is."""
  new, source = source >= 0, jnp.maximum(source, 0)

  def write(old, prompts):
    width = min(old.shape[2], prompts.shape[2])  # the host sees to it that real tokens fit
    mask = new.reshape(1, -1, *(1,) * (old.ndim - 2))
    return jax.lax.dynamic_update_slice(old, jnp.where(mask, prompts[:, source, :width], old[:, :, :width]), (0,) * old.ndim)

  put = lambda old, value: jnp.where(new, value, old)
  cache = tuple(kv_cache.pin(jax.tree.map(write, *pair)) for pair in zip(slots.cache, prefix.cache, strict=True))
  # The last prompt token is fed again by the first step: it rewrites its own column and yields the first logits.
  return slots.replace(
    cache=cache, token=put(slots.token, prefix.last_token[source]), position=put(slots.position, prefix.length[source] - 1),
    generated=put(slots.generated, 0), limit=put(slots.limit, limit), group=put(slots.group, group),
    active=slots.active | new, key=put(slots.key, key), logprob_sum=put(slots.logprob_sum, 0.0),
    logprob_min=put(slots.logprob_min, 0.0), confidence_sum=put(slots.confidence_sum, 0.0),
    hidden_sum=jnp.where(new[:, None], 0.0, slots.hidden_sum), own=jax.tree.map(put, slots.own, own))


@functools.partial(jax.jit, donate_argnames=("slots",))
def free_resource(slots: Slots, gone: jax.Array) -> Slots:
  """Ends the rows gone bool[B], whatever they still wanted to say; their slots can be filled again."""
  return slots.replace(active=slots.active & ~gone)


def take_rows(slots: Slots, rows: jax.Array, valid: jax.Array, *, length: int) -> Slots:
  """Gathers slots `rows` i32[R] into a batch of R rows with `length` cache columns; rows with valid False come out idle.

  Over a mesh each shard's new rows must come from its old ones.
  Deletes the old cache as it goes, layer after layer: beside it only one layer of the new one needs room.
  """
  cache = []
  for old in slots.cache:
    cache.append(take_columns(old, rows, length))
    jax.tree.map(lambda x: x.delete(), old)
  return _take_rest(slots.replace(cache=()), rows, valid, length).replace(cache=tuple(cache))


take_columns = jax.jit(kv_cache.take, static_argnames=("length",))


@functools.partial(jax.jit, static_argnames=("length",))
def _take_rest(slots: Slots, rows: jax.Array, valid: jax.Array, length: int) -> Slots:
  rest = jax.tree.map(lambda x: x[rows], slots)
  # An idle row may stand past a shorter cache's end; it still writes one column a step, which must exist.
  return rest.replace(active=rest.active & valid, position=jnp.minimum(rest.position, length - 1))


def _filtered(sampling: Sampling, logits: jax.Array, top_p: jax.Array | float | None) -> jax.Array:
  """logits f32[B,V] with -inf where a filter takes the token out; the most likely token always stays. top_p: one, or f32[B,1]."""
  least = jnp.full_like(logits[:, :1], -jnp.inf)  # a token stays if its logit is at least this
  if sampling.top_k is not None:
    least = jax.lax.top_k(logits, min(sampling.top_k, logits.shape[1]))[0][:, -1:]
  if top_p is not None:
    ranked = jnp.sort(logits, axis=1, descending=True)
    before = jnp.cumsum(jax.nn.softmax(ranked, axis=1), axis=1) - jax.nn.softmax(ranked, axis=1)
    count = jnp.sum(before < top_p, axis=1, keepdims=True)
    least = jnp.maximum(least, jnp.take_along_axis(ranked, jnp.maximum(count - 1, 0), axis=1))
  if sampling.min_p is not None:
    least = jnp.maximum(least, jnp.max(logits, axis=1, keepdims=True) + math.log(max(sampling.min_p, 1e-30)))
  return jnp.where(logits >= least, logits, -jnp.inf)


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
           own: Own | None = None) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Tokens i32[B], their log-probs and DeepConf's confidence there, f32[B], from logits f32[B,V]; key[B], one a row. own: what
  rows choose where sampling.temperature is None.

  By inversion in two levels, a block of the vocabulary and a token in it, each with a uniform number of its own: two
  random numbers a token, and the blocks' sums are the softmax's denominator.
  """
  if own is not None:
    logits = logits / jnp.where(own.temperature > 0, own.temperature, 1.0)[:, None]
  elif sampling.temperature > 0:
    logits = logits / sampling.temperature
  rows, vocab = logits.shape
  top = jnp.max(logits, axis=1, keepdims=True)
  blocks = lambda x: jnp.pad(x - top, ((0, 0), (0, -vocab % _LANES)), constant_values=-jnp.inf).reshape(rows, -1, _LANES)
  sums = lambda x: jnp.sum(jnp.exp(x), axis=2)
  u = jax.vmap(lambda k: jax.random.uniform(k, (2,)))(key)
  kept = blocks(logits)
  block, total = _first_past(sums(kept), u[:, 0])
  confidence = jnp.zeros_like(total)
  if sampling.confidence:  # before filtering, which would make log-probs infinite
    confidence = jnp.log(total) - jnp.mean(_top(kept, min(sampling.confidence, vocab)), axis=1)
  greedy = lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32)
  if sampling.temperature == 0:
    token = greedy()
  else:
    if own is not None:  # a row's own filter sorts the vocabulary: only while somebody asks for it
      top_p = jnp.where(own.top_p < 1, own.top_p, 2.0)[:, None]
      plain = all(f is None for f in (sampling.top_k, sampling.min_p))
      kept = jax.lax.cond(jnp.any(own.top_p < 1) | (not plain), lambda: blocks(_filtered(sampling, logits, top_p)), lambda: kept)
      block, _ = _first_past(sums(kept), u[:, 0])
    elif any(f is not None for f in (sampling.top_k, sampling.top_p, sampling.min_p)):
      kept = blocks(_filtered(sampling, logits, sampling.top_p))
      block, _ = _first_past(sums(kept), u[:, 0])
    inside = jnp.take_along_axis(kept, block[:, None, None], axis=1)[:, 0]
    token = block * _LANES + _first_past(jnp.exp(inside), u[:, 1])[0]
    if own is not None:
      token = jnp.where(own.temperature > 0, token, greedy())
  return token, jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0] - top[:, 0] - jnp.log(total), confidence


def generate_segment(c: PolicyConfig, params: dict, slots: Slots, *, steps: int, sampling: Sampling):
  """Up to `steps` tokens for every active row; ends early when no row is active.

  Returns (slots, tokens i32[B,steps], logprobs f32[B,steps], confidences f32[B,steps]); a row's new tokens come first, as
  many as its `generated` grew. A row stops after a stop token (which counts) or at its limit. The cache must have room:
  position + steps <= S for every active row.
  """
  return segment_program()(c, params, slots, steps=steps, sampling=sampling)


def segment_program():
  """The jitted program behind `generate_segment` for the mesh's platform."""
  return _segment_gpu if sharding.platform() == "gpu" else _segment


def _generate(c: PolicyConfig, params: dict, slots: Slots, *, steps: int, sampling: Sampling):
  rows = slots.token.shape[0]
  stop_ids = jnp.asarray(sampling.stop_ids or (-1,), jnp.int32)
  mesh = jax.sharding.get_abstract_mesh()
  kernel = kv_cache.resolve(sampling.attention, c.head_dim, sampling.cache_dtype) == "triton"
  fused = kernel and (mesh.empty or mesh.size == 1)
  # Of the prompt all but the last token: that one's column is written again by each row's first step. A row that ends within
  # the segment keeps its columns till the next one.
  shared = kv_cache.common(slots.group, slots.active, slots.position - slots.generated) if kernel else None

  def step(carry):
    i, s, said = carry
    cache = list(s.cache)
    def attend(layer, qkv, turn):
      cache[layer], out = kv_cache.step(sampling.attention, cache[layer], qkv, turn, s.position, s.active, shared)
      return out, None

    hidden = policy.forward(c, params, s.token[:, None], s.position[:, None], attend, dtype=sampling.dtype,
                            fused=fused)[0][:, 0]
    key = jax.vmap(jax.random.fold_in)(s.key, s.generated)
    own = s.own and s.own.replace(top_p=jnp.where(s.active, s.own.top_p, 1.0))
    with jax.named_scope("sample"):
      token, logprob, confidence = sample(sampling, key, policy.unembed(params, hidden), own)
    generated = s.generated + s.active.astype(jnp.int32)
    stopped = jnp.any(token[:, None] == stop_ids[None, :], axis=1) | (generated >= s.limit)
    live = lambda new, old: jnp.where(s.active if new.ndim == 1 else s.active[:, None], new, old)
    s = s.replace(cache=tuple(cache), token=live(token, s.token), position=live(s.position + 1, s.position),
                  generated=generated, active=s.active & ~stopped, hidden=live(hidden, s.hidden),
                  hidden_sum=live(s.hidden_sum + hidden[:, :s.hidden_sum.shape[1]].astype(jnp.float32), s.hidden_sum),
                  logprob_sum=live(s.logprob_sum + logprob, s.logprob_sum),
                  logprob_min=live(jnp.minimum(s.logprob_min, logprob), s.logprob_min),
                  confidence_sum=live(s.confidence_sum + confidence, s.confidence_sum))
    put = lambda out, new: jax.lax.dynamic_update_slice(out, new[:, None], (jnp.int32(0), i))
    return i + 1, s, tuple(map(put, said, (token, logprob, confidence)))

  # The host asks the device whether anyone is left only every few steps: a loop of known length needs no answer.
  stride = math.gcd(steps, STRIDE)
  said = tuple(jnp.zeros((rows, steps), dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32))
  _, slots, said = jax.lax.while_loop(
    lambda x: (x[0] < steps) & jnp.any(x[1].active), lambda x: jax.lax.fori_loop(0, stride, lambda _, y: step(y), x),
    (jnp.int32(0), slots, said))
  return slots, *said


_jit = functools.partial(jax.jit, static_argnames=("c", "steps", "sampling"), donate_argnames=("slots",))
_segment = _jit(_generate)
# Measured on an H100 (experiments/LOG.md): cuBLAS is faster than the kernels that XLA's autotuner takes instead.
_segment_gpu = _jit(_generate, compiler_options={"xla_gpu_enable_triton_gemm": False})
