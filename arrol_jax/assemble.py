"""From a checked config to the parts that entry points work with: policy, mesh, engine, prompts, settings.

The only module besides the entry points that reads the config; everything below takes plain arguments.
"""

import dataclasses

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict
import optax
from tqdm import tqdm

from arrol_jax import config, data, hosts, quality, sharding, update
from arrol_jax.decode import Sampling
from arrol_jax.engine import Engine, slots_that_fit
from arrol_jax.losses import ALGORITHMS, LossConfig
from arrol_jax.prune import Calibration
from arrol_jax.rollout import PackShape, PruneRule, measure
from arrol_jax.types import TrainState, UserError
from arrol_jax.update import Compute
from arrol_jax.weights import Policy, load_policy

TRAIN, EVAL, INIT = range(3)  # purposes of random keys


def make_mesh(c: ConfigDict) -> jax.sharding.Mesh:
  try:
    return sharding.make_mesh(c.mesh.data, c.mesh.fsdp, c.mesh.tensor)
  except ValueError as e:
    raise UserError(f"mesh: {e}") from e


def load(c: ConfigDict, mesh: jax.sharding.Mesh) -> Policy:
  """The policy with float32 parameters on the mesh; it must bring a tokenizer."""
  loaded = load_policy(c.model.path, dtype="float32", mesh=mesh)
  if loaded.tokenizer is None:
    raise UserError(f"{c.model.path} has no tokenizer; put the model's tokenizer files beside its weights")
  return loaded


def prompts(c: ConfigDict, loaded: Policy, path: str, limit: int = 0) -> list[data.Prompt]:
  """Encoded problems of `path`, each process encoding its share; says how many were too long and left out."""
  problems = hosts.together(lambda: data.load_problems(path))[:limit or None]
  out, skipped = data.encode_prompts(problems, loaded.tokenizer, c.data.template, c.data.chat, c.rollout.max_prompt,
                                     thinking=c.data.thinking, spread=hosts.spread)
  if skipped:
    hosts.say(f"{path}: skipped {skipped} of {len(problems)} prompts longer than {c.rollout.max_prompt} tokens "
              "(rollout.max_prompt)")
  return out


def engine(c: ConfigDict, loaded: Policy, mesh: jax.sharding.Mesh, max_new: int, params: dict) -> Engine:
  """An engine for the policy in training, `params`; call it with all in place that stays in memory while it runs."""
  r = c.rollout
  most = r.prompts * r.group_size
  build = lambda rows: Engine(loaded.config, mesh, rows, r.max_prompt, max_new, r.segment, r.row_buckets, r.length_buckets,
                              prefill_rows=min(r.prompts, 32))
  if r.slots is not None:
    return build(r.slots)
  fits = slots_that_fit(build(most), sampling(c, loaded, r.temperature), r.group_size, params)
  return build(most if fits is None else min(most, fits))


def eval_engine(c: ConfigDict, loaded: Policy, mesh: jax.sharding.Mesh, params: dict) -> Engine:
  """An engine for held-out problems, loaded with `params`."""
  out = engine(c, loaded, mesh, c.eval.max_new or c.rollout.max_new, params)
  out.load(params, c.model.dtype)
  return out


def accuracy(c: ConfigDict, loaded: Policy, engine: Engine, prompts: list[data.Prompt], grader, name: str,
             head: dict | None = None, table: Calibration | None = None) -> dict:
  """`rollout.measure` as eval.* says, with a progress bar called `name`."""
  with tqdm(total=len(prompts) * c.eval.samples, desc=name, unit="response", leave=False, disable=not hosts.first()) as bar:
    return measure(engine, prompts, c.eval.samples, key(c, EVAL), sampling(c, loaded, c.eval.temperature), loaded.tokenizer,
                   grader, head=head, table=table, pattern=c.reward.pattern, progress=lambda _: bar.update())[0]


def sampling(c: ConfigDict, loaded: Policy, temperature: float) -> Sampling:
  r = c.rollout
  return Sampling(temperature, tuple(loaded.eos_ids), c.model.dtype, r.cache, r.attention, r.top_k, r.top_p, r.min_p)


def prune_rule(c: ConfigDict) -> PruneRule:
  p = c.prune
  return PruneRule(tuple(p.detect), p.keep, p.target, p.strength, p.p_min, p.p_max, p.rule, p.draw, p.floor, p.control)


def loss(c: ConfigDict) -> LossConfig:
  given = {k: v for k, v in c.loss.items() if k != "name" and v is not None}
  return dataclasses.replace(ALGORITHMS[c.loss.name], **given)


def compute(c: ConfigDict) -> Compute:
  return Compute(c.model.dtype, c.model.attention, c.model.remat, c.optim.chunk_tokens, c.rollout.max_new)


def pack_shape(c: ConfigDict) -> PackShape:
  return PackShape(c.rollout.max_prompt + c.rollout.max_new, c.optim.micro_tokens, c.optim.length_buckets)


def key(c: ConfigDict, purpose: int, step: int = 0) -> jax.Array:
  """The random key of one use: a function of (seed, purpose, step) alone."""
  return jax.random.fold_in(jax.random.fold_in(jax.random.key(c.seed), purpose), step)


def belongs(c: ConfigDict) -> dict:
  """What a checkpoint of this run says of itself."""
  return {"config_hash": config.fingerprint(c), "root_key": jax.device_get(jax.random.key_data(jax.random.key(c.seed))).tolist()}


def optimizer(c: ConfigDict) -> optax.GradientTransformation:
  o = c.optim
  return update.make_optimizer(o.lr, o.head_lr, o.warmup, o.clip_norm, o.weight_decay, o.b1, o.b2)


def init_state(c: ConfigDict, loaded: Policy, optimizer: optax.GradientTransformation, mesh, keep_params: bool) -> TrainState:
  """Fresh head and optimizer state around the loaded policy (copied where the loaded weights are to outlive updates)."""
  head = jax.device_put(quality.init_head(loaded.config.width, c.quality.hidden, key(c, INIT)), sharding.replicated(mesh))
  weights = jax.tree.map(lambda x: x.copy(), loaded.params) if keep_params else loaded.params
  params = {"policy": weights, "head": head}
  tables = jax.tree.map(lambda x: jnp.stack([x] * len(c.prune.detect)), Calibration.empty(c.prune.bins))
  place = lambda x: x if isinstance(x.sharding, jax.sharding.NamedSharding) else jax.device_put(x, sharding.replicated(mesh))
  rest = jax.tree.map(place, (jax.jit(optimizer.init)(params), tables, jnp.zeros((), jnp.int32)))
  return TrainState(params, *rest)
