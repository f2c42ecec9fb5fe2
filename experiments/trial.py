"""The trial: does pruning win at equal wall clock? Runs what is missing, and makes the page from files alone.

  python -m experiments.trial --run --minutes=8 --devices=4 --scale=gpu --model=DIR/model.gguf --data=DIR  #  until all is there
  python -m experiments.trial --table --scale=gpu              # writes table_gpu.md and a plot a regime into results/trial
  python -m experiments.trial --run --table                    # the cpu scale: that all of it works, nothing more

--regime=NAME,NAME, --arms=NAME,NAME and --seeds=N (the first N of a regime) or --seeds=82-86 (these) choose among them; a
table of what was chosen is printed and not kept. Regimes that choose learning rates (NAME_tuning) run only if named, in a call
before the one that runs the regime that takes these rates. A regime of which runs are there is gone on with only by their code.
--devices=N runs so many at a time, each in a process that sees one device (trial_devices.py); without it runs follow one another
in this process. Ctrl-C, SIGTERM and the end of the minutes save the last step of each run; allow two minutes for it. --votes:
runs that may vote keep their policy, and votes come behind all runs. Where there is no git, --commit says which commit it is.
--dry lists the commands that --run would give. Arms, seeds and budgets stand in trial_arms.py, statistics in trial_page.py.
"""

from collections import Counter
from collections.abc import Callable
import dataclasses
import math
from pathlib import Path
import re
import shlex
import sys
import time

from absl import flags

from arrol_jax.running import streams
from arrol_jax.types import UserError
from experiments import trial_devices, trial_queue, trial_refused
from experiments.runs import read_flags
from experiments.trial_arms import DEFAULT, REGIMES, RESULTS, ROOT, Regime, Run, runs_of
from experiments.trial_queue import Call

NOTHING = "no run is of these regimes, arms and seeds"


def parse(argv: list[str]) -> flags.FlagValues:
  values = flags.FlagValues()
  flags.DEFINE_enum("scale", None, list(DEFAULT), "which regimes, where none is named", flag_values=values)
  for name in ("run", "table", "dry", "votes"):
    flags.DEFINE_bool(name, False, "see above", flag_values=values)
  flags.DEFINE_float("minutes", None, "with --run: stop after so many", lower_bound=0, flag_values=values)
  flags.DEFINE_integer("devices", None, "with --run: so many runs at a time", lower_bound=1, flag_values=values)
  flags.DEFINE_integer("worker", None, "which of them this process is, set by the one that starts it", flag_values=values)
  for name in ("model", "data", "commit", "seeds"):
    flags.DEFINE_string(name, "", "see above", flag_values=values)
  for name in ("regime", "arms"):
    flags.DEFINE_list(name, [], "only these", flag_values=values)
  read_flags(values, argv, __doc__, "see --help")
  if not values.scale:
    values.scale = next((REGIMES[name].scale for name in values.regime if name in REGIMES), "cpu")
  if values.worker is not None and None in (values.devices, values.minutes):
    raise UserError("--worker is what --devices gives to the processes that it starts")
  return values


def chosen(values: flags.FlagValues) -> list[Regime]:
  """The regimes asked for."""
  names = list(dict.fromkeys(values.regime)) or DEFAULT[values.scale]
  for name in names:
    if name not in REGIMES:
      raise UserError(f"--regime={name}: there are {', '.join(REGIMES)}")
    if REGIMES[name].scale != values.scale:
      raise UserError(f"--regime={name}: it is of scale {REGIMES[name].scale}, not {values.scale}")
  regimes = [REGIMES[name] for name in names]
  arms = dict.fromkeys(arm for regime in regimes for arm in regime.seeds)
  for arm in values.arms:
    if arm not in arms:
      raise UserError(f"--arms={arm}: no arm of {', '.join(names)}, which have {', '.join(arms)}")
  return regimes


def selection(values: flags.FlagValues) -> Callable[[Run], bool]:
  """Which runs --arms and --seeds ask for."""
  seeds = re.fullmatch(r"([1-9]\d*)(?:-(\d+))?", values.seeds) if values.seeds else None
  first, last = (int(x) if x else None for x in seeds.groups()) if seeds else (None, None)
  if values.seeds and (not seeds or last is not None and last < first):
    raise UserError(f"--seeds={values.seeds}: give a number of seeds, or the first and the last as in 82-86")
  in_range = lambda run: first <= run.seed <= last if last is not None else run.seed < run.regime.first + first
  return lambda run: (not values.arms or run.arm in values.arms) and (first is None or in_range(run))


def to_run(values: flags.FlagValues, call: Call) -> list[Run]:
  """The runs asked for in the order of the queue, but for regimes that cannot be run now; UserError if those were named, or if
  there is no such run."""
  regimes, wanted = chosen(values), selection(values)
  if not any(wanted(run) for regime in regimes for run in runs_of(regime)):
    raise UserError(NOTHING)

  def left_out(line: str):
    if values.worker is None:  # each of them would say it again
      print(f"# left out: {line}", flush=True)

  if not (runs := trial_refused.ready(regimes, wanted, call, None if values.regime else left_out)):
    raise UserError("none of it can be run now")
  return runs


def call_of(values: flags.FlagValues, commit: str) -> Call:
  version = {"commit": commit, "code": trial_queue.code_hash()}
  deadline = math.inf if values.minutes is None else time.monotonic() + 60 * values.minutes
  model, data = (str(Path(x).absolute()) if x and Path(x).exists() else x for x in (values.model, values.data))
  return Call(version, model, data, deadline, votes=values.votes, platform="gpu" if values.scale == "gpu" else "")


def run(values: flags.FlagValues, call: Call) -> None:
  """What is missing of the runs asked for, here or on several devices."""
  streams.spare()
  runs = to_run(values, call)
  if values.devices and next(trial_queue.to_do(runs, call), None):
    command = ["-m", "experiments.trial", *sys.argv[1:], f"--commit={call.version['commit']}", f"--model={call.model}",
               f"--data={call.data}"]
    finished = trial_devices.start(command, values.devices, runs, call, "cuda" if values.scale == "gpu" else None)
  else:
    finished = trial_queue.start(runs, call)
  print(progress(runs) + ("" if finished else "; stopped before all was done, and the same command goes on"), flush=True)


def work(values: flags.FlagValues) -> None:
  """What one of --devices does."""
  streams.spare()
  call = dataclasses.replace(call_of(values, values.commit), name=f"device {values.worker}: ", quiet=True, fresh=True)
  sys.exit(trial_devices.work(values.worker, values.devices, to_run(values, call), call))


def progress(runs: list[Run]) -> str:
  """How many runs are in which state."""
  counts = Counter(map(trial_queue.state, runs))
  return f"{len(runs)} runs: " + ", ".join(f"{counts[name]} {name}" for name in ("done", "failed", "begun", "missing"))


def write_page(values: flags.FlagValues) -> None:
  """Of everything into its file; of what was chosen to standard output alone."""
  from experiments import trial_page  # it draws: what runs does not need matplotlib
  if values.regime or values.arms or values.seeds:
    wanted = selection(values)
    regimes = [regime for regime in chosen(values) if any(map(wanted, runs_of(regime)))]
    if not regimes:
      raise UserError(NOTHING)
    given = {name: values[name].value for name in ("regime", "arms", "seeds")}
    said = " ".join(f"--{name}={','.join(x) if isinstance(x, list) else x}" for name, x in given.items() if x)
    print(f"Of {said} alone, printed and not kept.\n\n{trial_page.page(regimes, wanted)}")
    return
  path = ROOT / RESULTS / f"table_{values.scale}.md"
  path.parent.mkdir(parents=True, exist_ok=True)
  text = trial_page.page([r for r in REGIMES.values() if r.scale == values.scale])
  path.write_text(text)
  print(text)


def dry(values: flags.FlagValues) -> None:
  """The commands of what is missing."""
  try:
    commit = trial_queue.commit_of(values.commit)
  except UserError as e:
    commit = ""
    print(f"# --run would be refused: {e}")
  call = call_of(values, commit)
  print(f"# commit {commit or 'not known'}, code {call.version['code']}")
  runs = to_run(values, call)
  for one in runs:
    if trial_queue.missing(one, "train"):
      print(f"# {one.regime.name}/{one.name}: {trial_queue.state(one)}\npython -m "
            f"{shlex.join(one.training(values.model, values.data, values.votes and one.votes))}")
  print(f"# {progress(runs)}")


def main():
  values = parse(sys.argv)
  chosen(values)
  selection(values)  # both: what is asked for, before any file or commit is looked at
  if values.scale == "gpu" and (values.run or values.dry) and not (values.model and values.data):
    raise UserError("the gpu scale needs --model=DIR/model.gguf and --data=DIR")
  if not (values.dry or values.run or values.table):
    raise UserError("give --run, --table or --dry; see --help")
  if values.worker is not None:
    work(values)
  elif values.dry:
    dry(values)
  elif values.run:
    run(values, call_of(values, trial_queue.commit_of(values.commit)))
  if values.table:
    write_page(values)


if __name__ == "__main__":
  from arrol_jax import config
  config.run(main)
