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
from arrol_jax.types import FAILED, Rollout

_log = logging.getLogger(__name__)


class Grading(NamedTuple):
  """What turns a response into a reward; pattern: the grader's, to read answers that are voted on."""
  tokenizer: object
  grader: object
  pattern: str | None = None


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
  tokenizer, grader, _ = grading
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
  failed = Counter(r.reason for r, _ in pending if r.reason in FAILED)
  if 2 * failed.total() > len(pending):  # now and then it is a hostile answer; this must not pass for a policy that knows nothing
    _log.warning("%d of %d answers could not be graded (%s) and count as wrong: see reward.function, reward.timeout, "
                 "reward.memory, reward.workers", failed.total(), len(pending),
                 ", ".join(f"{count} {reason}" for reason, count in failed.items()))
  parts = hosts.gather([(r.text, r.reward, r.reason) for r in rollouts if hosts.mine(r.request)])
  for r in rollouts:  # requests are numbered without a gap, and each process read its own in their order
    r.text, r.reward, r.reason = parts[r.request % len(parts)].pop(0)
  return rollouts, time.perf_counter() - waited
