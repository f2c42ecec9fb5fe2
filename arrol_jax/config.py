"""Reads, overrides, checks and fingerprints a run's configuration; turns a user's mistake into one line.

configs/base.py says what every key means. Only entry points import this module.
"""

from collections.abc import Callable
import errno
import functools
import math
import os
import sys
import traceback

from absl import flags
import jax
from ml_collections import ConfigDict, config_flags

from arrol_jax import usage
from arrol_jax.data import sources
from arrol_jax.engine.decode_attention import IMPLEMENTATIONS as CACHE_ATTENTION
from arrol_jax.learning.losses import AGGREGATES, ALGORITHMS, CORRECTIONS, RATIOS
from arrol_jax.learning.update import SCHEDULES
from arrol_jax.models.attention import IMPLEMENTATIONS
from arrol_jax.models.files import hub
from arrol_jax.models.transformer import REMAT
from arrol_jax.pruning import features
from arrol_jax.pruning.head import INPUTS
from arrol_jax.pruning.rule import DRAWS, RULES, WEIGH
from arrol_jax.running import hosts, shipped
from arrol_jax.running.workdir import RENAMED, VALUES
from arrol_jax.types import UserError


class Section(ConfigDict):
  """A part of the config whose keys may also be set by the names that they had a release ago."""

  def __setattr__(self, name, value):
    new = _LAST_NAMES.get(name) if name not in self else None
    if new in self:
      hosts.say(f"config: {name} is called {new} now")
      name, value = new, _NEW_VALUES.get(name, lambda x: x)(value)
    super().__setattr__(name, value)


_LAST_NAMES = {old.split(".")[1]: new.split(".")[1] for old, new in RENAMED.items()}
_NEW_VALUES = {old.split(".")[1]: change for old, change in VALUES.items()}


def _with_new_names(argv: list[str]) -> list[str]:
  """The command line with today's names of config keys, and a word about each old one."""
  for old, new in RENAMED.items():
    for i, text in enumerate(argv):
      if text.partition("=")[0] == f"--config.{old}":
        hosts.say(f"config: {old} is called {new} now")
        value = VALUES.get(old, lambda x: x)(text.partition("=")[2])
        argv = [*argv[:i], f"--config.{new}={value}", *argv[i + 1:]]
  return argv


def keep_compilations(folder: str | None) -> None:
  """What is compiled is kept in `folder` for the next start; "" for the user's cache, "none" for nowhere. The environment's
  JAX_COMPILATION_CACHE_DIR goes first."""
  if os.environ.get("JAX_COMPILATION_CACHE_DIR") or folder == "none":
    return
  home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
  jax.config.update("jax_compilation_cache_dir", folder or os.path.join(home, "arrol_jax", "compiled"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def parse(argv: list[str], own: dict[str, tuple] | None = None, doc: str = "") -> tuple[ConfigDict, flags.FlagValues]:
  """The locked config that `--config=NAME-OR-FILE --config.KEY=VALUE` asks for, and the other flags.

  own: the command's own flags, name -> (default, what it does). doc: its docstring, the head of what --help prints.
  """
  own = {"workdir": (None, "folder of the run; runs/NAME if not given"),
         "compilation_cache": ("", "folder that keeps compiled programs; none: keep none; empty: the user's cache")} | (own or {})
  values, argv = flags.FlagValues(), _with_new_names(argv)
  if {"--help", "-help", "-h"} & set(argv[1:]):
    config_flag = ("config", "NAME|FILE", f"a run that is shipped ({', '.join(shipped.names())}), or a file")
    print(usage.text(doc, [config_flag, *((name, *about) for name, about in own.items())]))
    sys.exit(0)
  argv, path = _config_of(argv)
  config_flags.DEFINE_config_file("config", None, "a config file", flag_values=values, sys_argv=argv)
  for name, (default, what) in own.items():
    flags.DEFINE_string(name, default, what, flag_values=values)
  try:
    rest = values(argv)
    config = values.config
  except Exception as e:  # a config file is a program: it may raise anything
    raise UserError(_explain(path, e)) from e
  if not isinstance(config, ConfigDict):
    raise UserError(f"{path}: get_config() must return a ConfigDict; start from configs/base.py")
  if rest[1:]:
    raise UserError(f"unexpected argument {rest[1]!r}; every option is --NAME=VALUE")
  keep_compilations(values.compilation_cache)
  if values.workdir is None:
    # Not `values.workdir = `: values["workdir"].present goes on telling whether the user gave one.
    values["workdir"].value = os.path.join("runs", os.path.splitext(os.path.basename(path))[0])
  return config, values


def _config_of(argv: list[str]) -> tuple[list[str], str]:
  """The command line with the file of the config that it names (by the last of several --config), and that file."""
  rest, name = argv[:1], None
  words = iter(argv[1:])
  for word in words:
    flag, equals, value = word.partition("=")
    if flag in ("--config", "-config"):
      name = value if equals else next(words, "")
    else:
      rest.append(word)
  known = f"shipped ones: {', '.join(shipped.names())}"
  if name is None:
    raise UserError(f"no --config=NAME or --config=FILE given; {known}")
  path = shipped.config_file(name)
  if not os.path.isfile(path):
    raise UserError(f"{name}: no such config file; {known}")
  shipped.import_configs()
  return [rest[0], f"--config={path}", *rest[1:]], path


def _key_of(e: Exception) -> str:
  """What ml_collections says of an unknown key (its last part, perhaps a guess at what was meant), "" for other errors."""
  while e.args and isinstance(e.args[0], Exception):
    e = e.args[0]
  if not isinstance(e, KeyError) or not e.args:
    return ""
  return " ".join(line.partition(" Other fields present")[0] for line in str(e.args[0]).splitlines())


def _explain(path: str, e: Exception) -> str:
  """What ml_collections or the config file raised, in one line."""
  key = _key_of(e)
  if key:
    text = f"unknown config key: {key} (configs/base.py lists them all)"
  elif isinstance(e, flags.Error) and "Traceback" not in str(e):
    text = str(e)
  else:  # ml_collections puts the whole traceback of a failing config file into the message
    last = str(e).strip().splitlines()[-1:]
    text = f"{path}: {last[0]}" if "Traceback" in str(e) else f"{path}: {type(e).__name__}: {e}"
  return " ".join(text.split())


def run(main: Callable[[], None]) -> None:
  """Runs an entry point; a user's mistake ends in one line on stderr and exit status 2, without a traceback.

  One of several processes that fails leaves at once, whatever the others are doing: they notice and end too.
  """
  if not {"", os.getcwd()} & set(sys.path):  # a console script has its own folder there; reward.function may be in this one
    sys.path.append(os.getcwd())
  try:
    main()
  except hosts.Preempted:
    hosts.say("stopped by SIGTERM; the same command goes on from there")
  except UserError as e:
    print("error:", *str(e).split(), file=sys.stderr)
    _end(2)
  except OSError as e:
    if e.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
      _fail()
    print(f"error: {e.filename or 'the run folder'}: {e.strerror}; make room, and the same command goes on from the last "
          "checkpoint", file=sys.stderr)
    _end(2)
  except KeyboardInterrupt:
    print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
    _end(130)
  except Exception:
    _fail()


def _fail() -> None:
  """For what nobody foresaw: the traceback, and with several processes what it often means."""
  if not hosts.several():
    raise
  traceback.print_exc()
  print(f"error: process {jax.process_index()} of {jax.process_count()} stops: it failed, or another process is gone (see its "
        "log); the same command on all hosts goes on from the last checkpoint", file=sys.stderr)
  hosts.leave(1)


def _end(status: int) -> None:
  if hosts.several():
    hosts.leave(status)
  sys.exit(status)


def check(c: ConfigDict, files: bool = True) -> None:
  """Raises UserError for values that cannot work together, before anything is loaded. files False: nor need they be there."""
  try:
    if files:
      _check_files(c)
    _check(c)
  except (AttributeError, KeyError) as e:
    raise UserError(f"the config has no key {_key_of(e)}; start from configs/base.py") from e


def remarks(c: ConfigDict) -> list[str]:
  """What a config asks for that does nothing, a line each."""
  named = [f"loss.{name}" for name in ("clip_low", "clip_high") if c.loss[name] is not None]
  named += ["GSPO's ratio"] * (c.loss.name == "gspo" or c.loss.ratio == "sequence")
  if named and c.optim.epochs * c.optim.minibatches == 1:
    return [f"{', '.join(named)}: nothing comes of it with one optimizer step a batch, where the ratio is 1; set optim.epochs or "
            "optim.minibatches"]
  return []


def _need(ok: bool, text: str) -> None:
  if not ok:
    raise UserError(text)


def _check_files(c: ConfigDict) -> None:
  _need(c.model.path != "", "model.path is empty; give a Hugging Face folder, a .gguf file or a hub id such as Qwen/Qwen3-0.6B")
  path = hub.here(c.model.path)
  _need(os.path.exists(path) or hub.is_id(path), f"model.path: {c.model.path} does not exist")
  _check_data(c)


def _check(c: ConfigDict) -> None:
  _check_counts(c)
  _check_prune(c)
  _need(c.rollout.group_size >= 2, f"rollout.group_size is {c.rollout.group_size}; advantages are taken within a group, so it "
        "must be at least 2")
  _need(c.rollout.temperature > 0, f"rollout.temperature is {c.rollout.temperature}; it must be above 0")
  r = c.rollout
  _need(r.slots is None or r.slots >= 1, f"rollout.slots is {r.slots}; it must be at least 1")
  _need(r.cache in (None, "int8"), f"rollout.cache is {r.cache!r}; it must be 'int8' or left out")
  _need(r.attention in CACHE_ATTENTION, f"rollout.attention is {r.attention!r}; it must be one of {', '.join(CACHE_ATTENTION)}")
  _need(r.top_k is None or r.top_k >= 1, f"rollout.top_k is {r.top_k}; it must be at least 1")
  for name in ("top_p", "min_p"):
    _need(r[name] is None or 0 < r[name] <= 1, f"rollout.{name} is {r[name]}; it must lie in (0, 1]")
  _check_quality(c)
  _check_rates(c)
  _need(c.loss.name in ALGORITHMS, f"loss.name is {c.loss.name!r}; it must be one of {', '.join(ALGORITHMS)}")
  for name, values in (("aggregate", AGGREGATES), ("ratio", RATIOS)):
    _need(c.loss[name] in (None, *values), f"loss.{name} is {c.loss[name]!r}; it must be one of {', '.join(values)}")
  for name, values in (("loss.correction", CORRECTIONS), ("optim.schedule", SCHEDULES)):
    value = functools.reduce(getattr, name.split("."), c)
    _need(value in values, f"{name} is {value!r}; it must be one of {', '.join(values)}")
  _need(c.loss.correction_cap > 0, f"loss.correction_cap is {c.loss.correction_cap}; it must be above 0")
  _need(c.loss.overlong is None or 0 <= c.loss.overlong <= 1, f"loss.overlong is {c.loss.overlong}; it is a share of max_new")
  _need(c.model.attention in IMPLEMENTATIONS,
        f"model.attention is {c.model.attention!r}; it must be one of {', '.join(IMPLEMENTATIONS)}")
  _need(c.model.remat in REMAT, f"model.remat is {c.model.remat!r}; it must be one of {', '.join(REMAT)}")
  _need(c.model.dtype in ("float32", "bfloat16"), f"model.dtype is {c.model.dtype!r}; it must be float32 or bfloat16")


def _check_rates(c: ConfigDict) -> None:
  """Numbers that would train the wrong way, or not at all, without a word."""
  at_least_0 = ("optim.lr", "optim.head_lr", "optim.weight_decay", "loss.clip_low", "loss.clip_high", "loss.kl_weight",
                "loss.head_weight")
  for name in at_least_0:
    value = functools.reduce(getattr, name.split("."), c)
    _need(value is None or 0 <= value < math.inf, f"{name} is {value}; it must be a number from 0 on")
  o = c.optim
  _need(0 < o.clip_norm < math.inf, f"optim.clip_norm is {o.clip_norm}; it must be above 0")
  for name in ("b1", "b2"):
    _need(0 <= o[name] < 1, f"optim.{name} is {o[name]}; it must lie in [0, 1)")


def _check_quality(c: ConfigDict) -> None:
  q, e = c.quality, c.eval
  _need(q.short in ("skip", "last"), f"quality.short is {q.short!r}; it must be 'skip' or 'last'")
  _need(q.fit in ("adam", "ridge"), f"quality.fit is {q.fit!r}; it must be 'adam' or 'ridge'")
  _need(len(q.inputs) > 0, "quality.inputs is empty; a head must read something")
  if q.fit == "ridge":
    try:
      features.parse(tuple(q.inputs), 1000)
    except ValueError as e:
      raise UserError(f"quality.inputs: {e}") from e
  else:
    _need(set(q.inputs) <= set(INPUTS),
          f"quality.inputs is {tuple(q.inputs)}; with quality.fit=adam it takes some of {', '.join(INPUTS)}")
  _need(0 < q.strength < math.inf, f"quality.strength is {q.strength}; it must be above 0")
  _need(q.half_life is None or q.half_life > 0, f"quality.half_life is {q.half_life}; it is a number of rollouts, or None")
  _need(0 < c.learn.keep <= 1, f"learn.keep is {c.learn.keep}; it must lie in (0, 1]")
  _need(q.buffer is None or q.buffer >= 1, f"quality.buffer is {q.buffer}; it is a number of rollouts, or None")
  _need(e.every is None or e.every >= 1, f"eval.every is {e.every}; it is a number of steps, or None")
  _need(e.stop_below is None or 0 <= e.stop_below <= 1, f"eval.stop_below is {e.stop_below}; it is a probability, or None")


def _check_data(c: ConfigDict) -> None:
  train, held_out = sources.split_list(c.data.train), sources.split_list(c.data.eval)
  _need(train != [], "data.train is empty; give a JSONL file")
  for one, split in [(one, "train") for one in train] + [(one, "test") for one in held_out]:
    sources.check(one, split, c.data.folder)
  for one in train + held_out + sources.split_list(c.eval.benchmarks):
    _need(not one.startswith("reasoning_gym:") or c.reward.function is not None,
          f"{one}: its answers need the task's own judgement: set reward.function=arrol_jax.rewards.gym.score")
  _need(c.eval.every is None or held_out != [], "eval.every evaluates on data.eval during training, and data.eval is empty")
  _need("{problem}" in c.data.template, "data.template has no {problem} in it")


def _check_counts(c: ConfigDict) -> None:
  """Numbers that have a smallest value."""
  at_least_1 = ("steps", "rollout.prompts", "rollout.max_prompt", "rollout.max_new", "rollout.segment", "rollout.resampling",
                "rollout.row_buckets", "rollout.length_buckets", "prune.bins", "quality.hidden", "optim.micro_tokens",
                "optim.chunk_tokens", "optim.length_buckets", "optim.epochs",
                "optim.minibatches", "reward.workers", "reward.memory", "checkpoint.every",
                "checkpoint.keep", "eval.samples", "eval.subset", "eval.window", "quality.passes", "mesh.data", "mesh.fsdp",
                "mesh.tensor")
  at_least_0 = ("seed", "prune.cold_start", "optim.warmup", "eval.problems", "eval.temperature", "eval.max_new", "log.rollouts")
  for names, least in ((at_least_1, 1), (at_least_0, 0)):
    for name in names:
      value = functools.reduce(getattr, name.split("."), c)
      _need(value >= least, f"{name} is {value}; it must be at least {least}")
  _need(c.optim.tail_sizes in (0, 1, 2), f"optim.tail_sizes is {c.optim.tail_sizes}; it must be 0, 1 or 2")
  _need(c.seed < 2**31, f"seed is {c.seed}; it must be below 2^31")


def _check_prune(c: ConfigDict) -> None:
  p, r = c.prune, c.rollout
  detect = tuple(p.detect)
  _need(r.candidates is None or r.candidates >= r.prompts,
        f"rollout.candidates is {r.candidates}; it must be at least rollout.prompts ({r.prompts}), or None")
  _need(0 <= r.explore <= 1, f"rollout.explore is {r.explore}; it is a share between 0 and 1")
  if detect[:1] == (0,):  # the choice of prompts, before any token
    detect = detect[1:]
  _need(len(detect) > 0 and all(isinstance(d, int) for d in detect) and list(detect) == sorted(set(detect)),
        f"prune.detect is {detect}; it takes ascending lengths, such as (512,) or (128, 512)")
  _need(2 <= detect[0] and detect[-1] < r.max_new, f"prune.detect is {detect} and rollout.max_new is {r.max_new}; detection must "
        "come before the end of a response")
  _need(all(d % r.segment == 0 for d in detect),
        f"prune.detect is {detect}; each must be a multiple of rollout.segment ({r.segment})")
  _need(p.rule in RULES, f"prune.rule is {p.rule!r}; it must be one of {', '.join(RULES)}")
  _need(p.draw in DRAWS, f"prune.draw is {p.draw!r}; it must be one of {', '.join(DRAWS)}")
  _need(0 <= p.floor <= r.group_size, f"prune.floor is {p.floor}; it must lie between 0 and rollout.group_size ({r.group_size})")
  _need(0 <= p.target <= 1, f"prune.target is {p.target}; it is a share between 0 and 1")
  _need(math.isfinite(p.strength), f"prune.strength is {p.strength}; it must be a finite number")
  _need(0 <= p.holdout <= 1, f"prune.holdout is {p.holdout}; it is a share between 0 and 1")
  _need(set(p.weigh) <= set(WEIGH), f"prune.weigh is {tuple(p.weigh)}; it takes any of {', '.join(WEIGH)}")
  _need(0 < p.p_min <= p.keep <= p.p_max <= 1, f"prune.keep is {p.keep}; it must lie between p_min ({p.p_min}) and p_max "
        f"({p.p_max}), and these in (0, 1]")
  _need(p.half_life is None or p.half_life > 0, f"prune.half_life is {p.half_life}; it is a number of rollouts, or None")
