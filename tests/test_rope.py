"""Rotary scalings: which of a config.json's settings count is asked of transformers, frequencies come from the formulas of the
papers in NumPy, and what we write is read again as the same."""

import dataclasses
import json
import math
from pathlib import Path
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from arrol_jax.models import transformer
from arrol_jax.models.files import hf_config
from arrol_jax.models.files.weights import load_policy
from arrol_jax.models.rope import DynamicScaling, LinearScaling, RopeScaling, YarnScaling, frequencies
from arrol_jax.models.zoo import ZOO
from arrol_jax.types import UserError

FIXTURES = Path(__file__).parent / "fixtures"
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16}


def read(**changes):
  """PolicyConfig of a small Llama's config.json with `changes`, and the parsed file."""
  raw = json.loads((FIXTURES / "llama_untied" / "config.json").read_text())
  raw.pop("rope_parameters", None)
  raw |= {"max_position_embeddings": 128} | changes
  return hf_config.config_from_json(Path("config.json"), raw), raw


def inverse_frequencies(rope: dict, head_dim: int, length: int) -> tuple[np.ndarray, float]:
  """(f64[H/2], factor of cos and sin) of a complete `rope_parameters`, one pair of dimensions after another."""
  out, scale, kind = [], 1.0, rope["rope_type"]
  dim_of = lambda turns: (head_dim * math.log(rope["original_max_position_embeddings"] / (turns * 2 * math.pi)) /
                          (2 * math.log(rope["rope_theta"])))
  for i in range(head_dim // 2):
    f = rope["rope_theta"] ** (-2 * i / head_dim)
    if kind == "linear":
      f /= rope["factor"]
    if kind == "llama3":
      wave, original = 2 * math.pi / f, rope["original_max_position_embeddings"]
      smooth = (original / wave - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
      if wave > original / rope["low_freq_factor"]:
        f /= rope["factor"]
      elif wave >= original / rope["high_freq_factor"]:
        f = (1 - smooth) * f / rope["factor"] + smooth * f
    if kind == "yarn":
      factor = rope["factor"] or length / rope["original_max_position_embeddings"]
      low, high = dim_of(rope.get("beta_fast") or 32), dim_of(rope.get("beta_slow") or 1)
      if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
      low, high = max(low, 0), min(high, head_dim - 1)
      ramp = min(max((i - low) / (high - low or 0.001), 0), 1)
      f = f / factor * ramp + f * (1 - ramp)
      weight = lambda m, s=factor: 0.1 * m * math.log(s) + 1 if s > 1 else 1.0
      scale = rope.get("attention_factor")
      if scale is None and rope.get("mscale") and rope.get("mscale_all_dim"):
        scale = weight(rope["mscale"]) / weight(rope["mscale_all_dim"])
      scale = weight(1) if scale is None else scale
    out.append(f)
  return np.array(out), scale


FILES = {
  "yarn, the old key": dict(rope_theta=1e4, rope_scaling=YARN),
  "yarn, `type`": dict(rope_theta=1e4, rope_scaling={"type": "yarn", "factor": 2.0}),
  "yarn, the new key": dict(rope_parameters=YARN | {"rope_theta": 5e3}),
  "yarn with all its keys": dict(rope_parameters=YARN | {"rope_theta": 1e4, "beta_fast": 8.0, "beta_slow": 2.0, "mscale": 0.7,
                                                         "mscale_all_dim": 1.3, "truncate": False}),
  "yarn with its own attention factor": dict(rope_parameters=YARN | {"rope_theta": 1e4, "attention_factor": 1.5}),
  "yarn without a factor": dict(rope_parameters=YARN | {"rope_theta": 1e4, "factor": None}),
  "linear": dict(rope_theta=1e4, rope_scaling={"type": "linear", "factor": 2.5}),
  "dynamic": dict(rope_theta=1e4, rope_scaling={"type": "dynamic", "factor": 4.0}),
  "llama3": dict(rope_theta=500.0, rope_scaling=LLAMA3),
  "the length beside the scaling": dict(rope_parameters=LLAMA3 | {"rope_theta": 1e4}, original_max_position_embeddings=64),
  "both, alike": dict(rope_theta=1e4, rope_scaling=YARN, rope_parameters=YARN | {"rope_theta": 1e4}),
  "both, other types": dict(rope_theta=1e4, rope_scaling=YARN, rope_parameters={"rope_type": "default", "rope_theta": 1e4}),
  "both, the other way": dict(rope_theta=1e4, rope_scaling={"rope_type": "default"}, rope_parameters=YARN | {"rope_theta": 1e4}),
  "both, another base": dict(rope_scaling=YARN, rope_parameters=YARN | {"rope_theta": 77.0}),
  "an empty scaling": dict(rope_theta=1e4, rope_scaling=None, rope_parameters=LLAMA3 | {"rope_theta": 300.0}),
  "none": dict(rope_theta=2e4),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FILES)
def test_a_config_means_what_it_means_to_transformers(name):
  from transformers import LlamaConfig
  c, raw = read(**json.loads(json.dumps(FILES[name])))
  theirs = LlamaConfig(**{k: v for k, v in raw.items() if k != "model_type"})
  theirs.standardize_rope_params()  # as its rotary embedding does first
  want, scale = inverse_frequencies(theirs.rope_parameters, c.head_dim, c.max_length)
  got, factor = frequencies(c.head_dim, c.rope_theta, c.rope_scaling)
  np.testing.assert_allclose(got, want, rtol=2e-6)
  assert factor == pytest.approx(scale)
  cos, sin = transformer.rope_tables(c, jnp.array([[0, 3, 100]]))
  angle = np.array([0, 3, 100])[:, None] * np.asarray(got)
  np.testing.assert_allclose(cos[0, :, 0], np.cos(angle) * scale, atol=2e-5)
  np.testing.assert_allclose(sin[0, :, 0], np.sin(angle) * scale, atol=2e-5)


def test_the_files_above_differ_in_what_they_are_for():
  seen = {name: frequencies(8, read(**changes)[0].rope_theta, read(**changes)[0].rope_scaling) for name, changes in FILES.items()}
  assert not np.allclose(seen["yarn, the old key"][0], seen["none"][0], rtol=0.1) and seen["yarn, the old key"][1] > 1.1
  assert not np.allclose(seen["both, another base"][0], frequencies(8, 77.0, None)[0], rtol=0.1)
  np.testing.assert_array_equal(seen["both, other types"][0], seen["yarn, the old key"][0])
  np.testing.assert_array_equal(seen["both, the other way"][0], frequencies(8, 1e4, None)[0])


def test_yarn_known_values():
  """Qwen's published setting for long texts: base 1e6, heads of 128, 4 times 32,768. Ends of the ramp worked out by hand:
  128 ln(32768 / (2 pi 32)) / (2 ln 1e6) = 23.6 -> 23 and 128 ln(32768 / (2 pi)) / (2 ln 1e6) = 39.7 -> 40."""
  c, _ = read(rope_theta=1e6, rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
              head_dim=128, max_position_embeddings=131072)
  assert c.rope_scaling.ramp(128, 1e6) == (23, 40)
  freq, scale = frequencies(128, 1e6, c.rope_scaling)
  plain = 1e6 ** (-np.arange(64) / 64)
  np.testing.assert_allclose(freq[:24], plain[:24], rtol=1e-5)
  np.testing.assert_allclose(freq[40:], plain[40:] / 4, rtol=1e-5)
  np.testing.assert_allclose(freq[30], plain[30] * (10 / 17 + 7 / 17 / 4), rtol=1e-5)
  assert scale == pytest.approx(1 + 0.1 * math.log(4))


@pytest.mark.parametrize("scaling", [None, LinearScaling(2.5), DynamicScaling(4.0), RopeScaling(8.0, 1.0, 4.0, 16),
                                     YarnScaling(4.0, 32, 1.25, 8.0, 2.0, False), YarnScaling(4.0, 32, 1.14)])
def test_what_we_write_is_read_again_as_the_same(scaling, tmp_path):
  """By us, and by transformers whatever of the two forms it looks at."""
  model = load_policy(FIXTURES / "llama_untied")
  model.config = dataclasses.replace(model.config, rope_scaling=scaling, rope_theta=300.0)
  model.save(tmp_path / "out")
  assert load_policy(tmp_path / "out").config == model.config
  raw = json.loads((tmp_path / "out" / "config.json").read_text())
  for form in ("rope_scaling", "rope_parameters"):
    alone = {k: v for k, v in raw.items() if k not in {"rope_scaling", "rope_parameters"} - {form}}
    assert hf_config.config_from_json(tmp_path, alone) == model.config


def test_logits_follow_the_scaling(tmp_path):
  """Linear scaling by 2 is the plain model at half the positions."""
  shutil.copytree(FIXTURES / "llama_untied", tmp_path / "m")
  file = tmp_path / "m" / "config.json"
  raw = json.loads(file.read_text())
  tokens = np.arange(9)[None] % 37
  plain = load_policy(tmp_path / "m")
  file.write_text(json.dumps(raw | {"rope_theta": raw["rope_parameters"]["rope_theta"], "rope_scaling": {
    "rope_type": "linear", "factor": 2.0}}))
  scaled = load_policy(tmp_path / "m")
  assert scaled.config == dataclasses.replace(plain.config, rope_scaling=LinearScaling(2.0))
  cos, _ = transformer.rope_tables(scaled.config, jnp.arange(0, 18, 2)[None])
  np.testing.assert_allclose(cos, transformer.rope_tables(plain.config, jnp.arange(9)[None])[0], atol=1e-6)
  assert np.abs(scaled.logits(tokens, [9]) - plain.logits(tokens, [9])).max() > 0.1


@pytest.mark.parametrize("changes, words", [
  (dict(rope_scaling={"type": "longrope", "short_factor": [1.0], "long_factor": [2.0]}), "rope type 'longrope' is not supported"),
  (dict(rope_scaling={"type": "mrope", "mrope_section": [1, 1, 2]}), "rope type 'mrope' is not supported"),
  (dict(rope_scaling={"type": ["yarn"]}), "config.json"),
  (dict(rope_parameters={"full_attention": {"rope_type": "default", "rope_theta": 1e4}}), "by layer type .full_attention."),
  (dict(rope_scaling={"type": "linear"}), "linear needs factor, a number above 0, not None"),
  (dict(rope_scaling={"type": "linear", "factor": 0}), "linear needs factor, a number above 0, not 0"),
  (dict(rope_scaling={"type": "yarn", "factor": "4"}), "yarn needs factor, a number above 0, not '4'"),
  (dict(rope_scaling=YARN | {"beta_fast": "x"}), "yarn needs beta_fast"),
  (dict(rope_scaling={"type": "llama3", "factor": 8.0}), "llama3 needs low_freq_factor"),
  (dict(rope_scaling=YARN | {"partial_rotary_factor": 0.5}), "partial_rotary_factor is not supported"),
  (dict(rope_scaling="yarn"), "must be an object such as"),
])
def test_what_cannot_be_is_one_line(changes, words):
  with pytest.raises(UserError, match=words) as e:
    read(**changes)
  assert "\n" not in str(e.value)


def test_the_zoo_is_as_it_was():
  assert ZOO["llama-3.2-1b"].rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)
