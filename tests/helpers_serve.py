"""A small model to serve, and requests to a server."""

import http.client
import json
from pathlib import Path

import jax
import jax.numpy as jnp

from arrol_jax.models.files.weights import load_policy
from arrol_jax.prune import Calibration
from arrol_jax.pruning.head import init_head

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
  return str(path)


def ask(port, body, path="/v1/completions", method="POST"):
  """(status, JSON) of a plain HTTP request; body: bytes, or what becomes JSON."""
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
  connection.request(method, path, body if body is None or isinstance(body, bytes) else json.dumps(body))
  answer = connection.getresponse()
  raw = answer.read()
  connection.close()
  return answer.status, json.loads(raw) if raw[:1] == b"{" else raw.decode()


def events(port, body, path="/v1/completions"):
  """A stream's events."""
  status, text = ask(port, body | {"stream": True}, path)
  assert status == 200 and text.endswith("\n\ndata: [DONE]\n\n")
  return [json.loads(line.removeprefix("data: ")) for line in text.split("\n\n")[:-2]]
