"""Errors that end a command: one line and a status for those that a user can do something about, a traceback for the others."""

import errno
import os

import jax
import pytest

from arrol_jax import config
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
