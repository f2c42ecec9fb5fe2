"""Rotary frequencies and their rescalings for longer texts, as transformers computes them: linear, dynamic, yarn, llama3.

Left out: longrope (other frequencies for long texts than for short ones), rotations of a part of the head, and what dynamic
scaling does past the model's own length, where no text of ours goes.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class RopeScaling:
  """Llama 3's: long wavelengths are stretched by `factor`, short ones kept, those between interpolated."""
  factor: float
  low_freq_factor: float
  high_freq_factor: float
  original_length: int


@dataclasses.dataclass(frozen=True)
class LinearScaling:
  """All wavelengths are stretched by `factor`."""
  factor: float


@dataclasses.dataclass(frozen=True)
class DynamicScaling:
  """Nothing changes up to the model's max_length; `factor` says what would past it."""
  factor: float


@dataclasses.dataclass(frozen=True)
class YarnScaling:
  """YaRN (arXiv 2309.00071): between `beta_fast` and `beta_slow` turns in `original_length` tokens kept frequencies go over into
  stretched ones; cos and sin are multiplied by `attention_factor`."""
  factor: float
  original_length: int
  attention_factor: float
  beta_fast: float = 32.0
  beta_slow: float = 1.0
  truncate: bool = True        # the two ends are rounded to whole dimensions

  def ramp(self, head_dim: int, theta: float) -> tuple[float, float]:
    """The dimensions (pairs, from 0) between which frequencies go over."""
    where = lambda turns: head_dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))
    low, high = where(self.beta_fast), where(self.beta_slow)
    if self.truncate:
      low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    return low, high + 0.001 if low == high else high


Scaling = RopeScaling | LinearScaling | DynamicScaling | YarnScaling


def frequencies(head_dim: int, theta: float, scaling: Scaling | None) -> tuple[jax.Array, float]:
  """Radians a token of each pair of dimensions, f32[H/2], and what cos and sin are multiplied by."""
  freq = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
  match scaling:
    case LinearScaling(factor):
      return freq / factor, 1.0
    case YarnScaling(factor):
      low, high = scaling.ramp(head_dim, theta)
      keep = 1.0 - jnp.clip((jnp.arange(head_dim // 2, dtype=jnp.float32) - low) / (high - low), 0.0, 1.0)
      return freq * keep + (freq / factor) * (1.0 - keep), scaling.attention_factor
    case RopeScaling(factor, low, high, original_length):
      turns = original_length * freq / (2 * math.pi)
      keep = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
      return freq * keep + (freq / factor) * (1.0 - keep), 1.0
  return freq, 1.0
