"""The decoding step on a layer's cache: add each row's new column, attend to all of the row's.

`step` has three ways: "xla" scatters the new column, reads all S columns of every row and masks; "triton" is our Pallas kernel
for NVIDIA GPUs (decode_kernel.py), which reads each row's own columns only and writes the new one as it goes; "tpu" is JAX's
Pallas paged-attention kernel with the rows' columns as its pages.
"""

import functools

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from arrol_jax.engine.decode_kernel import step_triton
from arrol_jax.engine.kv_cache import BLOCK, Columns, SharedPrefix, by_shard, specs, write
from arrol_jax.models.layers import Rotary, split_qkv
from arrol_jax.models.sharding import platform

IMPLEMENTATIONS = ("auto", "xla", "triton", "tpu")


def step(implementation: str, columns: Columns, qkv: jax.Array, rotary: Rotary, position: jax.Array, active: jax.Array,
         shared: SharedPrefix | None = None) -> tuple[Columns, jax.Array]:
  """One decoding step: qkv [B,1,M,N/M+2,H] as projected (transformer.unstack), turned, its key and value written at position
  i32[B], its queries' attention over columns 0..position -> (columns, [B,1,N,H]).

  A row that is not active bool[B] reads nothing and gives anything finite. shared: copies that need not be read twice; it never
  changes a result. Raises ValueError for another implementation's name.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(f"decode attention is {implementation!r}; it must be one of {', '.join(IMPLEMENTATIONS)}")
  choice = resolve(implementation, columns.k.shape[3], columns.k.dtype)
  length = jnp.where(active, position + 1, 0)
  interpret = platform() == "cpu"
  cache, heads, rows = specs(columns, qkv.shape[0])
  if choice == "triton":
    def kernel(columns, qkv, length, cos, sin, scales, shared):
      return step_triton(columns, qkv, length, Rotary(cos, sin, *scales, rotary.eps), shared, interpret=interpret)
    run = by_shard(kernel, (cache, heads, rows, rows, rows, PartitionSpec(), rows), (cache, heads))
    columns, out = run(columns, qkv[:, 0], length, rotary.cos[:, 0, 0], rotary.sin[:, 0, 0], rotary[2:4], shared)
    return columns, out[:, None]
  q, k, v = split_qkv(qkv)
  q, k = rotary(q, k)
  columns = write(columns, k[:, 0], v[:, 0], position)
  if choice == "xla":
    return columns, attend_xla(q[:, 0], columns, length)[:, None]
  run = by_shard(functools.partial(attend_tpu, interpret=interpret), (heads, cache, rows), heads)
  return columns, run(q[:, 0], columns, length)[:, None]


def resolve(implementation: str, head_dim: int, dtype) -> str:
  """What "auto" means for a cache here: the kernel that reads each row's own length where there is one."""
  if implementation != "auto":
    return implementation
  target = platform()
  if target == "gpu" and jnp.dtype(dtype) != jnp.float32 and head_dim & (head_dim - 1) == 0:
    return "triton"
  return "tpu" if target == "tpu" and head_dim % 128 == 0 and jnp.dtype(dtype) != jnp.int8 else "xla"


def attend_xla(q: jax.Array, columns: Columns, length: jax.Array) -> jax.Array:
  """The plain way: all columns, masked; softmax in float32."""
  b, n, h = q.shape
  m, s = columns.k.shape[0], columns.k.shape[2]
  q = q.reshape(b, m, n // m, h)
  score = jnp.einsum("bmgh,mbsh->bmgs", q, columns.k.astype(q.dtype), preferred_element_type=jnp.float32) * h**-0.5
  by_row = lambda scale: scale.swapaxes(0, 1)[:, :, None, :]
  if columns.k_scale is not None:
    score = score * by_row(columns.k_scale)
  seen = jnp.arange(s, dtype=jnp.int32)[None, :] < length[:, None]
  prob = jax.nn.softmax(jnp.where(seen[:, None, None, :], score, -1e30), axis=-1)
  if columns.v_scale is not None:
    prob = prob * by_row(columns.v_scale)
  return jnp.einsum("bmgs,mbsh->bmgh", prob.astype(q.dtype), columns.v.astype(q.dtype)).reshape(b, n, h)


def attend_tpu(q: jax.Array, columns: Columns, length: jax.Array, *, interpret: bool = False) -> jax.Array:
  """JAX's paged attention, a row's page i being its columns from i * BLOCK on."""
  from jax.experimental.pallas import tpu as pltpu
  from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention
  b, m, s, h = q.shape[0], *columns.k.shape[0::2], columns.k.shape[3]
  pages = s // BLOCK
  index = jnp.arange(b * pages, dtype=jnp.int32).reshape(b, pages)
  paged = lambda x: x.reshape(m, b * pages, BLOCK, h)
  block = next(n for n in (8, 4, 2, 1) if pages % n == 0)
  run = functools.partial(paged_attention, q * h**-0.5, paged(columns.k), paged(columns.v), jnp.maximum(length, 1), index,
                          pages_per_compute_block=block)
  if not interpret:
    return run()
  with pltpu.force_tpu_interpret_mode():
    return run()
