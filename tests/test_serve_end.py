"""The serving command from its start to its end: what it needs, what it says, and that no end loses a call without a word."""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

from helpers_serve import FOREVER, LONG, MODEL, ROOT, ask, begun, command, export
import pytest

from arrol_jax import assemble_service, config as configuration, serve
from arrol_jax.types import UserError


def ended(process, within):
  """(exit status, stdout, stderr) of a process that has to end in time."""
  out, err = process.communicate(timeout=within)
  assert "Traceback" not in err, err
  return process.returncode, out, err


@pytest.mark.slow
def test_a_drain_that_runs_out_says_what_it_cut():
  with command("--drain=1", "--name=mine", "--http-processes=2") as (process, port):
    assert ask(port, None, "/v1/models", "GET")[1]["data"][0]["id"] == "mine"
    streams = [begun(port) for _ in range(2)]
    got = []
    waiting = threading.Thread(target=lambda: got.append(ask(port, FOREVER | {"stream": False})))
    waiting.start()
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    time.sleep(0.4)  # new connections are answered meanwhile
    assert ask(port, None, "/health", "GET")[1]["status"] == "stopping" and ask(port, None, "/ready", "GET")[0] == 503
    assert ask(port, FOREVER)[0] == 503
    for connection, answer in streams:
      last = answer.read().decode().strip().split("\n\n")[-1]
      assert json.loads(last.removeprefix("data: "))["error"]["code"] == 503  # and no [DONE]
      connection.close()
    waiting.join()
    assert got[0][0] == 503 and "stopped" in got[0][1]["error"]["message"]
    status, out, _ = ended(process, 20)
    assert (status, out) == (1, "stopped: 3 calls under way were cut\n") and 0.9 < time.monotonic() - start < 10


@pytest.mark.slow
def test_a_second_signal_ends_it_at_once_and_half_a_body_holds_up_nothing():
  with command("--api-key=k") as (process, port):
    headers = {"Authorization": "Bearer k"}
    assert ask(port, None, "/v1/models", "GET")[0] == 401
    assert ask(port, None, "/v1/models", "GET", headers)[1]["data"][0]["id"] == "signs"  # the folder's
    assert ask(port, None, "/health", "GET", {"Host": "evil.example"})[0] == 403
    half = socket.create_connection(("127.0.0.1", port))
    half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer k\r\nContent-Length: 99\r\n\r\n{")
    head = socket.create_connection(("127.0.0.1", port))
    head.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: loc")
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps(FOREVER), headers)
    answer = connection.getresponse()
    assert answer.readline().startswith(b"data: ")
    process.send_signal(signal.SIGINT)
    half.settimeout(10)
    assert half.recv(1000).startswith(b"HTTP/1.1 503")  # it was not under way
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    start = time.monotonic()
    assert b"stopped" in answer.read()
    status, out, _ = ended(process, 20)
    assert (status, out) == (1, "stopped: 1 calls under way were cut\n") and time.monotonic() - start < 8
    for x in (half, head, connection):
      x.close()


@pytest.mark.slow
def test_half_a_body_and_sigterm_end_cleanly_and_a_port_is_taken_before_a_model_is_loaded():
  with command() as (process, port):
    start = time.monotonic()
    second = subprocess.run([sys.executable, "-m", "arrol_jax.serve", *LONG, f"--port={port}"], cwd=ROOT, capture_output=True,
                            text=True, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"})
    assert second.returncode == 2 and "cannot listen" in second.stderr and len(second.stderr.splitlines()) == 1
    assert "loaded" not in second.stderr and time.monotonic() - start < 30
    half = socket.create_connection(("127.0.0.1", port))
    half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n{")
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    start = time.monotonic()
    status, out, err = ended(process, 20)
    assert (status, out) == (0, "drained\n") and time.monotonic() - start < 5
    said = err.splitlines()
    assert said[0].startswith("loaded signs: 2 slots") and all("compiling" in line for line in said[1:]) and len(said) > 1
    half.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_loads_ends_it_in_one_line(number, monkeypatch, capfd):
  before, listener = signal.getsignal(number), serve._bind("127.0.0.1", 0)
  port = listener.getsockname()[1]
  monkeypatch.setattr(serve, "_bind", lambda *_: listener)
  monkeypatch.setattr(serve, "load", lambda *_: signal.raise_signal(number))
  monkeypatch.setattr(sys, "argv", ["prog", "--config=configs/quickstart.py"])
  with pytest.raises(SystemExit) as e:
    configuration.run(serve.main)
  assert e.value.code == 128 + number and signal.getsignal(number) == before
  assert capfd.readouterr() == ("", f"{number.name} while loading: nothing was served\n")
  serve._bind("127.0.0.1", port).close()  # no process is left that would hold it


def test_a_port_is_taken_as_soon_as_it_is_bound():
  first = serve._bind("127.0.0.1", 0)
  with first, pytest.raises(UserError, match="cannot listen"):
    serve._bind("127.0.0.1", first.getsockname()[1])


def test_a_body_that_does_not_come_gets_408(monkeypatch, tmp_path):
  from helpers_serve import serving

  from arrol_jax.serving import bodies
  monkeypatch.setattr(bodies, "SECONDS", 0.5)
  with serving(export(tmp_path)) as server, socket.create_connection(("127.0.0.1", server.port)) as half:
    half.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
    half.settimeout(10)
    said = b""
    while part := half.recv(1000):  # and the connection is closed
      said += part
    assert said.startswith(b"HTTP/1.1 408") and b"0.5 seconds" in said and server.web.bodies.held == 0


@pytest.mark.parametrize("path, name", [
  ("run/policy", "run"), ("models/qwen/model.gguf", "qwen"), ("models/qwen-q8.gguf", "qwen-q8"), ("hub/smollm", "smollm")])
def test_a_model_is_called_as_its_folder(tmp_path, path, name):
  there = tmp_path / path
  there.parent.mkdir(parents=True, exist_ok=True)
  there.write_text("") if path.endswith("gguf") else there.mkdir()
  assert assemble_service.model_name(str(there)) == name


def test_a_cpu_has_few_slots_where_none_are_asked_for_and_data_need_not_be_there():
  c, _ = configuration.parse(["prog", "--config=configs/gsm8k_qwen05b.py", MODEL])
  serve._check(c)
  assert not os.path.exists(c.data.train) and c.rollout.slots is None
  assemble_service.fit(c, steady=False)
  assert c.rollout.slots == assemble_service.CPU_SLOTS <= 32
  c.model.path = "nowhere"
  with pytest.raises(UserError, match="nowhere"):
    serve._check(c)


def test_a_hub_id_and_what_is_shipped_are_served_from_any_folder(tmp_path, monkeypatch):
  """As they are trained."""
  monkeypatch.chdir(tmp_path)
  c, _ = configuration.parse(["prog", "--config=quickstart"])
  serve._check(c)
  c.model.path = "Qwen/Qwen3-0.6B"
  serve._check(c)


@pytest.mark.parametrize("host, foreign", [("127.0.0.1", False), ("127.0.0.2", False), ("localhost", False), ("::1", False),
                                           ("0.0.0.0", True), ("::", True), ("10.0.0.1", True)])
def test_on_any_loopback_address_foreign_hosts_are_refused(host, foreign):
  access = serve._access(SimpleNamespace(host=host, allowed_hosts="", cors="", api_key=None), 60)
  assert (access.hosts == ("*",)) == foreign and (foreign or host in access.hosts)


def test_jetstreams_flags_are_told_without_it():
  done = subprocess.run([sys.executable, "-m", "arrol_jax.jetstream", "-h"], cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0 and "--samples" in done.stdout and not done.stderr


def test_flags_are_spelt_with_either_dash():
  assert serve._underscored(["p", "--api-key=a-b", "--keep-alive", "5", "--config.x=a-b", "--other-flag=1"]) == [
    "p", "--api_key=a-b", "--keep_alive", "5", "--config.x=a-b", "--other-flag=1"]
