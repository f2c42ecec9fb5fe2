"""The server: every caller gets the text that the model gives to that call alone; mistakes are told, and nothing is lost."""

import json
import socket
import threading
import time

from helpers_serve import PROMPT, QUEUE, ROWS, ask, events
import jax
import numpy as np
import pytest

from arrol_jax.engine.sampling import Sampling
from arrol_jax.engine.scheduler import Request, Run
from arrol_jax.models.files.weights import load_policy
from arrol_jax.pruning import voting
from arrol_jax.serving import bodies, openai_api, service, votes
from arrol_jax.serving.calls import Call, seed_of


@pytest.fixture(scope="module")
def alone(server):
  """alone(**body) -> the texts that Engine.run gives to that call, with temperature and top_p fixed for all rows."""
  def run(prompt=PROMPT, n=1, seed=0, max_tokens=48, temperature=1.0, top_p=1.0):
    s = server.service
    sampling = Sampling(temperature, s.sampling.stop_ids, "float32", top_p=None if top_p == 1.0 else top_p)
    tokens = np.array(s.tokenizer.encode(prompt), np.int32)
    with jax.set_mesh(s.engine.mesh):
      requests = [Request(seed_of(seed, i), 0, tokens, max_tokens) for i in range(n)]
      out = s.engine.run(requests, jax.random.key(0), sampling)
    return [s.tokenizer.decode(r.tokens, skip_special_tokens=True) for r in out]
  return run


# ---- what is said -------------------------------------------------------------------------------------------


def test_requests_come_and_go_and_the_others_never_notice(server, alone):
  """Two at first, more than there are rows later; some are cancelled while they wait, some while they speak."""
  s = server.service
  tokens = np.array(s.tokenizer.encode(PROMPT), np.int32)
  expected = alone(n=24)
  with jax.set_mesh(s.engine.mesh):
    run = Run(s.engine, jax.random.key(0), s.sampling)
    add = lambda i: run.add(Request(seed_of(0, i), i, tokens, 48))
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
    assert s.tokenizer.decode(done[seed_of(0, i)].tokens, skip_special_tokens=True) == expected[i]


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


@pytest.mark.parametrize("word", list(votes.RULES))
def test_a_vote_is_that_of_its_traces(server, alone, word):
  body = {"prompt": "9-7+8-6+5>", "n": 8, "seed": 2, "temperature": 1.5, "vote": word}
  status, answer = ask(server.port, body)
  assert status == 200, answer
  vote, traces = answer["vote"], answer["vote"]["traces"]
  body.pop("vote")
  assert [t["text"] for t in traces] == alone(**body)
  answers, scores = [t["answer"] for t in traces], [t["score"] for t in traces]
  assert len(set(answers)) > 1
  assert vote["answer"] == voting.vote(answers, None if word == "majority" else scores, votes.RULES[word])
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


# ---- mistakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change, word", [
  ({"prompt": None}, "prompt"), ({"prompt": ""}, "tokens"), ({"prompt": "1+" * 20 + ">"}, "41 tokens"),
  ({"prompt": 7}, "prompt"), ({"prompt": [1, 2, 99999]}, "token number"), ({"prompt": [1, -2]}, "token number"),
  ({"prompt": ["1>", 2]}, "one text"), ({"prompt": []}, "one text"), ({"prompt": "\ud800"}, "half a character"),
  ({"max_tokens": 0}, "max_tokens"),
  ({"max_tokens": -1}, "max_tokens"), ({"max_tokens": 49}, "1 to 48"), ({"max_tokens": 1.5}, "integer"),
  ({"max_tokens": True}, "integer"), ({"n": 0}, "n must"), ({"n": 10**30}, "n must"), ({"n": "2"}, "n must"),
  ({"temperature": -1}, "temperature"), ({"temperature": float("nan")}, "temperature"), ({"temperature": 1e300}, "temperature"),
  ({"temperature": 10**400}, "temperature"), ({"top_p": -10**400}, "top_p"),
  ({"temperature": "hot"}, "temperature"), ({"top_p": -0.1}, "top_p"), ({"top_p": 2}, "top_p"), ({"seed": -2**63 - 1}, "seed"),
  ({"seed": 2**64}, "seed"), ({"seed": 0.5}, "seed"), ({"stop": ["x"] * 9}, "stop"), ({"stop": [""]}, "stop"),
  ({"stop": 3}, "stop"), ({"stream": "yes"}, "stream"), ({"logprobs": 21}, "logprobs"), ({"echo": True, "stream": True}, "echo"),
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
  status, answer = ask(server.port, b" " * (bodies.MAX_BODY + 1))
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
  held = server.service.submit(Call(np.array([1, 2], np.int32), 48, n=most - 1), lambda piece: time.sleep(0.02))
  status, answer = ask(server.port, {"prompt": PROMPT, "n": 2})
  assert status == 429 and "full" in answer["error"]["message"], answer
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


# ---- the openai client --------------------------------------------------------------------------------------


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
