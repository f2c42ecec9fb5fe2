"""A connection's HTTP, below the application: heads have a longest size and time, nothing is upgraded, what is not HTTP is
refused once, and connections that ask for nothing make room where file descriptors run out."""

import contextlib
import resource
import sys

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

MAX_HEAD = 64 << 10  # bytes of a request's head
HEAD_SECONDS = 15.0  # for a request's head to come whole, the first one's from the connection's start on
SPARE = 64           # file descriptors that are left to others than connections
TELL_SECONDS = 60.0  # between two words about them


class Patient(HttpToolsProtocol):
  """A connection that is closed where the head of a request does not come in time, or is too long."""

  def connection_made(self, transport):
    self.in_head, self.head, self.turned = True, 0, False  # head: its bytes so far; turned: whether a part has just ended
    self.over = False  # nothing more is read
    self.cycles = []   # of requests that are not answered yet
    self.heard = self.loop.time()
    super().connection_made(transport)
    self.late = self.loop.call_later(HEAD_SECONDS, self._close_if_idle)
    self._make_room()

  def connection_lost(self, exc):
    self.late.cancel()
    for cycle in self.cycles:  # uvicorn tells the last one only
      if not cycle.response_complete:
        cycle.disconnected = True
        cycle.message_event.set()
    super().connection_lost(exc)

  def data_received(self, data):
    if self.over:
      return
    self._unset_keepalive_if_required()
    self.heard, self.turned = self.loop.time(), False
    try:
      self._feed(data)
      self.head += len(data) if self.in_head and not self.turned else 0
      if self.head > MAX_HEAD:
        self._refuse()
    except httptools.HttpParserError:
      self._refuse()
    if not self._idle():
      self.late.cancel()
    elif self.turned or self.late.cancelled():  # another head has begun, or what was left of a body whose answer is out
      self.late.cancel()
      self.late = self.loop.call_later(HEAD_SECONDS, self._close_if_idle)

  def _feed(self, data) -> None:
    """Parses. Where a request asks for another protocol the parser stops behind its head and takes it for the whole: such a head
    is read again without that wish, which a server may ignore (RFC 9110, 7.8)."""
    rest = memoryview(data)
    while rest:
      try:
        return self.parser.feed_data(rest)
      except httptools.HttpParserUpgrade as e:
        start = b"%s %s HTTP/%s\r\n" % (self.parser.get_method(), self.url, self.parser.get_http_version().encode())
        fields = [b"%s: %s\r\n" % field for field in self.headers if field[0] != b"upgrade"]
        self.parser.feed_data(start + b"".join(fields) + b"\r\n")
        rest = rest[e.args[0]:]

  def on_headers_complete(self):
    self.head, self.turned = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers), True
    if self.head > MAX_HEAD or self.parser.get_method() == b"CONNECT":
      raise ValueError("refused")
    if self.parser.should_upgrade():  # it is read again
      return
    self.in_head, self.head = False, 0
    super().on_headers_complete()
    self.cycles = [cycle for cycle in self.cycles if not cycle.response_complete] + [self.cycle]
    if len(self.cycles) == 2:  # one that waits behind another: a client that leaves is seen only while it is read from
      self.flow.resume_reading()
    if self.parser.get_http_version() == "1.0":
      _without_chunks(self.cycle)

  def on_message_complete(self):
    self.turned = True
    if not self.parser.should_upgrade():
      self.in_head = True
      super().on_message_complete()

  def _refuse(self) -> None:
    """What came is no HTTP, or too long a head. Nobody gets two answers."""
    self.over = True
    if self.in_head and not self._idle():
      self.cycle.keep_alive = False  # what was asked before gets its answer
    elif self.in_head or not (self._idle() or self.cycle.response_started or self.pipeline):
      self.send_400_response(f"The request's head is longer than {MAX_HEAD} bytes." if self.head > MAX_HEAD else
                             "Invalid HTTP request received.")
    else:
      self.transport.close()

  def _idle(self) -> bool:
    return self.cycle is None or self.cycle.response_complete

  def _close_if_idle(self):
    if self._idle():
      self.transport.close()

  def _make_room(self) -> None:
    """Closes the half of the idle connections that was not heard of for longest where there are as many as may be."""
    most = max(16, resource.getrlimit(resource.RLIMIT_NOFILE)[0] - SPARE)
    if len(self.connections) <= most:
      return
    there = [x for x in self.connections if not x.transport.is_closing()]
    if len(there) > most:
      tell_of_descriptors(self.loop.time())
      idle = sorted((x for x in there if x._idle()), key=lambda x: x.heard)
      for x in idle[:(len(idle) + 1) // 2]:
        x.transport.close()


def _without_chunks(cycle) -> None:
  """An answer to HTTP/1.0, which knows no chunks: where its length is not known its end is the connection's."""
  send, cycle.chunked_encoding = cycle.send, False

  async def as_it_is(message):
    cycle.expected_content_length = len(message.get("body", b""))
    await send(message)

  cycle.send = as_it_is


_told = [-TELL_SECONDS]


def tell_of_descriptors(now: float) -> None:
  """now: the loop's time."""
  if now - _told[0] >= TELL_SECONDS:
    _told[0] = now
    with contextlib.suppress(OSError):
      print("warning: file descriptors run out (ulimit -n is "
            f"{resource.getrlimit(resource.RLIMIT_NOFILE)[0]}): idle connections are closed", file=sys.stderr, flush=True)


def take_descriptors() -> None:
  """Raises this process's limit of open files as far as it may."""
  hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
  with contextlib.suppress(ValueError, OSError):  # no limit is too many on some systems
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
