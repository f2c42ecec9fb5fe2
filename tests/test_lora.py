"""Adapters: their gradient is the full one projected, they alone change, merged and apart they are one model, PEFT reads them."""

import dataclasses
import json
import math

from helpers_update import BATCH, COMPUTE, EXAMPLES, KL, LENGTH, PARAMS, SGD, C, batch_of, same, scalars
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrol_jax.learning import update
from arrol_jax.learning.batching import BinShape
from arrol_jax.models import lora, sharding, transformer
from arrol_jax.models.attention import causal_attention
from arrol_jax.models.files import adapters as adapter_files
from arrol_jax.models.files.weights import Policy, load_policy
from arrol_jax.models.lora import Lora
from arrol_jax.planning import hlo
from arrol_jax.prune import Calibration
from arrol_jax.types import TrainState, UserError, join

LORA = Lora(4, 6.0)  # scale 1.5
WITH = dataclasses.replace(C, lora=LORA)
BASE = PARAMS["policy"]
FRESH = transformer.init_adapters(WITH, jax.random.key(5))
# Adapters that say something: B is not zero.
ADAPTERS = {name: x if name.endswith("a") else 0.2 * jax.random.normal(jax.random.key(i), x.shape)
            for i, (name, x) in enumerate(FRESH.items())}
TOKENS, LENGTHS = np.arange(24, dtype=np.int32).reshape(2, 12) % C.vocab, np.array([12, 9], np.int32)
U = update.UpdateConfig(WITH, KL, COMPUTE, fresh=False)


def merged(adapters, scale=LORA.scale):
  """The base with the adapters in its matrices, in NumPy."""
  layers = {name: np.asarray(x) for name, x in BASE["layers"].items()}
  for name, inputs in lora.MATRICES.items():
    a, b = (np.asarray(adapters[x]) for x in lora.names(name))
    flat = a.reshape(len(a), -1, LORA.rank) @ b.reshape(len(b), LORA.rank, -1)
    layers[name] = layers[name] + scale * flat.reshape(layers[name].shape)
    assert layers[name].ndim - 1 == inputs + b.ndim - 2
  return BASE | {"layers": jax.tree.map(jnp.asarray, layers)}


def state_of(adapters, base=BASE, head=PARAMS["head"], optimizer=SGD):
  params = jax.tree.map(jnp.copy, {"policy": adapters, "head": head})
  return TrainState(params, optimizer.init(params), Calibration.empty(4), jnp.zeros((), jnp.int32), base=base)


def gradients(batches, adapters=ADAPTERS, base=BASE):
  """What a step takes as the gradient, by SGD of rate 1, and the state after it."""
  state, metrics = update.step(U, state_of(adapters, base), batches, EXAMPLES, scalars(), SGD)
  before = {"policy": adapters, "head": PARAMS["head"]}
  return jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), before, state.params), state, metrics


@pytest.fixture(scope="module")
def whole():
  return gradients([BATCH])


def test_the_gradient_is_the_full_one_projected(whole):
  """dA = scale dW B^T and dB = scale A^T dW, where dW is the slope of the loss of the merged model, by its matrix."""
  full = jax.jit(jax.grad(lambda p: update.micro_loss(dataclasses.replace(U, model=C), p, BATCH, scalars())[0]))(merged(ADAPTERS))
  for name in LORA.targets:
    a, b = (np.asarray(ADAPTERS[x]) for x in lora.names(name))
    a2, b2 = a.reshape(C.layers, -1, LORA.rank), b.reshape(C.layers, LORA.rank, -1)
    slope = np.asarray(full["layers"][name]).reshape(C.layers, a2.shape[1], b2.shape[2])
    for got, want in zip(lora.names(name), (slope @ b2.swapaxes(1, 2), a2.swapaxes(1, 2) @ slope)):
      assert np.abs(want).max() > 1e-3
      np.testing.assert_allclose(whole[0]["policy"][got], LORA.scale * want.reshape(ADAPTERS[got].shape), atol=2e-5, rtol=1e-3)


def test_the_first_step_is_the_bases_to_the_last_bit():
  """Operation by operation; as one program each, the compiler may sum a norm in another order."""
  def ask(params):
    with jax.disable_jit():
      few = TOKENS[:1, :4]
      hidden = transformer.forward(WITH, params, few, transformer.default_positions(few), causal_attention("xla"))[0]
      return np.asarray(transformer.unembed(params, hidden))
  np.testing.assert_array_equal(ask(join(BASE, FRESH)), ask(BASE))
  compiled = lambda params: np.asarray(update.batch_logprobs(U, params, BATCH, np.float32(1)))
  np.testing.assert_allclose(compiled(join(BASE, FRESH)), compiled(BASE), atol=1e-5)
  assert np.abs(compiled(join(BASE, ADAPTERS)) - compiled(BASE)).max() > 0.1


def test_fresh_adapters_are_as_pefts():
  """A with variance 1 / (3 inputs), B zero."""
  for name, inputs in (("q", 32), ("o", 8 * 8), ("down", 40)):
    a, b = (FRESH[x] for x in lora.names(name))
    assert a.size >= 256 and np.std(a) == pytest.approx((3 * inputs)**-0.5, rel=0.15) and not np.any(b)


def test_adapters_and_head_alone_change(whole):
  """In one optax step; the base is the same arrays, and at the very first step A has no gradient, as B is zero."""
  grads, state, metrics = whole
  assert all(np.any(x) for x in jax.tree.leaves(grads)) and metrics["grad_norm"] > 0 and metrics["head_loss"] > 0
  assert all(a is b for a, b in zip(jax.tree.leaves(state.base), jax.tree.leaves(BASE)))
  norm = math.sqrt(sum(float(np.sum(np.square(x))) for x in grads["policy"].values()))
  assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-4)
  first = gradients([BATCH], FRESH)[0]["policy"]
  assert all(np.any(x) == name.endswith("b") for name, x in first.items())


def test_micro_batches_add_up(whole):
  grads, _, _ = gradients([batch_of(range(4))[0], batch_of(range(4, 8))[0]])
  same(grads, whole[0], 1e-5)


def test_without_rows_adapters_stay():
  state, _ = update.step(U, state_of(ADAPTERS), [], EXAMPLES, scalars(rows=0), SGD)
  jax.tree.map(np.testing.assert_array_equal, state.params["policy"], ADAPTERS)
  assert np.any(np.asarray(state.params["head"]["w1"]) != np.asarray(PARAMS["head"]["w1"]))


def test_remat_does_not_change_the_gradient(whole):
  u = dataclasses.replace(U, compute=dataclasses.replace(COMPUTE, remat="dots"))
  zero = update.zeros(WITH, ADAPTERS)
  grads, _ = update.accumulate(u, ADAPTERS, *zero, BATCH, scalars(), BASE)
  same(grads, whole[0]["policy"], 1e-5)


def test_frozen_matrices_have_no_gradient():
  """Not one that is thrown away either: a full update's products without those of the matrices' slopes, and three for each
  adapter (forward, its slope, its input's)."""
  def flops(u, params, base):
    module = hlo.parse(update.accumulate.lower(u, params, *update.zeros(u.model, params), BATCH, scalars(),
                                               base).compile().as_text())
    return hlo.flops(module, hlo.trips(module))
  size = lambda tree: 2 * BATCH.tokens.size * sum(x.size for x in tree)
  matrices = size([BASE["layers"][name] for name in LORA.targets] + [BASE["embed"]])
  want = flops(dataclasses.replace(U, model=C), BASE, None) - matrices + 3 * size(ADAPTERS.values())
  assert flops(U, ADAPTERS, BASE) == pytest.approx(want, rel=0.01)
  small = jax.tree.map(lambda x: x.astype(jnp.bfloat16), BASE)
  grads, _ = update.accumulate(U, ADAPTERS, *update.zeros(WITH, ADAPTERS), BATCH, scalars(), small)
  assert all(x.dtype == jnp.float32 and np.isfinite(x).all() for x in grads.values())  # beside a base in bfloat16


def test_sharded_is_unsharded(whole):
  """On eight devices. Adapters lie on the mesh as their matrices do, and so do their gradients' sums."""
  mesh = sharding.make_mesh(2, 2, 2)
  batch, _ = batch_of([0], [1, 2], [3, 4, 5], [6, 7], shape=BinShape(48, 3, LENGTH))
  with jax.set_mesh(mesh):
    place = lambda axes, x: jax.device_put(x, sharding.shardings(axes, x, mesh, sharding.TRAIN))
    base, mine = place(transformer.logical_axes(C), BASE), place(transformer.adapter_axes(WITH), ADAPTERS)
    sums = update.zeros(WITH, mine)[0]
    state = state_of(mine, base, jax.device_put(PARAMS["head"], sharding.replicated(mesh)))
    state, metrics = update.step(U, state, [sharding.put(batch, sharding.rows(mesh))], EXAMPLES, scalars(), SGD)
  grads = jax.tree.map(lambda a, b: np.asarray(a) - np.asarray(b), {"policy": ADAPTERS, "head": PARAMS["head"]}, state.params)
  same(grads, whole[0], 1e-5)
  on_a_device = lambda x: x.addressable_shards[0].data.shape
  for name in ("up_lora_b", "down_lora_a", "up_lora_a"):
    assert on_a_device(mine[name]) != mine[name].shape and on_a_device(sums[name]) == on_a_device(mine[name])
    assert state.params["policy"][name].sharding.is_equivalent_to(mine[name].sharding, 3)


def test_the_decoding_layout_has_the_same_products():
  """A merged matrix and what its adapters add there are those of the merged model; axes are those of the arrays."""
  apart, together = (transformer.unstack(x)["layers"][1] for x in (join(BASE, ADAPTERS), merged(ADAPTERS)))
  for name in ("qkv", "gate_up", "o", "down"):
    a, b = (apart[x] for x in lora.names(name))
    inputs = 2 if name == "o" else 1
    product = np.asarray(a).reshape(-1, a.shape[-1]) @ np.asarray(b).reshape(len(b), -1)
    np.testing.assert_allclose(apart[name] + LORA.scale * product.reshape(apart[name].shape), together[name], atol=1e-4)
    assert a.ndim == inputs + 1
  axes = transformer.decoding_axes(WITH)["layers"][1]
  assert {k: len(v) for k, v in axes.items()} == {k: v.ndim for k, v in apart.items()}
  some = dataclasses.replace(WITH, lora=Lora(4, 6.0, ("v", "down")))
  few = transformer.unstack(join(BASE, {n: ADAPTERS[n] for n in transformer.adapter_axes(some)}))["layers"][0]
  assert set(few) == set(transformer.decoding_axes(some)["layers"][0]) and few["qkv_lora_a"].shape == (32, 4)


# ---- files


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """(the policy with its adapters, folder of the merged one, folder of the adapters, folder of the base)."""
  folder = tmp_path_factory.mktemp("lora")
  policy = Policy(WITH, join(BASE, ADAPTERS), None, (7,), 0)
  policy.save(folder / "policy")
  dataclasses.replace(policy, config=C, params=BASE).save(folder / "base")
  for _ in range(2):  # the second replaces the first
    adapter_files.save(folder / "adapter", WITH, ADAPTERS, str(folder / "base"))
  return policy, folder / "policy", folder / "adapter", folder / "base"


def test_merged_is_unmerged(saved):
  policy, folder, _, base = saved
  apart, together = policy.logits(TOKENS, LENGTHS), load_policy(folder).logits(TOKENS, LENGTHS)
  np.testing.assert_allclose(apart, together, atol=2e-4, rtol=1e-4)
  assert np.abs(np.asarray(apart) - np.asarray(load_policy(base).logits(TOKENS, LENGTHS))).max() > 0.1
  assert load_policy(folder).config == C


def test_a_merged_matrix_is_rounded_once(saved, tmp_path):
  policy, _, _, _ = saved
  policy.save(tmp_path / "small", dtype="bfloat16")
  got = load_policy(tmp_path / "small").params["layers"]["up"]
  exact = merged(ADAPTERS)["layers"]["up"]
  np.testing.assert_allclose(got, exact.astype(jnp.bfloat16).astype(jnp.float32), rtol=2**-7, atol=1e-6)


def test_adapters_alone(saved, tmp_path):
  """PEFT's names and layout: [R, inputs] and [outputs, R] of each matrix; load_policy says what to do with such a folder."""
  _, _, folder, base = saved
  from safetensors.numpy import load_file
  stored, about = load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())
  assert len(stored) == 2 * 7 * C.layers
  name = "base_model.model.model.layers.1.self_attn.{}_proj.lora_{}.weight"
  np.testing.assert_array_equal(stored[name.format("q", "A")], ADAPTERS["q_lora_a"][1].T)
  np.testing.assert_array_equal(stored[name.format("o", "B")], ADAPTERS["o_lora_b"][1].T)
  assert stored[name.format("o", "A")].shape == (4, 64) and stored[name.format("k", "B")].shape == (16, 4)
  assert (about["r"], about["lora_alpha"], about["base_model_name_or_path"]) == (4, 6.0, str(base))
  assert about["target_modules"] == [f"{x}_proj" for x in LORA.targets]
  with pytest.raises(UserError, match="holds a LoRA adapter"):
    load_policy(folder)
  (tmp_path / "mine.txt").touch()
  with pytest.raises(UserError, match="mine.txt"):
    adapter_files.save(tmp_path, WITH, ADAPTERS, "")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # transformers' of its own names
def test_peft_loads_them(saved):
  """In peft, on transformers' model of the base: the same logits; what is shown where torch and peft are installed."""
  torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
  from transformers import AutoModelForCausalLM
  policy, _, folder, base = saved
  model = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)
  with torch.no_grad():
    theirs = model(torch.tensor(TOKENS.astype(np.int64))).logits.numpy()
  ours = np.asarray(policy.logits(TOKENS, LENGTHS))
  for row, length in enumerate(LENGTHS):
    np.testing.assert_allclose(theirs[row, :length], ours[row, :length], atol=2e-3, rtol=1e-3)
