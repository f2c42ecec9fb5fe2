"""What goes over a connection: one answer a request whatever its body, other protocols asked for, many that ask for nothing, and
who may call."""

import asyncio
import contextlib
import http.client
import json
import resource
import socket
import sys
from types import SimpleNamespace
import urllib.error
import urllib.request

from helpers_serve import PROMPT, ask, until
import pytest

from arrol_jax import serve
from arrol_jax.serving import bodies, connections, front, lifecycle
from arrol_jax.serving.web import Access
from arrol_jax.types import UserError

CALL = {"prompt": PROMPT, "max_tokens": 4}
LONG = b"x" * 3_000_000


def request(body, *fields: str, path: str = "/v1/completions", version: str = "1.1", host: str = "localhost") -> bytes:
  body = body if isinstance(body, bytes) else json.dumps(body).encode()
  head = [f"POST {path} HTTP/{version}", f"Host: {host}", f"Content-Length: {len(body)}", *fields]
  return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def answers(port: int, *parts: bytes) -> list[tuple[int, dict, bytes]]:
  """(status, headers, body) of all that the server says to what comes in these parts, the last of which ends the connection."""
  with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
    for part in parts:
      connection.sendall(part)
    said = b""
    while part := connection.recv(1 << 16):
      said += part
  out = []
  while said:
    head, _, said = said.partition(b"\r\n\r\n")
    first, *lines = head.decode().split("\r\n")
    headers = dict(line.split(": ", 1) for line in lines)
    length = int(headers.get("content-length", 0 if " 100 " in first else len(said)))
    out.append((int(first.split()[1]), headers, said[:length]))
    said = said[length:]
  return out


def statuses(port: int, *parts: bytes) -> list[int]:
  return [status for status, _, _ in answers(port, *parts)]


LAST = request(CALL, "Connection: close")


# ---- bodies that nobody wants -------------------------------------------------------------------------------


@pytest.mark.parametrize("method, path, key, body, status", [
  ("POST", "/v1/completions", "wrong", LONG, 401), ("POST", "/nowhere", "k", LONG, 404),
  ("DELETE", "/v1/completions", "k", LONG, 405), ("POST", "/v1/completions", "k", LONG * 2, 413),
  ("GET", "/health", "k", LONG, 200),  ("POST", "/v1/chat/completions", "k", LONG, 400)])
def test_what_follows_a_body_that_nobody_wanted_on_its_connection_is_answered(server, access, method, path, key, body, status):
  access(Access(key="k"))
  connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
  for _ in range(2):
    connection.request(method, path, body, {"Authorization": f"Bearer {key}"})
    answer = connection.getresponse()
    answer.read()
    assert answer.status == status and (status != 405 or answer.headers["Allow"] == "POST")
    port = connection.sock.getsockname()
    connection.request("POST", "/v1/completions", json.dumps(CALL), {"Authorization": "Bearer k"})
    answer = connection.getresponse()
    assert answer.status == 200 and json.loads(answer.read())["choices"]
    assert connection.sock.getsockname() == port  # still the same
  connection.close()


def test_one_request_has_one_answer(server, access):
  access(Access(key="k"))
  closing = request(LONG, "Connection: close")
  half = len(closing) // 2
  assert statuses(server.port, closing) == statuses(server.port, closing[:half], closing[half:]) == [401]
  with pytest.raises(urllib.error.HTTPError, match="401"):  # this client sends all before it reads, and asks for the end
    urllib.request.urlopen(f"http://127.0.0.1:{server.port}/v1/completions", LONG)
  access(Access())
  assert statuses(server.port, request(CALL), request(LONG), LAST) == [200, 400, 200]
  assert statuses(server.port, request(CALL | {"max_tokens": 40, "n": 4}) + b"nonsense\r\n\r\n") == [200]
  assert statuses(server.port, request(CALL) + request(CALL)[:-9] + b"x" * 9, LAST) == [200, 400, 200]


def test_a_body_that_waits_to_be_wanted_is_not_sent_for(server, access):
  access(Access(key="k"))
  wait = request(LONG, "Expect: 100-continue").partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
  (status, headers, _), = answers(server.port, wait)
  assert status == 401 and headers["connection"] == "close"
  access(Access())
  assert statuses(server.port, request(CALL, "Expect: 100-continue", "Connection: close")) == [100, 200]


def test_a_refused_body_that_does_not_come_ends_with_its_answer(server, access, monkeypatch):
  access(Access(key="k"))
  monkeypatch.setattr(bodies, "SECONDS", 0.3)
  (status, headers, _), = answers(server.port, request(LONG)[:-1])
  assert status == 401 and headers["connection"] == "close"


def test_bodies_that_never_come_keep_out_long_ones_only(server, monkeypatch):
  monkeypatch.setattr(bodies, "MAX_BODIES", 1 << 20)
  half = request(json.dumps(CALL | {"user": "u" * 500_000}).encode())[:-1]
  with contextlib.ExitStack() as stalled:
    for _ in range(2):
      stalled.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30)).sendall(half)
    assert until(lambda: server.web.bodies.held > 1_000_000)
    assert ask(server.port, CALL)[0] == 200
    assert ask(server.port, CALL | {"user": "u" * 100_000})[0] == 429
    monkeypatch.setattr(bodies, "MAX_BODIES", 1 << 19)  # as where short ones that do not come are many, too
    assert ask(server.port, CALL)[0] == 200
    monkeypatch.setattr(bodies, "MAX_BODIES", 400_000)
    assert ask(server.port, CALL)[0] == 429
  assert until(lambda: server.web.bodies.held == 0) and ask(server.port, CALL | {"user": "u" * 100_000})[0] == 200


# ---- other protocols ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wish", [
  ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA"),
  ("Upgrade: websocket", "connection: upgrade"), ("Upgrade: TLS/1.0, foo/2", "Connection: Upgrade")])
def test_a_wish_for_another_protocol_is_ignored(server, wish):
  upgrade = request(CALL, *wish)
  for parts, count in [((upgrade, LAST), 2), ((upgrade * 3 + LAST,), 4),
                       ((upgrade[:30], upgrade[30:90], upgrade[90:-5], upgrade[-5:] + LAST), 2)]:
    said = answers(server.port, *parts)
    assert [status for status, _, _ in said] == [200] * count
    assert all(json.loads(body)["usage"]["completion_tokens"] for _, _, body in said)
  assert statuses(server.port, request(LONG, *wish), LAST) == [400, 200]
  chunked = request(b"", *wish, "Transfer-Encoding: chunked").replace(b"Content-Length: 0\r\n", b"")
  body = json.dumps(CALL).encode()
  assert statuses(server.port, chunked, b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body), LAST) == [200, 200]


def test_a_tunnel_is_refused(server):
  assert statuses(server.port, b"CONNECT a.example:80 HTTP/1.1\r\nHost: a.example:80\r\n\r\n") == [400]


def test_answers_to_http_1_0_have_no_chunks_and_end_with_the_connection(server):
  for stream in (True, False):
    (status, headers, body), = answers(server.port, request(CALL | {"stream": stream}, version="1.0"))
    assert status == 200 and "transfer-encoding" not in headers and headers["connection"] == "close"
    assert body.endswith(b"}\n\ndata: [DONE]\n\n") and body.startswith(b"data: {") if stream else json.loads(body)["choices"]


# ---- heads, and connections that ask for nothing ------------------------------------------------------------


def test_a_head_has_a_longest_size_however_it_comes(server):
  lines = [b"x%d: %s\r\n" % (i, b"y" * 1000) for i in range(80)]
  head, end = b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b"Connection: close\r\n\r\n"
  for parts in [(head + b"".join(lines) + end,), (head, b"".join(lines[:60]), b"".join(lines[60:]) + end)]:
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
      for part in parts:
        with contextlib.suppress(OSError):  # it may have had enough
          connection.sendall(part)
      assert connection.recv(4096).startswith(b"HTTP/1.1 400")
  assert statuses(server.port, head + b"".join(lines[:50]) + end) == [200]


def test_a_connection_that_says_nothing_is_closed_sooner_than_one_that_has_asked(server, monkeypatch):
  monkeypatch.setattr(connections, "HEAD_SECONDS", 0.2)
  with socket.create_connection(("127.0.0.1", server.port), timeout=4) as silent:  # others are kept for 5 seconds here
    assert silent.recv(1) == b""


def test_where_descriptors_run_out_the_idle_make_room_and_one_line_says_so(server, monkeypatch, capfd):
  monkeypatch.setattr(connections, "resource", SimpleNamespace(
    getrlimit=lambda _: (connections.SPARE + 20, 10**6), RLIMIT_NOFILE=resource.RLIMIT_NOFILE))
  monkeypatch.setattr(connections, "_told", [-1e9])
  with contextlib.ExitStack() as held:
    idle = [held.enter_context(socket.create_connection(("127.0.0.1", server.port), timeout=30)) for _ in range(60)]
    assert [ask(server.port, CALL)[0] for _ in range(3)] == [200] * 3
    assert idle[0].recv(1) == b""  # the first that came was not heard of for longest
  err = capfd.readouterr().err
  assert err.count("\n") == 1 and "file descriptors run out" in err and str(connections.SPARE + 20) in err


def test_the_limit_of_open_files_is_raised_as_far_as_it_may():
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (soft - 1, hard))
  try:
    connections.take_descriptors()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_the_url_of_an_ipv6_address_has_brackets():
  assert front._url("::1", 80, 0, 0) == "http://[::1]:80" and front._url("127.0.0.1", 80) == "http://127.0.0.1:80"


def test_the_loop_is_asyncios_own_whatever_is_installed(monkeypatch):
  monkeypatch.setitem(sys.modules, "uvloop", SimpleNamespace(new_event_loop=lambda: pytest.fail("uvloop's loop")))
  app = SimpleNamespace(state=SimpleNamespace(web=None))
  with contextlib.closing(lifecycle.Server(app, 1.0, 1).config.get_loop_factory()()) as loop:
    assert isinstance(loop, asyncio.SelectorEventLoop)


# ---- who may call -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("origins, origin, status", [
  ((), "http://evil.example", 403), ((), "null", 403), ((), "http://localhost.evil.example", 403),
  ((), "http://localhost:99", 403), ((), "http://localhost", 200), ((), "https://LOCALHOST", 200), ((), None, 200),
  (("https://a.example",), "https://a.example", 200),
  (("https://a.example",), "http://a.example", 403), (("*",), "http://evil.example", 200), (("null",), "null", 200)])
def test_a_page_of_another_origin_is_refused_also_where_its_browser_does_not_ask(server, access, origins, origin, status):
  access(Access(origins=origins))
  fields = ["Content-Type: text/plain", "Connection: close", *([f"Origin: {origin}"] if origin else [])]
  (got, _, body), = answers(server.port, request(CALL, *fields))
  assert got == status and (status == 200 or "--cors" in json.loads(body)["error"]["message"])


def test_a_key_may_have_any_characters(server, access):
  for key, sent, status in [
      ("schlüssel", "schlüssel".encode(), 200), ("schlüssel", b"schlussel", 401), ("k", "ü".encode(), 401), ("k", b"\xff", 401),
      ("a\udcff", b"a\xff", 200), ("鍵 1", "鍵 1".encode(), 200)]:
    access(Access(key=key))
    head = b"GET /v1/models HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAuthorization: Bearer " + sent + b"\r\n\r\n"
    assert statuses(server.port, head) == [status]


def flags(**given):
  return SimpleNamespace(**({"host": "127.0.0.1", "allowed_hosts": "", "cors": "", "api_key": None} | given))


def test_a_key_is_taken_without_the_space_around_it_and_an_empty_one_is_a_mistake(monkeypatch):
  monkeypatch.delenv("ARROL_API_KEY", raising=False)
  assert serve._access(flags(), 60).key is None
  assert serve._access(flags(api_key=" k1 "), 60).key == "k1"
  for empty in ("", " ", "\n", "a\nb"):
    with pytest.raises(UserError, match="--api_key"):
      serve._access(flags(api_key=empty), 60)
  monkeypatch.setenv("ARROL_API_KEY", "k2\n")
  assert serve._access(flags(), 60).key == "k2" and serve._access(flags(api_key="k1"), 60).key == "k1"
  for empty in ("", "\r\n"):
    monkeypatch.setenv("ARROL_API_KEY", empty)
    with pytest.raises(UserError, match="ARROL_API_KEY is empty"):
      serve._access(flags(), 60)


def test_origins_are_named_whole():
  given = flags(cors="https://A.example, http://b:80,null")
  assert serve._access(given, 60).origins == ("https://a.example", "http://b:80", "null")
  for text in ("a.example", "https://a.example/", "https://a.example/page"):
    with pytest.raises(UserError, match="--cors"):
      serve._access(flags(cors=text), 60)


def test_hosts_are_named_without_scheme_or_port():
  given = flags(allowed_hosts="Proxy.example, ::1,10.0.0.7")
  assert serve._access(given, 60).hosts == ("proxy.example", "::1", "10.0.0.7") and serve._access(flags(allowed_hosts="*"), 60)
  for text in ("proxy.example:8443", "http://proxy.example", "[::1]", "a b"):
    with pytest.raises(UserError, match="--allowed_hosts"):
      serve._access(flags(allowed_hosts=text), 60)
