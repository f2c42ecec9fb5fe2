"""Grading under limits: that nothing hangs, raises, outlives its run or is lost."""

import os
from pathlib import Path
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest
from test_rewards import boxed

from arrol_jax.rewards import Graded, Grader, grade
from arrol_jax.types import UserError

REPOSITORY = Path(__file__).resolve().parents[1]

# --- hostile input, time, threads ---------------------------------------------------------------------------

HOSTILE = ["9**9**9**9", "9^{9^{9^{9}}}", "9!!!!!!!!", "(((((((9!)!)!)!)!)!)!", "{" * 500 + "1" + "}" * 500,
           "+".join(["x^2"] * 2000),
           "x" * 100_000, "9" * 100_000, "1e999999999", "2.5e9999999999", r"10^{999999999}",
           r"\frac{1}{1e-999999999}", r"\sum_{n=1}^{10^{9}} \frac{1}{n!}",
           "(" * 140 + "x" + ")" * 140, "1/0", r"\int_0^1 e^{e^{e^{x^9}}} dx", "\x00\ud800", "\\", "^",
           r"\input{/etc/passwd}"]


def test_hostile_answers_cost_a_deadline_at_most():
  items = [(boxed(text), gold) for text in HOSTILE for gold in ("12", r"\sqrt{2}")] + [(boxed("2^{1/2}"),
                                                                                        r"\sqrt{2}")]
  with Grader(2, timeout_s=1.0, memory_mb=512) as grader:
    start = time.monotonic()
    grades = grader.grade_all(items)
    assert time.monotonic() - start < 1.0 * len(HOSTILE) + 10
    assert [graded.reward for graded in grades] == [0.0] * (2 * len(HOSTILE)) + [1.0]
    assert grades[2 * HOSTILE.index("x" * 100_000)].reason == "too_long"
    assert grader.counts.total() == len(items)


def test_settling_inline_is_fast_and_starts_nothing():
  with Grader(2) as grader:
    start = time.monotonic()
    pending = grader.grade_async([(boxed("9" * 100_000), "12"), ("\\boxed{" * 20_000, "12"),
                                  ("\\" * 100_000, "12"),
                                  ("\\boxed" + " " * 100_000, "12"), (boxed("1e999999999"), "12"),
                                  (boxed(r"\frac12"), "0.5"),
                                  *[(boxed(f"{i}"), f"{i}") for i in range(1000)]])
    assert pending.done()
    assert time.monotonic() - start < 1.0
    assert sum(graded.reward for graded in pending.result()) == 1001
    assert grader._shared.workers == []


def test_grade_from_another_thread_leaves_timers_and_signals_alone():
  handler = signal.signal(signal.SIGALRM, lambda *_: None)
  signal.setitimer(signal.ITIMER_REAL, 1000)
  try:
    results = []
    threads = [threading.Thread(target=lambda: results.append(grade(boxed("1+x"), "x+1"))) for _ in range(4)]
    for thread in threads:
      thread.start()
    for thread in threads:
      thread.join()
    assert results == [1.0] * 4
    assert grade(boxed("2+x"), "x+1") == 0.0
    assert 900 < signal.getitimer(signal.ITIMER_REAL)[0] <= 1000
  finally:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, handler)


@pytest.mark.parametrize("response, answer", [(None, "12"), (b"12", "12"), (12, "12"), (boxed("x+1"), None),
                                              ("", "")])
def test_grade_never_raises(response, answer):
  assert grade(response, answer) == 0.0


# --- the pool -----------------------------------------------------------------------------------------------

REWARDS = """
  import os, signal, sys, time
  from arrol_jax.rewards import grade

  def behave(response, answer, pattern):
    kind, _, rest = response.partition(" ")
    if kind == "sleep": time.sleep(float(rest))
    if kind == "die": os.kill(os.getpid(), signal.SIGKILL)
    if kind == "die_once" and not os.path.exists(rest):
      open(rest, "w").close()
      os.kill(os.getpid(), signal.SIGKILL)
    if kind == "memory": bytearray(4 * 2**30)
    if kind == "exit": sys.exit(0)
    if kind == "raise": raise BaseException
    if kind == "number": return float(rest)
    if kind == "grade": return grade(rest, answer)
    if kind == "pattern": return pattern == rest
    if kind == "ready": return "math_verify" in sys.modules
    if kind == "modules": return not {"jax", "jaxlib", "flax", "arrol_jax.types"} & set(sys.modules)
    print("not for the run's output")
    return 1
"""


@pytest.fixture
def rewards_module(tmp_path, monkeypatch):
  (tmp_path / "some_rewards.py").write_text(textwrap.dedent(REWARDS))
  monkeypatch.syspath_prepend(str(tmp_path))
  return "some_rewards.behave"


def test_reward_function_under_limits(rewards_module, tmp_path, capfd):
  kinds = [("fine", "correct"), ("sleep 60", "timeout"), ("die", "crashed"), ("memory", "crashed"),
           (f"die_once {tmp_path}/died", "correct"), ("exit", "error"), ("raise", "error"),
           ("number nan", "error"), ("number 2", "correct"), ("number 0.5", "wrong"), ("number -1", "wrong"),
           ("number 0", "wrong"),
           ("modules", "correct"), ("pattern hashes", "correct"), ("fine", "correct")]
  with Grader(1, "hashes", timeout_s=2.0, memory_mb=1024, reward_fn=rewards_module) as grader:
    grades = grader.grade_all([(kind, "x+1") for kind, _ in kinds])
    assert [(kind, graded.reason) for (kind, _), graded in zip(kinds, grades, strict=True)] == kinds
    assert [graded.reward for graded in grades] == [
      float(kind.split()[1]) if kind in ("number 2", "number 0.5", "number -1") else float(reason == "correct")
      for kind, reason in kinds]
    assert grader.counts == {reason: [r for _, r in kinds].count(reason) for _, reason in kinds}
  out, err = capfd.readouterr()
  assert out == "" and err.count("some_rewards.behave: SystemExit") == 1


def test_a_reward_function_may_grade(rewards_module):
  with Grader(1, reward_fn=rewards_module) as grader:
    assert grader.grade_all([("ready", "")]) == [Graded(1.0, "correct")]  # imported before the deadline runs
    grades = grader.grade_all([(rf"grade {boxed(answer)}", "x+1") for answer in ("1+x", "x")])
    assert grades == [Graded(1.0, "correct"), Graded(0.0, "wrong")]


def test_order_is_kept_while_workers_overtake_each_other(rewards_module):
  delays = [0.4, 0.0, 0.2, 0.0, 0.1, 0.0, 0.0, 0.3]
  with Grader(2, reward_fn=rewards_module) as grader:
    rewards = [i / 16 for i in range(16)]
    items = [item for delay, reward in zip(delays, rewards, strict=False) for item in ((f"sleep {delay}", ""),
                                                                         (f"number {reward}", ""))]
    pending = grader.grade_async(items)
    assert not pending.done()
    assert [graded.reward for graded in pending.result()] == [r for reward in rewards[:8] for r in (1.0,
                                                                                                    reward)]
    assert pending.done()


def test_killing_workers_loses_nothing():
  items = [(boxed(f"{i}+x"), f"x+{i + i % 2}") for i in range(200)]
  with Grader(2) as grader:
    pending = grader.grade_async(items)
    killed = 0
    while not pending.done() and killed < 2:  # each once: who is killed over the same item twice is thought to be its victim
      for worker in list(grader._shared.workers):
        process = worker.process
        if process is not None:
          os.kill(process.pid, signal.SIGKILL)
          killed += 1
      time.sleep(0.01)  # as soon as they are there
    assert killed
    assert [graded.reward for graded in pending.result()] == [float(i % 2 == 0) for i in range(200)]


def test_bad_reward_functions_and_numbers_are_told_at_once(rewards_module):
  for path in ("some_rewards.missing", "no_such_module.reward", "nodots"):
    with pytest.raises(UserError, match=path):
      Grader(1, reward_fn=path)
  with pytest.raises(UserError, match="workers=0"):
    Grader(0)


def test_close_ends_what_is_under_way(rewards_module):
  grader = Grader(1, timeout_s=60, reward_fn=rewards_module)
  pending = grader.grade_async([("sleep 60", "")] * 3)
  time.sleep(0.2)
  process = grader._shared.workers[0].process
  start = time.monotonic()
  grader.close()
  assert [graded.reason for graded in pending.result()] == ["error"] * 3
  assert grader.grade_all([("fine", "")]) == [Graded(0.0, "error")]
  assert time.monotonic() - start < 5
  process.wait(5)


SCRIPT = """
  import os, sys, time
  from arrol_jax.rewards import Grader, grade
  print("main ran", grade(r"\\\\boxed{1+x}", "x+1"), "jax" in sys.modules, flush=True)
  grader = Grader(1, timeout_s=60, reward_fn="some_rewards.behave")
  grader.grade_async([("sleep 60", "")])
  time.sleep(0.3)  # now the worker is at it, and would not see that its parent is gone
  print(grader._shared.workers[0].process.pid, flush=True)
  os._exit(0)
"""


def test_unguarded_script_and_nothing_outlives_it(rewards_module, tmp_path):
  script = tmp_path / "script.py"
  script.write_text(textwrap.dedent(SCRIPT))
  run = subprocess.run([sys.executable, str(script)], env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
                       capture_output=True,
                       text=True, timeout=60)
  lines = run.stdout.splitlines()
  assert lines[0] == "main ran 1.0 False" and len(lines) == 2, run.stderr
  deadline = time.monotonic() + 10
  while _alive(int(lines[1])):
    assert time.monotonic() < deadline, "the worker outlived its parent"
    time.sleep(0.1)


def _alive(pid: int) -> bool:
  try:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
  except (FileNotFoundError, ProcessLookupError):
    return False


def test_grading_in_a_forked_child():
  code = textwrap.dedent(r"""
    import os, sys
    from arrol_jax.rewards import grade
    right = lambda: grade(r"\boxed{1+x}", "x+1") == 1.0
    assert right()
    pid = os.fork()
    if pid == 0:
      os._exit(0 if right() else 1)
    sys.exit(os.waitpid(pid, 0)[1] or not right())  # the child took nothing from its parent
  """)
  environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
  run = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60)
  assert run.returncode == 0
