"""Reads, overrides, checks and fingerprints a run's configuration; turns a user's mistake into one line.

configs/base.py says what every key means. Only entry points import this module.
"""

from collections.abc import Callable
import contextlib
import math
import os
import re
import sys
import traceback
import warnings

from absl import flags
import jax
from ml_collections import ConfigDict, config_flags
import numpy as np

from arrol_jax import usage
from arrol_jax.config_ranges import check_ranges, need, value_of
from arrol_jax.data import sources
from arrol_jax.engine.decode_attention import IMPLEMENTATIONS as CACHE_ATTENTION
from arrol_jax.learning.losses import AGGREGATES, ALGORITHMS, BASELINES, CORRECTIONS, RATIOS
from arrol_jax.learning.optimizers import SCHEDULES
from arrol_jax.models.attention import IMPLEMENTATIONS
from arrol_jax.models.files import hub
from arrol_jax.models.lora import MATRICES
from arrol_jax.models.transformer import REMAT
from arrol_jax.pruning import features
from arrol_jax.pruning.head import INPUTS
from arrol_jax.pruning.own_rule import own_rule
from arrol_jax.pruning.rule import DRAWS, RULES, WEIGH
from arrol_jax.running import endings, hosts, kept, shipped
from arrol_jax.running.workdir import RENAMED, VALUES, fill, is_run, stored_config
from arrol_jax.types import UserError


class Section(ConfigDict):
  """A part of the config. Its keys may also be set by the names that they had a release ago; NumPy's numbers are plain ones, and
  True is no real number."""

  def __setitem__(self, name, value):
    value = tuple(map(_plain, value)) if type(value) is tuple else _plain(value)
    if isinstance(value, bool) and name in self and self.get_type(name) is float:  # ml_collections would make it 1.0
      raise TypeError(f"Could not override field '{name}' (reference). {value} is of type bool and cannot be cast to float")
    super().__setitem__(name, value)

  def __setattr__(self, name, value):
    new = _LAST_NAMES.get(name) if name not in self else None
    if new in self:
      hosts.say(f"config: {name} is called {new} now")
      name, value = new, _NEW_VALUES.get(name, lambda x: x)(value)
    super().__setattr__(name, value)


def _plain(value):
  """NumPy's float64 would pass for a float, and make a type of its own of the key."""
  return value.item() if isinstance(value, np.generic) else value


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
  where = os.environ.get("JAX_COMPILATION_CACHE_DIR")
  if not where and folder == "none":
    return
  if not where:
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    where = folder or os.path.join(home, "arrol_jax", "compiled")
    jax.config.update("jax_compilation_cache_dir", where)
  if os.path.isdir(where) and not os.access(where, os.W_OK):  # JAX would say so of each program
    hosts.say(f"{where} cannot be written: what is compiled is not kept for the next start")
    warnings.filterwarnings("ignore", "Error writing persistent compilation cache entry")
  if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:  # most programs are small: together they are seconds
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def parse(argv: list[str], own: dict[str, tuple] | None = None, doc: str = "") -> tuple[ConfigDict, flags.FlagValues]:
  """The locked config that `--config=NAME-OR-FILE --config.KEY=VALUE` asks for, and the other flags. Without --config it is
  that of the run in --workdir.

  own: the command's own flags, name -> (default, what it does). doc: its docstring, the head of what --help prints.
  """
  own = {"workdir": (None, "folder of the run; runs/NAME if not given"),
         "compilation_cache": ("", "folder that keeps compiled programs; none: keep none; empty: the user's cache")} | (own or {})
  values, argv = flags.FlagValues(), _with_new_names(argv)
  split = [a.partition("=") for a in argv]
  argv = [name + equals + (os.path.expanduser(value) if name in _PATH_FLAGS else value) for name, equals, value in split]
  if {"--help", "-help", "-h"} & set(argv[1:]):
    config_flag = ("config", "NAME|FILE", f"a run that is shipped ({', '.join(shipped.names())}), or a file")
    print(usage.text(doc, [config_flag, *((name, *about) for name, about in own.items())]))
    sys.exit(0)
  argv, off = usage.switched_off(usage.lists_once(usage.joined(argv)))
  argv, path = _config_of(argv)
  if path is None:
    path, stored = _config_of_run(argv)
    try:
      config_flags.DEFINE_config_dict("config", stored, flag_values=values, sys_argv=argv)
    except Exception as e:  # a key that the run's config does not have is asked for here
      raise UserError(_explain(path, KeyError(*e.args) if isinstance(e, AttributeError) else e, argv)) from e
  else:
    config_flags.DEFINE_config_file("config", None, "a config file", flag_values=values, sys_argv=argv)
  for name, (default, what) in own.items():
    flags.DEFINE_string(name, default, what, flag_values=values)
  try:
    rest = values(argv)
    config = values.config
  except (Exception, SystemExit) as e:  # a config file is a program: it may raise anything, or end the process
    raise UserError(_explain(path, e, argv)) from e
  if not isinstance(config, ConfigDict):
    raise UserError(f"{path}: get_config() must return a ConfigDict; start from configs/base.py")
  if rest[1:]:
    raise UserError(f"unexpected argument {rest[1]!r}; every option is --NAME=VALUE")
  for section, _, name in (key.rpartition(".") for key in off):
    setattr(value_of(config, section) if section else config, name, None)
  for section, name in (x.split(".") for x in _PATHS):
    if section in config and name in config[section] and isinstance(config[section][name], str):
      config[section][name] = _with_home(config[section][name])
  _split_lists(config)
  keep_compilations(values.compilation_cache)
  if path and os.path.isfile(path):
    kept.depends_on(path)
  if values.workdir is None:
    # Not `values.workdir = `: values["workdir"].present goes on telling whether the user gave one.
    values["workdir"].value = os.path.join("runs", os.path.splitext(os.path.basename(path))[0])
  return config, values


def defaults() -> ConfigDict:
  """What configs/base.py says, which every config starts from."""
  shipped.import_configs()
  from configs import base  # it imports this module
  return base.get_config()


_PATH_FLAGS = ("--config", "--workdir", "--compilation_cache", "--json")
_PATHS = ("model.path", "data.train", "data.eval", "data.folder", "data.tfds_dir", "eval.benchmarks")


def _with_home(text: str) -> str:
  """A path, or sources separated by commas, in which ~ is the user's home as in a shell."""
  return re.sub(r"(?:^|(?<=[,:]))(\s*)(~[^/,\s]*)", lambda m: m[1] + os.path.expanduser(m[2]), text)


def _split_lists(c: ConfigDict) -> None:
  """--config.prune.weigh=table,head is ("table", "head"), as --config.prune.detect=64,128 is (64, 128)."""
  for name, value in c.items():
    if isinstance(value, ConfigDict):
      _split_lists(value)
    elif isinstance(value, tuple) and any(isinstance(x, str) for x in value):
      c[name] = tuple(part for x in value for part in (usage.words(x) if isinstance(x, str) else [x]))


def _config_of_run(argv: list[str]) -> tuple[str, ConfigDict]:
  """config.json of the run whose folder the command line names, and what it says."""
  given = [value if equals else following for (flag, equals, value), following in
           zip([a.partition("=") for a in argv], [*argv[1:], ""]) if flag in ("--workdir", "-workdir")]
  if not given or not is_run(given[-1]):
    word = next(iter(argv[1:]), "")
    if is_run(word) or word in shipped.names():  # arrol-look and arrol-chat take a folder without a flag
      raise UserError(f"unexpected argument {word!r}; write --{'workdir' if is_run(word) else 'config'}={word}")
    half = given and os.path.isdir(os.path.join(given[-1], "checkpoints"))
    where = f", and {given[-1]} {'has checkpoints and no config.json' if half else 'holds no run'}" if given else ""
    raise UserError(_no_config(where))
  c, file = defaults(), os.path.join(given[-1], "config.json")
  for name in fill(c, stored_config(given[-1], c)):
    hosts.say(f"{file}: {name} is not known here and is left out")
  return file, c


def _no_config(where: str = "") -> str:
  return f"no --config=NAME or --config=FILE given{where}; shipped ones: {', '.join(shipped.names())}"


def _config_of(argv: list[str]) -> tuple[list[str], str | None]:
  """The command line with the file of the config that it names (by the last of several --config), and that file; None: it names
  none."""
  rest, name = argv[:1], None
  words = iter(argv[1:])
  for word in words:
    flag, equals, value = word.partition("=")
    if flag in ("--config", "-config"):
      name = value if equals else next(words, "")
    else:
      rest.append(word)
  if name is None:
    return argv, None
  if not name.strip():  # an unset variable of a shell: nor is the config of --workdir's run meant
    raise UserError(_no_config())
  path = shipped.config_file(name)
  if not os.path.isfile(path):
    raise UserError(f"{name}: no such config file; shipped ones: {', '.join(shipped.names())}")
  shipped.import_configs()
  return [rest[0], f"--config={path}", *rest[1:]], path


def _key_of(e: BaseException) -> str:
  """What ml_collections says of an unknown key (its last part, perhaps a guess at what was meant), "" for other errors."""
  while e.args and isinstance(e.args[0], Exception):
    e = e.args[0]
  if not isinstance(e, KeyError) or not e.args:
    return ""
  return " ".join(str(e.args[0]).partition("Other fields present")[0].split())


def _explain(path: str, e: BaseException, argv: list[str]) -> str:
  """What ml_collections or the config file raised, in one line."""
  key, given = _key_of(e), [word.partition("=")[0] for word in argv if word.startswith("--config.")]
  by_hand = [name for name in given if name not in usage.config_flags()]
  where = by_hand[0] if by_hand else path
  if key:
    text = f"{'' if by_hand else f'{path}: '}unknown config key: {key} (configs/base.py lists them all)"
  elif isinstance(e, flags.UnrecognizedFlagError):
    text, last = str(e), e.flagname.rpartition(".")[2]
    meant = [f"--config.{name}" for name, *_ in usage.keys() if name.rpartition(".")[2] == last]
    if meant and "Did you" not in text:
      text += f". Did you mean {' or '.join(meant)}?"
  elif isinstance(e, SystemExit):
    text = f"{path}: it ends by sys.exit({'' if e.code is None else str(e.code)[:200]}) and gives no config"
  elif isinstance(e, flags.Error) and "Traceback" not in str(e):
    text = str(e)
  else:  # ml_collections puts the whole traceback of a failing config file into the message
    last = str(e).strip().splitlines()[-1:]
    text = f"{path}: {last[0]}" if "Traceback" in str(e) else f"{where}: {type(e).__name__}: {e}"
  return " ".join(text.split())


def whole_number(name: str, text: str, least: int, most: int) -> int:
  """The value of flag --name; UserError unless it is a whole number from `least` to `most`."""
  if not text.isascii() or not text.isdigit() or not least <= int(text) <= most:
    raise UserError(f"--{name} is {text!r}; it must be an integer from {least} to {most}")
  return int(text)


def run(main: Callable[[], None]) -> None:
  """Runs an entry point; a user's mistake ends in one line on stderr and exit status 2, without a traceback.

  One of several processes that fails leaves at once, whatever the others are doing: they notice and end too.
  """
  hosts.begin()
  try:
    main()
  except hosts.Preempted as e:
    hosts.say(f"stopped by {e}; the same command goes on from there")
  except (Exception, KeyboardInterrupt) as e:
    said = endings.told(e)
    if said is None:
      _fail()
    print(said[0], file=sys.stderr)
    hosts.several() and hosts.leave(said[1])
    sys.exit(said[1])


def _fail() -> None:
  """For what nobody foresaw: the traceback, and with several processes what it often means."""
  if not hosts.several():
    raise
  traceback.print_exc()
  print(f"error: process {jax.process_index()} of {jax.process_count()} stops: it failed, or another process is gone (see its "
        "log); the same command on all hosts goes on from the last checkpoint", file=sys.stderr)
  hosts.leave(1)


@contextlib.contextmanager
def _keys_are_there():
  """A key that a config lacks is the user's mistake."""
  try:
    yield
  except (AttributeError, KeyError) as e:
    raise UserError(f"the config has no key {_key_of(e)}; start from configs/base.py") from e


@_keys_are_there()
def check(c: ConfigDict, files: bool = True, training: bool = True) -> None:
  """Raises UserError for values that cannot work together, before anything is loaded. files False: nor need they be there;
  training False: nor need the problems to train on, or a pruning rule of one's own."""
  if files:
    check_model(c)
    check_data(c, training)
  _check(c, training)


@_keys_are_there()
def check_model(c: ConfigDict) -> None:
  """Raises UserError unless model.path is a place on this machine, something that is shipped, or a hub id."""
  need(c.model.path != "", "model.path is empty; give a Hugging Face folder, a .gguf file or a hub id such as Qwen/Qwen3-0.6B")
  path = hub.here(c.model.path)
  need(os.path.exists(path) or hub.is_id(path), f"model.path: {c.model.path} does not exist")


def _check(c: ConfigDict, training: bool) -> None:
  check_ranges(c)
  _check_prune(c, training)
  r = c.rollout
  need(r.cache in (None, "int8"), f"rollout.cache is {r.cache!r}; it must be 'int8' or left out")
  need(r.weights in (None, "int8"), f"rollout.weights is {r.weights!r}; it must be 'int8' or left out")
  need(r.attention in CACHE_ATTENTION, f"rollout.attention is {r.attention!r}; it must be one of {', '.join(CACHE_ATTENTION)}")
  need(not (r.ahead and r.resampling > 1), f"rollout.resampling is {r.resampling}; with rollout.ahead it must be 1, as how many "
       "prompts a step takes is not known before its end")
  _check_quality(c)
  need(c.loss.name in ALGORITHMS, f"loss.name is {c.loss.name!r}; it must be one of {', '.join(ALGORITHMS)}")
  for name, values in (("aggregate", AGGREGATES), ("ratio", RATIOS)):
    need(c.loss[name] in (None, *values), f"loss.{name} is {c.loss[name]!r}; it must be one of {', '.join(values)}")
  for name, values in (("loss.baseline", BASELINES), ("loss.correction", CORRECTIONS), ("optim.schedule", SCHEDULES)):
    value = value_of(c, name)
    need(value in values, f"{name} is {value!r}; it must be one of {', '.join(values)}")
  need(all(isinstance(t, int | float) and 0 < t < math.inf for t in c.eval.at_seconds),
       f"eval.at_seconds is {tuple(c.eval.at_seconds)}; it takes seconds above 0, such as (60.0,)")
  need(c.model.attention in IMPLEMENTATIONS,
       f"model.attention is {c.model.attention!r}; it must be one of {', '.join(IMPLEMENTATIONS)}")
  need(c.model.remat in REMAT, f"model.remat is {c.model.remat!r}; it must be one of {', '.join(REMAT)}")
  need(c.model.dtype in ("float32", "bfloat16"), f"model.dtype is {c.model.dtype!r}; it must be float32 or bfloat16")
  targets = c.model.lora.targets
  need(isinstance(targets, tuple | list) and len(targets) == len(set(targets)) > 0 and set(targets) <= set(MATRICES),
       f"model.lora.targets is {targets!r}; it takes some of {', '.join(MATRICES)}, each once, such as ('q', 'v')")
  _check_best(c)


def _check_quality(c: ConfigDict) -> None:
  q = c.quality
  need(q.short in ("skip", "last"), f"quality.short is {q.short!r}; it must be 'skip' or 'last'")
  need(q.fit in ("adam", "ridge"), f"quality.fit is {q.fit!r}; it must be 'adam' or 'ridge'")
  need(len(q.inputs) > 0, "quality.inputs is empty; a head must read something")
  read = [("rollout.candidate_layer", (f"prompt@{c.rollout.candidate_layer}",))]
  read += [("quality.inputs", tuple(q.inputs))] * (q.fit == "ridge")
  for name, inputs in read:
    try:
      features.plan(inputs, 1000)
    except ValueError as e:
      raise UserError(f"{name}: {e}") from e
  if q.fit != "ridge":
    need(set(q.inputs) <= set(INPUTS),
         f"quality.inputs is {tuple(q.inputs)}; with quality.fit=adam it takes some of {', '.join(INPUTS)}")


def _check_best(c: ConfigDict) -> None:
  """What checkpoint.best names must be among the figures of an evaluation during training."""
  best, names = c.checkpoint.best, sources.benchmark_names(c.data.eval)
  known = ["held_out_accuracy"] + [f"held_out_accuracy/{name}" for name in names] * (len(names) > 1)
  need(best is None or best in known, f"checkpoint.best is {best!r}; it must be {' or '.join(known)}, or None")
  need(best is None or c.eval.every is not None, f"checkpoint.best={best} goes by evaluations during training: set eval.every")


@_keys_are_there()
def check_data(c: ConfigDict, training: bool = True) -> None:
  """Raises UserError unless every source can be there, those to train on where it is for training; reads nothing."""
  train, held_out = sources.split_list(c.data.train) if training else [], sources.split_list(c.data.eval)
  need(train != [] or not training, "data.train is empty; give a JSONL file")
  for one, split in [(one, "train") for one in train] + [(one, "test") for one in held_out]:
    sources.check(one, split, c.data.folder)
  for one in train + held_out + sources.split_list(c.eval.benchmarks):
    need(not one.startswith("reasoning_gym:") or c.reward.function is not None,
         f"{one}: its answers need the task's own judgement: set reward.function=arrol_jax.rewards.gym.score")
  for name, given in (("eval.at_seconds", c.eval.at_seconds), ("eval.every", c.eval.every is not None)):
    need(not (training and given) or held_out != [], f"{name} evaluates data.eval during training, and data.eval is empty")
  need("{problem}" in c.data.template, "data.template has no {problem} in it")


def _check_prune(c: ConfigDict, training: bool) -> None:
  p, r = c.prune, c.rollout
  detect = tuple(p.detect)
  need(r.candidates is None or r.candidates >= r.prompts,
       f"rollout.candidates is {r.candidates}; it must be at least rollout.prompts ({r.prompts}), or None")
  if detect[:1] == (0,):  # the choice of prompts, before any token
    detect = detect[1:]
  need(len(detect) > 0 and all(isinstance(d, int) for d in detect) and list(detect) == sorted(set(detect)),
       f"prune.detect is {detect}; it takes ascending lengths, such as (512,) or (128, 512)")
  need(detect[0] > 0, f"prune.detect is {detect}; lengths are tokens of a response, 0 or more")
  need(2 <= detect[0] and detect[-1] < r.max_new, f"prune.detect is {detect} and rollout.max_new is {r.max_new}; detection must "
       "come before the end of a response")
  need(all(d % r.segment == 0 for d in detect),
       f"prune.detect is {detect}; each must be a multiple of rollout.segment ({r.segment})")
  if "." in p.rule and training:
    own_rule(p.rule)
  need("." in p.rule or p.rule in RULES, f"prune.rule is {p.rule!r}; it must be one of {', '.join(RULES)}, or MODULE.FUNCTION")
  need(not (p.enabled and p.rule == "max_variance" and c.learn.keep < 1), f"learn.keep is {c.learn.keep}; with prune.rule="
       "max_variance it must be 1, as prune.keep says which share is learned from")
  need(p.draw in DRAWS, f"prune.draw is {p.draw!r}; it must be one of {', '.join(DRAWS)}")
  need(0 <= p.floor <= r.group_size, f"prune.floor is {p.floor}; it must lie between 0 and rollout.group_size ({r.group_size})")
  need(set(p.weigh) <= set(WEIGH), f"prune.weigh is {tuple(p.weigh)}; it takes any of {', '.join(WEIGH)}")
  need(0 < p.p_min <= p.keep <= p.p_max <= 1, f"prune.keep is {p.keep}; it must lie between p_min ({p.p_min}) and p_max "
       f"({p.p_max}), and these in (0, 1]")
