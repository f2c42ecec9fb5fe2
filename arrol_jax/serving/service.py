"""Serving without HTTP: calls come in at any time, one thread decodes them all together, pieces of text go out.

A call wants n traces of one prompt, which share its prefill. `Service.serve` is the engine's thread: between two segments it
takes in new calls and cancelled ones, and while the device works it turns tokens into text, looks for stop strings and hands out
what is new. What a call may choose for itself: length, temperature, top_p, seed, stop strings, and below which posterior the
quality head stops a hopeless trace; the other settings of decode.Sampling are everybody's.

A trace's tokens depend on its prompt, its settings and its seed, not on its company. Left out: HTTP and JSON (openai_api.py,
serve.py), priorities, prefixes shared between calls.
"""

from collections.abc import Callable
import dataclasses
import queue
import threading
from typing import NamedTuple

import jax
import numpy as np

from arrol_jax.engine.sampling import Sampling
from arrol_jax.engine.scheduler import Engine, Request, Run, Sequence
from arrol_jax.learning.evaluation import Voters
from arrol_jax.pruning import voting
from arrol_jax.pruning.decision import make_decide
from arrol_jax.pruning.rule import PruneRule
from arrol_jax.pruning.table import Calibration
from arrol_jax.rewards import extract_answer, grade
from arrol_jax.types import Rollout

HOPELESS = "hopeless"  # why a trace ended, beside "stop" and "length"
VOTES = {"majority": "majority", "quality": "rank", "deepconf": "deepconf"}  # a call's word -> voting's rule
_GROUPS = 1 << 20  # numbers of calls come round again; far more than wait at once, and a decision's group fits int32


class Full(Exception):
  """No room for a call now: later there may be."""


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


class Piece(NamedTuple):
  """What is new of one trace. The last one has `finish`: "stop", "length" or HOPELESS."""
  trace: int
  text: str
  tokens: list[int]      # their text may come in a later piece: half a character, or what may become a stop string
  logprobs: list[float]
  finish: str | None = None
  rollout: Rollout | None = None  # with `finish`: scores and confidences


class Ticket:
  """A call that was taken. on_piece(Piece, or an Exception if the engine broke) is called from the engine's thread."""

  def __init__(self, call: Call, on_piece: Callable):
    self.call, self.on_piece = call, on_piece


def seed_of(seed: int, trace: int) -> int:
  """The Request.index, below 2**31, of a seed's trace."""
  return int(np.random.SeedSequence((seed, trace)).generate_state(1)[0] >> 1)


class _Trace:
  """A trace under way: what of its sequence's tokens was read, and how much of their text was handed out."""

  def __init__(self, ticket: Ticket, number: int, sequence: Sequence):
    self.ticket, self.number, self.sequence = ticket, number, sequence
    self.pieces, self.sent = 0, 0
    self.tokens: list[int] = []
    self.logprobs: list[float] = []

  def read(self, tokenizer, ended: bool) -> Piece | None:
    """What is new since the last call; None if nothing is."""
    pieces = self.sequence.tokens[self.pieces:]
    if not pieces and not ended:
      return None
    before = len(self.tokens)
    self.tokens += np.concatenate([*pieces, np.zeros(0, np.int32)]).astype(int).tolist()
    self.logprobs += np.concatenate([*self.sequence.logprobs[self.pieces:], np.zeros(0)]).tolist()
    self.pieces += len(pieces)
    decode = lambda count: tokenizer.decode(self.tokens[:count], skip_special_tokens=True)
    text, stop, rollout = decode(None), self.ticket.call.stop, self.sequence.rollout
    finish = None
    if ended:
      finish = "stop" if rollout.stopped else HOPELESS if rollout.pruned else "length"
    if any(text.find(s, self.sent) >= 0 for s in stop):
      last = next(n for n in range(before, len(self.tokens) + 1) if any(decode(n).find(s, self.sent) >= 0 for s in stop))
      text, finish = decode(last), "stop"
      text = text[:min(i for i in (text.find(s, self.sent) for s in stop) if i >= 0)]
      del self.tokens[last:], self.logprobs[last:]
    end = len(text) if finish else len(text) - _held(text, stop)
    new, self.sent = text[self.sent:end], max(self.sent, end)
    if finish and not ended:  # the engine never says that it is done
      rollout.tokens = np.asarray(self.tokens, np.int32)
      rollout.confidences = np.concatenate(self.sequence.confidences)[:len(self.tokens)]
    return Piece(self.number, new, self.tokens[before:], self.logprobs[before:], finish, rollout if finish else None)


def _held(text: str, stop: tuple[str, ...]) -> int:
  """Characters at the end of an unfinished text that may still change: half a character, or the start of a stop string."""
  whole = text.rstrip("\ufffd")
  begun = max((n for s in stop for n in range(1, len(s)) if whole.endswith(s[:n])), default=0)
  return len(text) - len(whole) + begun


@dataclasses.dataclass
class Totals:
  """Counts since the start."""
  prompt_tokens: int = 0
  tokens: int = 0
  traces: int = 0
  hopeless: int = 0
  cancelled: int = 0


class Service:
  """Continuous batching of an open stream of calls.

  engine: loaded; sampling: with temperature None; queue_size: traces that may wait beyond the engine's rows; voters: what scores
  traces (its `stop` and `window` are each call's own business).
  """

  def __init__(self, engine: Engine, sampling: Sampling, tokenizer, queue_size: int, voters: Voters | None = None):
    self.engine, self.sampling, self.tokenizer, self.most = engine, sampling, tokenizer, engine.rows + queue_size
    self.voters, self.decide = voters or Voters(), None
    head, tables = self.voters.head, self.voters.tables
    if head is not None:
      detect = self.voters.detect if tables is not None else (engine.max_new + 1,)
      rule = PruneRule(detect, keep=0.0, kind="threshold", floor=1, inputs=self.voters.inputs)
      self.decide = make_decide(head, Calibration() if tables is None else tables, rule, tables is not None)
    self.run = Run(engine, jax.random.key(0), sampling)
    self.totals, self.failure = Totals(), None
    self.traces: dict[int, _Trace] = {}  # by id of the rollout
    self._inbox: queue.SimpleQueue = queue.SimpleQueue()  # Ticket to start, (Ticket,) to cancel, None to close
    self._lock, self._taken, self._calls, self._closing = threading.Lock(), 0, 0, False

  # ---- called from any thread -------------------------------------------------------------------------------

  def submit(self, call: Call, on_piece: Callable) -> Ticket:
    """Takes a call. Raises Full where its traces would be more than may wait, and RuntimeError once the engine broke."""
    if self.failure is not None:
      raise RuntimeError("the engine broke") from self.failure
    with self._lock:
      if self._taken + call.n > self.most:
        raise Full(f"{self._taken} traces are running or waiting and {self.most} is the most")
      self._taken += call.n
    ticket = Ticket(call, on_piece)
    self._inbox.put(ticket)
    if self.failure is not None:  # it broke in between: nobody may be left to read the inbox
      raise RuntimeError("the engine broke") from self.failure
    return ticket

  def cancel(self, ticket: Ticket) -> None:
    """Ends what is left of a call; nothing more is told of it. A call that is over stays so."""
    self._inbox.put((ticket,))

  def close(self) -> None:
    """Lets `serve` return as soon as all that was taken is done."""
    self._inbox.put(None)

  @property
  def running(self) -> int:
    return sum(sequence is not None for sequence in self.run.slot_to_request)

  @property
  def waiting(self) -> int:
    return max(0, self._taken - self.running)

  # ---- the engine's thread ----------------------------------------------------------------------------------

  def warm_up(self) -> None:
    """Compiles what serving needs."""
    with jax.set_mesh(self.engine.mesh):
      self.engine.warm_up(self.sampling, self.decide)

  def serve(self) -> None:
    """Decodes until closed and empty. What the engine raises goes to every caller, into `failure`, and on."""
    try:
      with jax.set_mesh(self.engine.mesh):
        while self._take_in():
          if not self.run.advance(self.decide, self._report):
            self._report()
    except BaseException as e:
      self.failure = e
      for ticket in {id(t.ticket): t.ticket for t in self.traces.values()}.values():
        ticket.on_piece(e)
      while not self._inbox.empty():  # calls that nobody will start
        late = self._inbox.get()
        isinstance(late, Ticket) and late.on_piece(e)
      raise

  def _take_in(self) -> bool:
    """Starts and cancels what was asked for, waiting for it if there is nothing to do. False: closed and done."""
    while True:
      idle = not self.traces
      if idle and self._closing and self._inbox.empty():
        return False
      try:
        asked = self._inbox.get(block=idle)
      except queue.Empty:
        return True
      if asked is None:
        self._closing = True
      elif isinstance(asked, Ticket):
        self._start(asked)
      else:
        self._end([trace for trace in self.traces.values() if trace.ticket is asked[0]])

  def _start(self, ticket: Ticket) -> None:
    call = ticket.call
    seed = int(np.random.SeedSequence().entropy) if call.seed is None else call.seed
    group, self._calls = self._calls, (self._calls + 1) % _GROUPS
    self.totals.prompt_tokens += len(call.tokens)
    for i in range(call.n):
      sequence = self.run.add(Request(seed_of(seed, i), group, call.tokens, call.max_tokens, call.temperature, call.top_p,
                                  call.stop_below))
      self.traces[id(sequence.rollout)] = _Trace(ticket, i, sequence)

  def _end(self, traces: list[_Trace]) -> None:
    self.totals.cancelled += len(traces)
    self.run.cancel([trace.sequence for trace in traces])
    self._forget(traces)

  def _forget(self, traces: list[_Trace]) -> None:
    for trace in traces:
      del self.traces[id(trace.sequence.rollout)]
    with self._lock:
      self._taken -= len(traces)

  def _report(self) -> None:
    """Hands out what is new, and lets go of what has ended."""
    ended = {id(rollout) for rollout in self.run.take_finished()}
    over, stopped = [], []
    for key, trace in self.traces.items():
      piece = trace.read(self.tokenizer, key in ended)
      if piece is None:
        continue
      self.totals.tokens += len(piece.tokens)
      if piece.finish:
        over.append(trace)
        self.totals.traces += 1
        self.totals.hopeless += piece.finish == HOPELESS
        if key not in ended:
          stopped.append(trace.sequence)
      trace.ticket.on_piece(piece)
    if stopped:
      self.run.cancel(stopped)
    self._forget(over)


class Vote(NamedTuple):
  """What a call's traces decided."""
  answer: str | None     # None: no trace has one
  chosen: int            # the heaviest trace that gives it
  weight: float          # of all traces that give it, as a share of all weights
  answers: list          # str or None, by trace
  scores: list           # float or None: the head's logit at the last token (quality), trace confidence (deepconf)
  weights: list[float]


def tally(word: str, texts: list[str], last: list[Piece], pattern: str | None, window: int) -> Vote:
  """The vote of a call's traces: texts, their last pieces, and the answers' pattern.

  word: of VOTES; "quality" is the paper's rule, rank by the head's score; "deepconf" weighs by the mean of the lowest tenth of
  windows. Traces that were stopped as hopeless have no vote; math-equal answers pool theirs.
  """
  answers = [None if p.finish == HOPELESS else extract_answer(t, pattern) for t, p in zip(texts, last, strict=True)]
  scores = None
  if word == "quality":
    scores = [p.rollout.final for p in last]
  elif word == "deepconf":
    scores = [voting.summarize_confidence(p.rollout.confidences, window, "bottom10") for p in last]
  rule, equal = VOTES[word], lambda a, b: grade(f"\\boxed{{{b}}}", a) > 0
  weights = voting.trace_weights(answers, scores, rule)
  answer = voting.vote(answers, scores, rule, equal=equal)
  if answer is None:
    alive = [i for i, p in enumerate(last) if p.finish != HOPELESS] or list(range(len(last)))
    chosen, share = max(alive, key=lambda i: scores[i] if scores else 0.0), 0.0
  else:
    same = [i for i, a in enumerate(answers) if a is not None and (a.strip() == answer.strip() or equal(answer, a))]
    chosen = max(same, key=lambda i: weights[i])
    share = sum(weights[i] for i in same) / (sum(weights) or 1.0)
  return Vote(answer, chosen, share, answers, scores or [None] * len(last), weights)
