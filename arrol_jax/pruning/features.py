"""What a linear head may read of a rollout, by name (METHOD 10.4), and what the engine has to keep for it.

  "last", "mean"            the state after the final norm: at the last token, or its mean over the response so far
  "last@0.75", "mean@2/3"   the same of the residual stream at that share of the depth
  "prompt@2/3"              the state of the prompt's last token there, before any response
  "logprobs"                mean and lowest log-prob of the response's tokens
  "windows"                 log-probs of about the last 32 tokens, of the worst such window, and the share of unlikely tokens
  "siblings"                agreement of its tokens with those of its group (siblings.py)

`plan` turns names into what the decode programs keep beside the cache; `vector` reads it. Nothing is computed a second time.
"""

from fractions import Fraction
from typing import NamedTuple

import jax
import jax.numpy as jnp

from arrol_jax.engine.programs import Slots
from arrol_jax.engine.sampling import Taps
from arrol_jax.pruning.siblings import agreement

PLAIN = {"last": None, "mean": None, "logprobs": 2, "windows": 3, "siblings": 1}  # widths; None: the model's
LAYERED = ("last", "mean", "prompt")


class Input(NamedTuple):
  """One input: its name without the layer, and the layers below it (None: after the final norm)."""
  name: str
  layer: int | None = None


def parse(inputs: tuple[str, ...], layers: int) -> list[Input]:
  """Inputs of a model with so many layers. Raises ValueError for an unknown name or a share outside (0, 1]."""
  out = []
  for text in inputs:
    name, at, share = text.partition("@")
    try:
      depth = Fraction(share) if at else None
    except (ValueError, ZeroDivisionError):
      depth = Fraction(0)
    if name not in (LAYERED if at else PLAIN) or (at and not 0 < depth <= 1):
      raise ValueError(f"{text!r} is no input of a head; there are {', '.join(PLAIN)} and, with a share of the depth such as "
                       f"@2/3, {', '.join(LAYERED)}")
    out.append(Input(name, max(1, round(depth * layers)) if at else None))
  return out


def plan(inputs: tuple[str, ...], layers: int) -> Taps:
  """What the engine keeps for these inputs. Raises ValueError as `parse`, and where prompts are read at several layers."""
  parsed = parse(inputs, layers)
  states = tuple((i.name, i.layer) for i in parsed if i.name in ("last", "mean") and i.layer)
  prompt = {i.layer for i in parsed if i.name == "prompt"}
  if len(prompt) > 1:
    raise ValueError(f"{', '.join(x for x in inputs if x.startswith('prompt@'))}: a prompt's state is kept of one layer")
  return Taps(states, prompt.pop() if prompt else None, any(i.name == "siblings" for i in parsed))


def width(inputs: tuple[str, ...], model: int) -> int:
  """Numbers in `vector` for a model of that width."""
  return sum(PLAIN.get(name) or model for name in inputs)


def vector(slots: Slots, inputs: tuple[str, ...], layers: int) -> jax.Array:
  """What each slot looks like as it stands, f32[B,F], inputs in their order."""
  count = jnp.maximum(slots.generated, 1).astype(jnp.float32)[:, None]
  taps, parts = iter(slots.taps), []
  for name, layer in parse(inputs, layers):
    if name in ("last", "mean"):
      state = next(taps) if layer else (slots.hidden if name == "last" else slots.hidden_sum)
      parts.append(state.astype(jnp.float32) / (count if name == "mean" else 1.0))
    elif name == "prompt":
      parts.append(slots.prompt.astype(jnp.float32))
    elif name == "logprobs":
      parts.append(jnp.concatenate([slots.logprob_sum[:, None] / count, slots.logprob_min[:, None]], axis=1))
    elif name == "windows":
      parts.append(jnp.concatenate([slots.recent[:, :2], slots.recent[:, 2:] / count], axis=1))
    else:
      there = (slots.generated > 0) & ~slots.pruned
      parts.append(agreement(slots.counts, slots.group, there)[:, None])
  return jnp.concatenate(parts, axis=1)
