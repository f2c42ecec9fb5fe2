"""One step's prompts rolled out and graded: survivors are graded while later segments decode (paper Algorithm 1).
"""


from collections import Counter
from collections.abc import Callable
import dataclasses
import logging
import time
from typing import NamedTuple

import jax

from arrol_jax.engine.sampling import Sampling
from arrol_jax.engine.scheduler import Engine, Request
from arrol_jax.running import hosts
from arrol_jax.types import FAILED, Rollout, UserError

_log = logging.getLogger(__name__)
_LISTEN_S = 0.5  # how often a wait for grades looks whether the run is told to stop
ENOUGH = 128  # answers in a row, of which none could be graded, that say that the reward function is broken


class Ungraded(UserError):
  """The reward function has failed on all of so many answers that it is not for the answers."""


@dataclasses.dataclass
class Grading:
  """What turns a response into a reward; pattern: the grader's, to read answers that are voted on. success: the least reward of a
  success. function: the reward function's name, which must not fail on ENOUGH answers in a row; None: answers are compared.
  failed: reasons of the answers that could not be graded, since the last batch of which one could; graded: whether one could."""
  tokenizer: object
  grader: object
  pattern: str | None = None
  success: float = 1.0
  function: str | None = None
  failed: Counter[str] = dataclasses.field(default_factory=Counter)
  graded: bool = False

  def check(self, most: int) -> None:
    """Raises Ungraded where the reward function has failed on more than the last `most` answers in a row."""
    count = self.failed.total()
    if self.function and count > most:
      problem = self.grader.first_problem
      raise Ungraded(f"reward.function={self.function} failed on all of the last {count} answers ({_counts(self.failed)}"
                     f"{'; first: ' + problem if problem else ''}); mend it, or see reward.timeout and reward.memory")


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
  wanted = Wanted(prompts, asked, engine.max_new, grading, progress=progress)
  return wanted.graded(engine.run(wanted.requests, key, sampling, decide=decide, on_done=wanted.ended), engine.watch)


class Wanted:
  """A step's rollouts from requests to rewards, see `generate`. first: the engine's number of its first request, a multiple of
  the samples; rollouts that have ended are numbered from 0. chosen: what was known of the prompts, for who asks."""

  def __init__(self, prompts: dict, asked: Asked | int, max_new: int, grading: Grading, first: int = 0,
               progress: Callable | None = None, chosen: tuple = ()):
    samples, temperature = asked if isinstance(asked, Asked) else Asked(asked)
    self.prompts, self.grading, self.progress, self.first, self.samples = prompts, grading, progress, first, samples
    self.requests = [Request(first + p * samples + g, first // samples + p, prompt.tokens, max_new, temperature)
                     for p, prompt in prompts.items() for g in range(samples)]
    self.left, self.pending, self.chosen = len(self.requests), [], chosen

  def has(self, rollout: Rollout) -> bool:
    """Whether a rollout that has just ended is one of these."""
    return self.first <= rollout.request < self.first + len(self.requests)

  def ended(self, rollout: Rollout) -> None:
    """Hands it to the grader, whose answer `graded` waits for."""
    rollout.request, rollout.prompt = rollout.request - self.first, rollout.prompt - self.first // self.samples
    self.left -= 1
    if hosts.mine(rollout.request):
      rollout.text = self.grading.tokenizer.decode(rollout.tokens, skip_special_tokens=True)
      if not rollout.pruned:
        answer = self.prompts[rollout.prompt].problem.answer
        self.pending.append((rollout, self.grading.grader.grade_async([(rollout.text, answer)])))
    self.progress and self.progress(rollout)

  def graded(self, rollouts: list[Rollout], watch: Callable | None = None) -> tuple[list[Rollout], float]:
    """All of them, in the order of the requests, with their rewards, and the seconds waited for grades.

    watch() is called meanwhile, as often in every process; what it raises ends the wait. Raises Ungraded.
    """
    waited = time.perf_counter()
    while not all(hosts.gather(self._wait(_LISTEN_S))):
      watch and watch()
    for rollout, waiting in self.pending:
      rollout.reward, rollout.reason = waiting.result()[0]
    parts = hosts.gather([(r.text, r.reward, r.reason) for r in rollouts if hosts.mine(r.request)])
    for r in rollouts:  # requests are numbered without a gap, and each process read its own in their order
      r.text, r.reward, r.reason = parts[r.request % len(parts)].pop(0)
      r.success_at, r.problem = self.grading.success, self.prompts[r.prompt].problem
    _tell_failures(self.grading, [r.reason for r in rollouts if not r.pruned])
    return rollouts, time.perf_counter() - waited

  def _wait(self, seconds: float) -> bool:
    """Waits so long at most for this process's grades, and says whether all are there."""
    until = time.monotonic() + seconds
    return all(waiting.wait(max(0.0, until - time.monotonic())) for _, waiting in self.pending)


def _tell_failures(grading: Grading, reasons: list[str]) -> None:
  """A warning where most answers could not be graded, Ungraded where the reward function has failed on ENOUGH in a row.

  Now and then it is a hostile answer; but this must not pass for a policy that knows nothing. Few answers alone end nothing.
  """
  failed = Counter(reason for reason in reasons if reason in FAILED)
  grading.failed = grading.failed + failed if failed.total() == len(reasons) else Counter()
  grading.graded |= failed.total() < len(reasons)
  grading.check(ENOUGH - 1)
  if 2 * failed.total() > len(reasons):
    _log.warning("%d of %d answers could not be graded (%s) and count as wrong: see reward.function, reward.timeout, "
                 "reward.memory, reward.workers", failed.total(), len(reasons), _counts(failed))


def _counts(failed: Counter) -> str:
  return ", ".join(f"{count} {reason}" for reason, count in failed.items())
