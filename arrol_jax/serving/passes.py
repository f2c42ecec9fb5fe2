"""Second passes, and the room for calls that want one or a vote: what is done when a call's traces have ended.

A call is taken only where there is room for its traces here too, as many as may run or wait. A few passes are made at once and a
call's one after another, so that calls take turns; those of a call that has ended are not begun.
"""

import asyncio
from collections.abc import Callable
import contextlib

from arrol_jax.serving.board import Board
from arrol_jax.serving.calls import Call, check_room

TOGETHER = 2  # passes: one waits while the device makes another


class Passes:
  """Of a Service, or a Remote one."""

  def __init__(self, service, board: Board):
    self.service, self.board, self.turns = service, board, asyncio.Semaphore(TOGETHER)

  @property
  def taken(self) -> int:
    """Traces of calls, of all processes, that want passes or a vote and are not answered yet."""
    return self.board.total("scoring")

  def take(self, calls: tuple[Call, ...]) -> Callable[[], None]:
    """Takes room, which what is returned gives back. Raises Full where there is none."""
    check_room(self.taken, calls, self.service.most)
    count = sum(call.n for call in calls)
    self.board.add("scoring", count)
    return lambda: self.board.add("scoring", -count)

  async def make(self, name: str, *args):
    """What a method of the service's Scorer returns or raises. One that nobody waits for any more keeps its turn to its end."""
    await self.turns.acquire()
    loop = asyncio.get_running_loop()
    out = loop.create_future()

    def settle(result):
      self.turns.release()
      if not out.done():
        out.set_exception(result) if isinstance(result, Exception) else out.set_result(result)

    def tell(result):
      with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
        loop.call_soon_threadsafe(settle, result)

    self.service.score(name, args, tell)
    return await out
