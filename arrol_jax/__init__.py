"""ARRoL: online rollout pruning for reinforcement learning with verifiable rewards, in JAX (arXiv 2603.24840)."""

import importlib

_EXPORTS = {"load_policy": "models.files.weights", "Policy": "models.files.weights", "grade": "rewards"}
_MODULES = ("prune", "voting")
__all__ = ["Policy", "grade", "load_policy", "prune", "voting"]


def __getattr__(name: str):
  """Exports are imported on first use: a grader's worker process must not pay for JAX."""
  if name in _MODULES:
    return importlib.import_module(f"arrol_jax.{name}")
  if name not in _EXPORTS:
    raise AttributeError(f"module 'arrol_jax' has no attribute {name!r}")
  return getattr(importlib.import_module(f"arrol_jax.{_EXPORTS[name]}"), name)
