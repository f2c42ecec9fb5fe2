"""Plans: what a compiled module adds up to, what lies on a chip beside a program, the verdict, and mistakes.

What needs libtpu skips without it (pip install "jax[tpu]"); the rest plans for the CPU's eight devices, where the same code runs.
"""

import importlib.util
import json
import math
from pathlib import Path
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrol_jax import assemble, assemble_state, plan
from arrol_jax.learning import batching
from arrol_jax.models import sharding, transformer
from arrol_jax.models.files.weights import load_policy
from arrol_jax.planning import chips, compiling, hlo, suggesting, timing
from arrol_jax.types import UserError
from configs import base

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "tests/fixtures/qwen3_tied"
SHAPE = plan.model_shape(str(MODEL), None)[0]
BIG = 1 << 40

libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")


@pytest.fixture(scope="module", autouse=True)
def optimized():
  """Compilers optimize as they do outside tests, also in the command: what programs then need is what is looked at here."""
  before = jax.config.read("jax_disable_most_optimizations")
  with pytest.MonkeyPatch.context() as patch:
    patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "0")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
  jax.config.update("jax_disable_most_optimizations", before)


def config(**changes):
  c = base.get_config()
  c.model.path, c.model.dtype = str(MODEL), "float32"
  c.rollout.update(prompts=4, group_size=4, max_prompt=16, max_new=48, segment=8, row_buckets=2, length_buckets=1)
  c.prune.detect, c.optim.micro_tokens, c.optim.length_buckets = (16,), 512, 1
  c.quality.hidden, c.loss.kl_weight = 8, 0.1  # a reference policy, so log-probs of their own
  c.mesh.update(fsdp=4, tensor=2)
  c.update_from_flattened_dict(changes)
  return c


def compiled_text(f, *args):
  return jax.jit(f).lower(*args).compile().as_text()


# ---- reading a module


def test_products_count_as_often_as_their_loop_runs():
  x, w = jnp.ones((8, 16)), jnp.ones((5, 16, 16))
  compiled = jax.jit(lambda x, w: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]).lower(x, w).compile()
  module = hlo.parse(compiled.as_text())
  count = hlo.trips(module)
  assert hlo.flops(module, count) == 5 * 2 * 8 * 16 * 16
  once = hlo.flops(module, dict.fromkeys(count, 1))
  assert once == 2 * 8 * 16 * 16 <= compiled.cost_analysis()["flops"]


def test_a_loop_of_unknown_length_runs_as_often_as_the_caller_says():
  f = lambda x, n: jax.lax.while_loop(lambda c: c[0] < n, lambda c: (c[0] + 1, jnp.tanh(c[1] @ c[1])), (0, x))
  module = hlo.parse(compiled_text(f, jnp.ones((8, 8)), 3))
  assert hlo.flops(module, hlo.trips(module, unknown=7)) == 7 * 2 * 8**3


def test_a_slice_of_stacked_weights_is_not_read_as_the_whole():
  layers, width = 16, 64
  f = lambda x, w: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0]
  module = hlo.parse(compiled_text(f, jnp.ones((1, width)), jnp.ones((layers, width, width))))
  whole = layers * width * width * 4
  assert whole <= hlo.traffic(module, hlo.trips(module)) < 4 * whole


def test_collectives_are_counted_with_their_bytes(mesh):
  mesh = sharding.make_mesh(8, 1, 1)
  spec = jax.sharding.PartitionSpec("data")
  add = jax.shard_map(lambda x: jax.lax.fori_loop(0, 3, lambda _, x: jax.lax.psum(x, "data") / 8, x),
                      mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
  module = hlo.parse(compiled_text(add, jnp.ones((8, 100))))
  assert hlo.collective_counts(module, hlo.trips(module)) == {"all-reduce": [3, 3 * 400]}


# As a TPU's compiler prints them: a batched product is a convolution whose batch is a spatial dimension with holes, and one
# collective is spread over fusions that carry its channel.
TPU_TEXT = """HloModule jit_f, is_scheduled=true

%fused (p0: bf16[4,8,32], p1: bf16[4,32,16]) -> f32[4,8,16] {
  %p0 = bf16[4,8,32]{2,1,0:T(8,128)(2,1)} parameter(0)
  %p1 = bf16[4,32,16]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  ROOT %c.1 = f32[4,8,16]{2,1,0:T(8,128)} convolution(%p0, %p1), window={size=4 stride=3 lhs_dilate=4}, dim_labels=0bf_0io->0bf
}

%gather_a (q: f32[2,4]) -> f32[8,4] {
  %q = f32[2,4]{1,0} parameter(0)
  ROOT %all-gather.1 = f32[8,4]{1,0} all-gather(%q), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

%gather_b (r: f32[2,4]) -> f32[8,4] {
  %r = f32[2,4]{1,0} parameter(0)
  ROOT %all-gather.2 = f32[8,4]{1,0} all-gather(%r), channel_id=7, replica_groups=[2,4]<=[8], dimensions={0}
}

%body (t: (s32[], f32[2,4])) -> (s32[], f32[2,4]) {
  %t = (s32[]{:T(128)}, f32[2,4]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[2,4]{1,0} get-tuple-element(%t), index=1
  %fusion.1 = f32[8,4]{1,0} fusion(%x), kind=kCustom, calls=%gather_a
  %fusion.2 = f32[8,4]{1,0} fusion(%x), kind=kCustom, calls=%gather_b
  ROOT %next = (s32[], f32[2,4]{1,0}) tuple(%i, %x)
}

%condition (t: (s32[], f32[2,4])) -> pred[] {
  %t = (s32[]{:T(128)}, f32[2,4]{1,0}) parameter(0)
  %bound = s32[]{:T(128)} constant(6)
  %i = s32[] get-tuple-element(%t), index=0
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

ENTRY %main (a: bf16[4,8,32], b: bf16[4,32,16], x: f32[2,4]) -> f32[4,8,16] {
  %a = bf16[4,8,32]{2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[4,32,16]{2,1,0:T(8,128)(2,1)S(1)} parameter(1)
  %x = f32[2,4]{1,0} parameter(2)
  %zero = s32[]{:T(128)} constant(1)
  %start = (s32[]{:T(128)}, f32[2,4]{1,0}) tuple(%zero, %x)
  %loop = (s32[]{:T(128)}, f32[2,4]{1,0}) while(%start), condition=%condition, body=%body
  ROOT %out = f32[4,8,16]{2,1,0:T(8,128)} fusion(%a, %b), kind=kOutput, calls=%fused
}
"""


def test_a_module_of_a_tpu():
  module = hlo.parse(TPU_TEXT)
  count = hlo.trips(module)
  assert count["body"] == 5  # from 1 to below 6
  assert hlo.flops(module, count) == 2 * 4 * 8 * 16 * 32
  assert hlo.collective_counts(module, count) == {"all-gather": [5, 5 * 8 * 4 * 4]}
  loops = 5 * 2 * (8 + 32) * 4
  assert hlo.traffic(module, count) == loops + 4 * 8 * 32 * 2 + 4 * 8 * 16 * 4  # %b lies in the chip's scratch memory, S(1)


# ---- a step


@pytest.fixture(scope="module")
def step():
  return compiling.Step(config(), SHAPE, sharding.make_mesh(1, 4, 2), BIG, rates=chips.rates("h100")).run()


def test_every_program_of_a_step_is_there(step):
  assert [p.name for p in step.programs] == [*compiling.GENERATION, "log-probs", "update", "optimizer"]
  assert step.shapes == {"slots": 16, "cache columns": 64, "micro-batch tokens": 512, "micro-batch rows": 16,
                         "micro-batch columns": 64}
  assert all(p.fits for p in step.programs) and "**Fits**" in plan.verdict(step, "here")
  assert len({line.count("|") for line in plan.table(step.programs).splitlines()}) == 1


def test_abstract_state_is_the_real_one():
  """Shapes and shardings of what train.py holds, so its bytes too: the optimizer's state must be sharded as parameters are."""
  c, mesh = config(), sharding.make_mesh(1, 4, 2)
  with jax.set_mesh(mesh):
    loaded = load_policy(c.model.path, mesh=mesh)
    real = assemble_state.init_state(c, loaded, assemble.optimizer(c), mesh, keep_params=False)
    abstract = assemble_state.abstract_state(c, SHAPE, mesh)
  assert jax.tree.structure(real) == jax.tree.structure(abstract)
  for a, b in zip(jax.tree.leaves(real), jax.tree.leaves(abstract), strict=True):
    assert (a.shape, a.dtype) == (b.shape, b.dtype) and a.sharding.is_equivalent_to(b.sharding, a.ndim)
  first = lambda x: x.addressable_shards[0].data.nbytes
  assert assemble_state.per_chip(abstract) == sum(map(first, jax.tree.leaves(real)))
  assert assemble_state.per_chip(abstract) < 0.4 * sum(x.nbytes for x in jax.tree.leaves(real))


def test_abstract_batch_is_what_pack_makes():
  mesh = sharding.make_mesh(1, 4, 2)
  shape = batching.PackShape(64, 512, 2)
  for real, abstract in zip(batching.empty_batches(shape, mesh), batching.abstract_batches(shape, mesh), strict=True):
    for a, b in zip(jax.tree.leaves(real), jax.tree.leaves(abstract), strict=True):
      assert (a.shape, a.dtype) == (b.shape, b.dtype) and a.sharding.is_equivalent_to(b.sharding, a.ndim)


def test_what_lies_beside_a_program_counts(step):
  by_name = {p.name: p for p in step.programs}
  state = step.sizes["parameters, optimizer, head"]
  always = state + step.sizes["reference parameters"]
  segment = by_name["decode segment"]
  assert segment.held == always + sum(step.sizes[n] for n in ("decode weights", "cache and slots", "prompts' cache"))
  assert segment.in_step >= segment.held + segment.temp and segment.in_step > segment.peak
  update = by_name["update"]
  assert update.held == always + step.sizes["gradients"] + step.sizes["micro-batches"]
  assert update.flops > 2.5 * by_name["log-probs"].flops > 0
  # Gradients and state go in and come out in the same place, sharded alike.
  assert update.alias >= step.sizes["gradients"] and by_name["optimizer"].alias >= 0.99 * state
  # Cache of 16 rows of 64 columns, over the four shards of the rows and the two of the heads.
  cache = 2 * SHAPE.layers * SHAPE.kv_heads * SHAPE.head_dim * 4 * 16 * 64 // 8
  assert cache <= step.sizes["cache and slots"] < cache + 20000


def test_one_byte_decides_and_a_change_that_fits_is_compiled(step, capsys):
  fullest = max(step.programs, key=lambda p: p.in_step)
  fitting = lambda limit: [p.name for p in step.programs if max(p.in_step, p.peak) > limit]
  assert fitting(fullest.in_step) == [] and fitting(fullest.in_step - 1) == [fullest.name]

  c, mesh = config(), sharding.make_mesh(1, 4, 2)
  limit = fullest.in_step - 1
  def compile_with(c, phases, stop=True):
    mesh = sharding.make_mesh(*(c.mesh[n] for n in sharding.AXES))
    return compiling.Step(c, SHAPE, mesh, limit, stop=stop).run(phases)
  tight = compiling.Step(c, SHAPE, mesh, limit).run((suggesting.phases_over(over(step, limit))[0],))
  change, trial = suggesting.what_fits(c, tight, compile_with)
  assert trial.programs and max(p.in_step for p in trial.programs) <= limit < fullest.in_step
  assert "trying --config." in capsys.readouterr().err and change
  assert f"**Does not fit** here: {fullest.name}" in plan.verdict(tight, "here")


def over(step, limit):
  """The same programs against another limit."""
  out = compiling.Step(step.c, SHAPE, step.mesh, limit)
  out.programs = [compiling.Program(p.name, limit, in_step=p.in_step, peak=p.peak) for p in step.programs]
  return out


def test_without_room_for_a_group_nothing_of_generation_is_compiled():
  limit = assemble_state.per_chip(assemble_state.abstract_state(config(), SHAPE, sharding.make_mesh(1, 4, 2))) + 1000
  step = compiling.Step(config(), SHAPE, sharding.make_mesh(1, 4, 2), limit).run(("generation",))
  assert [p.name for p in step.programs] == list(compiling.GENERATION) and not any(p.fits for p in step.programs)
  assert "one group of 4 rollouts needs" in plan.verdict(step, "here") and compiling.SKIPPED not in plan.verdict(step, "here")


def test_changes_help_where_it_is_needed():
  step = over_in("update")
  names = [set(change) for change in suggesting.changes(config(**{"mesh.data": 2, "mesh.fsdp": 2}), step)]
  assert names[0] == {"mesh.data", "mesh.fsdp"} and {"model.remat"} in names and {"optim.micro_tokens"} in names
  assert {"rollout.cache"} not in names
  names = [set(change) for change in suggesting.changes(config(), over_in("decode segment"))]
  assert {"rollout.slots"} in names and {"rollout.cache"} in names and {"model.remat"} not in names
  assert suggesting.helps({"mesh.fsdp": 1}) == set(compiling.PHASES) and suggesting.helps({"rollout.slots": 4}) == {"generation"}


def over_in(name):
  step = compiling.Step(config(), SHAPE, sharding.make_mesh(1, 4, 2), 1000)
  step.programs = [compiling.Program(name, 1000, in_step=1100)]
  step.sizes["cache and slots"], step.shapes = 500, {"slots": 64, "micro-batch tokens": 512}
  return step


def test_a_compiled_step_is_timed(step):
  """Phases add up programs as often as they run; what is pruned is neither decoded on nor learned from."""
  lengths = np.full(16, 48)
  whole, pruned = (timing.of_step(step, lengths, 16, x) for x in (False, True))
  p = {x.name: timing.program_seconds(x, step.rates) for x in step.programs}
  assert (whole.tokens_generated, whole.tokens_trained, whole.kept) == (16 * 48, 16 * 48, 16)
  assert (pruned.tokens_generated, pruned.kept) == (8 * 16 + 8 * 48, 8) and pruned.tokens_trained == 8 * 48
  # 4 groups' prompts, and once more for each of 768 / 128 bins: 10 * 15 + 16 + 768 = 934 tokens in micro-batches of 512, the
  # second nearly full; log-probs for the reference alone.
  assert whole.seconds["update"] == pytest.approx(2 * p["update"] + p["optimizer"])
  assert whole.seconds["logprob"] == pytest.approx(2 * p["log-probs"]) and not step.kernels
  launched = 48 * SHAPE.layers * step.rates.layer
  assert whole.decode_steps == 48 and whole.seconds["generate"] > p["reshard"] + p["prefill"] + launched
  assert pruned.total < whole.total and 0 < pruned.moved < whole.moved
  with pytest.raises(ValueError, match="decode segment"):
    broken = over(step, BIG)
    broken.rates, broken.programs = step.rates, [compiling.Program("decode segment", BIG, error="too large")]
    timing.of_step(broken, lengths, 16, False)


# ---- mistakes and the compiler's words


def test_out_of_memory_is_read():
  said = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Ex"
  size, text = compiling.out_of_memory(said)
  assert size == int(20.5 * 2**30) and text == "the compiler needs 20.50G of 15.75G"
  said = "RESOURCE_EXHAUSTED: the total memory required for HLO temporaries (256.00M) exceeds available HBM (15.75G)."
  assert compiling.out_of_memory(said) == (256 << 20, "the compiler needs 256.00M of 15.75G")
  assert compiling.out_of_memory("RESOURCE_EXHAUSTED: something else")[0] == 0


def run_plan(*arguments):
  return subprocess.run([sys.executable, "-m", "arrol_jax.plan", *arguments], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("topology, says", [
  ("v9x:2x2", "unknown chip"), ("v5e:2x4", "has 256 devices and v5e:2x4 has 8 chips"), ("v5e:3x3", "not divisible")])
@libtpu
def test_a_wrong_topology_is_one_line(topology, says):
  with pytest.raises(UserError, match=re.escape(says)):
    plan.topology_mesh(topology, config(**{"mesh.fsdp": 64, "mesh.tensor": 4}))


def test_without_libtpu_the_package_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError, match=re.escape(f'pip install "jax[tpu]=={jax.__version__}"')):
    plan.topology_mesh("v5e:2x4", config())


def test_shapes_come_from_files_or_names(tmp_path):
  assert plan.model_shape(str(MODEL), None) == (SHAPE, str(MODEL / "config.json"))
  assert plan.model_shape("models/Qwen3-1.7B-Base", None)[0] == plan.ZOO["qwen3-1.7b"]
  assert plan.model_shape(str(MODEL), "tiny")[0] == plan.ZOO["tiny"]
  for path, shape in (("models/nobody", None), (str(MODEL), "nothing")):
    with pytest.raises(UserError, match="qwen3-1.7b"):
      plan.model_shape(path, shape)


def test_the_command_ends_in_one_line_and_status_2():
  done = run_plan("--config=configs/qwen3_1b7.py")
  assert done.returncode == 2 and done.stderr == (
    "error: no --topology given, such as v5e:16x16 for a TPU slice or gpu:24GB for one card\n")


@pytest.mark.parametrize("name", ["qwen3_1b7", "qwen3_4b", "qwen3_8b"])
def test_paper_configs_are_in_order(name):
  """They hold the paper's constants and pass the checks but for the files."""
  c = importlib.import_module(f"configs.{name}").get_config()
  plan.configuration.check(c, files=False)
  assert (c.optim.lr, c.rollout.group_size, c.prune.keep, tuple(c.prune.detect)) == (1e-6, 16, 0.5, (512,))
  assert c.mesh.data * c.mesh.fsdp * c.mesh.tensor == 256
  shape, _ = plan.model_shape(c.model.path, None)
  assert c.model.path.lower().endswith("b-base") and shape.qk_norm


# ---- with libtpu


@libtpu
@pytest.mark.parametrize("chip", plan.HBM)
def test_the_limits_are_the_compilers(chip):
  mesh, limit = plan.topology_mesh(f"{chip}:2x2" + ("x1" if chip == "v5p" else ""), config(**{"mesh.fsdp": 4, "mesh.tensor": 1}))
  with jax.set_mesh(mesh), pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as e:
    jax.jit(lambda: jnp.zeros((1 << 38,), jnp.int8)).lower().compile()
  size, text = compiling.out_of_memory(str(e.value))
  assert size >= 1 << 38 and text.endswith(f" of {limit / compiling.GIB:.2f}G")


@libtpu
def test_a_tpu_writes_the_cache_in_place():
  """The decode segment must neither copy the cache nor loop over rows to write it: a copy a step would double its traffic."""
  c = config(**{"model.dtype": "bfloat16", "rollout.prompts": 16, "rollout.max_new": 480})
  shape = transformer.PolicyConfig("qwen3", 512, 256, 2, 8, 4, 128, 512, qk_norm=True)
  mesh, limit = plan.topology_mesh("v5e:2x4", c)
  texts = {}
  class Watched(compiling.Step):
    def compile(self, listed, results):
      if listed.name == "decode segment":
        texts[listed.name] = listed.jitted.lower(*listed.args(results), **listed.static).compile().as_text()
      return super().compile(listed, results)
  step = Watched(c, shape, mesh, limit).run(("generation",))
  segment = next(p for p in step.programs if p.name == "decode segment")
  local = f"bf16[2,16,{step.shapes['cache columns']},128]"  # 4 heads over tensor, 64 rows over fsdp
  instructions = [i for body in hlo.parse(texts["decode segment"]).values() for i in body.values()]
  assert sum(i.opcode == "scatter" and i.type.startswith(local) for i in instructions) == 2 * shape.layers
  assert not [i.name for i in instructions if i.opcode.startswith("copy") and local in i.type]
  assert not [i.name for i in instructions if i.opcode == "while" and "scatter" in i.rest]
  assert segment.temp < 0.5 * step.sizes["cache and slots"]


@libtpu
def test_the_command_plans_for_a_tpu(tmp_path):
  """Command, table and JSON, of a model read from its config.json; what does not fit is said so, with what would."""
  raw = json.loads((MODEL / "config.json").read_text()) | {"hidden_size": 256, "head_dim": 128, "vocab_size": 512}
  (tmp_path / "config.json").write_text(json.dumps(raw))
  out = tmp_path / "plan.json"
  done = run_plan("--config=configs/qwen3_1b7.py", "--topology=v5e:2x4", f"--json={out}", "--effort=-1",
                  f"--config.model.path={tmp_path}", "--config.mesh.fsdp=4", "--config.mesh.tensor=2",
                  "--config.rollout.prompts=8", "--config.optim.micro_tokens=16384")
  assert done.returncode == 0, done.stderr
  said = json.loads(out.read_text())
  assert said["fits"] is True and said["fits_with"] is None and "**Fits** v5e:2x4" in done.stdout
  assert sum(line.startswith("| ") for line in done.stdout.splitlines()) == 2 + len(said["programs"])
  for p in said["programs"]:
    assert p["limit"] == math.floor(15.75 * 2**30) and p["peak"] == p["argument"] + p["output"] - p["alias"] + p["temp"]
    assert p["fits"] and not p["error"] and p["peak"] > 0
