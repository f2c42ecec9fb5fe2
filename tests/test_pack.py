"""`pack`: every survivor once and in its place, a few shapes, advantages over survivors, counts of what is in."""

import dataclasses
import math

from helpers_rollouts import found, rollout_of, rows_of, some_rollouts
import jax
import numpy as np
import pytest

from arrol_jax.learning.batching import PackShape, empty_batches, pack
from arrol_jax.learning.losses import GRPO, LossConfig
from arrol_jax.models import sharding

KL = dataclasses.replace(GRPO, kl_weight=0.1)  # no row is left out


@pytest.mark.parametrize("buckets, micro_tokens", [(1, 64), (2, 100), (3, 128), (3, 10**6), (4, 1)])
def test_every_survivor_is_there_once_and_in_place(mesh, buckets, micro_tokens):
  rollouts = some_rollouts()
  batches, _ = pack(rollouts, PackShape(32, micro_tokens, buckets), mesh, KL)
  places = found(batches)
  assert sorted(places) == [r.request for r in rollouts if not r.pruned]
  for r in rollouts:
    if r.pruned:
      continue
    n, row = places[r.request]
    tokens, mask, sampled = (np.asarray(x)[row] for x in (rows_of(batches[n]), batches[n].response_mask,
                                                          batches[n].sampler_logprobs))
    start, end = len(r.prompt_tokens), len(r.prompt_tokens) + len(r.tokens)
    assert end <= len(tokens)
    take = np.asarray(batches[n].layout.take).reshape(-1, len(tokens))[row]
    np.testing.assert_array_equal(tokens[:end - 1], np.r_[r.prompt_tokens, r.tokens][:-1])
    np.testing.assert_array_equal(np.asarray(batches[n].positions)[0, take[:end]], np.arange(end))
    np.testing.assert_array_equal(take[end:], -1)
    np.testing.assert_array_equal(np.flatnonzero(mask), np.arange(start, end))
    np.testing.assert_array_equal(mask[start:end], 1)
    np.testing.assert_array_equal(sampled[start:end], r.logprobs)
    assert np.count_nonzero(sampled) == len(r.tokens)


def test_a_layout_says_the_same_in_both_directions(mesh):
  """Of each token where it is read, and how many rows, one after the other, hold it in that column."""
  batches, _ = pack(some_rollouts(60), PackShape(32, 300, 2), mesh, KL)
  shared = 0
  for batch in batches:
    take, read, back, count = (np.asarray(x)[0] for x in jax.tree.leaves(batch.layout))
    used, columns = int(batch.used[0]), take.shape[1]
    assert np.all(back[:used] >= 0) and np.all(back[used:] == -1) and np.all(count[used:] == 0)
    for token in range(used):
      row, column = divmod(int(back[token]), columns)
      held = np.argwhere(take == token).tolist()
      assert held == [[row + j, column] for j in range(count[token])] and np.argwhere(read == token).tolist() == held[:1]
      shared += len(held) > 1
    assert sorted(take[take >= 0].tolist()) == sorted(np.repeat(np.arange(used), count[:used]).tolist())
  assert shared


@pytest.mark.parametrize("buckets, micro_tokens, lengths, bins", [
  (1, 64, [32], [(32, 2, 32), (48, 3, 32), (64, 3, 32), (64, 4, 32)]),
  (1, 96, [32], [(32, 2, 32), (64, 4, 32), (96, 4, 32), (96, 6, 32)]),
  (4, 1, [16, 32], None), (3, 128, [16, 32], None)])
def test_a_few_fixed_shapes(mesh, buckets, micro_tokens, lengths, bins):
  """Lengths are multiples of 16; a part-filled micro-batch takes the smallest bin that holds it; long rows first."""
  shape = PackShape(32, micro_tokens, buckets)
  assert shape.lengths() == lengths and (bins is None or [tuple(x) for x in shape.bins(1, 32)] == sorted(set(bins)))
  for seed in range(5):
    batches, _ = pack(some_rollouts(40, seed), shape, mesh, KL)
    seen = [(b.tokens.shape[1], *b.response_mask.shape) for b in batches]
    assert set(seen) <= {(b.tokens.shape[1], *b.response_mask.shape) for b in empty_batches(shape, mesh)}
    assert [s for *_, s in seen] == sorted((s for *_, s in seen), reverse=True)
    for batch, (tokens, rows, length) in zip(batches, seen, strict=True):
      filled = int(np.sum(np.asarray(batch.response_mask).any(1)))
      assert (tokens, rows, length) == next(s for s in shape.bins(1, length) if batch.used[0] <= s.tokens and filled <= s.rows)
      assert batch.used[0] <= tokens and filled


def test_empty_rows_weigh_nothing(mesh):
  rollouts = [rollout_of(1, 0, 3, 5, reward=1.0), rollout_of(2, 0, 3, 5)]
  (batch,), _ = pack(rollouts, PackShape(16, 128, 1), mesh)
  for x in (batch.response_mask, batch.sampler_logprobs, batch.old_logprobs, batch.ref_logprobs, batch.advantages):
    np.testing.assert_array_equal(np.asarray(x)[2:], 0)
  np.testing.assert_array_equal(np.asarray(batch.layout.take)[:, 2:], -1)
  np.testing.assert_allclose(np.asarray(batch.advantages)[:2], [1, -1], rtol=1e-5)


def test_advantages_are_taken_over_a_groups_survivors(mesh):
  """Group 5: one right, one wrong, one pruned (not counted). Group 6: right, wrong, wrong. Group 7: alone."""
  plan = [(5, 1.0), (6, 0.0), (5, math.nan), (6, 1.0), (7, 1.0), (5, 0.0), (6, 0.0)]
  rollouts = [rollout_of(i, g, 2, 3 + i, reward=r, pruned=math.isnan(r)) for i, (g, r) in enumerate(plan, 1)]
  root = math.sqrt(2)
  for normalize, expected in ((True, {1: 1, 6: -1, 4: root, 2: -root / 2, 7: -root / 2, 5: 0}),
                              (False, {1: 0.5, 6: -0.5, 4: 2 / 3, 2: -1 / 3, 7: -1 / 3, 5: 0})):
    batches, _ = pack(rollouts, PackShape(16, 48, 1), mesh, LossConfig(normalize_std=normalize, kl_weight=0.1))
    got = {i: float(batches[n].advantages[row]) for i, (n, row) in found(batches).items()}
    assert got == pytest.approx(expected, rel=1e-5)


def test_advantages_may_be_measured_from_all_that_a_group_started(mesh):
  """Minibatches and what is not learned from (PODS) change nothing: group 5 started one right, two wrong, of which one is not in
  the batch, and a pruned one that promised 1/2. Group 6 is all right, whatever its pruned one promised."""
  some = [rollout_of(1, 5, 2, 4, reward=1.0), rollout_of(2, 5, 2, 5, reward=0.0), rollout_of(3, 5, 2, 6, reward=0.0),
          rollout_of(4, 5, 2, 3, reward=math.nan, pruned=True, posteriors=(0.5,)), rollout_of(5, 6, 2, 4, reward=1.0),
          rollout_of(6, 6, 2, 4, reward=1.0), rollout_of(7, 6, 2, 4, reward=math.nan, pruned=True, posteriors=(0.1,))]
  batches, _ = pack([some[0], some[1]] + some[4:], PackShape(16, 64, 1), mesh, LossConfig(baseline="started"), started=some)
  got = {i: float(batches[n].advantages[row]) for i, (n, row) in found(batches).items()}
  deviation = math.sqrt(3 / 8 - 9 / 64)
  assert got == pytest.approx({1: 5 / 8 / deviation, 2: -3 / 8 / deviation}, rel=1e-5)


def test_rows_without_an_advantage_are_counted_and_left_out(mesh):
  """Group 0 is all right, rollout 5 alone in group 2: with a KL term they are in."""
  rollouts = [rollout_of(1, 0, 2, 4, reward=1.0), rollout_of(2, 0, 2, 5, reward=1.0), rollout_of(3, 1, 3, 6, reward=1.0),
              rollout_of(4, 1, 3, 7), rollout_of(5, 2, 2, 8)]
  for loss, there in ((GRPO, [3, 4]), (KL, [1, 2, 3, 4, 5])):
    batches, counts = pack(rollouts, PackShape(16, 64, 1), mesh, loss)
    assert sorted(found(batches)) == there
    assert counts == {"tokens": 30, "rows": 5, "trained": 13 if loss is GRPO else 30, "rows_trained": len(there)}


@pytest.mark.parametrize("rollouts", [[], [rollout_of(1, 0, 3, 8, pruned=True, decided=True, reward=math.nan)]])
def test_no_survivors_no_batches(mesh, rollouts):
  assert pack(rollouts, PackShape(32, 64, 3), mesh) == ([], dict.fromkeys(("tokens", "rows", "trained", "rows_trained"), 0))


def test_bins_are_spread_over_the_mesh():
  """Four bins a micro-batch, a shard each; bins that are missing are empty."""
  mesh = sharding.make_mesh(2, 2, 2)
  batches, _ = pack(some_rollouts(60), PackShape(32, 96, 2), mesh, KL)
  for batch in batches:
    assert batch.tokens.shape[0] == len(batch.used) == len(batch.layout.take) == 4
    for x in jax.tree.leaves(batch):
      assert x.sharding.shard_shape(x.shape)[0] == len(x) // 4
  assert sorted(found(batches)) == [r.request for r in some_rollouts(60) if not r.pruned]
  assert np.all(np.concatenate([b.used for b in batches[:-1]]) > 0)
