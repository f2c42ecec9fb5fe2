"""Serving without HTTP: calls come in at any time, one thread decodes them all together, pieces of text go out.

A call wants n traces of one prompt, which share its prefill. `Service.serve` is the engine's thread: between two segments it
takes in new calls and cancelled ones, and while the device works it turns tokens into text, looks for stop strings and hands out
what is new. What a call may choose for itself: length, temperature, top_p, seed, stop strings, and below which posterior the
quality head stops a hopeless trace; the other settings of engine.Sampling are everybody's.

A trace's tokens depend on its prompt, its settings and its seed. With `steady` they do not depend on its company, bit for bit;
without, on company only as far as rounding does: other numbers of rows are other programs, which add up in another order.
Left out: HTTP and JSON (web.py, openai_api.py), priorities.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
import queue
import threading
import time

import jax
import numpy as np

from arrol_jax.engine.sampling import Sampling
from arrol_jax.engine.scheduler import Engine, Request, Sequence
from arrol_jax.pruning.decision import NO_HEAD, Voters, decider
from arrol_jax.pruning.rule import PruneRule
from arrol_jax.pruning.table import Calibration
from arrol_jax.serving import pace, warming
from arrol_jax.serving.calls import HOPELESS, Call, Cut, Standing, Ticket, Totals, check_room, seed_of
from arrol_jax.serving.pace import PacedRun
from arrol_jax.serving.passes import TOGETHER
from arrol_jax.serving.prefixes import PrefixCache
from arrol_jax.serving.scoring import Scorer
from arrol_jax.serving.trace import Trace

_GROUPS = 1 << 20  # numbers of calls come round again; far more than wait at once, and a decision's group fits int32
_CLOSE, _CUT = object(), object()


class Service:
  """Continuous batching of an open stream of calls.

  engine: loaded; sampling: with temperature None; queue_size: traces that may wait beyond the engine's rows; steady: see
  PacedRun, for an engine of one row count and one length; kept: prefixes of earlier calls' prompts.
  """

  def __init__(self, engine: Engine, sampling: Sampling, tokenizer, queue_size: int, voters: Voters = NO_HEAD,
               steady: bool = False, kept: PrefixCache | None = None):
    self.engine, self.sampling, self.tokenizer, self.most = engine, sampling, tokenizer, engine.rows + queue_size
    self.voters, self.head, tables = voters, voters.head, voters.tables
    self.steady, self.kept, self.judging, self.decide, self.rule, self.detect = steady, kept, None, None, None, ()
    if self.head is not None:
      self.detect = voters.detect if tables is not None else ()
      self.rule = PruneRule(self.detect or (engine.max_new + 1,), keep=0.0, kind="threshold", floor=1, inputs=voters.inputs)
      known = tables is not None
      self.judging = self.head, tables if known else Calibration(), self.rule, np.bool_(known), False, True, None
      self.decide = decider(self.judging)
    self.run, self.scorer = self._make_run(), Scorer(engine, sampling, self.head, self.rule)
    self.scoring = ThreadPoolExecutor(TOGETHER, "second-pass")
    self.totals, self.failure = Totals(), None
    self.on_queue: Callable[[float], None] | None = None  # told how long each trace waited for a slot, in seconds
    self.on_turn: Callable[[], None] | None = None  # called by the engine's thread when all that was new has been told
    self.traces: dict[int, Trace] = {}  # by id of the rollout
    self._since: dict[Sequence, float] = {}  # when those that wait came
    self._inbox: queue.SimpleQueue = queue.SimpleQueue()  # Ticket to start, (Ticket,) to cancel, _CLOSE, _CUT
    self._lock, self._taken, self._calls, self._closing = threading.Lock(), 0, 0, False
    self._beat = time.monotonic()  # when the engine's thread last came round

  def _make_run(self) -> PacedRun:
    return PacedRun(self.engine, self.sampling, self.detect, self._seated, self.steady, self.kept)

  # ---- called from any thread -------------------------------------------------------------------------------

  def submit(self, call: Call, on_piece: Callable) -> Ticket:
    """Takes a call. Raises Full where its traces would be more than may wait, and RuntimeError once the engine broke."""
    return self.submit_all([call], [on_piece])[0]

  def submit_all(self, calls: list[Call], on_piece: list[Callable], room_found: bool = False) -> list[Ticket]:
    """Takes several calls or none of them, see `submit`. room_found: somebody has looked for room already."""
    if self.failure is not None:
      raise RuntimeError("the engine broke") from self.failure
    with self._lock:
      if not room_found:
        check_room(self._taken, calls, self.most)
      if not self._taken:
        self._beat = time.monotonic()
      self._taken += sum(call.n for call in calls)
    tickets = [Ticket(call, told) for call, told in zip(calls, on_piece, strict=True)]
    for ticket in tickets:
      self._inbox.put(ticket)
    if self.failure is not None:  # it broke in between: nobody may be left to read the inbox
      raise RuntimeError("the engine broke") from self.failure
    return tickets

  def cancel(self, ticket: Ticket) -> None:
    """Ends what is left of a call; nothing more is told of it. A call that is over stays so."""
    self._inbox.put((ticket,))

  def score(self, name: str, args: tuple, tell: Callable) -> None:
    """A second pass: tell(what the method of Scorer returns or raises) from another thread."""
    def make():
      try:
        result = getattr(self.scorer, name)(*args)
      except Exception as e:
        result = e
      tell(result)

    self.scoring.submit(make)

  def close(self) -> None:
    """Lets `serve` return as soon as all that was taken is done."""
    self._inbox.put(_CLOSE)

  def cut(self) -> None:
    """Lets `serve` return at once; whose calls are not done is told Cut."""
    self._inbox.put(_CUT)

  @property
  def running(self) -> int:
    return sum(sequence is not None for sequence in self.run.slot_to_request)

  @property
  def waiting(self) -> int:
    return max(0, self._taken - self.running)

  @property
  def still(self) -> float:
    """Seconds since the engine's last step, 0 where there is nothing to do."""
    return time.monotonic() - self._beat if self._taken else 0.0

  @property
  def standing(self) -> Standing:
    return Standing(self.running, self._beat, self.totals, *([self.kept.counts] if self.kept else []))

  # ---- the engine's thread ----------------------------------------------------------------------------------

  def warm_up(self, tell: Callable[[str], None] = lambda text: None) -> None:
    """Compiles what serving needs; tell() hears how far it is."""
    with jax.set_mesh(self.engine.mesh):
      warming.warm_up(self._make_run, self.judging, tell)
      self.kept and self.kept.clear()

  def serve(self) -> None:
    """Decodes until closed and empty. What the engine raises goes to every caller, into `failure`, and on."""
    try:
      with jax.set_mesh(self.engine.mesh):
        told = True
        while self._take_in():
          started = self.run.advance(self.decide, None if told else self._report)
          told = not started or self.run.spare > 0  # else it is told when the device has the next segment
          if told:
            self._report()
          self._beat = time.monotonic()
    except BaseException as e:
      self.failure = e
      self._tell_all(e)
      raise

  def _tell_all(self, e: BaseException) -> None:
    """Of all calls that are under way or have come in: they end so."""
    for ticket in {id(t.ticket): t.ticket for t in self.traces.values()}.values():
      ticket.on_piece(e)
    while not self._inbox.empty():  # calls that nobody will start
      late = self._inbox.get()
      if isinstance(late, Ticket):
        late.on_piece(e)
        with self._lock:
          self._taken -= late.call.n

  def _take_in(self) -> bool:
    """Starts and cancels what was asked for, waiting for it while nothing else is to be done. False: closed and done."""
    while True:
      idle = not self.traces
      if idle and self._closing and self._inbox.empty():
        return False
      if idle:
        self._turn()
      try:
        spare = None if idle else max(0.0, self.run.spare)
        asked = self._inbox.get(spare != 0, spare)
      except queue.Empty:
        return True
      if asked is _CLOSE or asked is _CUT:
        self._closing = True
        if asked is _CUT:
          self._tell_all(Cut())
          self._end(list(self.traces.values()))
      elif isinstance(asked, Ticket):
        self._start(asked)
      else:
        self._end([trace for trace in self.traces.values() if trace.ticket is asked[0]])

  def _start(self, ticket: Ticket) -> None:
    call = ticket.call
    seed = int(np.random.SeedSequence().entropy) if call.seed is None else call.seed
    group, self._calls = self._calls, (self._calls + 1) % _GROUPS
    self.totals.prompt_tokens += len(call.tokens)
    judged = self.head is not None and (call.judged or call.stop_below > 0)
    for i in range(call.n):
      sequence = self.run.add(Request(seed_of(seed, i), group, call.tokens, call.max_tokens, call.temperature, call.top_p,
                                      call.stop_below, call.ignore_stop, judged))
      self.traces[id(sequence.rollout)] = Trace(ticket, i, sequence, self.tokenizer, self.detect if judged else ())
      self._since[sequence] = time.monotonic()

  def _seated(self, sequence: Sequence) -> None:
    came = self._since.pop(sequence, None)
    if came is not None and self.on_queue:
      self.on_queue(time.monotonic() - came)

  def _end(self, traces: list[Trace]) -> None:
    self.totals.cancelled += len(traces)
    self.run.cancel([trace.sequence for trace in traces])
    self._forget(traces)

  def _forget(self, traces: list[Trace]) -> None:
    for trace in traces:
      del self.traces[id(trace.sequence.rollout)]
      self._since.pop(trace.sequence, None)
    with self._lock:
      self._taken -= len(traces)

  def _report(self) -> None:
    """Hands out what is new, and lets go of what has ended: that first, as a caller's next call may depend on it."""
    ended = {id(rollout) for rollout in self.run.take_finished()}
    for over in (True, False):
      part = [trace for key, trace in self.traces.items() if (key in ended) == over]
      if part:
        self._hand_out(part, over)

  def _hand_out(self, traces: list[Trace], ended: bool) -> None:
    """What is new of these, which have ended or have not, at once."""
    over, stopped, now, gap = [], [], time.monotonic(), pace.gap(self.running)
    for trace in traces:
      piece = trace.read(ended, due=now - trace.told >= gap)
      if piece is None:
        continue
      trace.told = now
      self.totals.tokens += len(piece.tokens)
      if piece.finish:
        over.append(trace)
        self.totals.traces += 1
        self.totals.hopeless += piece.finish == HOPELESS
        if not ended:
          stopped.append(trace.sequence)
      trace.ticket.on_piece(piece)
    if stopped:
      self.run.cancel(stopped)
    self._forget(over)
    self._turn()

  def _turn(self) -> None:
    self.on_turn and self.on_turn()
