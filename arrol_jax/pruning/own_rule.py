"""A pruning rule of the user's own, `prune.rule=MODULE.FUNCTION`: any function of posteriors that jit can trace."""

from collections.abc import Callable
import functools
import importlib

import jax
import jax.numpy as jnp


@functools.cache
def own_rule(name: str) -> Callable:
  """The function MODULE.FUNCTION: f(q, group, decided, *, kappa, p_min, p_max) -> keep probabilities f32[B], of posteriors q
  f32[B], groups i32[B], whose rows may lie anywhere, and which rows decide now, bool[B]; B is any number; kappa, p_min, p_max as
  in rule.survival. What it says of other rows does not count, what lies outside of [p_min, p_max] is brought there, and what is
  no number counts as kappa.

  Raises ValueError where it cannot be imported, or does not give finite numbers of that shape under jit.
  """
  module, _, attribute = name.rpartition(".")
  if not module.strip("."):
    raise ValueError(f"{name!r} is no MODULE.FUNCTION")
  try:
    function = getattr(importlib.import_module(module), attribute)
  except (Exception, SystemExit) as e:  # a module is a program
    raise ValueError(f"{name} cannot be imported: {type(e).__name__}: {' '.join(str(e).split())[:200]}") from e
  q, group, limits = jnp.linspace(0.0, 1.0, 8), jnp.arange(8) // 4, {"kappa": 0.5, "p_min": 0.1, "p_max": 0.9}
  try:
    out = jax.jit(lambda q, group, decided: function(q, group, decided, **limits))(q, group, q < 0.8)
    good = out.shape == q.shape and bool(jnp.all(jnp.isfinite(out)))
  except Exception as e:  # of any kind: it is the user's
    why = " ".join(str(e).split())[:200]
    raise ValueError(f"{name}(q, group, decided, *, kappa, p_min, p_max) failed under jit: {why}") from e
  if not good:
    raise ValueError(f"{name} must give a finite number for each of f32[8] posteriors, and gave {out}")

  def rule(q, group, decided, *, kappa, p_min, p_max):
    p = jnp.asarray(function(q, group, decided, kappa=kappa, p_min=p_min, p_max=p_max), jnp.float32)
    return jnp.where(jnp.isnan(p), kappa, jnp.clip(p, p_min, p_max))

  return rule
