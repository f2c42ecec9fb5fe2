"""Where a run's figures go beside metrics.jsonl: TensorBoard, Weights & Biases, trackio. The same names in each, and the step's
sampled rollouts as a table. Each library is imported only where log.backends names it.

Weights & Biases is offline where nobody is logged in (WANDB_MODE says otherwise): its files are in the run's folder, and
`wandb sync` sends them. trackio is local: `trackio show` (TRACKIO_DIR, TRACKIO_SPACE_ID). A run that goes on is the same run
there.
Left out: media, alerts, sweeps.
"""

import importlib.util
import os
import secrets

from arrol_jax.running.imports import without_torch
from arrol_jax.types import UserError

BACKENDS = {"jsonl": None, "tensorboard": "tensorboardX", "wandb": "wandb", "trackio": "trackio"}  # -> module
PROJECT = "arrol_jax"


def names(listed: str) -> list[str]:
  """The backends of a text such as "jsonl,wandb". Raises UserError for one that is unknown or not installed."""
  out = [name.strip() for name in listed.split(",") if name.strip()]
  for name in out:
    if name not in BACKENDS:
      raise UserError(f"log.backends names {name!r}; there are {', '.join(BACKENDS)}")
    if BACKENDS[name] and importlib.util.find_spec(BACKENDS[name]) is None:
      raise UserError(f'log.backends: {name} is not installed: pip install "arrol-jax[track]" (or {BACKENDS[name]})')
  return out


def start(listed: str, workdir: str, step: int, config: dict) -> list:
  """Backends of a run that has `step` steps behind it; metrics.jsonl is workdir.py's, and always written."""
  opened = []
  for name in names(listed):
    if name == "tensorboard":
      opened.append(Board(workdir, step))
    elif name != "jsonl":
      opened.append(Tracker(name, workdir, config))
  return opened


class Board:
  """TensorBoard's files in the run's folder; lines past `step` are taken back."""

  def __init__(self, workdir: str, step: int):
    with without_torch():
      from tensorboardX import SummaryWriter
    self.writer = SummaryWriter(f"{workdir}/tensorboard", purge_step=step + 1)

  def write(self, step: int, figures: dict, rollouts: list[dict]) -> None:
    for name, value in figures.items():
      self.writer.add_scalar(name, value, step)
    if rollouts:
      self.writer.add_text("rollouts", _markdown(rollouts), step)

  def close(self) -> None:
    self.writer.close()


class Tracker:
  """wandb, or trackio, which has the same calls."""

  def __init__(self, name: str, workdir: str, config: dict):
    self.module = importlib.import_module(name)
    about = {"project": os.environ.get(f"{name.upper()}_PROJECT", PROJECT), "config": config, "resume": "allow"}
    own = _own_name(workdir)
    if name == "wandb":
      known = os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY") or _logged_in()
      about |= {"dir": workdir, "id": own.rpartition("-")[2], "name": own, "mode": None if known else "offline"}
    else:
      about |= {"name": own, "embed": False, "auto_log_gpu": False, "auto_log_cpu": False}
    try:
      self.run = self.module.init(**about)
    except Exception as e:  # its network, login and files: it raises many kinds
      raise UserError(f"log.backends: {name} does not start ({' '.join(str(e).split())[:200]})") from e

  def write(self, step: int, figures: dict, rollouts: list[dict]) -> None:
    columns = list(rollouts[0]) if rollouts else []
    rows = [[r[c] for c in columns] for r in rollouts]
    table = {"rollouts": self.module.Table(columns=columns, data=rows)} if rows else {}
    self.run.log(figures | table, step=step)

  def close(self) -> None:
    self.run.finish()


def _own_name(workdir: str) -> str:
  """The run's name at trackers: its folder's and a few random letters, kept in the folder so that a resumed run is the same."""
  path = os.path.join(workdir, "run_name.txt")
  if not os.path.exists(path):
    with open(path, "w") as f:
      f.write(f"{os.path.basename(os.path.abspath(workdir))}-{secrets.token_hex(4)}\n")
  with open(path) as f:
    return f.read().strip()


def _logged_in() -> bool:
  """Whether this user has a key for wandb in a netrc file, as `wandb login` leaves it."""
  path = os.path.expanduser(os.environ.get("NETRC", "~/.netrc"))
  if not os.path.exists(path):
    return False
  with open(path) as f:
    return "wandb" in f.read()


def _markdown(rollouts: list[dict]) -> str:
  """A table; texts as code, on one line."""
  cell = lambda x: f"`{x}`" if isinstance(x, str) else f"{x:.4g}" if isinstance(x, float) else str(x)
  plain = lambda x: cell(x).replace("|", "¦").replace("\n", "⏎")
  lines = [list(rollouts[0]), ["---"] * len(rollouts[0]), *([plain(x) for x in r.values()] for r in rollouts)]
  return "\n".join("| " + " | ".join(line) + " |" for line in lines)
