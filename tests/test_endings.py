"""Errors that end a command: one line and a status for those that a user can do something about, a traceback for the others."""

import errno
import os
from unittest import mock

from helpers_train import FAST, arguments, command, in_process
import jax
import pytest

from arrol_jax import config, doctor
from arrol_jax.running import workdir
from arrol_jax.types import UserError

AGAIN = "the same command goes on from the last checkpoint, if there is one"


@pytest.mark.parametrize("error, status, words", [
  (UserError("two\n  words"), 2, "error: two words"), (KeyboardInterrupt(), 130, f"interrupted; {AGAIN}"),
  (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "m.jsonl"), 2, "error: m.jsonl: No space left on device; make room"),
  (OSError(errno.EACCES, os.strerror(errno.EACCES), "W/x"), 2, "error: W/x: Permission denied; repair it"),
  (MemoryError("Unable to allocate 1.00 TiB for an array"), 2, "this machine's memory is full (Unable to allocate 1.00 TiB"),
  (MemoryError(), 2, "this machine's memory is full (no more is to be had)"),
  (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes.\nMore:\n"), 2,
   "a device's memory is full (RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes); fewer rollout.slots")])
def test_what_a_user_can_mend_is_one_line(capsys, error, status, words):
  def main():
    raise error

  with pytest.raises(SystemExit) as e:
    config.run(main)
  said = capsys.readouterr().err
  assert e.value.code == status and words in said and said.count("\n") == 1


@pytest.mark.parametrize("error", [OSError(errno.EBADF, "x"), jax.errors.JaxRuntimeError("INTERNAL: x"), ValueError("x")])
def test_what_nobody_foresaw_keeps_its_traceback(error):
  def main():
    raise error

  with pytest.raises(type(error)) as e:
    config.run(main)
  assert e.value is error


@pytest.mark.parametrize("folder", ["run", "new/run"])
@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_a_folder_that_takes_no_file_is_told_in_the_systems_words(tmp_path, error, folder):
  """Before anything is read, and by arrol-doctor; whoever the user is."""
  (tmp_path / "run").mkdir()
  asked = []

  def refuse(dir):
    asked.append(dir)
    raise OSError(error, os.strerror(error), dir)

  line = f"error: --workdir={tmp_path / folder}: nothing can be written there ({os.strerror(error)})"
  with mock.patch.object(workdir.tempfile, "TemporaryFile", refuse):
    assert command(*arguments(tmp_path / folder, **FAST)).err == f"{line}\n"
    assert in_process(doctor, *arguments(tmp_path / folder, **FAST)).err.splitlines()[-1] == line
  assert asked == [str(tmp_path / folder) if folder == "run" else str(tmp_path)] * 2


def test_looking_whether_a_folder_can_be_written_leaves_nothing_there(tmp_path):
  workdir.check_writable(str(tmp_path))
  workdir.check_writable(str(tmp_path / "a" / "b"))
  workdir.check_writable("no/such/folder")
  assert os.listdir(tmp_path) == [] and not os.path.exists("no")
  (tmp_path / "file").touch()
  for name in ("file", "file/run"):
    with pytest.raises(UserError, match="Not a directory"):
      workdir.check_writable(str(tmp_path / name))
