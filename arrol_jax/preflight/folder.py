"""The run's folder: what it holds, and whether this config, these problems and weights go on with it."""

import json
import os

from ml_collections import ConfigDict

from arrol_jax import assemble_state
from arrol_jax.preflight.page import Page
from arrol_jax.running import workdir as runs

_SHOWN = 8  # keys of a kind


def settings(page: Page, c: ConfigDict, defaults: ConfigDict, workdir: str) -> bool:
  """Whether a run is there, and may go on under these settings (UserError where it may not)."""
  runs.check_writable(workdir)
  if os.path.exists(f"{workdir}/.lock"):
    runs.hold(workdir).close()
  stored = runs.stored_config(workdir, defaults)
  if stored is None:
    page.say(f"{workdir}: no run is there yet")
    return False
  start = runs.newest_checkpoint(workdir)
  page.say(f"{workdir}: a run, saved after step {start}" if start else f"{workdir}: a run without a checkpoint")
  done = runs.finished(workdir, c.steps, c.stop_seconds)
  if done:
    page.say(f"it is finished ({done} steps): there is nothing left to do")
  before, now = stored, json.loads(runs.to_json(c))
  named = runs.flat(runs.renamed(runs.read_json(f"{workdir}/config.json")))
  new = [f"{name}={value}" for name, value in runs.flat(now).items() if name not in named]
  different = [f"{name} {_at(before, name)} -> {_at(now, name)}" for name in runs.differing(before, now)]
  _list(page, "keys that differ", different)
  _list(page, "keys that are new in this version", new)
  runs.check_settings(workdir, c, defaults)
  if not done:
    runs.check_can_go_on(workdir)
    assemble_state.scored_by(workdir)  # reads evaluations
    runs.check_length(workdir, start, c.steps)
  return True


def fingerprints(page: Page, workdir: str, inputs: dict) -> None:
  """Hashes of problems, tokens and weights beside those that the run began with."""
  before = runs.stored_inputs(workdir) or {}
  page.say(", ".join(f"{name} {value}" + ("" if before.get(name, value) == value else f" (was {before[name]})")
                     for name, value in inputs.items()))
  runs.check_inputs(workdir, inputs)
  for what in runs.evaluated_by_other(before, inputs):
    page.say(f"{what} changed: evaluations are made again, the earlier results go")


def _list(page: Page, what: str, items: list[str]) -> None:
  if items:
    more = f", and {len(items) - _SHOWN} more" if len(items) > _SHOWN else ""
    page.say(f"{what}: {', '.join(items[:_SHOWN])}{more}")


def _at(config: dict, name: str):
  for key in name.split("."):
    config = config.get(key) if isinstance(config, dict) else None
  return config
