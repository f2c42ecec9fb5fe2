"""Votes over a call's traces (METHOD section 7), at a bounded price.

Whether two answers are the same is mathematics: most pairs are settled at once, some need a worker process, and a pair of hard
ones seconds there. So each pair is asked once, a vote has a deadline after which open pairs count as different, and votes have a
worker of their own that may be killed (rewards/pool.py).
"""

from collections.abc import Callable
import time
from typing import NamedTuple

from arrol_jax.pruning import voting
from arrol_jax.rewards import Grader, extract_answer
from arrol_jax.serving.calls import HOPELESS, Piece
from arrol_jax.types import FAILED

RULES = {"majority": "majority", "quality": "rank", "deepconf": "deepconf"}  # a call's word -> voting's rule
SECONDS = 5.0  # that a vote may spend on the sameness of answers
_PAIR = 2.0    # that a pair may take of its worker


class Vote(NamedTuple):
  """What a call's traces decided."""
  answer: str | None     # None: no trace has one
  chosen: int            # the heaviest trace that gives it
  weight: float          # of all traces that give it, as a share of all weights
  answers: list          # str or None, by trace
  scores: list           # float or None: the head's logit at the last token (quality), trace confidence (deepconf)
  weights: list[float]
  open_pairs: int = 0    # of answers whose sameness was not settled in time, and that count as different


class Sameness:
  """Whether answers are mathematically the same, asked of one worker process. Threads may share it."""

  def __init__(self):
    self.grader = Grader(1, None, _PAIR)

  def start(self) -> None:
    """Starts the worker, whose imports take seconds, without waiting for it."""
    self.grader.grade_async([("\\boxed{x(x+1)}", "x^2+x")])

  def ask(self, a: str, b: str, until: float) -> bool | None:
    """None where it is not settled by the time `until` (of time.monotonic)."""
    if time.monotonic() > until:
      return None
    pending, pause = self.grader.grade_async([(f"\\boxed{{{b}}}", a)]), 0.001
    while not pending.done():
      if time.monotonic() > until:
        return None
      time.sleep(pause)
      pause = min(2 * pause, 0.05)
    graded = pending.result()[0]
    return None if graded.reason in FAILED else graded.reward > 0

  def close(self) -> None:
    self.grader.close()


def tally(word: str, texts: list[str], last: list[Piece], pattern: str | None, window: int,
          ask: Callable | None = None, until: float | None = None) -> Vote:
  """The vote of a call's traces: texts, their last pieces, and the answers' pattern.

  word: of RULES; "quality" is the paper's rule, rank by the head's score; "deepconf" weighs by the mean of the lowest tenth of
  windows. Traces that were stopped as hopeless have no vote; math-equal answers pool theirs. ask(a, b, until): Sameness.ask; None
  compares answers as text.
  """
  answers = [None if p.finish == HOPELESS else extract_answer(t, pattern) for t, p in zip(texts, last, strict=True)]
  scores = None
  if word == "quality":
    scores = [p.rollout.final for p in last]
  elif word == "deepconf":
    scores = [voting.summarize_confidence(p.rollout.confidences, window, "bottom10") for p in last]
  rule = RULES[word]
  until, open_pairs = time.monotonic() + SECONDS if until is None else until, 0

  def same_answer(a: str, b: str) -> bool:
    nonlocal open_pairs
    verdict = ask(a, b, until)
    open_pairs += verdict is None
    return bool(verdict)

  pools = [None if x is None else str(x) for x in voting.pools_of(answers, same_answer if ask else None)]
  weights, winner = voting.trace_weights(answers, scores, rule), voting.vote(pools, scores, rule)
  if winner is None:
    alive = [i for i, p in enumerate(last) if p.finish != HOPELESS] or list(range(len(last)))
    chosen, share, answer = max(alive, key=lambda i: scores[i] if scores else 0.0), 0.0, None
  else:
    same = [i for i, pool in enumerate(pools) if pool == winner]
    chosen, answer = max(same, key=lambda i: weights[i]), answers[same[0]]
    share = sum(weights[i] for i in same) / (sum(weights) or 1.0)
  return Vote(answer, chosen, share, answers, scores or [None] * len(last), weights, open_pairs)
