"""One step's prompts rolled out and graded: survivors are graded while later segments decode (paper Algorithm 1).
"""


from collections import Counter
from collections.abc import Callable
import logging
import time
from typing import NamedTuple

import jax

from arrol_jax.engine.sampling import Sampling
from arrol_jax.engine.scheduler import Engine, Request
from arrol_jax.running import hosts
from arrol_jax.types import FAILED, Rollout, UserError

_log = logging.getLogger(__name__)


class Grading(NamedTuple):
  """What turns a response into a reward; pattern: the grader's, to read answers that are voted on. success: the least reward of a
  success. function: the reward function's name, which must not fail on all answers; None: answers are compared."""
  tokenizer: object
  grader: object
  pattern: str | None = None
  success: float = 1.0
  function: str | None = None


class Asked(NamedTuple):
  """What is wanted of each prompt; temperature: where the sampling leaves it to requests."""
  samples: int
  temperature: float = 1.0


def generate(engine: Engine, prompts: dict, asked: Asked | int, key: jax.Array, sampling: Sampling, grading: Grading,
             decide: Callable | None = None, progress: Callable | None = None) -> tuple[list[Rollout], float]:
  """Rolls out G = asked.samples responses to each prompt, {number: data.Prompt}, and grades those that were not pruned.

  Returns P * G rollouts in order (G of the first prompt, then of the next) and the seconds spent waiting for grades after the
  last token. Prompts are numbered without a gap. progress(rollout) is called for each that ends. With several
  processes each reads and grades its share of the rollouts, and all get all of them.
  """
  tokenizer, grader = grading[:2]
  samples, temperature = asked if isinstance(asked, Asked) else Asked(asked)
  requests = [Request(p * samples + g, p, prompt.tokens, engine.max_new, temperature)
              for p, prompt in prompts.items() for g in range(samples)]
  pending = []

  def on_done(rollout: Rollout):
    if hosts.mine(rollout.request):
      rollout.text = tokenizer.decode(rollout.tokens, skip_special_tokens=True)
      if not rollout.pruned:
        pending.append((rollout, grader.grade_async([(rollout.text, prompts[rollout.prompt].problem.answer)])))
    progress and progress(rollout)

  rollouts = engine.run(requests, key, sampling, decide=decide, on_done=on_done)
  waited = time.perf_counter()
  for rollout, waiting in pending:
    rollout.reward, rollout.reason = waiting.result()[0]
  parts = hosts.gather([(r.text, r.reward, r.reason) for r in rollouts if hosts.mine(r.request)])
  for r in rollouts:  # requests are numbered without a gap, and each process read its own in their order
    r.text, r.reward, r.reason = parts[r.request % len(parts)].pop(0)
    r.success_at, r.problem = grading.success, prompts[r.prompt].problem
  _tell_failures(grading, [r.reason for r in rollouts if not r.pruned])
  return rollouts, time.perf_counter() - waited


def _tell_failures(grading: Grading, reasons: list[str]) -> None:
  """A warning where most answers could not be graded; see also `check_failures`.

  Now and then it is a hostile answer; but this must not pass for a policy that knows nothing. One late answer alone ends nothing.
  """
  if grading.function:
    check_failures(grading.function, grading.grader, reasons)
  failed = Counter(reason for reason in reasons if reason in FAILED)
  if 2 * failed.total() > len(reasons):
    _log.warning("%d of %d answers could not be graded (%s) and count as wrong: see reward.function, reward.timeout, "
                 "reward.memory, reward.workers", failed.total(), len(reasons), _counts(failed))


def check_failures(function: str, grader, reasons: list[str]) -> None:
  """UserError where the reward function failed on all of a step's answers, by the reasons of their grades."""
  failed = Counter(reason for reason in reasons if reason in FAILED)
  if failed and failed.total() == len(reasons) and (len(reasons) > 1 or failed["error"]):
    problem = grader.first_problem
    raise UserError(f"reward.function={function} failed on all {len(reasons)} answers ({_counts(failed)}"
                    f"{'; first: ' + problem if problem else ''}); mend it, or see reward.timeout and reward.memory")


def _counts(failed: Counter) -> str:
  return ", ".join(f"{count} {reason}" for reason, count in failed.items())
