"""Log-probs of given tokens from hidden states: the unembedding in chunks, forward and backward.

Float32 logits of a whole micro-batch never exist. The backward pass is written out: with the softmax's denominator at hand a
chunk's logits are read once, nothing is scattered, and the table's gradient is summed in float32. Where a token's loss depends on
its own log-prob alone, gradients are taken while the chunk's logits are there (`pulled_logprobs`, as fused linear cross entropy
does); else they are computed again.
"""

from collections.abc import Callable
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


class _Columns:
  """Columns [I,U] in chunks [C,I,W] and back. A token's log-prob stands with the hidden state before it, one column earlier."""

  def __init__(self, used: jax.Array, rows: int, length: int, chunk_tokens: int):
    self._size, self._chunks = chunk_sizes(length, chunk_tokens // rows_on_a_chip(rows))
    self._real = jnp.arange(length, dtype=jnp.int32)[None, :] < used[:, None]
    self.live = jnp.arange(self._chunks, dtype=jnp.int32) * self._size < jnp.max(used)

  def split(self, x: jax.Array) -> jax.Array:
    """x [I,U,...] -> [C,I,W,...]."""
    rows, length, *rest = x.shape
    x = jnp.pad(x, ((0, 0), (0, self._chunks * self._size - length)) + ((0, 0),) * len(rest))
    return x.reshape(rows, self._chunks, self._size, *rest).swapaxes(0, 1)

  def split_next(self, x: jax.Array) -> jax.Array:
    """x [I,U] -> [C,I,W], each column's value where the hidden state before it stands."""
    return self.split(jnp.pad(x[:, 1:], ((0, 0), (0, 1))))

  def join(self, x: jax.Array) -> jax.Array:
    """What stands with hidden states, [C,I,W] -> with the tokens after them, [I,U]: 0 in column 0 and where nothing is used."""
    rows, length = self._real.shape
    return jnp.where(self._real, jnp.pad(x.swapaxes(0, 1).reshape(rows, -1)[:, :length - 1], ((0, 0), (1, 0))), 0.0)


def token_logprobs(params: dict, hidden: jax.Array, tokens: jax.Array, used: jax.Array, temperature: jax.Array,
                   chunk_tokens: int) -> tuple[jax.Array, jax.Array]:
  """hidden [I,U,D], tokens i32[I,U] -> log-prob of tokens[i,u] given what stands before it, and the entropy there, f32[I,U].

  Both 0 in column 0 and from used i32[I] on. Logits are divided by `temperature`, as the sampler did. They exist for one chunk
  of columns, `chunk_tokens` tokens of a chip, at a time. The entropy sends no gradient.
  """
  columns = _Columns(used, *tokens.shape, chunk_tokens)
  table, axes = transformer.unembedding(params)
  out = _chunked(axes, table, columns.split(hidden), columns.split_next(tokens), columns.live,
                 jnp.asarray(temperature, jnp.float32))
  return tuple(columns.join(x) for x in out)


def pulled_logprobs(params: dict, hidden: jax.Array, tokens: jax.Array, used: jax.Array, temperature: jax.Array,
                    chunk_tokens: int, slope: Callable, inputs) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`token_logprobs` whose logits are computed once, and what sends the gradient of a loss: (f32[], f32[I,U], f32[I,U]).

  slope(log-probs f32[I,W], chunk of `inputs`) -> the loss's derivative by each log-prob, f32[I,W]; inputs: a tree of f32[I,U], as
  `tokens` are. The first value is 0 and has the loss's gradient; log-probs and entropies send none.
  """
  columns = _Columns(used, *tokens.shape, chunk_tokens)
  table, axes = transformer.unembedding(params)
  pull, *out = _pulled(axes, slope, table, columns.split(hidden), columns.split_next(tokens), columns.live,
                       jnp.asarray(temperature, jnp.float32), jax.tree.map(columns.split_next, inputs))
  return pull, *(columns.join(jax.lax.stop_gradient(x)) for x in out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _chunked(axes: str, table: jax.Array, hidden: jax.Array, tokens: jax.Array, live: jax.Array,
             temperature: jax.Array) -> tuple[jax.Array, jax.Array]:
  """hidden [C,I,W,D], tokens i32[C,I,W], live bool[C] -> log-probs and entropies f32[C,I,W], 0 in chunks that are not live."""
  return _forward(axes, table, hidden, tokens, live, temperature)[0]


def _product(axes: str, table: jax.Array, hidden: jax.Array, temperature: jax.Array):
  """The table in hidden's dtype with its width whole on every device, once for all chunks; and logits f32[I,W,V] of h [I,W,D]."""
  table = constrain(table.astype(hidden.dtype), *(("vocab", None) if axes == "vd" else (None, "vocab")))
  return table, lambda h: jnp.einsum(f"iwd,{axes}->iwv", h, table, preferred_element_type=jnp.float32) / temperature


def _values(logits: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """logits f32[I,W,V], tokens i32[I,W] -> their log-probs, the entropies and the softmax's log denominators, f32[I,W]."""
  top, total, below = softmax.sums(logits, entropy=True)
  chosen = jnp.take_along_axis(logits, t[:, :, None], axis=-1)[:, :, 0]
  return chosen - top - jnp.log(total), jnp.log(total) - below / total, top + jnp.log(total)


def _nowhere(t: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """`_values` of a chunk that is not live."""
  return (jnp.zeros(t.shape, jnp.float32),) * 3


class _Pull:
  """Gradients of one chunk: d log p_t / d logit_v = [v = t] - p_v. What a shard's tokens add to the table's stays there until the
  loop over chunks is over."""

  def __init__(self, axes: str, wide: jax.Array, table: jax.Array, hidden: jax.Array, temperature: jax.Array):
    self._axes, self._wide, self._table, self._temperature = axes, wide, table, temperature
    self._shards = hidden.shape[1] // rows_on_a_chip(hidden.shape[1])

  def _apart(self, total: jax.Array) -> jax.Array:
    return constrain(total, "batch", *(("vocab", None) if self._axes == "vd" else (None, "vocab")))

  def start(self) -> jax.Array:
    """The table's gradient before the first chunk, by shard."""
    return self._apart(jnp.zeros((self._shards, *self._wide.shape), jnp.float32))

  def add(self, total, h, t, logits, norm, slope) -> tuple[jax.Array, jax.Array]:
    """`total` with what a chunk adds, and the gradient of its h [I,W,D]; slope f32[I,W]: the loss's, by log-prob."""
    by_shard = lambda x: x.reshape(self._shards, -1, *x.shape[1:])
    here = jnp.arange(logits.shape[-1], dtype=jnp.int32)[None, None, :] == t[:, :, None]
    slope = ((here - jnp.exp(logits - norm[:, :, None])) * (slope / self._temperature)[:, :, None]).astype(h.dtype)
    more = jnp.einsum(f"xiwd,xiwv->x{self._axes}", by_shard(h), by_shard(slope), preferred_element_type=jnp.float32)
    return self._apart(total + more), jnp.einsum(f"iwv,{self._axes}->iwd", slope, self._table)

  def end(self, total: jax.Array) -> jax.Array:
    return jnp.sum(total, axis=0).astype(self._wide.dtype)


def _forward(axes, table, hidden, tokens, live, temperature):
  _, logits_of = _product(axes, table, hidden, temperature)
  chunk = lambda h, t: _values(logits_of(h), t)
  *out, norm = jax.lax.map(lambda x: jax.lax.cond(x[0], chunk, lambda h, t: _nowhere(t), *x[1:]), (live, hidden, tokens))
  return tuple(out), (table, hidden, tokens, live, temperature, norm)


def _backward(axes, saved, slopes):
  wide, hidden, tokens, live, temperature, norm = saved
  table, logits_of = _product(axes, wide, hidden, temperature)
  pull = _Pull(axes, wide, table, hidden, temperature)
  chunk = lambda total, h, t, norm, slope: pull.add(total, h, t, logits_of(h), norm, slope)
  nothing = lambda total, h, *_: (total, jnp.zeros_like(h))
  total, into_hidden = jax.lax.scan(lambda total, x: jax.lax.cond(x[0], chunk, nothing, total, *x[1:]), pull.start(),
                                    (live, hidden, tokens, norm, slopes[0]))
  return pull.end(total), into_hidden, None, None, None


_chunked.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _pulled(axes: str, slope: Callable, table: jax.Array, hidden: jax.Array, tokens: jax.Array, live: jax.Array,
            temperature: jax.Array, inputs) -> tuple[jax.Array, jax.Array, jax.Array]:
  """0 with the loss's gradient, f32[]; then as `_chunked`."""
  return jnp.zeros((), jnp.float32), *_forward(axes, table, hidden, tokens, live, temperature)[0]


def _pulled_forward(axes, slope, wide, hidden, tokens, live, temperature, inputs):
  table, logits_of = _product(axes, wide, hidden, temperature)
  pull = _Pull(axes, wide, table, hidden, temperature)

  def chunk(total, h, t, inputs):
    logits = logits_of(h)
    logprobs, entropy, norm = _values(logits, t)
    total, into_hidden = pull.add(total, h, t, logits, norm, slope(logprobs, inputs))
    return total, (logprobs, entropy, into_hidden)

  nothing = lambda total, h, t, inputs: (total, (*_nowhere(t)[:2], jnp.zeros_like(h)))
  total, (*out, into_hidden) = jax.lax.scan(lambda total, x: jax.lax.cond(x[0], chunk, nothing, total, *x[1:]), pull.start(),
                                            (live, hidden, tokens, inputs))
  return (jnp.zeros((), jnp.float32), *out), (pull.end(total), into_hidden)


def _pulled_backward(axes, slope, saved, slopes):
  total, into_hidden = saved
  scale = lambda x: (slopes[0] * x).astype(x.dtype)
  return scale(total), scale(into_hidden), None, None, None, None


_pulled.defvjp(_pulled_forward, _pulled_backward)
