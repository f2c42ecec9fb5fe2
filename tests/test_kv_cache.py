"""Every way to read the cache gives plain attention over a row's own columns; int8 stays close; writes touch one column."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrol_jax.engine import decode_attention, decode_kernel, kv_cache
from arrol_jax.engine.decode_kernel import Tiling
from arrol_jax.models import sharding
from arrol_jax.models.layers import Rotary

B, M, G, S, H = 5, 2, 3, 192, 128
LENGTH = np.array([0, 1, 64, 101, 192], np.int32)


def inputs(dtype, cache=None, head_dim=H):
  rng = np.random.default_rng(0)
  q, k, v = (jnp.asarray(rng.normal(size=shape), dtype) for shape in
             ((B, M * G, head_dim), (B, S, M, head_dim), (B, S, M, head_dim)))
  return q, k, v, kv_cache.store(k, v, cache or dtype)


def plain(q, k, v):
  """Softmax attention of one query a row over its own columns, in NumPy; zero where there is none."""
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  out = np.zeros(q.shape)
  for b in range(B):
    for n in range(M * G) if LENGTH[b] else ():
      score = k[b, :LENGTH[b], n // G] @ q[b, n] / np.sqrt(q.shape[-1])
      weight = np.exp(score - score.max())
      out[b, n] = weight / weight.sum() @ v[b, :LENGTH[b], n // G]
  return out


def merged(q, k, v):
  """q [B,N,H], k and v [B,M,H] as one projection gives them, [B,M,N/M+2,H]."""
  b, m, h = k.shape
  return jnp.concatenate([q.reshape(b, m, -1, h), k[:, :, None], v[:, :, None]], axis=2)


def run_triton(splits, block=64):
  """The kernel's step, made to look like plain reading: the last column is taken out of the cache and given as the new one."""
  def run(q, columns, length):
    q, length = jnp.asarray(q), jnp.asarray(length)
    at = jnp.maximum(length - 1, 0)
    pick = lambda x: 1 if x is None else x[:, jnp.arange(B), at]
    last = lambda x, scale: (pick(x) * (pick(scale)[..., None] if scale is not None else 1)).swapaxes(0, 1)
    k, v = last(columns.k, columns.k_scale), last(columns.v, columns.v_scale)
    hole = jax.tree.map(lambda x: x.at[:, jnp.arange(B), at].set(0), columns)
    still = Rotary(jnp.ones((B, q.shape[2] // 2)), jnp.zeros((B, q.shape[2] // 2)), None, None, 1e-6)
    after, out = decode_kernel.step_triton(hole, merged(q, k, v), length, still, interpret=True, tiling=Tiling(splits, block))
    some = lambda x: np.asarray(x)[:, 1:]  # row 0 is idle: nothing is written
    for a, b in zip(jax.tree.leaves(after), jax.tree.leaves(columns), strict=True):
      np.testing.assert_allclose(some(a), some(b), rtol=1e-6)
    return out

  return run


@pytest.mark.parametrize("run", [decode_attention.attend_xla, run_triton(1), run_triton(2), run_triton(3, 32)],
                         ids=["xla", "triton", "two splits", "three splits"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_each_way_is_plain_attention(run, head_dim):
  q, k, v, columns = inputs("float32", head_dim=head_dim)
  got = np.asarray(run(q, columns, LENGTH))
  np.testing.assert_allclose(got[1:], plain(q, k, v)[1:], atol=2e-6)
  assert np.all(np.isfinite(got[0]))


@pytest.mark.parametrize("group, splits", [(16, 1), (17, 1), (24, 2), (40, 1)])
def test_the_kernel_has_room_for_any_number_of_query_heads_a_kv_head(group, splits):
  """More than the 16 rows of its smallest product: every head is plain attention, the last ones too."""
  _, k, v, columns = inputs("float32", head_dim=64)
  q = jnp.asarray(np.random.default_rng(1).normal(size=(B, M * group, 64)), jnp.float32)
  want = np.asarray(decode_attention.attend_xla(q, columns, LENGTH))
  np.testing.assert_allclose(np.asarray(run_triton(splits)(q, columns, LENGTH))[1:], want[1:], atol=2e-6)


def test_the_tpu_kernel_is_plain_attention_in_bfloat16():
  q, k, v, columns = inputs("bfloat16")
  got = np.asarray(decode_attention.attend_tpu(q, columns, LENGTH, interpret=True), np.float32)
  np.testing.assert_allclose(got[1:], plain(q, k, v)[1:], atol=0.02)


@pytest.mark.parametrize("run", [decode_attention.attend_xla, run_triton(1), run_triton(2)], ids=["xla", "triton", "two splits"])
def test_an_int8_cache_is_close_and_exact_in_what_it_holds(run):
  q, k, v, columns = inputs("float32", "int8")
  assert columns.k.dtype == jnp.int8
  pairs = (columns.k, columns.k_scale), (columns.v, columns.v_scale)
  held = [np.asarray(x, np.float32) * np.asarray(s)[..., None] for x, s in pairs]
  step = np.asarray(columns.k_scale)[..., None]
  assert np.all(np.abs(held[0] - np.asarray(k).transpose(2, 0, 1, 3)) <= 0.5001 * step)
  got = np.asarray(run(q, columns, LENGTH))
  np.testing.assert_allclose(got[1:], plain(q, *(x.transpose(1, 2, 0, 3) for x in held))[1:], atol=2e-6)
  np.testing.assert_allclose(got[1:], plain(q, k, v)[1:], atol=0.05)


def test_columns_beyond_a_rows_length_are_never_read():
  q, k, v, columns = inputs("float32")
  beyond = np.arange(S)[None, None, :, None] >= LENGTH[None, :, None, None]
  wild = jax.tree.map(lambda x: jnp.where(beyond, jnp.where(x > 0, 1e30, -1e30), x), columns)
  for run in (decode_attention.attend_xla, run_triton(1), run_triton(2)):
    np.testing.assert_array_equal(run(q, wild, LENGTH)[1:], run(q, columns, LENGTH)[1:])


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_write_touches_one_column_a_row(dtype):
  _, k, v, columns = inputs("float32", dtype)
  position = jnp.array([0, 191, 7, 7, 100])
  new = jax.random.normal(jax.random.key(0), (2, B, M, H))
  after = kv_cache.write(columns, new[0], new[1], position)
  want = kv_cache.store(k.at[jnp.arange(B), position].set(new[0]), v.at[jnp.arange(B), position].set(new[1]), dtype)
  jax.tree.map(np.testing.assert_array_equal, after, want)


def test_a_write_to_a_donated_cache_copies_nothing():
  """The compiled program has no second cache: its temporary memory is smaller than one."""
  columns = jax.eval_shape(lambda: kv_cache.empty(8, 64, 1024, 128, "float32"))
  new = jax.ShapeDtypeStruct((64, 8, 128), jnp.float32)
  program = jax.jit(kv_cache.write, donate_argnums=0).lower(columns, new, new, jax.ShapeDtypeStruct((64,), jnp.int32)).compile()
  memory = program.memory_analysis()
  assert memory.alias_size_in_bytes == 2 * 8 * 64 * 1024 * 128 * 4
  assert memory.temp_size_in_bytes < memory.alias_size_in_bytes / 50


def turn_of(position, scaled=True, head_dim=64):
  angle = position.astype(jnp.float32)[:, None, None, None] * (1000.0 ** -jnp.linspace(0, 1, head_dim // 2))[None, None, None, :]
  scale = 1.0 + 0.3 * jax.random.normal(jax.random.key(8), (2, head_dim)) if scaled else (None, None)
  return Rotary(jnp.cos(angle), jnp.sin(angle), *scale, 1e-6)


@pytest.mark.parametrize("dtype, scaled, splits", [("float32", True, 1), ("float32", False, 2), ("int8", True, 1)])
def test_the_kernel_turns_and_writes_as_the_plain_way_does(dtype, scaled, splits):
  _, k, v, columns = inputs("float32", dtype, head_dim=64)
  rng = np.random.default_rng(2)
  q, k, v = (jnp.asarray(rng.normal(size=(B, 1, n, 64)), jnp.float32) for n in (M * G, M, M))
  length = jnp.asarray(LENGTH)
  turn = turn_of(length - 1, scaled)
  qkv = merged(q[:, 0], k[:, 0], v[:, 0])
  want_columns, want = decode_attention.step("xla", columns, qkv[:, None], turn, jnp.maximum(length - 1, 0), length > 0)
  flat = turn._replace(cos=turn.cos[:, 0, 0], sin=turn.sin[:, 0, 0])
  got_columns, got = decode_kernel.step_triton(columns, qkv, length, flat, interpret=True, tiling=Tiling(splits))
  np.testing.assert_allclose(got[1:], want[1:, 0], atol=3e-6)
  for a, b in zip(jax.tree.leaves(got_columns), jax.tree.leaves(want_columns), strict=True):
    np.testing.assert_allclose(a[:, 1:], b[:, 1:], atol=1e-6)  # row 0 is idle
  jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[:, 0], b[:, 0]), got_columns, columns)


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 1, 2)])
def test_sharded_reading_and_writing(shape):
  """Rows over data and fsdp, heads over tensor: same values, and no device asks another for its columns."""
  mesh = sharding.make_mesh(*shape)
  rng = np.random.default_rng(1)
  q, k, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((8, 6, 64), (8, 128, 2, 64), (8, 128, 2, 64)))
  length, columns = jnp.arange(8, dtype=jnp.int32) * 16 + 1, kv_cache.store(k, v, "float32")

  turn = turn_of(length - 1)

  def step(columns, qkv, implementation):
    return decode_attention.step(implementation, columns, qkv, turn, length - 1, length > 1)

  qkv = merged(q, k[:, 0], v[:, 0])[:, None]
  want = jax.jit(step, static_argnums=2)(columns, qkv, "xla")
  for implementation in ("xla", "triton"):
    with jax.set_mesh(mesh):
      placed = jax.jit(kv_cache.pin)(columns)
      program = jax.jit(step, static_argnums=2).lower(placed, qkv, implementation).compile()
      got = program(placed, qkv)
    np.testing.assert_allclose(got[1][1:], want[1][1:], atol=3e-6)  # row 0 is idle
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[:, 1:], b[:, 1:], atol=2e-6), got[0], want[0])
    assert "all-gather" not in program.as_text() or implementation == "triton"  # the interpreter's loops gather, a kernel cannot


def test_an_unknown_name_is_refused():
  q, k, v, columns = inputs("float32")
  with pytest.raises(ValueError, match="must be one of"):
    turn = turn_of(jnp.asarray(LENGTH), head_dim=H)
    decode_attention.step("flash", columns, merged(q, k[:, 0], v[:, 0])[:, None], turn, LENGTH, LENGTH > 0)


def test_rows_have_in_common_what_their_first_active_one_holds():
  group, active = jnp.array([4, 4, 7, 4, 7, 9]), jnp.array([False, True, True, True, True, True])
  shared = kv_cache.shared_prefix(group, active, jnp.arange(6))
  np.testing.assert_array_equal(shared.row, [0, 1, 2, 1, 2, 5])  # row 0 is idle: whatever it holds is its own
  with jax.set_mesh(sharding.make_mesh(2, 1, 1)):
    shared = jax.jit(kv_cache.shared_prefix)(group, active, jnp.arange(6))
  np.testing.assert_array_equal(shared.row, [0, 1, 2, 0, 1, 2])  # numbers within each half of the rows


@pytest.mark.parametrize("dtype, splits, block", [("float32", 1, 64), ("float32", 2, 32), ("int8", 1, 32)])
def test_common_columns_are_read_in_one_row_and_change_no_bit(dtype, splits, block):
  """Rows 1 to 4 share their first 70 columns; where a whole block is shared, nobody looks at the copies."""
  _, k, v, _ = inputs("float32", dtype, head_dim=64)
  k, v = (x.at[2:, :70].set(x[1, :70]) for x in (k, v))
  columns, length = kv_cache.store(k, v, dtype), jnp.array([0, 71, 100, 150, 192], jnp.int32)
  qkv = jnp.asarray(np.random.default_rng(3).normal(size=(B, M, G + 2, 64)), jnp.float32)
  turn = turn_of(length - 1)
  flat = turn._replace(cos=turn.cos[:, 0, 0], sin=turn.sin[:, 0, 0])
  shared = kv_cache.shared_prefix(jnp.array([5, 5, 5, 5, 5]), length > 0, jnp.full(B, 70))
  how = dict(interpret=True, tiling=Tiling(splits, block))
  run = lambda columns, shared: decode_kernel.step_triton(columns, qkv, length, flat, shared, **how)
  want_columns, want = run(columns, None)
  got_columns, got = run(columns, shared)
  np.testing.assert_array_equal(got[1:], want[1:])
  jax.tree.map(np.testing.assert_array_equal, got_columns, want_columns)
  spoilt = jax.tree.map(lambda x: x.at[:, 2:, :70 // block * block].set(99), columns)
  np.testing.assert_array_equal(run(spoilt, shared)[1][1:], want[1:])
