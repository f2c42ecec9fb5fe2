"""The jitted programs that generate text on slots, in JetStream's words: prefill, insert, generate_segment, free_resource.

A slot is a row of a fixed-shape batch with its own KV cache, position, random key and limits; `Slots` is the whole
state, donated from program to program so that the cache is updated in place. A segment is a fixed number of steps in one
program: no host synchronisation per token. Prefill runs once per prompt and `insert` fans its cache out to the rows of a group.
Layers are unrolled here (one cache array a layer): a scanned cache would be copied at every step.

Which rows live, and in which shapes, is the host's business (scheduler.py); what a hidden state is worth, pruning/decision.py's.
"""

import functools
import math

import flax.struct
import jax
import jax.numpy as jnp

from arrol_jax.engine import decode_attention, kv_cache
from arrol_jax.engine.sampling import Sampling, SamplingParams, sample
from arrol_jax.engine.token_counts import BUCKETS, count_tokens
from arrol_jax.models import int8, sharding, transformer
from arrol_jax.models.attention import causal_attention
from arrol_jax.models.layers import split_qkv
from arrol_jax.models.transformer import PolicyConfig
from arrol_jax.running import kept

STRIDE = 8   # steps between two looks at whether any row is active


@flax.struct.dataclass
class Prefix:
  """Caches of prompts, to be inserted into slots."""
  cache: tuple           # kv_cache.Columns by layer, P rows of L columns
  last_token: jax.Array  # i32[P]
  length: jax.Array      # i32[P]
  state: jax.Array       # [P,D]    of the last token at Sampling.taps.prompt ([P,0] where that is None)


@flax.struct.dataclass
class Slots:
  """The state of B rows. `token` at `position` is the next to be fed; columns before `position` of the cache are valid."""
  cache: tuple           # kv_cache.Columns by layer, B rows of S columns
  token: jax.Array       # i32[B]
  position: jax.Array    # i32[B]
  generated: jax.Array   # i32[B]   response tokens so far
  max_tokens: jax.Array       # i32[B]   response tokens at most
  active: jax.Array      # bool[B]  still generating
  group: jax.Array       # i32[B]   the request's prompt: active rows of one group have the same
  key: jax.Array         # key[B]   the request's own: its tokens depend on no other row
  hidden: jax.Array      # [B,D]    final hidden state of the last step in which the row was active
  hidden_sum: jax.Array  # f32[B,D] of all steps that gave a response token ([B,0] where Sampling.pool is off)
  logprob_sum: jax.Array     # f32[B]  over the response's tokens so far
  logprob_min: jax.Array     # f32[B]
  confidence_sum: jax.Array  # f32[B]
  recent: jax.Array      # f32[B,3]  log-prob of about the last 32 tokens, the lowest that was, how many tokens were unlikely
  pruned: jax.Array      # bool[B]   ended by a decision
  taps: tuple            # [B,D] each, as Sampling.taps.states lists them: sums (f32) and last states
  prompt: jax.Array      # [B,D]     the prompt's state ([B,0] where it is not kept)
  counts: jax.Array      # f32[B,H]  token_counts.py ([B,0] where they are not kept)
  sampling_params: SamplingParams | None = None     # where Sampling.temperature is None


def pin(slots: Slots) -> Slots:
  """Pins how slots lie on a mesh, rows over the batch axes: each program gives them on as it was given them, and is compiled
  once."""
  return sharding.constrain_rows(slots.replace(cache=())).replace(cache=tuple(map(kv_cache.pin, slots.cache)))


@functools.partial(kept.jit, static_argnames=("c", "rows", "length", "sampling"))
def init_slots(c: PolicyConfig, rows: int, length: int, sampling: Sampling) -> Slots:
  """`rows` empty slots with room for `length` tokens each."""
  zeros, sums = (functools.partial(jnp.zeros, (rows,), dtype) for dtype in (jnp.int32, jnp.float32))
  cache = tuple(kv_cache.empty(c.kv_heads, rows, length, c.head_dim, sampling.cache_dtype) for _ in range(c.layers))
  return pin(Slots(
    cache=cache, token=zeros(), position=zeros(), generated=zeros(), max_tokens=zeros(), group=zeros(),
    active=jnp.zeros((rows,), bool), key=jax.random.split(jax.random.key(0), rows),
    hidden=jnp.zeros((rows, c.width), sampling.dtype), logprob_sum=sums(), logprob_min=sums(), confidence_sum=sums(),
    recent=jnp.zeros((rows, 3), jnp.float32), pruned=jnp.zeros((rows,), bool),
    hidden_sum=jnp.zeros((rows, c.width if sampling.pool else 0), jnp.float32),
    prompt=jnp.zeros((rows, c.width if sampling.taps.prompt else 0), sampling.dtype),
    taps=tuple(jnp.zeros((rows, c.width), jnp.float32 if kind == "mean" else sampling.dtype)
               for kind, _ in sampling.taps.states),
    counts=jnp.zeros((rows, BUCKETS if sampling.taps.counts else 0), jnp.float32),
    sampling_params=SamplingParams(sums(), sums(), sums(), sums()) if sampling.temperature is None else None))


@functools.partial(kept.jit, static_argnames=("c", "sampling"))
def prefill(c: PolicyConfig, params: dict, tokens: jax.Array, length: jax.Array, *, sampling: Sampling) -> Prefix:
  """Runs prompts i32[P,L] (right-padded, `length` i32[P] >= 1) and keeps their keys and values."""
  attention = causal_attention("auto")

  def attend(_, qkv, rotary):
    q, k, v = split_qkv(qkv)
    q, k = rotary(q, k)
    return attention(q, k, v)[0], kv_cache.store(k, v, sampling.cache_dtype)

  state = []
  tap = lambda layer, x: state.append(x) if layer == sampling.taps.prompt else None
  _, cache = transformer.unrolled(c, params, tokens, transformer.default_positions(tokens), attend, tap=tap)
  end = jnp.maximum(length - 1, 0)[:, None, None]
  state = jnp.take_along_axis(state[0], end, axis=1)[:, 0] if state else jnp.zeros((tokens.shape[0], 0), sampling.dtype)
  last = jnp.take_along_axis(tokens, length[:, None] - 1, axis=1)[:, 0]
  return Prefix(cache=tuple(cache), last_token=last, length=length, state=state)


@functools.partial(kept.jit, donate_argnames=("slots",))
def insert(slots: Slots, prefix: Prefix, source: jax.Array, key: jax.Array, max_tokens: jax.Array, group: jax.Array,
           sampling_params: SamplingParams | None = None) -> Slots:
  """Puts prompt source[b] into slot b with key[b], max_tokens[b], group[b] and its `sampling_params`; a slot whose
  source is negative stays as it is."""
  new, source = source >= 0, jnp.maximum(source, 0)

  def write(old, prompts):
    width = min(old.shape[2], prompts.shape[2])  # the host sees to it that real tokens fit
    mask = new.reshape(1, -1, *(1,) * (old.ndim - 2))
    return jax.lax.dynamic_update_slice(old, jnp.where(mask, prompts[:, source, :width], old[:, :, :width]), (0,) * old.ndim)

  put = lambda old, value: jnp.where(new, value, old)
  put_wide = lambda old, value=0: jnp.where(new[:, None], jnp.asarray(value, old.dtype), old)
  cache = tuple(jax.tree.map(write, *pair) for pair in zip(slots.cache, prefix.cache, strict=True))
  # The last prompt token is fed again by the first step: it rewrites its own column and yields the first logits.
  return pin(slots.replace(
    cache=cache, token=put(slots.token, prefix.last_token[source]), position=put(slots.position, prefix.length[source] - 1),
    generated=put(slots.generated, 0), max_tokens=put(slots.max_tokens, max_tokens), group=put(slots.group, group),
    active=slots.active | new, key=put(slots.key, key), logprob_sum=put(slots.logprob_sum, 0.0),
    logprob_min=put(slots.logprob_min, 0.0), confidence_sum=put(slots.confidence_sum, 0.0),
    hidden_sum=put_wide(slots.hidden_sum), recent=put_wide(slots.recent), counts=put_wide(slots.counts),
    taps=tuple(map(put_wide, slots.taps)), pruned=slots.pruned & ~new,
    prompt=put_wide(slots.prompt, prefix.state[source]) if slots.prompt.shape[1] else slots.prompt,
    sampling_params=jax.tree.map(put, slots.sampling_params, sampling_params)))


@functools.partial(kept.jit, donate_argnames=("slots",))
def free_resource(slots: Slots, gone: jax.Array) -> Slots:
  """Ends the rows gone bool[B], whatever they still wanted to say; their slots can be filled again."""
  return pin(slots.replace(active=slots.active & ~gone))


def take_rows(slots: Slots, rows: jax.Array, valid: jax.Array, *, length: int) -> Slots:
  """Gathers slots `rows` i32[R] into a batch of R rows with `length` cache columns; rows with valid False come out idle.

  Over a mesh each shard's new rows must come from its old ones.
  Deletes the old cache as it goes, layer after layer: beside it only one layer of the new one needs room.
  """
  cache = []
  for old in slots.cache:
    cache.append(take_columns(old, rows, length=length))
    jax.tree.map(lambda x: x.delete(), old)
  return take_rest(slots.replace(cache=()), rows, valid, length).replace(cache=tuple(cache))


take_columns = kept.jit(kv_cache.take, static_argnames=("length",))


@functools.partial(kept.jit, static_argnames=("length",))
def take_rest(slots: Slots, rows: jax.Array, valid: jax.Array, length: int) -> Slots:
  rest = jax.tree.map(lambda x: x[rows], slots)
  # An idle row may stand past a shorter cache's end; it still writes one column a step, which must exist. It is a copy of another
  # row: without tokens it is nobody's sibling.
  return pin(rest.replace(active=rest.active & valid, position=jnp.minimum(rest.position, length - 1),
                          generated=jnp.where(valid, rest.generated, 0)))


def generate_segment(c: PolicyConfig, params: dict, slots: Slots, *, steps: int, sampling: Sampling,
                     most: jax.Array | None = None):
  """Up to `steps` tokens for every active row; ends early when no row is active (but see `asks_nobody`). most i32[]: no more than
  so many, one program for any number of them (which asks after every step whether to go on).

  Returns (slots, tokens i32[B,steps], logprobs f32[B,steps], confidences f32[B,steps]); a row's new tokens come first, as
  many as its `generated` grew. A row stops after a stop token (which counts) or at its limit. The cache must have room:
  position + steps <= S for every active row.
  """
  more = () if most is None else (most,)
  return segment_program(int8.is_int8(params))(c, params, slots, *more, steps=steps, sampling=sampling)


def segment_program(quantized: bool = False):
  """The jitted program behind `generate_segment`. With int8 weights a GPU's compiler may write products itself: the vendor's
  library would need the weights written out in the activations' dtype first."""
  return _segment_int8 if sharding.platform() == "gpu" and quantized else segment


def asks_nobody() -> bool:
  """Whether a segment takes all its steps whoever is left. A GPU's loop of unknown length asks the host, which stands still
  meanwhile and cannot run a segment ahead."""
  return sharding.platform() == "gpu"


_WINDOW = 32.0          # tokens that `Slots.recent` looks back over, about
_UNLIKELY = -math.log(10.0)  # log-prob below which a token is


def _recent(s: Slots, logprob: jax.Array) -> jax.Array:
  """Slots.recent after one more token with its log-prob f32[B]."""
  first = s.generated == 0
  average = jnp.where(first, logprob, s.recent[:, 0] + (logprob - s.recent[:, 0]) / _WINDOW)
  lowest = jnp.where(first, average, jnp.minimum(s.recent[:, 1], average))
  return jnp.stack([average, lowest, s.recent[:, 2] + (logprob < _UNLIKELY)], axis=1)


def _ends(sampling: Sampling, token: jax.Array, chosen: SamplingParams | None) -> jax.Array:
  """bool[B]: whether token i32[B] is a stop token that its row heeds."""
  stops = jnp.any(token[:, None] == jnp.asarray(sampling.stop_ids or (-1,), jnp.int32)[None, :], axis=1)
  return stops if chosen is None or chosen.ignore_stop is None else stops & (chosen.ignore_stop == 0)


def _generate(c: PolicyConfig, params: dict, slots: Slots, most: jax.Array | None = None, *, steps: int, sampling: Sampling):
  rows = slots.token.shape[0]
  mesh = jax.sharding.get_abstract_mesh()
  kernel = decode_attention.resolve(sampling.attention, c.head_dim, sampling.cache_dtype) == "triton"
  fused = kernel and (mesh.empty or mesh.size == 1)
  # Of the prompt all but the last token: that one's column is written again by each row's first step. A row that ends within
  # the segment keeps its columns till the next one.
  shared = kv_cache.shared_prefix(slots.group, slots.active, slots.position - slots.generated) if kernel else None

  def step(carry):
    i, s, said = carry
    def attend(columns, qkv, rotary):
      columns, out = decode_attention.step(sampling.attention, columns, qkv, rotary, s.position, s.active, shared)
      return out, columns

    tapped, wanted = {}, {layer for _, layer in sampling.taps.states}
    tap = lambda layer, x: tapped.update({layer: x[:, 0]}) if layer in wanted else None
    hidden, cache = transformer.unrolled(c, params, s.token[:, None], s.position[:, None], attend, s.cache, fused=fused, tap=tap)
    hidden = hidden[:, 0]
    key = jax.vmap(jax.random.fold_in)(s.key, s.generated)
    chosen = s.sampling_params
    chosen = chosen and chosen.replace(temperature=jnp.where(s.active, chosen.temperature, 1.0),
                                       top_p=jnp.where(s.active, chosen.top_p, 1.0))
    with jax.named_scope("sample"):
      token, logprob, confidence = sample(sampling, key, transformer.unembed(params, hidden), chosen)
    generated = s.generated + s.active.astype(jnp.int32)
    stopped = _ends(sampling, token, chosen) | (generated >= s.max_tokens)
    live = lambda new, old: jnp.where(s.active if new.ndim == 1 else s.active[:, None], new, old)
    s = s.replace(cache=tuple(cache), token=live(token, s.token), position=live(s.position + 1, s.position),
                  generated=generated, active=s.active & ~stopped, hidden=live(hidden, s.hidden),
                  hidden_sum=live(s.hidden_sum + hidden[:, :s.hidden_sum.shape[1]].astype(jnp.float32), s.hidden_sum),
                  recent=live(_recent(s, logprob), s.recent), taps=tuple(
                    live(old + tapped[layer].astype(jnp.float32) if kind == "mean" else tapped[layer], old)
                    for (kind, layer), old in zip(sampling.taps.states, s.taps, strict=True)),
                  counts=count_tokens(s.counts, token, s.active) if sampling.taps.counts else s.counts,
                  logprob_sum=live(s.logprob_sum + logprob, s.logprob_sum),
                  logprob_min=live(jnp.minimum(s.logprob_min, logprob), s.logprob_min),
                  confidence_sum=live(s.confidence_sum + confidence, s.confidence_sum))
    put = lambda out, new: jax.lax.dynamic_update_slice(out, new[:, None], (jnp.int32(0), i))
    return i + 1, s, tuple(map(put, said, (token, logprob, confidence)))

  said = tuple(jnp.zeros((rows, steps), dtype) for dtype in (jnp.int32, jnp.float32, jnp.float32))
  several = lambda count, x: jax.lax.fori_loop(0, count, lambda _, y: step(y), x)
  start = jnp.int32(0), slots, said
  if asks_nobody() and most is None:
    _, slots, said = several(steps, start)
  else:
    stride, end = (math.gcd(steps, STRIDE), steps) if most is None else (1, most)
    _, slots, said = jax.lax.while_loop(lambda x: (x[0] < end) & jnp.any(x[1].active), functools.partial(several, stride), start)
  return pin(slots), *sharding.constrain_rows(said)


_jit = functools.partial(kept.jit, static_argnames=("c", "steps", "sampling"), donate_argnames=("slots",))
segment = _jit(_generate)
_segment_int8 = _jit(_generate, compiler_options={"xla_gpu_enable_triton_gemm": True})
