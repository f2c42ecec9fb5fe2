"""Agreement with siblings: how like the rest of its group a rollout's tokens are, on the device (METHOD 10.4).

The cosine between a row's hashed token counts and the sum of its siblings': shared numbers, names and steps raise it, a path of
its own lowers it. It knows nothing of order, nor of text; a stand-in for consensus. The counts are kept by the
engine (engine/token_counts.py). Axes: B rows, H buckets.
"""

import jax
import jax.numpy as jnp

from arrol_jax.engine.token_counts import BUCKETS, count_tokens

__all__ = ["BUCKETS", "agreement", "count_tokens"]


def agreement(counts: jax.Array, group: jax.Array, standing: jax.Array, rare: bool = False) -> jax.Array:
  """Cosine between a row's counts f32[B,H] and the sum over the other standing rows of its group: f32[B] in [0, 1].

  0 for a row that is alone in its group (i32[B]), has no tokens, or does not stand (bool[B]). rare: a bucket counts
  log((1 + n) / (1 + rows that have it)), n the standing rows of the whole batch: what all say is no agreement. Meant for
  batches of several groups, since what only one group says is rare there.
  """
  counts = jnp.where(standing[:, None], counts, 0).astype(jnp.int32)  # whole numbers: sums are the same in any order
  order = jnp.argsort(group)
  label = jnp.searchsorted(group[order], group)  # the place of its group's first row
  total = jax.ops.segment_sum(counts[order], label[order], group.shape[0], indices_are_sorted=True)
  others, counts = (total[label] - counts).astype(jnp.float32), counts.astype(jnp.float32)
  if rare:
    rows = jnp.sum(standing, dtype=jnp.float32)
    weight = jnp.log((1.0 + rows) / (1.0 + jnp.sum(counts > 0, axis=0, dtype=jnp.float32)))[None, :]
    others, counts = others * weight, counts * weight
  norm = jnp.sqrt(jnp.sum(counts * counts, axis=1) * jnp.sum(others * others, axis=1))
  return jnp.where(norm > 0, jnp.sum(counts * others, axis=1) / jnp.where(norm > 0, norm, 1.0), 0.0)
