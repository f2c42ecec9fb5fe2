"""int8 weights to decode with: their rounding, products, tokens and log-probs, sharding, and what the loss makes of the gap."""

import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrol_jax import config as configuration
from arrol_jax.engine.memory import _slots_in
from arrol_jax.engine.sampling import Sampling
from arrol_jax.engine.scheduler import Engine, Request
from arrol_jax.learning import batching, update
from arrol_jax.learning.losses import GRPO
from arrol_jax.models import int8, sharding, transformer
from arrol_jax.models.attention import causal_attention
from arrol_jax.models.layers import split_qkv
from arrol_jax.models.transformer import PolicyConfig
from arrol_jax.types import UserError
from configs import base

C = PolicyConfig("qwen2", 32, 32, 2, 4, 2, 8, 40, qkv_bias=True)  # all that a mesh of (2, 2, 2) splits
UNTIED = dataclasses.replace(C, tied=False)
PARAMS = jax.jit(lambda k: jax.tree.map(lambda x: x * 3.0, transformer.init_params(C, k)))(jax.random.key(0))
SAMPLING, KEY, TOKENS = Sampling(1.0, (), "float32"), jax.random.key(5), 12


def engine(mesh, weights="int8"):
  e = Engine(C, mesh, rows=8, max_prompt=8, max_new=16, segment=4, row_buckets=1, length_buckets=1, prefill_rows=4,
             weights=weights)
  with jax.set_mesh(mesh):
    e.load(PARAMS, "float32")
  return e


def run(e):
  texts = np.random.default_rng(0).integers(1, 31, (2, 6)).astype(np.int32)
  with jax.set_mesh(e.mesh):
    return e.run([Request(i, i // 4, texts[i // 4], TOKENS) for i in range(8)], KEY, SAMPLING)


@pytest.fixture(scope="module")
def said(mesh):
  """An int8 engine and its rollouts."""
  e = engine(mesh)
  return SimpleNamespace(engine=e, rollouts=run(e), plain=run(engine(mesh, None)))


# ---- one matrix


@pytest.mark.parametrize("name, shape, equation", [
  ("qkv", (6, 2, 3, 4), "bsd,dmgh->bsmgh"), ("o", (3, 4, 6), "bsnh,nhd->bsd"), ("gate_up", (6, 2, 5), "bsd,dcf->bscf"),
  ("down", (5, 6), "bsf,fd->bsd"), ("embed", (7, 6), "bsd,vd->bsv"), ("unembed", (6, 7), "bsd,dv->bsv")])
def test_products_are_numpys_and_rounding_is_bounded(name, shape, equation):
  rng, summed = np.random.default_rng(1), int8.SUMMED[name]
  weight = rng.normal(size=shape).astype(np.float32) * rng.uniform(0.01, 10, shape)  # channels of all sizes
  rounded = int8.quantize(jnp.asarray(weight, jnp.float32), summed)
  values, scale = np.asarray(rounded.values, np.float64), np.asarray(rounded.scale, np.float64)
  largest = np.abs(weight).max(axis=summed)
  assert rounded.values.dtype == jnp.int8 and np.allclose(scale, largest / 127) and np.all(np.abs(values).max(axis=summed) == 127)
  stands_for = values * np.expand_dims(scale, summed)
  assert np.all(np.abs(stands_for - weight) <= np.expand_dims(scale, summed) * 0.5001)
  assert np.allclose(int8.dequantize(rounded, summed), stands_for)
  x = rng.normal(size=(2, 3, *(shape[i] for i in summed))).astype(np.float32)
  out = int8.product(equation, jnp.asarray(x), rounded)
  np.testing.assert_allclose(out, np.einsum(equation, x, stands_for), rtol=1e-5, atol=1e-5)
  half = int8.product(equation, jnp.asarray(x, jnp.bfloat16), rounded)  # integers are exact in bfloat16, sums are float32
  exact = np.einsum(equation, np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64), stands_for)
  assert half.dtype == jnp.bfloat16 and np.all(np.abs(np.asarray(half, np.float64) - exact) <= np.abs(exact) * 2**-8 + 1e-4)


def test_what_is_quantised():
  """Matrices alone, and the embedding only where it is the unembedding too; norms and biases stay."""
  rounded = lambda params: int8.quantize_all(transformer.unstack(params))
  tied, untied = (jax.eval_shape(rounded, transformer.abstract_params(c)) for c in (C, UNTIED))
  names = lambda part: {name for name, x in part.items() if isinstance(x, int8.Int8)}
  assert names(tied) == {"embed"} and names(untied) == {"unembed"} and int8.is_int8(tied)
  assert names(tied["layers"][1]) == {"qkv", "o", "gate_up", "down"} and tied["layers"][1]["qkv_bias"].dtype == jnp.float32
  assert not int8.is_int8(jax.eval_shape(transformer.unstack, PARAMS))


# ---- tokens


def logprobs_of(params, rollouts):
  """Log-probs of the rollouts' tokens f[N,T] by a plain forward pass on the decoding layout."""
  rows = jnp.asarray([np.concatenate([r.prompt_tokens, r.tokens]) for r in rollouts])

  def attend(_, qkv, rotary):
    q, k, v = split_qkv(qkv)
    return causal_attention("xla")(*rotary(q, k), v)[0], None

  def run(params, rows):
    hidden = transformer.unrolled(C, params, rows, transformer.default_positions(rows), attend)[0]
    logprobs = jax.nn.log_softmax(transformer.unembed(params, hidden[:, :-1]), axis=-1)
    return jnp.take_along_axis(logprobs, rows[:, 1:, None], axis=2)[:, -TOKENS:, 0]

  return np.asarray(jax.jit(run)(params, rows))


def restored(params):
  """The weights that an engine's int8 ones stand for."""
  one = lambda part: {n: int8.dequantize(x, int8.SUMMED[n]) if isinstance(x, int8.Int8) else x for n, x in part.items()}
  return jax.jit(lambda params: one(params) | {"layers": tuple(map(one, params["layers"]))})(params)


def test_decoding_is_a_plain_pass_with_the_dequantised_weights(said):
  plain, rounded = transformer.unstack(PARAMS), restored(said.engine.params)
  assert jax.tree.structure(rounded) == jax.tree.structure(plain)
  sampled = np.stack([r.logprobs for r in said.rollouts])
  np.testing.assert_allclose(sampled, logprobs_of(rounded, said.rollouts), atol=1e-4)
  gap = np.abs(sampled - logprobs_of(plain, said.rollouts)).mean()
  assert 1e-3 < gap < 0.2  # rounding is seen, and small
  assert any(not np.array_equal(a.tokens, b.tokens) for a, b in zip(said.rollouts, said.plain, strict=True))


def test_the_same_engine_with_dequantised_weights_says_the_same(said, mesh):
  e = engine(mesh, None)
  e.params = restored(said.engine.params)
  for a, b in zip(run(e), said.rollouts, strict=True):
    np.testing.assert_array_equal(a.tokens, b.tokens)


@pytest.mark.parametrize("shape", [(1, 2, 1), (2, 2, 2)])
def test_sharded_is_one_device(said, shape):
  e = engine(sharding.make_mesh(*shape))
  gate_up = e.params["layers"][0]["gate_up"]
  assert gate_up.values.sharding.shard_shape(gate_up.values.shape)[2] == C.ffn // shape[2]
  assert gate_up.scale.sharding.shard_shape(gate_up.scale.shape)[1] == C.ffn // shape[2]
  for a, b in zip(run(e), said.rollouts, strict=True):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


# ---- learning


def test_the_gap_is_reported_and_truncation_weighs_it(said, mesh):
  """GRPO on one step: the ratio is 1, so a token's term is -A, times min(exp(trainer - sampler), cap) where it is corrected."""
  for r in said.rollouts:
    r.reward = float(r.request % 3 == 0)
  batches, counts = batching.pack(said.rollouts, batching.PackShape(32, 256, 1), mesh)
  assert len(batches) == 1 and counts["rows_trained"] == 8
  new = logprobs_of(transformer.unstack(PARAMS), said.rollouts)
  sampled, cap = np.stack([r.logprobs for r in said.rollouts]), 1.01
  advantages = batching.group_advantages(np.array([r.reward for r in said.rollouts]), np.arange(8) // 4)
  scalars = {"tokens": counts["tokens"], "rows": counts["rows"], "trained": counts["trained"], "temperature": 1.0}
  scalars = {k: np.float32(v) for k, v in scalars.items()}
  losses = {}
  for kind, weight in (("none", np.ones_like(new)), ("truncate", np.minimum(np.exp(new - sampled), cap))):
    u = update.UpdateConfig(C, dataclasses.replace(GRPO, correction=kind, correction_cap=cap),
                            update.Compute("float32", "xla", "none", 64))
    loss, metrics = jax.jit(update.micro_loss, static_argnums=0)(u, PARAMS, batches[0], scalars)
    losses[kind] = float(loss)
    assert losses[kind] == pytest.approx(np.mean(-advantages[:, None] * weight), abs=2e-5)
    assert float(metrics["logprob_gap"]) == pytest.approx(np.abs(new - sampled).mean(), rel=1e-3) and metrics["logprob_gap"] > 0
  assert abs(losses["truncate"] - losses["none"]) > 1e-3


# ---- configuration


def test_they_leave_more_room_and_other_values_are_refused(mesh):
  slots = lambda weights: _slots_in(Engine(C, mesh, 64, 8, 16, 4, weights=weights), SAMPLING, 4, PARAMS, 350_000, 350_000)
  assert slots("int8") > slots(None)
  c = base.get_config()
  c.rollout.weights = "int4"
  with pytest.raises(UserError, match="rollout.weights is 'int4'"):
    configuration.check(c, files=False)
