"""prune.weigh=("policy",): every mean of the loss is sum w x / sum w over survivors, so a pruned step estimates the whole one."""

import dataclasses

import jax
import numpy as np
import pytest
from test_batching import COMPUTE, PARAMS, C, rollouts

from arrol_jax.learning import losses, update
from arrol_jax.learning.batching import PackShape, pack
from arrol_jax.learning.losses import DAPO, DR_GRPO, GRPO
from arrol_jax.models import sharding, transformer

KINDS = {"token": DAPO, "sequence": GRPO, "constant": dataclasses.replace(DR_GRPO, longest=12)}


def weighted(some, mesh, loss, weigh=("policy",), micro_tokens=64):
  """Gradient and metrics of a step on `some`."""
  u = update.UpdateConfig(C, loss, COMPUTE)
  with jax.set_mesh(mesh):
    batches, counts = pack(some, PackShape(18, micro_tokens, 1), mesh, loss, weigh)
    params = jax.device_put(PARAMS, sharding.shardings(transformer.logical_axes(C), PARAMS, mesh, sharding.TRAIN))
    sums = update.zeros(C, params)
    scalars = {k: np.float32(counts[k]) for k in ("tokens", "rows", "trained")} | {"temperature": np.float32(1)}
    for batch in batches:
      sums = update.accumulate(u, params, *sums, batch, scalars)
  return jax.device_get(sums)


def repeated(some, times):
  """Each rollout as often as it stands for."""
  return [dataclasses.replace(r, request=100 * n + i, keep_probability=1.0) for i, r in enumerate(some) for n in range(times[i])]


@pytest.mark.parametrize("kl", [0.0, 0.3], ids=["no kl", "kl"])
@pytest.mark.parametrize("loss", KINDS.values(), ids=KINDS)
def test_a_row_of_keep_probability_one_nth_counts_as_n_rows(mesh, loss, kl):
  """The step on survivors with weights 1, 2, 4 is the step on a batch in which they stand once, twice, four times."""
  loss = dataclasses.replace(loss, overlong=0.0, kl_weight=kl)
  some = rollouts()
  times = [(1, 2, 4)[i % 3] for i in range(len(some))]
  for r, n in zip(some, times, strict=True):
    r.keep_probability = 1.0 / n
  got, metrics = weighted(some, mesh, loss)
  want, whole = weighted(repeated(some, times), mesh, loss, ())
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=2e-4), got, want)
  assert metrics["policy_loss"] == pytest.approx(float(whole["policy_loss"]), abs=2e-6)
  off, _ = weighted(some, mesh, loss, ())
  assert max(float(np.max(np.abs(a - b))) for a, b in zip(jax.tree.leaves(off), jax.tree.leaves(got), strict=True)) > 1e-4


@pytest.mark.parametrize("loss", KINDS.values(), ids=KINDS)
def test_equal_weights_are_no_weights(mesh, loss):
  """Self-normalised: all kept with 1/3 is all kept."""
  some = rollouts()
  plainly, _ = weighted(some, mesh, loss)
  for r in some:
    r.keep_probability = 1 / 3
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7, rtol=1e-5), weighted(some, mesh, loss)[0], plainly)


def test_over_many_draws_the_pruned_gradient_is_the_whole_ones(mesh):
  """Long answers are cut more often. The token mean over survivors, on average over draws, is close to that over all; not so
  unweighted. Advantages are held fixed, so this is the statistics of the mean alone."""
  rng = np.random.default_rng(5)
  length = rng.integers(1, 13, 64).astype(float)
  value = rng.normal(size=64) + 0.3 * length
  p = np.where(length > 6, 0.25, 0.9)
  full, draws = np.sum(length * value) / length.sum(), {True: [], False: []}
  for _ in range(400):
    kept = rng.random(64) < p
    for on in draws:
      w = (1 / p[kept] if on else np.ones(kept.sum()))
      w = w / w.mean()
      mask = (np.arange(12)[None, :] < length[kept][:, None]).astype(np.float32)
      weight = np.asarray(losses.token_weights(mask, "token", float((w * length[kept]).sum()), float(kept.sum()), 12))
      draws[on].append((weight * (w * value[kept])[:, None]).sum())
  assert abs(np.mean(draws[True]) / full - 1) < 0.02 < abs(np.mean(draws[False]) / full - 1)
