"""For user_cases.py: rewards, and what may happen to a run's folder. Each function is a row; it returns what was seen."""

import json
from pathlib import Path
import shutil
import signal
import subprocess
import time

import numpy as np

from arrol_jax.models.files import safetensors
from experiments.user_cases_commands import (
  TRAIN,
  apart,
  arguments,
  ended,
  metrics,
  model,
  module,
  need,
  refused,
  start,
  stopped,
  train,
  until_step,
  worked,
)


class Skipped(Exception):
  """A row that cannot be tried here, and why."""


def rewards_of_any_size(place: Path) -> str:
  module(place, "sizes", """
def bonus(response, answer): return 1.0 * response.endswith(answer) + 0.5
def negative(response, answer): return -3.0 + response.endswith(answer)
def large(response, answer): return 1e39 * len(response)
def sometimes(response, answer): return None if len(response) % 2 else 1.0 * response.endswith(answer)
def lists(response, answer): return [1.0]
def fails(response, answer): raise KeyError("gold")
""")
  seen = []
  for name in ("bonus", "negative", "large"):
    worked(train(place / name, reward__function=f"sizes.{name}", log__rollouts=16))
    texts = [json.loads(x) for x in (place / name / "rollouts.jsonl").read_text().splitlines()]
    rewards = sorted({x["reward"] for x in texts if not x["pruned"]})
    trained = sum(x["rows_trained"] for x in metrics(place / name))
    need(trained > 0 and len(rewards) > 1 and not all(0 <= x <= 1 for x in rewards), f"{name}: {rewards}, {trained} rows trained")
    seen.append(f"{name} from {rewards[0]:.3g} to {rewards[-1]:.3g}")
  said = worked(train(place / "sometimes", reward__function="sizes.sometimes"))
  line, = [x for x in said.err if x.startswith("reward function")]
  for name in ("lists", "fails"):
    refused(train(place / name, steps=100, reward__function=f"sizes.{name}"), f"sizes.{name} failed on all")
  return f"rewards trained on: {', '.join(seen)}; {line!r}; one that always fails ends the run"


def reward_signatures(place: Path) -> str:
  module(place, "signatures", """
class Judge:
  def __call__(self, response, answer): return float(response.endswith(answer))
judge = Judge()
def keywords(r, a, **kw): return float(r.endswith(a) and not kw)
def tolerance(r, a, tol=1e-6): return float(r.endswith(a) and tol == 1e-6)
def swapped(answer, response): return float(response.endswith(answer))
def three(a, b, c): return 1.0
def verl(data_source, solution_str, ground_truth, extra_info=None): return 1.0
async def later(response, answer): return 1.0
number = 3
""")
  same = []
  for name in ("keywords", "tolerance", "swapped", "judge"):
    worked(train(place / name, steps=1, reward__function=f"signatures.{name}"))
    same.append(metrics(place / name)[0]["reward"])
  need(same[0] > 0 and len(set(same)) == 1, f"rewards {same}")
  line = ""
  for name in ("verl", "later", "number", "missing", "three"):
    line = refused(train(place / f"no_{name}", reward__function=f"signatures.{name}"), f"signatures.{name}")
  return f"four signatures give the same reward {same[0]:.3f}; {line!r}"


def several_chat_templates(place: Path) -> str:
  folder = model(place / "talkative", tokenizer_config={
    "chat_template": [{"name": "default", "template": "{{ messages[0]['content'] }}"},
                      {"name": "rag", "template": "{{ messages[0]['content'] }}!"}]})
  for steps in (1, 2):
    worked(train(place / "run", model__path=folder, checkpoint__export=True, steps=steps, prune__cold_start=0))
  files = sorted(p.name for p in (place / "run" / "policy").iterdir())
  worked(train(place / "again", model__path=place / "run" / "policy", steps=1))
  return f"exported twice, and trained on: {', '.join(files)}"


def unwritable(place: Path) -> str:
  """A checkpoints folder that takes no more files while the run goes on."""
  process = start("train", arguments(place / "run", steps=10**5, checkpoint__every=3))
  until_step(process, place / "run", 1)
  folder = place / "run" / "checkpoints"
  folder.mkdir(exist_ok=True)
  done = subprocess.run(["chattr", "+i", folder], capture_output=True, text=True) if shutil.which("chattr") else None
  if done is None or done.returncode:
    process.kill()
    ended(process)
    why = " ".join(done.stderr.split()) if done else "no chattr here"
    raise Skipped(f"{why} (it needs root and a file system with attributes)")
  begun = time.monotonic()
  try:
    said = ended(process)
  finally:
    subprocess.run(["chattr", "-i", folder], check=True)
  line = refused(said, "checkpoints")
  need(len([x for x in said.err if "Traceback" in x]) == 0, "a traceback")
  seconds = time.monotonic() - begun
  need(seconds < 20, f"it ended after {seconds:.0f} s")
  worked(train(place / "run", steps=len(metrics(place / "run")), checkpoint__every=3))
  return f"status 2 in {seconds:.1f} s: {line.replace(str(place), 'DIR')!r}; then it goes on"


def two_runs(place: Path) -> str:
  first = start("train", arguments(place / "run", steps=10**5))
  until_step(first, place / "run", 1)
  line = refused(train(place / "run", steps=10**5), "another run is writing there")
  seed = refused(train(place / "run", steps=10**5, seed=1), "seed")
  first.kill()  # a crash: the lock goes with it
  ended(first)
  steps = len(metrics(place / "run"))
  need(seed != line, "the same line for another config")
  worked(train(place / "run", steps=steps + 1))
  return f"{line.replace(str(place), 'DIR')!r}; after the first was killed, the same folder goes on"


def lost_checkpoints(place: Path) -> str:
  worked(train(place / "run"))
  before = (place / "run" / "metrics.jsonl").read_text()
  shutil.rmtree(place / "run" / "checkpoints")
  line = refused(train(place / "run", steps=5), "checkpoints are gone")
  (place / "run" / "checkpoints").mkdir()
  refused(train(place / "run", steps=5), "checkpoints are gone")
  need((place / "run" / "metrics.jsonl").read_text() == before, "metrics.jsonl was touched")
  return repr(line.replace(str(place), "DIR"))


def memory_and_speed_may_change(place: Path) -> str:
  worked(train(place / "run"))
  path = place / "run" / "config.json"
  stored = json.loads(path.read_text())
  del stored["learn"], stored["rollout"]["explore"]  # as a version wrote it that did not know them
  path.write_text(json.dumps(stored))
  said = worked(train(place / "run", steps=4, optim__micro_tokens=512, rollout__slots=8, reward__workers=1, reward__timeout=9.0,
                      model__remat="full", rollout__segment=16))
  need("going on after step 3" in said.out, said.out)
  line = refused(train(place / "run", steps=5, optim__lr=1.0), "optim.lr")
  return f"goes on after step 3 with less memory and without keys that are new; {line.replace(str(place), 'DIR')!r}"


def inputs_changed(place: Path) -> str:
  data, weights = place / "data.jsonl", model(place / "model")
  lines = TRAIN.read_text().splitlines(True)[:40]
  data.write_text("".join(lines))
  settings = {"data__train": data, "model__path": weights}
  worked(train(place / "run", **settings))
  for changed in (lines[::-1], lines[:-1], [lines[0].replace('"answer": "', '"answer": "1'), *lines[1:]]):
    data.write_text("".join(changed))
    line = refused(train(place / "run", steps=4, **settings), "the problems of data.train changed since this run began")
  data.write_text("".join(lines))
  path = weights / "model.safetensors"
  tensors = {name: stored.read() for name, stored in safetensors.read_header(path).items()}
  whole = path.read_bytes()
  name = next(iter(tensors))
  path.write_bytes(whole[:-4] + np.float32(0.125).tobytes())  # the last number of the last tensor
  need(name in tensors, name)
  other = refused(train(place / "run", steps=4, **settings), "the weights of model.path changed")
  path.write_bytes(whole)
  worked(train(place / "run", steps=4, **settings))
  return f"{line.replace(str(place), 'DIR')!r}; {other.replace(str(place), 'DIR')!r}; put back, it goes on"


def signals(place: Path) -> str:
  seen = []
  for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
    folder = place / number.name
    said = stopped(folder, number, checkpoint__every=10**4)
    need(said.status == 0 and "is saved" in said.out, f"{number.name}: status {said.status}, {said.out[-200:]}")
    steps = len(metrics(folder))
    need(f"step {steps} is saved" in said.out, f"{steps} steps in metrics.jsonl, and {said.out[-200:]}")
    seen.append(next(x for x in said.out.splitlines() if "is saved" in x).replace(str(folder), "DIR"))
  said = worked(apart("train", arguments(folder, steps=steps + 1, checkpoint__every=10**4)))
  need(f"going on after step {steps}" in said.out, said.out)
  return f"{'; '.join(seen)}; it goes on from there"
