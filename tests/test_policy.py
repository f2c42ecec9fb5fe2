"""The forward pass: what it must not depend on (layout of layers, padding, remat, mesh), known rotary frequencies."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrol_jax.models import sharding, transformer
from arrol_jax.models.attention import causal_attention
from arrol_jax.models.layers import rms_norm, rotate, split_qkv
from arrol_jax.models.transformer import PolicyConfig, RopeScaling
from arrol_jax.models.zoo import ZOO

SIZES = dict(vocab=29, width=24, layers=3, heads=4, kv_heads=2, head_dim=10, ffn=40)
CONFIGS = {
  "qwen3": PolicyConfig("qwen3", **SIZES, qk_norm=True),
  "qwen2": PolicyConfig("qwen2", **SIZES, qkv_bias=True, tied=False),
  "llama": PolicyConfig("llama", **SIZES, rope_theta=500.0, rope_scaling=RopeScaling(4.0, 1.0, 4.0, 16)),
}


@functools.cache
def make(name):
  """Config and parameters, every weight away from its neutral value."""
  c, rng = CONFIGS[name], np.random.default_rng(0)
  draw = lambda path, x: jnp.asarray(("norm" in path[-1].key) + 0.25 * rng.normal(size=x.shape), jnp.float32)
  return c, jax.tree.map_with_path(draw, transformer.abstract_params(c))


def tokens_of(c, rows=2, length=12, seed=3):
  return jnp.asarray(np.random.default_rng(seed).integers(0, c.vocab, (rows, length)), jnp.int32)


@functools.partial(jax.jit, static_argnums=0, static_argnames=("remat", "scan"))
def logits(c, params, tokens, remat="none", scan=True):
  attend = causal_attention("xla")
  hidden, _ = transformer.forward(c, params, tokens, transformer.default_positions(tokens), attend, remat=remat,
                                  scan=scan)
  return transformer.unembed(params, hidden)


@pytest.mark.parametrize("name", CONFIGS)
def test_scanned_layers_equal_unrolled_ones(name):
  c, params = make(name)
  tokens = tokens_of(c)
  attend = causal_attention("xla")

  def turned(attend, qkv, turn):
    q, k, v = split_qkv(qkv)
    return attend(*turn(q, k), v)[0]

  @jax.jit
  def run(p):
    tapped = {}
    numbered = lambda n, qkv, turn: (turned(attend, qkv, turn), n + 1)
    hidden, kept = transformer.unrolled(c, transformer.unstack(p), tokens, transformer.default_positions(tokens), numbered,
                                        (10, 20, 30), tap=tapped.__setitem__)
    return hidden, kept, tapped

  hidden, kept, tapped = run(params)
  np.testing.assert_allclose(transformer.unembed(params, hidden), logits(c, params, tokens), atol=1e-5)
  assert kept == [11, 21, 31]  # each layer is given its own state
  for n in (1, 2):  # the residual stream after n layers is what a model of n layers has before its final norm
    fewer = params | {"layers": jax.tree.map(lambda x, n=n: x[:n], params["layers"])}
    short = transformer.forward(dataclasses.replace(c, layers=n), fewer, tokens, transformer.default_positions(tokens), attend)[0]
    np.testing.assert_allclose(rms_norm(tapped[n], params["final_norm"], c.norm_eps), short, atol=1e-5)


def test_padding_on_the_right_changes_nothing():
  c, params = make("qwen3")
  tokens = tokens_of(c, length=9)
  padded = jnp.concatenate([tokens, tokens_of(c, length=7, seed=8)], axis=1)
  np.testing.assert_allclose(logits(c, params, padded)[:, :9], logits(c, params, tokens), atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_token_sees_its_past_and_nothing_else(name):
  c, params = make(name)
  tokens = tokens_of(c)
  other = tokens.at[:, 6].set((tokens[:, 6] + 1) % c.vocab)
  change = np.abs(logits(c, params, tokens) - logits(c, params, other)).max(axis=(0, 2))
  assert np.all(change[:6] == 0) and np.all(change[6:] > 1e-4)


@functools.partial(jax.jit, static_argnums=(0, 3, 4))
@functools.partial(jax.value_and_grad, argnums=1)
def loss(c, params, tokens, remat, scan=True):
  logprobs = jax.nn.log_softmax(logits(c, params, tokens, remat=remat, scan=scan)[:, :-1])
  return -jnp.mean(jnp.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1))


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_reaches_every_weight_of_every_layer(name):
  c, params = make(name)
  _, gradient = loss(c, params, tokens_of(c), "none")
  for path, g in jax.tree.leaves_with_path(gradient["layers"]):
    if path[0].key != "k_bias":  # shifts all scores of a query alike but for rotation: close to zero by nature
      assert np.all(np.abs(g).reshape(c.layers, -1).max(axis=1) > 1e-6), path


@pytest.mark.parametrize("remat, scan", [("dots", True), ("full", True), ("none", False), ("dots", False)])
def test_neither_remat_nor_layers_one_by_one_change_value_or_gradient(remat, scan):
  c, params = make("qwen3")
  plain, saved = loss(c, params, tokens_of(c), "none"), loss(c, params, tokens_of(c), remat, scan)
  loops = loss.lower(c, params, tokens_of(c), remat, scan).as_text().count("stablehlo.while")
  assert loops == (2 if scan else 0)  # forward and backward
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), plain, saved)


def test_tied_and_untied_unembedding():
  c, params = make("qwen2")
  tokens = tokens_of(c)
  tied = {k: v for k, v in params.items() if k != "unembed"}
  want = logits(c, tied | {"unembed": params["embed"].T}, tokens)
  np.testing.assert_allclose(logits(dataclasses.replace(c, tied=True), tied, tokens), want, atol=1e-5)


def test_rope_frequencies_by_hand():
  c = dataclasses.replace(CONFIGS["qwen3"], head_dim=4, rope_theta=100.0)  # frequencies 1 and 100^(-1/2) = 0.1
  cos, sin = transformer.rope_tables(c, jnp.array([[0, 1, 10]]))
  assert cos.shape == (1, 3, 1, 2)
  np.testing.assert_allclose(cos[0, :, 0], np.cos([[0, 0], [1, 0.1], [10, 1]]), atol=1e-6)
  np.testing.assert_allclose(sin[0, :, 0], np.sin([[0, 0], [1, 0.1], [10, 1]]), atol=1e-6)


def test_rotation_by_hand():
  x = jnp.array([1.0, 2.0, 3.0, 4.0])[None, None, None]  # pairs (1, 3) and (2, 4), turned by 90 and by 0 degrees
  quarter = (jnp.array([0.0, 1.0])[None, None, None], jnp.array([1.0, 0.0])[None, None, None])
  np.testing.assert_allclose(rotate(x, *quarter)[0, 0, 0], [-3.0, 2.0, 1.0, 4.0], atol=1e-6)


def test_llama3_rope_scaling_known_values():
  # Inverse frequencies of Llama-3.2-1B as transformers 5.23 computes them: kept, interpolated, divided by 32.
  known = {0: 1.0, 14: 0.0032114461064338684, 15: 0.0012905480107292533, 16: 0.000429556705057621,
           17: 9.708286233944818e-05, 18: 1.9461638657958247e-05, 31: 9.418306490260875e-08}
  _, sin = transformer.rope_tables(ZOO["llama-3.2-1b"], jnp.array([[1]]))
  np.testing.assert_allclose(sin[0, 0, 0, jnp.array(list(known))], np.sin(list(known.values())), rtol=2e-6)


@pytest.mark.parametrize("name", CONFIGS)
def test_sharded_equals_unsharded(name):
  c, params = make(name)
  tokens = tokens_of(c, rows=4)
  want = logits(c, params, tokens)
  mesh = sharding.make_mesh(2, 2, 2)
  put = jax.device_put(params, sharding.shardings(transformer.logical_axes(c), params, mesh, sharding.TRAIN))
  with jax.set_mesh(mesh):
    got = logits(c, put, jax.device_put(tokens, sharding.rows(mesh)))
  np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("name, count", [  # as published, without the copies that some files hold of tied embeddings
  ("qwen3-0.6b", 596_049_920), ("qwen3-1.7b", 1_720_574_976), ("qwen3-4b", 4_022_468_096), ("qwen3-8b", 8_190_735_360),
  ("qwen3-14b", 14_768_307_200), ("qwen3-32b", 32_762_123_264), ("qwen2.5-0.5b", 494_032_768),
  ("qwen2.5-1.5b", 1_543_714_304), ("qwen2.5-7b", 7_615_616_512), ("llama-3.2-1b", 1_235_814_400),
  ("llama-3.2-3b", 3_212_749_824), ("llama-3.1-8b", 8_030_261_248), ("smollm2-135m", 134_515_008)])
def test_zoo_has_the_published_parameter_counts(name, count):
  assert ZOO[name].num_params() == count


def test_zoo_counts_are_those_of_the_parameters():
  params = transformer.init_params(ZOO["tiny"], jax.random.key(0))
  assert sum(x.size for x in jax.tree.leaves(params)) == ZOO["tiny"].num_params() == 593_984
