"""The trial: does pruning win at equal wall clock? Runs what is missing, and makes the page from files alone.

  python -m experiments.trial --run --minutes=9 --scale=gpu --model=DIR/model.gguf --data=DIR    # again until all is there
  python -m experiments.trial --table --scale=gpu              # writes table_gpu.md and a plot a regime into results/trial
  python -m experiments.trial --run --table                    # the cpu scale: that all of it works, nothing more

--regime=NAME,NAME and --arms=NAME,NAME choose among them (the regime "tuning" runs only if named). Where there is no git,
--commit says which it is. --dry lists the commands that --run would give. Arms, seeds and budgets stand in trial_arms.py,
statistics in trial_page.py.
"""

import sys

from absl import flags
import matplotlib

from arrol_jax.types import UserError
from experiments import trial_page, trial_queue
from experiments.tables import read_flags
from experiments.trial_arms import DEFAULT, REGIMES, RESULTS, ROOT, Regime, Run, runs_of

matplotlib.use("Agg")


def parse(argv: list[str]) -> flags.FlagValues:
  values = flags.FlagValues()
  flags.DEFINE_enum("scale", "cpu", list(DEFAULT), "which regimes", flag_values=values)
  for name in ("run", "table", "dry"):
    flags.DEFINE_bool(name, False, "see above", flag_values=values)
  flags.DEFINE_float("minutes", None, "with --run: stop after so many", lower_bound=0, flag_values=values)
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
  return regimes, [run for regime in regimes for run in runs_of(regime) if not values.arms or run.arm in values.arms]


def main():
  values = parse(sys.argv)
  regimes, runs = chosen(values)
  if values.scale == "gpu" and (values.run or values.dry) and not (values.model and values.data):
    raise UserError("the gpu scale needs --model=DIR/model.gguf and --data=DIR")
  if values.dry:
    for run in runs:
      state = next((what for what in ("run", "failed") if (run.folder / f"{what}.json").exists()), "missing")
      print(f"# {run.regime.name}/{run.name}: {state}\npython -m {' '.join(run.training(values.model, values.data))}")
  if values.run:
    version = {"commit": trial_queue.commit_of(values.commit), "code": trial_queue.code_hash()}
    if not trial_queue.start(runs, values.minutes, version, values.model, values.data):
      print("time is over; the same command goes on", flush=True)
  if values.table:
    shown = values.regime or [r.name for r in REGIMES.values() if r.scale == values.scale]
    text = trial_page.page([REGIMES[name] for name in shown])
    path = ROOT / RESULTS / f"table_{values.scale}.md"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    print(text)
  if not (values.dry or values.run or values.table):
    raise UserError("give --run, --table or --dry; see --help")


if __name__ == "__main__":
  from arrol_jax import config
  config.run(main)
