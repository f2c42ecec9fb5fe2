"""What a decode step and an update cost one chip, counted from the model's shape; tests hold it against compiled programs.

Matrix products take FLOPs, everything between them the bytes that it reads and writes. A compiled program's own counts
(hlo.py) replace these where the chip's compiler is at hand; a GPU's hides its products in library calls.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from arrol_jax.engine import kv_cache
from arrol_jax.models.transformer import PolicyConfig
from arrol_jax.planning.chips import Rates
from arrol_jax.planning.rollout import Generation

_LOGIT_PASSES = 4    # over float32 logits in a decode step: written, largest, sum of exponentials, token drawn
_LOSS_PASSES = 6     # over them in an update: written, largest, sum of exponentials, their slopes written and read twice
_AGAIN = 2           # more where they are computed again backward (earlier code; loss.ratio=sequence, loss.correction=mask)
_BETWEEN = 3.5       # passes over what lies between a layer's products: forward, computed again, backward with two inputs each


class DecodeCost(NamedTuple):
  """One decode step on one chip."""
  weights: float     # bytes read whatever the rows
  row_flops: float   # products, a row on the chip
  row_bytes: float   # beside weights and cache
  column: float      # bytes of a column of the cache
  layers: int
  shards: int = 1    # that rows are split over
  collectives: dict = {}  # {kind: [times, bytes a row on the chip]} a step
  shared: bool = False    # a group's prompt is read once

  def seconds(self, generation: Generation, rates: Rates) -> float:
    """Of all decode steps of a step's generation."""
    total = 0.0
    for s in generation.segments:
      rows, prompts = s.rows / self.shards, s.prompts_shared if self.shared else s.prompts
      products = max(self.row_flops * rows / rates.flops, self.weights / rates.memory)
      moved = {kind: [times, size * rows] for kind, (times, size) in self.collectives.items()}
      step = products + self.row_bytes * rows / rates.memory + self.layers * rates.layer + rates.collectives(moved)
      total += s.steps * step + (s.responses + prompts) / self.shards * self.column / rates.cache
    return total


def product_params(c: PolicyConfig) -> tuple[int, int]:
  """Parameters in the layers' products and in the unembedding."""
  layer = c.width * (c.heads + 2 * c.kv_heads) * c.head_dim + c.heads * c.head_dim * c.width + 3 * c.width * c.ffn
  return c.layers * layer, c.width * c.vocab


def column_bytes(c: PolicyConfig, dtype: str, tensor: int = 1) -> float:
  """Bytes of a token's cache on a chip."""
  return kv_cache.bytes_per_token(c.layers, c.kv_heads, c.head_dim, dtype) / (tensor if c.kv_heads % tensor == 0 else 1)


def decode_cost(c: PolicyConfig, dtype: str, cache: str | None, mesh: tuple[int, int, int] = (1, 1, 1),
                shared: bool = False, weights: str | None = None) -> DecodeCost:
  """By hand, for a mesh of (data, fsdp, tensor); no collectives. cache, weights: "int8", or None for dtype."""
  layers, unembed = product_params(c)
  tensor, size = mesh[2], jnp.dtype(weights or dtype).itemsize
  return DecodeCost((layers + unembed) * size / tensor, 2 * (layers + unembed) / tensor, _LOGIT_PASSES * 4 * c.vocab / tensor,
                    column_bytes(c, cache or dtype, tensor), c.layers, mesh[0] * mesh[1], shared=shared)


class Trained(NamedTuple):
  """Rows that an update learns from."""
  prompt: int          # tokens of each prompt
  prompts: int         # that are computed: one a group where a group's rollouts share it
  lengths: np.ndarray  # i64[R]  of the responses

  @property
  def tokens(self) -> int:
    """That the layers compute: a prompt's last token stands before each of its responses."""
    return self.prompts * (self.prompt - 1) + len(self.lengths) + int(self.lengths.sum())


def attention_flops(c: PolicyConfig, rows: float, length: float) -> float:
  """Forward FLOPs of causal attention, scores and values, over rows of a length: half of the square."""
  return 2.0 * c.layers * c.heads * c.head_dim * rows * length * length


def forward_flops(c: PolicyConfig, t: Trained) -> float:
  """Products of one forward pass; logits of responses alone."""
  layers, unembed = product_params(c)
  square = sum(attention_flops(c, 1, t.prompt + n) for n in t.lengths)
  return 2.0 * layers * t.tokens + 2.0 * unembed * int(t.lengths.sum()) + square


def forward_seconds(c: PolicyConfig, t: Trained, rates: Rates, chips: int = 1) -> float:
  """A log-prob pass: products, and the float32 logits once over half of an update's passes."""
  between = t.tokens * _layer_bytes(c) + int(t.lengths.sum()) * 4 * c.vocab * _LOGIT_PASSES
  return (forward_flops(c, t) / rates.flops + between / rates.memory) / chips


def update_seconds(c: PolicyConfig, t: Trained, rates: Rates, chips: int = 1, again: bool = False) -> float:
  """Forward and backward passes of all micro-batches and one step of AdamW in float32 (seven numbers a parameter). again: logits
  are computed twice."""
  responses = int(t.lengths.sum())
  between = t.tokens * _BETWEEN * _layer_bytes(c) + responses * 4 * c.vocab * (_LOSS_PASSES + again * _AGAIN)
  products = 3 * forward_flops(c, t) + again * 2.0 * product_params(c)[1] * responses
  return (products / rates.flops + (between + 28 * c.num_params()) / rates.memory) / chips


def _layer_bytes(c: PolicyConfig) -> float:
  """What a token's forward pass reads and writes between the products of all layers, in bfloat16: two norms and sums (ten
  widths), rotation and attention's inputs, gate times up."""
  return 2.0 * c.layers * (10 * c.width + 3 * (c.heads + 2 * c.kv_heads) * c.head_dim + 3 * c.ffn)


def load_seconds(c: PolicyConfig, rates: Rates, chips: int = 1) -> float:
  """Casting float32 parameters to decoding weights."""
  return 6 * c.num_params() / chips / rates.memory


def prefill_seconds(c: PolicyConfig, tokens: int, rates: Rates, chips: int = 1) -> float:
  """Prompts' padded tokens through the layers, whose cache is then spread over the rows."""
  return (2.0 * product_params(c)[0] * tokens / rates.flops + tokens * _layer_bytes(c) / rates.memory) / chips


def packed(prompt: int, groups: int, lengths: np.ndarray, bin_tokens: int) -> Trained:
  """Rows packed into bins: a group's prompt stands once in each bin that holds some of it, about one bin more than groups."""
  bins = math.ceil(int(lengths.sum()) / bin_tokens)
  return Trained(prompt, min(len(lengths), groups + bins), lengths)
