"""From a config to a service that decodes calls as they come, and what it grants: for the commands that serve and chat."""

from collections.abc import Callable
import dataclasses
import os
from pathlib import Path

import jax
from ml_collections import ConfigDict

from arrol_jax import assemble, assemble_state
from arrol_jax.models import sharding
from arrol_jax.rewards.extract import check_pattern
from arrol_jax.running import endings
from arrol_jax.serving import prefixes, prompts
from arrol_jax.serving.openai_api import Limits
from arrol_jax.serving.prefixes import PrefixCache
from arrol_jax.serving.service import Service
from arrol_jax.types import UserError

PREFILL_ROWS = 4, 16  # prompts prefilled at once at most; on a GPU, where few of them take no less time
CPU_SLOTS = 16    # where none are asked for: what a CPU decodes at once without each row being slow


def load(c: ConfigDict, workdir: str | None, queue_size: int, steady: bool = False, name: str = "",
         kept_mib: int = 0, resize: Callable[[int], None] | None = None) -> tuple[Service, Limits]:
  """The engine's side of a server, of the config's model or of the newest checkpoint in `workdir`; prefixes get kept_mib MiB.
  resize(positions) may set the config's lengths to what the model has positions for."""
  try:
    check_pattern(c.reward.pattern)  # where votes find the answer
  except ValueError as e:
    raise UserError(f"reward.pattern: {e}") from e
  mesh = assemble.make_mesh(c)
  fit(c, steady)
  with jax.set_mesh(mesh):
    loaded = assemble.load(c, mesh)
    resize and resize(loaded.config.max_length)
    if workdir:
      assemble_state.from_checkpoint(c, loaded, mesh, workdir)
    assemble.follow_head(c, loaded)
    assemble.check_tables(c, loaded)
    assemble.warn(c, loaded, [])
    kept = _prefix_cache(c, loaded, kept_mib)  # before the slots take what memory is left
    engine = dataclasses.replace(assemble.eval_engine(c, loaded, mesh, loaded.params),
                                 prefill_rows=PREFILL_ROWS[sharding.platform() == "gpu"])
    loaded.params = None
  how = dataclasses.replace(assemble.sampling(c, loaded), top_p=None, confidence=assemble.TOP_K,
                            pool=assemble.pools(c, loaded.head))
  voters = assemble.voters(c, loaded.head, loaded.calibration)
  service = Service(engine, how, loaded.tokenizer, queue_size, voters, steady, kept)
  limits = Limits(name or model_name(workdir or c.model.path), engine.max_prompt, engine.max_new, service.most,
                  loaded.config.vocab, loaded.tokenizer, c.reward.pattern, c.eval.window, loaded.head is not None,
                  loaded.calibration is not None, c.data.thinking, prompts.longest_token(loaded.tokenizer))
  return service, limits


def _prefix_cache(c: ConfigDict, loaded, mib: int) -> PrefixCache | None:
  if not mib:
    return None
  if c.rollout.max_prompt <= prefixes.BLOCK:
    raise UserError(f"--prefix_cache={mib} keeps blocks of {prefixes.BLOCK} tokens with something behind them, and "
                    f"rollout.max_prompt is {c.rollout.max_prompt}: leave it out, or allow longer prompts")
  try:
    return PrefixCache(loaded.config, assemble.sampling(c, loaded).cache_dtype, mib)
  except ValueError as e:
    raise UserError(f"--prefix_cache: {e}") from e
  except jax.errors.JaxRuntimeError as e:
    if not endings.device_is_full(e):
      raise
    raise UserError(f"--prefix_cache={mib}: a device has no room for so many MiB beside the model; give it fewer") from e


def fit(c: ConfigDict, steady: bool) -> None:
  """What a config for training leaves open."""
  if c.rollout.slots is None and jax.default_backend() == "cpu":
    c.rollout.slots = CPU_SLOTS
  if steady:  # one program for every company
    c.rollout.row_buckets = c.rollout.length_buckets = 1


def model_name(path: str) -> str:
  """A model's folder, or the run's of an exported policy; of a file its own name, unless that says nothing. What is not text in
  it is replaced."""
  name = Path(path).resolve()
  if name.is_file():
    name = name.parent if name.stem == "model" else name.with_suffix("")
  name = name.parent.name if name.name == "policy" else name.name
  return os.fsencode(name).decode(errors="replace")
