"""Prefixes kept between calls: nobody's text changes, what is there is not computed again, and the memory stays what it was."""

from concurrent.futures import ThreadPoolExecutor
import dataclasses
import json

from helpers_serve import ask, events, serving
import jax
import numpy as np
import pytest

from arrol_jax.engine import programs
from arrol_jax.engine.scheduler import Request
from arrol_jax.serving import openai_api, prefixes
from arrol_jax.serving.calls import seed_of
from arrol_jax.serving.pace import PacedRun
from arrol_jax.serving.prefixes import PrefixCache, names

SYSTEM = "1+2-3+4-5+6-7+8-"  # 16 tokens
OPTIONS = ["--config.rollout.max_prompt=32", "--config.rollout.row_buckets=2"]
CALLS = [{"prompt": SYSTEM + f"{i % 9 + 1}+{i % 7}>", "seed": i, "n": i % 3 + 1, "temperature": (0, 1, 1.4)[i % 3]}
         for i in range(6)] + [{"prompt": SYSTEM[:2 * i + 1] + ">", "seed": i} for i in range(2, 8, 3)] + [
           {"prompt": SYSTEM + "8-3>", "seed": 2, "n": 4, "temperature": 1.2, "stop_below": 0.5}]


def texts(port, body):
  status, answer = ask(port, body)
  assert status == 200, answer
  return [c["text"] for c in answer["choices"]]


def metric(port, name):
  text = ask(port, None, "/metrics", "GET")[1]
  return float(next(line for line in text.splitlines() if line.startswith(name + " ")).split()[1])


@pytest.fixture(scope="module")
def cached(exported):
  with serving(exported, *OPTIONS, block=8) as server:
    yield server


@pytest.fixture(scope="module")
def plain(cached):
  """What each of CALLS gets alone from the same engine without the cache."""
  s = cached.service
  def alone(body):
    call = openai_api.read(json.dumps(body).encode(), False, cached.limits).calls[0]
    with jax.set_mesh(s.engine.mesh):
      run = PacedRun(s.engine, s.sampling, s.detect)
      for i in range(call.n):
        run.add(Request(seed_of(call.seed, i), 0, call.tokens, call.max_tokens, call.temperature, keep=call.stop_below,
                        judged=call.stop_below > 0))
      while run.advance(s.decide):
        pass
    done = {r.request: r for r in run.take_finished()}
    return [s.tokenizer.decode(done[seed_of(call.seed, i)].tokens, skip_special_tokens=True) for i in range(call.n)]
  return [alone(body) for body in CALLS]


def test_names_stand_for_all_that_was_before():
  tokens = np.arange(20, dtype=np.int32)
  other = tokens.copy()
  other[2] = 9
  first, second = names(tokens.tobytes(), 4), names(other.tobytes(), 4)
  assert len(first) == 5 and not set(first) & set(second) and names(tokens[:11].tobytes(), 4) == first[:2]


def test_texts_are_those_without_it(cached, plain):
  """One by one, again with everything there, all at once, and streamed."""
  cached.service.kept.clear()
  for _ in range(2):
    assert [texts(cached.port, body) for body in CALLS] == plain
  cached.service.kept.clear()
  with ThreadPoolExecutor(len(CALLS)) as pool:
    together = list(pool.map(lambda body: ask(cached.port, body), CALLS))
  assert [[c["text"] for c in a["choices"]] for s, a in together if s == 200] == [
    t for t, (s, _) in zip(plain, together, strict=True) if s == 200]
  assert sum(s == 200 for s, _ in together) >= 5  # the others found the server full
  parts = events(cached.port, CALLS[1])
  for i, text in enumerate(plain[1]):
    assert "".join(p["choices"][0]["text"] for p in parts if p["choices"][0]["index"] == i) == text


def test_what_is_there_is_not_prefilled_again(cached, monkeypatch):
  """A first call of 20 tokens finds nothing, the next with 16 of them in common two blocks of 8; n does not count."""
  cached.service.kept.clear()
  widths, extend = [], prefixes._extend
  def counting(c, params, columns, tokens, *rest, **more):
    widths.append(tokens.shape[1])
    return extend(c, params, columns, tokens, *rest, **more)
  monkeypatch.setattr(prefixes, "_extend", counting)
  ask(cached.port, {"prompt": SYSTEM + "4+5>", "n": 3})
  assert metric(cached.port, "arrol_prefix_cache_queries_total") == 20
  assert metric(cached.port, "arrol_prefix_cache_hits_total") == 0
  ask(cached.port, {"prompt": SYSTEM + "8-1+2>"})
  assert metric(cached.port, "arrol_prefix_cache_hits_total") == 16 and widths == [32, 16]
  ask(cached.port, {"prompt": SYSTEM})  # all of it is there, and its last block computed nevertheless
  assert metric(cached.port, "arrol_prefix_cache_hits_total") == 24 and widths == [32, 16, 16]
  assert metric(cached.port, "arrol_prefix_cache_hit_rate") == pytest.approx(24 / 58)


def test_the_next_turn_finds_the_last_one(cached):
  cached.service.kept.clear()
  first, found = SYSTEM[:9] + ">", lambda: cached.service.kept.found
  second = first + texts(cached.port, {"prompt": first, "temperature": 0, "max_tokens": 8})[0] + "1+2>"
  texts(cached.port, {"prompt": second, "max_tokens": 1})
  assert found() == 8
  texts(cached.port, {"prompt": second + "3-1>", "max_tokens": 1})
  assert found() == 8 + len(second) // 8 * 8


def test_a_small_cache_lets_go_of_what_was_used_least_and_stays_right(cached, plain, monkeypatch):
  kept = cached.service.kept
  kept.clear()
  monkeypatch.setattr(kept, "size", 3)  # a prompt of 20 tokens has two
  for body, text in list(zip(CALLS, plain, strict=True)) * 2:
    assert texts(cached.port, body) == text
    assert len(kept.numbers) <= 3 and sorted(kept.numbers.values()) == list(range(len(kept.numbers)))
  kept.clear()
  for prompt in (SYSTEM + "1+1>", "9-8+7-6+5>", "2-8+7-6+5>"):  # the third's one block puts out the last of the first
    texts(cached.port, {"prompt": prompt, "max_tokens": 1})
  assert kept.missing(np.array(cached.service.tokenizer.encode(SYSTEM + "2+2>"), np.int32)) == 12


def test_one_call_of_more_blocks_than_there_is_room_for(cached, plain, monkeypatch):
  cached.service.kept.clear()
  monkeypatch.setattr(cached.service.kept, "size", 2)
  with ThreadPoolExecutor(4) as pool:
    assert list(pool.map(lambda body: texts(cached.port, body), CALLS[:4])) == plain[:4]
  assert len(cached.service.kept.numbers) == 2


def test_in_steady_mode_nothing_depends_on_what_is_there(exported):
  """In bfloat16, bit for bit the same text and log-probs with nothing kept, everything, and in a crowd."""
  with serving(exported, *OPTIONS, "--config.model.dtype=bfloat16", "--config.rollout.row_buckets=1", steady=True,
               block=8) as server:
    def said(body):
      choices = ask(server.port, body | {"logprobs": 0})[1]["choices"]
      return [(c["text"], c["logprobs"]["token_logprobs"]) for c in choices]
    bodies, cold = CALLS[:5], []
    for body in bodies:
      server.service.kept.clear()
      cold.append(said(body))
    assert [said(body) for body in bodies] == cold and [said(body) for body in bodies] == cold
    assert server.service.kept.found > 5 * 16
    with ThreadPoolExecutor(5) as pool:
      assert list(pool.map(said, bodies)) == cold


@pytest.mark.parametrize("cache, width, tolerance", [(None, 16, 1e-5), (None, 8, 1e-5), ("int8", 16, 0.1)])
def test_columns_and_state_are_those_of_a_whole_prefill(cached, cache, width, tolerance):
  """With half of a prompt there, the rest at once or block by block; of int8 columns the second half sees the rounding."""
  e, tokens = cached.service.engine, np.array(cached.service.tokenizer.encode(SYSTEM + "1+2-3+4-5>"), np.int32)
  sampling = dataclasses.replace(cached.service.sampling, taps=cached.service.sampling.taps._replace(prompt=2), cache=cache)
  with jax.set_mesh(e.mesh):
    kept = PrefixCache(e.config, sampling.cache_dtype, 1, 8)
    kept.prefill(e, sampling, [tokens[:18]], 1, 32)
    assert kept.missing(tokens) == len(tokens) - 16
    got = kept.prefill(e, sampling, [tokens], 1, width)
    whole = programs.prefill(e.config, e.params, tokens[None], np.array([len(tokens)], np.int32), sampling=sampling)
  def real(x, scale):
    x = np.asarray(x, np.float32)[:, 0, :len(tokens)]
    return x if scale is None else x * np.asarray(scale)[:, 0, :len(tokens), None]
  for a, b in zip(got.cache, whole.cache, strict=True):
    np.testing.assert_allclose(real(a.k, a.k_scale), real(b.k, b.k_scale), atol=tolerance)
    np.testing.assert_allclose(real(a.v, a.v_scale), real(b.v, b.v_scale), atol=tolerance)
  np.testing.assert_allclose(got.state[0], whole.state[0], atol=tolerance)
  assert got.last_token[0] == tokens[-1] and got.length[0] == len(tokens)


def test_too_little_memory_is_said(cached):
  e = cached.service.engine
  with pytest.raises(ValueError, match="no block"):
    PrefixCache(e.config, "float32", 0)
