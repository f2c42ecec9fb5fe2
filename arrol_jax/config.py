"""Reads, overrides, checks and fingerprints a run's configuration; turns a user's mistake into one line.

configs/base.py says what every key means. Only entry points import this module.
"""

import hashlib
import json
import os
import sys
from typing import Callable

from absl import flags
from ml_collections import ConfigDict, config_flags

from arrol_jax.losses import ALGORITHMS
from arrol_jax.types import UserError


def parse(argv: list[str], defaults: dict | None = None) -> tuple[ConfigDict, flags.FlagValues]:
  """The locked config that `--config=FILE --config.KEY=VALUE` asks for, and the other flags (`defaults`: name -> default)."""
  values = flags.FlagValues()
  config_flags.DEFINE_config_file("config", None, "configs/NAME.py", flag_values=values)
  flags.DEFINE_string("workdir", None, "folder of the run; runs/NAME if not given", flag_values=values)
  for name, default in (defaults or {}).items():
    flags.DEFINE_string(name, default, "see README.md", flag_values=values)
  given = [a for a in argv if a.startswith("--config=")]
  if not given:
    raise UserError("no --config=configs/NAME.py given; configs/ lists the runs")
  path = given[-1].partition("=")[2]
  if not os.path.exists(path.partition(":")[0]):
    raise UserError(f"{path}: no such config file")
  try:
    rest = values(argv)
    config = values.config
  except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as e:
    raise UserError(" ".join(str(e).split())) from e
  if rest[1:]:
    raise UserError(f"unexpected argument {rest[1]!r}; every option is --NAME=VALUE")
  if values.workdir is None:
    values.workdir = os.path.join("runs", os.path.splitext(os.path.basename(path))[0])
  return config, values


def run(main: Callable[[], None]) -> None:
  """Runs an entry point; a user's mistake ends in one line on stderr and exit status 2, without a traceback."""
  try:
    main()
  except UserError as e:
    print(f"error: {e}", file=sys.stderr)
    sys.exit(2)
  except KeyboardInterrupt:
    print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
    sys.exit(130)


def check(c: ConfigDict) -> None:
  """Raises UserError for values that cannot work together, before anything is loaded."""
  def need(ok: bool, text: str):
    if not ok:
      raise UserError(text)

  need(c.steps > 0, f"steps is {c.steps}; it must be at least 1")
  need(c.model.path != "", "model.path is empty; give a Hugging Face folder or a .gguf file")
  need(os.path.exists(c.model.path), f"model.path: {c.model.path} does not exist")
  for path in filter(None, f"{c.data.train},{c.data.eval}".split(",")):
    need(os.path.exists(path), f"data: {path} does not exist")
  need(c.rollout.group_size >= 2, f"rollout.group_size is {c.rollout.group_size}; advantages are taken within a group, so it "
       "must be at least 2")
  for name in ("prompts", "max_prompt", "max_new", "slots", "segment"):
    need(c.rollout[name] > 0, f"rollout.{name} is {c.rollout[name]}; it must be at least 1")
  need(len(c.prune.detect) == 1, f"prune.detect is {tuple(c.prune.detect)}; it takes one length, such as (512,)")
  detect = c.prune.detect[0]
  need(2 <= detect < c.rollout.max_new, f"prune.detect is {detect} and rollout.max_new is {c.rollout.max_new}; detection must come "
       "before the end of a response")
  need(detect % c.rollout.segment == 0, f"prune.detect is {detect}; it must be a multiple of rollout.segment ({c.rollout.segment})")
  p = c.prune
  need(0 < p.p_min <= p.keep <= p.p_max <= 1, f"prune.keep is {p.keep}; it must lie between p_min ({p.p_min}) and p_max "
       f"({p.p_max}), and these in (0, 1]")
  need(p.half_life is None or p.half_life > 0, f"prune.half_life is {p.half_life}; it is a number of rollouts, or None")
  need(c.quality.short in ("skip", "last"), f"quality.short is {c.quality.short!r}; it must be 'skip' or 'last'")
  need(c.loss.name in ALGORITHMS, f"loss.name is {c.loss.name!r}; it must be one of {', '.join(ALGORITHMS)}")
  need(c.loss.aggregate in (None, "token", "sequence"), f"loss.aggregate is {c.loss.aggregate!r}; it must be 'token' or 'sequence'")
  need(c.model.attention in ("auto", "xla", "cudnn"), f"model.attention is {c.model.attention!r}; it must be auto, xla or cudnn")
  need(c.model.dtype in ("float32", "bfloat16"), f"model.dtype is {c.model.dtype!r}; it must be float32 or bfloat16")
  need("{problem}" in c.data.template, "data.template has no {problem} in it")
  need(c.checkpoint.every > 0 and c.checkpoint.keep > 0, "checkpoint.every and checkpoint.keep must be at least 1")


def to_json(c: ConfigDict) -> str:
  return json.dumps(c.to_dict(), indent=2, sort_keys=True, default=list)


def fingerprint(c: ConfigDict) -> str:
  """Hash of all that shapes a run's course; a longer `steps`, other logging or saving continue the same run."""
  d = json.loads(to_json(c))
  for key in ("steps", "checkpoint", "log", "eval"):
    d.pop(key)
  return hashlib.sha256(json.dumps(d, sort_keys=True).encode()).hexdigest()[:16]


def differing(a: dict, b: dict, prefix: str = "") -> list[str]:
  """Dotted names of the leaves in which two nested dicts differ."""
  out = []
  for key in sorted(a.keys() | b.keys()):
    x, y = a.get(key), b.get(key)
    if isinstance(x, dict) and isinstance(y, dict):
      out += differing(x, y, f"{prefix}{key}.")
    elif x != y:
      out.append(f"{prefix}{key}")
  return out
