"""For user_cases.py: models, data, flags and machines as users have them. Each function is a row; it returns what was seen."""

import importlib
import json
import os
from pathlib import Path
import re
import shutil
import subprocess
import sys

import numpy as np

from arrol_jax import usage
from arrol_jax.models.files import hf_config
from arrol_jax.models.files.weights import load_policy
from arrol_jax.models.rope import LinearScaling, YarnScaling
from arrol_jax.types import UserError
from experiments.user_cases_commands import MODEL, ROOT, apart, arguments, command, model, need, refused, train, worked
from experiments.user_cases_runs import Skipped

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}


def rope_scaling(place: Path) -> str:
  """In either place of config.json, rope_scaling first, as transformers has it."""
  plain = {"rope_type": "default", "rope_theta": 10000.0}
  read = lambda name, **keys: load_policy(model(place / name, config=keys))
  tokens, lengths = np.arange(16)[None] % 10, np.array([16])
  policies = {name: read(name, **keys) for name, keys in {
    "plain": {}, "yarn": {"rope_scaling": YARN, "rope_parameters": plain}, "new": {"rope_parameters": YARN | plain | YARN},
    "linear": {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": plain}}.items()}
  need(isinstance(policies["yarn"].config.rope_scaling, YarnScaling), "yarn was not read")
  need(isinstance(policies["linear"].config.rope_scaling, LinearScaling), "linear was not read")
  logits = {name: np.asarray(p.logits(tokens, lengths)) for name, p in policies.items()}
  apart = {name: float(np.abs(x - logits["plain"]).max()) for name, x in logits.items()}
  need(apart["yarn"] > 1e-3 and apart["linear"] > 1e-3, f"logits as without scaling: {apart}")
  np.testing.assert_allclose(logits["yarn"], logits["new"], atol=1e-5)
  policies["yarn"].save(place / "exported")
  np.testing.assert_allclose(np.asarray(load_policy(place / "exported").logits(tokens, lengths)), logits["yarn"], atol=1e-5)
  try:
    hf_config.config_from_json(Path("config.json"), json.loads((MODEL / "config.json").read_text()) | {
      "rope_scaling": {"rope_type": "longrope", "factor": 4.0}})
  except UserError as e:
    return f"yarn moves logits by {apart['yarn']:.2f}, in either place, and after an export; {str(e)!r}"
  raise AssertionError("longrope was read")


def positions(place: Path) -> str:
  long = {"rollout__max_prompt": 17}
  argv = arguments(place / "run", **long)
  held = [x for x in argv if not x.startswith(("--workdir", "--config.data.eval"))] + ["--config.eval.max_new=49"]
  lines = [refused(train(place / "run", **long), "64 positions", "65 tokens"), refused(command("evaluate", held), "64 positions"),
           refused(command("serve", [*held, "--port=0"]), "64 positions"),
           refused(apart("plan", [*argv, "--topology=v5e:2x2"]), "64 positions"),
           refused(command("doctor", argv), "64 positions", "65 tokens")]
  worked(train(place / "fits", steps=1, rollout__max_prompt=16))
  return f"train, evaluate, serve, plan, doctor: {lines[0].replace(str(ROOT), 'DIR')!r}; 64 of 64 train"


def ids_beyond_the_embedding(place: Path) -> str:
  folder = model(place / "model")
  path = folder / "tokenizer.json"
  raw = json.loads(path.read_text())
  raw["added_tokens"].append(raw["added_tokens"][-1] | {"id": 19, "content": "?"})
  path.write_text(json.dumps(raw))
  line = refused(train(place / "run", model__path=folder, data__template="{problem}?"), "'?', id 19", "19 rows")
  worked(train(place / "fine", model__path=folder, steps=1))
  stop = model(place / "stop", generation_config={"eos_token_id": [18, 400]})
  refused(train(place / "run", model__path=stop), "a response may end with", "id 400")
  return f"{line!r}; where no prompt has one it trains"


def wheel(place: Path) -> str:
  source = place / "source"
  left_out = shutil.ignore_patterns(".git", ".venv", "runs", "results", "__pycache__", "*.egg-info", "build")
  shutil.copytree(ROOT, source, ignore=left_out)
  done = subprocess.run([sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", place, source], capture_output=True,
                        text=True)
  if done.returncode:
    raise Skipped(f"pip could not build a wheel here: {' '.join(done.stderr.split())[-160:]}")
  elsewhere = place / "elsewhere"
  elsewhere.mkdir()
  install = subprocess.run([sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index", "--target", place / "site",
                            next(place.glob("*.whl"))], capture_output=True, text=True)
  need(install.returncode == 0, install.stderr)
  scripts = sorted(p.name for p in (place / "site" / "bin").iterdir())
  run = lambda name, *argv: subprocess.run([sys.executable, place / "site" / "bin" / name, *argv], cwd=elsewhere, text=True,
                                           capture_output=True, env=os.environ | {"PYTHONPATH": str(place / "site")})
  keys = [x for x in arguments("run", steps=1) if not x.startswith("--config=")]
  for name in ("arrol-doctor", "arrol-train"):
    done = run(name, "--config=quickstart", *keys)
    need(done.returncode == 0, f"{name}: {done.stderr[-300:]}")
  need((elsewhere / "run" / "metrics.jsonl").exists(), "no run in the folder")
  done = run("arrol-train", "--config=nothing")
  need(done.returncode == 2 and "quickstart" in done.stderr, done.stderr)
  return f"{', '.join(scripts)}; arrol-train --config=quickstart trains in an empty folder"


def old_python(place: Path) -> str:
  """A Python that answers as 3.10 does, then the one that runs this."""
  for name in ("Makefile", "requirements.txt"):
    shutil.copy(ROOT / name, place)
  old = place / "python3.10"
  old.write_text("#!/bin/sh\nexit 1\n")
  old.chmod(0o755)
  environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
  run = lambda *argv: subprocess.run(["make", *argv], cwd=place, capture_output=True, text=True, env=environment)
  lines = []
  for python in (old, place / "python3.9"):  # the second is not there at all
    done = run(".venv/run", f"PYTHON={python}")
    said = [x for x in done.stderr.splitlines() if not x.startswith("make")]
    need(done.returncode == 2 and len(said) == 1 and "3.11" in said[0], f"status {done.returncode}: {said}")
    need(not (place / ".venv").exists(), "half an environment is left")
    lines += said
  need("-m venv .venv" in run("-n", ".venv/run", f"PYTHON={sys.executable}").stdout, "the next call does not make an environment")
  return repr(lines[0].replace(str(place), "DIR"))


def numbers_out_of_range(place: Path) -> str:
  bad = {"quality.weight_decay": "-1", "rollout.temperature": "inf", "reward.timeout": "nan", "optim.lr": "nan",
         "rollout.top_p": "1.5", "steps": "0", "prune.half_life": "0", "reward.timeout ": "0", "seed": "-1", "optim.b2": "1",
         "rollout.group_size": "1",
         "optim.micro_tokens": "0", "rollout.max_new": "-5", "stop_seconds": "nan"}
  for name, value in bad.items():
    line = refused(train(place / "run", **{name.strip(): value}), name.strip().split(".")[-1])
    need(not (place / "run" / "config.json").exists(), "the folder is taken")
  return f"{len(bad)} of them, such as {line!r}"


def help_texts(_: Path) -> str:
  counts = []
  for name in "train evaluate serve bench plan get doctor".split():
    module = importlib.import_module(f"arrol_jax.{name}")
    text = command(name, ["-h"]).out
    flags = re.findall(r"^  (--[\w.]+)", text, re.M)
    need(f"arrol-{name} " in text, f"{name}: no example")
    for flag in getattr(module, "FLAGS", {}):
      need(f"--{flag}" in flags, f"{name}: --{flag} is missing")
    if name not in ("bench", "get"):
      missing = [key for key, _, _ in usage.keys() if f"--config.{key}" not in flags]
      need(not missing, f"{name}: {missing}")
    counts.append(f"{name} {len(flags)}")
  return f"flags told: {', '.join(counts)}"


def paths(place: Path) -> str:
  adapter, stale, parquet = place / "adapter", model(place / "stale"), place / "rows.parquet"
  adapter.mkdir()
  (adapter / "adapter_config.json").write_text("{}")
  index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
  (stale / "model.safetensors.index.json").write_text(json.dumps(index))
  parquet.write_bytes(b"PAR1\0\xff")
  os.environ["HF_HUB_OFFLINE"] = "1"
  home, os.environ["HOME"] = os.environ.get("HOME", ""), str(place)
  try:
    lines = [refused(train(place / "run", **{key: value}), *words) for key, value, words in (
      ("model__path", "~/nothing", [f"{place}/nothing"]), ("model__path", "Qwen/Qwen3-99B", ["not on this machine", "arrol-get"]),
      ("model__path", adapter, ["LoRA adapter", "merge it"]), ("data__train", parquet, ["no file of JSON lines", "convert it"]),
      ("data__train", place, ["is a folder"]), ("data__train", "openai/gsm8k", ["hf:openai/gsm8k"]),
      ("model__path", MODEL / "model.safetensors", ["give the folder"]), ("data__train", "~/none.jsonl", ["does not exist"]))]
    worked(train(place / "stale_run", model__path="~/stale", steps=1))
  finally:
    os.environ["HOME"] = home
    del os.environ["HF_HUB_OFFLINE"]
  return f"{len(lines)} lines, such as {lines[1]!r}; ~ and one whole file beside a stale index are read"


def machines_and_damage(place: Path) -> str:
  seen = [refused(apart("train", arguments(place / "run"), JAX_PLATFORMS="cuda"), "JAX_PLATFORMS=cuda"),
          refused(apart("train", arguments(place / "run"), SLURM_NTASKS="2"), "SLURM_NTASKS=2", "srun")]
  whole = place / "whole"
  worked(train(whole))
  for name, content, words in (("config.json", '{"steps": 3', ["config.json: damaged"]), ("config.json", "[1]", ["damaged"]),
                               ("summary.json", "{", ["summary.json: damaged"]),
                               ("inputs.json", "\0\1", ["inputs.json: damaged"])):
    folder = place / f"damaged{len(seen)}"
    shutil.copytree(whole, folder)
    (folder / name).write_text(content)
    seen.append(refused(train(folder, steps=4), *words))
  half = place / "half"
  shutil.copytree(whole, half)
  (half / "summary.json").unlink()
  with open(half / "metrics.jsonl", "a") as f:
    f.write('{"step": 4, "rew')
  need("going on after step 3" in worked(train(half, steps=4)).out, "a half line stopped the run")
  nan = model(place / "nan")
  path = nan / "model.safetensors"
  path.write_bytes(path.read_bytes()[:-4] + np.float32("nan").tobytes())
  seen.append(refused(train(place / "run", model__path=nan), "holds NaN"))
  return f"{len(seen)} lines, such as {seen[0]!r} and {seen[-1].replace(str(place), 'DIR')!r}; a half line of metrics is dropped"


def stops_and_begins(place: Path) -> str:
  none = {"eos_token_id": None}
  silent = model(place / "silent", generation_config=none, config=none, tokenizer_config={"eos_token": None})
  cases = (({"model__path": silent}, "no stop token"), ({"data__template": "{problem}<eos>"}, "end with the stop token"),
           ({"data__template": "<bos><bos>{problem}"}, "twice"))
  lines = []
  for i, (overrides, words) in enumerate(cases):
    for said in (train(place / f"run{i}", steps=1, **overrides), command("doctor", arguments(place / f"run{i}x", **overrides))):
      line, = [x for x in worked(said).err if x.startswith("warning:") and words in x]
      need("set " in line, f"it does not say what to set: {line}")
    lines.append(line)
  fine = worked(train(place / "fine", steps=1, data__template="<bos>{problem}"))
  need(not [x for x in fine.err if x.startswith("warning:")], "a warning where nothing is wrong")
  return f"train and doctor, one line each: {lines[0][:90]!r}, {lines[1][:50]!r}, {lines[2][:50]!r}"
