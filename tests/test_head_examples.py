"""What the quality head learns from: the engine's own features of all graded survivors, one example a decision."""

import math

from helpers_rollouts import found, rollout_of
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rollout import KEY, SAMPLING, C, engine, requests

from arrol_jax.learning.batching import PackShape, head_examples, pack
from arrol_jax.learning.resampling import until_mixed
from arrol_jax.pruning.baselines import down_sample
from arrol_jax.pruning.decision import make_decide
from arrol_jax.pruning.head import INPUTS, Features, init_head
from arrol_jax.pruning.rule import PruneRule


def state(value):
  """Features that name their place."""
  return Features(np.full(C.width, value, np.float32))


def places(examples):
  """Those of the examples that count, in order."""
  return [int(x) for x, weight in zip(examples.features.last[:, 0], examples.weight, strict=True) if weight]


def test_survivors_features_are_examples_as_the_engine_booked_them(mesh, head, table):
  """Of rollouts cut at 4 and 8 tokens: every decision of every survivor, bit for bit; nothing of the pruned."""
  tables = jax.tree.map(lambda x: jnp.stack([x, x]), table)
  decide = make_decide(head, tables, PruneRule((4, 8), keep=0.49), True, features=True)
  with jax.set_mesh(mesh):
    out = engine(mesh).run(requests(), KEY, SAMPLING, decide=decide)
  for r in out:
    r.reward = math.nan if r.pruned else float(r.request % 2)
    assert len(r.features) == len(r.scores)
  kept = [(features, r) for r in out if not r.pruned for features in r.features]
  assert any(r.pruned for r in out) and len({len(r.features) for _, r in kept}) == 2
  examples = head_examples(out, head, C.width)
  n = len(kept)
  np.testing.assert_array_equal(examples.features.last[:n], [features.last for features, _ in kept])
  np.testing.assert_array_equal(examples.reward[:n], [r.reward for _, r in kept])
  np.testing.assert_array_equal(examples.weight, np.arange(len(examples.weight)) < n)
  for x in jax.tree.leaves(examples):
    assert x.dtype == np.float32 and len(x) >= len(out) and len(x).bit_count() == 1 and not x[n:].any()


@pytest.mark.parametrize("inputs", [("logprobs",), tuple(INPUTS)])
@pytest.mark.parametrize("dtype", [np.float32, jnp.bfloat16])
def test_examples_hold_what_the_head_reads(inputs, dtype):
  head = init_head(C.width, 8, jax.random.key(0), inputs)
  widths = {x: 2 if x == "logprobs" else C.width for x in inputs}
  features = Features(**{x: np.full(n, -1.5, dtype) for x, n in widths.items()})
  examples = head_examples([rollout_of(1, 0, 3, 9, features=(features,))], head, C.width)
  assert {x: np.shape(v) for x, v in examples.features._asdict().items() if v is not None} == {
    x: (1, n) for x, n in widths.items()}
  assert all(np.all(x == -1.5) and x.dtype == np.float32 for x in jax.tree.leaves(examples.features))


@pytest.mark.parametrize("short, taught", [("skip", [12]), ("last", [12, 20, 30])])
def test_what_rollouts_that_ended_before_detection_teach(head, short, taught):
  """Nothing, or their features at the last token; one that was decided teaches what stood at the decision either way."""
  rollouts = [rollout_of(1, 0, 4, 12, decided=True, features=(state(12),), final_features=state(10)),
              rollout_of(2, 0, 3, 6, final_features=state(20)), rollout_of(3, 0, 5, 1, final_features=state(30)),
              rollout_of(4, 0, 3, 8, pruned=True, decided=True, features=(state(41),), final_features=state(40), reward=math.nan)]
  assert places(head_examples(rollouts, head, C.width, short=short)) == taught


def test_all_graded_survivors_teach_the_head_also_those_that_the_policy_does_not_learn_from(mesh, head):
  """Dynamic sampling leaves the groups out whose rewards are all alike, max_variance a share of each group: the head sees all."""
  make = lambda i, p, reward: rollout_of(i, p, 2, 9, decided=True, features=(state(i),), reward=reward, pruned=math.isnan(reward))
  rounds = [[make(1, 0, 1.0), make(2, 0, 1.0), make(3, 0, math.nan), make(4, 1, 1.0), make(5, 1, 0.0)]]
  learned, everything, _ = until_mixed(lambda n, count: rounds[n], 2, 1)
  batches, _ = pack(learned, PackShape(16, 64, 1), mesh)
  assert sorted(found(batches)) == [4, 5]
  assert places(head_examples(everything, head, C.width)) == [1, 2, 4, 5]
  group = [make(i, 0, float(i == 1)) for i in range(1, 9)]
  chosen = down_sample(group, 0.5)
  assert len(found(pack(chosen, PackShape(16, 64, 1), mesh)[0])) == 4
  assert places(head_examples(group, head, C.width)) == list(range(1, 9))


def test_nothing_to_learn_from_weighs_nothing(head):
  cut = rollout_of(1, 0, 2, 8, pruned=True, decided=True, features=(state(1),), reward=math.nan)
  for rollouts in ([], [cut], [rollout_of(2, 0, 2, 4)]):
    examples = head_examples(rollouts, head, C.width, ("head",), balance=True)
    assert examples.weight.tolist() == examples.reward.tolist() == [0] and not examples.features.last.any()


def test_a_few_shapes_whatever_survives(head):
  """As many places as rollouts were started, up to a power of two; more only where several decisions need them."""
  size = lambda count, kept, decisions: len(head_examples(
    [rollout_of(i, 0, 2, 9, features=(state(i),) * decisions, pruned=i > kept) for i in range(1, count + 1)],
    head, C.width).weight)
  assert [size(16, kept, 1) for kept in (0, 1, 9, 16)] == [16] * 4 and size(17, 3, 1) == 32
  assert [size(16, kept, 2) for kept in (8, 9)] == [16, 32]
