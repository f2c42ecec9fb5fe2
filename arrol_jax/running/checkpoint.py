"""Saving and restoring all that a run needs to go on exactly, through orbax.

A checkpoint is the TrainState (what is trained of the policy, head, optimizer state, calibration tables, step) and what it
belongs to: config hash and root key, and of adapters the hash of their frozen base, which is not saved. Data order and random
keys are functions of (seed, step), so nothing else is needed. Saving is asynchronous and atomic (orbax); the newest `keep` stay,
and the one with the best score. Each array's checksum is taken on the devices when it is saved and again when it is restored,
whatever the mesh: a damaged checkpoint is set aside and the one before it is taken.
With several processes the folder is one that all of them see.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
import functools
import gc
import hashlib
import itertools
import json
import logging
import os
import re
import sys
import threading
import traceback
from typing import NamedTuple
import zlib

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from arrol_jax.running import hosts, kept
from arrol_jax.types import TrainState, UserError


class Scores(NamedTuple):
  """What the scores of a run's checkpoints are of, and by step those that evaluations in its folder give: these go before what a
  checkpoint says of itself, for one may be evaluated after it was saved, or again in another way."""
  of: str
  measured: dict[int, float]


class Damaged(UserError):
  """A checkpoint that was asked for cannot be read; where the folder may be written, it has been moved out of the way."""


class Checkpoints:
  """The `checkpoints/` folder of a workdir. With several processes all of them call the same methods."""

  def __init__(self, workdir: str, keep: int, belongs: dict | None = None, read_only: bool = False, also: tuple = (),
               best: Scores | None = None):
    """belongs: {"config_hash": str, "root_key": [int]} of the run, saved and compared on restoring; None: any will do.
    also: further config hashes of this run's (workdir.claim). best: None where checkpoints are rated by what `save` is told;
    scores of something else do not count."""
    self.workdir, self.belongs, self.read_only, self.also, self.scored_by = workdir, belongs, read_only, also, best and best.of
    self.folder = os.path.abspath(os.path.join(workdir, "checkpoints"))
    self.kept = _NewestAndBest(keep)
    everyone = ocp.options.MultiprocessingOptions(active_processes=set(range(jax.process_count())))
    self.failed = False  # a save did not end well: nothing is waited for any more
    _quieten()
    hosts.together(self._make_folder)
    options = ocp.CheckpointManagerOptions(
      create=False, read_only=read_only, cleanup_tmp_directories=not read_only, preservation_policy=self.kept,
      multiprocessing_options=everyone)
    self.manager = ocp.CheckpointManager(self.folder, options=options, item_handlers=ocp.StandardCheckpointHandler())
    # Reads without waiting for other processes: one that cannot read its part must not leave them waiting.
    alone = ocp.options.MultiprocessingOptions(primary_host=jax.process_index(), active_processes={jax.process_index()})
    self.reader = ocp.Checkpointer(ocp.StandardCheckpointHandler(multiprocessing_options=alone), multiprocessing_options=alone)
    for step in self.steps():
      notes = _attempt(lambda step=step: self._notes(step))[0] or {}
      counts = notes.get("scored_by") == self.scored_by
      self.kept.scores[step] = notes.get("score") if counts else None
      if best and not (counts or read_only or step in best.measured) and notes.get("score") is not None:
        hosts.say(f"{workdir}: checkpoint {step} was scored in another way, so it does not count as the best")
    self.kept.scores |= best.measured if best else {}

  def _make_folder(self) -> None:
    if not self.read_only and hosts.first():
      with self._failures_said():
        os.makedirs(self.folder, exist_ok=True)

  def steps(self) -> list[int]:
    """Whole checkpoints, oldest first: how many steps each has behind it."""
    return sorted(self.manager.all_steps())

  def latest(self) -> int | None:
    """The newest of `steps`; None without one."""
    return self.manager.latest_step()

  def best(self) -> int | None:
    """The one with the best score; None where none has one."""
    return self.kept.best(self.steps())

  def save(self, step: int, state: TrainState, score: float | None = None) -> None:
    """Starts saving `state` after `step` steps; a step already saved is left as it is.

    score: what "best" goes by. Raises UserError if this save or the one before it failed.
    """
    if step in self.steps():
      return
    leaves = plain(state)
    notes = (self.belongs or {}) | {"score": score, "scored_by": self.scored_by,
                                    "checksums": jax.device_get(checksums(leaves)).tolist()}
    notes["crc"] = _crc(notes)
    self.kept.scores[step] = score
    with self._failures_said():
      _aside(lambda: self.manager.save(step, args=ocp.args.StandardSave(leaves), custom_metadata=notes, force=True))

  def rate(self, step: int, score: float) -> None:
    """The score of a checkpoint that was saved before its evaluation was made, or made again."""
    self.kept.scores[step] = score

  def restore(self, state: TrainState, step: int | None = None) -> tuple[int, TrainState]:
    """The newest checkpoint that is whole (or that of `step`) and its step, with the shapes and shardings of `state`.

    Damaged ones are moved to damaged/, and named where an older one takes their place. (0, state) without any checkpoint. Raises
    Damaged: that of `step` is, or all are; UserError: one is of another config, seed or model.
    """
    damaged = []
    for candidate in reversed(self.steps()) if step is None else [step]:
      read, problem = _attempt(lambda candidate=candidate: self._read(candidate, state))
      problem = next(filter(None, hosts.gather(problem)), None)
      if not problem:
        return candidate, read
      damaged.append(candidate)
      if not self.read_only:
        self._set_aside(candidate)
      text = f"{self.workdir}: checkpoint {candidate} is damaged ({problem})"
      if step is not None:
        raise Damaged(text)
      hosts.say(f"{text}; falling back to the one before")
    if damaged:
      policy = os.path.join(self.workdir, "policy")
      more = f", or use what was exported: --config.model.path={policy}" if os.path.isdir(policy) else ""
      raise Damaged(f"{self.workdir}: no checkpoint can be read (tried {damaged}); choose another --workdir to start again"
                    f"{more}")
    return 0, state

  def _read(self, step: int, state: TrainState) -> TrainState:
    notes, leaves = self._notes(step), plain(state)
    wrong = [k for k, v in (self.belongs or {}).items() if notes.get(k) != v and notes.get(k) not in self.also]
    if wrong:
      raise UserError(f"{self.workdir}: checkpoint {step} is of a run with another {' and '.join(wrong)}" +
                      " (the frozen weights of model.path)" * ("base" in wrong))
    if [tuple(x.shape) for x in jax.tree.leaves(self.manager.metadata(step).item_metadata)] != [x.shape for x in leaves]:
      raise UserError(f"{self.workdir}: its checkpoint does not fit this config's model; give the config of that run")
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), leaves)
    saved = self.reader.restore(f"{self.folder}/{step}/default", args=ocp.args.StandardRestore(like))
    if jax.device_get(checksums(saved)).tolist() != notes["checksums"]:
      raise ValueError("its checksum does not match")
    return jax.tree.unflatten(jax.tree.structure(state.changing), saved).replace(base=state.base)

  def _set_aside(self, step: int) -> None:
    """Moves a damaged checkpoint out of the way of the one that will be made again, for whoever wants to look at it."""
    if hosts.first():
      os.makedirs(f"{self.workdir}/damaged", exist_ok=True)
      target = next(p for i in itertools.count() if not os.path.exists(p := f"{self.workdir}/damaged/{step}.{i}"))
      os.rename(f"{self.folder}/{step}", target)
    hosts.gather(None)  # the others look at the folder after it has happened
    self.manager.reload()

  def _notes(self, step: int) -> dict:
    """What `save` wrote beside the arrays. Raises if it is not all there."""
    notes = dict(self.manager.metadata(step).custom_metadata)
    if notes.pop("crc") != _crc(notes):
      raise ValueError("its metadata do not match their checksum")
    return notes

  def check(self) -> None:
    """Raises UserError if the last save has failed; waits for nothing."""
    if not self.manager.is_saving_in_progress():
      self.wait()

  def wait(self) -> None:
    """Until the last save is on disk. Raises UserError if it failed."""
    with self._failures_said():
      self.manager.wait_until_finished()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, kind, *_) -> None:
    alone = not hosts.several()  # else others may be gone: a save would wait for them
    if kind in (None, hosts.Preempted) or (alone and kind is not KeyboardInterrupt):
      self.close()

  def close(self) -> None:
    if not self.failed:
      self.wait()
      self.manager.close()
      self.reader.close()

  @contextmanager
  def _failures_said(self) -> Iterator[None]:
    try:
      yield
    except jax.errors.JaxRuntimeError:  # no matter of disks: another process is gone
      raise
    except Exception as e:  # whatever file systems and orbax raise
      self.failed = True
      raise UserError(f"{self.folder}: a checkpoint could not be written ({_line(e)}); make room or repair it, and the same "
                      "command goes on from the last whole one") from e


class _NewestAndBest:
  """Which checkpoints stay (orbax's preservation policy): the newest `keep`, and the one with the highest score."""

  def __init__(self, keep: int):
    self.keep, self.scores = keep, {}

  def best(self, steps: list[int]) -> int | None:
    return max((s for s in steps if self.scores.get(s) is not None), key=lambda s: (self.scores[s], s), default=None)

  def should_preserve(self, checkpoints, *, context) -> list[bool]:
    steps = [c.step for c in checkpoints]
    stay = {*sorted(steps)[-self.keep:], self.best(steps)}
    return [s in stay for s in steps]


def _aside(work: Callable) -> None:
  """work(), in a daemon thread: so are the threads that it starts. Those of a save that failed wait twenty minutes for each
  other, and the process must not wait for them."""
  failures = []

  def run():
    try:
      work()
    except BaseException as e:
      failures.append(e)

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  thread.join()
  if failures:
    raise failures[0]


def plain(state: TrainState) -> list:
  """Leaves in tree order, without frozen weights: what is on disk does not depend on optax's class names."""
  return jax.tree.leaves(state.changing)


def digest(params: dict) -> str:
  """A hash of arrays' bits, the same whatever the mesh."""
  return hashlib.sha256(json.dumps(jax.device_get(checksums(jax.tree.leaves(params))).tolist()).encode()).hexdigest()[:16]


@kept.jit
def checksums(leaves: list) -> jax.Array:
  """u32[N], one an array: the sum modulo 2^32 of its elements' bits, each times an odd number that its place gives.

  The sum does not depend on its order, so neither on how the array is sharded; one flipped bit always changes it.
  """
  def one(x):
    bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}")).astype(jnp.uint32)
    place = sum((jax.lax.broadcasted_iota(jnp.uint32, x.shape, d) * jnp.uint32(2654435761 + 2 * d) for d in range(x.ndim)),
                jnp.zeros(x.shape, jnp.uint32))
    return jnp.sum(bits * (2 * place + 1), dtype=jnp.uint32)

  return jnp.stack([one(x) for x in leaves])


def _crc(notes: dict) -> int:
  return zlib.crc32(json.dumps(notes, sort_keys=True).encode())


def _attempt(read):
  """(read(), None), or (None, the problem in one line); a UserError is raised on."""
  try:
    with _hushed():
      return read(), None
  except UserError:
    raise
  except Exception as e:  # damage shows in many ways: no metadata, no such chunk, a stream that does not decompress
    return None, _line(e)


@functools.cache  # once a process
def _quieten() -> None:
  """A save that fails raises in the caller: what orbax's threads and what they leave behind print about it, pages, is dropped.
  So is that a folder which was opened for reading is read only."""
  def of_no_use(record: logging.LogRecord) -> bool:
    if not record.exc_info:
      return record.levelno <= logging.WARNING and ("read_only=True" in str(record.msg) or "is read only=" in str(record.msg))
    files = [frame.filename for frame in traceback.extract_tb(record.exc_info[2])]
    said = str(record.exc_info[1]).lower()
    return any("orbax" in x for x in [record.pathname, *files]) or "tensorstore" in said or "ocdbt" in said  # the files' format

  def unraisable(what) -> None:
    if what.object is not None or str(what.exc_value) != "Event loop is closed":
      before(what)

  before, sys.unraisablehook = sys.unraisablehook, unraisable
  for name in ("absl", "asyncio"):
    logging.getLogger(name).addFilter(lambda record: not of_no_use(record))


@contextmanager
def _hushed() -> Iterator[None]:
  """When one array cannot be read, orbax drops the reads of all others, each of which leaves a page of traceback: not here."""
  hooks = sys.excepthook, sys.unraisablehook
  sys.excepthook = sys.unraisablehook = lambda *_: None
  try:
    yield
  finally:
    gc.collect()
    sys.excepthook, sys.unraisablehook = hooks


def _line(e: Exception) -> str:
  """What went wrong, short: for a missing key the type says more than the text."""
  if isinstance(e, OSError) and e.strerror:
    return e.strerror
  text = " ".join(str(e).split())
  cause = re.search(r"os_error_code='?(\d+)", text)  # of TensorStore, after a page of paths
  if cause:
    return os.strerror(int(cause[1]))
  text = text.partition(" See full TensorStore")[0]
  if "while reading array index" in text:  # and then slices of it
    return "one of its arrays cannot be read"
  return f"{type(e).__name__}: {text}"[:160]
