"""The server: every caller gets the text that the model gives to that call alone; mistakes are told, and nothing is lost."""

import http.client
import json
import os
from pathlib import Path
import signal
import socket
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import uvicorn

from arrol_jax import assemble, config as configuration, serve
from arrol_jax.engine.sampling import Sampling, SamplingParams, sample
from arrol_jax.engine.scheduler import Request, Run
from arrol_jax.models.files.weights import load_policy
from arrol_jax.prune import Calibration
from arrol_jax.pruning import voting
from arrol_jax.pruning.head import init_head
from arrol_jax.running.checkpoint import Checkpoints
from arrol_jax.serving import openai_api, service
from arrol_jax.serving.service import Call, Piece
from arrol_jax.types import Rollout

ROOT = Path(__file__).resolve().parents[1]
PROMPT = "5+5-7-9+1>"
ROWS, QUEUE = 8, 4
OPTIONS = ["--config=configs/quickstart.py", f"--config.rollout.slots={ROWS}", "--config.rollout.row_buckets=1",
           "--config.rollout.length_buckets=1"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
  """The shipped model as a run exports it, with a chat template, a head whose scores differ, and a table in which low
  scores went with failure."""
  policy = load_policy("experiments/arithmetic/signs")
  head = init_head(policy.config.width, 8, jax.random.key(1))
  policy.head = head | {"w2": jax.random.normal(jax.random.key(2), head["w2"].shape)}
  policy.calibration = jax.tree.map(lambda x: x[None], Calibration(jnp.arange(128.0), jnp.arange(128.0)[::-1]))
  policy.tokenizer.chat_template = ("{% for m in messages %}{% if m.role != 'user' %}{{ raise_exception('users only') }}"
                                    "{% endif %}{{ m.content }}{% endfor %}")
  path = tmp_path_factory.mktemp("served") / "run" / "policy"
  policy.save(path)
  return str(path)


@pytest.fixture(scope="module")
def server(exported):
  """A server in this process: its port, its service and its limits."""
  c, _ = configuration.parse(["prog", *OPTIONS, f"--config.model.path={exported}"])
  service, limits = serve.load(c, None, QUEUE)
  service.warm_up()
  ready, listener = threading.Event(), socket.create_server(("127.0.0.1", 0))
  web = uvicorn.Server(uvicorn.Config(serve.make_app(service, limits, started=ready.set), log_level="warning", lifespan="on"))
  thread = threading.Thread(target=web.run, kwargs={"sockets": [listener]})
  thread.start()
  assert ready.wait(60)
  yield SimpleNamespace(port=listener.getsockname()[1], service=service, limits=limits)
  web.should_exit = True
  thread.join(60)
  assert not thread.is_alive() and service.running == service.waiting == 0


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


@pytest.fixture(scope="module")
def alone(server):
  """alone(**body) -> the texts that Engine.run gives to that call, with temperature and top_p fixed for all rows."""
  def run(prompt=PROMPT, n=1, seed=0, max_tokens=48, temperature=1.0, top_p=1.0):
    s = server.service
    sampling = Sampling(temperature, s.sampling.stop_ids, "float32", top_p=None if top_p == 1.0 else top_p)
    tokens = np.array(s.tokenizer.encode(prompt), np.int32)
    with jax.set_mesh(s.engine.mesh):
      requests = [Request(service.seed_of(seed, i), 0, tokens, max_tokens) for i in range(n)]
      out = s.engine.run(requests, jax.random.key(0), sampling)
    return [s.tokenizer.decode(r.tokens, skip_special_tokens=True) for r in out]
  return run


# ---- what is said -------------------------------------------------------------------------------------------


def test_rows_that_choose_draw_as_if_all_had_chosen_so():
  logits = jax.random.normal(jax.random.key(0), (6, 300)) * 2
  keys = jax.random.split(jax.random.key(1), 6)
  temperature, top_p = jnp.array([0.0, 0.5, 1.0, 1.0, 1.7, 0.5]), jnp.array([1.0, 1.0, 1.0, 0.3, 0.9, 0.2])
  mixed = sample(Sampling(None, (), "float32", confidence=5), keys, logits, SamplingParams(temperature, top_p, jnp.zeros(6)))
  for i in range(6):
    p = None if top_p[i] == 1 else float(top_p[i])
    own = sample(Sampling(float(temperature[i]), (), "float32", top_p=p, confidence=5), keys, logits)
    for a, b in zip(mixed, own, strict=True):
      np.testing.assert_allclose(a[i], b[i], rtol=1e-6)


def test_requests_come_and_go_and_the_others_never_notice(server, alone):
  """Two at first, more than there are rows later; some are cancelled while they wait, some while they speak."""
  s = server.service
  tokens = np.array(s.tokenizer.encode(PROMPT), np.int32)
  expected = alone(n=24)
  with jax.set_mesh(s.engine.mesh):
    run = Run(s.engine, jax.random.key(0), s.sampling)
    add = lambda i: run.add(Request(service.seed_of(0, i), i, tokens, 48))
    sequences = [add(0), add(1)]
    assert run.advance() and run.advance()
    sequences += [add(i) for i in range(2, 24)]
    run.cancel([sequences[23]])  # waiting
    run.advance()
    run.advance()
    assert sequences[1].count and sequences[3].count and not sequences[1].rollout.tokens.size
    run.cancel([sequences[1], sequences[3]])  # speaking
    while run.advance():
      pass
    done = {r.request: r for r in run.take_finished()}
  assert len(done) == 21
  for i in set(range(24)) - {1, 3, 23}:
    assert s.tokenizer.decode(done[service.seed_of(0, i)].tokens, skip_special_tokens=True) == expected[i]


@pytest.mark.parametrize("body", [
  {"temperature": 0}, {"seed": 3}, {"seed": 3, "n": 4}, {"seed": 5, "temperature": 1.6, "top_p": 0.8, "n": 3},
  {"seed": 1, "max_tokens": 7}])
def test_a_call_gets_the_text_of_the_model_alone(server, alone, body):
  status, answer = ask(server.port, {"prompt": PROMPT, "model": "run"} | body)
  assert status == 200, answer
  assert [c["text"] for c in answer["choices"]] == alone(**body)
  assert [c["index"] for c in answer["choices"]] == list(range(body.get("n", 1)))
  cut = body.get("max_tokens") == 7
  assert {c["finish_reason"] for c in answer["choices"]} <= {"length" if cut else "stop", "length"}
  assert answer["usage"]["prompt_tokens"] == len(PROMPT)
  assert not cut or answer["usage"]["completion_tokens"] == 7


def test_calls_at_once_get_each_its_own(server, alone):
  bodies = [{"prompt": f"{a}+{b}-3>", "seed": i, "temperature": t} for i, (a, b, t) in enumerate(
    (a, b, t) for a in (1, 4) for b in (2, 8) for t in (0.0, 1.3))]
  got = [None] * len(bodies)
  def one(i):
    got[i] = ask(server.port, bodies[i])
  threads = [threading.Thread(target=one, args=(i,)) for i in range(len(bodies))]
  for t in threads:
    t.start()
  for t in threads:
    t.join()
  for body, (status, answer) in zip(bodies, got, strict=True):
    assert status == 200 and answer["choices"][0]["text"] == alone(**body)[0]


def test_streams_say_the_same(server):
  body = {"prompt": PROMPT, "seed": 4, "n": 2, "logprobs": 0}
  _, whole = ask(server.port, body)
  parts = events(server.port, body | {"stream_options": {"include_usage": True}})
  assert len(parts) > 6 and parts[-1]["choices"] == [] and parts[-1]["usage"] == whole["usage"]
  for i, choice in enumerate(whole["choices"]):
    mine = [p["choices"][0] for p in parts[:-1] if p["choices"][0]["index"] == i]
    assert "".join(p["text"] for p in mine) == choice["text"]
    assert [p["finish_reason"] for p in mine] == [None] * (len(mine) - 1) + [choice["finish_reason"]]
    for key in ("tokens", "token_logprobs", "text_offset"):
      assert sum((p["logprobs"][key] for p in mine), []) == choice["logprobs"][key]
    assert "".join(choice["logprobs"]["tokens"]).startswith(choice["text"]) and max(choice["logprobs"]["token_logprobs"]) <= 0


@pytest.mark.parametrize("stop", ["A", ["0;1", "zz"], ["=1", "5=10;"]])
def test_stop_strings_end_a_text_and_are_not_in_it(server, alone, stop):
  full = alone(temperature=0.0)[0]
  status, answer = ask(server.port, {"prompt": PROMPT, "temperature": 0, "stop": stop})
  cut = min((full.find(s) + len(s), full.find(s)) for s in ([stop] if isinstance(stop, str) else stop) if s in full)[1]
  assert status == 200 and answer["choices"][0]["text"] == full[:cut] and answer["choices"][0]["finish_reason"] == "stop"
  parts = events(server.port, {"prompt": PROMPT, "temperature": 0, "stop": stop})
  assert "".join(p["choices"][0]["text"] for p in parts) == full[:cut]


def test_half_characters_and_halves_of_stop_strings_wait():
  class Bytes:
    def decode(self, tokens, skip_special_tokens):
      return bytes(tokens).decode("utf-8", errors="replace")

  said = "aé#b##c€".encode()
  for stop, wanted in [((), "aé#b##c€"), (("##",), "aé#b")]:
    sequence = SimpleNamespace(tokens=[], logprobs=[], confidences=[], rollout=Rollout(0, 0, None, None, None))
    trace = service._Trace(SimpleNamespace(call=Call(None, 99, stop=stop)), 0, sequence)
    texts, piece = [], None
    for i, byte in enumerate(said):
      for kept in (sequence.tokens, sequence.logprobs, sequence.confidences):
        kept.append(np.array([byte]))
      piece = trace.read(Bytes(), ended=i == len(said) - 1)
      texts.append(piece.text)
      assert "\ufffd" not in piece.text
      if piece.finish:
        break
    assert "".join(texts) == wanted and piece.finish == ("stop" if stop else "length")
    assert bytes(trace.tokens).decode() == (wanted + "##" if stop else wanted)


def test_chat(server, alone):
  body = {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "logprobs": True, "max_completion_tokens": 40}
  status, answer = ask(server.port, body, "/v1/chat/completions")
  choice = answer["choices"][0]
  assert status == 200 and answer["object"] == "chat.completion" and choice["message"] == {
    "role": "assistant", "content": alone(temperature=0.0)[0]}
  assert len(choice["logprobs"]["content"]) == answer["usage"]["completion_tokens"]
  parts = events(server.port, body, "/v1/chat/completions")
  assert parts[0]["choices"][0]["delta"]["role"] == "assistant" and "role" not in parts[1]["choices"][0]["delta"]
  assert "".join(p["choices"][0]["delta"]["content"] for p in parts) == choice["message"]["content"]


# ---- votes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("word", list(service.VOTES))
def test_a_vote_is_that_of_its_traces(server, alone, word):
  body = {"prompt": "9-7+8-6+5>", "n": 8, "seed": 2, "temperature": 1.5, "vote": word}
  status, answer = ask(server.port, body)
  assert status == 200, answer
  vote, traces = answer["vote"], answer["vote"]["traces"]
  body.pop("vote")
  assert [t["text"] for t in traces] == alone(**body)
  answers, scores = [t["answer"] for t in traces], [t["score"] for t in traces]
  assert len(set(answers)) > 1
  assert vote["answer"] == voting.vote(answers, None if word == "majority" else scores, service.VOTES[word])
  assert len(answer["choices"]) == 1 and answer["choices"][0]["text"] == traces[vote["trace"]]["text"]
  assert traces[vote["trace"]]["answer"] == vote["answer"]
  mine = sum(t["weight"] for t in traces if t["answer"] == vote["answer"])
  assert abs(vote["share"] - mine / sum(t["weight"] for t in traces)) < 1e-6
  if word == "quality":  # the paper's: rank mapped to [0, 1]
    voters = [t for t in traces if t["answer"] is not None]
    assert min(t["weight"] for t in voters) == 0 and max(t["weight"] for t in voters) == 1
    assert max(voters, key=lambda t: t["score"])["weight"] == 1


def test_hopeless_traces_are_stopped_and_have_no_vote(server):
  body = {"prompt": PROMPT, "n": 8, "seed": 2, "temperature": 1.2, "vote": "majority"}
  _, free = ask(server.port, body)
  reached = [t["posterior"] for t in free["vote"]["traces"]]  # at the detection length, 16
  assert all(0 < q < 1 for q in reached) and free["usage"]["completion_tokens"] > 8 * 20
  least = float(np.median(reached))
  _, some = ask(server.port, body | {"stop_below": least})
  stopped = [t["finish_reason"] == "hopeless" for t in some["vote"]["traces"]]
  assert stopped == [q < least for q in reached]
  for a, b in zip(some["vote"]["traces"], free["vote"]["traces"], strict=True):
    ended = a["finish_reason"] == "hopeless"
    assert (a["tokens"], a["answer"], a["weight"]) == (16, None, 0) if ended else a["text"] == b["text"]
  _, best = ask(server.port, body | {"stop_below": 1.0})  # nobody is that good: the best goes on
  assert [t["posterior"] for t in best["vote"]["traces"] if t["finish_reason"] != "hopeless"] == [max(reached)]
  assert server.service.totals.hopeless == sum(stopped) + 7


def test_a_vote_without_answers_gives_the_best_trace_that_was_not_stopped():
  pieces = [Piece(i, "", [1], [-1.0], finish, Rollout(0, 0, None, None, None, final=score))
            for i, (finish, score) in enumerate([("length", 0.1), ("length", 0.5), ("hopeless", 2.0)])]
  vote = service.tally("quality", ["no", "no", r"\boxed{3}"], pieces, None, 8)
  assert vote.answer is None and vote.chosen == 1 and vote.weights == [0, 0, 0]
  ended = [piece._replace(finish="stop") for piece in pieces]
  vote = service.tally("majority", [r"\boxed{1/2}", r"\boxed{3}", r"\boxed{0.5}"], ended, None, 8)
  assert vote.answer == "1/2" and vote.chosen == 0 and abs(vote.weight - 2 / 3) < 1e-9


# ---- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, word", [
  ({"prompt": None}, "prompt"), ({"prompt": ""}, "tokens"), ({"prompt": "1+" * 20 + ">"}, "41 tokens"),
  ({"prompt": 7}, "prompt"), ({"prompt": [1, 2, 99999]}, "token number"), ({"prompt": [1, -2]}, "token number"),
  ({"prompt": ["1>", "2>"]}, "one text"), ({"prompt": "\ud800"}, "half a character"), ({"max_tokens": 0}, "max_tokens"),
  ({"max_tokens": -1}, "max_tokens"), ({"max_tokens": 49}, "1 to 48"), ({"max_tokens": 1.5}, "integer"),
  ({"max_tokens": True}, "integer"), ({"n": 0}, "n must"), ({"n": 10**30}, "n must"), ({"n": "2"}, "n must"),
  ({"temperature": -1}, "temperature"), ({"temperature": float("nan")}, "temperature"), ({"temperature": 1e300}, "temperature"),
  ({"temperature": 10**400}, "temperature"), ({"top_p": -10**400}, "top_p"),
  ({"temperature": "hot"}, "temperature"), ({"top_p": 0}, "top_p"), ({"top_p": 2}, "top_p"), ({"seed": -1}, "seed"),
  ({"seed": 2**64}, "seed"), ({"seed": 0.5}, "seed"), ({"stop": ["x"] * 9}, "stop"), ({"stop": [""]}, "stop"),
  ({"stop": 3}, "stop"), ({"stream": "yes"}, "stream"), ({"logprobs": 5}, "chosen"), ({"echo": True}, "echo"),
  ({"tools": [{}]}, "tools"), ({"frequency_penalty": 1}, "frequency_penalty"), ({"model": "gpt-4"}, "'run'"),
  ({"temprature": 1}, "'temprature'"), ({"vote": "best", "n": 2}, "vote"), ({"vote": "quality"}, "at least 2"),
  ({"vote": [1], "n": 2}, "vote"), ({"vote": "quality", "n": 2, "stream": True}, "stream"), ({"stop_below": 1.5}, "stop_below"),
  ({"stream_options": 3}, "stream_options"), (b"", "JSON"), (b"\xff\x00\x80", "UTF-8"),
  (b"{", "JSON"), (b"[" * 100_000, "JSON"), (b"[1]", "object"), (b"9" * 5000, "JSON"),
])
def test_mistakes_get_one_clear_sentence(server, change, word):
  status, answer = ask(server.port, change if isinstance(change, bytes) else {"prompt": PROMPT} | change)
  assert status == (404 if "gpt" in str(change) else 400) and set(answer) == {"error"}
  message = answer["error"]["message"]
  assert word in message and "\n" not in message and len(message) < 200 and ". " not in message


@pytest.mark.parametrize("messages, word", [
  (None, "messages"), ([], "at least one"), ("hi", "list"), ([3], "message 0"), ([{"role": "user"}], "content"),
  ([{"role": "user", "content": [{"type": "image_url"}]}], "text"), ([{"role": "system", "content": "x"}], "users only")])
def test_mistakes_in_a_chat(server, messages, word):
  status, answer = ask(server.port, {"messages": messages}, "/v1/chat/completions")
  assert status == 400 and word in answer["error"]["message"]


def test_other_paths_and_long_bodies(server):
  assert ask(server.port, None, "/v1/models", "GET")[1]["data"][0]["id"] == "run"
  assert ask(server.port, None, "/v1/models/run", "GET")[0] == 200 and ask(server.port, None, "/v1/models/x", "GET")[0] == 404
  assert ask(server.port, None, "/v2", "GET")[0] == 404 and ask(server.port, None, "/v1/completions", "GET")[0] == 405
  status, answer = ask(server.port, b" " * (serve.MAX_BODY + 1))
  assert status == 413 and "longer" in answer["error"]["message"]


def test_a_model_without_a_head_or_chat_template_says_so(server):
  import dataclasses
  plain = dataclasses.replace(server.limits, scored=False, calibrated=False, tokenizer=load_policy(
    "experiments/arithmetic/signs").tokenizer)
  for body, chat, word in [({"prompt": "1>", "n": 2, "vote": "quality"}, False, "no quality head"),
                           ({"prompt": "1>", "stop_below": 0.5}, False, "no quality head"),
                           ({"messages": [{"role": "user", "content": "1>"}]}, True, "no chat template")]:
    with pytest.raises(openai_api.Refused, match=word):
      openai_api.read(json.dumps(body).encode(), chat, plain)


# ---- load ---------------------------------------------------------------------------------------------------


def settled(service):
  for _ in range(300):
    if not service.running and not service.waiting:
      return True
    time.sleep(0.02)
  return False


def test_a_full_server_says_so_and_recovers(server):
  assert settled(server.service)
  most = ROWS + QUEUE
  held = server.service.submit(Call(np.array([1, 2], np.int32), 48, n=most - 1), lambda piece: None)
  status, answer = ask(server.port, {"prompt": PROMPT, "n": 2})
  assert status == 429 and "full" in answer["error"]["message"]
  server.service.cancel(held)
  assert settled(server.service) and ask(server.port, {"prompt": PROMPT, "n": most})[0] == 200
  assert ask(server.port, {"prompt": PROMPT, "n": most + 1})[0] == 400  # it never will fit


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_rows(server, stream):
  assert settled(server.service)
  before, waiting = server.service.totals.cancelled, server.service.submit(
    Call(np.array([1, 2], np.int32), 48, n=ROWS), lambda piece: time.sleep(0.05))  # slow: the call behind it has to wait
  connection = socket.create_connection(("127.0.0.1", server.port))
  body = json.dumps({"prompt": PROMPT, "n": 3, "stream": stream})
  connection.sendall(f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
  time.sleep(0.3)
  connection.close()
  assert settled(server.service) and server.service.totals.cancelled > before
  server.service.cancel(waiting)
  assert ask(server.port, {"prompt": PROMPT})[0] == 200


def test_metrics_and_health(server):
  status, health = ask(server.port, None, "/health", "GET")
  assert status == 200 and health["status"] == "ok"
  _, before = ask(server.port, None, "/metrics", "GET")
  _, answer = ask(server.port, {"prompt": PROMPT})
  _, after = ask(server.port, None, "/metrics", "GET")
  value = lambda text, name: float(next(line for line in text.splitlines() if line.startswith(name + " ")).split()[1])
  assert value(after, "arrol_tokens_total") - value(before, "arrol_tokens_total") == answer["usage"]["completion_tokens"]
  assert value(after, "arrol_request_seconds_count") - value(before, "arrol_request_seconds_count") == 1
  assert 'arrol_requests_total{status="400"}' in after


def test_an_engine_that_breaks_tells_every_caller(server):
  s = server.service
  broken = service.Service(s.engine, s.sampling, None, 4)  # without a tokenizer: the first token breaks it
  got = []
  broken.submit(Call(np.array([1], np.int32), 8), got.append)
  with pytest.raises(AttributeError):
    broken.serve()
  assert isinstance(got[0], AttributeError)
  with pytest.raises(RuntimeError, match="broke"):
    broken.submit(Call(np.array([1], np.int32), 8), got.append)


# ---- the openai client, and the command ---------------------------------------------------------------------


def test_the_openai_client(server, alone):
  openai = pytest.importorskip("openai")
  with openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0) as client:
    assert [m.id for m in client.models.list()] == ["run"]
    messages = [{"role": "user", "content": PROMPT}]
    plain = client.chat.completions.create(model="run", messages=messages, seed=6, logprobs=True)
    assert plain.choices[0].message.content == alone(seed=6)[0] and plain.usage.completion_tokens > 20
    assert plain.choices[0].logprobs.content[0].logprob <= 0
    stream = client.chat.completions.create(model="run", messages=messages, seed=6, stream=True)
    assert "".join(part.choices[0].delta.content for part in stream) == alone(seed=6)[0]
    four = client.completions.create(model="run", prompt=PROMPT, seed=6, n=4, temperature=1.3)
    assert [c.text for c in four.choices] == alone(seed=6, n=4, temperature=1.3)
    voted = client.chat.completions.create(model="run", messages=messages, n=4, seed=6, temperature=1.3,
                                           extra_body={"vote": "quality", "stop_below": 0.01})
    assert len(voted.choices) == 1 and len(voted.vote["traces"]) == 4
    assert voted.choices[0].message.content == voted.vote["traces"][voted.vote["trace"]]["text"]
    with pytest.raises(openai.BadRequestError, match="max_tokens"):
      client.completions.create(model="run", prompt=PROMPT, max_tokens=-1)


def test_the_command_serves_an_exported_policy_and_drains(exported):
  """SIGTERM while a call streams: the call ends as it should, no new one is taken, and the exit status is 0."""
  environment = os.environ | {"XLA_FLAGS": ""}
  process = subprocess.Popen([sys.executable, "-m", "arrol_jax.serve", *OPTIONS, f"--config.model.path={exported}", "--port=0"],
                             cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
  line = process.stdout.readline()
  assert line.startswith("serving run at http://127.0.0.1:"), line + process.stderr.read()
  port = int(line.rsplit(":", 1)[1])
  connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
  connection.request("POST", "/v1/completions", json.dumps({"prompt": PROMPT, "n": ROWS + 4, "stream": True, "temperature": 0}))
  answer = connection.getresponse()
  first = answer.readline()
  process.send_signal(signal.SIGTERM)
  rest = answer.read().decode()
  connection.close()
  out, err = process.communicate(timeout=60)
  assert first.startswith(b"data: ") and rest.count('"finish_reason": "stop"') == ROWS + 4 and rest.endswith("[DONE]\n\n")
  assert process.returncode == 0 and out == "drained\n" and "Traceback" not in err
  with pytest.raises(ConnectionRefusedError):
    ask(port, {"prompt": PROMPT})


@pytest.mark.parametrize("options, word", [(["--port=x"], "--port"), (["--port=99999"], "--port"), (["--queue=-1"], "--queue"),
                                           (["--workdir=nowhere"], "no checkpoint"), (["--host=999.1.1.1"], "cannot listen")])
def test_mistakes_on_the_command_line_end_in_one_line(monkeypatch, capsys, options, word):
  monkeypatch.setattr(sys, "argv", ["prog", *OPTIONS, "--port=0", *options])
  with pytest.raises(SystemExit) as e:
    configuration.run(serve.main)
  err = capsys.readouterr().err
  assert e.value.code == 2 and word in err and len(err.splitlines()) == 1


def test_limits_follow_the_config(exported):
  c, _ = configuration.parse(["prog", *OPTIONS, f"--config.model.path={exported}", "--config.eval.max_new=40"])
  _, limits = serve.load(c, None, 3)
  assert (limits.max_prompt, limits.max_new, limits.max_traces, limits.vocab) == (16, 40, ROWS + 3, 19)
  assert limits.scored and limits.calibrated and limits.pattern == c.reward.pattern
  assert assemble.sampling(c, SimpleNamespace(eos_ids=(18,)), None).temperature is None


def test_a_checkpoint_is_served_with_its_head(tmp_path):
  c, _ = configuration.parse(["prog", *OPTIONS])
  mesh, workdir = assemble.make_mesh(c), str(tmp_path / "trained")
  state = assemble.init_state(c, assemble.load(c, mesh), assemble.optimizer(c), mesh, keep_params=False)
  state.params["policy"]["final_norm"] = jnp.zeros_like(state.params["policy"]["final_norm"])
  checkpoints = Checkpoints(workdir, 1)
  checkpoints.save(3, state)
  checkpoints.close()
  service, limits = serve.load(c, workdir, 3)
  assert limits.model == "trained" and limits.scored and limits.calibrated
  assert not service.engine.params["final_norm"].any()
