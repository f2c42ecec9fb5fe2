"""ARRoL: online rollout pruning for reinforcement learning with verifiable rewards, in JAX (arXiv 2603.24840)."""

import importlib
import os
import signal
import sys

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


def _interrupted(*_signal) -> None:
  """Ctrl-C while a command's modules are imported, which takes seconds: libraries make other errors of a KeyboardInterrupt there,
  or lose it."""
  os.write(2, b"interrupted before it started\n")
  os._exit(130)


def _is_command() -> bool:
  """Whether this process is python -m arrol_jax.NAME, or a script that was installed."""
  script = "".join(sys.argv[:1])  # -m until the module has been found
  module = script == "-m" and any(word.startswith("arrol_jax.") for word in sys.orig_argv)
  return module or os.path.basename(script).startswith("arrol-") and sys.orig_argv[1:2] == [script]


if _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # it may be ignored
  signal.signal(signal.SIGINT, _interrupted)  # until config.run
