"""Predicted seconds: the simulated generation against a loop over tokens, work by hand against compiled programs, measured steps.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrol_jax import plan
from arrol_jax.models import transformer
from arrol_jax.models.attention import causal_attention
from arrol_jax.models.zoo import ZOO
from arrol_jax.planning import chips, hlo, rollout, timing, work
from arrol_jax.planning.chips import Rates
from arrol_jax.types import UserError
from experiments import plan_check

TINY = ZOO["tiny"]
ONE = Rates(flops=1.0, memory=1.0, cache=1.0, link=1.0, layer=0.0, hop=0.0, rollout=0.0)


# ---- a generation


def test_segments_read_what_a_loop_over_tokens_reads():
  lengths, prompt, group = np.array([3, 20, 16, 9, 1, 33]), 5, 2
  made = rollout.simulate(lengths, rollout.Decoding(prompt, group, [6], 8))
  responses = prompts = shared = 0
  for step in range(max(lengths)):  # all start together
    live = [i for i in range(6) if step < lengths[i]]
    responses += sum(step + 1 for i in live)  # its own column among them
    prompts += prompt * len(live)
    shared += prompt * len({i // group for i in live})
  total = lambda name: sum(getattr(s, name) for s in made.segments)
  assert (total("responses"), total("prompts"), total("prompts_shared")) == (responses, prompts, shared)
  assert made.tokens == lengths.sum() and total("steps") == 40 and made.inserts == 1  # a segment of 8 ends after 33 - 32 = 1: 8


def test_slots_are_filled_again_and_the_batch_shrinks():
  made = rollout.simulate(np.array([8, 32, 8, 8]), rollout.Decoding(1, 2, [1, 2], 8))
  # Slots 0 and 1; request 2 takes slot 0 after a segment, request 3 after two; then 1 goes on alone.
  assert [s.rows for s in made.segments] == [2, 2, 2, 1] and made.inserts == 3
  assert [s.tokens for s in made.segments] == [16, 16, 16, 8]


def test_decisions_keep_their_share_and_never_cut_what_has_ended():
  lengths = np.full(40, 64)
  lengths[:8] = 8
  made = rollout.simulate(lengths, rollout.Decoding(1, 4, [40], 8, detect=(16,), keep=0.5))
  assert len(made.kept) == 8 + 16 and made.tokens == 8 * 8 + 32 * 16 + 16 * 48
  twice = rollout.simulate(lengths, rollout.Decoding(1, 4, [40], 8, detect=(16, 32), keep=0.25))
  assert len(twice.kept) == 8 + 8  # a half and a half of 32


def test_lengths_are_spread_or_read_from_a_file(tmp_path):
  drawn = rollout.parse_lengths("lognormal:0.5:0.3", 4000, 1000)
  assert drawn[0] == 1000 == drawn.max() and np.median(drawn) == pytest.approx(500, rel=0.03)
  file = tmp_path / "lengths.txt"
  file.write_text("10 20\n5000\n")
  assert set(rollout.parse_lengths(str(file), 100, 1000)) == {10, 20, 1000}
  file.write_text("0")
  for text in ("lognormal:0.5", "lognormal:x:1", "lognormal:-1:1", str(tmp_path / "none"), str(tmp_path), str(file)):
    with pytest.raises(UserError, match="--lengths="):
      rollout.parse_lengths(text, 4, 100)


# ---- work by hand


def test_products_by_hand_are_those_that_are_compiled():
  rows, length = 2, 48
  tokens = jnp.ones((rows, length), jnp.int32)

  def logits(params, tokens):
    attend = causal_attention("xla")
    hidden, _ = transformer.forward(TINY, params, tokens, transformer.default_positions(tokens), attend)
    return transformer.unembed(params, hidden)

  module = hlo.parse(jax.jit(logits).lower(transformer.abstract_params(TINY), tokens).compile().as_text())
  trained = work.Trained(1, 0, np.full(rows, length - 1))  # as many tokens, no prompt
  layers, unembed = work.product_params(TINY)
  whole = work.attention_flops(TINY, rows, length)  # the plain way computes the other half of the square too
  assert hlo.flops(module, hlo.trips(module)) == 2.0 * (layers + unembed) * rows * length + 2 * whole
  assert trained.tokens == rows * length
  forward = 2.0 * layers * rows * length + 2.0 * unembed * rows * (length - 1) + whole
  assert work.forward_flops(TINY, trained) == pytest.approx(forward)
  # Logits once more: a product and two passes over them in float32.
  rates = chips.rates("h100")
  more = work.update_seconds(TINY, trained, rates, 2, again=True) - work.update_seconds(TINY, trained, rates, 2)
  logits = rows * (length - 1) * TINY.vocab
  assert more == pytest.approx((2.0 * logits * TINY.width / rates.flops + 2 * 4 * logits / rates.memory) / 2)


def test_a_decode_step_takes_its_roofline():
  cost = work.DecodeCost(weights=10.0, row_flops=4.0, row_bytes=2.0, column=0.5, layers=3, shards=2,
                         collectives={"all-reduce": [3, 5.0]})
  rates = Rates(flops=2.0, memory=1.0, cache=0.25, link=10.0, layer=0.1, hop=0.01, rollout=0.0)
  made = rollout.Generation([rollout.Segment(rows=16, steps=2, tokens=20, responses=40, prompts=30, prompts_shared=8)], [], 1)
  # 8 rows a chip: products max(4 * 8 / 2, 10 / 1), 2 * 8 bytes, 3 layers, 5 * 8 bytes sent twice and 3 hops; then the cache.
  step = 16 + 16 + 0.3 + (2 * 40 / 10 + 0.03)
  assert cost.seconds(made, rates) == pytest.approx(2 * step + (40 + 30) / 2 * 0.5 / 0.25)
  assert cost._replace(shared=True).seconds(made, rates) == pytest.approx(2 * step + (40 + 8) / 2 * 0.5 / 0.25)


def test_each_operation_of_a_program_takes_the_longer_of_two():
  f = lambda a, b: jax.lax.fori_loop(0, 5, lambda _, x: x @ b, a)
  module = hlo.parse(jax.jit(f).lower(jnp.ones((64, 64)), jnp.ones((64, 64))).compile().as_text())
  count = hlo.trips(module)
  flops, moved = 5 * 2 * 64**3, hlo.traffic(module, count)
  assert moved >= 5 * 3 * 64 * 64 * 4
  assert hlo.roofline(module, count, 1.0, math.inf) == flops and hlo.roofline(module, count, math.inf, 1.0) == moved
  both = hlo.roofline(module, count, flops / 5 / (3 * 64 * 64 * 4), 1.0)  # where a product takes as long as what it moves
  assert both == pytest.approx(moved, rel=0.01)


def test_a_compiled_segment_is_taken_apart():
  segment = timing.Program("decode segment", 0, flops=8 * 4 * 100.0, traffic=8 * (50 + 30 + 20.0),
                           collectives={"all-reduce": [16, 8 * 4 * 6]})
  cost = timing.decode_cost(segment, 50, 30, 2.0, {"rows": 4, "steps": 8, "layers": 1, "shards": 1})
  assert cost == work.DecodeCost(50, 100.0, 5.0, 2.0, 1, 1, {"all-reduce": [2, 6.0]})


# ---- against what was measured


def test_the_shares_are_the_fit_and_whole_steps_are_within_30_percent():
  lines = plan_check.lines()
  fitted = plan_check.fit(lines)
  assert np.allclose(fitted, chips.FITTED, rtol=0.02)
  rates = chips.rates("h100")
  steps = {x.name: plan_check.error(x, rates) for x in lines if x.name.endswith("step")}
  assert len(steps) == 8 and max(map(abs, steps.values())) < 0.3
  held = [abs(plan_check.error(x, rates)) for x in lines if not x.fitted]
  assert np.median(held) < 0.15 and np.mean([e < 0.3 for e in held]) > 0.85


def test_devices_are_found_in_the_sheet():
  assert chips.chip_of("NVIDIA H100 80GB HBM3") == "h100" and chips.chip_of("TPU v5 lite") == "v5e"
  assert chips.chip_of("TPU v5") == "v5p" and chips.chip_of("TPU v6 lite") == "v6e" and chips.chip_of("cpu") is None
  assert set(chips.KINDS.values()) == set(chips.CHIPS) and set(plan.HBM) <= set(chips.CHIPS)


# ---- the report


def test_dollars_and_tokens_a_second():
  timed = timing.Timed({"generate": 60.0, "logprob": 0.0, "update": 29.0, "rest": 1.0}, 9000, 8000, 4, 100, 5e9)
  said = timed.as_dict(chips=64, price=2.0)
  assert said["dollars"] == pytest.approx(90 / 3600 * 64 * 2) and said["tokens_s"] == 100.0 and said["sec_step"] == 90.0
  assert "dollars" not in timed.as_dict(64, None)
  row = timing.table({"nothing pruned": timed}, 64, 2.0).splitlines()[-1]
  assert row == "| nothing pruned | 60.00 | 0.00 | 29.00 | 1.00 | 90.00 | 9,000 | 100 | 5.0 | 3.200 |"
  assert ONE.collectives({"all-reduce": [1, 10], "all-gather": [1, 10]}) == 30.0


@pytest.mark.parametrize("flag, says", [
  ("--price=cheap", "--price=cheap: it takes a number above 0"), ("--price=-1", "above 0"), ("--prompt=1.5", "whole number"),
  ("--prompt=4000", "at most rollout.max_prompt (1024)"), ("--lengths=lognormal:1", "give lognormal:CENTRE:SPREAD")])
def test_a_wrong_flag_is_one_line(flag, says, monkeypatch):
  monkeypatch.setattr(jax.config, "update", lambda *_: None)
  monkeypatch.setattr(plan.sys, "argv", ["plan", "--config=qwen3_1b7", "--topology=v5e:16x16", flag, "--compilation_cache=none"])
  with pytest.raises(UserError) as e:
    plan.main()
  assert says in str(e.value)
