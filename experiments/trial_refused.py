"""What of the trial cannot be run now, told before the first run: regimes that wait for others, runs that the page could not
compare with those that are there (other code, another model, other data), damaged files.
"""

from collections.abc import Callable

from arrol_jax.types import UserError
from experiments import trial_files, trial_queue
from experiments.trial_arms import MODEL, REGIMES, Regime, Run, runs_of
from experiments.trial_pieces import inputs, pieces
from experiments.trial_queue import Call


def ready(regimes: list[Regime], wanted: Callable[[Run], bool], call: Call, say: Callable[[str], None] | None) -> list[Run]:
  """The runs that are wanted, in the order of the queue, but for regimes of which some are missing and cannot be run now: why is
  told to `say`; UserError where there is none."""
  runs = []
  for regime in regimes:
    mine = list(filter(wanted, runs_of(regime)))
    first = next(trial_queue.to_do(mine, call), None)
    if not (reason := first and not_now(regime, first[0], call)):
      runs += mine
    elif say:
      say(f"{regime.name}: {reason}")
    else:
      raise UserError(f"--regime={regime.name}: {reason}")
  return runs


def not_now(regime: Regime, run: Run, call: Call) -> str:
  """Why this run, and with it any of its regime, cannot be made by this call; "" if it can. The call's commit may be "" (not
  known)."""
  if regime.waits:
    return f"its learning rates are chosen by {regime.waits}, {waiting(REGIMES[regime.waits])}"
  states = [(x, trial_queue.state(x)) for x in runs_of(regime)]
  try:
    there = [trial_files.told(x) for x, state in states if state == "done"]
  except UserError as e:
    return str(e)
  there += [piece for x, state in states if state == "begun" for piece in pieces(x)]
  there = [x for x in there if "+" not in f"{x.get('commit', '+')}{x.get('code', '')}"]  # of two versions it is like no other
  return of_other_code(there, call.version) or of_other_files(regime, there, inputs(run, call.model, call.data))


def waiting(tuning: Regime) -> str:
  """What its choice lacks."""
  states = [(x, trial_queue.state(x)) for x in runs_of(tuning)]
  if lacking := ", ".join(f"{x.name} ({state})" for x, state in states if state != "done"):
    return (f"of which these are not there: {lacking}; make them in a call before, with --regime={tuning.name}, and first remove "
            "the folder of one that failed")
  try:
    for x, _ in states:
      trial_files.told(x)
  except UserError as e:
    return str(e)
  return "whose runs are of several commits or rates (run.json)"


def of_other_code(there: list[dict], version: dict) -> str:
  """there: of the regime's runs, finished or begun, what they say."""
  found = {(x["commit"], x["code"]) for x in there}
  made = " and ".join(f"commit {commit} (code {code})" for commit, code in sorted(found))
  if found and version["code"] not in {code for _, code in found}:
    return (f"its runs are of {made}, this is code {version['code']}; the page could not compare both (experiments/README.md "
            "says how to go on)")
  if found and version["commit"] and (version["commit"], version["code"]) not in found:
    return (f"its runs are of {made}, this is called commit {version['commit']}: if nothing but its name differs, give --commit "
            "as they have it")
  return ""


def of_other_files(regime: Regime, there: list[dict], mine: dict[str, str]) -> str:
  """The same of the model and of data, where both say it; runs of the gpu scale before November 29 had MODEL."""
  for x in there:
    theirs = ({"model.path": MODEL} if regime.scale == "gpu" else {}) | x.get("inputs", {})
    if other := [name for name in theirs if name in mine and theirs[name] != mine[name] and "+" not in theirs[name]]:
      return (f"its runs have {', '.join(f'{name} {theirs[name]}' for name in other)}, this call "
              f"{', '.join(mine[name] for name in other)} (of files the first digits of their SHA-256); the page could not "
              "compare both")
  return ""
