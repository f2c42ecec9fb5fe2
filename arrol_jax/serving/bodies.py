"""Request bodies, so that no caller's body harms another: each has a longest size and time, all together have a size, and long
ones are parsed in a thread of their own."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from starlette.requests import Request

from arrol_jax.serving.fields import Refused

MAX_BODY = 4 << 20     # bytes
MAX_BODIES = 64 << 20  # bytes of all bodies that are being read or parsed
LONG_BODY = 64 << 10   # bytes from which on a body is parsed behind other long ones
SECONDS = 15.0         # for a body to come whole


class Bodies:
  """Reads and parses. `closing` is set when no more calls are taken: those whose body has not come are not under way."""

  def __init__(self):
    self.closing = asyncio.Event()
    self.held = 0
    self.short, self.long = ThreadPoolExecutor(2, "parse"), ThreadPoolExecutor(1, "parse-long")

  async def parsed(self, request: Request, parse: Callable) -> object:
    """parse(bytes) of the request's body. Raises Refused, what parse raises, and ClientDisconnect."""
    parts = bytearray()
    try:
      await self._in_time(self._read(request, parts))
      pool = self.long if len(parts) > LONG_BODY else self.short
      return await asyncio.get_running_loop().run_in_executor(pool, parse, bytes(parts))
    finally:
      self.held -= len(parts)

  async def _read(self, request: Request, parts: bytearray) -> None:
    total = 0
    async for part in request.stream():
      total += len(part)
      if total <= MAX_BODY:
        parts += part
        self.held += len(part)
      elif parts:  # the rest is let by for a while: a client that is still sending would not read the answer
        self.held -= len(parts)
        parts.clear()
      if total > 4 * MAX_BODY:
        break
      if self.held > MAX_BODIES:
        raise Refused("too many long bodies are being read at once; try again later", status=429)
    if total > MAX_BODY:
      raise Refused(f"the body is longer than {MAX_BODY} bytes", status=413)

  async def _in_time(self, reading) -> None:
    """Waits for a body, for so long, and no longer than calls are taken."""
    reading, closing = asyncio.ensure_future(reading), asyncio.ensure_future(self.closing.wait())
    try:
      await asyncio.wait({reading, closing}, timeout=SECONDS, return_when=asyncio.FIRST_COMPLETED)
      if reading.done():
        reading.result()
      elif closing.done():
        raise Refused("the server is stopping and takes no new calls", status=503)
      else:
        raise Refused(f"the body did not come whole within {SECONDS:g} seconds", status=408)
    finally:
      reading.cancel()
      closing.cancel()
      await asyncio.gather(reading, closing, return_exceptions=True)
