"""What a worker's deadline alone does not catch: workers that stand still or write noise, no /proc, a pattern that never ends."""

import resource
import textwrap
import time

import pytest

from arrol_jax.rewards import Graded, Grader, extract_answer, pool, worker

REWARDS = """
  import os, signal, sys, threading

  def behave(response, answer):
    kind, _, rest = response.partition(" ")
    if kind == "still": os.kill(os.getpid(), signal.SIGSTOP)
    if kind == "still_later": threading.Timer(0.1, os.kill, (os.getpid(), signal.SIGSTOP)).start()
    if kind == "noise": os.write(int(sys.argv[1]), b"not a pickle" * 9)
    if kind == "number": return float(rest)
    if kind == "sleep": threading.Event().wait(100)
    if kind == "exit": os._exit(int(rest))
    if kind == "killed": os.kill(os.getpid(), signal.SIGKILL)
    if kind == "memory": raise MemoryError
    return 1
"""


@pytest.fixture
def rewards_module(tmp_path, monkeypatch):
  (tmp_path / "odd_rewards.py").write_text(textwrap.dedent(REWARDS))
  monkeypatch.syspath_prepend(str(tmp_path))
  return "odd_rewards.behave"


def test_a_worker_that_stands_still_holds_nobody_up(rewards_module):
  """Also not one that does not read what is sent: a response of 8 MB is longer than any buffer between the two."""
  with Grader(1, timeout_s=1.0, reward_fn=rewards_module) as grader:
    assert grader.grade_all([("still", ""), ("still_later", "")]) == [Graded(0.0, "timeout"), Graded(1.0, "correct")]
    time.sleep(0.5)
    start = time.monotonic()
    assert grader.grade_all([("fine" + " " * 2**23, ""), ("fine", "")]) == [Graded(1.0, "correct")] * 2
    assert time.monotonic() - start < 30


@pytest.mark.parametrize("response, reason, words", [
  ("sleep", "timeout", "it took longer than reward.timeout=1 s"), ("memory", "crashed", "it ran out of memory"),
  ("exit 0", "crashed", "its process ended under one answer twice (exit status 0)"), ("exit 3", "crashed", "(exit status 3)"),
  ("killed", "crashed", "(SIGKILL)")])
def test_the_first_failure_of_each_kind_is_told_when_it_happens(rewards_module, capfd, response, reason, words):
  """Once, and as what went wrong first where all fail."""
  with Grader(1, timeout_s=1.0, reward_fn=rewards_module) as grader:
    for first in (True, False):
      assert grader.grade_all([(response, ""), ("fine", "")]) == [Graded(0.0, reason), Graded(1.0, "correct")]
      told = [line for line in capfd.readouterr().err.splitlines() if line.startswith(f"reward function {rewards_module}: ")]
      assert len(told) == first and all(words in line and line.endswith("; reward 0") for line in told)
    assert words in grader.first_problem
    grader.grade_all([("number x", "")])  # another kind
    assert "ValueError" in capfd.readouterr().err


def test_a_grader_that_is_closed_blames_nobody(rewards_module, capfd):
  grader = Grader(1, reward_fn=rewards_module)
  pending = grader.grade_async([("sleep", "")])
  grader.close()
  assert pending.result()[0].reward == 0.0 and capfd.readouterr().err == ""


def test_noise_from_a_worker_is_not_taken_for_the_next_items_grade(rewards_module):
  items = [("number 1", ""), ("noise", ""), ("number 0", ""), ("number 1", ""), ("number 0", "")]
  with Grader(1, timeout_s=1.0, reward_fn=rewards_module) as grader:
    grades = grader.grade_all(items)
  assert grades[1].reward == 0.0 and grades[1].reason in ("error", "crashed", "timeout")
  assert [g.reason for g in grades[:1] + grades[2:]] == ["correct", "wrong", "correct", "wrong"]


def test_without_proc_there_is_no_limit_and_no_failure(monkeypatch):
  def no_proc(path):
    raise FileNotFoundError(path)

  monkeypatch.setattr(worker, "open", no_proc, raising=False)
  before = resource.getrlimit(resource.RLIMIT_AS)
  worker.limit_memory(1)
  assert resource.getrlimit(resource.RLIMIT_AS) == before


def test_a_worker_killed_three_times_while_it_starts_loses_nothing(monkeypatch):
  kills, start = [], pool._Worker.start

  def killed_at_first(worker):
    if len(kills) < 3:
      kills.append(worker)
      return "it died while starting"
    return start(worker)

  monkeypatch.setattr(pool._Worker, "start", killed_at_first)
  with Grader(1) as grader:
    assert grader.grade_all([("\\boxed{x+1}", "1+x")]) == [Graded(1.0, "correct")] and len(kills) == 3


def test_a_pattern_that_searches_for_ever_finds_nothing_and_is_a_timeout():
  """Eleven lazy runs to place among six hundred commas: years for `re`."""
  pattern, response = r"(.*?,){11}P(x)", "12," * 600
  begun = time.monotonic()
  assert extract_answer(response, pattern) is None
  with Grader(1, pattern=pattern) as grader:
    assert grader.grade_all([(response, "12")]) == [Graded(0.0, "timeout")]
  assert time.monotonic() - begun < 20
