"""A pruning rule of the user's own, `prune.rule=MODULE.FUNCTION`: any function of posteriors that jit can trace."""

from collections.abc import Callable
import functools
import importlib

import jax
import jax.numpy as jnp

from arrol_jax.types import UserError


@functools.cache
def own_rule(name: str) -> Callable:
  """The function MODULE.FUNCTION: f(q, group, decided, *, kappa, p_min, p_max) -> keep probabilities f32[B], of posteriors q
  f32[B], groups i32[B], whose rows may lie anywhere, and which rows decide now, bool[B]; B is any number; kappa, p_min, p_max as
  in rule.survival. What it says of other rows does not count, what lies outside of [p_min, p_max] is brought there, and what is
  no number counts as kappa.

  Raises UserError where it cannot be imported, or does not give finite numbers of that shape under jit; so does what is
  returned, where the function fails on its rows or gives another shape.
  """
  module, _, attribute = name.rpartition(".")
  if not module.strip("."):
    raise UserError(f"prune.rule: {name!r} is no MODULE.FUNCTION")
  try:
    function = getattr(importlib.import_module(module), attribute)
  except (Exception, SystemExit) as e:  # a module is a program
    raise UserError(f"prune.rule: {name} cannot be imported: {type(e).__name__}: {' '.join(str(e).split())[:200]}") from e

  def asked(q, group, decided, **limits):
    """f32[B] of `function`; what it raises, and what has another shape, is the user's mistake."""
    try:
      p = jnp.asarray(function(q, group, decided, **limits), jnp.float32)
    except (Exception, SystemExit) as e:  # of any kind
      why = " ".join(str(e).split())[:200]
      raise UserError(f"prune.rule: {name}(q, group, decided, *, kappa, p_min, p_max) failed under jit on {q.size} rows: "
                      f"{why}") from e
    if p.shape != q.shape:
      raise UserError(f"prune.rule: {name} must give a number for each of f32[{q.size}] posteriors, and gave f32{list(p.shape)}")
    return p

  q, limits = jnp.linspace(0.0, 1.0, 8), {"kappa": 0.5, "p_min": 0.1, "p_max": 0.9}
  probe = jax.jit(functools.partial(asked, **limits))(q, jnp.arange(8) // 4, q < 0.8)
  if not jnp.all(jnp.isfinite(probe)):
    raise UserError(f"prune.rule: {name} must give a finite number for each of f32[8] posteriors, and gave {probe}")

  def rule(q, group, decided, *, kappa, p_min, p_max):
    p = asked(q, group, decided, kappa=kappa, p_min=p_min, p_max=p_max)
    return jnp.where(jnp.isnan(p), kappa, jnp.clip(p, p_min, p_max))

  return rule
