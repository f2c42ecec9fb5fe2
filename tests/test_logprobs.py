"""Log-probs of a batch, in chunks over its responses: value, gradient, and how many positions a chip unembeds at once."""

import dataclasses
import functools
import re

from helpers_update import (
  BATCH,
  COMPUTE,
  KL,
  LENGTH,
  ORDER,
  PARAMS,
  ROWS,
  TABLE,
  C,
  config,
  gradients,
  plain_logprobs,
  same,
  scalars,
)
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrol_jax.learning import logprobs, update
from arrol_jax.learning.batching import PackShape, abstract_batches
from arrol_jax.learning.losses import CORRECTIONS, GRPO, GSPO, LossConfig
from arrol_jax.models import sharding, softmax, transformer
from arrol_jax.planning import hlo


@pytest.mark.parametrize("temperature, chunk", [(1.0, 1), (0.7, 6), (1.0, 8), (1.3, 20), (1.0, 10**9)])
def test_chunked_logprobs_are_log_softmax_in_value_and_gradient(temperature, chunk):
  """3 rows of 13 tokens, of which 13, 7 and none are there, in chunks of 1, 2, 4 and all positions: most do not divide."""
  hidden = jax.random.normal(jax.random.key(5), (3, 13, C.width))
  tokens = jax.random.randint(jax.random.key(6), (3, 13), 0, C.vocab)
  weight = jax.random.normal(jax.random.key(7), (3, 13))
  used = np.array([13, 7, 0], np.int32)
  mask = ((np.arange(13) > 0) & (np.arange(13) < used[:, None])).astype(np.float32)
  params = {"embed": PARAMS["policy"]["embed"]}

  def slopes(f):
    value = lambda params, hidden: (jnp.sum(weight * f(params, hidden)[0]), f(params, hidden))
    return jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(params, hidden)

  (_, (got, entropy)), got_slopes = slopes(lambda p, h: logprobs.token_logprobs(p, h, tokens, used, temperature, chunk))
  (_, (want, want_entropy)), want_slopes = slopes(lambda p, h: [x * mask for x in plain_logprobs(p, h, tokens, temperature)])
  np.testing.assert_allclose(got, want, atol=2e-6, rtol=1e-5)
  np.testing.assert_allclose(entropy, want_entropy, atol=2e-6, rtol=1e-5)
  same(got_slopes, want_slopes, 2e-6)
  assert np.all(np.asarray(got)[mask == 0] == 0) and np.all(np.asarray(got)[mask > 0] < 0)
  assert np.any(np.asarray(want_slopes[0]["embed"]) != 0)


@pytest.mark.parametrize("temperature, chunk", [(1.0, 1), (0.7, 6), (1.3, 20), (1.0, 10**9)])
def test_pulled_logprobs_send_the_gradient_of_the_loss(temperature, chunk):
  """A loss that bends in each log-prob: value, log-probs, entropies and gradient, scaled too, are those of the plain way."""
  hidden = jax.random.normal(jax.random.key(5), (3, 13, C.width))
  tokens = jax.random.randint(jax.random.key(6), (3, 13), 0, C.vocab)
  used = np.array([13, 7, 0], np.int32)
  mask = ((np.arange(13) > 0) & (np.arange(13) < used[:, None])).astype(np.float32)
  told = {"weight": mask * jax.random.normal(jax.random.key(7), (3, 13)), "at": jax.random.normal(jax.random.key(8), (3, 13))}
  loss = lambda logprobs, told: jnp.sum(told["weight"] * jnp.exp(0.3 * logprobs + told["at"]))
  params = {"unembed": jax.random.normal(jax.random.key(9), (C.width, C.vocab))}

  def fast(params, hidden):
    pull, got, entropy = logprobs.pulled_logprobs(params, hidden, tokens, used, temperature, chunk, jax.grad(loss), told)
    return 3.0 * (pull + loss(got, told)), (pull, got, entropy)

  def slow(params, hidden):
    got, entropy = logprobs.token_logprobs(params, hidden, tokens, used, temperature, chunk)
    return 3.0 * loss(got, told), (0.0, got, entropy)

  (got, more), slopes = jax.value_and_grad(fast, argnums=(0, 1), has_aux=True)(params, hidden)
  (want, others), expected = jax.value_and_grad(slow, argnums=(0, 1), has_aux=True)(params, hidden)
  assert float(got) == pytest.approx(float(want), rel=1e-6) and more[0] == 0
  for a, b in zip(jax.tree.leaves(more), jax.tree.leaves(others), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-6)
  same(slopes, expected, 2e-5)
  assert np.abs(np.asarray(expected[0]["unembed"])).max() > 0.1


def plain_twin(u):
  """The same update, by the way that computes logits again in the backward pass."""
  class Rows(LossConfig):
    by_token = False

  return dataclasses.replace(u, loss=Rows(**dataclasses.asdict(u.loss)))


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("loss", [GRPO, KL, dataclasses.replace(KL, correction="truncate", correction_cap=1.05),
                                  dataclasses.replace(GRPO, aggregate="constant", longest=12, clip_low=0.05, kl_weight=0.3)],
                         ids=["grpo", "dapo, kl", "dapo, kl, truncate", "constant, tight clip, kl"])
def test_logits_computed_once_give_the_step_of_those_computed_twice(loss, fresh):
  got, metrics = gradients([BATCH], config(loss, fresh=fresh))
  want, others = gradients([BATCH], plain_twin(config(loss, fresh=fresh)))
  same(got, want, 1e-5)
  for name, value in others.items():
    assert metrics[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
  assert metrics["grad_norm"] > 1 and (fresh or metrics["clip_frac"] > 0.05)


def test_what_depends_on_a_whole_row_is_not_taken_by_token():
  assert GRPO.by_token and KL.by_token and not GSPO.by_token
  assert [dataclasses.replace(GRPO, correction=c).by_token for c in CORRECTIONS] == [True, True, False]


def test_logits_are_computed_once():
  """By the products that make them, in the gradient's program: a vocabulary like no other size."""
  c = dataclasses.replace(C, vocab=56)

  def products(u):
    grad = jax.grad(lambda p: update.micro_loss(dataclasses.replace(u, model=c), p, BATCH, scalars())[0])
    return len(re.findall(r"56\] = dot_general", str(jax.make_jaxpr(grad)(transformer.abstract_params(c)))))

  assert (products(config(KL)), products(plain_twin(config(KL)))) == (1, 2)


def test_one_pass_over_the_logits_gives_the_sums_of_two():
  """Rows of ordinary logits, of far ones (whose exponentials would overflow), all alike, and with some infinitely unlikely."""
  x = jax.random.normal(jax.random.key(3), (4, 300)) * jnp.array([1.0, 200.0, 0.0, 3.0])[:, None] + 1000.0
  for got, want in zip(softmax.sums(x, True, one_pass=True), softmax.sums(x, True, one_pass=False), strict=True):
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6)
  some = x.at[3, 5:200].set(-jnp.inf)
  for got, want in zip(softmax.sums(some, one_pass=True), softmax.sums(some, one_pass=False), strict=True):
    np.testing.assert_allclose(got, want, rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("pulled", [True, False])
@pytest.mark.parametrize("shape, tied", [((8, 1, 1), True), ((1, 8, 1), False)])
def test_the_tables_gradient_is_summed_over_devices_once(shape, tied, pulled):
  """Each keeps what its own rows add until the last chunk: sums over devices must not grow with the number of chunks."""
  mesh, c = sharding.make_mesh(*shape), dataclasses.replace(C, tied=tied)
  weights = transformer.abstract_params(c)
  with jax.set_mesh(mesh):
    axes = sharding.shardings(transformer.logical_axes(c), weights, mesh, sharding.TRAIN)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), weights, axes)
    rows = lambda shape, dtype: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding.rows(mesh))

    def summed(chunk_tokens):
      way = functools.partial(logprobs.pulled_logprobs, slope=lambda x, inputs: inputs, inputs=jnp.ones((ROWS, 16)))
      loss = lambda p, h, t, used: jnp.sum((way if pulled else logprobs.token_logprobs)(p, h, t, used, 1.0, chunk_tokens)[0])
      lowered = jax.jit(jax.grad(loss), out_shardings=axes).lower(
        params, rows((ROWS, 16, c.width), jnp.float32), rows((ROWS, 16), jnp.int32), rows((ROWS,), jnp.int32))
      module = hlo.parse(lowered.compile().as_text())
      return {name: n for name, n in hlo.collective_counts(module, hlo.trips(module)).items() if "reduce" in name}

    assert summed(2) == summed(10**6) != {}


def test_entropy_sends_no_gradient():
  hidden, tokens, used = jnp.ones((1, 5, C.width)), jnp.zeros((1, 5), jnp.int32), jnp.array([5])
  slope = jax.grad(lambda h: jnp.sum(logprobs.token_logprobs(PARAMS["policy"], h, tokens, used, 1.0, 2)[1]))(hidden)
  np.testing.assert_array_equal(slope, 0.0)


def test_batch_logprobs_are_those_of_the_response_and_zero_elsewhere():
  out = np.asarray(update.batch_logprobs(config(KL), PARAMS["policy"], BATCH, np.float32(1)))
  np.testing.assert_allclose(out, TABLE.logprobs[ORDER], atol=1e-5)


def test_fill_logprobs_keeps_old_and_reference_apart():
  """The old ones are asked for only where a batch takes several steps."""
  other = jax.tree.map(lambda x: x * 0.5, PARAMS["policy"])
  ask = lambda params: update.batch_logprobs(config(KL), params, BATCH, np.float32(1))
  own, others = np.asarray(ask(PARAMS["policy"])), np.asarray(ask(other))
  nothing = np.zeros_like(own)
  assert np.abs(own - others).max() > 0.1
  blank = BATCH.replace(old_logprobs=nothing, ref_logprobs=nothing)
  for reference, fresh, old, ref in ((None, False, own, nothing), (other, False, own, others), (None, True, nothing, nothing)):
    filled, = update.fill_logprobs(config(KL, fresh=fresh), PARAMS["policy"], reference, [blank], np.float32(1))
    np.testing.assert_array_equal(filled.old_logprobs, old)
    np.testing.assert_array_equal(filled.ref_logprobs, ref)


# ---- on a mesh


@pytest.mark.parametrize("loss", [KL, GSPO], ids=["logits once", "logits twice"])
@pytest.mark.parametrize("tied", [False, True])
def test_chunks_gather_the_unembedding_once(tied, loss):
  """With fsdp a device holds a part of it: what the update gathers must not grow with the number of chunks."""
  c, mesh = dataclasses.replace(C, tied=tied), sharding.make_mesh(1, 8, 1)
  with jax.set_mesh(mesh):
    place = lambda tree, at: jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, at)
    weights = transformer.abstract_params(c)
    params = place(weights, sharding.shardings(transformer.logical_axes(c), weights, mesh, sharding.TRAIN))
    batch, = abstract_batches(PackShape(16, 16, 1), mesh)[-1:]
    told = jax.tree.map(lambda x: jax.ShapeDtypeStruct((), x.dtype), scalars())
    metrics = dict.fromkeys(update.METRICS, jax.ShapeDtypeStruct((), jnp.float32))

    def gathered(chunk_tokens):
      u = update.UpdateConfig(c, loss, dataclasses.replace(COMPUTE, chunk_tokens=chunk_tokens))
      lowered = update.accumulate.lower(u, params, params, metrics, batch, told)
      module = hlo.parse(lowered.compile().as_text())
      return hlo.collective_counts(module, hlo.trips(module))["all-gather"]

    assert gathered(1) == gathered(10**6)


@pytest.mark.parametrize("shape, positions", [((1, 1, 1), 2), ((1, 1, 8), 2), ((2, 2, 2), 8), ((8, 1, 1), 16)])
def test_a_chunk_counts_the_tokens_of_a_chip(monkeypatch, shape, positions):
  seen, real = [], softmax.sums
  monkeypatch.setattr(softmax, "sums", lambda logits, **options: seen.append(logits.shape) or real(logits, **options))
  with jax.set_mesh(sharding.make_mesh(*shape)):
    jax.eval_shape(lambda h, t, used: logprobs.token_logprobs(PARAMS["policy"], h, t, used, 1.0, 2 * ROWS),
                   jnp.zeros((ROWS, LENGTH, C.width)), TABLE.tokens, np.full(ROWS, LENGTH, np.int32))
  assert seen == [(ROWS, positions, C.vocab)]


def test_chunks_cover_the_row_and_little_more():
  for length in (1, 7, 13, 16, 1376, 2736, 4096):
    for most in (0, 1, 2, 5, 100, 682, 2048, 10**6):
      size, chunks = logprobs.chunk_sizes(length, most)
      assert size <= max(1, most, 8) and (chunks - 1) * size < length <= chunks * size < length + max(8 * chunks, size)
  assert logprobs.chunk_sizes(2736, 2048) == (1368, 2) and logprobs.chunk_sizes(1280, 341) == (256, 5)
