"""A call's way from what was asked to its answer, whole or streamed. Its client may leave and the server may stop at any time."""

import asyncio
from collections.abc import AsyncIterator, Callable
import contextlib
import functools
import json
import secrets
import time

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from arrol_jax.serving import votes
from arrol_jax.serving.answers import Answer, nothing_said, refusal
from arrol_jax.serving.calls import FAILED, Cut, Piece
from arrol_jax.serving.openai_api import Asked


class Running:
  """A call under way. begin() it, then either whole() or said(); over() in any case."""

  def __init__(self, web, asked: Asked, start: float):
    self.web, self.asked, self.start = web, asked, start
    self.number, self.loop, self.pieces = secrets.token_hex(12), asyncio.get_running_loop(), asyncio.Queue()
    self.answer = Answer(asked, web.limits, self.number)
    self.tickets, self.first = [], [None] * asked.traces  # first: when each trace's first token came, and how many with it
    self.stopped = self.loop.create_future()  # done when the server ends it
    self.answered = self.failed = False
    self.give_back = lambda: None

  def begin(self) -> None:
    """Hands the calls in. Raises Full where there is no room, and Cut where the server has ended."""
    calls = self.asked.calls
    give_back = self.web.passes.take(calls) if self.asked.second_pass or self.asked.vote else self.give_back
    if calls[0].max_tokens == 0:
      for trace in range(self.asked.traces):
        self.pieces.put_nowait(nothing_said(trace))
    else:
      told = [functools.partial(self._tell, i * call.n) for i, call in enumerate(calls)]
      try:
        self.tickets = self.web.service.submit_all(list(calls), told)
      except Exception:
        give_back()
        raise
    self.give_back = give_back
    self.web.under_way.add(self)

  def _tell(self, first: int, piece: Piece | BaseException) -> None:
    """From the engine's thread: what is new of a call whose traces are numbered from `first` on."""
    moved = piece._replace(trace=first + piece.trace) if isinstance(piece, Piece) else piece
    self.web.tell(self.loop, self.pieces, moved)

  def cut(self) -> bool:
    """The server ends what is left of it; False if it has before."""
    if self.stopped.done():
      return False
    self.stopped.set_result(None)
    self.pieces.put_nowait(Cut())
    return True

  async def said(self):
    """The call's pieces until its traces have ended."""
    answer, meters = self.answer, self.web.meters
    while not answer.done:
      piece = await self.pieces.get()
      if isinstance(piece, BaseException):
        self.failed = not isinstance(piece, ClientDisconnect)
        raise piece
      now = time.monotonic()
      if piece.tokens and self.first[piece.trace] is None:
        if not any(self.first):
          meters.first.observe(now - self.start)
        self.first[piece.trace] = now, len(piece.tokens)
      answer.add(piece)
      later = len(answer.tokens[piece.trace]) - self.first[piece.trace][1] if self.first[piece.trace] else 0
      if piece.finish and later > 0:
        meters.token.observe((now - self.first[piece.trace][0]) / later)
      yield piece
    meters.total.observe(time.monotonic() - self.start)
    if self.asked.stream:
      self.done()

  def done(self) -> None:
    self.answered = True
    self.web.meters.answers.labels(200).inc()

  def over(self) -> None:
    """A client that left earlier cancels its call."""
    self.web.under_way.discard(self)
    self.give_back()
    if not self.answered:
      for ticket in self.tickets:
        self.web.service.cancel(ticket)
      if not self.failed:
        self.web.meters.answers.labels(499).inc()

  async def whole(self, request: Request) -> dict | None:
    """The answer; None if the client left before it was there. Raises Cut."""
    work, left = asyncio.ensure_future(self._whole()), asyncio.ensure_future(_left(request.receive))
    try:
      await asyncio.wait({work, left, self.stopped}, return_when=asyncio.FIRST_COMPLETED)
      if not work.done() and not self.stopped.done():
        return None
      if not work.done():
        raise Cut()
      answer = work.result()  # raises what it raised
    except Exception:
      self.failed = True
      raise
    finally:
      for task in (work, left):
        task.cancel()
      await asyncio.gather(work, left, return_exceptions=True)
    self.done()
    return answer

  async def _whole(self) -> dict:
    """All pieces, then what is known only when the traces have ended."""
    async with contextlib.aclosing(self.said()) as pieces:
      async for _ in pieces:
        pass
    asked, answer, web, end = self.asked, self.answer, self.web, time.monotonic()
    if asked.second_pass:
      for i, tokens in enumerate(answer.tokens):
        call = asked.call_of(i)
        answer.likelihoods[i] = await web.passes.make("likelihoods", call.tokens, tokens, call.temperature)
    for i, piece in enumerate(answer.last if asked.vote == "quality" else ()):
      if piece.cut:
        others = [tokens for j, tokens in enumerate(answer.tokens) if j != i]
        piece.rollout.final = await web.passes.make("final", asked.calls[0].tokens, answer.tokens[i], answer.logprobs[i], others)
    pool = web.voting if asked.vote else web.spelling if asked.second_pass else web.bodies.short
    out = await self.loop.run_in_executor(pool, self._voted if asked.vote else answer.whole)
    if asked.vote:
      web.meters.vote.observe(time.monotonic() - end)
    return out

  def _voted(self) -> dict:
    answer, limits = self.answer, self.web.limits
    vote = votes.tally(self.asked.vote, answer.texts, answer.last, limits.pattern, limits.window, self.web.sameness.ask)
    return answer.whole(vote)


class Stream(Response):
  """A call's server-sent events; the call is over at the end, also where the client left before the first."""
  media_type = "text/event-stream"

  def __init__(self, call: Running):
    super().__init__(headers={"Cache-Control": "no-cache"})
    del self.headers["content-length"]  # nobody knows
    self.call = call

  async def __call__(self, scope, receive, send):
    call = self.call
    left = asyncio.ensure_future(_left(receive))
    left.add_done_callback(lambda _: call.pieces.put_nowait(ClientDisconnect()))
    try:
      await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
      async for event in _events(call):
        await send({"type": "http.response.body", "body": event.encode(), "more_body": True})
      if not left.done():
        await send({"type": "http.response.body", "body": b""})
    finally:
      left.cancel()
      call.over()


async def _left(receive: Callable) -> None:
  """Waits until the client has left."""
  while (await receive())["type"] != "http.disconnect":
    pass


_json = json.JSONEncoder(ensure_ascii=False).encode


async def _events(call: Running) -> AsyncIterator[str]:
  """A chunk a piece, the usage if it was asked for, and the end; nothing more once the client has left."""
  event = lambda x: f"data: {_json(x)}\n\n"
  answer, begun = call.answer, set()
  async with contextlib.aclosing(call.said()) as pieces:
    try:
      async for piece in pieces:
        if piece.text or piece.finish or answer.asked.logprobs:
          yield event(answer.chunk(piece, piece.trace not in begun))
          begun.add(piece.trace)
    except ClientDisconnect:
      return
    except Cut as e:  # the status is out already
      yield event(refusal(str(e), 503))
      return
    except Exception:
      yield event(refusal(FAILED, 500))
      return
  yield (event(answer.closing()) if answer.asked.usage else "") + "data: [DONE]\n\n"
