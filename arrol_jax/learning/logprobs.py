"""Log-probs of given tokens from hidden states: the unembedding in chunks, forward and backward.

Float32 logits of a whole micro-batch never exist. The backward pass is written out: a chunk's logits are computed again, and with
the softmax's denominator at hand they are read once; nothing is scattered, and the table's gradient is summed in float32.
"""

import functools

import jax
import jax.numpy as jnp

from arrol_jax.models import softmax, transformer
from arrol_jax.models.sharding import constrain, rows_on_a_chip


def chunk_sizes(length: int, most: int) -> tuple[int, int]:
  """Columns of a chunk, about `most` at most, and chunks that cover `length` with few columns to spare."""
  size = min(length, 1 << max(0, most.bit_length() - 1))
  size = -(-length // -(-length // size))
  size = size if size < 8 else min(length, -(-size // 8) * 8)  # a tile of a TPU has 8
  return size, -(-length // size)


def token_logprobs(params: dict, hidden: jax.Array, tokens: jax.Array, used: jax.Array, temperature: jax.Array,
                   chunk_tokens: int) -> tuple[jax.Array, jax.Array]:
  """hidden [I,U,D], tokens i32[I,U] -> log-prob of tokens[i,u] given what stands before it, and the entropy there, f32[I,U].

  Both 0 in column 0 and from used i32[I] on. Logits are divided by `temperature`, as the sampler did. They exist for one chunk
  of columns, `chunk_tokens` tokens of a chip, at a time. The entropy sends no gradient.
  """
  rows, length, _ = hidden.shape
  size, chunks = chunk_sizes(length, chunk_tokens // rows_on_a_chip(rows))
  pad = lambda x: jnp.pad(x, ((0, 0), (0, chunks * size - length)) + ((0, 0),) * (x.ndim - 2))
  split = lambda x: pad(x).reshape(rows, chunks, size, *x.shape[2:]).swapaxes(0, 1)
  following = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
  table, axes = transformer.unembedding(params)
  live = jnp.arange(chunks, dtype=jnp.int32) * size < jnp.max(used)
  out = _chunked(axes, table, split(hidden), split(following), live, jnp.asarray(temperature, jnp.float32))
  real = jnp.arange(length, dtype=jnp.int32)[None, :] < used[:, None]
  late = lambda x: jnp.pad(x.swapaxes(0, 1).reshape(rows, chunks * size)[:, :length - 1], ((0, 0), (1, 0)))
  return tuple(jnp.where(real, late(x), 0.0) for x in out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(axes: str, table: jax.Array, hidden: jax.Array, tokens: jax.Array, live: jax.Array,
             temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
  """hidden [C,I,W,D], tokens i32[C,I,W], live bool[C] -> log-probs and entropies f32[C,I,W], 0 in chunks that are not live."""
  return _forward(axes, table, hidden, tokens, live, temperature)[0]


def _product(axes: str, table: jax.Array, hidden: jax.Array, temperature: jax.Array):
  """The table in hidden's dtype with its width whole on every device, once for all chunks; and logits f32[I,W,V] of h [I,W,D]."""
  table = constrain(table.astype(hidden.dtype), *(("vocab", None) if axes == "vd" else (None, "vocab")))
  return table, lambda h: jnp.einsum(f"iwd,{axes}->iwv", h, table, preferred_element_type=jnp.float32) / temperature


def _forward(axes, table, hidden, tokens, live, temperature):
  _, logits_of = _product(axes, table, hidden, temperature)

  def chunk(h, t):
    logits = logits_of(h)
    top, total, below = softmax.sums(logits, entropy=True)
    chosen = jnp.take_along_axis(logits, t[:, :, None], axis=-1)[:, :, 0]
    return chosen - top - jnp.log(total), jnp.log(total) - below / total, top + jnp.log(total)

  nothing = lambda h, t: (jnp.zeros(t.shape, jnp.float32),) * 3
  *out, norm = jax.lax.map(lambda x: jax.lax.cond(x[0], chunk, nothing, *x[1:]), (live, hidden, tokens))
  return tuple(out), (table, hidden, tokens, live, temperature, norm)


def _backward(axes, saved, slopes):
  """d log p_t / d logit_v = [v = t] - p_v. What a shard's tokens add to the table's stays on its device until the loop is over."""
  wide, hidden, tokens, live, temperature, norm = saved
  table, logits_of = _product(axes, wide, hidden, temperature)
  shards = hidden.shape[1] // rows_on_a_chip(hidden.shape[1])
  by_shard = lambda x: x.reshape(shards, -1, *x.shape[1:])
  apart = lambda total: constrain(total, "batch", *(("vocab", None) if axes == "vd" else (None, "vocab")))

  def chunk(total, h, t, norm, slope):
    logits = logits_of(h)
    here = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, None, :] == t[:, :, None]
    slope = ((here - jnp.exp(logits - norm[:, :, None])) * (slope / temperature)[:, :, None]).astype(h.dtype)
    more = jnp.einsum(f"xiwd,xiwv->x{axes}", by_shard(h), by_shard(slope), preferred_element_type=jnp.float32)
    return apart(total + more), jnp.einsum(f"iwv,{axes}->iwd", slope, table)

  nothing = lambda total, h, *_: (total, jnp.zeros_like(h))
  total, into_hidden = jax.lax.scan(lambda total, x: jax.lax.cond(x[0], chunk, nothing, total, *x[1:]),
                                    apart(jnp.zeros((shards, *wide.shape), jnp.float32)), (live, hidden, tokens, norm, slopes[0]))
  return jnp.sum(total, axis=0).astype(wide.dtype), into_hidden, None, None, None


_chunked.defvjp(_forward, _backward)
