"""An OpenAI-compatible HTTP endpoint over the engine, with the head's votes; from a model, a checkpoint or an exported policy.

  arrol-serve --config=quickstart --port=8000                      # the config's model
  arrol-serve --config=quickstart --workdir=DIR --port=8000        # DIR's newest checkpoint of that run
  arrol-serve --config=quickstart --config.model.path=DIR/policy   # a run's exported policy and head
Paths: /v1/models, /v1/completions, /v1/chat/completions, /health, /metrics (Prometheus). openai_api.py says which fields are
taken.
"""

import asyncio
from collections.abc import Callable
import contextlib
import dataclasses
import functools
import json
from pathlib import Path
import secrets
import signal
import socket
import sys
import threading
import time
import traceback

import jax
from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
import uvicorn

from arrol_jax import assemble, config as configuration
from arrol_jax.serving import openai_api, service
from arrol_jax.serving.openai_api import Answer, Asked, Limits, Refused, refusal
from arrol_jax.serving.service import Service
from arrol_jax.types import UserError

FLAGS = {"host": ("127.0.0.1", "address to listen at"), "port": ("8000", "0: any free one"),
         "queue": ("256", "traces that may wait beyond rollout.slots; more: 429"),
         "drain": ("600", "seconds that calls under way get after SIGTERM or SIGINT; no new ones are taken")}
MAX_BODY = 4 << 20  # bytes
PREFILL_ROWS = 4    # calls arrive one by one: a prefill of many rows would be mostly padding


def main():
  c, flags = configuration.parse(sys.argv, FLAGS, __doc__)
  configuration.check(c)
  number = {name: _number(name, flags[name].value, most) for name, most in (("port", 65535), ("queue", 10**6), ("drain", 10**6))}
  workdir = flags.workdir if flags["workdir"].present else None
  with _bind(flags.host, number["port"]) as listener:  # before a model is loaded for nothing
    service, limits = load(c, workdir, number["queue"])
    service.warm_up()
    listen(service, limits, listener, number["drain"])
  if service.failure is not None:
    sys.exit(1)
  print("drained", flush=True)


def listen(service: Service, limits: Limits, listener: socket.socket, drain: int) -> None:
  """Serves until SIGTERM, SIGINT or a failure of the engine; then lets what is under way end, for `drain` seconds at most."""
  listener.listen(2048)
  url = "http://{}:{}".format(*listener.getsockname()[:2])
  app = make_app(service, limits, started=lambda: print(f"serving {limits.model} at {url}", flush=True),
                 broken=lambda: setattr(server, "should_exit", True))
  server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, lifespan="on",
                                         timeout_graceful_shutdown=drain))
  for name in (signal.SIGTERM, signal.SIGINT):  # uvicorn takes them, drains, and raises them again: to nothing
    signal.signal(name, lambda *_: None)
  server.run(sockets=[listener])


def _number(name: str, text: str, most: int) -> int:
  if not text.isascii() or not text.isdigit() or int(text) > most:
    raise UserError(f"--{name} is {text!r}; it must be an integer from 0 to {most}")
  return int(text)


def _bind(host: str, port: int) -> socket.socket:
  """A socket at host and port; it does not listen yet."""
  out = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
  out.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
  try:
    out.bind((host, port))
  except OSError as e:
    out.close()
    raise UserError(f"cannot listen at {host}:{port}: {e.strerror or e}; give another --port or --host") from e
  return out


def load(c, workdir: str | None, queue_size: int) -> tuple[Service, Limits]:
  """The engine's side of a server, of the config's model or of the newest checkpoint in `workdir`."""
  mesh = assemble.make_mesh(c)
  with jax.set_mesh(mesh):
    loaded = assemble.load(c, mesh)
    if workdir:
      state, _ = assemble.from_checkpoint(c, loaded, mesh, workdir)
      loaded.params, loaded.head, loaded.calibration = state.params["policy"], state.params["head"], state.calibration
      del state  # the optimizer's part is not needed
    assemble.follow_head(c, loaded)
    engine = dataclasses.replace(assemble.eval_engine(c, loaded, mesh, loaded.params), prefill_rows=PREFILL_ROWS)
    loaded.params = None
  how = dataclasses.replace(assemble.sampling(c, loaded), confidence=assemble.TOP_K, pool=assemble.pools(c, loaded.head))
  service = Service(engine, how, loaded.tokenizer, queue_size, head=loaded.head, tables=loaded.calibration,
                    detect=assemble.detect(c), inputs=assemble.linear_inputs(c))
  name = Path(workdir or c.model.path).resolve()
  limits = Limits(name.parent.name if name.name == "policy" else name.name, engine.max_prompt, engine.max_new, service.most,
                  loaded.config.vocab, loaded.tokenizer, c.reward.pattern, c.eval.window, loaded.head is not None,
                  loaded.calibration is not None, c.data.thinking)
  return service, limits


# ---- HTTP ---------------------------------------------------------------------------------------------------


def make_app(service: Service, limits: Limits, started: Callable | None = None, broken: Callable | None = None) -> Starlette:
  """The server. Its lifespan runs the engine's thread; broken() is called if that dies."""
  meters = Meters(service)
  created = int(time.time())
  model = {"id": limits.model, "object": "model", "created": created, "owned_by": "arrol_jax",
           "max_prompt_tokens": limits.max_prompt, "max_tokens": limits.max_new}

  async def health(request):
    return JSONResponse({"status": "ok" if service.failure is None else "broken", "running": service.running,
                         "waiting": service.waiting}, 200 if service.failure is None else 503)

  async def one_model(request):
    if request.path_params["name"] != limits.model:
      raise Refused(f"this server has the model {limits.model!r} only", "model", 404)
    return JSONResponse(model)

  async def metrics(request):
    return Response(generate_latest(meters.registry), media_type=CONTENT_TYPE_LATEST)

  async def refused(request, e: Refused):
    return _error(meters, str(e), e.status, e.field)

  async def unknown(request, e: HTTPException):
    return _error(meters, f"{request.method} {request.url.path}: {e.detail}", e.status_code)

  async def failed(request, e: Exception):
    return _error(meters, "the server failed; its log says why", 500)

  answer = functools.partial(_answer, service, limits, meters)
  routes = [Route("/v1/models", lambda request: JSONResponse({"object": "list", "data": [model]})),
            Route("/v1/models/{name:path}", one_model), Route("/health", health), Route("/metrics", metrics),
            Route("/v1/completions", functools.partial(answer, False), methods=["POST"]),
            Route("/v1/chat/completions", functools.partial(answer, True), methods=["POST"])]
  return Starlette(routes=routes, lifespan=_lifespan(service, started, broken),
                   exception_handlers={Refused: refused, HTTPException: unknown, Exception: failed})


def _lifespan(service: Service, started: Callable | None, broken: Callable | None) -> Callable:
  """The engine's thread, from the server's start to its end."""
  def engine_thread():
    try:
      service.serve()
    except Exception:
      traceback.print_exc()
      broken and broken()

  @contextlib.asynccontextmanager
  async def lifespan(app):
    thread = threading.Thread(target=engine_thread, name="engine", daemon=True)
    thread.start()
    started and started()
    yield
    service.close()
    await asyncio.to_thread(thread.join)

  return lifespan


class Meters:
  """What /metrics tells."""

  def __init__(self, service: Service):
    self.registry, self.service = CollectorRegistry(), service
    self.answers = Counter("arrol_requests", "Calls answered, by HTTP status; 499: the client left", ["status"],
                           registry=self.registry)
    seconds = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300)
    self.first = Histogram("arrol_first_token_seconds", "From a call to its first token", buckets=seconds, registry=self.registry)
    self.total = Histogram("arrol_request_seconds", "From a call to its last token", buckets=seconds, registry=self.registry)
    self.registry.register(self)

  def collect(self):
    s, t = self.service, self.service.totals
    yield GaugeMetricFamily("arrol_traces_running", "Traces in slots", value=s.running)
    yield GaugeMetricFamily("arrol_traces_waiting", "Traces without a slot", value=s.waiting)
    yield GaugeMetricFamily("arrol_traces_most", "Traces that may run or wait", value=s.most)
    yield CounterMetricFamily("arrol_prompt_tokens", "Prompt tokens taken", value=t.prompt_tokens)
    yield CounterMetricFamily("arrol_tokens", "Tokens generated", value=t.tokens)
    yield CounterMetricFamily("arrol_traces", "Traces finished", value=t.traces)
    yield CounterMetricFamily("arrol_traces_hopeless", "Traces that the quality head stopped", value=t.hopeless)
    yield CounterMetricFamily("arrol_traces_cancelled", "Traces whose client left", value=t.cancelled)


def _error(meters: Meters, text: str, status: int, field: str | None = None) -> JSONResponse:
  meters.answers.labels(status).inc()
  return JSONResponse(refusal(text, status, field), status, {"Retry-After": "1"} if status == 429 else None)


async def _body(request: Request) -> bytes:
  """The request's body. Raises Refused for one that is too long, without reading it all."""
  out = bytearray()
  async for part in request.stream():
    out += part
    if len(out) > MAX_BODY:
      raise Refused(f"the body is longer than {MAX_BODY} bytes", status=413)
  return bytes(out)


async def _answer(service: Service, limits: Limits, meters: Meters, chat: bool, request: Request) -> Response:
  """One call of either kind, whole or streamed."""
  start, loop = time.monotonic(), asyncio.get_running_loop()
  try:
    asked = await asyncio.to_thread(openai_api.read, await _body(request), chat, limits)
  except ClientDisconnect:
    return Response(status_code=499)
  pieces = asyncio.Queue()
  try:
    ticket = service.submit(asked.call, lambda piece: loop.call_soon_threadsafe(pieces.put_nowait, piece))
  except service.Full as e:
    raise Refused(f"the server is full: {e}; try again later", status=429) from None
  answer = Answer(asked, limits, secrets.token_hex(12))

  async def said():
    """The call's pieces until it is done."""
    while not answer.done:
      piece = await pieces.get()
      if isinstance(piece, BaseException):
        raise piece
      if not any(answer.tokens):
        meters.first.observe(time.monotonic() - start)
      answer.add(piece)
      yield piece
    meters.total.observe(time.monotonic() - start)
    meters.answers.labels(200).inc()

  def over():
    """A client that left earlier cancels its call."""
    if not answer.done:
      service.cancel(ticket)
      meters.answers.labels(499).inc()

  if asked.stream:
    return _Stream(_events(answer, said), over)
  try:
    if not await _unless_gone(request, said):
      return Response(status_code=499)
  finally:
    over()
  return JSONResponse(await asyncio.to_thread(_whole, asked, limits, answer))


class _Stream(StreamingResponse):
  """Server-sent events; over() is called at the end, also where the client left before the first."""

  def __init__(self, events, over: Callable):
    super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
    self.over = over

  async def __call__(self, scope, receive, send):
    try:
      await super().__call__(scope, receive, send)
    finally:
      self.over()


def _whole(asked: Asked, limits: Limits, answer: Answer) -> dict:
  if asked.vote is None:
    return answer.whole()
  return answer.whole(service.tally(asked.vote, answer.texts, answer.last, limits.pattern, limits.window))


async def _events(answer: Answer, said: Callable):
  """Server-sent events: a chunk a piece, the usage if it was asked for, and the end."""
  event = lambda x: f"data: {json.dumps(x, ensure_ascii=False)}\n\n"
  begun = set()
  async with contextlib.aclosing(said()) as pieces:
    try:
      async for piece in pieces:
        if piece.text or piece.finish or answer.asked.logprobs:
          yield event(answer.chunk(piece, piece.trace not in begun))
          begun.add(piece.trace)
    except Exception:  # the status is out already
      yield event(refusal("the server failed; its log says why", 500))
      return
  if answer.asked.usage:
    yield event(answer.closing())
  yield "data: [DONE]\n\n"


async def _unless_gone(request: Request, said: Callable) -> bool:
  """Waits for all pieces; False if the client left before."""
  async def everything():
    async with contextlib.aclosing(said()) as pieces:
      async for _ in pieces:
        pass

  async def leaving():
    while (await request.receive())["type"] != "http.disconnect":
      pass

  work, left = asyncio.ensure_future(everything()), asyncio.ensure_future(leaving())
  try:
    await asyncio.wait({work, left}, return_when=asyncio.FIRST_COMPLETED)
    if not work.done():
      return False
    work.result()  # raises what it raised
    return True
  finally:
    for task in (work, left):
      task.cancel()
    await asyncio.gather(work, left, return_exceptions=True)


command = functools.partial(configuration.run, main)

if __name__ == "__main__":
  command()
