"""The HTTP side: routes, who may call, what all calls share. A call's way is under_way.py, what the JSON means openai_api.py and
answers.py."""

import asyncio
import collections
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
import contextlib
import dataclasses
import functools
import hmac
import re
import threading
import time
import traceback

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from arrol_jax.serving import openai_api, votes
from arrol_jax.serving.answers import refusal
from arrol_jax.serving.board import Board
from arrol_jax.serving.bodies import Bodies, WholeRequests
from arrol_jax.serving.calls import FAILED, Broken, Cut, Full
from arrol_jax.serving.fields import Refused
from arrol_jax.serving.meters import Meters
from arrol_jax.serving.openai_api import Limits
from arrol_jax.serving.passes import Passes
from arrol_jax.serving.under_way import Running, Stream


@dataclasses.dataclass(frozen=True)
class Access:
  """Who may call: host names that may be asked for, web pages' origins, the key (None: anyone). "*" in a list: all."""
  hosts: tuple[str, ...] = ("*",)
  origins: tuple[str, ...] = ()
  key: str | None = None
  still: float = 60.0  # seconds without a step of the engine after which it does not count as healthy


ANYONE = Access()
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]*?)\.?)(?::[0-9]*)?")  # a Host header: an address or a name, and the port


class Web:
  """What the routes share. service: a Service, or a Remote one; `under_way`: calls that were taken and not yet answered to their
  end; `passes`: what is left to be done when their traces have ended; board: shared with other processes that do the same."""

  def __init__(self, service, limits: Limits, access: Access, board: Board):
    self.service, self.limits, self.access, self.board = service, limits, access, board
    self.passes, self.bodies, self.sameness = Passes(service, board), Bodies(), votes.Sameness()
    self.meters = Meters(service, self.passes)
    self.voting, self.spelling = ThreadPoolExecutor(2, "vote"), ThreadPoolExecutor(1, "spell")  # off the others' way
    self.under_way: set[Running] = set()
    self.cut = 0  # calls that ended before they were done
    self.said: collections.deque = collections.deque()  # (call's queue, piece) on their way from the engine's thread
    self.rung = False
    self.created = int(time.time())

  @property
  def model(self) -> dict:
    l = self.limits
    return {"id": l.model, "object": "model", "created": self.created, "owned_by": "arrol_jax",
            "max_prompt_tokens": l.max_prompt, "max_tokens": l.max_new, "max_model_len": l.max_prompt + l.max_new}

  def tell(self, loop: asyncio.AbstractEventLoop, pieces: asyncio.Queue, piece) -> None:
    """From the engine's thread: puts what was said into a call's queue. The loop is woken once for all pieces of a segment."""
    self.said.append((pieces, piece))
    if not self.rung:
      self.rung = True
      with contextlib.suppress(RuntimeError):  # the loop is closed: nobody listens any more
        loop.call_soon_threadsafe(self._deliver)

  def _deliver(self) -> None:
    self.rung = False  # before the queue is emptied: what comes from now on rings again
    while self.said:
      pieces, piece = self.said.popleft()
      pieces.put_nowait(piece)

  def stop_taking(self) -> None:
    self.bodies.close()

  def cut_off(self) -> None:
    """Ends the calls that are under way, whatever they wait for."""
    self.stop_taking()
    self.cut += sum([call.cut() for call in self.under_way])
    self.service.cut()

  def error(self, text: str, status: int, field: str | None = None, headers: Mapping | None = None) -> JSONResponse:
    self.meters.answers.labels(status).inc()
    more = {"Retry-After": "1"} if status in (429, 503) else {"WWW-Authenticate": "Bearer"} if status == 401 else {}
    more |= headers or {}
    if status in (408, 503):  # the rest of the body is not waited for
      more["Connection"] = "close"
    return JSONResponse(refusal(text, status, field), status, more)

  def health(self) -> tuple[str, bool]:
    """How the server is, and whether it is alive."""
    if self.service.failure is not None:
      return "broken", False
    if self.service.still > self.access.still:
      return "standing still", False
    return ("stopping" if self.bodies.closed else "ok"), True


def make_app(service, limits: Limits, started: Callable | None = None, broken: Callable | None = None,
             access: Access = ANYONE, board: Board | None = None) -> Starlette:
  """The server of a Service, or a Remote one. Its lifespan runs the engine's thread; broken() is called if that dies.
  app.state.web is the Web."""
  web = Web(service, limits, access, board or Board())

  async def health(ready: bool, request):
    status, alive = web.health()
    fine = alive and not (ready and status != "ok")
    return JSONResponse({"status": status, "running": service.running, "waiting": service.waiting,
                         "scoring": web.passes.taken, "still_seconds": round(service.still, 3)}, 200 if fine else 503)

  async def one_model(request):
    if request.path_params["name"] != limits.model:
      raise Refused(f"this server has the model {limits.model!r} only", "model", 404)
    return JSONResponse(web.model)

  async def metrics(request):
    text, kind = web.meters.text(request.headers.get("accept", ""))
    return Response(text, media_type=kind)

  async def refused(request, e: Refused):
    return web.error(str(e), e.status, e.field)

  async def unknown(request, e: HTTPException):
    return web.error(f"{request.method} {request.url.path}: {e.detail}", e.status_code, headers=e.headers)

  async def failed(request, e: Exception):
    return web.error(FAILED, 500)

  routes = [Route("/v1/models", lambda request: JSONResponse({"object": "list", "data": [web.model]})),
            Route("/v1/models/{name:path}", one_model), Route("/metrics", metrics),
            Route("/health", functools.partial(health, False)), Route("/ready", functools.partial(health, True)),
            Route("/v1/completions", functools.partial(_answer, web, False), methods=["POST"]),
            Route("/v1/chat/completions", functools.partial(_answer, web, True), methods=["POST"])]
  cors = [Middleware(CORSMiddleware, allow_origins=access.origins, allow_methods=["GET", "POST"], allow_headers=["*"])]
  app = Starlette(routes=routes, lifespan=_lifespan(web, started, broken),
                  middleware=[Middleware(WholeRequests, bodies=web.bodies), *(cors if access.origins else []),
                              Middleware(Guard, web=web)],
                  exception_handlers={Refused: refused, HTTPException: unknown, Exception: failed})
  app.state.web = web
  return app


class Guard:
  """Refuses calls for another host (a web page may have its name resolved to this machine), calls of other origins' pages (a
  browser sends some without asking first) and calls without the key."""

  def __init__(self, app, web: Web):
    self.app, self.web = app, web

  async def __call__(self, scope, receive, send):
    why = self._why_not(scope) if scope["type"] == "http" else None
    await (self.app if why is None else self.web.error(*why))(scope, receive, send)

  def _why_not(self, scope) -> tuple[str, int] | None:
    access, headers = self.web.access, dict(scope["headers"])
    host, origin = (headers.get(name, b"").decode("latin-1").lower() for name in (b"host", b"origin"))
    found = _HOST.fullmatch(host)
    name = (found[1] or found[2]) if found else host
    if host and "*" not in access.hosts and name not in access.hosts:  # no browser leaves it out, but some probes do
      return "this server is not called by that host name; its --allowed_hosts lists those that are", 403
    if origin and (not host or origin.partition("://")[2] != host) and not {"*", origin} & set(access.origins):
      return "this server is not called by pages of that origin; its --cors lists those that may call", 403
    if access.key is None or scope["path"] in ("/health", "/ready"):
      return None
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), access.key.encode(errors="surrogateescape")):
      return "this server wants its API key: send it as Authorization: Bearer KEY", 401
    return None


def _lifespan(web: Web, started: Callable | None, broken: Callable | None) -> Callable:
  """The engine's thread, from the server's start to its end."""
  def engine_thread():
    try:
      web.service.serve()
    except Exception:
      traceback.print_exc()
    if web.service.failure is not None:
      broken and broken()

  @contextlib.asynccontextmanager
  async def lifespan(app):
    thread = threading.Thread(target=engine_thread, name="engine", daemon=True)
    thread.start()
    web.sameness.start()
    started and started()
    yield
    web.service.close()
    await asyncio.to_thread(thread.join, 20.0)
    web.sameness.close()

  return lifespan


# ---- calls --------------------------------------------------------------------------------------------------


async def _answer(web: Web, chat: bool, request: Request) -> Response:
  """One call of either kind, whole or streamed."""
  start = time.monotonic()
  if web.bodies.closed:
    raise Refused("the server is stopping and takes no new calls", status=503)
  try:
    asked = await web.bodies.parsed(request, lambda raw: openai_api.read(raw, chat, web.limits))
  except ClientDisconnect:
    return Response(status_code=499)
  call = Running(web, asked, start)
  try:
    call.begin()
    if asked.stream:
      return Stream(call)
    try:
      answer = await call.whole(request)
    finally:
      call.over()
  except Full as e:
    raise Refused(f"the server is full: {e}; try again later", status=429) from None
  except Cut as e:
    raise Refused(str(e), status=503) from None
  except Broken:
    return web.error(FAILED, 500)
  return Response(status_code=499) if answer is None else JSONResponse(answer)
