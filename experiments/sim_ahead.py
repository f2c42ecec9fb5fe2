"""How many decode steps a training step takes where rollouts run ahead (rollout.ahead), with and without pruning. No model.

  python -m experiments.sim_ahead [--out=FILE]     # a second; a JSON line a case

512 slots, 512 rollouts a step, segments of 16 steps, a host that sees a segment's ends one segment late (learning/ahead.py on a
GPU). Lengths are log-normal, median 205, sigma 0.57, cut at the most tokens: made up, near those of the trial's GSM8K and MATH
runs. Pruned: half of those that reach 128 tokens end there. Left out: what a decode step costs, prefill, decisions.
"""

import json

import numpy as np

from arrol_jax import config
from experiments.plot_run import parser

ROLLOUTS = SLOTS = 512
SEGMENT, DETECT, LAG = 16, 128, 1
STEPS, SKIP = 40, 8  # of training; the first are not like the rest
CASES = [(longest, pruned, most) for longest in (600, 1024) for pruned in (False, True) for most in (1, 2, 3, 4, 6)]


def lengths(longest: int, pruned: bool, steps: int) -> np.ndarray:
  """Tokens of each rollout, i32[steps, ROLLOUTS]."""
  rng = np.random.default_rng(0)
  drawn = np.round(np.exp(rng.normal(np.log(205), 0.57, (steps, ROLLOUTS))))
  whole = np.minimum(longest, np.maximum(10, drawn)).astype(int)
  kept = rng.random(whole.shape) < 0.5
  return np.where(pruned & (whole > DETECT) & ~kept, DETECT, whole)


class Slots:
  """Which rollout sits where. left: tokens that it still has to say; whose: its step, -1 where nobody sits; free_at: the first
  segment that can be given the slot."""

  def __init__(self):
    self.left, self.whose, self.free_at = (np.full(SLOTS, x) for x in (0, -1, 0))
    self.segment = 0

  def fill(self, waiting: list[tuple[int, int]]) -> bool:
    """Seats those that wait, (step, tokens); whether a slot is left over."""
    free = np.flatnonzero((self.whose < 0) & (self.free_at <= self.segment))
    for slot, (step, tokens) in zip(free, waiting, strict=False):
      self.whose[slot], self.left[slot] = step, tokens
    seated = min(len(free), len(waiting))
    del waiting[:seated]
    return seated < len(free)

  def decode(self) -> None:
    """One segment."""
    self.left = np.maximum(0, self.left - SEGMENT)
    ended = (self.whose >= 0) & (self.left == 0)
    self.segment += 1
    self.free_at[ended], self.whose[ended] = self.segment + LAG, -1


def decode_steps(longest: int, pruned: bool, most: int) -> float:
  """Mean decode steps of a training step, `most` steps ahead."""
  tokens, slots, waiting, begun, taken = lengths(longest, pruned, STEPS + most + 2), Slots(), [], -1, []
  for step in range(STEPS):
    first = slots.segment
    while begun < step or (slots.whose == step).any() or any(x == step for x, _ in waiting):
      left_over = slots.fill(waiting)
      if not waiting and (begun < step or (left_over and begun < step + most)):
        begun += 1
        waiting += [(begun, n) for n in tokens[begun]]
        slots.fill(waiting)
      slots.decode()
    slots.decode()  # under way when the host sees the last end; it sees this one too
    slots.free_at[:] = np.minimum(slots.free_at, slots.segment)
    taken.append(SEGMENT * (slots.segment - first))
  return float(np.mean(taken[SKIP:]))


def main():
  p = parser("sim_ahead", __doc__)
  p.add_argument("--out", help="a file that lines are added to")
  out = p.parse_args().out
  for longest, pruned, most in CASES:
    by_slots = float(lengths(longest, pruned, STEPS)[SKIP:].sum(1).mean()) / SLOTS
    line = json.dumps({"longest": longest, "pruned": pruned, "ahead": most,
                       "decode_steps": round(decode_steps(longest, pruned, most)),
                       "least_by_slots": round(by_slots), "least_by_length": round(longest / (most + 1))})
    print(line, flush=True)
    if out:
      with open(out, "a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
  config.run(main)
