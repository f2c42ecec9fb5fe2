"""DAPO's dynamic sampling (arXiv 2503.14476): new prompts until enough groups have variance.
"""


from collections.abc import Callable
import math

from arrol_jax.types import Rollout


def mixed_groups(rollouts: list[Rollout]) -> list[int]:
  """Prompts whose survivors' raw rewards are not all alike, whatever counts as a success, ascending."""
  rewards = {}
  for r in rollouts:
    if not r.pruned:
      rewards.setdefault(r.prompt, set()).add(r.reward)
  return sorted(p for p, seen in rewards.items() if len(seen) > 1)


def until_mixed(roll_out: Callable, wanted: int, rounds: int) -> tuple[list[Rollout], list[Rollout], int]:
  """DAPO's dynamic sampling: rolls out new prompts until `wanted` groups have variance, or `rounds` rounds are spent.

  roll_out(round, count) -> rollouts of `count` prompts of that round, numbered on from the rounds before. The first round has
  `wanted` prompts, a later one as many as should give the missing groups at the share that was mixed so far, and a margin
  of about one standard deviation. Returns the rollouts to learn from (the first `wanted` mixed groups), all rollouts,
  and the rounds taken.
  """
  everything, mixed, prompts, count = [], [], 0, wanted
  for n in range(rounds):
    new = roll_out(n, count)
    everything += new
    mixed += mixed_groups(new)
    prompts += count
    missing = wanted - len(mixed)
    if missing <= 0:
      break
    count = min(wanted, math.ceil((missing + math.sqrt(missing)) * prompts / max(len(mixed), 1)))
  chosen = set(mixed[:wanted])
  return [r for r in everything if r.prompt in chosen], everything, n + 1
