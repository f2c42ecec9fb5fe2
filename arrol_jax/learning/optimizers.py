"""The optimizer of policy and head, and the policy's learning rate by steps taken."""

from collections.abc import Callable
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from arrol_jax.types import TrainState

SCHEDULES = ("constant", "linear", "cosine")


def decay(name: str, gone: np.ndarray | jax.Array, xp=np) -> np.ndarray | jax.Array:
  """What is left of the learning rate when `gone` of the way is behind, 0 to 1: all of it ("constant"), or ever less, down to 0
  at the end, linearly or by half a cosine. xp: numpy, or jax.numpy."""
  left = 1.0 - xp.clip(gone, 0.0, 1.0)
  return {"constant": 1.0, "linear": left, "cosine": 0.5 - 0.5 * xp.cos(xp.pi * left)}[name]


@dataclasses.dataclass(frozen=True)
class RateSchedule:
  """Policy learning rate by optimizer steps taken, of which a training step has `per_step`: linear over `warmup` training steps,
  then as `decay` has it over the rest of `steps`."""
  name: str
  lr: float
  warmup: int
  steps: int
  per_step: int = 1

  def __call__(self, count: int | jax.Array) -> np.ndarray | jax.Array:
    xp, step = np if isinstance(count, int) else jnp, count // self.per_step
    up = xp.minimum(1.0, (step + 1) / max(self.warmup, 1))
    return self.lr * up * decay(self.name, (step - self.warmup) / max(self.steps - self.warmup, 1), xp)


def applied_rate(schedule: Callable, state: TrainState) -> float:
  """The rate of the optimizer's next step, by the steps that it has taken."""
  counts = optax.tree_utils.tree_get_all_with_path(state.opt_state, "count")
  steps = [x for path, x in counts if "policy" in jax.tree_util.keystr(path)] or [x for _, x in counts]
  return float(schedule(int(steps[-1]))) if steps else float("nan")


@dataclasses.dataclass(frozen=True)
class Optimizer:
  """AdamW with a schedule and clipping for the policy, Adam with a learning rate of its own for the head; `init` and `update` are
  optax's. Two of the same numbers are one for jit, in other processes too: optax's own are closures, others each time they are
  made."""
  schedule: Callable
  head_lr: float
  clip_norm: float
  weight_decay: float
  b1: float
  b2: float

  @functools.cached_property
  def made(self) -> optax.GradientTransformation:
    adamw = optax.adamw(self.schedule, b1=self.b1, b2=self.b2, weight_decay=self.weight_decay)
    return optax.multi_transform({"policy": optax.chain(optax.clip_by_global_norm(self.clip_norm), adamw),
                                  "head": optax.adam(self.head_lr) if self.head_lr else optax.set_to_zero()},
                                 {"policy": "policy", "head": "head"})

  def init(self, params: dict) -> optax.OptState:
    return self.made.init(params)

  def update(self, grads: dict, state: optax.OptState, params: dict) -> tuple[dict, optax.OptState]:
    return self.made.update(grads, state, params)
