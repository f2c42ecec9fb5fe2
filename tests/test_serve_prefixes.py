"""Prefixes kept between calls: nobody's text changes, what is there is not computed again, and the memory stays what it was."""

from concurrent.futures import ThreadPoolExecutor

from helpers_serve import ask, events, serving
import jax
import numpy as np
import pytest

from arrol_jax.engine import programs
from arrol_jax.serving import prefixes
from arrol_jax.serving.prefixes import PrefixCache, names

SYSTEM = "1+2-3+4-5+6-7+8-9+1-2+3-4+5-6+7-"  # 32 tokens
OPTIONS = ["--config.rollout.max_prompt=64", "--config.rollout.row_buckets=2"]
CALLS = [{"prompt": SYSTEM + f"{i % 9 + 1}+{i % 7}>", "seed": i, "n": i % 3 + 1, "temperature": (0, 1, 1.4)[i % 3]}
         for i in range(9)] + [{"prompt": SYSTEM[:2 * i + 1] + ">", "seed": i} for i in range(2, 16, 3)]


def texts(port, body):
  status, answer = ask(port, body)
  assert status == 200, answer
  return [c["text"] for c in answer["choices"]]


def metric(port, name):
  text = ask(port, None, "/metrics", "GET")[1]
  return float(next(line for line in text.splitlines() if line.startswith(name + " ")).split()[1])


@pytest.fixture(scope="module")
def plain(exported):
  """What each of CALLS gets without the cache."""
  with serving(exported, *OPTIONS) as server:
    yield [texts(server.port, body) for body in CALLS]


@pytest.fixture(scope="module")
def cached(exported):
  with serving(exported, *OPTIONS, block=8) as server:
    yield server


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
  """A first call of 36 tokens finds nothing, the next with 32 of them in common four blocks of 8; n does not count."""
  cached.service.kept.clear()
  widths, extend = [], prefixes._extend
  def counting(c, params, columns, tokens, *rest, **more):
    widths.append(tokens.shape[1])
    return extend(c, params, columns, tokens, *rest, **more)
  monkeypatch.setattr(prefixes, "_extend", counting)
  ask(cached.port, {"prompt": SYSTEM + "4+5>", "n": 3})
  assert metric(cached.port, "arrol_prefix_cache_queries_total") == 36 and metric(cached.port, "arrol_prefix_cache_hits_total") == 0
  ask(cached.port, {"prompt": SYSTEM + "8-1+2>"})
  assert metric(cached.port, "arrol_prefix_cache_hits_total") == 32 and widths == [64, 16]
  ask(cached.port, {"prompt": SYSTEM})  # all of it is there, and its last token's block computed nevertheless
  assert metric(cached.port, "arrol_prefix_cache_hits_total") == 56 and widths == [64, 16, 16]
  assert metric(cached.port, "arrol_prefix_cache_hit_rate") == pytest.approx(56 / 106)


def test_the_next_turn_finds_the_last_one(cached):
  cached.service.kept.clear()
  first = SYSTEM[:20] + ">"
  said = texts(cached.port, {"prompt": first, "temperature": 0, "max_tokens": 8})[0]
  second = first + said + "1+2>"
  found = lambda: cached.service.kept.found
  texts(cached.port, {"prompt": second, "max_tokens": 1})
  assert found() == 16
  texts(cached.port, {"prompt": second + "3-1>", "max_tokens": 1})
  assert found() == 16 + len(cached.service.tokenizer.encode(second)) // 8 * 8


def test_a_small_cache_lets_go_of_what_was_used_least_and_stays_right(cached, plain, monkeypatch):
  kept = cached.service.kept
  kept.clear()
  monkeypatch.setattr(kept, "size", 5)  # a prompt of 36 tokens has four
  for body, text in list(zip(CALLS, plain, strict=True)) * 2:
    assert texts(cached.port, body) == text
    assert len(kept.numbers) <= 5 and sorted(kept.numbers.values()) == list(range(len(kept.numbers)))
  texts(cached.port, {"prompt": SYSTEM + "1+1>", "max_tokens": 1})
  texts(cached.port, {"prompt": "9-8+7-6+5>", "max_tokens": 1})  # one block more, for which there is room
  texts(cached.port, {"prompt": "2-8+7-6+5>", "max_tokens": 1})  # and one for which the last block of the first prompt goes
  assert kept.missing(np.array(cached.service.tokenizer.encode(SYSTEM + "2+2>"), np.int32)) == 12
  assert cached.service.kept.pool[0].k.shape[1] >= 5


def test_one_call_of_more_blocks_than_there_is_room_for(cached, plain, monkeypatch):
  cached.service.kept.clear()
  monkeypatch.setattr(cached.service.kept, "size", 2)
  with ThreadPoolExecutor(4) as pool:
    assert list(pool.map(lambda body: texts(cached.port, body), CALLS[:4])) == plain[:4]
  assert len(cached.service.kept.numbers) == 2


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_in_steady_mode_nothing_depends_on_what_is_there(exported, plain, dtype):
  """Bit for bit the same text and log-probs with nothing kept, everything, and in a crowd."""
  with serving(exported, *OPTIONS, f"--config.model.dtype={dtype}", steady=True, block=8) as server:
    def said(body):
      choices = ask(server.port, body | {"logprobs": 0})[1]["choices"]
      return [(c["text"], c["logprobs"]["token_logprobs"]) for c in choices]
    bodies = CALLS[:5]
    cold = []
    for body in bodies:
      server.service.kept.clear()
      cold.append(said(body))
    assert [said(body) for body in bodies] == cold and [said(body) for body in bodies] == cold
    assert server.service.kept.found > 5 * 32
    with ThreadPoolExecutor(5) as pool:
      assert list(pool.map(said, bodies)) == cold
    if dtype == "float32":
      assert [[text for text, _ in choices] for choices in cold] == plain[:5]


def test_columns_and_state_are_those_of_a_whole_prefill(cached):
  """With half of a prompt there; int8 columns too, whose rounding the second half sees."""
  import dataclasses
  e, tokens = cached.service.engine, np.array(cached.service.tokenizer.encode(SYSTEM + "1+2-3>"), np.int32)
  how = dataclasses.replace(cached.service.sampling, taps=cached.service.sampling.taps._replace(prompt=2))
  for cache, tolerance in [(None, 1e-5), ("int8", 0.1)]:
    sampling = dataclasses.replace(how, cache=cache)
    with jax.set_mesh(e.mesh):
      kept = PrefixCache(e.config, sampling.cache_dtype, 1, 8)
      kept.prefill(e, sampling, [tokens[:20]], 1, 32)
      assert kept.missing(tokens) == len(tokens) - 16
      got = kept.prefill(e, sampling, [tokens], 1, 32)
      whole = programs.prefill(e.config, e.params, tokens[None], np.array([len(tokens)], np.int32), sampling=sampling)
    real = lambda c, x: np.asarray(x)[:, 0, :len(tokens)].astype(np.float32) * (
      1 if cache is None else np.asarray(c)[:, 0, :len(tokens), None])
    for a, b in zip(got.cache, whole.cache, strict=True):
      np.testing.assert_allclose(real(a.k_scale, a.k), real(b.k_scale, b.k), atol=tolerance)
      np.testing.assert_allclose(real(a.v_scale, a.v), real(b.v_scale, b.v), atol=tolerance)
    np.testing.assert_allclose(got.state[0], whole.state[0], atol=tolerance)
    assert got.last_token[0] == tokens[-1] and got.length[0] == len(tokens)


def test_too_little_memory_is_said(cached):
  e = cached.service.engine
  with pytest.raises(ValueError, match="no block"):
    PrefixCache(e.config, "float32", 0)
