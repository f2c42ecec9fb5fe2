"""Meshes: how devices and slices are laid out, what is cut and what replicated, and that a step is the same on all of them."""

import functools
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

from arrol_jax.data.problems import Problem, Prompt
from arrol_jax.engine.sampling import Sampling
from arrol_jax.engine.scheduler import Engine
from arrol_jax.learning.batching import PackShape
from arrol_jax.learning.generation import Grading, generate
from arrol_jax.learning.losses import GRPO
from arrol_jax.learning.update import Compute, UpdateConfig
from arrol_jax.models import sharding, transformer
from arrol_jax.models.transformer import PolicyConfig
from arrol_jax.prune import Calibration
from arrol_jax.pruning.head import init_head
from arrol_jax.pruning.rule import PruneRule
from arrol_jax.step import RolledOut, StepConfig, TrainingStep
from arrol_jax.types import TrainState

MESHES = [(8, 1, 1), (2, 2, 2), (1, 1, 8)]
# 8 query heads and 40 feed-forward units divide by 8, 2 key-value heads and a vocabulary of 31 do not.
C = PolicyConfig("qwen3", 31, 32, 1, 8, 2, 8, 40, qk_norm=True)
RULE = PruneRule((8,))
OPTIMIZER = optax.sgd(1e-3)
STEPS = 3


# ---- layout


def devices(slices: int, each: int):
  return [SimpleNamespace(id=s * each + i, slice_index=s, process_index=s, platform="cpu", device_kind="cpu", coords=(i, 0, 0))
          for s in range(slices) for i in range(each)]


@pytest.mark.parametrize("shape, axis", [((2, 4, 1), 0), ((1, 4, 2), 1), ((4, 1, 2), 0), ((1, 2, 4), 1), ((1, 1, 8), 2)])
def test_slices_lie_along_the_outermost_axis_they_divide(shape, axis):
  grid = sharding.device_grid(shape, devices(2, 4))
  assert grid.shape == shape and len({d.id for d in grid.flat}) == 8
  of = np.vectorize(lambda d: d.slice_index)(grid)
  first, second = np.split(of, 2, axis=axis)
  assert np.all(first == 0) and np.all(second == 1)


def test_four_slices_over_two_axes():
  grid = sharding.device_grid((2, 4, 2), devices(4, 4))
  of = np.vectorize(lambda d: d.slice_index)(grid)
  assert np.all(of == of[:, :, :1])  # tensor stays inside a slice
  assert len(set(of.ravel())) == 4 and all(len(set(of[i].ravel())) == 2 for i in range(2))


def test_slices_that_fit_nowhere_are_refused():
  with pytest.raises(ValueError, match="1 x 1 x 4 cannot be spread over 3 slices; make mesh.data or mesh.fsdp a multiple of 3"):
    sharding.device_grid((1, 1, 4), devices(3, 4))


def test_a_mesh_takes_every_process_or_says_so():
  with pytest.raises(ValueError, match="has 4 devices; with several processes it must take all 8"):
    sharding.make_mesh(2, 2, 1, devices=devices(2, 4))
  with pytest.raises(ValueError, match="needs 16 devices and there are 8"):
    sharding.make_mesh(4, 4, 1)
  assert sharding.make_mesh(2, 2, 1).shape == {"data": 2, "fsdp": 2, "tensor": 1}  # one process may leave some idle


def test_what_does_not_divide_is_replicated():
  mesh = sharding.make_mesh(1, 1, 8)
  axes, shapes = transformer.logical_axes(C), transformer.abstract_params(C)
  parts = jax.tree.map(lambda x: x.spec, sharding.shardings(axes, shapes, mesh, sharding.TRAIN))
  assert "tensor" in parts["layers"]["q"] and "tensor" in parts["layers"]["o"] and "tensor" in parts["layers"]["up"]
  assert "tensor" not in parts["layers"]["k"] and "tensor" not in parts["layers"]["v"] and "tensor" not in parts["embed"]


def test_put_gives_each_device_its_rows():
  mesh = sharding.make_mesh(4, 2, 1)
  x = sharding.put({"a": np.arange(16), "b": np.ones((8, 3), bool)}, sharding.rows(mesh))
  np.testing.assert_array_equal(x["a"], np.arange(16))
  assert {s.data.shape for s in x["a"].addressable_shards} == {(2,)} and x["b"].shape == (8, 3)


# ---- weights for decoding


@pytest.mark.parametrize("layers", [2, 5])
def test_a_split_policy_comes_together_in_as_many_collectives_as_it_has_kinds_of_weights(layers):
  c = PolicyConfig("qwen3", 31, 32, layers, 8, 2, 8, 40, qk_norm=True)
  mesh, shapes = sharding.make_mesh(fsdp=4), transformer.abstract_params(c)
  where = sharding.shardings(transformer.logical_axes(c), shapes, mesh, sharding.TRAIN)
  params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, where)
  with jax.set_mesh(mesh):
    program = Engine(c, mesh, 8, 16, 16, 8).loader(params, "bfloat16").lower(params).compile().as_text()
  assert 0 < program.count(" all-gather(") + program.count(" all-gather-start(") <= len(jax.tree.leaves(shapes))


@pytest.mark.parametrize("shape", [(1, 4, 1), (2, 2, 2)])
def test_weights_for_decoding_are_those_of_one_device(shape):
  params, mesh = transformer.init_params(C, jax.random.key(0)), sharding.make_mesh(*shape)
  where = sharding.shardings(transformer.logical_axes(C), params, mesh, sharding.TRAIN)
  with jax.set_mesh(mesh):
    engine = Engine(C, mesh, 8, 16, 16, 8)
    engine.load(jax.device_put(params, where), "bfloat16")
  plain = jax.tree.map(lambda x: x.astype("bfloat16"), transformer.unstack(params))
  jax.tree.map(np.testing.assert_array_equal, jax.device_get(engine.params), jax.device_get(plain))


# ---- a step is the same on every mesh


class Parity:
  """A grader: right is a response of even length."""

  def grade_async(self, items):
    return SimpleNamespace(wait=lambda _: True, result=lambda: [(float(len(text) % 2 == 0), "") for text, _ in items])


TOKENIZER = SimpleNamespace(decode=lambda tokens, **_: "x" * len(tokens))


def step_config():
  """Chunks of 2 to 8 positions, by mesh."""
  update = UpdateConfig(C, GRPO, Compute("float32", "xla", remat="none", chunk_tokens=8))
  return StepConfig(dtype="float32", sampling=Sampling(1.0, (7, 13), "float32"), temperature=1.0, rule=RULE, update=update,
                    shape=PackShape(32, 96, 1), optimizer=OPTIMIZER)


def train(shape):
  """A few whole steps: tokens sampled, metrics, gradients' effect, tables."""
  mesh = sharding.make_mesh(*shape)
  rng = np.random.default_rng(0)
  prompts = [Prompt(Problem(str(i), "", "", ""), "", rng.integers(0, 31, 2 + i).astype(np.int32)) for i in range(5)]
  with jax.set_mesh(mesh):
    weights = jax.jit(lambda k: jax.tree.map(lambda x: x * 3.0, transformer.init_params(C, k)))(jax.random.key(0))
    weights = jax.device_put(weights, sharding.shardings(transformer.logical_axes(C), weights, mesh, sharding.TRAIN))
    head = init_head(C.width, 16, jax.random.key(1)) | {"w2": jax.random.normal(jax.random.key(2), (16,))}
    params = {"policy": weights, "head": jax.device_put(head, sharding.replicated(mesh))}
    tables = jax.device_put(jax.tree.map(lambda x: x[None], Calibration.empty(8)), sharding.replicated(mesh))
    state = TrainState(params, jax.jit(OPTIMIZER.init)(params), tables, jax.device_put(np.int32(0), sharding.replicated(mesh)))
    engine = Engine(C, mesh, rows=11, max_prompt=8, max_new=20, segment=4, row_buckets=1, length_buckets=1, prefill_rows=3)
    out = SimpleNamespace(tokens=[], pruned=[], scores=[], metrics=[])
    one_step = TrainingStep(engine, step_config())

    def roll_out(step, decide):
      done, seconds = generate(engine, dict(enumerate(prompts)), 4, jax.random.key(step), one_step.config.sampling,
                               Grading(TOKENIZER, Parity()), decide)
      return RolledOut(done, done, sec_reward=seconds)

    for step in range(STEPS):
      state, rolled, metrics = one_step(state, functools.partial(roll_out, step), step > 0)
      out.tokens += [r.tokens.tolist() for r in rolled.rollouts]
      out.pruned += [r.pruned for r in rolled.rollouts]
      out.scores += [r.score for r in rolled.rollouts]
      out.metrics.append({k: v for k, v in metrics.items() if not k.startswith("sec_")})
    out.params, out.tables = jax.device_get(state.params), jax.device_get(state.calibration)
  return out


@pytest.fixture(scope="module")
def one():
  return train((1, 1, 1))


def test_the_run_is_a_fair_one(one):
  """Some are pruned, lengths differ, the table fills and the policy moves."""
  assert 5 < sum(one.pruned) < 40 and len({len(t) for t in one.tokens}) > 5
  assert one.tables.positive.sum() > 3 and one.tables.negative.sum() > 3
  assert all(m["grad_norm"] > 1 for m in one.metrics[:2])


@pytest.mark.parametrize("shape", MESHES)
def test_three_steps_on_a_mesh_are_those_on_one_device(one, shape):
  """float32. Tokens, decisions and counts are equal; losses and parameters up to the order of sums: 1e-4 relative, 1e-5 absolute.

  11 slots and 3 prompts a prefill divide by no mesh here: the engine pads them, as `pack` does the rows of the update.
  """
  got = train(shape)
  assert got.tokens == one.tokens and got.pruned == one.pruned
  np.testing.assert_allclose(got.scores, one.scores, rtol=1e-4, atol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, got.tables, one.tables)
  for a, b in zip(got.metrics, one.metrics, strict=True):
    for name, value in b.items():
      assert a[name] == (pytest.approx(value, rel=1e-4, abs=1e-5, nan_ok=True) if isinstance(value, float) else value), name
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), got.params, one.params)
