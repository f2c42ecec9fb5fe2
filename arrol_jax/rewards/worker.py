"""What runs inside a reward worker: it imports what it needs, binds the reward function, then grades items from a socket.

A worker imports this package's rewards and the reward function's module, nothing else of the caller's. pool.py starts workers and
ends them. Left out: deadlines, which are the parent's to keep.
"""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import fcntl
import functools
import hashlib
from importlib import import_module
import inspect
import math
from multiprocessing.connection import Connection
import numbers
import os
import resource
import signal
import sys

from arrol_jax.rewards.grade import Graded, settle
from arrol_jax.running import streams

# What parameters of reward functions are called elsewhere: f(ground_truth, completion) must not be called the wrong way round.
_MEANT = dict.fromkeys("completion prediction predicted pred solution_str generation generated output model_output "
                       "model_response model_answer".split(), "response")
_MEANT |= dict.fromkeys("ground_truth groundtruth gt truth gold gold_answer reference reference_answer ref target "
                        "label expected correct_answer".split(), "answer")
LARGEST = 1e150  # group statistics square rewards, in double precision
inside = False  # whether this process is a worker


class NoReward(Exception):
  """What a reward function returned is no finite number."""


def work(descriptor: int) -> None:
  """A worker's life: settings, imports, then items from the socket `descriptor` until the parent is gone.

  An item's answer is (reward, reason, what went wrong or "").
  """
  global inside
  inside = True
  signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's: it closes the socket
  signal.signal(signal.SIGALRM, signal.SIG_DFL)
  signal.signal(signal.SIGIO, signal.SIG_DFL)
  with contextlib.suppress(OSError):
    os.dup2(2, 1)  # what a reward function prints is not the run's output
  streams.take()
  streams.spare()  # nor its reward where that cannot be written
  connection = Connection(descriptor)
  try:
    parent, timeout_s, memory_mb, reward_fn, pattern, success = connection.recv()
    run = bind(load(reward_fn), pattern, success) if reward_fn else settle
    # Imports math-verify and builds its parser before a deadline runs. A reward function may grade too, or do without.
    with contextlib.suppress(ImportError) if reward_fn else contextlib.nullcontext():
      settle("\\frac{x^{2}}{2}+\\sqrt{3}\\sin(2x)", "\\sin(2\\cdot x)\\cdot\\sqrt{3}+0.5x^{2}")
    limit_memory(memory_mb)
    connection.send("")
  except BaseException as error:
    with contextlib.suppress(OSError):
      connection.send(f"{type(error).__name__}: {error}")
    return
  while True:
    try:
      while not connection.poll(5.0):
        if os.getppid() != parent:  # gone, but a child it forked holds the other end of the socket
          return
      item = connection.recv()
    except (EOFError, OSError):
      return
    # The parent kills a late worker. If the parent is gone, the signal's default action ends even C code.
    signal.setitimer(signal.ITIMER_REAL, 2 * timeout_s + 1)
    try:
      with _signalled(descriptor):
        graded, problem = _graded(run, item)
      signal.setitimer(signal.ITIMER_REAL, 0)
      connection.send((*graded, problem))
    except OSError:
      return


@contextlib.contextmanager
def _signalled(descriptor: int) -> Iterator[None]:
  """SIGIO ends this process (Linux) when something happens on the socket: while an item is graded, that is the parent's end."""
  fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
  flags = fcntl.fcntl(descriptor, fcntl.F_GETFL)
  fcntl.fcntl(descriptor, fcntl.F_SETFL, flags | os.O_ASYNC)
  try:
    yield
  finally:
    fcntl.fcntl(descriptor, fcntl.F_SETFL, flags)


def _graded(run: Callable, item: tuple[str, str]) -> tuple[Graded, str]:
  """An item's grade, and what went wrong with it."""
  try:
    return run(*item), ""
  except MemoryError:
    return Graded(0.0, "crashed"), "it ran out of memory (reward.memory)"
  except NoReward as problem:
    return Graded(0.0, "error"), str(problem)
  except BaseException as error:  # TimeoutException of math-verify and SystemExit are no Exceptions
    return Graded(0.0, "error"), f"{type(error).__name__}: {_short(error, str)}"


def load(path: str) -> Callable:
  """The function that `path` names, "package.module.function" or "package.module:function". Raises ValueError for a lone name."""
  module, _, name = path.replace(":", ".").rpartition(".")
  if not module:
    raise ValueError("it takes MODULE.FUNCTION, a module that can be imported and a function of it")
  return getattr(import_module(module), name)


def source_digest(path: str | None) -> str:
  """A hash of the file that an import of the function `path` would read, "" where none is found; nothing is imported. What that
  file imports is not part of it."""
  module, within, spec = (path or "").replace(":", ".").rpartition(".")[0], None, None
  for end in [i for i, x in enumerate(f"{module}.") if x == "."] if module else []:  # package by package, as an import goes
    spec = next(filter(None, (finder.find_spec(module[:end], within) for finder in sys.meta_path)), None)
    if spec is None:
      return ""
    within = spec.submodule_search_locations
  try:
    return hashlib.sha256(spec.loader.get_data(spec.origin)).hexdigest()[:16]
  except (AttributeError, OSError, TypeError):  # no function, or a module without a file
    return ""


def bind(function: Callable, pattern: str | None, success: float = 1.0) -> Callable[[str, str], Graded]:
  """`function` as a grader of (response, answer).

  Its parameters called response, answer and pattern get what they are called, those without a default also by other libraries'
  names (completion, ground_truth: _MEANT); a response or an answer that no parameter is called goes to the next one in order that
  has no default. Others keep their defaults. A reward of at least `success` is "correct".
  Raises TypeError for what cannot be called like that; the grader raises NoReward where the result is no finite number.
  """
  positional, named = _places(function)

  def run(response: str, answer: str) -> Graded:
    values = {"response": response, "answer": answer, "pattern": pattern}
    reward = as_reward(function(*(values[role] for role in positional), **{name: values[role] for name, role in named.items()}))
    return Graded(reward, "correct" if reward >= success else "wrong")

  return run


def _roles(parameters: Iterable[inspect.Parameter]) -> dict[str, str]:
  """The parameters, by name, that say themselves which of response, answer and pattern they take."""
  parameters = [p for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
  roles = {p.name: p.name for p in parameters if p.name in ("response", "answer", "pattern")}
  for p in parameters:
    role = _MEANT.get(p.name.lower())
    if role is not None and p.default is p.empty and role not in roles.values():
      roles[p.name] = role
  return roles


def _called(function: Callable) -> tuple:
  """What may run when this is called: itself without a partial's arguments, and an object's __call__."""
  while isinstance(function, functools.partial):
    function = function.func
  return function, type(function).__call__


def _places(function: Callable) -> tuple[list[str], dict[str, str]]:
  """Which of response, answer and pattern a function takes by position, in their order, and which by name: {parameter: which}."""
  if inspect.isclass(function) or not callable(function):
    raise TypeError(f"it is {'a class' if inspect.isclass(function) else type(function).__name__!r}, not a function")
  kinds = inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction
  if any(kind(called) for kind in kinds for called in _called(function)):
    raise TypeError("it is a coroutine or a generator; a plain function that returns a number is needed (asyncio.run inside)")
  try:
    signature = inspect.signature(function)
  except ValueError as e:
    raise TypeError(f"its parameters cannot be read ({e})") from e
  parameters = signature.parameters.values()
  wants = f"it is called with (response, answer) and takes {signature}"
  roles = _roles(parameters)
  left = [role for role in ("response", "answer") if role not in roles.values()]
  positional, named, in_order = [], {}, True  # in_order: no parameter before this one was left to its default
  for p in parameters:
    role = roles.get(p.name)
    if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD):
      if role is None and left and p.default is p.empty:
        role = left.pop(0)
      if role is None and p.default is p.empty:
        raise TypeError(f"{wants}: nothing to give {p.name}")
      if role is None:
        in_order = False
      elif in_order:
        positional.append(role)
      elif p.kind is p.POSITIONAL_ONLY or p.name not in roles:
        raise TypeError(f"{wants}: {p.name} comes after a parameter with a default")
      else:
        named[p.name] = role
    elif p.kind is p.VAR_POSITIONAL and in_order:
      positional, left = positional + left, []
    elif p.kind is p.KEYWORD_ONLY:
      if role is None and p.default is p.empty:
        raise TypeError(f"{wants}: nothing to give {p.name}")
      if role is not None:
        named[p.name] = role
    elif p.kind is p.VAR_KEYWORD:
      named, left = named | {role: role for role in left}, []
  if left:
    raise TypeError(f"{wants}: no parameter for the {' and the '.join(left)}; call one so")
  return positional, named


def as_reward(value) -> float:
  """A reward function's result as a float; NoReward unless it is a finite real number up to LARGEST (0-d arrays and True are)."""
  if inspect.iscoroutine(value):
    value.close()
    raise NoReward("it returned a coroutine, which is no number; return asyncio.run(...) of it")
  is_number = (hasattr(type(value), "__float__") and not isinstance(value, str) and getattr(value, "shape", ()) == ()
               and not (isinstance(value, numbers.Complex) and not isinstance(value, numbers.Real)))
  reward = float(value) if is_number else math.nan
  if not math.isfinite(reward):
    raise NoReward(f"it returned {_short(value, repr)}, which is no finite number")
  if abs(reward) > LARGEST:
    raise NoReward(f"it returned {_short(value, repr)}, which is larger than {LARGEST:g}")
  return reward


def _short(value, say: Callable[[object], str]) -> str:
  """One line of at most 200 characters, whatever the value is."""
  try:
    text = " ".join(say(value).split())
  except Exception:
    text = f"a {type(value).__name__}"
  return text if len(text) <= 200 else text[:200] + "..."


def limit_memory(memory_mb: int) -> None:
  """Lets this process's address space grow by `memory_mb` MiB from here; the imports are not counted."""
  try:
    with open("/proc/self/statm") as statm:
      used = int(statm.read().split()[0]) * resource.getpagesize()
  except FileNotFoundError:  # no Linux: there is no such limit to set
    return
  _, hard = resource.getrlimit(resource.RLIMIT_AS)
  limit = used + memory_mb * 2**20 if hard == resource.RLIM_INFINITY else min(used + memory_mb * 2**20, hard)
  resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
  resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
