"""Several processes, one schedule: connecting them, sharing out what the host does, stopping together.

Every process runs the same program on the same arguments, and whatever decides what is dispatched next is either computed
from the config, the seed and the step, or read from arrays that every process holds whole (scheduler.py brings a segment's few
results to all). So all processes dispatch the same programs in the same order, and nobody has to be told what to do. What may
differ between hosts goes through here: files (`agree`), host work that is shared out (`spread`, `mine`, `gather`), mistakes that
one host alone meets (`together`), and signals (`Watch`). With one process all of this does nothing.
"""

from collections.abc import Callable
import contextlib
import functools
import gc
import glob
import importlib.util
import os
import pickle
import signal
import sys
import threading
import time

import jax
from jax.experimental import multihost_utils
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np
from tqdm import tqdm

from arrol_jax.running import streams
from arrol_jax.types import UserError

CARD_SHARE = 0.94  # of a GPU's memory that programs may fill; its driver and libraries take the rest. JAX itself would take 0.75
_DEAD_S = 30  # seconds without a sign of life after which a process counts as lost, and the others end
_LAST_WORDS_S = 3  # seconds by which the first process, which holds the others' connections, leaves later than they


class Preempted(BaseException):
  """A signal (its name) has come to one of the processes; all of them raise this at the same boundary. No Exception: libraries
  swallow those."""


def connect() -> None:
  """Joins the run's other processes, where the environment names any; before anything else asks JAX for devices.

  JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID, all three, or Slurm, or a TPU pod, which need none.
  Raises UserError where some of the three are missing or no numbers.
  """
  names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
  given = [os.environ.get(name) for name in names]
  if jax.distributed.is_initialized():
    return
  if any(given):
    if not (all(given) and given[1].isdigit() and given[2].isdigit() and ":" in given[0]):
      raise UserError("several processes need all of " + ", ".join(f"{n} ({v or 'not set'})" for n, v in zip(names, given)) +
                      ": HOST:PORT and two numbers")
    _initialize(given[0], int(given[1]), int(given[2]))
  elif _slurm_tasks() > 1 or _on_tpu():
    _initialize()


def _initialize(*place) -> None:
  try:
    jax.distributed.initialize(*place, heartbeat_timeout_seconds=_DEAD_S)
  except (RuntimeError, ValueError, KeyError, AssertionError) as e:
    raise UserError(f"this process cannot join the run's others ({type(e).__name__}: {' '.join(str(e).split())[:300]}); "
                    "docs/pods.md says what each needs in its environment") from e


def _slurm_tasks() -> int:
  """How many processes srun has started for this run. UserError where Slurm's environment asks for several without srun."""
  text = os.environ.get("SLURM_NTASKS", "1")
  if not text.isdigit():
    raise UserError(f"SLURM_NTASKS is {text!r}, no number; unset it, or start with srun")
  in_step = "SLURM_STEP_NODELIST" in os.environ and os.environ.get("SLURM_STEP_NUM_TASKS", text) == text
  if int(text) > 1 and not (in_step and {"SLURM_JOB_ID", "SLURM_PROCID", "SLURM_LOCALID"} <= os.environ.keys()):
    raise UserError(f"SLURM_NTASKS={text}, and this process was not started by srun: put srun before the command for {text} "
                    "processes, or unset SLURM_NTASKS for one")
  return int(text)


def check_devices() -> None:
  """UserError where JAX finds no device of the kind that its environment asks for.

  Before the first look, GPUs are told, where XLA_FLAGS do not speak of it (measured: experiments/LOG.md), to leave matrix
  products to their vendor's library, which is faster in decoding and in the update than the kernels that XLA's search takes
  instead, and saves the search; and to put all kernels into graphs, however few stand together, so that small batches decode
  faster.
  """
  flags = os.environ.get("XLA_FLAGS", "").split()
  from_file = flags and not flags[0].startswith("--")  # XLA takes the name of a file with flags, and nothing beside it
  for name, value in (("xla_gpu_enable_triton_gemm", "false"), ("xla_gpu_graph_min_graph_size", "1")) if not from_file else ():
    if not any(name in flag for flag in flags):
      flags.append(f"--{name}={value}")
  os.environ["XLA_FLAGS"] = " ".join(flags)
  try:
    jax.devices()
  except (RuntimeError, AssertionError) as e:  # JAX asserts where no plugin for the platform is installed
    asked = os.environ.get("JAX_PLATFORMS") or jax.config.jax_platforms or ""
    reason = ": " + " ".join(str(e).split()).rstrip(".") if str(e) else ""
    raise UserError(f"JAX_PLATFORMS={asked}: JAX finds no such device here{reason}; unset it to take what there is, or set "
                    "JAX_PLATFORMS=cpu") from e


def _on_tpu() -> bool:
  """Whether this host has TPU chips and the library to use them, and is not told to leave them alone."""
  chips = glob.glob("/dev/accel[0-9]*") + glob.glob("/dev/vfio/[0-9]*")
  return bool(chips and importlib.util.find_spec("libtpu") and os.environ.get("JAX_PLATFORMS", "tpu").startswith("tpu"))


def several() -> bool:
  """Whether this run has more than one process (told without starting a backend)."""
  return jax.distributed.is_initialized() and jax.process_count() > 1


def first() -> bool:
  """Whether this process is the one that writes and speaks."""
  return not several() or jax.process_index() == 0


def say(text: str) -> None:
  """Prints a line, once for all processes. Where it cannot be written (streams.py) is no reason to stop."""
  if first():
    with contextlib.suppress(OSError):
      print(text, flush=True)


def warn(text: str) -> None:
  """Prints a warning of one line to stderr, once for all processes."""
  if first():
    tqdm.write(f"warning: {text}", file=sys.stderr)  # a line of its own, not behind a progress bar


def gather(value) -> list:
  """Every process's `value` (anything that pickles), in the order of the processes. All must call it."""
  if not several():
    return [value]
  jax.block_until_ready(Watch.asked)  # two collectives at once may wait for each other for ever
  data = np.frombuffer(pickle.dumps(value), np.uint8)
  sizes = multihost_utils.process_allgather(np.int32([len(data)])).ravel()
  padded = np.zeros(1 << int(sizes.max() - 1).bit_length(), np.uint8)  # few shapes: each is compiled
  padded[:len(data)] = data
  rows = multihost_utils.process_allgather(padded)
  return [pickle.loads(row[:size].tobytes()) for row, size in zip(rows, sizes, strict=True)]


def agree(value):
  """The first process's `value`, for all: what one saw on a file system that others may see a moment later."""
  return gather(value if first() else None)[0]


def together(work: Callable):
  """work(), or its UserError on every process where it fails on any: nobody waits for one that has stopped."""
  try:
    result, problem = work(), None
  except UserError as e:
    result, problem = None, str(e)
  problems = gather(problem)
  for i, text in enumerate(problems):
    if text:
      raise UserError(text if len(problems) == 1 else f"process {i}: {text}")
  return result


def mine(number: int) -> bool:
  """Whether this process does piece `number` of work that is shared out."""
  return not several() or number % jax.process_count() == jax.process_index()


def spread(work: Callable, items: list) -> list:
  """[work(x) for x in items], each process doing its share."""
  parts = gather([work(x) for i, x in enumerate(items) if mine(i)])
  return [parts[i % len(parts)][i // len(parts)] for i in range(len(items))]


def wake_devices() -> None:
  """A first transfer to this process's devices, in a thread, while the caller does something else: a GPU's takes a second. What
  is wrong with them is told where they are needed."""
  def work():
    with contextlib.suppress(Exception):
      jax.block_until_ready(jax.device_put([np.zeros(1)] * jax.local_device_count(), jax.local_devices()))
  threading.Thread(target=work, name="wake devices").start()


def leave(status: int) -> None:
  """Ends this process now. A normal end would wait for its threads, and for the other processes, which then end too."""
  sys.stdout.flush()
  sys.stderr.flush()
  if several() and first():
    time.sleep(_LAST_WORDS_S)
  os._exit(status)


_own_process = False


def own_process() -> bool:
  """Whether this process is one of the package's commands, not another program's, which may have replaced parts of it."""
  return _own_process


def take_process() -> None:
  """This process is one of the package's commands from now on."""
  global _own_process
  _own_process = True


def settle() -> None:
  """What is there now stays: Python's collector, which takes some hundred milliseconds for all of it each time, leaves it out
  from now on. Only in a process of our own."""
  if own_process():
    gc.collect()
    gc.freeze()


def begin() -> None:
  """What an entry point does first."""
  streams.take()
  if not {"XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"} & set(os.environ):  # JAX refuses both names at once
    os.environ["XLA_PYTHON_CLIENT_MEM_FRACTION"] = str(CARD_SHARE)
  if not {"", os.getcwd()} & set(sys.path):  # a console script has its own folder there; reward.function may be in this one
    sys.path.append(os.getcwd())
  if getattr(signal.getsignal(signal.SIGINT), "__module__", None) == "arrol_jax":  # all is imported: KeyboardInterrupt again
    signal.signal(signal.SIGINT, signal.default_int_handler)


def process(run: Callable[[], None], busy: Callable[[], bool] = lambda: False) -> None:
  """The whole process: run(), then its exit status. Threads that are still at work then (busy) are not waited for."""
  take_process()
  status = 0
  try:
    run()
  except SystemExit as e:
    status = e.code or 0
  if busy():
    leave(status)
  sys.exit(status)


class Compiling:
  """Counts the seconds that this process spends compiling."""

  def __init__(self):
    self.total = 0.0
    jax.monitoring.register_event_duration_secs_listener(self._note)

  def _note(self, event: str, seconds: float, **_) -> None:
    if event.endswith("backend_compile_duration"):
      self.total += seconds

  def seconds(self) -> float:
    """Since the last call."""
    out, self.total = self.total, 0.0
    return out


class Watch:
  """Notes SIGTERM, Ctrl-C and SIGHUP, and raises Preempted at the same call of `check` in every process. A second Ctrl-C is
  Python's own: KeyboardInterrupt at once. What the caller's caller ignores (nohup, a background job) stays ignored.

  at_once: while it holds, the signal itself raises Preempted: for one process that has nothing to save yet.
  """

  SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
  asked: jax.Array | None = None  # whether any process was told to stop, as this one last asked

  def __init__(self, at_once: bool = False):
    self.at_once, self.told = at_once, ""  # told: the signal's name

  def __enter__(self) -> "Watch":
    Watch.asked = None
    watched = [s for s in self.SIGNALS if s == signal.SIGTERM or signal.getsignal(s) != signal.SIG_IGN]
    self.before = {s: signal.signal(s, self._note) for s in watched}
    return self

  def __exit__(self, *_exception) -> None:
    for number, handler in self.before.items():
      signal.signal(number, handler)

  def _note(self, number: int, _frame) -> None:
    self.told = self.told or signal.Signals(number).name
    if self.at_once:
      raise Preempted(self.told)
    if number == signal.SIGINT:
      signal.signal(number, signal.default_int_handler)
      with contextlib.suppress(OSError):  # print is not to be called in the middle of another print
        os.write(2, b"\nSIGINT: the run saves its last step and ends; once more ends it at once\n")

  def check(self) -> None:
    """Call it at the same places in every process. The others' answer is read one call later: by then it is there."""
    if not several():
      stop = bool(self.told)
    else:
      stop, Watch.asked = Watch.asked is not None and bool(Watch.asked), _any(bool(self.told))
    if stop:
      raise Preempted(next(filter(None, gather(self.told)), "SIGTERM"))


def _any(flag: bool) -> jax.Array:
  """Whether any process's flag is set, bool[], without waiting for it."""
  by_device, program = _any_program()
  return program(jax.make_array_from_callback((jax.device_count(),), by_device, lambda _: np.array([flag])))


@functools.cache
def _any_program() -> tuple:
  mesh = Mesh(np.array(jax.devices()), ("devices",))
  return NamedSharding(mesh, PartitionSpec("devices")), jax.jit(jnp.any, out_shardings=NamedSharding(mesh, PartitionSpec()))
