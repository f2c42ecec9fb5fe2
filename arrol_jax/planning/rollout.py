"""A step's generation without a device: how long responses are, and which rows decode when, as the engine's scheduler has it.

Left out: that rows of a mesh stay in their shard, that the host learns of an end a segment late, and that columns of the cache
come in a few lengths where no kernel reads each row's own.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from arrol_jax.engine.programs import STRIDE
from arrol_jax.types import UserError

LENGTHS = "lognormal:0.6:0.5"  # the median as a share of the longest, and the spread of the logarithm


class Decoding(NamedTuple):
  """How a batch of rollouts is decoded."""
  prompt: int              # tokens of each
  group: int               # rollouts a prompt
  row_counts: list[int]    # compiled ones, ascending; the last are all slots
  segment: int
  detect: tuple[int, ...] = ()
  keep: float = 1.0        # of those that decisions see, all decisions together


class Segment(NamedTuple):
  """What one segment decodes, sums over its steps."""
  rows: int            # of the compiled batch
  steps: int
  tokens: int          # generated
  responses: int       # columns read of the rows' own responses
  prompts: int         # columns read of prompts, each row its own
  prompts_shared: int  # the same, a group's once


class Generation(NamedTuple):
  segments: list[Segment]
  kept: np.ndarray    # i64[K]  lengths of the rollouts that were not pruned
  inserts: int        # boundaries at which waiting requests took slots

  @property
  def tokens(self) -> int:
    return sum(s.tokens for s in self.segments)


def lognormal_lengths(count: int, longest: int, centre: float, spread: float) -> np.ndarray:
  """i64[count]: clip(lognormal(ln(centre N), spread), N/16, N) with N the longest, which the first one is."""
  lengths = np.random.default_rng(0).lognormal(np.log(longest * centre), spread, count)
  lengths = np.clip(lengths, longest // 16, longest).astype(int)
  lengths[0] = longest
  return lengths


def parse_lengths(text: str, count: int, longest: int) -> np.ndarray:
  """Response lengths i64[count] from "lognormal:CENTRE:SPREAD" or a file of whole numbers, drawn from it with seed 0 and cut
  at `longest`. Raises UserError for anything else."""
  kind, *numbers = text.split(":")
  try:
    if kind == "lognormal":
      centre, spread = map(float, numbers)
      if not (0 < centre < np.inf and 0 <= spread < 10):
        raise ValueError
      return lognormal_lengths(count, longest, centre, spread)
    known = np.array([int(x) for x in Path(text).read_text().split()])
  except OSError as e:
    raise UserError(f"--lengths={text}: {e.strerror}; give a file of whole numbers or lognormal:CENTRE:SPREAD") from e
  except ValueError as e:
    raise UserError(f"--lengths={text}: give lognormal:CENTRE:SPREAD, such as {LENGTHS}, or a file of whole numbers") from e
  if not known.size or known.min() < 1:
    raise UserError(f"--lengths={text}: it must hold at least one number, all of them at least 1")
  return np.minimum(np.random.default_rng(0).choice(known, count), longest)


def simulate(lengths: np.ndarray, how: Decoding) -> Generation:
  """Decodes responses of `lengths` i64[N], request i of group i // how.group: slots are filled at boundaries, then the batch
  shrinks to the smallest row count that holds who is left; each decision keeps how.keep ** (1 / decisions) of those it sees."""
  rng, slots = np.random.default_rng(0), how.row_counts[-1]
  left, done = lengths.astype(int), np.zeros(len(lengths), int)
  group, pruned = np.arange(len(lengths)) // how.group, np.zeros(len(lengths), bool)
  live, waiting, inserts, segments = np.zeros(0, int), 0, 0, []
  while len(live) or waiting < len(lengths):
    new = min(slots - len(live), len(lengths) - waiting)
    live = np.concatenate([live, np.arange(waiting, waiting + new)])
    waiting, inserts = waiting + new, inserts + (new > 0)
    n = np.minimum(left[live], how.segment)  # steps of each
    rows = next(r for r in how.row_counts if r >= len(live))
    longest = np.zeros(group.max() + 1, int)
    np.maximum.at(longest, group[live], n)
    segments.append(Segment(rows, -(-int(n.max()) // STRIDE) * STRIDE if how.segment % STRIDE == 0 else how.segment,
                            int(n.sum()), int((n * done[live] + n * (n + 1) // 2).sum()), int(n.sum()) * how.prompt,
                            int(longest.sum()) * how.prompt))
    done[live] += n
    left[live] -= n
    seen = live[np.isin(done[live], how.detect) & (left[live] > 0)]
    if len(seen) and how.keep < 1:
      share = how.keep ** (1 / len(how.detect))
      gone = rng.permutation(seen)[round(share * len(seen)):]
      left[gone], pruned[gone] = 0, True
    live = live[left[live] > 0]
  return Generation(segments, lengths[~pruned], inserts)
