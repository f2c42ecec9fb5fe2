"""Builds what a run changes from its config: fresh, from a checkpoint, and as the policy that it exports."""

import dataclasses
import functools
import math
import os
from pathlib import Path

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from arrol_jax import assemble
from arrol_jax.learning import head_training
from arrol_jax.learning.candidates import nothing_known
from arrol_jax.learning.optimizers import Optimizer
from arrol_jax.models import sharding, transformer
from arrol_jax.models.files import adapters, folders, hub
from arrol_jax.models.files.weights import Policy
from arrol_jax.models.transformer import PolicyConfig
from arrol_jax.pruning import features
from arrol_jax.pruning.head import init_head
from arrol_jax.pruning.table import Calibration
from arrol_jax.running import evaluated
from arrol_jax.running.checkpoint import Checkpoints, Scores, digest
from arrol_jax.running.workdir import fingerprint, saved_steps, stored_config, stored_inputs
from arrol_jax.types import TrainState, UserError


def fresh_head(c: ConfigDict, width: int) -> tuple[dict, object, Calibration]:
  """A head that knows nothing, what its fit remembers, and its tables: one a decision, a linear head's for the last token too."""
  q, decisions = c.quality, len(assemble.detect(c))
  if q.fit == "ridge":
    head, recent = head_training.no_linear(features.width(assemble.linear_inputs(c), width), decisions, q.center)
  else:
    head = init_head(width, q.hidden, assemble.key(c, assemble.INIT), tuple(q.inputs))
    recent = head_training.no_recent(head, width, q.buffer, assemble.head_optimizer(c)) if q.buffer else None
  tables = jax.tree.map(lambda x: jnp.stack([x] * (decisions + (q.fit == "ridge"))), Calibration.empty(c.prune.bins))
  return head, recent, tables


def init_state(c: ConfigDict, loaded: Policy, optimizer: Optimizer, mesh, keep_params: bool) -> TrainState:
  """Fresh head and optimizer state around the loaded policy (copied where the loaded weights are to outlive updates), or around
  fresh adapters beside it."""
  if loaded.config.lora:
    base, weights = loaded.params, fresh_adapters(c, loaded, mesh)
  else:
    base, weights = None, jax.tree.map(lambda x: x.copy(), loaded.params) if keep_params else loaded.params
  where = jax.tree.map(lambda x: x.sharding, abstract_state(c, loaded.config, mesh))

  # One program: op by op it is some fifty, which take seconds to load.
  @functools.partial(jax.jit, out_shardings=(where.params["head"], where.opt_state, where.calibration, where.step, where.recent,
                                             where.prompts))
  def begin(weights):
    head, recent, tables = fresh_head(c, loaded.config.width)
    model = nothing_known(loaded.config.width) if assemble.candidates(c) > c.rollout.prompts else None
    return head, optimizer.init({"policy": weights, "head": head}), tables, jnp.zeros((), jnp.int32), recent, model

  head, *rest = begin(weights)
  return TrainState({"policy": weights, "head": head}, *rest, base)


def per_chip(tree) -> int:
  """Bytes of a tree of shapes with shardings on one chip, a tile's padding not counted; of what has no sharding, all."""
  local = lambda x: x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) else x.shape
  return sum(math.prod(local(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree) if hasattr(x, "shape"))


def reference(c: ConfigDict, state: TrainState) -> int:
  """Bytes a chip of the weights that a KL term compares with: a copy, unless they are frozen anyway."""
  return per_chip(state.params["policy"]) if assemble.loss(c).kl_weight and state.base is None else 0


def abstract_state(c: ConfigDict, model: PolicyConfig, mesh: jax.sharding.Mesh) -> TrainState:
  """`init_state`'s result as shapes with shardings."""
  optimizer, everywhere = assemble.optimizer(c), sharding.replicated(mesh)
  place = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
  shard = lambda tree, axes: jax.tree.map(place, tree, sharding.shardings(axes, tree, mesh, sharding.TRAIN))
  weights, base = shard(transformer.abstract_params(model), transformer.logical_axes(model)), None
  if model.lora:
    base = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, c.model.dtype, sharding=x.sharding), weights)
    adapters = jax.eval_shape(lambda: transformer.init_adapters(model, jax.random.key(0)))
    weights = shard(adapters, transformer.adapter_axes(model))
  fresh = jax.eval_shape(lambda: fresh_head(c, model.width))
  head, recent, tables = jax.tree.map(lambda x: place(x, everywhere), fresh)
  params = {"policy": weights, "head": head}
  opt_state = jax.eval_shape(optimizer.init, params)
  opt_state = jax.tree.map(place, opt_state, sharding.following(opt_state, params, mesh))
  chooses = assemble.candidates(c) > c.rollout.prompts
  prompts = jax.eval_shape(lambda: nothing_known(model.width)) if chooses else None
  prompts = jax.tree.map(lambda x: place(x, everywhere), prompts)
  return TrainState(params, opt_state, tables, jax.ShapeDtypeStruct((), jnp.int32, sharding=everywhere), recent,
                    prompts, base)


def fresh_adapters(c: ConfigDict, loaded: Policy, mesh) -> dict:
  """Adapters that change nothing yet, sharded as their matrices are."""
  init = functools.partial(transformer.init_adapters, loaded.config)
  shapes = jax.eval_shape(init, jax.random.key(0))
  where = sharding.shardings(transformer.adapter_axes(loaded.config), shapes, mesh, sharding.TRAIN)
  return jax.jit(init, out_shardings=where)(assemble.key(c, assemble.ADAPTERS))


def belongs(c: ConfigDict, base: str | None = None) -> dict:
  """What a checkpoint of this run says of itself. base: the hash of frozen weights, which it does not hold."""
  whose = {"config_hash": fingerprint(c), "root_key": jax.device_get(jax.random.key_data(jax.random.key(c.seed))).tolist()}
  return whose | ({"base": base} if base else {})


def export(c: ConfigDict, loaded: Policy, state: TrainState, workdir: str) -> None:
  """Writes what a run has made of the policy that it loaded: policy/, and adapters alone as adapter/. All processes call it."""
  trained = dataclasses.replace(loaded, params=state.policy, head=state.params["head"], calibration=state.calibration,
                                head_inputs=tuple(c.quality.inputs), detect=assemble.detect(c))
  trained.save(f"{workdir}/policy", dtype=c.model.dtype)
  if loaded.config.lora:
    base = c.model.path if hub.is_id(c.model.path) else os.path.abspath(hub.here(c.model.path))
    adapters.save(f"{workdir}/adapter", loaded.config, state.params["policy"], base)


def check_export(c: ConfigDict, workdir: str, tokenizer) -> None:
  """UserError where `export` could not write, or would replace what no run of this folder made: not when all is done."""
  if c.checkpoint.export:
    target, source = Path(workdir, "policy").resolve(), Path(hub.here(c.model.path)).resolve()
    if target in (source, *source.parents):
      raise UserError(f"model.path is in {workdir}/policy, which this run would replace at its end; give another --workdir")
    folders.check_replaceable(Path(workdir) / "policy", tokenizer)
    if any(target.glob("*")) and stored_config(workdir) is None:
      raise UserError(f"{workdir}/policy is there, and no config.json that tells of a run which made it: move it away, or choose "
                      "another --workdir")
    if c.model.lora.rank:
      folders.check_replaceable(Path(workdir) / "adapter")


def scored_by(workdir: str) -> Scores | None:
  """What the scores of this run's checkpoints are of: checkpoint.best, and how on which problems by which reward function, for
  only such figures can be compared; and what evaluations in the folder say. None where checkpoint.best is not set."""
  stored, inputs = stored_config(workdir) or {}, stored_inputs(workdir) or {}
  best, how = stored.get("checkpoint", {}).get("best"), stored.get("eval", {})
  if best is None:
    return None
  asked = [how.get(name) for name in ("subset", "samples", "temperature", "max_new", "stop_below")]
  reward = f", {inputs['reward']}" if "reward" in inputs else ""
  return Scores(f"{best}, {asked}, {inputs.get('held_out')}{reward}", evaluated.scores(workdir, best, saved_steps(workdir)))


def from_checkpoint(c: ConfigDict, loaded: Policy, mesh: jax.sharding.Mesh, workdir: str, which: str = "newest") -> int:
  """Gives `loaded` the policy and the quality head of a checkpoint of `workdir`, see `restored`; its step."""
  state, step = restored(c, loaded, mesh, workdir, which)
  loaded.params, loaded.head, loaded.calibration = state.policy, state.params["head"], state.calibration
  loaded.head_inputs, loaded.detect = tuple(c.quality.inputs), assemble.detect(c)  # not what a head of model.path had
  return step


def restored(c: ConfigDict, loaded: Policy, mesh: jax.sharding.Mesh, workdir: str,
             which: str = "newest") -> tuple[TrainState, int]:
  """A checkpoint of `workdir`, and its step; which: "newest", "best" (by checkpoint.best) or a step. Sets what the config says of
  the head, and gives `loaded` the adapters' base, as that run had them."""
  trained = stored_config(workdir) or {}
  belongs = _as_trained(c, loaded, trained)
  checkpoints = None
  if os.path.isdir(f"{workdir}/checkpoints"):
    checkpoints = Checkpoints(workdir, c.checkpoint.keep, belongs, read_only=True, best=scored_by(workdir))
  if not checkpoints or not checkpoints.steps():
    raise UserError(f"{workdir} holds no checkpoint; train first, or leave --workdir out to take model.path")
  known, top = {str(step): step for step in checkpoints.steps()} | {"newest": None}, checkpoints.best()
  known |= {"best": top} if top is not None else {}
  if which not in known:
    why = ", of which none has a score" if which == "best" else ""
    raise UserError(f"--step={which}: {workdir} holds checkpoints of {', '.join(known)}{why}")
  like = init_state(c, loaded, assemble.optimizer(c), mesh, keep_params=False)
  step, state = checkpoints.restore(like, known[which])
  checkpoints.close()
  return state, step


def _as_trained(c: ConfigDict, loaded: Policy, trained: dict) -> dict:
  """Head, choice of prompts and adapters as the run of the stored config `trained` had them; what its checkpoints belong to."""
  listed = [("quality", c.quality), ("prune", ("detect", "bins")), ("rollout", ("candidates", "prompts"))]
  for section, stored, names in [(c[name], trained.get(name, {}), names) for name, names in listed] + [
    (c.model.lora, {"rank": 0} | trained.get("model", {}).get("lora", {}), c.model.lora)]:
    for name in names:
      if name in stored:
        section[name] = tuple(stored[name]) if isinstance(stored[name], list) else stored[name]
  beside = assemble.lora(c) if trained else None
  if beside is None:
    return {}
  loaded.config = dataclasses.replace(loaded.config, lora=beside)
  loaded.params = jax.tree.map(lambda x: x.astype(trained["model"]["dtype"]), loaded.params)
  return {"base": digest(loaded.params)}
