"""Several processes speak HTTP for one engine: a client cannot tell, and no end of one of them loses the others' calls."""

import http.client
import json
import os
from pathlib import Path
import shutil
import signal
import socket
import subprocess
import threading
import time
from types import SimpleNamespace

from helpers_serve import FOREVER, PROMPT, ask, begun, until
from helpers_split import QUEUE, ROWS, split
import pytest

from arrol_jax.serving import front
from arrol_jax.serving.board import Board
from arrol_jax.serving.calls import Piece, Totals
from arrol_jax.types import UserError

ENDLESS = FOREVER | {"max_tokens": 10**6}


def at(server, number, body):
  """A connection whose call has come to that process: the others stand still until then."""
  others = [side.process for i, side in enumerate(server.front.sides) if i != number]
  for process in others:
    process.send_signal(signal.SIGSTOP)
  try:
    before, connection = sent(server)[number], http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(body))
    assert until(lambda: sent(server)[number] > before, 60)
  finally:
    for process in others:
      process.send_signal(signal.SIGCONT)
  return connection


def streams_at_both(server):
  """A stream at each of two processes: [(connection, answer)]."""
  connections = [at(server, number, ENDLESS) for number in range(2)]
  answers = [connection.getresponse() for connection in connections]
  assert all(answer.readline().startswith(b"data: ") for answer in answers)
  return list(zip(connections, answers, strict=True))


def sent(server):
  """Traces that each process has handed in."""
  return [Board(number=number, fd=server.front.board.fd)._mine[0] for number in range(len(server.front.sides))]


def nearly(server):
  """What runs has nothing more to say after its next tokens."""
  for sequence in filter(None, server.service.run.slot_to_request):
    sequence.request = sequence.request._replace(max_tokens=1)


def last_event(answer):
  return answer.read().decode().strip().split("\n\n")[-1].removeprefix("data: ")


@pytest.fixture(scope="module")
def server():
  with split(count=2) as out:
    assert until(lambda: all(side.serving for side in out.front.sides))
    yield out
    out.front.stop()
    assert out.ended() == (0, ["drained"])


def test_both_take_calls_and_count_them_together(server):
  for number in (0, 1, 1):
    connection = at(server, number, {"prompt": PROMPT, "max_tokens": 4, "n": 2})
    assert connection.getresponse().status == 200
    connection.close()
  assert sent(server) == [2, 4] and ask(server.port, {"prompt": 7})[0] == 400
  calls = 3
  for _ in range(8):  # whichever is asked
    lines = dict(line.rsplit(" ", 1) for line in ask(server.port, None, "/metrics", "GET")[1].splitlines() if line[0] != "#")
    found = {name: float(value) for name, value in lines.items()}
    assert found['arrol_requests_total{status="200"}'] == found["arrol_request_seconds_count"] == calls
    assert found['arrol_requests_total{status="400"}'] == 1
    assert found["arrol_queue_seconds_count"] == found["arrol_traces_total"] == 2 * calls and found["arrol_traces_running"] == 0


def test_room_is_found_for_the_calls_of_all(server):
  streams = streams_at_both(server)
  more = begun(server.port, ENDLESS | {"n": ROWS - 2})
  waiting = [threading.Thread(target=ask, args=(server.port, {"prompt": PROMPT, "max_tokens": 4})) for _ in range(QUEUE)]
  for thread in waiting:
    thread.start()
  health = lambda: ask(server.port, None, "/health", "GET")[1]
  assert until(lambda: (health()["running"], health()["waiting"]) == (ROWS, QUEUE))
  for _ in range(8):
    status, answer = ask(server.port, {"prompt": PROMPT, "max_tokens": 4})
    assert status == 429 and f"{ROWS + QUEUE} is the most" in answer["error"]["message"]
    assert health().items() >= {"status": "ok", "running": ROWS, "waiting": QUEUE, "scoring": 0}.items()
  for connection, answer in (*streams, more):
    answer.close()
    connection.close()
  for thread in waiting:
    thread.join(20)
  assert until(lambda: health()["running"] == health()["waiting"] == 0)


def test_a_caller_who_stays_within_the_room_is_never_refused(server):
  """Whichever process gets the next call: what has ended is known to all before anybody hears of it."""
  for _ in range(40):
    assert ask(server.port, {"prompt": PROMPT, "max_tokens": 2, "n": ROWS + QUEUE})[0] == 200


def test_one_that_hangs_holds_up_no_end(monkeypatch, capfd):
  monkeypatch.setattr(front, "GRACE", 0.2)
  with split(count=2) as server:
    streams = streams_at_both(server)
    server.front.sides[0].process.send_signal(signal.SIGSTOP)
    server.front.stop()
    server.front.stop()
    status, said = server.ended()
    assert status == 1 and said == ["stopped: 2 calls under way were cut"] and "killed (signal 9)" in capfd.readouterr().err
    for connection, _ in streams:
      connection.close()


def test_one_that_hangs_is_named_and_killed_and_the_others_answer_meanwhile(monkeypatch, capfd):
  monkeypatch.setattr(front, "SILENT", (0.5, 8.0))
  with split(count=2) as server:
    streams = streams_at_both(server)
    stopped = server.front.sides[0]
    stopped.process.send_signal(signal.SIGSTOP)
    begin = time.monotonic()
    line_is_full = lambda: stopped.line.behind is not None
    while not line_is_full() and time.monotonic() < begin + 20:  # what it is told of others' calls fills its line
      stopped.line.post("said", [(10**9, Piece(0, "", [1] * 4000, []))], [], server.service.standing)
    assert line_is_full()
    for _ in range(3):  # and the engine goes on
      assert ask(server.port, {"prompt": PROMPT, "max_tokens": 4})[0] == 200
    assert until(lambda: stopped.gone)  # what it had is counted
    nearly(server)
    assert last_event(streams[1][1]) == "[DONE]"
    for connection, _ in streams:
      connection.close()
    status, said = server.ended()
    err = capfd.readouterr().err
    assert status == 1 and said == ["stopped: 1 calls under way were cut"]
    pid = f"a process of the HTTP side ({stopped.process.pid}) has not answered for"
    assert err.index(f"warning: {pid} ") < err.index(f"error: {pid} 8 s; it is killed") < err.index("killed (signal 9)")


def test_one_that_is_killed_while_it_drains_is_told_and_its_calls_are_counted(capfd):
  with split(count=2) as server:
    (lost, _), (connection, answer) = streams_at_both(server)
    server.front.stop()
    assert until(lambda: ask(server.port, {"prompt": PROMPT, "max_tokens": 4})[0] == 503)
    server.front.sides[0].process.kill()
    assert until(lambda: server.service.running == 1)
    nearly(server)
    assert last_event(answer) == "[DONE]"
    for x in (lost, connection):
      x.close()
    assert server.ended() == (1, ["stopped: 1 calls under way were cut"])
  assert capfd.readouterr().err == "error: the HTTP side was killed (signal 9)\n"


def test_one_that_hangs_before_it_serves_is_killed_too(monkeypatch, capfd):
  monkeypatch.setattr(front, "STARTING", (0.2, 1.0))
  real = subprocess.Popen

  def popen(*args, **more):
    process = real(*args, **more)
    process.send_signal(signal.SIGSTOP)
    return process

  monkeypatch.setattr(front.subprocess, "Popen", popen)
  with split(count=2) as server:
    status, said = server.ended()
  err = capfd.readouterr().err
  assert status == 1 and not said and err.count("warning: a process of the HTTP side") == 2 and err.count("it is killed") == 2


def test_one_that_is_killed_while_the_model_loads_ends_the_command(monkeypatch, capfd):
  told, real = [], os.kill
  monkeypatch.setattr(front.os, "kill", lambda *args: told.append(args) if args[0] == os.getpid() else real(*args))
  with front.Front(socket.create_server(("127.0.0.1", 0)), 2) as both:
    both.sides[1].process.kill()
    assert until(lambda: told == [(os.getpid(), signal.SIGTERM)])
    assert both.run(SimpleNamespace(totals=Totals()), SimpleNamespace(model="mine"), None, 1.0, 5) == 1
  assert capfd.readouterr().err == "error: the HTTP side was killed (signal 9)\n"


def test_they_count_elsewhere_where_memory_is_full(monkeypatch, tmp_path):
  full, free = [], shutil.disk_usage("/")._replace(free=1 << 30)
  monkeypatch.setattr(front.shutil, "disk_usage", lambda path: free._replace(free=0) if path in full else free)
  monkeypatch.setattr(front.tempfile, "tempdir", str(tmp_path))
  full.append("/dev/shm")
  with front._folder() as folder:
    assert Path(folder).parent == tmp_path
  full.append(str(tmp_path))
  with pytest.raises(UserError, match=r"no 16 MiB left.*TMPDIR.*--http_processes=1"):
    front._folder()


def test_where_not_all_can_be_started_none_is_left(monkeypatch):
  started, real = [], subprocess.Popen

  def popen(*args, **more):
    if started:
      raise OSError(24, "Too many open files")
    started.append(real(*args, **more))
    return started[0]

  monkeypatch.setattr(front.subprocess, "Popen", popen)
  with pytest.raises(UserError, match="http_processes=3: 1 could be started .Too many open files.; give it fewer"):
    front.Front(socket.create_server(("127.0.0.1", 0)), 3)
  assert started[0].returncode == -signal.SIGKILL


def test_counting_goes_on_where_its_folder_is_removed():
  with split(count=2) as server:
    assert until(lambda: all(side.serving for side in server.front.sides))
    shutil.rmtree(server.front.counted.name)
    assert ask(server.port, {"prompt": PROMPT, "max_tokens": 4})[0] == 200 and ask(server.port, {"prompt": 7})[0] == 400
    assert all(ask(server.port, None, "/metrics", "GET")[0] == 200 for _ in range(4))
    server.front.stop()
    assert server.ended() == (0, ["drained"])


def test_one_that_has_drained_leaves_and_the_other_ends_its_call():
  with split(count=2) as server:
    left, (connection, answer) = streams_at_both(server)
    for x in reversed(left):  # that process has nothing to do any more
      x.close()
    assert until(lambda: server.service.running == 1)
    server.front.stop()
    assert until(lambda: server.front.sides[0].process.poll() is not None)
    assert server.front.sides[0].process.returncode == 0 and server.front.sides[1].process.poll() is None
    assert ask(server.port, {"prompt": PROMPT, "max_tokens": 4})[0] == 503 and server.service.running == 1
    answer.readline()
    assert answer.readline().startswith(b"data: ")  # it goes on
    nearly(server)
    assert last_event(answer) == "[DONE]"
    connection.close()
    assert server.ended() == (0, ["drained"])


def test_a_second_signal_cuts_the_calls_of_all(capfd):
  with split(count=2) as server:
    streams = streams_at_both(server)
    server.front.stop()
    server.front.stop()
    for connection, answer in streams:
      assert json.loads(last_event(answer))["error"]["code"] == 503
      connection.close()
    assert server.ended() == (1, ["stopped: 2 calls under way were cut"]) and "Traceback" not in capfd.readouterr().err


def test_where_one_is_killed_the_other_answers_its_calls_and_all_ends(capfd):
  with split(count=2) as server:
    (gone, _), (connection, answer) = streams_at_both(server)
    server.front.sides[0].process.kill()
    assert until(lambda: server.service.running == 1)  # nobody reads what it says
    nearly(server)
    assert last_event(answer) == "[DONE]"
    gone.close()
    connection.close()
    assert server.ended() == (1, ["stopped: 1 calls under way were cut"])
    assert capfd.readouterr().err == "error: the HTTP side was killed (signal 9)\n" and not server.service.running


def test_an_engine_that_breaks_is_told_to_the_calls_of_all(capsys):
  with split(count=2) as server:
    streams = streams_at_both(server)
    server.service.run.trouble = "breaks"
    for connection, answer in streams:
      assert json.loads(last_event(answer))["error"]["code"] == 500
      connection.close()
    assert server.ended() == (1, []) and "Traceback" in capsys.readouterr().err


def test_what_others_wrote_is_read_and_only_the_own_row_is_written():
  first = Board(2)
  second = Board(number=1, fd=os.dup(first.fd))
  first.add("sent", 3)
  second.add("sent", 2)
  second.add("sent", -1)
  first.put("woke", 5.5)
  second.put("woke", 4.5)
  assert first.total("sent") == second.total("sent") == 4 and second.latest("woke") == 5.5
  assert first.total("cut") == 0 and Board().total("sent") == 0
  for board in (first, second):
    board.close()


@pytest.mark.parametrize("cores, processes", [(1, 1), (2, 1), (7, 1), (8, 2), (16, 4), (64, 4)])
def test_small_machines_have_one(monkeypatch, cores, processes):
  monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(cores), raising=False)
  assert front.processes_here() == processes
