"""From a listening socket to the end: a signal drains, a second one cuts.

The first SIGTERM or SIGINT lets what is under way end, for so many seconds; after these, or at a second signal, it is cut:
streams end with an error event, other calls get a 503, and the engine's process says how many they were. This is a process of the
HTTP side (remote.py); signals come to the engine's, which tells it.
"""

import asyncio
import contextlib
import errno
import logging
import os
import socket
import threading

import uvicorn

from arrol_jax.serving.connections import Patient, tell_of_descriptors
from arrol_jax.serving.openai_api import Limits
from arrol_jax.serving.web import Access, Web, make_app

_LOOK_S = 0.05  # between looks for calls that are under way
GRACE = 2.0  # seconds that calls which were cut get to tell their clients


BACKLOG = 2048  # connections that wait to be taken


class Shared(socket.socket):
  """A listening socket that several processes take connections from."""

  def listen(self, _backlog: int = 0) -> None:
    """asyncio takes as many connections at a time as it lets wait; that would be nearly all for the first process to look."""
    super().listen(BACKLOG)


class Server(uvicorn.Server):
  """drain: seconds that calls under way get after the first signal."""

  def __init__(self, app, drain: float, keep_alive: int):
    super().__init__(uvicorn.Config(app, log_level="error", access_log=False, lifespan="on", http=Patient, ws="none",
                                    loop="asyncio",  # uvloop, where it is there, takes a quarter more of the processor here
                                    backlog=1, proxy_headers=False, timeout_keep_alive=keep_alive,
                                    timeout_graceful_shutdown=int(drain + 2 * GRACE) + 1))
    self.web: Web = app.state.web
    self.drain, self.stopping = drain, False

  async def startup(self, sockets=None):
    self.loop = asyncio.get_running_loop()
    self.loop.set_exception_handler(_on_trouble)
    await super().startup(sockets)

  @contextlib.contextmanager
  def capture_signals(self):
    """They are not for this process."""
    yield

  def stop(self):
    """A signal came. From any thread."""
    first, self.stopping = not self.stopping, True
    self.loop.call_soon_threadsafe(self._begin_drain if first else self._cut)

  def broken(self):
    """The engine broke, and the calls that it had have been told. From any thread."""
    self.should_exit = True
    self.loop.call_soon_threadsafe(self.loop.call_later, GRACE, self._cut)

  def _begin_drain(self):
    self.web.stop_taking()
    self.loop.call_later(self.drain, self._cut)
    self._end_when_answered()

  def _end_when_answered(self):
    """Until then who asks is told how it is, and that no call is taken: uvicorn's own end closes the listening socket first."""
    self.should_exit = self.should_exit or not self.web.under_way
    if not self.should_exit:
      self.loop.call_later(_LOOK_S, self._end_when_answered)

  def _cut(self):
    self.should_exit = True
    if self.web.under_way:
      self.web.cut_off()
    self.loop.call_later(GRACE, self._leave)

  def _leave(self):
    """Clients that do not read what they are told are waited for no longer. Where that is an answer they have not got it."""
    there = [connection.transport for connection in self.server_state.connections]
    self.web.cut = max(self.web.cut, sum(x.get_write_buffer_size() > 0 for x in there))  # some of them were cut before
    for transport in there:
      transport.abort()
    self.loop.call_later(GRACE, setattr, self, "force_exit", True)


def _on_trouble(loop: asyncio.AbstractEventLoop, context: dict) -> None:
  """Of the event loop itself. It cannot take a connection where file descriptors have run out, and tries again."""
  if getattr(context.get("exception"), "errno", None) in (errno.EMFILE, errno.ENFILE):
    tell_of_descriptors(loop.time())
  else:
    loop.default_exception_handler(context)


def listen(remote, limits: Limits, listener: Shared, access: Access, drain: float, keep_alive: int) -> int:
  """Serves a Remote until it is told to stop or the engine fails; the exit status: 0 only where every call that was taken got its
  answer."""
  logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of clients that leave a stream, which /metrics counts
  app = make_app(remote, limits, remote.serving, lambda: server.broken(), access, remote.board)
  server = Server(app, drain, keep_alive)
  remote.on_stop = server.stop
  server.run(sockets=[listener])
  return _end(app.state.web)


def _end(web: Web) -> int:
  """Waits for the engine's thread, and notes how many calls were cut."""
  web.service.cut()
  engine = next((t for t in threading.enumerate() if t.name == "engine"), None)
  if engine is not None:
    engine.join(10 * GRACE)
  web.sameness.close()
  if web.service.failure is not None:  # its thread has said how
    return 1
  web.board.put("cut", web.cut)
  if engine is not None and engine.is_alive():  # it does not answer: the interpreter would not end
    os._exit(1)
  return 1 if web.cut else 0
