"""What callers and the engine's thread tell each other: calls go in, pieces of traces come out."""

from collections.abc import Callable
import dataclasses
from typing import NamedTuple

import numpy as np

from arrol_jax.types import Rollout

FAILED = "the server failed; its log says why"
HOPELESS = "hopeless"  # why a trace ended, beside "stop" and "length"


class Full(Exception):
  """No room for a call now: later there may be."""


class Cut(Exception):
  """The server ended before the call was done."""

  def __init__(self, text: str = "the server stopped before this call was done"):
    super().__init__(text)


class Broken(RuntimeError):
  """The engine broke, and its log has said how."""


class Call(NamedTuple):
  """What a user wants: n continuations of a prompt."""
  tokens: np.ndarray          # i32[L], 1 <= L <= Engine.max_prompt
  max_tokens: int             # of each, at most Engine.max_new
  n: int = 1
  temperature: float = 1.0    # 0: greedy
  top_p: float = 1.0
  seed: int | None = None     # 0 <= seed < 2**64; trace i of a seed always draws the same; None: a new one each time
  stop: tuple[str, ...] = ()  # strings that end a trace; they are not part of its text
  stop_below: float = 0.0     # posterior below which a trace ends at a detection length; the best that decide together go on
  ignore_stop: bool = False   # stop tokens do not end a trace, only its length and `stop` do
  judged: bool = False        # the head's scores and posteriors are wanted, as by a vote; stop_below wants them too


class Piece(NamedTuple):
  """What is new of one trace. The last one has `finish`: "stop", "length" or HOPELESS."""
  trace: int
  text: str
  tokens: list[int]      # their text may come in a later piece: half a character, or what may become a stop string
  logprobs: list[float]
  finish: str | None = None
  rollout: Rollout | None = None  # with `finish`: scores and confidences
  cut: bool = False      # with `finish`: a stop string ended it before the engine did, which scored a later state


class Likelihoods(NamedTuple):
  """Of T tokens, each given those before it (scoring.py)."""
  logprobs: np.ndarray  # f32[T]    NaN for the first
  tokens: np.ndarray    # i32[T,K]  the likeliest there, K = scoring.MOST_ALTERNATIVES or the vocabulary
  likeliest: np.ndarray  # f32[T,K]  their log-probs


@dataclasses.dataclass
class Totals:
  """Counts since the start."""
  prompt_tokens: int = 0
  tokens: int = 0     # handed out
  traces: int = 0
  hopeless: int = 0
  cancelled: int = 0  # or cut


class Standing(NamedTuple):
  """How the engine's side stands."""
  running: int    # traces in slots
  beat: float     # time.monotonic() of when its thread last came round
  totals: Totals
  prefixes: tuple[int, int, int, int] = (0, 0, 0, 1)  # PrefixCache.counts


class Ticket:
  """A call that was taken. on_piece(Piece, or an Exception if it never ends) is called from the engine's thread."""

  def __init__(self, call: Call, on_piece: Callable, number: int = 0):
    self.call, self.on_piece, self.number = call, on_piece, number  # number: between processes (remote.py)


def check_room(taken: int, calls: list[Call], most: int) -> None:
  """Raises Full where with these calls more than `most` traces would run or wait."""
  if taken + sum(call.n for call in calls) > most:
    raise Full(f"{taken} traces are running or waiting and {most} is the most")


def seed_of(seed: int, trace: int) -> int:
  """The Request.index, below 2**31, of a seed's trace."""
  return int(np.random.SeedSequence((seed, trace)).generate_state(1)[0] >> 1)
