"""What a user's environment and paths may be: devices that are not there, Slurm without srun, ~, and files of other kinds."""

import os
from pathlib import Path
import subprocess
import sys
from types import SimpleNamespace

from helpers_train import QUICKSTART, ROOT, arguments, assert_refused, command
import jax
import pytest

from arrol_jax import assemble, config
from arrol_jax.data import sources
from arrol_jax.engine import decode_attention
from arrol_jax.models import attention
from arrol_jax.running import hosts
from arrol_jax.types import UserError


def run(module: str, *argv, **environment):
  """`python -m arrol_jax.MODULE ARGV` in a process of its own."""
  done = subprocess.run([sys.executable, "-m", f"arrol_jax.{module}", *argv], cwd=ROOT, text=True, capture_output=True,
                        env=os.environ | environment)
  return SimpleNamespace(status=done.returncode, out=done.stdout, err=done.stderr)


@pytest.mark.parametrize("module, argv", [("train", [QUICKSTART, "--workdir=DIR"]), ("evaluate", [QUICKSTART]),
                                          ("serve", [QUICKSTART, "--port=0"]), ("bench", ["decode"])])
@pytest.mark.parametrize("platform", ["cuda", "no_such"])
def test_a_device_that_is_not_there_is_one_line(tmp_path, module, argv, platform):
  argv = [a.replace("DIR", str(tmp_path / "run")) for a in argv]
  result = run(module, *argv, JAX_PLATFORMS=platform)
  assert_refused(result, f"JAX_PLATFORMS={platform}", "no such device here", "JAX_PLATFORMS=cpu")


@pytest.mark.parametrize("platform, refused", [
  ("cpu", "model=cudnn model=splash rollout=triton rollout=tpu"), ("gpu", "model=splash rollout=tpu"),
  ("tpu", "model=cudnn rollout=triton")])
def test_what_a_device_cannot_attend_with_is_one_line(platform, refused):
  said = {}
  for section, ways in (("model", attention.IMPLEMENTATIONS), ("rollout", decode_attention.IMPLEMENTATIONS)):
    for way in ways:
      c, _ = config.parse(["x", QUICKSTART, f"--config.{section}.attention={way}", "--config.model.dtype=bfloat16"])
      try:
        assemble.check_attention(c, platform)
      except UserError as e:
        said[f"{section}={way}"] = str(e)
  assert " ".join(said) == refused and all(f"this is a {platform}, which can run xla" in text for text in said.values())


@pytest.mark.parametrize("environment, words", [
  ({"SLURM_NTASKS": "2"}, "SLURM_NTASKS=2, and this process was not started by srun"),
  ({"SLURM_NTASKS": "2", "SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "not started by srun"),  # sbatch
  ({"SLURM_NTASKS": "2", "SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "n1",
    "SLURM_STEP_NUM_TASKS": "1"}, "not started by srun"),  # a shell that srun --pty has started
  ({"SLURM_NTASKS": "two"}, "SLURM_NTASKS is 'two'"),
])
def test_slurm_without_srun_is_one_line(monkeypatch, environment, words):
  for name, value in environment.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(UserError, match=words):
    hosts.connect()


def test_what_srun_starts_is_joined(monkeypatch):
  joined = []
  monkeypatch.setattr(jax.distributed, "initialize", lambda *a, **k: joined.append(a))
  for name, value in {"SLURM_NTASKS": "2", "SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_LOCALID": "0",
                      "SLURM_STEP_NODELIST": "n1", "SLURM_STEP_NUM_TASKS": "2"}.items():
    monkeypatch.setenv(name, value)
  hosts.connect()
  monkeypatch.setenv("SLURM_NTASKS", "1")
  hosts.connect()
  assert joined == [()]


def test_processes_that_cannot_join_are_one_line(monkeypatch):
  def fail(*_, **__):
    raise RuntimeError("no one\nlistens there")
  monkeypatch.setattr(jax.distributed, "initialize", fail)
  for name, value in {"JAX_COORDINATOR_ADDRESS": "localhost:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}.items():
    monkeypatch.setenv(name, value)
  with pytest.raises(UserError, match="cannot join the run's others .RuntimeError: no one listens there."):
    hosts.connect()


# ---- paths


def test_a_tilde_is_the_home_in_every_path(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  (tmp_path / "mine.py").write_text((ROOT / "configs/quickstart.py").read_text())
  monkeypatch.chdir(ROOT)
  c, flags = config.parse([
    "x", "--config=~/mine.py", "--workdir=~/run", "--config.model.path=~/m", "--config.data.train=~/a.jsonl,tfds:~/b.jsonl,c~d/e",
    "--config.data.eval=hf:~/d?split=test, ~/f.jsonl", "--config.data.folder=~", "--config.data.tfds_dir=~/t",
    "--config.eval.benchmarks=gsm8k,~/g.jsonl"])
  home = str(tmp_path)
  assert flags.workdir == f"{home}/run" and flags["workdir"].present and c.model.path == f"{home}/m"
  assert c.data.train == f"{home}/a.jsonl,tfds:{home}/b.jsonl,c~d/e" and c.eval.benchmarks == f"gsm8k,{home}/g.jsonl"
  assert c.data.eval == f"hf:{home}/d?split=test, {home}/f.jsonl" and (c.data.folder, c.data.tfds_dir) == (home, f"{home}/t")
  assert config.parse(["x", "--config=~/mine.py"])[1].workdir == os.path.join("runs", "mine")


@pytest.mark.parametrize("key, value, words", [
  ("model.path", "Qwen/Qwen3-1.7B", ["Qwen/Qwen3-1.7B is not on this machine", "arrol-get Qwen/Qwen3-1.7B"]),
  ("data.train", "openai/gsm8k", ["data: openai/gsm8k does not exist", "hf:openai/gsm8k"]),
  ("data.train", "some/train.jsonl", ["data: some/train.jsonl does not exist"]),
])
def test_names_on_the_hub_say_what_to_do(tmp_path, key, value, words):
  result = command(*arguments(tmp_path / "run", **{key: value}))
  assert_refused(result, *words)
  assert ("hub" in result.err) == (value != "some/train.jsonl")


@pytest.mark.parametrize("name", ["x.parquet", "x.csv", "x.arrow", "x.jsonl.zst"])
def test_other_formats_say_how_to_convert_them(tmp_path, name):
  path = tmp_path / name
  path.write_bytes(b"PAR1\0\xff")
  for one in (str(path), name):
    with pytest.raises(UserError, match=f"{name} is no file of JSON lines; .* convert it"):
      sources.check(one, "train", "")


def test_parquet_under_another_name_and_folders(tmp_path):
  path = tmp_path / "x.jsonl"
  path.write_bytes(b"PAR1\0\xff")
  with pytest.raises(UserError, match="x.jsonl: a Parquet file; .* convert it"):
    sources.load_problems(str(path), "train")
  with pytest.raises(UserError, match=f"is a folder; give a .jsonl file in it, or hf:{tmp_path}"):
    sources.check(f"{tmp_path}", "train", "")


@pytest.mark.parametrize("make, words", [
  (lambda d: (d / "adapter_config.json").write_text("{}"), ["LoRA adapter", "merge it"]),
  (lambda d: (d / "pytorch_model.bin").write_text(""), ["config.json"]),
])
def test_folders_of_other_kinds_are_one_line_of_the_command(tmp_path, make, words):
  model = tmp_path / "model"
  model.mkdir()
  make(model)
  assert_refused(command(*arguments(tmp_path / "run", model__path=model)), str(model), *words)
  assert not Path(tmp_path / "run" / "config.json").exists()
