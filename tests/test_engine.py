"""Continuous batching changes nothing: every request gets the tokens it would get alone, whatever its company."""

import functools
from unittest import mock

from hypothesis import HealthCheck, given, settings, strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrol_jax.engine import memory, programs, scheduler
from arrol_jax.engine.sampling import Sampling
from arrol_jax.engine.scheduler import Decision, Engine, Request, Run
from arrol_jax.models import sharding, transformer
from arrol_jax.models.transformer import PolicyConfig
from arrol_jax.prune import Calibration
from arrol_jax.pruning.decision import make_decide
from arrol_jax.pruning.head import init_head
from arrol_jax.pruning.rule import PruneRule
from arrol_jax.types import UserError

C = PolicyConfig("qwen3", 31, 32, 2, 4, 2, 8, 40, qk_norm=True)
PARAMS = jax.jit(lambda k: jax.tree.map(lambda x: x * 3.0, transformer.init_params(C, k)))(jax.random.key(0))
SAMPLING = Sampling(1.0, (7, 13), "float32")
KEY = jax.random.key(12)


def requests(prompts=5, group=4, limit=20):
  rng = np.random.default_rng(0)
  texts = [rng.integers(0, 31, rng.integers(1, 9)).astype(np.int32) for _ in range(prompts)]
  return [Request(p * group + g, p, texts[p], limit) for p in range(prompts) for g in range(group)]


def engine(mesh, rows, **other):
  e = Engine(C, mesh, rows=rows, max_prompt=8, max_new=20, segment=4, prefill_rows=4, **other)
  with jax.set_mesh(mesh):
    e.load(PARAMS, "float32")
  return e


def run(mesh, rows, wanted, decide=None, **other):
  with jax.set_mesh(mesh):
    return engine(mesh, rows, **other).run(wanted, KEY, SAMPLING, decide=decide)


@pytest.fixture(scope="module")
def alone(mesh):
  """Each request by itself in an engine of one row, one length, one bucket."""
  e = engine(mesh, 1, row_buckets=1, length_buckets=1)
  return [e.run([r], KEY, SAMPLING)[0] for r in requests()]


def same(a, b):
  assert a.request == b.request and a.stopped == b.stopped
  np.testing.assert_array_equal(a.tokens, b.tokens)
  np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, None])
@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_only_off_a_gpu_a_segment_may_end_early(platform, temperature, monkeypatch):
  """There a loop of unknown length keeps the host waiting; a training run leaves the temperature to its requests too."""
  monkeypatch.setattr(sharding, "platform", lambda: platform)
  sampling = Sampling(temperature, (7, 13), "float32", attention="xla")
  slots = jax.eval_shape(lambda: programs.init_slots(C, 4, 16, sampling))
  params = jax.eval_shape(lambda p: transformer.decoding_params(C, p, "float32", None), PARAMS)
  outline = jax.make_jaxpr(functools.partial(programs._generate, C, steps=4, sampling=sampling))(params, slots)
  loops = [e.primitive.name for e in outline.eqns if e.primitive.name in ("while", "scan")]
  assert loops == ["scan" if platform == "gpu" else "while"]


def test_the_requests_are_a_fair_mix(alone):
  lengths = [len(r.tokens) for r in alone]
  assert min(lengths) < 8 and max(lengths) == 20 and len(set(lengths)) > 5
  assert any(r.stopped for r in alone) and not all(r.stopped for r in alone)


@pytest.mark.parametrize("rows", [3, 8, 20])
def test_tokens_do_not_depend_on_company(mesh, alone, rows):
  for a, b in zip(run(mesh, rows, requests()), alone, strict=True):
    same(a, b)


@pytest.mark.parametrize(("platform", "most"), [("cpu", 0), ("gpu", 1)])
def test_while_requests_wait_only_a_device_of_its_own_runs_a_segment_ahead(mesh, alone, platform, most, monkeypatch):
  monkeypatch.setattr(scheduler, "runs_ahead", lambda: platform == "gpu")
  with jax.set_mesh(mesh):
    state, left = Run(engine(mesh, 3), KEY, SAMPLING), set()
    sequences = [state.add(request) for request in requests()]
    while state.advance(cut_some):
      left |= {len(state.in_flight)} if state.waiting else set()
  assert left == {most} and not state.waiting and not state.in_flight
  assert sorted(r.request for r in state.take_finished()) == list(range(len(alone)))
  for sequence, b in zip(sequences, alone, strict=True):
    a = sequence.rollout
    np.testing.assert_array_equal(a.tokens, b.tokens[:8] if a.pruned else b.tokens)
    assert a.stopped == (b.stopped and not a.pruned)


def test_sharded_engine_gives_the_same_tokens(alone):
  for a, b in zip(run(sharding.make_mesh(2, 2, 2), 8, requests()), alone, strict=True):
    same(a, b)


def test_rows_and_columns_shrink_and_grow_with_need(mesh, monkeypatch):
  from arrol_jax.engine import programs
  seen, plain = [], programs.generate_segment
  monkeypatch.setattr(programs, "generate_segment", lambda c, p, s, **k: (
    seen.append((s.token.shape[0], s.cache[0].k.shape[2])), plain(c, p, s, **k))[1])
  run(mesh, 16, requests())
  rows, columns = zip(*seen, strict=True)
  assert rows[0] == 16 and rows[-1] < 16 and set(rows) <= {2, 4, 8, 16}
  assert columns[0] < columns[-1]


def test_rows_are_gathered_only_where_fewer_are_faster(mesh):
  counts = lambda rows, attention: engine(mesh, rows, row_buckets=4).row_counts(Sampling(attention=attention))
  assert counts(256, "xla") == [32, 64, 128, 256]
  assert counts(256, "triton") == [64, 128, 256]  # idle rows read nothing: 64 rows of which 32 live are as fast as 32
  assert counts(16, "triton") == [16]


def test_done_is_reported_once_each_and_in_full(mesh, alone):
  with jax.set_mesh(mesh):
    seen = []
    engine(mesh, 6).run(requests(), KEY, SAMPLING, on_done=lambda r: seen.append((r.request, len(r.tokens))))
  assert sorted(seen) == [(r.request, len(r.tokens)) for r in alone]


def cut_some(slots, lengths):
  """Prunes at 8 tokens the rows whose key is odd: a decision that depends on the request alone."""
  decided = slots.active & (slots.generated == 8)
  keep = (jax.random.key_data(slots.key)[:, 1] % 2 == 0) | ~decided
  value = jnp.full(keep.shape, 0.25, jnp.float32)
  return slots.replace(active=slots.active & keep), Decision(decided, keep, value, value, value, value, ~keep & keep, value)


def test_a_decision_is_told_every_length_at_which_a_row_may_stand(mesh, alone):
  """In refilled slots too; a rule that looks only when it is told of 8 tokens cuts whom one that always looks cuts."""
  told = []

  def when_due(slots, lengths):
    told.append(lengths)
    _, decision = cut_some(slots, lengths)
    assert not jnp.any(decision.decided) or 8 in lengths
    return cut_some(slots, lengths) if 8 in lengths else (slots, decision)

  for rows in (3, 8):
    got, want = (run(mesh, rows, requests(), decide=decide) for decide in (when_due, cut_some))
    assert [(r.request, r.pruned, len(r.tokens)) for r in got] == [(r.request, r.pruned, len(r.tokens)) for r in want]
  assert any(r.pruned for r in got) and sum(8 in lengths for lengths in told) < len(told)


def test_no_segment_starts_when_all_rows_reach_their_limit_in_those_under_way(mesh):
  wanted = [Request(i, i, np.array([3, 4], np.int32), 8) for i in range(4)]
  started = []
  e = engine(mesh, 4)
  e.watch = lambda: started.append(1)
  with jax.set_mesh(mesh):
    out = e.run(wanted, KEY, Sampling(1.0, (), "float32"))
  assert all(len(r.tokens) == 8 for r in out) and len(started) == 8 // e.segment


def test_pruned_rows_leave_and_the_others_never_notice(mesh, alone):
  pruned = 0
  for a, b in zip(run(mesh, 8, requests(), decide=cut_some), alone, strict=True):
    assert a.decided == (len(b.tokens) > 8)
    if a.pruned:
      pruned += 1
      assert len(a.tokens) == 8 and not a.stopped and a.keep_probability == 0.25
      np.testing.assert_array_equal(a.tokens, b.tokens[:8])
    else:
      same(a, b)
  assert 3 <= pruned < 17


def test_over_a_mesh_rows_are_gathered_within_their_shard(alone, monkeypatch):
  """Survivors stay where their cache is, whoever leaves."""
  from arrol_jax.engine import programs
  taken, plain = [], programs.take_rows
  def take_rows(slots, rows, valid, *, length):
    old, new = slots.token.shape[0] // 4, len(rows) // 4
    assert all(i // old == j // new for j, i in enumerate(rows)) and len(set(rows[valid])) == valid.sum()
    taken.append((4 * old, 4 * new, int(valid.sum())))
    return plain(slots, rows, valid, length=length)
  monkeypatch.setattr(programs, "take_rows", take_rows)
  for a, b in zip(run(sharding.make_mesh(2, 2, 1), 20, requests(), decide=cut_some), alone, strict=True):
    np.testing.assert_array_equal(a.tokens, b.tokens[:len(a.tokens)])
    assert a.pruned or len(a.tokens) == len(b.tokens)
  assert any(new < old and live for old, new, live in taken), taken


def test_rows_that_read_their_prompt_in_another_row_say_the_same(mesh):
  """The GPU kernel (interpreted) in a crowd whose rows end, are cut and refilled, against plain attention over own columns."""
  rng = np.random.default_rng(4)
  texts = [rng.integers(0, 31, n).astype(np.int32) for n in (40, 70, 37, 66)]  # a block has 32 columns
  wanted = [Request(i + 17, i // 3, texts[i // 3], int(n)) for i, n in enumerate(rng.integers(7, 13, 12))]

  def run(attention):
    e = Engine(C, mesh, rows=5, max_prompt=72, max_new=12, segment=4, row_buckets=1, length_buckets=1, prefill_rows=2)
    with jax.set_mesh(mesh):
      e.load(PARAMS, "float32")
      return e.run(wanted, KEY, Sampling(1.0, (7, 13), "float32", attention=attention), decide=cut_some)

  plain, shared = run("xla"), run("triton")
  assert any(r.pruned for r in plain) and any(r.stopped for r in plain)
  for a, b in zip(shared, plain, strict=True):
    assert a.pruned == b.pruned
    same(a, b)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_schedule_gives_the_tokens_of_each_request_alone(mesh, alone, data):
  """Random limits (finish), random cuts (prune), random slots (refill): a request's tokens are a prefix of what it says alone."""
  rows = data.draw(st.sampled_from([3, 8, 20]))
  limits = data.draw(st.lists(st.integers(1, 20), min_size=len(alone), max_size=len(alone)))
  wanted = [r._replace(max_tokens=n) for r, n in zip(requests(), limits, strict=True)]
  decide, beside = cut_some if data.draw(st.booleans()) else None, data.draw(st.booleans())
  with mock.patch.object(scheduler, "runs_ahead", lambda: beside):
    said = run(mesh, rows, wanted, decide=decide)
  for a, b, limit in zip(said, alone, limits, strict=True):
    whole = min(limit, len(b.tokens))
    length = 8 if a.pruned else whole
    assert len(a.tokens) == length and (not a.pruned or whole > 8)
    np.testing.assert_array_equal(a.tokens, b.tokens[:length])
    np.testing.assert_allclose(a.logprobs, b.logprobs[:length], atol=1e-5)
    assert a.stopped == (not a.pruned and int(b.tokens[length - 1]) in SAMPLING.stop_ids)


def test_keep_ratio_one_is_pruning_off_token_for_token(mesh, alone):
  head = init_head(C.width, 8, jax.random.key(1))
  head["w2"] = jax.random.normal(jax.random.key(2), head["w2"].shape)
  rule = PruneRule((8,), keep=1.0, p_max=1.0)
  on = run(mesh, 8, requests(), decide=make_decide(head, Calibration(), rule, True))
  off = run(mesh, 8, requests(), decide=make_decide(head, Calibration(), rule, False))
  for a, b, c in zip(on, off, alone, strict=True):
    same(a, c)
    same(b, c)
    assert a.decided == b.decided == (len(c.tokens) > 8) and not a.pruned and a.keep_probability == 1.0
    if a.decided:
      assert abs(a.score - b.score) < 1e-6


def test_a_real_rule_keeps_about_kappa(mesh):
  """With an empty table every rollout that reaches detection survives with probability kappa."""
  head = init_head(C.width, 8, jax.random.key(1))
  out = run(mesh, 32, requests(20, 8), decide=make_decide(head, Calibration(), PruneRule((4,), keep=0.3), True))
  decided = [r for r in out if r.decided]
  kept = np.mean([not r.pruned for r in decided])
  assert len(decided) > 80 and abs(kept - 0.3) < 4 * np.sqrt(0.21 / len(decided))
  assert all(not r.pruned for r in out if not r.decided)


def free_memory(mesh, limit, used=0, cache=None, params=PARAMS, **other):
  """Slots of an engine whose device says that it has so many bytes."""
  e = Engine(C, mesh, rows=64, max_prompt=8, max_new=20, segment=4, prefill_rows=4, **other)
  return memory._slots_in(e, Sampling(dtype="float32", cache=cache), 4, params, limit - used, limit)


def test_slots_fill_the_free_memory_and_no_more(mesh):
  room = 28 + -28 % 16
  row = room * 2 * C.layers * C.kv_heads * C.head_dim * 4 + 12 * C.vocab  # its cache, and logits thrice
  fixed = free_memory(mesh, 10**6)
  weights = sum(x.size for x in jax.tree.leaves(PARAMS)) * 4
  assert (10**6 * 31 / 32 - weights) / row * 0.8 < fixed < (10**6 * 31 / 32 - weights) / row
  assert free_memory(mesh, 2 * 10**6) > 2 * fixed > 2 * free_memory(mesh, 10**6, used=10**5)
  assert free_memory(mesh, 10**6, cache="int8") > 2 * fixed
  assert free_memory(sharding.make_mesh(2, 2, 2), 10**6) > 4 * fixed  # 4 shares of the rows, half the heads each


def test_no_room_for_a_group_says_what_would_do(mesh):
  with pytest.raises(UserError, match="one group of 4 rollouts needs .* GB .* free .*rollout.cache=int8"):
    free_memory(mesh, 10**5)
