"""The reward, asked about an answer that is right and one that is wrong before a policy learns from it."""

from collections.abc import Callable
import functools

from ml_collections import ConfigDict

from arrol_jax.data.problems import Prompt, spaced
from arrol_jax.preflight.page import Page
from arrol_jax.rewards import Graded, Grader
from arrol_jax.rewards.extract import response_with
from arrol_jax.types import FAILED

_ASKED = 64  # reference answers that are graded against themselves, where no function of the user's is called
# What else a reward function may look for the answer in.
_FORMS = ("\\boxed{%s}", "Answer: %s", "#### %s", "<think>\n...\n</think>\n<answer>%s</answer>", "%s")


def reward(page: Page, c: ConfigDict, grader: Grader, prompts: list[Prompt]) -> None:
  r = c.reward
  page.say(f"{r.function or 'math equality'}, answers by reward.pattern={r.pattern}, a success from {r.success:g} on")
  judged = [p for p in prompts if not p.problem.source.startswith("reasoning_gym:")]
  if not judged:
    page.say("not called: only the tasks know their right answers")
  elif r.function:
    _function(page, c, grader, judged)
  else:
    _references(page, c, grader, judged)


def _references(page: Page, c: ConfigDict, grader: Grader, prompts: list[Prompt]) -> None:
  """Reference answers against themselves, written as reward.pattern reads them, and one against another's."""
  asked = spaced(prompts, _ASKED)
  right = [(response_with(p.problem.answer, c.reward.pattern), p.problem.answer) for p in asked]
  if all(response is None for response, _ in right):
    page.say("no response could be made that this pattern finds an answer in: see that the policy's responses end as it asks")
    page.warn(f"reward.pattern={c.reward.pattern} finds none of {len(asked)} reference answers, however they are written: check "
              "it on a response of yours (arrol_jax.rewards.extract_answer)")
    return
  grades = grader.grade_all([(response or "", gold) for response, gold in right])
  bad = [(*item, graded) for item, graded in zip(right, grades, strict=True) if graded.reward < c.reward.success]
  first = next(i for i, (response, _) in enumerate(right) if response is not None)
  wrong = (response_with(other_answer(prompts, asked[first].problem.answer), c.reward.pattern) or "", right[first][1])
  _tell(page, "right", *right[first], grades[first])
  _tell(page, "wrong", *wrong, mistaken := grader.grade_all([wrong])[0])
  if bad:
    response, gold, graded = bad[0]
    how = (f"{response!r} gets {graded.reward:g} ({graded.reason})" if response else
           f"reward.pattern={c.reward.pattern} does not find it")
    page.warn(f"{len(bad)} of {len(asked)} reference answers are not right against themselves, so nobody can be; the first: "
              f"{gold!r}, {how}")
  if mistaken.reward >= c.reward.success:
    page.warn(f"a wrong answer gets the reward of a success: {wrong[0]!r} for {wrong[1]!r}")


def _function(page: Page, c: ConfigDict, grader: Grader, prompts: list[Prompt]) -> None:
  """The user's function on one problem: its answer in the usual forms till one is a success, and another answer in that form."""
  gold, r = prompts[0].problem.answer, c.reward
  forms = [functools.partial(response_with, pattern=r.pattern), *(functools.partial(form.replace, "%s") for form in _FORMS)]
  asked: list[tuple[str, Graded, Callable]] = []
  for form in forms:
    if (response := form(gold)) is not None:
      asked.append((response, grader.grade_all([(response, gold)])[0], form))
      if asked[-1][1].reason == "correct":
        break
  response, right, form = max(asked, key=lambda one: one[1].reward)
  other = other_answer(prompts, gold)
  other = form(other) or other
  wrong = grader.grade_all([(other, gold)])[0]
  _tell(page, "right", response, gold, right)
  _tell(page, "wrong", other, gold, wrong)
  everything = [graded for _, graded, _ in asked] + [wrong]
  problem = grader.first_problem
  if all(graded.reason in FAILED for graded in everything):
    page.warn(f"{r.function} failed on all {len(everything)} answers that it was asked, right and wrong (first: {problem}); a "
              "run ends where that goes on")
    return
  if len({graded.reward for graded in everything}) == 1:
    page.warn(f"{r.function}: all rewards are alike ({wrong.reward:g}), right or wrong: nothing can be learned from them")
  elif right.reward < r.success:
    page.warn(f"{r.function} gives no answer the reward of a success (reward.success={r.success:g}), in none of {len(asked)} "
              f"usual forms; most, {right.reward:g}, gets {response!r} for {gold!r}: see the form it wants, or reward.success")
  elif wrong.reward >= r.success:
    page.warn(f"{r.function} gives a wrong answer the reward of a success ({wrong.reward:g}): {other!r} for {gold!r}")
  if problem:
    page.warn(f"{r.function}: {problem}; such an answer gets reward 0")


def _tell(page: Page, kind: str, response: str, gold: str, graded: Graded) -> None:
  page.say(f"{kind}: {response!r} for {gold!r} -> {graded.reward:g} ({graded.reason})")


def other_answer(prompts: list[Prompt], gold: str) -> str:
  """An answer that is not `gold`: that of another problem as it looks alike, or one made up."""
  with_digits = any(x.isdigit() for x in gold)
  others = (p.problem.answer for p in prompts if p.problem.answer.strip() != gold.strip())
  alike = next((x for x in others if any(y.isdigit() for y in x) == with_digits), None)
  return alike or (f"{gold}1" if with_digits else f"not {gold}")
