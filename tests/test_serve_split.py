"""The HTTP side's own process: what callers and the engine tell each other gets across, and no end of either hangs the other."""

import collections
from concurrent import futures
import contextlib
import http.client
import json
import os
from pathlib import Path
import socket
import threading
from types import SimpleNamespace

from helpers_serve import FOREVER, PROMPT, ask, begun, command, events, until
from helpers_split import QUEUE, ROWS, SAID, TOKENIZER, split
import numpy as np
import pytest

from arrol_jax.engine.scheduler import Run
from arrol_jax.serving import pace, remote
from arrol_jax.serving.calls import Call, Likelihoods
from arrol_jax.serving.meters import COUNTED
from arrol_jax.serving.trace import Trace
from arrol_jax.types import Rollout


@pytest.fixture(scope="module")
def server():
  with split() as out:
    yield out
    out.front.stop()
    assert out.ended() == (0, ["drained"])


def test_calls_get_their_text_and_numbers_get_across(server):
  text = TOKENIZER.decode(SAID * 8)
  status, answer = ask(server.port, {"prompt": PROMPT, "n": 3, "max_tokens": 16, "logprobs": 0})
  assert status == 200 and [c["text"] for c in answer["choices"]] == [text] * 3
  assert answer["choices"][0]["logprobs"]["token_logprobs"] == [-0.5, -0.25] * 8
  parts = events(server.port, {"prompt": PROMPT, "max_tokens": 16})
  assert "".join(p["choices"][0]["text"] for p in parts) == text and len(parts) == 8  # a turn's tokens each
  lines = dict(line.rsplit(" ", 1) for line in ask(server.port, None, "/metrics", "GET")[1].splitlines())
  found = [float(lines[f"arrol_{name}"]) for name in ("traces_total", "tokens_total", "queue_seconds_count", "traces_most")]
  assert found == [4, 64, 4, ROWS + QUEUE]


def test_a_client_that_leaves_ends_its_call_and_a_full_server_says_so(server):
  cancelled = server.service.totals.cancelled
  connection, answer = begun(server.port, FOREVER | {"n": ROWS + QUEUE - 1, "max_tokens": 10**6})
  assert until(lambda: ask(server.port, None, "/health", "GET")[1].items() >= {"running": ROWS, "waiting": QUEUE - 1}.items())
  assert ask(server.port, {"prompt": PROMPT, "n": 2, "max_tokens": 4})[0] == 429
  answer.close()
  connection.close()
  assert until(lambda: server.service.totals.cancelled == cancelled + ROWS + QUEUE - 1) and not server.service.running
  assert until(lambda: ask(server.port, None, "/health", "GET")[1]["waiting"] == 0)
  assert ask(server.port, {"prompt": PROMPT, "n": ROWS + QUEUE, "max_tokens": 4})[0] == 200


def test_second_passes_are_made_where_the_model_is(server, capsys):
  asked = []

  def likelihoods(prompt, answer, temperature):
    asked.append((prompt.tolist(), answer, temperature))
    if len(asked) > 1:
      raise ValueError("too long")
    return Likelihoods(np.full(len(prompt), -1.5, np.float32), np.zeros((len(prompt), 1), np.int32), np.zeros((len(prompt), 1)))

  server.service.scorer.likelihoods = likelihoods
  body = {"prompt": "1+2>", "echo": True, "max_tokens": 0, "logprobs": 1, "temperature": 0.5}
  status, answer = ask(server.port, body)
  assert status == 200 and answer["choices"][0]["logprobs"]["token_logprobs"] == [-1.5] * 4
  assert asked == [(TOKENIZER.encode("1+2>"), [], 0.5)]
  assert ask(server.port, body)[0] == 500 and "too long" in capsys.readouterr().err


SCORED = {"prompt": ["1+2>"] * 2, "echo": True, "max_tokens": 0, "logprobs": 1}


@contextlib.contextmanager
def slow_passes(server):
  """A server's second passes take until the event is set: (event, list of those begun)."""
  go, begun = threading.Event(), []

  def likelihoods(prompt, answer, temperature):
    begun.append(1)
    go.wait(60)
    return Likelihoods(np.zeros(len(prompt), np.float32), np.zeros((len(prompt), 1), np.int32), np.zeros((len(prompt), 1)))

  server.service.scorer.likelihoods = likelihoods
  try:
    yield go, begun
  finally:
    go.set()


def scoring(server):
  return ask(server.port, None, "/health", "GET")[1]["scoring"]


def test_second_passes_have_a_bound_are_seen_and_end_with_their_client(server):
  left = lambda: ask(server.port, None, "/metrics", "GET")[1].partition('arrol_requests_total{status="499"} ')[2].split("\n")[0]
  before, body = float(left() or 0), json.dumps(SCORED)
  with slow_passes(server) as (go, begun):
    clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range((ROWS + QUEUE) // 2)]
    for i, client in enumerate(clients):  # some ask for more behind it
      client.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode() +
                     b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * (i % 2))
    assert until(lambda: scoring(server) == ROWS + QUEUE and len(begun) == 2)
    assert f"arrol_traces_scoring {ROWS + QUEUE}.0" in ask(server.port, None, "/metrics", "GET")[1]
    for more in (SCORED, SCORED | {"max_tokens": 2}, {"prompt": "1>", "n": 2, "vote": "majority"}):
      status, answer = ask(server.port, more)
      assert status == 429 and f"{ROWS + QUEUE} is the most" in answer["error"]["message"]
    assert ask(server.port, {"prompt": "1+2>", "max_tokens": 4})[0] == 200  # nothing of it is scored
    for client in clients:
      client.close()
    assert until(lambda: scoring(server) == 0 and float(left() or 0) == before + len(clients))
    go.set()
    assert ask(server.port, SCORED)[0] == 200 and len(begun) == 4  # what was begun, and its own: none for those that left
  assert ask(server.port, SCORED | {"prompt": ["1+2>"] * (ROWS + QUEUE)})[0] == 200


@pytest.mark.parametrize("end", ["signals", "a line that ends"])
def test_an_end_waits_for_no_second_pass(end, capfd):
  with split() as server, slow_passes(server) as (_, begun):
    got = []
    callers = [threading.Thread(target=lambda: got.append(ask(server.port, SCORED)[0])) for _ in range((ROWS + QUEUE) // 2)]
    for caller in callers:
      caller.start()
    assert until(lambda: scoring(server) == ROWS + QUEUE and len(begun) == 2)
    if end == "signals":
      server.front.stop()
      server.front.stop()
    else:  # as where the command is killed
      with socket.socket(fileno=os.dup(server.front.sides[0].line.connection.fileno())) as line:
        line.shutdown(socket.SHUT_RDWR)
    cut = f"stopped: {len(callers)} calls under way were cut"
    assert server.ended() == (1, [cut] if end == "signals" else [])
    for caller in callers:
      caller.join(20)
    assert got == [503 if end == "signals" else 500] * len(callers)
    assert end != "signals" or "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("stream", [True, False])
def test_an_end_does_not_wait_for_a_client_that_reads_nothing(stream, capfd):
  """Nor does it say that such a client got its answer, where all of that was known."""
  with split() as server, socket.socket() as client:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", server.port))
    body = json.dumps(FOREVER | {"n": ROWS, "max_tokens": 10**6 if stream else 1000, "logprobs": 0, "stream": stream})
    client.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
    assert until(lambda: server.service.totals.tokens > 3000)  # more than what is on the way can be
    assert stream or until(lambda: not server.service.running) and client.recv(15) == b"HTTP/1.1 200 OK"
    server.front.stop()
    server.front.stop()
    assert server.ended() == (1, ["stopped: 1 calls under way were cut"]) and "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("trouble", ["breaks", "cannot be told"])
def test_an_engine_that_breaks_is_told_to_all_and_ends_it(trouble, capsys):
  with split() as server:
    connection, answer = begun(server.port, {"prompt": PROMPT, "stream": True, "max_tokens": 200})
    server.service.run.trouble = trouble
    last = answer.read().decode().strip().split("\n\n")[-1]
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == 500
    connection.close()
    assert server.ended() == (1, []) and "Traceback" in capsys.readouterr().err


def test_a_killed_http_side_is_told_in_one_line(capsys):
  with split() as server:
    connection, answer = begun(server.port, FOREVER | {"max_tokens": 10**6})
    server.front.sides[0].process.kill()
    with contextlib.suppress(http.client.IncompleteRead):
      answer.read()
    connection.close()
    assert server.ended() == (1, ["stopped: 1 calls under way were cut"])
    assert capsys.readouterr().err == "error: the HTTP side was killed (signal 9)\n" and not server.service.running


@pytest.mark.parametrize("reader", ["http", "engine"])
def test_a_message_that_makes_no_sense_ends_both(reader, capsys):
  with split() as server:
    connection, answer = begun(server.port, FOREVER | {"max_tokens": 10**6})
    if reader == "http":
      server.front.sides[0].line.send("nonsense")
      assert b'"code": 500' in answer.read()
    else:
      server.service.cancel = None  # so that nothing can be made of the next message
      answer.close()
    connection.close()
    cut = ["stopped: 1 calls under way were cut"] if reader == "engine" else []
    assert server.ended() == (1, cut) and ("killed" in capsys.readouterr().err) == (reader == "engine")


def test_a_full_disk_under_its_stdout_is_no_reason_not_to_serve():
  with split(open("/dev/full", "w")) as server:
    until(lambda: ask(server.port, None, "/health", "GET")[0] == 200)
    server.front.stop()
    server.front.sides[0].process.wait(20)
    assert server.front.sides[0].process.returncode == 0


@pytest.mark.slow
def test_nothing_outlives_a_killed_engine():
  """Whoever lived would hold stdout open."""
  with command("--http-processes=2") as (process, port):
    child = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()[0]
    folder = Path(Path(f"/proc/{child}/environ").read_text().partition("PROMETHEUS_MULTIPROC_DIR=")[2].partition("\0")[0])
    assert folder.is_dir() and folder.name.startswith("arrol-serve-")
    connection, answer = begun(port)
    process.kill()
    said = answer.read().decode()
    assert "the server failed" in said and "[DONE]" not in said
    connection.close()
    out, err = process.communicate(timeout=20)
    assert out == "" and err.endswith("\nerror: the engine's process was killed; its callers have been told\n")
    assert err.count("killed") == 1 and not folder.exists()
    assert "Traceback" not in err
    with pytest.raises(ConnectionRefusedError):
      ask(port, None, "/health", "GET")


def test_of_those_that_are_left_one_removes_the_counts_and_speaks(tmp_path, monkeypatch):
  folder = tmp_path / "counts"
  monkeypatch.setenv(COUNTED, str(folder))
  for _ in range(20):
    folder.mkdir()
    (folder / "counter_1.db").write_text("")
    all_here = threading.Barrier(8)
    with futures.ThreadPoolExecutor(8) as pool:
      first = list(pool.map(lambda _, here=all_here: here.wait() >= 0 and remote._remove_counts(), range(8)))
    assert sum(first) == 1 and not list(tmp_path.iterdir())
  monkeypatch.delenv(COUNTED)
  assert remote._remove_counts()  # alone, so nobody else says it


def test_with_many_traces_pieces_are_fewer_and_longer():
  assert pace.gap(1) == pace.gap(pace.SOME) == 0
  for live in (20, 64, 256, 4096):
    assert pace.gap(live) <= pace.LONGEST and (live / pace.gap(live) <= 1250 or pace.gap(live) == pace.LONGEST)


@pytest.mark.parametrize("stop, ends", [((), 4), (("cd",), 3)])
def test_what_is_not_due_waits_for_the_next_piece_but_no_stop_string_does(stop, ends):
  letters = SimpleNamespace(decode=lambda tokens, skip_special_tokens: "".join(map(chr, tokens)))
  sequence = SimpleNamespace(tokens=[], logprobs=[], confidences=[], rollout=Rollout(0, 0, None, None, None))
  trace, pieces = Trace(SimpleNamespace(call=Call(None, 9, stop=stop)), 0, sequence, letters), []
  for i, part in enumerate(["a", "b", "c", "dx", "e"]):
    for kept in (sequence.tokens, sequence.logprobs, sequence.confidences):
      kept.append(np.array([ord(x) for x in part]))
    pieces.append(trace.read(ended=i == 4, due=i == 0))
    if pieces[-1] and pieces[-1].finish:
      break
  assert i == ends and pieces[1:-1] == [None] * (ends - 1)
  said = [(p.text, "".join(map(chr, p.tokens)), len(p.logprobs)) for p in (pieces[0], pieces[-1])]
  assert said == [("a", "a", 1), ("b", "bcd", 3) if stop else ("bcdxe", "bcdxe", 5)]


def test_calls_in_return_are_waited_for_half_a_segment_where_many_live(monkeypatch):
  now = [100.0]
  monkeypatch.setattr(pace, "time", SimpleNamespace(monotonic=lambda: now[0]))
  monkeypatch.setattr(Run, "look", lambda run: run.in_flight.pop(0))
  run = object.__new__(pace.PacedRun)
  run.flying, run.in_flight, run.began, run.step_seconds = collections.deque([8, 16]), ["segment"] * 2, 100.0, 0.0
  run.slot_to_request = [None] * 4 + ["trace"] * (pace.SOME + 1)
  now[0] = 100.4  # the first took 0.05 a step, so that the second takes 0.8
  run.look()
  assert run.spare == pytest.approx(0.4)
  now[0] = 100.6
  assert run.spare == pytest.approx(0.2)
  run.slot_to_request[-1] = None
  assert run.spare == 0
  now[0] = 200.0  # a compilation was in it
  run.look()
  assert run.step_seconds == pytest.approx(0.055) and run.spare == 0
