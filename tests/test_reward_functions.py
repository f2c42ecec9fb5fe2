"""Reward functions of every shape: how their parameters are filled, what their results mean, and what is refused at the start."""

import functools
import gc
import math
import sys
import textwrap

import numpy as np
import pytest
from tqdm import tqdm

from arrol_jax.rewards import Graded, Grader, worker
from arrol_jax.types import UserError

PATTERN = "hashes"


class Called:
  def __call__(self, response, answer):
    return response, answer


async def later(response, answer):
  return 1.0


class Later:
  async def __call__(self, response, answer):
    return 1.0

  async def method(self, response, answer):
    return 1.0


def one_by_one(response, answer):
  yield 1.0


async def later_one_by_one(response, answer):
  yield 1.0


@functools.wraps(later)
def awaited(response, answer):
  return response, answer


FITS = {  # what is called -> what it should see of ("R", "A") and the pattern
  "plain": (lambda response, answer: (response, answer), ("R", "A")),
  "any names": (lambda r, a: (r, a), ("R", "A")),
  "swapped": (lambda answer, response: (response, answer), ("R", "A")),
  "one named": (lambda answer, text: (text, answer), ("R", "A")),
  "pattern": (lambda r, a, pattern: (r, a, pattern), ("R", "A", PATTERN)),
  "pattern with a default": (lambda r, a, *, pattern=None: (r, a, pattern), ("R", "A", PATTERN)),
  "pattern first": (lambda pattern, r, a: (r, a, pattern), ("R", "A", PATTERN)),
  "other libraries' names": (lambda ground_truth, solution_str: (solution_str, ground_truth), ("R", "A")),
  "the reference first": (lambda reference, text: (text, reference), ("R", "A")),
  "a prediction last, by name": (lambda gold, *, prediction, tol=1: (prediction, gold, tol), ("R", "A", 1)),
  "two names for an answer": (lambda gold, answer: (gold, answer), ("R", "A")),
  "a target that has a default": (lambda r, a, target=None: (r, a, target), ("R", "A", None)),
  "a default": (lambda r, a, tol=1e-6: (r, a, tol), ("R", "A", 1e-6)),
  "defaults around": (lambda response, tol=2, answer=None, extra=3: (response, answer, tol, extra), ("R", "A", 2, 3)),
  "keywords": (lambda r, a, **kw: (r, a, kw), ("R", "A", {})),
  "answer in the keywords": (lambda response, **kw: (response, kw), ("R", {"answer": "A"})),
  "all in the keywords": (lambda **kw: kw, {"response": "R", "answer": "A"}),
  "positions": (lambda *args: args, ("R", "A")),
  "position only": (lambda r, a, /, tol=1: (r, a, tol), ("R", "A", 1)),
  "keyword only": (lambda *, answer, response, strict=True: (response, answer, strict), ("R", "A", True)),
  "partial": (functools.partial(lambda r, a, tol: (r, a, tol), tol=5), ("R", "A", 5)),
  "an object": (Called(), ("R", "A")),
  "a partial of an object": (functools.partial(Called(), answer="B"), ("R", "A")),
  "a wrapper that runs a coroutine": (awaited, ("R", "A")),
}


@pytest.mark.parametrize("function, seen", FITS.values(), ids=FITS)
def test_parameters_are_filled_by_name(monkeypatch, function, seen):
  monkeypatch.setattr(worker, "as_reward", lambda value: got.append(value) or 1.0)
  got = []
  assert worker.bind(function, PATTERN)("R", "A") == Graded(1.0, "correct")
  assert got == [seen]


REFUSED = {
  "one parameter": (lambda response: 1, "no parameter for the answer"),
  "none": (lambda: 1, "no parameter for the response and the answer"),
  "a third": (lambda r, a, extra: 1, "nothing to give extra"),
  "a required keyword": (lambda r, a, *, tol: 1, "nothing to give tol"),
  "data_source first": (lambda data_source, solution_str, ground_truth, extra_info=None: 1, "nothing to give data_source"),
  "a default where the answer would go": (lambda r, tol=1e-6: 1, "no parameter for the answer"),
  "a class": (Called, "a class"),
  "a number": (3, "'int', not a function"),
  "a coroutine": (later, "coroutine.*asyncio.run inside"),
  "a partial of one": (functools.partial(later, answer="A"), "coroutine"),
  "an object with one": (Later(), "coroutine"),
  "a partial of an object with one": (functools.partial(Later(), answer="A"), "coroutine"),
  "a method that is one": (Later().method, "coroutine"),
  "a generator": (one_by_one, "generator"),
  "a generator of coroutines": (later_one_by_one, "generator"),
}


@pytest.mark.parametrize("function, words", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_called_is_refused(function, words):
  with pytest.raises(TypeError, match=words):
    worker.bind(function, None)


@pytest.mark.parametrize("value, reward", [
  (1, 1.0), (True, 1.0), (-2.5, -2.5), (1.5, 1.5), (1e6, 1e6),
  (1e39, 1e39), (-1e150, -1e150), (np.float32(0.25), 0.25), (np.array(3), 3.0),
  (np.bool_(False), 0.0)])
def test_any_finite_number_is_a_reward(value, reward):
  assert worker.as_reward(value) == reward


@pytest.mark.parametrize("value, text", [
  (None, "None"), (math.nan, "nan"), (math.inf, "inf"),
  (1e151, "1e+151, which is larger than 1e+150"), ("1.0", "'1.0'"), ([1.0], "[1.0]"), ({}, "{}"),
  (np.ones(1), "array"), (1j, "1j"), (np.complex64(1), "1"), ((1, {}), "(1, {})"), ("x" * 999, "...")])
def test_anything_else_is_told_with_its_value(value, text):
  with pytest.raises(worker.NoReward) as e:
    worker.as_reward(value)
  assert text in str(e.value) and len(str(e.value)) < 260 and "\n" not in str(e.value)


def test_a_coroutine_that_is_returned_is_closed_and_told(recwarn):
  """No function says before its call that it returns one."""
  with pytest.raises(worker.NoReward, match=r"it returned a coroutine.*asyncio.run\(...\)"):
    worker.as_reward(later("R", "A"))
  gc.collect()
  assert not [w for w in recwarn if "never awaited" in str(w.message)]


@pytest.fixture
def functions(tmp_path, monkeypatch):
  (tmp_path / "my_rewards.py").write_text(textwrap.dedent("""
    import math
    def form(response, answer): return 0.5 * response.startswith("so") + 1.0 * response.endswith(answer)
    def odd(response, answer): return {"none": None, "nan": math.nan, "list": [1.0], "text": "1", "big": 10**400}.get(response, 1)
    def wants_three(response, answer, extra): return 1
    """))
  monkeypatch.syspath_prepend(str(tmp_path))


def test_rewards_outside_0_and_1_are_taken_as_they_are(functions):
  items = [("so 12", "12"), ("12", "12"), ("so 13", "12"), ("13", "12")]
  with Grader(1, reward_fn="my_rewards.form") as grader:
    assert grader.grade_all(items) == [Graded(1.5, "correct"), Graded(1.0, "correct"), Graded(0.5, "wrong"), Graded(0.0, "wrong")]
  with Grader(1, reward_fn="my_rewards.form", success=1.5) as grader:
    assert [g.reason for g in grader.grade_all(items)] == ["correct", "wrong", "wrong", "wrong"]


def test_what_is_no_number_is_counted_and_the_first_told_once(functions, capfd):
  """Of two workers one line, with the value; an overflow is an exception, which is told once too."""
  with Grader(2, reward_fn="my_rewards.odd") as grader:
    assert grader.grade_all([("none", "")]) == [Graded(0.0, "error")]
    grades = grader.grade_all([(kind, "") for kind in ("nan", "list", "text", "big", "fine") * 2])
    assert [g.reason for g in grades] == ["error", "error", "error", "error", "correct"] * 2
    assert grader.counts == {"error": 9, "correct": 2}
    assert grader.first_problem == "it returned None, which is no finite number"
  lines = capfd.readouterr().err.splitlines()
  assert lines[0] == "reward function my_rewards.odd: it returned None, which is no finite number; reward 0"
  assert len(lines) == 2 and "OverflowError" in lines[1]


def test_what_went_wrong_is_a_line_of_its_own_beside_a_progress_bar(functions, capfd):
  """The bar is wiped before and drawn again after it."""
  with Grader(1, reward_fn="my_rewards.odd") as grader, tqdm(total=2, mininterval=0, desc="train", file=sys.stderr) as bar:
    bar.update()
    grader.grade_all([("none", "")])
  segments = capfd.readouterr().err.replace("\r", "\n").splitlines()
  assert "reward function my_rewards.odd: it returned None, which is no finite number; reward 0" in segments
  assert segments[-1].startswith("train:  50%")


def test_a_signature_that_does_not_fit_is_one_line_at_the_start(functions):
  with pytest.raises(UserError) as e:
    Grader(1, reward_fn="my_rewards.wants_three")
  for words in ("my_rewards.wants_three", "(response, answer, extra)", "nothing to give extra"):
    assert words in str(e.value)


def test_a_function_without_its_module_is_told_how_to_be_named():
  with pytest.raises(ValueError, match="it takes MODULE.FUNCTION"):
    worker.load("near")
  assert worker.load("math.floor") is worker.load("math:floor")
