"""The trial: does pruning win at equal wall clock? Runs what is missing, and makes the page from files alone.

  python -m experiments.trial --run --minutes=8 --devices=4 --scale=gpu --model=DIR/model.gguf --data=DIR  #  until all is there
  python -m experiments.trial --table --scale=gpu              # writes table_gpu.md and a plot a regime into results/trial
  python -m experiments.trial --run --table                    # the cpu scale: that all of it works, nothing more

--regime=NAME,NAME, --arms=NAME,NAME and --seeds=N (the first so many of each arm) choose among them; learning rates are chosen
only if that regime is named. --devices=N runs so many at a time, each in a process that sees one device (trial_devices.py);
without it runs follow one another in this process. Ctrl-C, SIGTERM and the end of the minutes save the last step of each run;
allow two minutes for it. --votes: runs that may vote keep their policy, and votes come behind all runs. Where there is no git,
--commit says which commit it is. --dry lists the commands that --run would give. Arms, seeds and budgets stand in
trial_arms.py, statistics in trial_page.py.
"""

from collections import Counter
import math
import sys
import time

from absl import flags

from arrol_jax.running import streams
from arrol_jax.types import UserError
from experiments import trial_devices, trial_queue
from experiments.runs import read_flags
from experiments.trial_arms import DEFAULT, REGIMES, RESULTS, ROOT, Regime, Run, runs_of
from experiments.trial_queue import Call


def parse(argv: list[str]) -> flags.FlagValues:
  values = flags.FlagValues()
  flags.DEFINE_enum("scale", "cpu", list(DEFAULT), "which regimes", flag_values=values)
  for name in ("run", "table", "dry", "votes"):
    flags.DEFINE_bool(name, False, "see above", flag_values=values)
  flags.DEFINE_float("minutes", None, "with --run: stop after so many", lower_bound=0, flag_values=values)
  flags.DEFINE_integer("devices", None, "with --run: so many runs at a time", lower_bound=1, flag_values=values)
  flags.DEFINE_integer("worker", None, "which of them this process is, set by the one that starts it", flag_values=values)
  flags.DEFINE_integer("seeds", None, "only the first so many of each arm", lower_bound=1, flag_values=values)
  for name in ("model", "data", "commit"):
    flags.DEFINE_string(name, "", "see above", flag_values=values)
  for name in ("regime", "arms"):
    flags.DEFINE_list(name, [], "only these", flag_values=values)
  read_flags(values, argv, __doc__, "see --help")
  return values


def chosen(values: flags.FlagValues) -> tuple[list[Regime], list[Run]]:
  """The regimes asked for, and their runs in the order of the queue."""
  names = values.regime or DEFAULT[values.scale]
  unknown = [name for name in names if name not in REGIMES or REGIMES[name].scale != values.scale]
  if unknown:
    known = ", ".join(r.name for r in REGIMES.values() if r.scale == values.scale)
    raise UserError(f"--regime={unknown[0]}: scale {values.scale} has {known}")
  regimes = [REGIMES[name] for name in names]
  unknown = [arm for arm in values.arms if not any(arm in regime.seeds for regime in regimes)]
  if unknown:
    raise UserError(f"--arms={unknown[0]}: no arm of {', '.join(names)}, which have {', '.join(regimes[0].seeds)}")
  waiting = [regime for regime in regimes if regime.waits] if values.run or values.dry else []
  for regime in waiting:
    said = f"{regime.name}'s learning rates are chosen by {regime.waits}"
    if values.regime:
      raise UserError(f"--regime={regime.name}: {said}, whose runs are not all there; give --regime={regime.waits} first")
    print(f"# left out: {said}, which runs only if it is named")
  wanted = lambda run: ((not values.arms or run.arm in values.arms)
                        and (not values.seeds or run.seed < run.regime.first + values.seeds))
  return regimes, [run for regime in regimes if regime not in waiting for run in filter(wanted, runs_of(regime))]


def run(values: flags.FlagValues, runs: list[Run]) -> None:
  """What is missing of `runs`, here or on several devices."""
  streams.spare()
  version = {"commit": trial_queue.commit_of(values.commit), "code": trial_queue.code_hash()}
  deadline = math.inf if values.minutes is None else time.monotonic() + 60 * values.minutes
  call = Call(version, values.model, values.data, deadline, votes=values.votes)
  if values.devices:
    command = ["-m", "experiments.trial", *sys.argv[1:], f"--commit={version['commit']}"]
    finished = trial_devices.start(command, values.devices, runs, call, "cuda" if values.scale == "gpu" else None)
  else:
    finished = trial_queue.start(runs, call)
  print(progress(runs) + ("" if finished else "; time is over, and the same command goes on"), flush=True)


def work(values: flags.FlagValues, runs: list[Run]) -> None:
  """What one of --devices does."""
  streams.spare()
  version = {"commit": values.commit, "code": trial_queue.code_hash()}
  call = Call(version, values.model, values.data, time.monotonic() + 60 * values.minutes, name=f"device {values.worker}: ",
              votes=values.votes, quiet=True, fresh=True)
  sys.exit(trial_devices.work(values.worker, values.devices, runs, call))


def progress(runs: list[Run]) -> str:
  """How many runs are in which state."""
  counts = Counter(map(trial_queue.state, runs))
  return f"{len(runs)} runs: " + ", ".join(f"{counts[name]} {name}" for name in ("done", "failed", "begun", "missing"))


def write_page(values: flags.FlagValues) -> None:
  from experiments import trial_page  # it draws: what runs does not need matplotlib
  shown = values.regime or [r.name for r in REGIMES.values() if r.scale == values.scale]
  path = ROOT / RESULTS / f"table_{values.scale}.md"
  path.parent.mkdir(parents=True, exist_ok=True)
  text = trial_page.page([REGIMES[name] for name in shown])
  path.write_text(text)
  print(text)


def main():
  values = parse(sys.argv)
  regimes, runs = chosen(values)
  if values.worker is not None:
    work(values, runs)
  if values.scale == "gpu" and (values.run or values.dry) and not (values.model and values.data):
    raise UserError("the gpu scale needs --model=DIR/model.gguf and --data=DIR")
  if not (values.dry or values.run or values.table):
    raise UserError("give --run, --table or --dry; see --help")
  if values.dry:
    for one in runs:
      print(f"# {one.regime.name}/{one.name}: {trial_queue.state(one)}\npython -m "
            f"{' '.join(one.training(values.model, values.data, values.votes and one.votes))}")
    print(f"# {progress(runs)}")
  elif values.run:
    run(values, runs)
  if values.table:
    write_page(values)


if __name__ == "__main__":
  from arrol_jax import config
  config.run(main)
