"""All states of a rollout's first tokens, for heads that read more of them than their mean (experiments/pooled_heads.py).

Rollouts are generated and graded as in training, nothing pruned; then one forward pass over prompt and prefix reads the residual
stream at the same places as the engine's features do ("mean@2/3" of pruning/features.py is the mean of what stands here): the
positions that sampled response tokens 1 to T. States are kept on the device in the policy's dtype, less their mean and divided
by their deviation, else rounding to bfloat16 would lose dimensions whose mean is large. No label goes into that.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from arrol_jax import assemble
from arrol_jax.learning.generation import generate
from arrol_jax.models import transformer
from arrol_jax.models.attention import causal_attention
from arrol_jax.models.layers import split_qkv
from arrol_jax.pruning import features
from arrol_jax.types import Rollout, UserError
from experiments.head_ablation import drawn

ROWS = 128  # rollouts of a forward pass


class Collected(NamedTuple):
  """Rollouts of P prompts and G each, step by step as a training would have made them, and their states by share of the depth."""
  steps: list[list[Rollout]]  # prompts numbered over all
  states: dict[str, jax.Array]  # [P,G,T,D], 0 from a response's end on


def collect(c, depths: tuple[str, ...], length: int, count: int) -> Collected:
  """Graded rollouts of `count` training problems, and the states of their first `length` tokens at shares of the depth such as
  "2/3". Raises UserError for a share outside (0, 1], or where there are fewer problems."""
  mesh = assemble.make_mesh(c)
  with jax.set_mesh(mesh), assemble.grader(c) as grader:
    loaded = assemble.load(c, mesh, training=True)
    try:
      layers = tuple(i.layer for i in features.parse(tuple(f"mean@{d}" for d in depths), loaded.config.layers))
    except ValueError as e:
      raise UserError(f"--depths: {e}") from e
    steps = rolled_out(c, loaded, mesh, grader, count)
    params = transformer.decoding_params(loaded.config, loaded.params, c.model.dtype)
    rollouts = [r for step in steps for r in step]
    found = states(loaded.config, params, rollouts, layers, length)
  by_prompt = lambda x: x.reshape(count, c.rollout.group_size, *x.shape[1:])
  return Collected(steps, {d: by_prompt(x) for d, x in zip(depths, found, strict=True)})


def rolled_out(c, loaded, mesh, grader, count: int) -> list[list[Rollout]]:
  """Rollouts of `count` prompts, rollout.prompts a step, nothing pruned."""
  prompts = drawn(c, loaded, count)
  engine = assemble.engine(c, loaded, mesh, c.rollout.max_new, loaded.params)
  engine.load(loaded.params, c.model.dtype)
  sampling, grading = assemble.sampling(c, loaded, c.rollout.temperature), assemble.grading(c, loaded, grader)
  steps, size = [], c.rollout.prompts
  with tqdm(total=count * c.rollout.group_size, desc="rollouts", unit="response") as bar:
    for n in range(count // size):
      some = dict(enumerate(prompts[n * size:(n + 1) * size]))
      steps.append(generate(engine, some, c.rollout.group_size, assemble.key(c, assemble.TRAIN, n), sampling, grading,
                            progress=lambda _: bar.update())[0])
      for r in steps[-1]:
        r.prompt += n * size
  return steps


def states(config, params: dict, rollouts: list[Rollout], layers: tuple[int, ...], length: int) -> list[jax.Array]:
  """What `read` says of each rollout, less the mean and by the deviation over the first ROWS rollouts' tokens: [N,length,D] for
  each of `layers`. params: in the decoding layout."""
  width = max(len(r.prompt_tokens) for r in rollouts) + length
  width += -width % 64
  tokens, start, count = np.zeros((len(rollouts), width), np.int32), *np.zeros((2, len(rollouts)), np.int32)
  for i, r in enumerate(rollouts):
    text = np.concatenate([r.prompt_tokens, r.tokens[:length]])
    tokens[i, :len(text)], start[i], count[i] = text, len(r.prompt_tokens) - 1, min(length, len(r.tokens))
  out, scales = [[] for _ in layers], None
  for i in tqdm(range(0, len(rollouts), ROWS), desc="states"):
    rows = np.minimum(np.arange(i, i + ROWS), len(rollouts) - 1)  # one shape
    raw = read(config, params, tokens[rows], start[rows], layers=layers, length=length)
    scales = scales or [moments(x, count[rows]) for x in raw]
    for kept, x, scale in zip(out, raw, scales, strict=True):
      kept.append(standardised(x, count[rows], *scale)[:len(rollouts) - i])
  return [jnp.concatenate(x) for x in out]


@functools.partial(jax.jit, static_argnames=("config", "layers", "length"))
def read(config, params: dict, tokens: jax.Array, start: jax.Array, *, layers: tuple[int, ...], length: int) -> list[jax.Array]:
  """The residual stream after each of `layers` at positions start to start + length - 1: [B,length,D] each.

  tokens i32[B,W], right-padded; start i32[B], of the prompt's last token.
  """
  attention, tapped = causal_attention("auto"), {}

  def attend(_, qkv, rotary):
    q, k, v = split_qkv(qkv)
    return attention(*rotary(q, k), v)[0], None

  tap = lambda layer, x: tapped.update({layer: x}) if layer in layers else None
  transformer.unrolled(config, params, tokens, transformer.default_positions(tokens), attend, tap=tap)
  place = start[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]
  return [jnp.take_along_axis(tapped[layer], place[:, :, None], axis=1) for layer in layers]


def _real(x, count):
  return (jnp.arange(x.shape[1], dtype=jnp.int32)[None, :] < count[:, None])[:, :, None]


@jax.jit
def moments(x: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Mean and standard deviation f32[D] over the first count i32[B] tokens of x [B,T,D]."""
  x, real = x.astype(jnp.float32), jnp.broadcast_to(_real(x, count), x.shape)
  mean = jnp.mean(x, axis=(0, 1), where=real)
  return mean, jnp.std(x - mean[None, None], axis=(0, 1), where=real)


@jax.jit
def standardised(x: jax.Array, count: jax.Array, mean: jax.Array, deviation: jax.Array) -> jax.Array:
  """x [B,T,D] in its dtype, by the mean and deviation f32[D]; 0 from count i32[B] on, and where nothing varies."""
  scale = jnp.where(deviation > 0, 1 / jnp.where(deviation > 0, deviation, 1.0), 0.0)
  y = (x.astype(jnp.float32) - mean[None, None]) * scale[None, None]
  return jnp.where(_real(x, count), y, 0.0).astype(x.dtype)
