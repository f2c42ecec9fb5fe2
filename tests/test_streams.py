"""stdout and stderr that cannot be written cost no work; what is a command's product is an error that names the right place."""

import contextlib
import json
import os
from pathlib import Path
import subprocess
import sys

from helpers_train import arguments, read
import pytest

from arrol_jax.running import streams

ROOT = Path(__file__).resolve().parents[1]
SPEAKS = """
import sys
from arrol_jax import config
from arrol_jax.running import hosts, streams
def main():
  {spare}
  for i in range(3000):
    hosts.say("progress " * 10)
    hosts.warn("a warning " * 10)
    print("progress " * 10, file=sys.stderr)
  {product}
  open(sys.argv[1], "w").write("all of the work")
config.run(main)
"""


def full():
  return open("/dev/full", "w")


def nobody():
  """A pipe without a reader."""
  ours, theirs = os.pipe()
  os.close(ours)
  return os.fdopen(theirs, "w")


def run(code, *argv, stdout, stderr, folder=ROOT):
  """Exit status of Python with that code and these streams, and what it wrote where they are pipes of this test."""
  with contextlib.ExitStack() as stack:
    out, err = (stack.enter_context(x()) if callable(x) else x for x in (stdout, stderr))
    done = subprocess.run([sys.executable, "-c", code, *map(str, argv)], cwd=folder, stdout=out, stderr=err, text=True,
                          env=os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])})
  return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("spare", ["", "streams.spare()"], ids=["product", "progress"])
@pytest.mark.parametrize("stream", [full, nobody])
def test_progress_that_cannot_be_written_is_lost_and_nothing_else(tmp_path, stream, spare):
  code = SPEAKS.format(spare=spare, product="print('a line')" if spare else "")
  assert run(code, tmp_path / "done", stdout=stream, stderr=stream)[0] == 0
  assert (tmp_path / "done").read_text() == "all of the work"


@pytest.mark.parametrize("stream, words", [(full, "No space left on device; make room"), (nobody, "Broken pipe; repair it")])
def test_a_product_that_cannot_be_written_is_an_error_that_names_it(tmp_path, stream, words):
  code = SPEAKS.format(spare="", product="print('a product')")
  status, _, err = run(code, tmp_path / "done", stdout=stream, stderr=subprocess.PIPE)
  assert status == 2 and err.splitlines()[-1].startswith(f"error: standard output: {words}") and "Traceback" not in err


def test_a_mistake_has_its_status_where_it_cannot_be_told(tmp_path):
  code = "from arrol_jax import config, types\ndef main(): raise types.UserError('a mistake')\nconfig.run(main)"
  assert run(code, stdout=full, stderr=full)[0] == 2


def test_files_do_not_get_the_numbers_of_streams_that_were_closed(tmp_path):
  """What libraries write to stderr would be in them."""
  code = ("import os, sys\nfrom arrol_jax.running import streams\nos.close(1), os.close(2)\n"
          "sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = None\nstreams.take()\n"
          "with open(sys.argv[1], 'w') as f:\n  print('x', file=sys.stderr, flush=True); print('y'); os.write(2, b'z')\n"
          "  f.write(str(f.fileno() > 2))\n")
  assert run(code, tmp_path / "file", stdout=subprocess.PIPE, stderr=subprocess.PIPE)[0] == 0
  assert (tmp_path / "file").read_text() == "True"


def test_what_was_written_is_whole_and_in_order(tmp_path):
  code = ("import sys\nfrom arrol_jax.running import streams\nprint('before')\nstreams.take()\n"
          "for i in range(2000):\n  print(i, 'ä' * 100)\nsys.stdout.write('end')")
  status, out, _ = run(code, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
  assert status == 0 and out == "before\n" + "".join(f"{i} {'ä' * 100}\n" for i in range(2000)) + "end"


def test_streams_that_somebody_has_replaced_stay(capsys):
  before = sys.stdout, sys.stderr
  streams.take()
  streams.spare()
  assert (sys.stdout, sys.stderr) == before


def test_a_reward_function_that_prints_keeps_its_reward(tmp_path):
  (tmp_path / "mine.py").write_text("def reward(response, answer):\n  print('x' * 20000, flush=True)\n  return 0.75\n")
  code = ("import sys\nfrom arrol_jax.rewards import Grader\nwith Grader(1, reward_fn='mine.reward') as grader:\n"
          "  open(sys.argv[1], 'w').write(str([x.reward for x in grader.grade_all([('a', 'b')] * 3)]))")
  assert run(code, tmp_path / "rewards", stdout=full, stderr=full, folder=tmp_path)[0] == 0
  assert (tmp_path / "rewards").read_text() == "[0.75, 0.75, 0.75]"


def test_a_plan_for_a_file_is_written_though_its_text_cannot_be(tmp_path):
  code = "from arrol_jax import plan\nplan.command()"
  argv = ("--config=configs/quickstart.py", "--topology=gpu:24GB", f"--json={tmp_path}/plan.json")
  status, _, err = run(code, *argv, stdout=full, stderr=subprocess.PIPE)
  assert status == 2 and "standard output: No space" in err and json.loads((tmp_path / "plan.json").read_text())["fits"]


@pytest.mark.parametrize("out, err", [(nobody, nobody), pytest.param(full, full, marks=pytest.mark.slow)])
def test_a_training_that_nobody_hears_does_all_of_its_steps(tmp_path, out, err):
  argv = arguments(tmp_path, steps=3, data__eval="", checkpoint__every=1000, prune__cold_start=1)
  assert run("from arrol_jax import train\ntrain.command()", *argv, stdout=out, stderr=err)[0] == 0
  assert read(tmp_path / "summary.json")["steps"] == 3 and (tmp_path / "checkpoints" / "3").is_dir()
