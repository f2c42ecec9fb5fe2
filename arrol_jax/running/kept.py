"""Programs kept on disk whole: a run like one before neither traces nor compiles them.

JAX's compilation cache spares compiling. Tracing and lowering are done again at each start, take longer than reading a program,
and hold Python's lock. So what `jit` makes can have its programs from files: compile_ahead.py loads and keeps them, in a folder
of the compilation cache. A file's name is a hash of all that shapes its program: the function, its static arguments, what is
known of the others, every source file of this package, the config's file and what else the process has imported that is not
installed, versions, settings of JAX and XLA, and the devices.

So nothing is kept where that is not all: with a rule of the user's own (prune.rule=MODULE.FUNCTION), in a process that is not one
of this package's commands, which may have replaced parts of it, and where a source file is newer than the process (`shelf`). A
file is run as it stands: the folder is to be as safe as the user's own code. Left out: several processes, each of which would
have to find what the others find, and TPUs, where it has not been tried.
"""

from collections.abc import Callable
import contextlib
import functools
import hashlib
import importlib.metadata
import inspect
import os
from pathlib import Path
import pickle
import platform
import re
import secrets
import site
import sys
import sysconfig
import threading
import time

import jax
from jax.experimental import serialize_executable
from jax.sharding import Mesh

from arrol_jax.running import hosts

FOLDER, DAYS = "programs", 30  # of the compilation cache; how long a file stays that nobody reads
DIGEST = hashlib.sha256().digest_size
PACKAGE, _IMPORTED = Path(__file__).parents[1], time.time()
PACKAGES = "jax", "jaxlib", "flax", "optax", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu"
ENVIRONMENT = "JAX_", "XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE"


class Jitted:
  """A function under jax.jit, called as such. Calls for which a program was `put` run that; all others are jax.jit's."""

  def __init__(self, function: Callable, also: tuple = (), **options):
    """also: what `function` closes over, where that shapes its programs; options: jax.jit's, static arguments by name."""
    self.jitted, self.also = jax.jit(function, **options), also
    self.name = f"{function.__module__}.{function.__qualname__}"
    names, self.static = list(inspect.signature(function).parameters), options.get("static_argnames", ())
    self.places = {names.index(name): name for name in self.static}
    self.options = {k: v for k, v in options.items() if k != "out_shardings"}  # which `also` tells
    self.programs, self.alone = {}, True
    functools.update_wrapper(self, function)

  def __call__(self, *args, **kwargs):
    if self.programs:
      dynamic, named, static = self.split(args, kwargs)
      program = self.programs.get((static, given((dynamic, named), self.alone)))
      if program is not None:
        with contextlib.suppress(TypeError, ValueError):  # what it is given is not quite what it was made for: it has not run
          return program(*dynamic, **named)
    return self.jitted(*args, **kwargs)

  def split(self, args: tuple, kwargs: dict) -> tuple[tuple, dict, tuple]:
    """Positional and named arguments that are not static, and those that are by name."""
    if not self.static:
      return args, kwargs, ()
    dynamic = tuple(x for i, x in enumerate(args) if i not in self.places)
    static = {self.places[i]: x for i, x in enumerate(args) if i in self.places} | {
      k: v for k, v in kwargs.items() if k in self.static}
    return dynamic, {k: v for k, v in kwargs.items() if k not in self.static}, tuple(sorted(static.items()))

  def put(self, args: tuple, kwargs: dict, program: jax.stages.Compiled, alone: bool) -> None:
    """Calls like this one run `program` from now on. alone: all programs that are put here are for one device."""
    dynamic, named, static = self.split(args, kwargs)
    self.programs[static, given((dynamic, named), alone)], self.alone = program, alone

  def forget(self) -> None:
    """All calls are jax.jit's again."""
    self.programs.clear()

  def __getattr__(self, name: str):
    return getattr(self.jitted, name)  # lower, trace, ...


jit = Jitted


def given(tree, alone: bool) -> tuple:
  """What a program is compiled for, of its arguments: their structure, shapes, dtypes, and shardings. alone: there is one device,
  and nothing depends on the last."""
  leaves, structure = jax.tree.flatten(tree)
  if alone:
    return structure, *((x.shape, x.dtype) if hasattr(x, "shape") else type(x) for x in leaves)
  return structure, *((x.shape, x.dtype, getattr(x, "sharding", None)) if hasattr(x, "shape") else type(x) for x in leaves)


def shelf(mesh: Mesh) -> "Shelf | None":
  """Where programs for arrays on `mesh` are kept; None where they are not."""
  cache = jax.config.jax_compilation_cache_dir if jax.config.jax_enable_compilation_cache else None
  here = hosts.own_process() and not hosts.several() and mesh.devices.flat[0].platform in TRIED
  if not (cache and here) or "://" in cache or not os.environ.get("XLA_FLAGS", "-").lstrip().startswith("-") or edited():
    return None
  return Shelf(Path(cache, FOLDER), mesh)


_beside: list[str] = []


def depends_on(path: str) -> None:
  """The programs of this process may depend on this file, too: a config is a program and may replace parts of the package."""
  _beside.append(hashlib.sha256(Path(path).read_bytes()).hexdigest())


TRIED = ("cpu", "gpu")  # platforms
_thread = threading.local()


def _can_be_kept(lowered: jax.stages.Lowered, platform: str, made_here: bool) -> bool:
  """Whether a program does the same when it is read in another process. made_here: it did not come from JAX's cache.

  On a CPU (jaxlib 0.10.2) what came from that cache has lost its functions when it is written again ("NOT_FOUND: Function ..."),
  and what calls LAPACK finds it only in a process that has lowered such a call: it would end with a segmentation fault.
  """
  if platform != "cpu":
    return True
  return made_here and set(re.findall(r"custom_call @(\w+)", lowered.as_text())) <= {"Sharding", "SPMDFullToShardShape",
                                                                                     "SPMDShardToFullShape"}


def _misses() -> int:
  """How often this thread has compiled what JAX's cache had not."""
  return getattr(_thread, "misses", 0)


@functools.cache
def _count_misses() -> None:
  def note(event: str, **_):
    if event == "/jax/compilation_cache/cache_misses":
      _thread.misses = _misses() + 1
  jax.monitoring.register_event_listener(note)


class Shelf:
  """Files of programs for arrays on `mesh`."""

  def __init__(self, folder: Path, mesh: Mesh):
    self.folder, self.common, self.devices, self.loaded = folder, environment(mesh), list(mesh.devices.flat), []
    _count_misses()

  def path(self, jitted: Callable, args: tuple, kwargs: dict) -> Path | None:
    """Where the program of such a call is kept; None for one that cannot be."""
    if not isinstance(jitted, Jitted):
      return None
    dynamic, named, static = jitted.split(args, kwargs)
    text = repr((jitted.name, jitted.also, jitted.options, static, given((dynamic, named), len(self.devices) == 1)))
    if " at 0x" in text:  # an object that is another at each start
      return None
    return self.folder / hashlib.sha256((self.common + text).encode()).hexdigest()

  def load(self, jitted: Callable, args: tuple, kwargs: dict) -> jax.stages.Compiled | None:
    """The program of such a call, which such calls run from now on; None where there is none that can be read."""
    path = self.path(jitted, args, kwargs)
    try:
      if path is None or not path.exists():
        return None
      content = path.read_bytes()
      whole = hashlib.sha256(content[DIGEST:]).digest() == content[:DIGEST]  # half a program can end the process
      program = whole and serialize_executable.deserialize_and_load(*pickle.loads(content[DIGEST:]),
                                                                    execution_devices=self.devices)
    except Exception:  # of any kind: one of a JAX that says the same of itself and is another
      program = None
    with contextlib.suppress(OSError):  # it may be another user's
      os.utime(path) if program else path.unlink()
    if not program:
      return None
    jitted.put(args, kwargs, program, len(self.devices) == 1)
    self.loaded.append(jitted)
    return program

  def compiled(self, lowered: jax.stages.Lowered, jitted: Callable, args: tuple, kwargs: dict) -> jax.stages.Compiled:
    """The program of such a call, compiled, and kept where that can be."""
    before = _misses()
    program = lowered.compile()
    if _can_be_kept(lowered, self.devices[0].platform, _misses() > before):
      self.keep(jitted, args, kwargs, program)
    return program

  def keep(self, jitted: Callable, args: tuple, kwargs: dict, program: jax.stages.Compiled) -> None:
    """Writes the program of such a call."""
    path = self.path(jitted, args, kwargs)
    on = {device for sharding in jax.tree.leaves(program.output_shardings) for device in sharding.device_set}
    if path is None or on != set(self.devices):
      return
    half = path.with_suffix(f".{os.getpid()}-{secrets.token_hex(4)}")
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      content = pickle.dumps(serialize_executable.serialize(program))
      half.write_bytes(hashlib.sha256(content).digest() + content)
      half.rename(path)
    except Exception:  # of any kind, such as a full disk or what cannot be serialised: it is made again next time
      with contextlib.suppress(OSError):
        half.unlink()

  def tidy(self) -> None:
    """Removes what nobody has read for DAYS."""
    with contextlib.suppress(OSError):
      for path in self.folder.iterdir():
        if path.stat().st_mtime < time.time() - 86400 * DAYS:
          path.unlink()

  def forget(self) -> None:
    """Calls run what jax.jit has of its own again."""
    for jitted in self.loaded:
      jitted.forget()
    self.loaded.clear()


def environment(mesh: Mesh) -> str:
  """All that shapes every program of this process."""
  devices = [(d.id, d.platform, d.device_kind) for d in mesh.devices.flat]
  which = lambda items: sorted((k, v) for k, v in items if "compilation_cache" not in k.lower())
  variables = which((k, v) for k, v in os.environ.items() if k.startswith(ENVIRONMENT))
  return repr((source(), _beside, beside(), versions(), which(jax.config.values.items()), variables, str(mesh), devices,
               mesh.devices.flat[0].client.platform_version, processor() if devices[0][1] == "cpu" else ""))


def source() -> str:
  """A hash of this package's files."""
  digest = hashlib.sha256()
  for path in files():
    content = path.read_bytes()
    digest.update(f"{path.relative_to(PACKAGE)} {len(content)}\n".encode() + content)
  return digest.hexdigest()


def files() -> list[Path]:
  """The package's own; editors leave others beside them."""
  return [path for path in sorted(PACKAGE.rglob("*.py")) if path.is_file() and not path.name.startswith(".")]


def edited() -> bool:
  """Whether a file may be another than the one that this process has imported."""
  return any(path.stat().st_mtime > began() - 1.0 for path in files())


@functools.cache
def began() -> float:
  """When this process began, in seconds since the epoch, to a second or so."""
  try:
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    up = next(int(line.split()[1]) for line in Path("/proc/stat").read_text().splitlines() if line.startswith("btime"))
    return up + ticks / os.sysconf("SC_CLK_TCK")
  except (OSError, ValueError, StopIteration, IndexError):  # no Linux
    return _IMPORTED - 10.0


def beside() -> list[tuple]:
  """What this process has imported that is neither this package's nor installed: it may have replaced parts."""
  found = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
  installed = tuple({sys.prefix, sys.base_prefix, str(PACKAGE), *site.getsitepackages(), *sysconfig.get_paths().values()})
  own = [Path(name) for name in found if name.endswith(".py") and not name.startswith(installed)]
  return sorted((str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in own if path.is_file())


@functools.cache
def versions() -> list[tuple[str, str]]:
  found = {d.name: d.version for d in map(_distribution, PACKAGES) if d}
  return sorted(found.items())


def _distribution(name: str) -> importlib.metadata.Distribution | None:
  try:
    return importlib.metadata.distribution(name)
  except importlib.metadata.PackageNotFoundError:
    return None


@functools.cache
def processor() -> str:
  """What this machine's processor can do: programs for it are made to measure."""
  with contextlib.suppress(OSError):
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
  return platform.processor()
