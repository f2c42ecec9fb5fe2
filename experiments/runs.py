"""Which runs the paper's tables need at each scale, where their results are, and how what is missing is started.

| scale | model and data | where |
|---|---|---|
| cpu | the shipped arithmetic model, 20 steps of 8 prompts | two CPU cores, minutes |
| gpu | Qwen2.5-Coder-0.5B-Instruct, GSM8K: the runs of the trial (trial_arms.py) | one GPU |
| paper | the paper's four models, Dapo-Math-17K | a TPU slice; configs only, nothing has been run |

A job is one command. Its result is a folder or file under the scale's results; it is missing while that is not there. Working
folders (checkpoints, the trained policy) are runs/SCALE/NAME, so a job that was stopped goes on from its last checkpoint.
Jobs are run one after another in this process: what one has compiled the next need not.
"""

from collections.abc import Iterator
import contextlib
import dataclasses
import gc
import importlib
import json
import math
import os
from pathlib import Path
import shlex
import signal
import sys
import threading
import time
from typing import TextIO

from absl import flags
import jax

from arrol_jax import config
from arrol_jax.types import UserError

ROOT = Path(__file__).resolve().parents[1]
STOP_BELOW = 0.2  # posterior below which a trace is hopeless; set beforehand
SCORES = ("step", "prompt", "tokens", "pruned", "score", "posterior", "survival", "reward")  # of rollouts.jsonl: no texts
CACHE = "runs/xla_cache"  # compiled programs, shared by all jobs: most of a short run is compiling

_OURS = ("prune.rule=group", "prune.draw=systematic", "prune.weigh=('table','head')", "quality.buffer=2048", "quality.passes=8")

# What an arm changes in its scale's config.
ARMS = {
  "none": ("prune.enabled=False",),
  "published": (),
  "random": ("prune.rule=random",),
  "ours": (*_OURS, "quality.inputs=('last','logprobs')"),
  "balanced_head": (*_OURS, "quality.inputs=('mean','logprobs')", "quality.balance=True"),
  "keep025": ("prune.keep=0.25",),
  "keep075": ("prune.keep=0.75",),
  "dapo_none": ("loss.name=dapo", "rollout.resampling=3", "prune.enabled=False"),
  "dapo": ("loss.name=dapo", "rollout.resampling=3"),
}


ONE_SEED = ("keep025", "keep075", "dapo_none", "dapo")  # arms of one table each: the scale's last seed only


@dataclasses.dataclass(frozen=True)
class Scale:
  """model, data: for the tables' readers. config: file of the arms, settings: what all of them change in it; skip: first
  steps (compilation, cold start) left out of means. votes, head: settings of table 3's evaluation and figure 2's ablation.
  paths: settings that say where this machine has model and data; they stand in commands and not in results. trial: by name of
  the data the trial's regimes that its tables read in place of jobs of its own (trial_tables.py)."""
  name: str
  model: str
  data: str
  results: str
  config: str
  settings: tuple[str, ...]
  seeds: tuple[int, ...]
  skip: int
  votes: tuple[str, ...]
  head: tuple[str, ...]
  paths: tuple[str, ...] = ()
  trial: tuple[tuple[str, tuple[str, ...]], ...] = ()


CPU = Scale(
  "cpu", "The shipped arithmetic model (0.6 M parameters)", "arithmetic, held-out accuracy greedy on 400 problems",
  "experiments/results/arithmetic_arms", "configs/quickstart.py",
  ("steps=20", "rollout.prompts=8", "checkpoint.every=1000", "log.backends=jsonl", "log.rollouts=32"), (0, 1), 6,
  ("eval.samples=16", "eval.temperature=1.0", "eval.deepconf=True", "eval.window=8", "eval.problems=128"),
  ("--lengths=8,16,24", "--prompts=32"))
GPU = Scale(
  "gpu", "Qwen2.5-Coder-0.5B-Instruct", "GSM8K, held-out accuracy greedy on all 1,319 test problems",
  "experiments/results/tables_gpu", "configs/gsm8k_qwen05b.py", (), (), 0, (), ("--lengths=32,64,128,192,256", "--prompts=640"),
  trial=(("GSM8K", ("gsm8k", "gsm8k_rest", "gsm8k_tables")), ("MATH", ("math_alone",)),
         ("GSM8K at 1.5e-6", ("gsm8k_tuned",))))
PAPER = Scale(
  "paper", "Qwen3-1.7B-Base", "Dapo-Math-17K; Math500, MinervaMath, OlympiadBench (accuracy), AMC'23, AIME'24, AIME'25 (pass@16)",
  "experiments/results/paper", "configs/qwen3_1b7.py", (), (0,), 20,
  ("data.eval=aime24", "eval.samples=16", "eval.temperature=1.0", "eval.deepconf=True"),
  ("--lengths=64,128,256,512,1024", "--prompts=640"))
SCALES = {scale.name: scale for scale in (CPU, GPU, PAPER)}

# The paper's models, its Table 1 in order: file under configs/; arms have files of their own there.
PAPER_MODELS = {"qwen3_1b7": "Qwen3-1.7B-Base", "qwen3_4b": "Qwen3-4B-Base", "qwen3_8b": "Qwen3-8B-Base",
                "llama32_1b": "Llama-3.2-1B"}
PAPER_ARMS = {"none": "_unpruned", "published": "", "dapo_none": "_dapo_unpruned", "dapo": "_dapo"}


@dataclasses.dataclass(frozen=True)
class Job:
  """One command: `python -m` argv. result: what shows under the scale's results that it is done; workdir: the training's folder;
  policy: for an evaluation, the training whose policy it reads, and its number of sources."""
  scale: Scale
  name: str
  argv: tuple[str, ...]
  result: Path
  workdir: Path | None = None
  policy: "Job | None" = None
  sources: int = 1

  @property
  def done(self) -> bool:
    return (ROOT / self.result).exists()

  @property
  def command(self) -> str:
    return "python -m " + shlex.join(self.argv)


def _settings(scale: Scale, settings: tuple[str, ...]) -> tuple[str, ...]:
  return tuple(f"--config.{s}" for s in (*scale.paths, *settings))


def training(scale: Scale, arm: str, seed: int, model: str = "qwen3_1b7") -> Job:
  """An arm's training; `model` names a paper model's configs and counts at that scale only."""
  config, changes, name = scale.config, ARMS[arm], f"{arm}_seed{seed}"
  if scale.name == "paper":
    config, name = f"configs/{model}{PAPER_ARMS.get(arm, '')}.py", f"{model}_{name}"
    changes = () if arm in PAPER_ARMS else changes
  workdir = Path("runs") / scale.name / name
  argv = ("arrol_jax.train", f"--config={config}", f"--workdir={workdir}",
          *_settings(scale, (*scale.settings, f"seed={seed}", *changes)))
  return Job(scale, name, argv, Path(scale.results) / name / "summary.json", workdir)


def trainings(scale: Scale, arm: str, model: str = "qwen3_1b7") -> list[Job]:
  """An arm's trainings, one a seed."""
  return [training(scale, arm, seed, model) for seed in (scale.seeds[-1:] if arm in ONE_SEED else scale.seeds)]


def evaluation(trained: Job, name: str, settings: tuple[str, ...], sources: int = 1) -> Job:
  """One `evaluate` of a training's policy and head; its JSON lines, one a source, are kept as NAME_TRAINING.jsonl."""
  scale = trained.scale
  paths = tuple(s for s in scale.paths if not s.startswith("model.path="))
  argv = ("arrol_jax.evaluate", trained.argv[1],
          *(f"--config.{s}" for s in (*paths, f"model.path={trained.workdir}/policy", *settings)))
  name = f"{name}_{trained.name}"
  return Job(scale, name, argv, Path(scale.results) / f"{name}.jsonl", policy=trained, sources=sources)


def voting(scale: Scale, arm: str, seed: int, model: str = "qwen3_1b7") -> Job:
  """Table 3's samples of an arm's policy: all voting rules on the same ones."""
  return evaluation(training(scale, arm, seed, model), "votes", scale.votes)


def stopping(scale: Scale, arm: str, seed: int) -> Job:
  """The same samples with hopeless traces ended at prune.detect."""
  return evaluation(training(scale, arm, seed), "stopped", (*scale.votes, f"eval.stop_below={STOP_BELOW}"))


def benchmarks(trained: Job) -> list[Job]:
  """The six benchmarks of the paper: accuracy of greedy answers on three, pass@16 on three."""
  return [evaluation(trained, "accuracy", ("data.eval=math500", "eval.benchmarks=minerva_math,olympiadbench"), 3),
          evaluation(trained, "pass", ("data.eval=amc23", "eval.benchmarks=aime24,aime25", "eval.samples=16",
                                       "eval.temperature=1.0"), 3)]


def ablation(scale: Scale) -> Job:
  """Figure 2's heads and plain scores by prefix length, on the policy before training."""
  argv = ("experiments.head_ablation", f"--config={scale.config}", *scale.head, f"--out=runs/{scale.name}/head",
          *_settings(scale, ()))
  return Job(scale, "head", argv, Path(scale.results) / "head" / "ablation.jsonl")


def with_paths(scale: Scale, model: str | None, data: str | None) -> Scale:
  """The scale on a machine that keeps the model at `model` and the data's files in the folder `data`."""
  if model and scale.name == "paper":
    raise UserError("--model names one model; the paper scale has four: put or link them under models/, as their configs say")
  paths = (f"model.path={model}",) if model else ()
  if data and scale.name == "cpu":
    raise UserError("--data: the cpu scale's data are shipped")
  if data:
    train, test = ("gsm8k_train", "gsm8k_test") if scale.name == "gpu" else ("dapo_math_17k_clean", "math500")
    paths += (f"data.folder={data}", f"data.train={data}/{train}.jsonl", f"data.eval={data}/{test}.jsonl")
  return dataclasses.replace(scale, paths=paths)


# ---- results


def lines(path: Path) -> list[dict]:
  """A results' file, an object a line."""
  try:
    return [json.loads(line) for line in (ROOT / path).read_text().splitlines()]
  except (OSError, ValueError) as e:
    raise UserError(f"{path}: cannot be read as JSON lines ({e}); remove that run's folder and run it again") from e


def summary(job: Job) -> dict:
  """A training's summary.json."""
  try:
    return json.loads((ROOT / job.result).read_text())
  except (OSError, ValueError) as e:
    raise UserError(f"{job.result}: cannot be read as JSON ({e}); remove that run's folder and run it again") from e


def metrics(job: Job) -> list[dict]:
  """Lines of a training's metrics.jsonl."""
  return lines(job.result.parent / "metrics.jsonl")


# ---- starting what is missing


def start(jobs: list[Job], minutes: float | None) -> bool:
  """Runs the missing ones of `jobs` one after another; False if time ran out, or SIGTERM came, before all were done.

  After `minutes` a training at work gets SIGTERM, by which it saves its last step; the same command goes on from there. An
  evaluation is let to its end.
  """
  for name, value in environment().items():
    jax.config.update(name.lower(), value if name.endswith("DIR") else float(value))
  deadline = time.monotonic() + 60 * minutes if minutes else None
  for job in jobs:
    if job.done:
      continue
    if job.policy and not (ROOT / job.policy.workdir / "policy").is_dir() and not _do(job.policy, deadline):
      return False
    if not _do(job, deadline):
      return False
  return True


def _do(job: Job, deadline: float | None) -> bool:
  """One job, from wherever it stands, to its results; False if it was stopped by the deadline."""
  if deadline and time.monotonic() >= deadline:
    return False
  print(f"$ {prefix(job)}{job.command}", flush=True)
  folder = ROOT / "runs" / job.scale.name
  folder.mkdir(parents=True, exist_ok=True)
  cpu, machine, clock = sum(os.times()[:4]), _machine_cpu(), time.monotonic()
  with open(folder / f"{job.name}.jsonl", "w") if job.policy else contextlib.nullcontext() as said, terminated(
      deadline - clock if deadline and job.workdir else None):
    status = call(job.argv, said)
  if status:
    raise UserError(f"{job.name}: exit status {status} from: {job.command}")
  wall = time.monotonic() - clock
  about = {"command": hidden(f"{prefix(job)}{job.command}", job.scale), "wall_s": round(wall, 1), "cores": os.cpu_count()}
  if machine is not None:
    mine, everyone = sum(os.times()[:4]) - cpu, _machine_cpu() - machine
    about |= {"cpu_s": round(mine, 1), "others_cores": round(max(0.0, everyone - mine) / wall, 2)}
  with open(folder / f"{job.name}.pieces.jsonl", "a") as f:
    f.write(json.dumps(about) + "\n")
  return _keep(job)


def call(argv: tuple[str, ...], out: TextIO | None) -> int:
  """`python -m argv` in this process, in the repository's folder, its stdout to `out` (None: ours); the exit status."""
  before = sys.argv
  sys.argv = list(argv)
  try:
    with contextlib.chdir(ROOT), contextlib.redirect_stdout(out or sys.stdout):
      config.run(importlib.import_module(argv[0]).main)
    return 0
  except SystemExit as e:
    return e.code if isinstance(e.code, int) else int(e.code is not None)
  finally:
    sys.argv = before
    gc.collect()  # what that run held on the device


@contextlib.contextmanager
def terminated(seconds: float | None, told: threading.Event | None = None) -> Iterator[None]:
  """SIGTERM after so many seconds, or once `told` is set, and again every second: a training that still loads, or has ended, does
  not hear it (hosts.Watch). It reaches nothing else."""
  before = signal.signal(signal.SIGTERM, lambda *_: None)
  over, deadline = threading.Event(), math.inf if seconds is None else time.monotonic() + seconds

  def remind():
    while not over.wait(0.1):
      if (told and told.is_set()) or time.monotonic() >= deadline:
        os.kill(os.getpid(), signal.SIGTERM)
        over.wait(1.0)

  thread = threading.Thread(target=remind, daemon=True)
  thread.start()
  try:
    yield
  finally:
    over.set()
    thread.join()
    signal.signal(signal.SIGTERM, before)


def prefix(job: Job) -> str:
  """What stands before a command: where compiled programs are kept."""
  return "".join(f"{k}={v} " for k, v in environment().items())


def environment() -> dict[str, str]:
  return {} if "JAX_COMPILATION_CACHE_DIR" in os.environ else {
    "JAX_COMPILATION_CACHE_DIR": CACHE, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def read_flags(values: flags.FlagValues, argv: list[str], page: str, known: str) -> None:
  """Fills `values` from the command line. -h prints `page`; UserError for anything else than its flags, which `known` names."""
  if {"-h", "--help"} & set(argv):
    print(page)
    raise SystemExit(0)
  try:
    rest = values(argv)
  except flags.Error as e:
    raise UserError(str(e)) from e
  if rest[1:]:
    raise UserError(f"unexpected argument {rest[1]!r}; {known}")


def hidden(text: str, scale: Scale) -> str:
  """`text` without this machine's folders: DIR stands for them, as in the results' README files."""
  folders = {os.path.dirname(value) if key == "model.path" else value for key, _, value in
             (path.partition("=") for path in scale.paths) if key in ("model.path", "data.folder")}
  for folder in sorted(folders - {""}, key=len, reverse=True):
    text = text.replace(folder, "DIR")
  return text


def _keep(job: Job) -> bool:
  """Copies what a finished job leaves into the scale's results; False if it did not come to its end."""
  folder, put = ROOT / job.result.parent, lambda name, text: (ROOT / job.result.parent / name).write_text(hidden(text, job.scale))
  source = ROOT / (job.workdir or Path("runs") / job.scale.name / "head")
  pieces = lines(Path("runs") / job.scale.name / f"{job.name}.pieces.jsonl")  # an evaluation is one piece
  if job.policy:
    said = (ROOT / "runs" / job.scale.name / f"{job.name}.jsonl").read_text().splitlines()
    found = [json.loads(x) | pieces[-1] for x in said if x.startswith("{")]
    if len(found) < job.sources:
      return False
    folder.mkdir(parents=True, exist_ok=True)
    put(job.result.name, "".join(json.dumps(x) + "\n" for x in found))
    return True
  if not (source / ("summary.json" if job.workdir else "ablation.png")).exists():
    return False
  folder.mkdir(parents=True, exist_ok=True)
  put("run.jsonl", "".join(json.dumps(x) + "\n" for x in pieces))
  if job.workdir:
    scores = [{k: x[k] for k in SCORES} for x in lines(job.workdir / "rollouts.jsonl")]
    put("scores.jsonl", "".join(json.dumps(x) + "\n" for x in scores))
  for name in ("config.json", "metrics.jsonl", "summary.json") if job.workdir else ("ablation.jsonl",):
    put(name, (source / name).read_text())
  return True


def _machine_cpu() -> float | None:
  """CPU seconds that this machine has spent on anything, None where it does not say."""
  try:
    with open("/proc/stat") as f:
      user, nice, system, _idle, _iowait, irq, softirq = map(int, f.readline().split()[1:8])
  except OSError:
    return None
  return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")
