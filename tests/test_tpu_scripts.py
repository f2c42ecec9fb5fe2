"""The TPU scripts' commands as --dry-run prints them; nothing here talks to a cloud."""

import math
import os
from pathlib import Path
import shlex
import shutil
import subprocess
import sys
import time

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "tpu_scripts").glob("*.sh"))
COMMANDS = [path.stem for path in SCRIPTS if path.stem != "common"]


@pytest.fixture
def dry_run(tmp_path):
  """dry_run(script, *arguments, **environment) -> printed commands, split into words; a call of gcloud or git would fail."""
  for name in ("gcloud", "git", "mkdir"):
    (tmp_path / name).write_text("#!/bin/sh\necho called >&2\nexit 77\n")
    (tmp_path / name).chmod(0o755)

  def run(script, *arguments, **environment):
    path = {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", ROOT / f"tpu_scripts/{script}.sh", "--dry-run", *arguments], text=True, capture_output=True,
                          env=path | {"NAME": "pod", "ZONE": "here-a"} | environment)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return [shlex.split(line) for line in shlex_lines(done.stdout)]

  return run


def shlex_lines(text):
  """Lines of output; bash prints a line break within a word as $'...\\n...'."""
  return [line.replace("$'", "'") for line in text.splitlines()]


def test_create(dry_run):
  for kind, runtime in (("v5litepod-256", "v2-alpha-tpuv5-lite"), ("v5p-128", "v2-alpha-tpuv5"), ("v6e-256", "v2-alpha-tpuv6e")):
    create, describe = dry_run("create", "--spot", TYPE=kind, PROJECT="mine")
    assert create[:6] == ["gcloud", "compute", "tpus", "queued-resources", "create", "pod"]
    assert {f"--accelerator-type={kind}", f"--runtime-version={runtime}", "--node-id=pod", "--spot"} <= set(create)
    for command in (create, describe):
      assert command[command.index("--zone") + 1] == "here-a" and command[command.index("--project") + 1] == "mine"
  assert "--spot" not in dry_run("create", TYPE="v6e-8")[0] and "--project" not in dry_run("create", TYPE="v6e-8")[0]


def test_setup_reaches_every_worker(dry_run):
  archive, copy, install = dry_run("setup")
  assert archive[:2] == ["git", "archive"] and archive[-1] == "HEAD" and archive[-2] == f"--output={copy[5]}"
  assert copy[4] == "scp" and copy[6] == "pod:arrol_jax.tar.gz" and "--worker=all" in copy and "--worker=all" in install
  assert "jax[tpu]" in install[-1] and "requirements.txt" in install[-1]
  assert "venv -q --allow-existing --python 3.11 .venv" in install[-1]  # the machines' own Python is 3.10
  assert "gcsfuse --implicit-dirs --rename-dir-limit=200000 my-bucket arrol/runs" in dry_run("setup", BUCKET="my-bucket")[3][-1]
  assert not list(ROOT.glob("arrol_jax.*.tar.gz"))


def test_run_keeps_arguments_whole_and_the_worker_free(dry_run):
  command, = dry_run("run", "--config=configs/quickstart.py", "--config.data.template=a b; c")
  assert command[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "pod"] and "--worker=all" in command
  remote = command[-1].removeprefix("--command=")
  words = shlex.split(remote)
  assert "nohup" in words and "--config.data.template=a b; c" in words and "--config=configs/quickstart.py" in words
  assert "train.log" in words and "&" in words and "train.pid;" in words
  # What the worker's shell would do, with Python and its module replaced by one that prints its arguments.
  plain = remote.replace("cd arrol", "cd .").replace("nohup .venv/bin/python -m arrol_jax.train", "printf '[%s]'")
  done = subprocess.run(["bash", "-c", f"cd $(mktemp -d) && {plain}; wait; cat train.log"], text=True, capture_output=True)
  assert done.stdout == "[--config=configs/quickstart.py][--config.data.template=a b; c]" and not done.stderr


def test_watch_stop_sync_delete(dry_run):
  assert dry_run("watch")[0][-1].endswith("-F train.log ") and "--worker=0" in dry_run("watch")[0]
  watched, = dry_run("watch", "mine", WORKER="3")
  assert watched[-1].endswith("-F train.log runs/mine/metrics.jsonl") and "--worker=3" in watched
  assert "kill -TERM" in dry_run("stop")[0][-1] and "--worker=all" in dry_run("stop")[0]
  folder, run, log = dry_run("sync", "mine")
  assert folder == ["mkdir", "-p", "runs/mine"] and run[5:8] == ["--recurse", "pod:arrol/runs/mine", "runs"]
  assert log[5:7] == ["pod:arrol/train.log", "runs/mine/train.log"]
  delete, = dry_run("delete")
  assert delete[3:6] == ["queued-resources", "delete", "pod"] and {"--force", "--quiet"} <= set(delete)


@pytest.mark.parametrize("script", COMMANDS)
def test_what_is_missing_is_named(script):
  done = subprocess.run(["bash", ROOT / f"tpu_scripts/{script}.sh", "--dry-run"], text=True, capture_output=True,
                        env={"PATH": os.environ["PATH"]})
  assert done.returncode != 0 and "set NAME" in done.stderr and not done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_short_and_clean(path):
  lines = path.read_text().splitlines()
  assert len(lines) <= 30
  if path.stem != "common":
    assert lines[0] == "#!/usr/bin/env bash" and "set -euo pipefail" in lines and os.access(path, os.X_OK)
  check = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
  if check:
    done = subprocess.run([check, "-x", path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_manifest_asks_for_the_chips_it_names():
  manifest = yaml.safe_load((ROOT / "tpu_scripts/gke.yaml").read_text())
  job = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]
  pod = job["template"]["spec"]
  chips = math.prod(map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")))
  assert job["parallelism"] == job["completions"] == chips // pod["containers"][0]["resources"]["limits"]["google.com/tpu"]
  config = pod["containers"][0]["args"][1].removeprefix("--config=")
  assert (ROOT / config).is_file()
  assert "rename-dir-limit" in pod["volumes"][0]["csi"]["volumeAttributes"]["mountOptions"]


@pytest.mark.parametrize("training, told, done", [
  ('touch "$RUN/summary.json"', False, True), ("exit 0", False, False), ("exit 2", False, False),
  ('trap "exit 0" TERM; touch "$RUN/started"; while :; do sleep 0.05; done', True, False),
  ('trap "touch $RUN/summary.json; exit 0" TERM; touch "$RUN/started"; while :; do sleep 0.05; done', True, True)],
  ids=["finished", "stopped early", "failed", "preempted", "finished meanwhile"])
def test_a_run_that_is_not_finished_makes_the_job_come_again(tmp_path, training, told, done):
  """The container's command with a stand-in for Python: status 0 only with summary.json, and SIGTERM reaches the run."""
  manifest = yaml.safe_load((ROOT / "tpu_scripts/gke.yaml").read_text())
  container, = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
  (tmp_path / "python").write_text(f"#!/bin/bash\nRUN={tmp_path}\necho \"$@\" > $RUN/arguments\n{training}\n")
  (tmp_path / "python").chmod(0o755)
  command = [*container["command"], str(tmp_path), *container["args"][1:]]
  process = subprocess.Popen(command, env={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
  while told and not (tmp_path / "started").exists():
    assert process.poll() is None
    time.sleep(0.01)
  if told:
    process.terminate()
  assert (process.wait(20) == 0) == done
  said = (tmp_path / "arguments").read_text().split()
  assert said == ["-m", "arrol_jax.train", f"--workdir={tmp_path}", *container["args"][1:]]
