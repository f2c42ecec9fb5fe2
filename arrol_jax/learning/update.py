"""The training programs: log-probs of a batch, gradients of one micro-batch, the optimizer step.

Policy and head take one optax step together (METHOD section 2). The head learns from the features that the engine took while it
decoded, which carry no gradient into the backbone. Micro-batches accumulate sums that already carry the whole batch's
denominators, so how rows are cut into micro-batches does not change the step.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from arrol_jax.learning import losses
from arrol_jax.learning.logprobs import pulled_logprobs, token_logprobs
from arrol_jax.learning.losses import LossConfig, binary_cross_entropy, weighted_mean
from arrol_jax.learning.optimizers import Optimizer
from arrol_jax.models import transformer
from arrol_jax.models.sharding import constrain
from arrol_jax.models.sharing import collect, shared_attention, spread
from arrol_jax.models.transformer import PolicyConfig
from arrol_jax.pruning.head import is_linear, quality_logit
from arrol_jax.running import kept
from arrol_jax.types import Batch, Examples, TrainState, join


@dataclasses.dataclass(frozen=True)
class Compute:
  """How the training programs compute: dtype of activations, attention (attention.py), remat and scan (transformer.forward),
  tokens of a chip in a log-prob chunk."""
  dtype: str = "bfloat16"
  attention: str = "auto"
  remat: str = "dots"
  chunk_tokens: int = 4096
  scan_layers: bool = True


@dataclasses.dataclass(frozen=True)
class UpdateConfig:
  """What the training programs are compiled for. fresh: one optimizer step a batch, so that the policy of the loss is the
  one that the step starts from and its ratio is 1."""
  model: PolicyConfig
  loss: LossConfig = LossConfig()
  compute: Compute = Compute()
  fresh: bool = True


def _hidden_states(u: UpdateConfig, params: dict, batch: Batch) -> jax.Array:
  """After the final norm, [I,U,D]."""
  return transformer.forward(u.model, params, batch.tokens, batch.positions, shared_attention(u.compute.attention, batch.layout),
                             dtype=u.compute.dtype, remat=u.compute.remat, scan=u.compute.scan_layers)[0]


def _rows(x: jax.Array, batch: Batch) -> jax.Array:
  """Values of tokens, f32[I,U], where the responses stand, f32[B,S]: 0 elsewhere."""
  return jnp.where(batch.response_mask > 0, spread(x, batch.layout), 0.0)


@functools.partial(kept.jit, static_argnames=("u",))
def batch_logprobs(u: UpdateConfig, params: dict, batch: Batch, temperature: jax.Array) -> jax.Array:
  """Log-probs of the response tokens under `params`, f32[B,S], 0 outside the responses."""
  found = token_logprobs(params, _hidden_states(u, params, batch), batch.tokens, batch.used, temperature, u.compute.chunk_tokens)
  return _rows(found[0], batch)


class LossInputs(NamedTuple):
  """What the loss of a token takes beside its log-prob, f32[B,S] each. Rows weigh alike in both terms: advantages have
  batch.weights in them, the KL term takes them as `rows`."""
  mask: jax.Array             # 1 where a response stands
  weight: jax.Array           # of the token in the batch's mean
  advantages: jax.Array
  sampler: jax.Array          # log-probs of the sampler,
  old: jax.Array | None       # of the policy that the batch began with, None where the loss's own are the old ones
  reference: jax.Array | None  # and of the KL term's reference; None, as `rows` then, where there is no KL term
  rows: jax.Array | None

  @classmethod
  def of(cls, u: UpdateConfig, batch: Batch, scalars: dict) -> "LossInputs":
    wide = lambda x: jnp.broadcast_to(x[:, None], batch.response_mask.shape)
    weight = losses.token_weights(batch.response_mask, u.loss.aggregate, scalars["tokens"], scalars["rows"], u.loss.longest)
    kl = (batch.ref_logprobs, wide(batch.weights)) if u.loss.kl_weight else (None, None)
    return cls(batch.response_mask, weight, wide(batch.advantages), batch.sampler_logprobs,
               None if u.fresh else batch.old_logprobs, *kl)


def objective(loss: LossConfig, logprobs: jax.Array, inputs: LossInputs) -> tuple[jax.Array, dict]:
  """The loss of rows f32[B,S], f32[], and its parts: "policy_loss" f32[], and by token f32[B,S] the others of METRICS."""
  old = jax.lax.stop_gradient(logprobs) if inputs.old is None else inputs.old
  weight = inputs.weight * losses.correction_weights(old, inputs.sampler, inputs.mask, loss.correction, loss.correction_cap)
  term, clipped = losses.surrogate(logprobs, old, inputs.advantages[:, 0], inputs.mask, clip_low=loss.clip_low,
                                   clip_high=loss.clip_high, ratio=loss.ratio)
  kl = losses.kl_estimate(logprobs, inputs.reference, inputs.mask) if loss.kl_weight else jnp.zeros_like(inputs.mask)
  policy_loss = jnp.sum(weight * term)
  total = policy_loss + loss.kl_weight * jnp.sum(weight * inputs.rows * kl) if loss.kl_weight else policy_loss
  return total, {"policy_loss": policy_loss, "kl": kl, "clip_frac": clipped, "logprob_gap": jnp.abs(old - inputs.sampler)}


def micro_loss(u: UpdateConfig, params: dict, batch: Batch, scalars: dict) -> tuple[jax.Array, dict]:
  """One micro-batch's share of the loss f32[] and of the metrics (sums that carry the batch's denominators).

  params: the policy's; scalars f32[]: "tokens", "rows" and "trained" of the whole batch (batching.pack), "temperature".
  """
  inputs, hidden = LossInputs.of(u, batch, scalars), _hidden_states(u, params, batch)
  given = (params, hidden, batch.tokens, batch.used, scalars["temperature"], u.compute.chunk_tokens)
  if u.loss.by_token:
    pull, *found = pulled_logprobs(*given, functools.partial(_slope, u.loss),
                                   jax.tree.map(lambda x: collect(x, batch.layout), inputs))
  else:
    pull, *found = 0.0, *token_logprobs(*given)
  logprobs, entropy = (_rows(x, batch) for x in found)
  loss, parts = objective(u.loss, logprobs, inputs)
  by_token = {"entropy": entropy, **{name: x for name, x in parts.items() if x.ndim}}
  metrics = {name: jnp.sum(inputs.mask / jnp.maximum(scalars["trained"], 1.0) * x) for name, x in by_token.items()}
  return loss + pull, metrics | {"policy_loss": parts["policy_loss"]}


def _slope(loss: LossConfig, logprobs: jax.Array, inputs: LossInputs) -> jax.Array:
  """The loss's derivative by each log-prob f32[I,W] where each depends on its own alone (`LossConfig.by_token`): each a row."""
  alone = lambda x: x.reshape(-1, 1)
  slopes = jax.grad(lambda x: objective(loss, x, jax.tree.map(alone, inputs))[0])(alone(logprobs))
  return slopes.reshape(logprobs.shape)


SCALARS = ("tokens", "rows", "trained", "temperature")
METRICS = ("policy_loss", "kl", "entropy", "clip_frac", "logprob_gap")


@functools.partial(kept.jit, static_argnames=("u",), donate_argnames=("grads", "metrics"))
def accumulate(u: UpdateConfig, params: dict, grads: dict, metrics: dict, batch: Batch, scalars: dict,
               base: dict | None = None) -> tuple[dict, dict]:
  """Adds one micro-batch's gradients and metrics to the sums so far. base: frozen weights beside which `params` are adapters."""
  new_grads, new_metrics = jax.grad(lambda p: micro_loss(u, join(base, p), batch, scalars), has_aux=True)(params)
  return _pin(u.model, jax.tree.map(jnp.add, grads, new_grads)), jax.tree.map(jnp.add, metrics, new_metrics)


def _pin(c: PolicyConfig, grads: dict) -> dict:
  """The sums with the parameters' sharding: left alone, a program that makes zeros would put all of them on every device."""
  return jax.tree.map(lambda x, axes: constrain(x, *axes), grads, transformer.trained_axes(c))


@functools.partial(kept.jit, static_argnames=("c",))
def zeros(c: PolicyConfig, params: dict) -> tuple[dict, dict]:
  """Empty sums for `accumulate`."""
  return _pin(c, jax.tree.map(jnp.zeros_like, params)), {name: jnp.zeros((), jnp.float32) for name in METRICS}


def head_loss(head: dict, examples: Examples) -> jax.Array:
  """Binary cross-entropy of the head's logits against the rewards (METHOD section 2), their weighted mean, f32[]."""
  if is_linear(head):  # fitted in closed form, see head_training.fit_linear
    return jnp.zeros((), jnp.float32)
  bce = binary_cross_entropy(quality_logit(head, examples.features), examples.reward)
  return weighted_mean(bce, examples.weight)


@functools.partial(kept.jit, static_argnames=("head_weight", "optimizer"), donate_argnames=("state",))
def apply(state: TrainState, grads: dict, scalars: dict, examples: Examples, *, head_weight: float,
          optimizer: Optimizer, decay: float = 1.0) -> tuple[TrainState, dict]:
  """One optax step over policy and head; metrics {"head_loss", "grad_norm": the policy's, before clipping}, f32[] each.

  grads: the policy's; decay f32[]: what its step is multiplied with. Parameters for which there was nothing to learn from, no
  rows or no examples, stay as they are whatever the momentum; the optimizer's state then takes a step of gradient 0.
  """
  loss, head_grads = jax.value_and_grad(head_loss)(state.params["head"], examples)
  all_grads = {"policy": grads, "head": jax.tree.map(lambda x: head_weight * x, head_grads)}
  updates, opt_state = optimizer.update(all_grads, state.opt_state, state.params)
  updates["policy"] = jax.tree.map(lambda x: decay * x, updates["policy"])
  params = optax.apply_updates(state.params, updates)
  learned = {"policy": scalars["rows"] > 0, "head": jnp.sum(examples.weight) > 0}
  params = {k: jax.tree.map(lambda new, old, k=k: jnp.where(learned[k], new, old), params[k], state.params[k]) for k in params}
  state = state.replace(params=params, opt_state=opt_state, step=state.step + 1)
  return state, {"head_loss": loss, "grad_norm": optax.global_norm(grads)}


norm_of = kept.jit(optax.global_norm)  # of all arrays of a tree together, f32[]


def fill_logprobs(u: UpdateConfig, params: dict, reference: dict | None, batches: list[Batch], temperature) -> list[Batch]:
  """The batches with `old_logprobs` under `params` where a batch takes several steps, and `ref_logprobs` under `reference` where
  one is given."""
  out = []
  for batch in batches:
    old = batch.old_logprobs if u.fresh else batch_logprobs(u, params, batch, temperature)
    ref = batch_logprobs(u, reference, batch, temperature) if reference else batch.ref_logprobs
    out.append(batch.replace(old_logprobs=old, ref_logprobs=ref))
  return out


def step(u: UpdateConfig, state: TrainState, batches: list[Batch], examples: Examples, scalars: dict,
         optimizer: Optimizer, decay: float = 1.0) -> tuple[TrainState, dict]:
  """One optimizer step on a whole batch given as micro-batches and the head's examples; metrics are device scalars. decay: see
  `apply`.

  Without any survivor there is nothing to learn from: parameters and optimizer state stay as they are.
  """
  if not scalars["rows"] and not np.any(examples.weight):
    nothing = (*METRICS, "head_loss", "grad_norm")
    return state.replace(step=state.step + 1), {name: jnp.zeros((), jnp.float32) for name in nothing}
  trained, base, scalars = state.params["policy"], state.base, {k: np.float32(scalars[k]) for k in SCALARS}
  grads, metrics = zeros(u.model, trained)
  for batch in batches:
    grads, metrics = accumulate(u, trained, grads, metrics, batch, scalars, base)
  state, more = apply(state.changing, grads, scalars, examples, head_weight=u.loss.head_weight, optimizer=optimizer,
                      decay=np.float32(decay))
  return state.replace(base=base), metrics | more
