"""Programs, listed with what they are given, and compiled side by side before any of them runs.

A list is made from shapes alone; nothing here runs anything. Which programs there are: step_programs.py for a training step,
serving/warming.py for a server. Those that an earlier run kept whole are read in place of being compiled: kept.py.
"""

from collections.abc import Callable, Iterator
import concurrent.futures
import contextlib
import os
import sys
import threading
import time
from typing import NamedTuple

import jax
from jax.sharding import Mesh

from arrol_jax.running.kept import Shelf


class Program(NamedTuple):
  """A jitted program with what it is given. args(results) makes its arguments, arrays or shapes with shardings, from the
  results of the programs that it needs, by their names."""
  name: str
  jitted: Callable
  args: Callable[[dict], tuple]
  static: dict
  needs: tuple[str, ...] = ()
  runs: int = 1           # a training step, at most
  unknown_trips: int = 1  # of a loop whose length the compiler does not know
  small: bool = False     # works on a few scalars or bins


def given(tree) -> tuple:
  """What a program is compiled for, of its arguments: shapes, dtypes and shardings of arrays, all else itself."""
  leaves, structure = jax.tree.flatten(tree)
  array = lambda x: (x.shape, str(x.dtype), str(getattr(x, "sharding", None)))
  return structure, *(array(x) if hasattr(x, "shape") else repr(x) for x in leaves)


_COMPILING = "compiling"  # how threads that compile are called


def compiling() -> bool:
  """Whether threads of `compile_ahead` are at work, as after a caller has left it: the interpreter would wait for them."""
  return any(thread.name.startswith(_COMPILING) for thread in threading.enumerate())


def compile_ahead(programs: list[Program], mesh: Mesh, report: Callable | None = None,
                  left: threading.Event | None = None, shelf: Shelf | None = None) -> float:
  """Compiles all programs, side by side on the host's cores as far as they do not need each other; returns the seconds taken.

  report(done, of, seconds) is called as each is ready. left: once it is set, nothing more is begun, and CancelledError raised.
  shelf: where programs are kept; those that are there are read. What is ready is found again when it is called with such
  arguments.
  """
  start, results, begun = time.perf_counter(), {}, {}
  tracing = threading.Lock()  # one at a time: it holds Python's lock all the while, and others would only wait for that

  def one(program: Program):
    if left and left.is_set():
      raise concurrent.futures.CancelledError
    with jax.set_mesh(mesh):
      args = program.args(results)
    key = program.jitted, given((args, program.static))
    made = concurrent.futures.Future()
    if (same := begun.setdefault(key, made)) is not made:  # the same by another name
      return same.result()
    try:
      with jax.set_mesh(mesh):
        ready = shelf and shelf.load(program.jitted, args, program.static)
        if not ready:
          with tracing:
            lowered = program.jitted.lower(*args, **program.static)
          ready = shelf.compiled(lowered, program.jitted, args, program.static) if shelf else lowered.compile()
      shape = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
      made.set_result(jax.tree.map(shape, ready.out_info, ready.output_shardings))
    except BaseException as e:
      made.set_exception(e)
    return made.result()

  waiting, running = list(programs), {}
  with concurrent.futures.ThreadPoolExecutor(os.cpu_count(), _COMPILING) as pool:
    try:
      while waiting or running:
        ready = [p for p in waiting if all(name in results for name in p.needs)]
        waiting = [p for p in waiting if p not in ready]
        running |= {pool.submit(one, p): p for p in ready}
        for future in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)[0]:
          results[running.pop(future).name] = future.result()
          report and report(len(results), len(programs), time.perf_counter() - start)
    except BaseException:  # what report raises ends it as soon as what is being compiled is done
      pool.shutdown(wait=False, cancel_futures=True)
      raise
  return time.perf_counter() - start


_TURN, _turns, _usual = 0.0002, threading.Lock(), []  # seconds; the interpreter's own, once for each that is within short_turns


@contextlib.contextmanager
def short_turns() -> Iterator[None]:
  """Threads wait at most _TURN seconds for Python's lock. Several may be within; what was usual comes back with the last."""
  with _turns:
    _usual.append(_usual[0] if _usual else sys.getswitchinterval())
    sys.setswitchinterval(min(_usual[0], _TURN))
  try:
    yield
  finally:
    with _turns:
      usual = _usual.pop()
      if not _usual:
        sys.setswitchinterval(usual)


class CompilingAhead:
  """`compile_ahead` in a thread, from `with` on, while the caller does other things; a caller that leaves before all are there
  ends it as soon as what is being compiled is done; a process that ends then need not wait for that (`compiling`). What came
  from the shelf is in use until then.

  Tracing holds Python's lock. Who reads weights meanwhile needs that often and briefly, and would wait 5 ms each time (Python's
  default) until it is let in: `short_turns`.
  """

  def __init__(self, programs: list[Program], mesh: Mesh, shelf: Shelf | None = None):
    self.count, self.done, self.left, self.shelf = len(programs), 0, threading.Event(), shelf
    self.thread = concurrent.futures.ThreadPoolExecutor(1, _COMPILING)
    self.seconds = self.thread.submit(self._compile, programs, mesh)

  def _compile(self, programs: list[Program], mesh: Mesh) -> float:
    with short_turns():
      seconds = compile_ahead(programs, mesh, self._note, self.left, self.shelf)
    self.shelf and self.shelf.tidy()
    return seconds

  def _note(self, done: int, *_) -> None:
    self.done = done

  def wait(self, report: Callable) -> float:
    """Seconds that all programs took, once they are there; report(how many are) is called several times a second until then."""
    while not self.seconds.done():
      concurrent.futures.wait([self.seconds], timeout=0.2)
      report(self.done)
    return self.seconds.result()

  def said(self) -> str:
    """What was done, in words."""
    read = len(self.shelf.loaded) if self.shelf else 0
    compiled = self.count - read
    return " and ".join([f"compiled {compiled}"] * (compiled > 0) + [f"read {read}"] * (read > 0)) + " programs"

  def __enter__(self) -> "CompilingAhead":
    return self

  def __exit__(self, *_exception) -> None:
    self.left.set()
    self.thread.shutdown(wait=self.seconds.done())
    self.shelf and self.shelf.forget()
