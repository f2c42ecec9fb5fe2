"""A run's folder: who may write there, with which settings, problems and weights, and what a damaged file in it does."""

import json
import os
from pathlib import Path
import shutil
import signal
import subprocess
import sys
import time
from unittest import mock

from helpers_train import FAST, ROOT, arguments, assert_refused, command, read, run, timeless
import pytest

from arrol_jax import config, train
from arrol_jax.learning import generation
from arrol_jax.models.files import safetensors
from arrol_jax.running import hosts, workdir
from arrol_jax.running.checkpoint import Checkpoints
from arrol_jax.types import UserError


def files(folder):
  return {str(f): f.read_bytes() for f in folder.rglob("*") if f.is_file() and f.name != ".lock"}


def refused_and_left_alone(folder, *words, **overrides):
  before = files(folder)
  assert_refused(command(*arguments(folder, **FAST | overrides)), *words)
  assert files(folder) == before


def parse(*overrides):
  return config.parse(["x", f"--config={ROOT}/configs/quickstart.py", *(f"--config.{x}" for x in overrides)])[0]


# ---- one run at a time


def test_a_second_run_is_refused_and_the_lock_goes_with_its_holder(tmp_path):
  with workdir.hold(str(tmp_path)):
    with pytest.raises(UserError, match=f"another run is writing there .process {os.getpid()} on "):
      workdir.hold(str(tmp_path))
  code = ("import sys, time; from arrol_jax.running import workdir; x = workdir.hold(sys.argv[1]); print(1, flush=True); "
          "time.sleep(99)")
  other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE)
  try:
    other.stdout.readline()
    with pytest.raises(UserError, match=f"process {other.pid} on "):
      workdir.hold(str(tmp_path))
  finally:
    other.kill()
    other.communicate()
  workdir.hold(str(tmp_path)).close()


def test_the_second_of_two_runs_is_one_line_and_touches_nothing(copied):
  with workdir.hold(str(copied)):
    refused_and_left_alone(copied, "another run is writing there", "--workdir")
  run(copied, **FAST)  # and then it is free again


def test_a_file_system_without_locks_is_no_hindrance(tmp_path):
  with mock.patch.object(workdir.fcntl, "flock", side_effect=OSError(95, "not supported")):
    workdir.hold(str(tmp_path)).close()


# ---- a run whose checkpoints are gone


def test_a_finished_run_without_checkpoints_does_not_start_anew(done, tmp_path):
  folder = Path(shutil.copytree(done, tmp_path / "run"))
  shutil.rmtree(folder / "checkpoints")
  refused_and_left_alone(folder, "holds 3 steps of a run whose checkpoints are gone", "--workdir", steps=5)
  (folder / "checkpoints").mkdir()
  (folder / "policy").mkdir()
  refused_and_left_alone(folder, "checkpoints are gone", f"{folder}/policy", steps=5)
  result = command(*arguments(folder, **FAST))  # no more steps: as it was
  assert (result.status, result.out) == (0, f"{folder}: finished (3 steps); its results are in summary.json\n")


def test_a_killed_run_without_checkpoints_does_not_start_anew_either(copied):
  """Past the second save the first must have been there; before it, nothing may have been saved yet."""
  shutil.rmtree(copied / "checkpoints")
  lines = (copied / "metrics.jsonl").read_text().splitlines(True)
  (copied / "config.json").write_text(json.dumps(read(copied / "config.json") | {"checkpoint": {"every": 1}}))
  refused_and_left_alone(copied, "holds 3 steps of a run whose checkpoints are gone")
  (copied / "metrics.jsonl").write_text("".join(lines[:2]))
  workdir.check_can_go_on(str(copied))


# ---- what may change


def test_memory_machines_and_speed_may_change(copied, done):
  """The run goes on, with the same course: sums in another order are all that differs."""
  (copied / "metrics.jsonl").write_text("".join((copied / "metrics.jsonl").read_text().splitlines(True)[:2]))
  shutil.rmtree(copied / "checkpoints" / "3")
  out = run(copied, **FAST, optim__micro_tokens=512, optim__chunk_tokens=256, rollout__slots=8, rollout__segment=16,
            reward__workers=1, reward__timeout=9.0, model__remat="full", data__folder="elsewhere").out
  assert "going on after step 2" in out
  for a, b in zip(timeless(read(copied / "metrics.jsonl")), timeless(read(done / "metrics.jsonl")), strict=True):
    for name in ("reward", "rollouts_kept", "tokens_generated", "tokens_trained"):
      assert a[name] == b[name], name
    assert a["policy_loss"] == pytest.approx(b["policy_loss"], rel=1e-3, abs=1e-5)


def test_only_free_keys_are_free():
  same = workdir.fingerprint(parse())
  free = {"model.attention": "xla", "model.remat": "full", "model.scan_layers": False, "data.folder": "x", "data.tfds_dir": "x",
          "rollout.slots": 3, "rollout.attention": "xla", "rollout.segment": 16, "rollout.row_buckets": 1,
          "rollout.length_buckets": 3, "optim.micro_tokens": 1, "optim.chunk_tokens": 1, "optim.length_buckets": 3,
          "optim.tail_sizes": 2, "reward.workers": 9, "reward.timeout": 1.5, "reward.memory": 5}
  assert set(free) == set(workdir.FREE)
  for name, value in free.items():
    assert workdir.fingerprint(parse(f"{name}={value}")) == same, name
  for other in ("rollout.cache=int8", "model.dtype=bfloat16", "rollout.max_new=56", "optim.epochs=2", "reward.pattern=boxed"):
    assert workdir.fingerprint(parse(other)) != same, other


def test_a_key_that_is_new_has_had_its_default(copied):
  """config.json of a version that knew neither a key nor a section; with another value than the default it is another run."""
  stored = read(copied / "config.json")
  del stored["learn"], stored["rollout"]["explore"], stored["rollout"]["cache"]
  (copied / "config.json").write_text(json.dumps(stored))
  refused_and_left_alone(copied, "other settings (learn.keep)", learn__keep=0.5)
  refused_and_left_alone(copied, "other settings (rollout.cache)", rollout__cache="int8")
  assert "going on after step 3" in run(copied, **FAST).out


def test_checkpoints_of_an_older_version_are_this_runs(copied):
  """They carry the hash of the config as it was then: of all but the free sections."""
  stored = read(copied / "config.json")
  del stored["learn"]
  (copied / "config.json").write_text(json.dumps(stored))
  (copied / "inputs.json").unlink()
  old = workdir._older_hashes(str(copied))[0]
  real = Checkpoints._notes
  with mock.patch.object(Checkpoints, "_notes", lambda self, step: real(self, step) | {"config_hash": old}):
    assert "going on after step 3" in run(copied, **FAST).out
    (copied / "summary.json").unlink()
    assert "going on after step 3" in run(copied, **FAST).out  # config.json is of today now
  with mock.patch.object(Checkpoints, "_notes", lambda self, step: real(self, step) | {"config_hash": "another"}):
    (copied / "summary.json").unlink()
    assert_refused(last_line(command(*arguments(copied, **FAST))), "another config_hash")


def last_line(result):
  """Without the progress bars that a later mistake comes after."""
  result.err = result.err.replace("\r", "\n").strip().splitlines()[-1]
  return result


# ---- what a run began with


@pytest.fixture
def own(tmp_path):
  """A run of one step with a model and problems of its own: (folder, its settings)."""
  shutil.copytree(ROOT / "experiments/arithmetic/signs", tmp_path / "model")
  lines = (ROOT / "experiments/arithmetic/train.jsonl").read_text().splitlines(True)[:40]
  (tmp_path / "train.jsonl").write_text("".join(lines))
  settings = FAST | {"steps": 1, "checkpoint__every": 1, "model__path": tmp_path / "model",
                     "data__train": tmp_path / "train.jsonl"}
  run(tmp_path / "run", **settings)
  return tmp_path, settings | {"steps": 2}


def test_problems_that_changed_are_refused(own):
  folder, settings = own
  path = folder / "train.jsonl"
  lines = path.read_text().splitlines(True)
  for changed in (lines[::-1], lines[:-1], [lines[0].replace('"answer": "', '"answer": "1'), *lines[1:]]):
    path.write_text("".join(changed))
    refused_and_left_alone(folder / "run", "the problems of data.train changed since this run began", **settings)
  path.write_text("".join(lines))
  run(folder / "run", **settings)


def test_weights_that_changed_are_refused(own):
  folder, settings = own
  file = folder / "model" / "model.safetensors"
  arrays = {n: t.read().copy() for n, t in safetensors.read_header(file).items()}
  arrays["model.norm.weight"][3] *= 1.02  # as little as bfloat16 holds
  safetensors.write(file, [(n, a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()])
  refused_and_left_alone(folder / "run", "the weights of model.path changed since this run began", **settings)


@pytest.mark.parametrize("name, key, value", [("config", "rms_norm_eps", 1e-3), ("generation_config", "eos_token_id", 14)])
def test_a_models_settings_that_changed_are_refused(own, name, key, value):
  """Those that its weights do not show; a run that began before they were kept goes on."""
  (folder, settings), file = own, own[0] / "model" / f"{name}.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {key: value}))
  refused_and_left_alone(folder / "run", "what config.json and generation_config.json of model.path say", **settings)
  path = folder / "run" / "inputs.json"
  path.write_text(json.dumps({name: x for name, x in read(path).items() if name != "model"}))
  run(folder / "run", **settings)


def test_a_tokenizer_that_changed_is_refused(own):
  folder, settings = own
  file = folder / "model" / "tokenizer.json"
  value = json.loads(file.read_text())
  vocab = value["model"]["vocab"]
  vocab["1"], vocab["2"] = vocab["2"], vocab["1"]
  file.write_text(json.dumps(value))
  refused_and_left_alone(folder / "run", "what the tokenizer makes of the prompts", **settings)


def test_held_out_problems_that_changed_are_evaluated_again(tmp_path):
  lines = (ROOT / "experiments/arithmetic/test.jsonl").read_text().splitlines(True)
  settings = FAST | {"steps": 1, "checkpoint__every": 1, "data__eval": tmp_path / "test.jsonl", "eval__problems": 0}
  (tmp_path / "test.jsonl").write_text("".join(lines[:3]))
  run(tmp_path / "run", **settings)
  (tmp_path / "test.jsonl").write_text("".join(lines[:5]))
  run(tmp_path / "run", **settings | {"steps": 2})
  assert [read(tmp_path / "run" / f"eval_{x}.json")["test"]["problems"] for x in ("before", "after")] == [5, 5]


def test_an_export_that_cannot_be_is_found_out_at_the_start(tmp_path):
  (tmp_path / "policy").mkdir()
  (tmp_path / "policy" / "notes.txt").write_text("mine")
  assert_refused(command(*arguments(tmp_path, **FAST | {"checkpoint__export": True})), "policy", "notes.txt")
  assert not (tmp_path / "config.json").exists()


# ---- damaged files


@pytest.mark.parametrize("text", ["", "{", '{"steps": 3', "[1]", "\0\0\0\0"])
@pytest.mark.parametrize("name, advice", [("config.json", "put it back, or delete it"), ("summary.json", "delete it"),
                                          ("inputs.json", "delete it")])
def test_a_damaged_json_file_is_one_line(done, tmp_path, name, advice, text):
  folder = Path(shutil.copytree(done, tmp_path / "run"))
  (folder / name).write_text(text)
  refused_and_left_alone(folder, f"{folder}/{name}: damaged", advice, steps=4)
  if text == "{":  # the advice is sound
    (folder / name).unlink()
    result = command(*arguments(folder, **FAST))
    assert result.status == 0 and read(folder / "summary.json")["steps"] == 3


def test_a_section_without_keys_is_one_line(copied):
  path = copied / "config.json"
  path.write_text(json.dumps(json.loads(path.read_text()) | {"optim": None}))
  refused_and_left_alone(copied, "config.json: damaged (optim has no keys)", "put it back")


def test_a_summary_without_steps_is_one_line(copied):
  (copied / "summary.json").write_text("{}")
  refused_and_left_alone(copied, "summary.json: damaged")


@pytest.mark.parametrize("tail", ['{"step": 4, "rew', '{"step": 4, "rew\n', "\0\0\0\0\n", '{"step": 4}\n{"st\n{"step": 5}\n',
                                  "[]\n"])
def test_half_lines_of_steps_that_come_again_are_dropped(copied, done, tail):
  with open(copied / "metrics.jsonl", "a") as f:
    f.write(tail)
  run(copied, **FAST)
  assert timeless(read(copied / "metrics.jsonl")) == timeless(read(done / "metrics.jsonl"))


def test_a_damaged_line_of_a_step_that_is_done_is_one_line(copied):
  lines = (copied / "metrics.jsonl").read_text().splitlines(True)
  (copied / "metrics.jsonl").write_text(lines[0] + lines[1][:40] + "\n" + lines[2])
  result = last_line(command(*arguments(copied, **FAST)))
  assert_refused(result, f"{copied}/metrics.jsonl, line 2: damaged; delete that line")
  (copied / "metrics.jsonl").write_text(lines[0] + lines[2])
  run(copied, **FAST)
  assert read(copied / "summary.json")["steps"] == 3


def test_without_its_log_a_finished_run_still_ends(copied):
  for name in ("metrics", "rollouts"):
    (copied / f"{name}.jsonl").unlink()
  run(copied, **FAST)
  assert read(copied / "summary.json") | {"seconds": 0} == read(copied / "summary.json") | {
    "seconds": 0, "steps": 3, "tokens_generated": 0, "final_reward": None}


# ---- signals


@pytest.mark.parametrize("name", ["SIGINT", "SIGHUP", "SIGTERM"])
def test_signals_save_the_last_step_and_end_with_a_word(tmp_path, done, name):
  number, before = getattr(signal, name), signal.getsignal(getattr(signal, name))
  calls = iter(range(100))
  real = generation.generate

  def generate(*args, **kwargs):
    if next(calls) == 1:  # in the second step
      os.kill(os.getpid(), number)
    return real(*args, **kwargs)

  with mock.patch.object(generation, "generate", generate):
    result = command(*arguments(tmp_path, **FAST))
  assert result.status == 0 and signal.getsignal(number) is before
  assert result.out.endswith(f"{name}; step 1 is saved\nstopped by {name}; the same command goes on from there\n")
  assert "going on after step 1" in run(tmp_path, **FAST).out
  assert timeless(read(tmp_path / "metrics.jsonl")) == timeless(read(done / "metrics.jsonl"))


def test_a_second_ctrl_c_is_pythons_own():
  with hosts.Watch() as watch:
    os.kill(os.getpid(), signal.SIGINT)
    assert watch.told == "SIGINT"
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGHUP])
def test_what_is_ignored_stays_ignored(number):
  """nohup, and a job in the background of a script."""
  before = signal.signal(number, signal.SIG_IGN)
  try:
    with hosts.Watch() as watch:
      os.kill(os.getpid(), number)
      watch.check()
    assert signal.getsignal(number) == signal.SIG_IGN
  finally:
    signal.signal(number, before)


def test_a_terminal_that_is_gone_stops_nobody(monkeypatch):
  class Gone:
    def write(self, text):
      raise OSError(5, "Input/output error")

    flush = write
  monkeypatch.setattr(sys, "stdout", Gone())
  hosts.say("nobody hears this")
  hosts.say("nor this")


# ---- a disk that fails


def test_a_folder_that_cannot_be_written_is_one_line_and_the_process_ends(tmp_path):
  """The checkpoints' folder becomes a file after the first save: found out during the next steps, not at the next save."""
  (tmp_path / "run").mkdir()
  argv = arguments(tmp_path / "run", **FAST | {"steps": 10**6, "checkpoint__every": 3})
  with open(tmp_path / "log", "w") as log:
    process = subprocess.Popen([sys.executable, "-m", "arrol_jax.train", *argv], cwd=ROOT, stdout=log, stderr=log)
  try:
    deadline = time.monotonic() + 240
    while not (tmp_path / "run" / "checkpoints" / "3").is_dir():
      assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
      time.sleep(0.02)
    shutil.move(tmp_path / "run" / "checkpoints", tmp_path / "kept")
    (tmp_path / "run" / "checkpoints").write_text("")
    assert process.wait(60) == 2
  finally:
    process.kill()
    process.wait()
  said = (tmp_path / "log").read_text().replace("\r", "\n")
  assert "Traceback" not in said and "ERROR" not in said
  errors = [line for line in said.splitlines() if line.startswith("error: ")]
  assert len(errors) == 1 and "a checkpoint could not be written" in errors[0] and "checkpoints" in errors[0]


def test_a_failed_save_is_noticed_before_the_next_one(tmp_path):
  checkpoints = Checkpoints(str(tmp_path), 2)
  with mock.patch.object(checkpoints.manager, "is_saving_in_progress", lambda: False), \
      mock.patch.object(checkpoints.manager, "wait_until_finished", side_effect=ValueError("no room")):
    with pytest.raises(UserError, match="could not be written .ValueError: no room."):
      checkpoints.check()
  checkpoints.close()  # waits for nothing


@pytest.mark.parametrize("error, words", [
  (OSError(1, os.strerror(1), "W/config.json"), "W/config.json: Operation not permitted; repair it"),
  (OSError(30, os.strerror(30), "W/eval_before.json"), "W/eval_before.json: Read-only file system; repair it"),
  (OSError(5, os.strerror(5)), "FOLDER: Input/output error; repair it"),
  (OSError(28, os.strerror(28)), "FOLDER: No space left on device; make room"),
])
def test_what_the_disk_says_is_one_line(tmp_path, error, words):
  """With the file's name, or, of one that is open, the folder's."""
  with mock.patch.object(train, "claim", side_effect=error):
    assert_refused(command(*arguments(tmp_path, **FAST)), "error: " + words.replace("FOLDER", str(tmp_path)))
