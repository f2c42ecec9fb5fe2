"""Agreement with siblings: counts of hashed tokens as decoding steps add them, and who is the odd one out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrol_jax.engine.token_counts import bucket_of
from arrol_jax.pruning.siblings import agreement, count_tokens


def counted(texts, buckets=256):
  """Counts f32[B,H] of token lists of any length, one decoding step at a time."""
  counts = jnp.zeros((len(texts), buckets), jnp.float32)
  step = jax.jit(count_tokens)
  for t in range(max(map(len, texts))):
    token = np.array([x[t] if t < len(x) else 7 for x in texts], np.int32)
    counts = step(counts, token, np.array([t < len(x) for x in texts]))
  return counts


def test_counts_are_those_of_the_tokens():
  texts = [[5, 5, 9], [151_000], [3, 200_000, 3, 5]]
  counts = np.asarray(counted(texts))
  for row, text in zip(counts, texts, strict=True):
    np.testing.assert_array_equal(row, np.bincount(bucket_of(jnp.array(text)), minlength=256))


def test_buckets_are_used_evenly():
  share = np.bincount(bucket_of(jnp.arange(151_936)), minlength=256) / 151_936
  assert share.min() > 0.9 / 256 and share.max() < 1.1 / 256
  assert len(set(np.asarray(bucket_of(jnp.arange(16))).tolist())) == 16  # neighbours fall apart
  with pytest.raises(ValueError, match="power of two"):
    bucket_of(jnp.arange(3), 100)


def test_cosine_by_hand():
  """Rows (1, 1), (1, 0), (0, 2): against (1, 2), (1, 3), (2, 1)."""
  counts = jnp.zeros((3, 4)).at[:, :2].set(jnp.array([[1.0, 1.0], [1.0, 0.0], [0.0, 2.0]]))
  out = agreement(counts, jnp.zeros(3, jnp.int32), jnp.ones(3, bool))
  np.testing.assert_allclose(out, [3 / np.sqrt(2 * 5), 1 / np.sqrt(10), 2 / (2 * np.sqrt(5))], rtol=1e-6)


def test_the_odd_one_out_agrees_least_wherever_rows_lie():
  rng = np.random.default_rng(0)
  common = rng.integers(0, 50_000, 30)
  texts = [[*rng.permutation(common)[:20], *rng.integers(0, 50_000, 5)] for _ in range(5)] + [rng.integers(0, 50_000, 25)]
  others = [rng.integers(0, 50_000, 25) for _ in range(4)]
  counts, group = np.asarray(counted(texts + others)), np.array([0] * 6 + [1] * 4, np.int32)
  for rare in (False, True):
    out = np.asarray(agreement(counts, group, np.ones(10, bool), rare))
    assert np.argmin(out[:6]) == 5 and out[:5].min() > 1.5 * out[5]
    at = rng.permutation(10)
    np.testing.assert_allclose(agreement(counts[at], group[at], np.ones(10, bool), rare), out[at], rtol=1e-5)


def test_alone_silent_or_gone_is_zero():
  """Rows: a pair, one alone, one whose sibling has gone, that sibling, one without tokens."""
  counts = counted([[1, 2], [1, 3], [1, 2], [1, 2], [1, 2], []])
  group, standing = np.array([0, 0, 1, 2, 2, 0], np.int32), np.array([1, 1, 1, 1, 0, 1], bool)
  out = np.asarray(agreement(counts, group, standing))
  np.testing.assert_allclose(out, [0.5, 0.5, 0, 0, 0, 0], atol=1e-6)


def test_what_all_say_is_no_agreement():
  """Rows of two groups share tokens 1 to 8; within each, what else they say is what counts."""
  common = list(range(1, 9))
  counts = counted([common + [100, 200], common + [100, 200], common + [300], common + [400]])
  group, everyone = np.array([0, 0, 1, 1], np.int32), np.ones(4, bool)
  plain, rare = (np.asarray(agreement(counts, group, everyone, flag)) for flag in (False, True))
  assert plain[2] > 0.8 and rare[2] == pytest.approx(0.0, abs=1e-6) and rare[0] == pytest.approx(1.0, abs=1e-6)
