"""Rollouts that run ahead: the slots that a step's last rollouts leave free already decode the next steps' (rollout.ahead).

A step's generation lasts as long as its longest response, whoever has ended or was pruned. Here one engine run goes through all
steps: what has begun of the next ones is decoded on, by the new weights, after the update. So a part of each step's tokens was
drawn by earlier policies, at most `most` updates old (Rollout.stale says which). The sampler's log-probs are those of the policy
that drew each token, so loss.correction weighs them. Each step learns from all of its own prompts' rollouts and from no other:
waiting for the long ones, it prefers no length. Compare PipelineRL (arXiv 2509.19128).

The longest response spans at most most + 1 steps, so a step takes at least its length divided by that: with one step ahead what
pruning saves is hardly seen, with two or three it is.
"""

from collections.abc import Callable

import jax

from arrol_jax.engine.sampling import Sampling
from arrol_jax.engine.scheduler import Engine, Run, Sequence
from arrol_jax.learning.generation import Wanted
from arrol_jax.types import Rollout


class Ahead:
  """Steps' rollouts on the same slots.

  begin(step) -> Wanted: what a step wants, the first request numbered step * (how many a step has); called while the engine is
  loaded. steps: how many there are; most: how many may have begun beside the one that is waited for. key: the run's; a request's
  own is fold_in(key, its number).
  """

  def __init__(self, engine: Engine, sampling: Sampling, key: jax.Array, begin: Callable, steps: int, most: int):
    self.engine, self.sampling, self.key, self.begin, self.steps, self.most = engine, sampling, key, begin, steps, most
    self.drop()

  def drop(self) -> None:
    """Gives up what has run ahead, and its memory; the next step begins anew."""
    self.run: Run | None = None
    self.under_way: dict[int, tuple[Wanted, list[Sequence]]] = {}

  def generate(self, step: int, decide: Callable | None = None) -> tuple[list[Rollout], float, tuple]:
    """All rollouts of `step` with their rewards, the seconds waited for grades, and Wanted.chosen. The next steps'
    have begun where slots were free."""
    if self.run is None:
      self.run = Run(self.engine, self.key, self.sampling)
      self.run.counts = self.run.counts[-1:]  # nobody shrinks a batch that is filled up
    wanted, sequences = self._begun(step)
    for sequence in sequences:
      sequence.rollout.stale = sequence.count
    # Of prompts that an older policy read, only those go on whose groups are under way: rows of a group share theirs bit for bit.
    seated, (where, prefix) = {x.request.prompt for x in self.run.slot_to_request if x}, self.run.prefixes
    where = {prompt: i for prompt, i in where.items() if prompt in seated}
    self.run.prefixes = where, prefix if where else None
    while wanted.left:
      behind = max(self.under_way) + 1
      if not self.run.waiting and None in self.run.slot_to_request and behind <= step + self.most and behind < self.steps:
        self._begun(behind)
      if not self.run.advance(decide, self._report):
        self._report()
    while self.run.in_flight:  # whatever was said, was said by this policy
      self.run.look()
    self._report()
    del self.under_way[step]
    if not self.under_way:  # nothing that an update would have to leave room for
      self.drop()
    return *wanted.graded([sequence.rollout for sequence in sequences], self.engine.watch), wanted.chosen

  def _begun(self, step: int) -> tuple[Wanted, list[Sequence]]:
    if step not in self.under_way:
      wanted = self.begin(step)
      self.under_way[step] = wanted, [self.run.add(request) for request in wanted.requests]
    return self.under_way[step]

  def _report(self) -> None:
    for rollout in self.run.take_finished():
      next(wanted for wanted, _ in self.under_way.values() if wanted.has(rollout)).ended(rollout)
