"""Request bodies, so that no caller's body harms another: each has a longest size and time, all together have a size, long ones
are parsed in a thread of their own, and what is left of a refused one is not taken for the next request."""

import asyncio
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor

from starlette.requests import Request

from arrol_jax.serving.fields import Refused

MAX_BODY = 4 << 20     # bytes
MAX_BODIES = 64 << 20  # bytes of all bodies that are being read or parsed; beyond it no long one is taken, beyond twice no other
LONG_BODY = 64 << 10   # bytes from which on a body is long; it is parsed behind other long ones
SECONDS = 15.0         # for a body to come whole


class Bodies:
  """Reads and parses. Once it is closed no more calls are taken: those whose body has not come are not under way."""

  def __init__(self):
    self.closed = False
    self.held = 0
    self.limits: set[asyncio.Timeout] = set()  # of the bodies that are being read
    self.short, self.long = ThreadPoolExecutor(2, "parse"), ThreadPoolExecutor(1, "parse-long")

  def close(self) -> None:
    self.closed = True
    for limit in self.limits:
      limit.reschedule(0.0)

  async def parsed(self, request: Request, parse: Callable) -> object:
    """parse(bytes) of the request's body. Raises Refused, what parse raises, and ClientDisconnect."""
    parts = bytearray()
    try:
      await self.in_time(self._read(request, parts))
      pool = self.long if len(parts) > LONG_BODY else self.short
      return await asyncio.get_running_loop().run_in_executor(pool, parse, bytes(parts))
    finally:
      self.held -= len(parts)

  async def _read(self, request: Request, parts: bytearray) -> None:
    async for part in request.stream():
      parts += part
      self.held += len(part)
      if len(parts) > MAX_BODY:
        raise Refused(f"the body is longer than {MAX_BODY} bytes", status=413)
      if self.held > MAX_BODIES * (1 if len(parts) > LONG_BODY else 2):
        raise Refused("too many long bodies are being read at once; try again later", status=429)

  async def in_time(self, reading: Coroutine) -> None:
    """Waits for a body, for so long, and no longer than calls are taken. Raises Refused, and what reading it raises."""
    limit = asyncio.timeout(0.0 if self.closed else SECONDS)
    try:
      async with limit:
        self.limits.add(limit)
        await reading
    except TimeoutError:
      if self.closed:
        raise Refused("the server is stopping and takes no new calls", status=503) from None
      raise Refused(f"the body did not come whole within {SECONDS:g} seconds", status=408) from None
    finally:
      self.limits.discard(limit)


class WholeRequests:
  """Middleware: an answer waits until its request's body has come, read or let by, so that a client that is still sending gets
  it and its next request begins where it should. Where the body does not come in time the connection ends with the answer."""

  def __init__(self, app, bodies: Bodies):
    self.app, self.bodies = app, bodies

  async def __call__(self, scope, receive, send):
    headers = dict(scope.get("headers", ()))
    if not headers.keys() & {b"content-length", b"transfer-encoding"}:
      return await self.app(scope, receive, send)
    left = True
    held_back = headers.get(b"expect", b"").lower() == b"100-continue"  # it is sent when somebody reads

    async def receive_part():
      nonlocal left, held_back
      held_back = False
      message = await receive()
      left = message.get("more_body", False)
      return message

    async def let_by():
      while left:
        await receive_part()

    async def send_behind(message):
      if left and message["type"] == "http.response.start" and (b"connection", b"close") not in message["headers"]:
        try:
          if held_back:
            raise Refused("nobody wants it")
          await self.bodies.in_time(let_by())
        except Refused:
          message["headers"].append((b"connection", b"close"))
      await send(message)

    await self.app(scope, receive_part, send_behind)
