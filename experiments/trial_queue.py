"""Runs what is missing of the trial, one after another, and keeps of each what a page needs: run.json and metrics.jsonl.

A run that time cuts off saves its last step and goes on from there when the queue is started again (runs/trial has to stay). One
that fails leaves failed.json, which the page lists; it is not tried again before that folder is removed. What the user can mend
(a path that is not there) ends the queue where it comes before the first step: the next run would fail the same way.
Every run notes the commit and a hash of the code it ran; the page does not compare runs of different ones.
"""

import contextlib
import gc
import hashlib
import importlib
import io
import json
from pathlib import Path
import shutil
import subprocess
import sys
import time

from arrol_jax.running import hosts
from arrol_jax.running.workdir import read_json, read_lines, write_json
from arrol_jax.types import UserError
from experiments.runs import terminated
from experiments.trial_arms import ROOT, Run, same

CODE = ("arrol_jax", "configs", "requirements.txt")  # what a run's course depends on
VOTING = 120.0  # seconds that votes may take: they are not begun at the end of a call with less left, and cannot be cut off
KEPT = """step pruning reward reward_ipw truncated response_len entropy grad_norm lr signal signal_per_1k_tokens keep_ratio
  groups_mixed rows_trained tokens_generated tokens_trained head_auc head_auc_within logprob_gap
  sec_generate sec_reward sec_batch sec_update sec_step sec_compile sec_total""".split()


def commit_of(given: str | None) -> str:
  """The commit that last changed CODE: the one given, or what git says where there is git."""
  if given:
    return given[:12]
  git = lambda *argv: subprocess.run(["git", *argv, "--", *CODE], cwd=ROOT, capture_output=True, text=True, check=True).stdout
  try:
    changed, commit = git("status", "--porcelain"), git("log", "-1", "--format=%H").strip()
  except (OSError, subprocess.CalledProcessError) as e:
    raise UserError(f"no git here: give --commit, as `git log -1 --format=%H -- {' '.join(CODE)}` says it") from e
  if changed:
    raise UserError(f"not committed: {', '.join(line[3:] for line in changed.splitlines())}; a run must be of a commit")
  return commit[:12]


def code_hash() -> str:
  """Of all Python files of CODE."""
  digest = hashlib.sha256()
  for path in sorted(path for name in CODE for path in (ROOT / name).rglob("*.py")):
    digest.update(f"{path.relative_to(ROOT)}\n".encode() + path.read_bytes())
  return digest.hexdigest()[:12]


def start(runs: list[Run], minutes: float | None, version: dict, model: str, data: str) -> bool:
  """What is missing of `runs`, in order; False if time ran out before all were done. version: commit and code of these runs."""
  deadline = time.monotonic() + 60 * minutes if minutes else None
  for run in runs:
    if (run.folder / "run.json").exists() or (run.folder / "failed.json").exists():
      continue
    if deadline and time.monotonic() >= deadline or not one(run, deadline, version, model, data):
      return False
  return True


def one(run: Run, deadline: float | None, version: dict, model: str, data: str) -> bool:
  """A run from wherever it stands to its results, or to failed.json; False if it was stopped by the deadline."""
  workdir, begun = ROOT / run.workdir, time.monotonic()
  pieces = workdir.parent / f"{run.name}.pieces.jsonl"
  workdir.parent.mkdir(parents=True, exist_ok=True)
  problem, said, trained = None, "", (workdir / "summary.json").exists()
  if not trained:
    problem, _ = attempt(run.training(model, data), deadline)
    with open(pieces, "a") as f:
      f.write(json.dumps(version | {"step": steps(workdir), "wall_s": round(time.monotonic() - begun, 1)}) + "\n")
  if not problem and not (workdir / "summary.json").exists():
    return False
  if not problem and run.votes:
    if deadline and not trained and deadline - time.monotonic() < VOTING:
      return False  # the next call begins with them
    problem, said = attempt(run.voting(data), None, say=True)
  about = {"regime": run.regime.name, "arm": run.arm, "seed": run.seed, "settings": same(run.settings),
           "pieces": [piece for piece in map(json.loads, pieces.read_text().splitlines()) if piece["step"]]}
  keep(run, about, problem, said)
  if not problem:
    shutil.rmtree(workdir)  # checkpoints and policy: gigabytes
    pieces.unlink()
  return True


def attempt(argv: tuple[str, ...], deadline: float | None, say: bool = False) -> tuple[str | None, str]:
  """`python -m argv` in this process: (what went wrong, what it printed). Told to stop at the deadline, which is not wrong."""
  print("$ python -m", " ".join(argv), flush=True)
  before, sys.argv, out = sys.argv, list(argv), io.StringIO()
  try:
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(out if say else sys.stdout), terminated(
        max(0.01, deadline - time.monotonic()) if deadline else None):
      importlib.import_module(argv[0]).main()
    return None, out.getvalue()
  except hosts.Preempted:
    return None, ""
  except Exception as e:  # of any kind: the other runs go on
    workdir = next((Path(ROOT, a.partition("=")[2]) for a in argv if a.startswith("--workdir=")), None)
    if isinstance(e, UserError | OSError) and workdir and not steps(workdir):
      raise
    print(f"failed: {e}", file=sys.stderr, flush=True)
    return f"{type(e).__name__}: {' '.join(str(e).split())}"[:500], ""
  finally:
    sys.argv = before
    gc.collect()  # what that run held on the device


def steps(workdir: Path) -> int:
  """Whole steps that a run's log tells of."""
  return max((x["step"] for x in read_lines(f"{workdir}/metrics.jsonl")), default=0)


# ---- what is kept


def keep(run: Run, about: dict, problem: str | None, said: str) -> None:
  """Writes run.json, or failed.json where there is a problem, and metrics.jsonl below results/."""
  workdir = ROOT / run.workdir
  lines = read_lines(f"{workdir}/metrics.jsonl")
  versions = [dict.fromkeys(piece[name] for piece in about["pieces"]) for name in ("commit", "code")]
  about |= dict(zip(("commit", "code"), map("+".join, versions)))  # a run in pieces of two versions is like no other run
  about |= {"steps": len(lines), "seconds": lines[-1]["sec_total"] if lines else 0.0}
  run.folder.mkdir(parents=True, exist_ok=True)
  (run.folder / "metrics.jsonl").write_text("".join(json.dumps(short({k: x[k] for k in KEPT if k in x})) + "\n" for x in lines))
  if problem:
    write_json(f"{run.folder}/failed.json", about | {"problem": problem})
    return
  summary = read_json(f"{workdir}/summary.json")
  about |= {"device": summary["device"], "half": halfway(workdir, lines), "full": evaluation(summary["eval_after"])}
  votes = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
  write_json(f"{run.folder}/run.json", about | ({"votes": short(votes[0])} if votes else {}))


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
