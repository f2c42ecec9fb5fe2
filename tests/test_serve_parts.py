"""What a server adds to plain decoding: pace, second passes over an answer, votes at a bounded price, who may call, its state."""

import contextlib
import dataclasses
import http.client
import json
import socket
import threading
import time
from types import SimpleNamespace

from helpers_serve import PROMPT, QUEUE, ROWS, ask, events, serving
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrol_jax.engine.sampling import Sampling, SamplingParams, _least_of, _least_where_asked, sample
from arrol_jax.engine.scheduler import Request
from arrol_jax.models import sharding, transformer
from arrol_jax.running import hosts
from arrol_jax.serving import pace, votes, warming
from arrol_jax.serving.calls import Call, Piece
from arrol_jax.serving.web import Access
from arrol_jax.types import Rollout


def logprobs_of(server, tokens):
  """Of each token but the first, and all tokens' at its place: one plain pass, f32[T-1], f32[T-1,V]."""
  e = server.service.engine
  from arrol_jax.serving.scoring import _forward
  with jax.set_mesh(e.mesh):
    hidden = _forward(e.config, e.params, jnp.array([tokens]))
    every = jax.nn.log_softmax(transformer.unembed(e.params, hidden)[0])
  return np.array([every[i, t] for i, t in enumerate(tokens[1:])]), np.asarray(every)


# ---- pace ---------------------------------------------------------------------------------------------------


def test_top_p_leaves_the_fewest_tokens_that_make_it_up():
  logits = jax.random.normal(jax.random.key(0), (40, 300)) * 3
  logits = logits.at[3, 7:90].set(1.5).at[4].set(-2.0).at[5, 1].set(60.0)  # ties, all alike, one that has it all
  top_p = jnp.linspace(1e-6, 0.999, 40)
  least = _least_of(logits, top_p[:, None])[:, 0]
  for row, p, limit in zip(np.asarray(logits, np.float64), np.asarray(top_p), np.asarray(least), strict=True):
    ranked = np.sort(row)[::-1]
    mass = np.exp(ranked - ranked[0]) / np.exp(ranked - ranked[0]).sum()
    assert limit == ranked[np.argmax(np.cumsum(mass) >= p - 1e-6)]


def test_only_those_who_ask_for_top_p_pay():
  logits = jax.random.normal(jax.random.key(0), (18, 300)) * 2
  top_p = jnp.ones(18).at[jnp.array([2, 9, 17])].set(jnp.array([0.3, 0.9, 0.01]))
  least = _least_where_asked(logits, top_p)[:, 0]
  for i in range(18):
    assert least[i] == (_least_of(logits[i:i + 1], float(top_p[i]))[0, 0] if top_p[i] < 1 else -jnp.inf)
  loop = [eqn for eqn in jax.make_jaxpr(_least_where_asked)(logits, top_p).eqns if eqn.primitive.name == "while"]
  body = loop[0].params["body_jaxpr"].jaxpr  # the vocabulary is only gone over for a few rows at a time
  assert {e.outvars[0].aval.shape for e in body.eqns if e.outvars[0].aval.size >= 300} == {(4, 300)}


def test_others_draw_the_same_beside_one_who_asks_for_top_p():
  logits, keys = jax.random.normal(jax.random.key(0), (6, 300)), jax.random.split(jax.random.key(1), 6)
  draw = lambda top_p: sample(Sampling(None, (), "float32"), keys, logits, SamplingParams(jnp.ones(6), top_p, jnp.zeros(6)))[0]
  alone, beside = draw(jnp.ones(6)), draw(jnp.ones(6).at[3].set(0.99))
  assert (alone == beside)[jnp.array([0, 1, 2, 4, 5])].all()


def test_few_rows_have_short_segments_that_end_at_decisions(server):
  s = server.service
  with jax.set_mesh(s.engine.mesh):
    run = pace.PacedRun(s.engine, s.sampling, detect=(16,))
    run.e.segment, sequences = 8, [SimpleNamespace(started=0, request=Request(0, 0, None, 1, judged=True)) for _ in range(40)]
    assert run.steps(sequences[:1]) == run.steps(sequences[:4]) == 2 and run.steps(sequences[:20]) == 8
    sequences[0].started, sequences[1].started = 10, 14
    assert run.steps(sequences[:2] + sequences[5:20]) == 2  # the second is two tokens before its decision
    sequences[1].started = 16
    assert run.steps(sequences[:2] + sequences[5:20]) == 2  # of six: 2 and 8 are there
    sequences[0].started = 15
    assert run.steps(sequences[:2] + sequences[5:20]) == 1


def test_on_a_gpu_each_size_of_a_segment_is_a_program_that_asks_nobody(server, monkeypatch):
  """And a run of them says what one program for any number of steps says."""
  s, texts = server.service, {}
  requests = [Request(i, i, np.arange(2, 6, dtype=np.int32), 21, temperature=1.0, top_p=[1.0, 0.5][i == 5]) for i in range(6)]
  with jax.set_mesh(s.engine.mesh):
    for platform in ("cpu", "gpu"):
      monkeypatch.setattr(pace.programs, "asks_nobody", lambda on=platform == "gpu": on)
      run = pace.PacedRun(s.engine, s.sampling)
      told = [run.told(n) for n in run.sizes]
      quiet = dataclasses.replace(s.sampling, top_p=1.0)  # without the branch
      assert told == [{"steps": n, "sampling": quiet} if platform == "gpu" else {"most": n} for n in run.sizes]
      assert list(run.told(1)) == list(run.told(run.sizes[-1], top_p=True)) == ["most"]  # a decision that comes sooner; a branch
      rollouts = [run.add(request).rollout for request in requests]
      while run.advance():
        pass
      texts[platform] = [r.tokens.tolist() for r in rollouts]
  assert texts["cpu"] == texts["gpu"] and {len(x) for x in texts["gpu"]}


@pytest.mark.parametrize("devices", [1, 2])
def test_after_the_warm_up_nothing_compiles_however_calls_come_and_go(server, devices):
  s, compiling, mesh = server.service, hosts.Compiling(), sharding.make_mesh(fsdp=devices)
  engine = dataclasses.replace(s.engine, rows=16, row_buckets=4, length_buckets=1, prefill_rows=4, mesh=mesh,
                               params=jax.device_put(s.engine.params, sharding.replicated(mesh)))
  with jax.set_mesh(engine.mesh):
    make = lambda: pace.PacedRun(engine, s.sampling)
    warming.warm_up(make, None, lambda text: None)
    assert compiling.seconds() > 0
    run, seen = make(), []
    for i, (count, tokens) in enumerate([(1, 6), (16, 9), (1, 12), (5, 3), (1, 3), (3, 8)]):
      for j in range(count):  # from one number of rows to any other, and back
        run.add(Request(j, 20 * i + j, np.arange(2, 6, dtype=np.int32), tokens, ignore_stop=True))
      while run.advance():
        seen.append(len(run.slot_to_request))
  assert {2, 4, 8, 16} == set(seen) and (2, 16) in zip(seen, seen[1:], strict=False)
  assert compiling.seconds() == 0


def test_prompts_are_padded_to_what_they_need():
  assert pace.widths(256) == [32, 64, 128, 256] and pace.widths(16) == [16] and pace.widths(100) == [16, 32, 64, 100]


def test_a_lone_stream_speaks_after_two_steps_and_then_steadily(server):
  parts = events(server.port, {"prompt": PROMPT, "temperature": 0, "logprobs": 0, "ignore_eos": True, "max_tokens": 40})
  sizes = [len(p["choices"][0]["logprobs"]["tokens"]) for p in parts]
  assert sum(sizes) == 40 and sizes[0] <= 2 and max(sizes) <= 4  # two segments may be told at once


def test_prompts_of_all_lengths_at_once_are_not_mixed_up(exported):
  """Widths 16, 32 and 64: each call's text is what it gets alone."""
  with serving(exported, "--config.rollout.max_prompt=64") as wide:
    bodies = [{"prompt": ("1+2-" * 20)[:n - 1] + ">", "seed": n} for n in (3, 60, 14, 30, 2, 33, 64, 17)]
    alone = [ask(wide.port, body)[1]["choices"][0]["text"] for body in bodies]
    together = [None] * len(bodies)
    def one(i):
      together[i] = ask(wide.port, bodies[i])[1]["choices"][0]["text"]
    threads = [threading.Thread(target=one, args=(i,)) for i in range(len(bodies))]
    for t in threads:
      t.start()
    for t in threads:
      t.join()
    assert together == alone


def test_in_steady_mode_company_changes_nothing_in_bfloat16(exported):
  """16 seeded calls alone and together: the very text and log-probs. Two and a half times as many as there are rows."""
  with serving(exported, "--config.model.dtype=bfloat16", "--config.rollout.row_buckets=4", "--config.rollout.length_buckets=2",
               steady=True) as server:
    assert server.service.run.counts == [ROWS] and len(server.service.run.lengths) == 1
    bodies = [{"prompt": f"{i % 7 + 1}+{i % 5}-3>", "seed": i, "temperature": 1.3, "logprobs": 0} for i in range(16)]
    said = lambda i: ask(server.port, bodies[i])[1]["choices"][0]
    alone = [said(i) for i in range(16)]
    together = [None] * 16
    def one(i):
      together[i] = said(i)
    for some in (range(0, 12), range(4, 16)):
      threads = [threading.Thread(target=one, args=(i,)) for i in some]
      for t in threads:
        t.start()
      for t in threads:
        t.join()
    assert together == alone


# ---- what may be asked --------------------------------------------------------------------------------------


def test_ignore_eos_goes_on_to_the_limit(server):
  status, answer = ask(server.port, {"prompt": PROMPT, "temperature": 0, "ignore_eos": True, "max_tokens": 48})
  assert status == 200 and answer["usage"]["completion_tokens"] == 48 and answer["choices"][0]["finish_reason"] == "length"
  _, plain = ask(server.port, {"prompt": PROMPT, "temperature": 0, "max_tokens": 48})
  assert plain["choices"][0]["finish_reason"] == "stop" and plain["usage"]["completion_tokens"] < 48
  assert answer["choices"][0]["text"].startswith(plain["choices"][0]["text"])


def test_continuous_usage_counts_up(server):
  options = {"include_usage": True, "continuous_usage_stats": True}
  parts = events(server.port, {"prompt": PROMPT, "max_tokens": 20, "ignore_eos": True, "stream_options": options})
  counts = [p["usage"]["completion_tokens"] for p in parts]
  assert counts == sorted(counts) and counts[-1] == 20 and len(set(counts)) > 3
  plain = events(server.port, {"prompt": PROMPT, "max_tokens": 20, "stream_options": {"include_usage": True}})
  assert all("usage" not in p for p in plain[:-1])


def test_a_list_of_prompts_is_answered_one_by_one(server):
  prompts = [PROMPT, "1+2>", "9-4+4>"]
  status, answer = ask(server.port, {"prompt": prompts, "n": 2, "seed": 5})
  assert status == 200 and [c["index"] for c in answer["choices"]] == list(range(6))
  each = [ask(server.port, {"prompt": p, "n": 2, "seed": 5})[1] for p in prompts]
  assert [c["text"] for c in answer["choices"]] == [c["text"] for one in each for c in one["choices"]]
  assert answer["usage"]["total_tokens"] == sum(one["usage"]["total_tokens"] for one in each)
  assert ask(server.port, {"prompt": prompts * 3, "n": 2})[0] == 400


def test_echo_gives_the_log_probs_of_the_prompt(server):
  """As lm-eval asks for a log-likelihood, with the tokens themselves."""
  tokens = server.service.tokenizer.encode("1+2-3>=0;")
  expected, every = logprobs_of(server, tokens)
  for most in (0, 1):
    status, answer = ask(server.port, {"prompt": [tokens], "max_tokens": most, "echo": True, "logprobs": 1, "temperature": 0})
    choice, said = answer["choices"][0], answer["choices"][0]["logprobs"]
    assert status == 200 and choice["text"].startswith("1+2-3>=0;") and answer["usage"]["completion_tokens"] == most
    assert len(said["tokens"]) == len(tokens) + most and said["token_logprobs"][0] is None and said["top_logprobs"][0] is None
    np.testing.assert_allclose(said["token_logprobs"][1:len(tokens)], expected, atol=1e-4)
    for i, top in enumerate(said["top_logprobs"][1:len(tokens)]):
      (text, p), = top.items()
      assert text == server.service.tokenizer.decode([int(every[i].argmax())]) and abs(p - every[i].max()) < 1e-4
    assert said["text_offset"][:3] == [0, 1, 2]


def test_alternatives_hold_the_chosen_token_of_greedy_decoding(server):
  body = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12, "logprobs": 3}
  _, answer = ask(server.port, body)
  _, plain = ask(server.port, body | {"logprobs": 0})
  said = answer["choices"][0]["logprobs"]
  assert said["tokens"] == plain["choices"][0]["logprobs"]["tokens"] and plain["choices"][0]["logprobs"]["top_logprobs"] is None
  np.testing.assert_allclose(said["token_logprobs"], plain["choices"][0]["logprobs"]["token_logprobs"], atol=1e-4)
  for token, p, top in zip(said["tokens"], said["token_logprobs"], said["top_logprobs"], strict=True):
    assert len(top) == 3 and max(top, key=top.get) == token and top[token] == p
  chat = {"messages": [{"role": "user", "content": PROMPT}], "temperature": 0, "max_tokens": 12, "logprobs": True}
  _, answer = ask(server.port, chat | {"top_logprobs": 2}, "/v1/chat/completions")
  content = answer["choices"][0]["logprobs"]["content"]
  assert [c["top_logprobs"][0]["token"] for c in content] == said["tokens"] and all(len(c["top_logprobs"]) == 2 for c in content)


# ---- votes --------------------------------------------------------------------------------------------------


def test_a_trace_cut_by_a_stop_string_is_scored_at_its_last_token(server):
  """With max_tokens so that the engine ends where the stop string does, the score must be the same."""
  base = {"prompt": PROMPT, "n": 8, "seed": 3, "temperature": 1.2, "vote": "quality"}
  _, cut = ask(server.port, base | {"stop": ";"})
  assert any(t["finish_reason"] == "stop" and t["tokens"] % 2 for t in cut["vote"]["traces"])  # within a segment of two steps
  _, whole = ask(server.port, base)
  for i, trace in enumerate(cut["vote"]["traces"]):
    _, same = ask(server.port, base | {"max_tokens": trace["tokens"]})
    assert abs(trace["score"] - same["vote"]["traces"][i]["score"]) < 1e-3
    assert trace["posterior"] is None or trace["tokens"] >= 16  # there was no decision before the cut
  assert any(abs(a["score"] - b["score"]) > 0.01 for a, b in zip(cut["vote"]["traces"], whole["vote"]["traces"], strict=True))


def pieces(count):
  return [Piece(i, "", [1], [-1.0], "stop", Rollout(0, 0, None, None, None, final=float(i))) for i in range(count)]


def test_each_pair_is_asked_once_and_a_vote_has_a_deadline():
  texts = [f"\\boxed{{a_{{{i % 10}}}}}" for i in range(64)]
  asked = []
  def slow(a, b, until):
    asked.append((a, b))
    time.sleep(0.02)
    return None if time.monotonic() > until else False
  vote = votes.tally("majority", texts, pieces(64), None, 8, slow)
  assert len(asked) == len(set(asked)) == 45 and vote.open_pairs == 0 and vote.answer == "a_{0}"
  start = time.monotonic()
  distinct = [f"\\boxed{{\\sqrt{{x+{i}}}}}" for i in range(64)]
  sameness = votes.Sameness()
  vote = votes.tally("majority", distinct, pieces(64), None, 8, sameness.ask, start + 0.5)
  sameness.close()
  assert time.monotonic() - start < 2 and vote.open_pairs > 1000 and vote.chosen == 0


def test_a_slow_vote_holds_up_nobody(server, monkeypatch):
  gate, asked = threading.Event(), threading.Event()
  monkeypatch.setattr(server.web.sameness, "ask", lambda a, b, until: asked.set() or gate.wait(5) and False)
  body = {"prompt": "9-7+8-6+5>", "n": (ROWS + QUEUE) // 2, "seed": 2, "temperature": 1.5, "vote": "majority"}
  got = []
  voters = [threading.Thread(target=lambda: got.append(ask(server.port, body)[0])) for _ in range(2)]
  for t in voters:
    t.start()
    assert asked.wait(30)  # its rows are free again
  time.sleep(0.5)
  start = time.monotonic()
  assert ask(server.port, body)[0] == 429 and server.web.passes.taken == ROWS + QUEUE
  assert ask(server.port, {"prompt": PROMPT, "max_tokens": 4})[0] == 200 and time.monotonic() - start < 2 and not got
  gate.set()
  for t in voters:
    t.join()
  assert got == [200, 200] and not server.web.passes.taken


# ---- who may call, and how the server is --------------------------------------------------------------------


def test_foreign_hosts_are_refused_where_hosts_are_listed(server, access):
  access(Access(hosts=("127.0.0.1", "localhost", "::1")))
  for host, status in [("evil.example", 403), ("127.0.0.1.evil.example", 403), ("localhost:9", 200), ("[::1]:80", 200),
                       ("LOCALHOST", 200), ("127.0.0.1", 200), ("localhost.:80", 200), ("localhost.evil.example", 403),
                       ("evil.example:127.0.0.1", 403), ("0.0.0.0", 403), ("[::1].evil.example", 403), ("[::2]", 403)]:
    assert ask(server.port, None, "/health", "GET", {"Host": host})[0] == status
    assert ask(server.port, {"prompt": PROMPT, "max_tokens": 1}, headers={"Host": host})[0] == status


def told(port: int, *parts: bytes) -> bytes:
  """The beginning of what the server says to a request that comes in these parts."""
  with socket.create_connection(("127.0.0.1", port), timeout=30) as connection:
    for part in parts:
      with contextlib.suppress(OSError):  # it may have had enough
        connection.sendall(part)
      time.sleep(0.02)
    return connection.recv(4096)


def test_a_head_has_a_longest_size_and_a_body_behind_it_does_not_count(server):
  start = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
  long = [b"x%d: %s\r\n" % (i, b"y" * 1000) for i in range(80)]
  assert told(server.port, start, *long).startswith(b"HTTP/1.1 400")
  assert b"longer than 65536" in told(server.port, start + b"".join(long))
  body = json.dumps({"prompt": PROMPT, "max_tokens": 1, "user": "u" * 200_000}).encode()
  head = start + b"Content-Length: %d\r\nConnection: close\r\n\r\n" % len(body)
  for parts in [(head + body,), (head[:-1], head[-1:] + body), (head, body), (head[:-4], head[-4:] + body[:9], body[9:])]:
    assert told(server.port, *parts).startswith(b"HTTP/1.1 200")
  assert told(server.port, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400")


def test_a_probe_without_a_host_header_is_answered(server, access):
  access(Access(hosts=("127.0.0.1",)))
  with socket.create_connection(("127.0.0.1", server.port)) as probe:
    probe.sendall(b"GET /health HTTP/1.0\r\n\r\n")
    assert probe.recv(100).startswith(b"HTTP/1.1 200")


def test_the_key_is_wanted_everywhere_but_for_health(server, access):
  access(Access(key="s3cret"))
  for sent, status in [(None, 401), ("Bearer s3cre", 401), ("s3cret", 401), ("Basic s3cret", 401), ("Bearer \u00e9", 401),
                       ("Bearer s3cret", 200), ("bearer  s3cret", 200)]:
    headers = {} if sent is None else {"Authorization": sent}
    for path in ("/v1/models", "/metrics"):
      assert ask(server.port, None, path, "GET", headers)[0] == status
  assert ask(server.port, None, "/health", "GET")[0] == 200
  assert "Bearer KEY" in ask(server.port, {"prompt": PROMPT})[1]["error"]["message"]


def test_pages_of_listed_origins_may_call(exported):
  with serving(exported, access=Access(origins=("https://a.example",), key="k")) as server:
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    wanted = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,content-type"}
    for origin, allowed in [("https://a.example", "https://a.example"), ("https://b.example", None)]:
      connection.request("OPTIONS", "/v1/completions", headers={"Origin": origin} | wanted)
      answer = connection.getresponse()
      answer.read()
      assert answer.headers.get("Access-Control-Allow-Origin") == allowed and answer.status == (200 if allowed else 400)
    connection.close()


def test_health_knows_that_the_engine_stands_still(server, access):
  access(Access(still=0.3))
  gate = threading.Event()
  held = server.service.submit(Call(np.array([1, 2], np.int32), 8), lambda piece: gate.wait(10))
  time.sleep(0.8)
  status, health = ask(server.port, None, "/health", "GET")
  assert status == 503 and health["status"] == "standing still" and health["still_seconds"] > 0.3
  assert ask(server.port, None, "/ready", "GET")[0] == 503
  gate.set()
  server.service.cancel(held)
  time.sleep(0.5)
  assert ask(server.port, None, "/health", "GET")[0] == 200 and ask(server.port, None, "/ready", "GET")[0] == 200


def test_histograms_in_both_formats(server):
  value = lambda text, name: float(next(line for line in text.splitlines() if line.startswith(name + " ")).split()[1])
  names = ("arrol_first_token_seconds_count", "arrol_token_seconds_count", "arrol_queue_seconds_count")
  _, before = ask(server.port, None, "/metrics", "GET")
  assert ask(server.port, {"prompt": PROMPT, "n": 3, "ignore_eos": True})[0] == 200
  _, after = ask(server.port, None, "/metrics", "GET", {"Accept": "application/openmetrics-text; version=1.0.0"})
  assert [value(after, name) - value(before, name) for name in names] == [1, 3, 3] and after.endswith("# EOF\n")


def test_a_dozen_long_prompts_hold_up_no_small_call(server):
  """3.9 MB each, at once: all are refused, and a small call is answered meanwhile."""
  long, got = json.dumps({"prompt": "1+" * 1_950_000}).encode(), []
  threads = [threading.Thread(target=lambda: got.append(ask(server.port, long)[0])) for _ in range(12)]
  for t in threads:
    t.start()
  start = time.monotonic()
  assert ask(server.port, {"prompt": PROMPT, "max_tokens": 4})[0] == 200 and time.monotonic() - start < 5
  for t in threads:
    t.join()
  assert got == [400] * 12 and server.web.bodies.held == 0
  assert QUEUE == 4
