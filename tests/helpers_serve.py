"""A small model to serve, and requests to a server."""

import contextlib
import http.client
import json
import os
from pathlib import Path
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import uvicorn

from arrol_jax import config as configuration, serve
from arrol_jax.models.files.weights import load_policy
from arrol_jax.prune import Calibration
from arrol_jax.pruning.head import init_head
from arrol_jax.serving import lifecycle, prefixes
from arrol_jax.serving.web import ANYONE, Access, make_app

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "5+5-7-9+1>"
ROWS, QUEUE = 8, 4
OPTIONS = ["--config=configs/quickstart.py", f"--config.rollout.slots={ROWS}", "--config.rollout.row_buckets=1",
           "--config.rollout.length_buckets=1"]


def export(folder) -> str:
  """The shipped model as a run exports it, with a chat template, a head whose scores differ, and a table in which low
  scores went with failure."""
  policy = load_policy("experiments/arithmetic/signs")
  head = init_head(policy.config.width, 8, jax.random.key(1))
  policy.head = head | {"w2": jax.random.normal(jax.random.key(2), head["w2"].shape)}
  policy.calibration = jax.tree.map(lambda x: x[None], Calibration(jnp.arange(128.0), jnp.arange(128.0)[::-1]))
  policy.tokenizer.chat_template = ("{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('users only') }}"
                                    "{% endif %}{{ m.content }}{% endfor %}")
  path = folder / "run" / "policy"
  policy.save(path)
  return with_positions(path)


def with_positions(path, count: int = 32768) -> str:
  """The folder, its model said to have so many positions: tests ask for texts longer than it was trained on."""
  file = Path(path) / "config.json"
  file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": count}))
  return str(path)


@contextlib.contextmanager
def serving(path: str, *options: str, steady: bool = False, access: Access = ANYONE, block: int = 0):
  """A server in this process: its port, its service and its limits. block: tokens of the blocks of prompts that it keeps."""
  c, _ = configuration.parse(["prog", *OPTIONS, f"--config.model.path={path}", *options])
  with mock.patch.object(prefixes, "BLOCK", block):
    service, limits = serve.load(c, None, QUEUE, steady, kept_mib=1 if block else 0)
  service.warm_up()
  ready, listener = threading.Event(), socket.create_server(("127.0.0.1", 0))
  app = make_app(service, limits, started=ready.set, access=access)
  web = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on", http=lifecycle.Patient))
  thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]})
  thread.start()
  assert ready.wait(60)
  try:
    yield SimpleNamespace(port=listener.getsockname()[1], service=service, limits=limits, web=app.state.web)
  finally:
    web.should_exit = True
    thread.join(60)
  assert not thread.is_alive() and service.running == service.waiting == 0


def ask(port, body, path="/v1/completions", method="POST", headers=None):
  """(status, JSON) of a plain HTTP request; body: bytes, or what becomes JSON."""
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
  connection.request(method, path, body if body is None or isinstance(body, bytes) else json.dumps(body), headers or {})
  answer = connection.getresponse()
  raw = answer.read()
  connection.close()
  return answer.status, json.loads(raw) if raw[:1] == b"{" else raw.decode()


def until(condition, seconds=20.0):
  end = time.monotonic() + seconds
  while time.monotonic() < end:
    if condition():
      return True
    time.sleep(0.01)
  return False


def events(port, body, path="/v1/completions"):
  """A stream's events."""
  status, text = ask(port, body | {"stream": True}, path)
  assert status == 200 and text.endswith("\n\ndata: [DONE]\n\n")
  return [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]


FOLDER = tempfile.TemporaryDirectory()
MODEL = "--config.model.path=" + with_positions(shutil.copytree(ROOT / "experiments/arithmetic/signs", f"{FOLDER.name}/signs"))
# A config whose training data are not here, and answers that take their time.
LONG = ["--config=configs/gsm8k_qwen05b.py", MODEL, "--config.model.dtype=float32", "--config.rollout.max_prompt=16",
        "--config.rollout.max_new=20000", "--config.rollout.slots=2", "--config.rollout.row_buckets=1",
        "--config.rollout.length_buckets=1"]
FOREVER = {"prompt": PROMPT, "ignore_eos": True, "stream": True}


@contextlib.contextmanager
def command(*options):
  """A server in a process of its own: (process, port)."""
  process = subprocess.Popen([sys.executable, "-m", "arrol_jax.serve", *LONG, "--port=0", *options], cwd=ROOT, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"})
  try:
    line = process.stdout.readline()
    assert line.startswith("serving "), line + process.stderr.read()
    yield process, int(line.rsplit(":", 1)[1])
  finally:
    process.kill()
    process.communicate()


def begun(port, body=FOREVER):
  """A connection whose stream has begun, and its answer."""
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
  connection.request("POST", "/v1/completions", json.dumps(body))
  answer = connection.getresponse()
  assert answer.status == 200 and answer.readline().startswith(b"data: ")
  return connection, answer
