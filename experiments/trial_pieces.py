"""What a run of the trial is made of: its pieces (by which code, on which host, from which step to which) while it is not kept
yet, and marks of the files that it reads, some of which are made here from data's.
"""

import contextlib
import functools
import hashlib
import json
import os
from pathlib import Path
import socket

from arrol_jax.running.lines import rewrite
from arrol_jax.types import UserError
from experiments.trial_arms import ROOT, Run


def begin_piece(run: Run, version: dict) -> None:
  """That this version of the code is at the run on this host, whatever becomes of it. A piece that was killed before it saved
  anything, so that this one begins from the same step, is no part of the run."""
  pieces_of(run).parent.mkdir(parents=True, exist_ok=True)
  before = [x for x in pieces(run) if "step" in x or x.get("from") != version.get("from", -1)]
  keep_pieces(run, [*before, version | {"host": host()}])


def end_piece(run: Run, step: int, seconds: float) -> None:
  """How far it came in so many seconds."""
  *before, last = pieces(run)
  last |= {"step": step, "wall_s": round(seconds, 1)}
  keep_pieces(run, [*before, last])


def keep_pieces(run: Run, parts: list[dict]) -> None:
  rewrite(str(pieces_of(run)), parts)


def pieces(run: Run) -> list[dict]:
  """Of a run that was begun and is not kept yet: by which version and on which host, after which step it began ("from") and ended
  ("step"; one that was killed lacks it)."""
  out = []
  for line in pieces_of(run).read_text().splitlines() if pieces_of(run).exists() else []:
    with contextlib.suppress(ValueError):  # half a line of a killed process
      out.append(json.loads(line))
  return out


def inputs(run: Run, model: str, data: str) -> dict[str, str]:
  """Marks of what the run reads, by the name of the option: of a file twelve hex digits of its SHA-256, of a model's folder those
  of its files' names, sizes and config.json, of a model on the hub its name."""
  found, made = {}, {}
  with contextlib.suppress(OSError):  # data that are not there are the training's to tell
    made = parts_of(run, data)
  for name, given in run.paths(model, data).items():
    path = ROOT / given
    if given in made:
      found[name] = hashlib.sha256(made[given].encode()).hexdigest()[:12]
    elif path.is_file():
      found[name] = _of_file(path, path.stat().st_mtime_ns, path.stat().st_size)
    elif name == "model.path":
      files = sorted(x for x in path.iterdir() if x.is_file()) if path.is_dir() else []
      names = [f"{x.name} {x.stat().st_size}" for x in files] + [x.read_text() for x in files if x.name == "config.json"]
      found[name] = hashlib.sha256("\n".join(names).encode()).hexdigest()[:12] if files else str(given)
  return found


@functools.lru_cache
def _of_file(path: Path, _changed: int, _size: int) -> str:
  """Once while it stays the same: each run of a queue asks, and a model has hundreds of megabytes."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()[:12]


def host() -> str:
  """Which machine this is, since it was started: eight hex digits that tell nothing else of it."""
  boot = Path("/proc/sys/kernel/random/boot_id")
  name = socket.gethostname() + (boot.read_text() if boot.exists() else "")
  return hashlib.sha256(name.encode()).hexdigest()[:8]


def pieces_of(run: Run) -> Path:
  return ROOT / f"{run.workdir}.pieces.jsonl"


def parts_of(run: Run, data: str) -> dict[str, str]:
  """By path, texts of Run.split and Run.thinned: where its regime holds problems of the training file out, or asks a part of the
  test file."""
  regime, out = run.regime, {}
  if regime.spare:
    source = Path(data, f"{regime.train}.jsonl")
    lines = source.read_text().splitlines(keepends=True)
    if len(lines) <= regime.spare:
      raise UserError(f"{source}: {len(lines)} problems, of which {regime.name} holds {regime.spare} out")
    spare = {i * len(lines) // regime.spare for i in range(regime.spare)}  # evenly, as a file may be sorted by subject
    for path, held_out in zip(run.split, (False, True), strict=True):
      out[str(path)] = "".join(line for i, line in enumerate(lines) if (i in spare) == held_out)
  if data and regime.every > 1:
    lines = Path(data, f"{regime.test}.jsonl").read_text().splitlines(keepends=True)
    out[str(run.thinned)] = "".join(lines[::regime.every])
  return out


def split(run: Run, data: str) -> None:
  """Writes parts_of, each at once, as several processes may be here, and where it is not there already."""
  for path, text in parts_of(run, data).items():
    if not (ROOT / path).exists() or (ROOT / path).read_text() != text:
      half = ROOT / f"{path}.{os.getpid()}"
      half.write_text(text)
      half.rename(ROOT / path)
