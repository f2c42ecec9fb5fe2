"""Runs what is missing of the trial, one after another, and keeps of each what a page needs: run.json, metrics.jsonl, votes.json.

A run that time cuts off saves its last step and goes on from there when the queue is started again (runs/trial has to stay). One
that fails leaves failed.json, which the page lists; it is not tried again before that folder is removed. What the user can mend
(a path that is not there) ends the queue where it comes before the first step: the next run would fail the same way.
Every run notes the commit and a hash of the code it ran; the page does not compare runs of different ones. Several processes may
work at one queue: each claims the run that it is at by a lock that ends with it. Left out: their start (trial_devices.py), what
is refused before it (trial_refused.py).
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import fcntl
import gc
import hashlib
import importlib
import io
import json
import math
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys
import threading
import time
import traceback

import jax

from arrol_jax.running import hosts
from arrol_jax.running.json_files import read_json, write_json
from arrol_jax.running.lines import read_lines
from arrol_jax.running.workdir import newest_checkpoint
from arrol_jax.types import UserError
from experiments.runs import SCORES, terminated
from experiments.trial_arms import ROOT, Run, same
from experiments.trial_pieces import begin_piece, end_piece, inputs, keep_pieces, pieces, pieces_of, split

CODE = ("arrol_jax", "configs", "requirements.txt")  # what a run's course depends on
VOTING = 120.0  # seconds that votes may take: they are not begun with less left, and cannot be cut off
KEPT = """step pruning reward reward_ipw truncated response_len entropy grad_norm lr baseline_shift signal
  signal_per_1k_tokens keep_ratio groups_mixed rows_trained tokens_generated tokens_trained head_auc head_auc_within
  logprob_gap prompt_variance pos_ratio pos_var
  sec_generate sec_reward sec_batch sec_update sec_step sec_compile sec_total""".split()


def commit_of(given: str | None) -> str:
  """The commit that last changed CODE, 12 digits of it: the one given, or what git says where there is git."""
  asked = f"as `git log -1 --format=%H -- {' '.join(CODE)}` says it in a whole clone"
  if given:
    if not re.fullmatch("[0-9a-f]{12,40}", given):
      raise UserError(f"--commit={given}: give 12 hex digits or more, {asked}")
    return given[:12]
  git = lambda *argv: subprocess.run(["git", *argv], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
  try:
    top, shallow = git("rev-parse", "--show-toplevel"), git("rev-parse", "--is-shallow-repository") == "true"
    changed, commit = git("status", "--porcelain", "--", *CODE), git("log", "-1", "--format=%H", "--", *CODE)
  except (OSError, subprocess.CalledProcessError) as e:
    raise UserError(f"no git here: give --commit, {asked}") from e
  if Path(top).resolve() != ROOT.resolve() or not commit:  # a copy within another repository
    raise UserError(f"this folder is no git repository of its own: give --commit, {asked}")
  if changed:
    raise UserError(f"not committed: {', '.join(line[2:].strip() for line in changed.splitlines())}; a run must be of a commit")
  if shallow:  # its oldest commit seems to have changed everything
    raise UserError(f"a shallow clone: `git fetch --unshallow`, or give --commit, {asked}")
  return commit[:12]


def code_hash() -> str:
  """Of all Python files of CODE."""
  digest = hashlib.sha256()
  for path in sorted(path for name in CODE for path in (ROOT / name).rglob("*.py")):
    digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
  return digest.hexdigest()[:12]


@dataclasses.dataclass(frozen=True)
class Call:
  """What one call of the queue is given. version: commit and code of its runs; deadline: of time.monotonic(); told: set when it
  is to stop before that; name: how its lines begin; votes: of the runs that may vote, too; quiet: what runs print goes to stderr;
  fresh: it ends at a failure, so that what comes next begins in another process; platform: JAX's, which runs need."""
  version: dict
  model: str = ""
  data: str = ""
  deadline: float = math.inf
  told: threading.Event = dataclasses.field(default_factory=threading.Event)
  name: str = ""
  votes: bool = False
  quiet: bool = False
  fresh: bool = False
  platform: str = ""

  def left(self) -> float:
    """Seconds; none once it is told to stop."""
    return 0.0 if self.told.is_set() else self.deadline - time.monotonic()

  def say(self, run: Run, text: str) -> None:
    hosts.say(f"{self.name}{run.regime.name}/{run.name}: {text}")


class Failed(Exception):
  """A run failed in this process, which is not to be trusted with another (Call.fresh)."""


def start(runs: list[Run], call: Call) -> bool:
  """Does what is missing of `runs`, in order and votes last, but for what other processes are at; False if it was stopped before
  that. Failed where a run fails and the call wants a fresh process for the next."""
  while True:
    for run, what in to_do(runs, call):
      with claimed(run) as mine:
        if not mine or not missing(run, what):  # another is at it, or was until now
          continue
        check_platform(call)
        if call.left() <= 0 or not (train if what == "train" else vote)(run, call):
          return False
        if call.fresh and (run.folder / "failed.json").exists():
          raise Failed
        break
    else:
      return True


def to_do(runs: list[Run], call: Call) -> Iterator[tuple[Run, str]]:
  """What is missing of `runs`, in order and votes last, each as it is when it is asked for."""
  tasks = [(run, "train") for run in runs] + [(run, "vote") for run in runs if run.votes and call.votes]
  return ((run, what) for run, what in tasks if missing(run, what))


def check_platform(call: Call) -> None:
  """UserError where JAX has none of the devices that the call's runs need. It starts JAX as a run does, whose flags are then in
  force: otherwise their speeds would differ."""
  if not call.platform:
    return
  try:
    hosts.check_devices()
    found = jax.devices()[0].platform
  except UserError:
    found = ""
  if found != call.platform:
    raise UserError(f"these runs need a {call.platform}, and JAX finds none here (arrol-doctor says more)")


def missing(run: Run, what: str) -> bool:
  """Whether there is this to do: to "train", or to "vote" with the policy that a training kept."""
  there = lambda name: (run.folder / name).exists()
  if what == "train":
    return not there("run.json") and not there("failed.json")
  return there("run.json") and not there("votes.json") and (ROOT / run.workdir / "policy").is_dir()


@contextlib.contextmanager
def claimed(run: Run) -> Iterator[bool]:
  """Whether this process alone has the run, until the end of this. The lock ends with its holder; where it died, its id stays in
  the file."""
  path = lock_of(run)
  path.parent.mkdir(parents=True, exist_ok=True)
  with open(path, "a+") as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      yield False
      return
    file.truncate(0)
    file.write(str(os.getpid()))
    file.flush()
    try:
      yield True
    finally:
      file.truncate(0)


def lock_of(run: Run) -> Path:
  return ROOT / f"{run.workdir}.lock"


def train(run: Run, call: Call) -> bool:
  """A run from wherever it stands to its results, or to failed.json; False if it was stopped."""
  workdir, begun, problem = ROOT / run.workdir, time.monotonic(), None
  if not (workdir / "summary.json").exists():
    saved = newest_checkpoint(str(workdir))
    if not saved:  # what a killed process left: its evaluations are not those of the run that begins now
      shutil.rmtree(workdir, ignore_errors=True)
      pieces_of(run).unlink(missing_ok=True)
    split(run, call.data)
    call.say(run, f"goes on after step {saved}" if saved else "begins")
    before = pieces(run)
    begin_piece(run, call.version | {"inputs": inputs(run, call.model, call.data), "from": saved or 0})
    try:
      problem, _ = attempt(run.training(call.model, call.data, call.votes and run.votes), call)
    except (UserError, OSError):  # before its first step: nothing was made
      keep_pieces(run, before)
      raise
    end_piece(run, steps(workdir), time.monotonic() - begun)
  elif not pieces(run):  # somebody removed them
    begin_piece(run, call.version)
  if not problem and not (workdir / "summary.json").exists():
    call.say(run, f"stopped after step {steps(workdir)}; goes on in the next call")
    return False
  about = keep(run, problem)
  if problem:
    call.say(run, f"failed after step {about['steps']}: {problem}")
    return True
  call.say(run, outcome(about) + f"; {time.monotonic() - begun:.0f} s")
  for path in workdir.iterdir():  # checkpoints: gigabytes
    if path.name != "policy":
      shutil.rmtree(path) if path.is_dir() else path.unlink()
  if not (workdir / "policy").exists():
    workdir.rmdir()
  pieces_of(run).unlink(missing_ok=True)
  return True


def vote(run: Run, call: Call) -> bool:
  """votes.json of a trained policy, which is then removed; False where time does not allow it."""
  if call.left() < VOTING:
    return False
  call.say(run, "votes")
  problem, said = attempt(run.voting(call.data), call, say=True)
  votes = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
  write_json(f"{run.folder}/votes.json", ({"problem": problem or "nothing was said"} if problem or not votes else
                                           short(votes[0])) | call.version)
  shutil.rmtree(ROOT / run.workdir)
  return True


def attempt(argv: tuple[str, ...], call: Call, say: bool = False) -> tuple[str | None, str]:
  """`python -m argv` in this process: (what went wrong, what it printed). Told to stop in time, which is not wrong; where what it
  says is wanted, it is let to its end."""
  before, sys.argv, out = sys.argv, list(argv), io.StringIO()
  try:
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(out if say else sys.stderr if call.quiet else sys.stdout):
      print("$ python -m", " ".join(argv), file=sys.stderr if say else None, flush=True)
      with terminated(None if say or call.deadline == math.inf else call.left(), None if say else call.told):
        importlib.import_module(argv[0]).main()
    return None, out.getvalue()
  except hosts.Preempted:
    return None, ""
  except Exception as e:  # of any kind: the other runs go on
    workdir = next((Path(ROOT, a.partition("=")[2]) for a in argv if a.startswith("--workdir=")), None)
    if isinstance(e, UserError | OSError) and workdir and not steps(workdir):
      raise
    traceback.print_exc()
    return f"{type(e).__name__}: {' '.join(str(e).split())}"[:500], ""
  finally:
    sys.argv = before
    gc.collect()  # what that run held on the device


def state(run: Run) -> str:
  """"done", "failed", "begun" (something of it is saved) or "missing"."""
  for name, file in ("done", "run.json"), ("failed", "failed.json"):
    if (run.folder / file).exists():
      return name
  saved = (ROOT / run.workdir / "summary.json").exists() or newest_checkpoint(str(ROOT / run.workdir))
  return "begun" if saved else "missing"


def give_up(runs: list[Run], process: int, problem: str, call: Call) -> None:
  """failed.json of the run that a process which died was at."""
  for run in runs:
    lock = lock_of(run)
    if lock.exists() and lock.read_text() == str(process):
      with claimed(run) as mine:
        if mine and missing(run, "train"):
          if not pieces_of(run).exists():
            begin_piece(run, call.version)
          keep(run, problem)
          call.say(run, f"failed: {problem}")


def steps(workdir: Path) -> int:
  """Whole steps that a run's log tells of."""
  return max((x["step"] for x in read_lines(f"{workdir}/metrics.jsonl")), default=0)


# ---- what is kept


def keep(run: Run, problem: str | None) -> dict:
  """Writes run.json, or failed.json where there is a problem, metrics.jsonl and, of rollouts that were logged, scores.jsonl below
  results/; returns what the first says."""
  workdir = ROOT / run.workdir
  lines = read_lines(f"{workdir}/metrics.jsonl")
  parts = [x for x in pieces(run) if x.get("step", 1) or problem]
  joined = lambda given, name: "+".join(dict.fromkeys(x[name] for x in given if name in x))  # of two: it is like no other run
  about = {"regime": run.regime.name, "arm": run.arm, "seed": run.seed, "settings": same(run.settings), "pieces": parts}
  about |= {name: joined(parts, name) for name in ("commit", "code", "host")}
  files = [piece.get("inputs", {}) for piece in parts]
  about |= {"inputs": {name: joined(files, name) for name in dict.fromkeys(name for x in files for name in x)}}
  about |= {"steps": len(lines), "seconds": lines[-1]["sec_total"] if lines else 0.0}
  run.folder.mkdir(parents=True, exist_ok=True)
  (run.folder / "metrics.jsonl").write_text("".join(json.dumps(short({k: x[k] for k in KEPT if k in x})) + "\n" for x in lines))
  if rollouts := read_lines(f"{workdir}/rollouts.jsonl"):
    (run.folder / "scores.jsonl").write_text("".join(json.dumps(short({k: x[k] for k in SCORES})) + "\n" for x in rollouts))
  if problem:
    about |= {"problem": problem}
    write_json(f"{run.folder}/failed.json", about)
    return about
  summary = read_json(f"{workdir}/summary.json")
  about |= {"device": summary["device"], "half": halfway(workdir, lines), "full": evaluation(summary["eval_after"])}
  write_json(f"{run.folder}/run.json", about)
  return about


def outcome(about: dict) -> str:
  """A run's results in a few words."""
  level = lambda when: f"{100 * about[when]['accuracy']:.1f}%" if about[when] else "none"
  return f"{about['steps']} steps in {about['seconds']:.1f} s; held out {level('half')} halfway, {level('full')} at the end"


def halfway(workdir: Path, lines: list[dict]) -> dict | None:
  """The evaluation on the way; None where one step filled all of the time."""
  for path in sorted(workdir.glob("eval_all_*.json")):
    seconds = {x["step"]: x["sec_total"] for x in lines}.get(int(path.stem.rpartition("_")[2]))
    if seconds is not None:
      return evaluation(read_json(str(path))) | {"seconds": seconds}
  return None


def evaluation(results: dict) -> dict:
  """What a page reads of the results of the one held-out source."""
  return short(next(iter(results.values())))


def short(values: dict) -> dict:
  """Floats to seven digits; "benchmark", a file of this machine, left out."""
  number = lambda x: float(f"{x:.7g}") if isinstance(x, float) else [number(y) for y in x] if isinstance(x, list) else x
  return {k: short(v) if isinstance(v, dict) else number(v) for k, v in values.items() if k != "benchmark"}
