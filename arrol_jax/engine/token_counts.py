"""Hashed counts of each row's tokens, kept while decoding: what agreement with siblings (pruning/siblings.py) is computed from.

A token's bucket is the top bits of its id times an odd constant (multiplicative hashing, Knuth): neighbours in the vocabulary
fall apart. H buckets, a power of two. Axes: B rows.
"""

import jax
import jax.numpy as jnp

BUCKETS = 256
_GOLDEN = 2654435769  # 2^32 / golden ratio, odd


def bucket_of(token: jax.Array, buckets: int = BUCKETS) -> jax.Array:
  """Bucket of each token i32[...]: i32[...] in [0, buckets). Raises ValueError where `buckets` is no power of two above 1."""
  bits = buckets.bit_length() - 1
  if buckets != 1 << bits or bits < 1:
    raise ValueError(f"buckets must be a power of two above 1, got {buckets}")
  return ((token.astype(jnp.uint32) * jnp.uint32(_GOLDEN)) >> (32 - bits)).astype(jnp.int32)


def count_tokens(counts: jax.Array, token: jax.Array, active: jax.Array) -> jax.Array:
  """counts f32[B,H] with one more in the bucket of token i32[B], for each row active bool[B]: no scatter."""
  buckets = counts.shape[1]
  hit = bucket_of(token, buckets)[:, None] == jnp.arange(buckets, dtype=jnp.int32)[None, :]
  return counts + (hit & active[:, None]).astype(counts.dtype)
