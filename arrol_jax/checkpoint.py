"""Saving and restoring all that a run needs to go on exactly, through orbax.

A checkpoint is the TrainState (parameters, head, optimizer state, calibration table, step). Data order and random keys are
functions of (seed, step), so nothing else is needed. Saving is asynchronous and atomic (orbax); the newest
`keep` stay. Left out: falling back past a damaged checkpoint, preemption signals.
"""

import os

import jax
import orbax.checkpoint as ocp

from arrol_jax.types import TrainState


class Checkpoints:
  """The `checkpoints/` folder of a workdir."""

  def __init__(self, workdir: str, keep: int, read_only: bool = False):
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=not read_only, read_only=read_only)
    self.manager = ocp.CheckpointManager(os.path.abspath(os.path.join(workdir, "checkpoints")), options=options,
                                         item_handlers=ocp.StandardCheckpointHandler())

  def latest(self) -> int | None:
    """Number of steps that the newest checkpoint has behind it; None without one."""
    return self.manager.latest_step()

  def save(self, step: int, state: TrainState) -> None:
    """Starts saving `state` after `step` steps; a step already saved is left as it is."""
    if step != self.manager.latest_step():
      self.manager.save(step, args=ocp.args.StandardSave(_plain(state)))

  def restore(self, step: int, state: TrainState) -> TrainState:
    """The saved state, with the shapes and shardings of `state`; ValueError if it was saved with other shapes."""
    saved = [tuple(x.shape) for x in jax.tree.leaves(self.manager.item_metadata(step))]
    if saved != [x.shape for x in _plain(state)]:  # said here: orbax reports it from a background task
      raise ValueError(f"checkpoint {step} holds arrays of other shapes")
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), _plain(state))
    saved = self.manager.restore(step, args=ocp.args.StandardRestore(like))
    return jax.tree.unflatten(jax.tree.structure(state), jax.tree.leaves(saved))

  def close(self) -> None:
    """Waits until the last save is on disk."""
    self.manager.wait_until_finished()
    self.manager.close()


def _plain(state: TrainState) -> list:
  """Leaves in tree order: what is on disk does not depend on optax's class names."""
  return jax.tree.leaves(state)
