"""What callers and the engine's thread tell each other: calls go in, pieces of traces come out."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from arrol_jax.types import Rollout

HOPELESS = "hopeless"  # why a trace ended, beside "stop" and "length"


class Full(Exception):
  """No room for a call now: later there may be."""


class Cut(Exception):
  """The server ended before the call was done."""


class Call(NamedTuple):
  """What a user wants: n continuations of a prompt."""
  tokens: np.ndarray          # i32[L], 1 <= L <= Engine.max_prompt
  max_tokens: int             # of each, at most Engine.max_new
  n: int = 1
  temperature: float = 1.0    # 0: greedy
  top_p: float = 1.0
  seed: int | None = None     # 0 <= seed < 2**63; trace i of a seed always draws the same; None: a new one each time
  stop: tuple[str, ...] = ()  # strings that end a trace; they are not part of its text
  stop_below: float = 0.0     # posterior below which a trace ends at a detection length; the best that decide together go on
  ignore_stop: bool = False   # stop tokens do not end a trace, only its length and `stop` do


class Piece(NamedTuple):
  """What is new of one trace. The last one has `finish`: "stop", "length" or HOPELESS."""
  trace: int
  text: str
  tokens: list[int]      # their text may come in a later piece: half a character, or what may become a stop string
  logprobs: list[float]
  finish: str | None = None
  rollout: Rollout | None = None  # with `finish`: scores and confidences
  cut: bool = False      # with `finish`: a stop string ended it before the engine did, which scored a later state


class Ticket:
  """A call that was taken. on_piece(Piece, or an Exception if it never ends) is called from the engine's thread."""

  def __init__(self, call: Call, on_piece: Callable):
    self.call, self.on_piece = call, on_piece


def seed_of(seed: int, trace: int) -> int:
  """The Request.index, below 2**31, of a seed's trace."""
  return int(np.random.SeedSequence((seed, trace)).generate_state(1)[0] >> 1)
