"""What the engine keeps for a linear head is what a plain forward pass and the tokens themselves say, for every input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_rollout import KEY, PARAMS, C, engine, requests

from arrol_jax.engine import programs
from arrol_jax.engine.sampling import Sampling
from arrol_jax.engine.token_counts import bucket_of
from arrol_jax.learning import head_training
from arrol_jax.models import transformer
from arrol_jax.models.attention import causal_attention
from arrol_jax.models.layers import split_qkv
from arrol_jax.prune import Calibration
from arrol_jax.pruning import features
from arrol_jax.pruning.decision import make_decide
from arrol_jax.pruning.rule import PruneRule

INPUTS = ("last", "mean", "last@1/2", "mean@1/2", "mean@1", "prompt@1/2", "logprobs", "windows", "siblings")
WIDE, AT = features.width(INPUTS, C.width), (4, 8)
RULE = PruneRule(AT, inputs=INPUTS)
SAMPLING = Sampling(1.0, (7, 13), "float32", pool=True, taps=features.plan(INPUTS, C.layers))


def run(mesh, head=None, **settings):
  head = head or head_training.no_linear(WIDE, len(AT), True)[0]
  tables = jax.tree.map(lambda x: jnp.stack([x] * (len(AT) + 1)), Calibration.empty(8))
  with jax.set_mesh(mesh):
    return engine(mesh, **settings).run(requests(), KEY, SAMPLING, decide=make_decide(head, tables, RULE, False, features=True))


@jax.jit
def layers_of(tokens):
  """The residual stream after one and two layers, and the state after the final norm, f32[S,D] each; tokens i32[S]."""
  tapped = {}

  def attend(_, qkv, turn):
    q, k, v = split_qkv(qkv)
    return causal_attention("xla")(*turn(q, k), v)[0], None

  params, positions = transformer.unstack(PARAMS), transformer.default_positions(tokens[None])
  hidden, _ = transformer.unrolled(C, params, tokens[None], positions, attend, tap=tapped.__setitem__)
  return tapped[1][0], tapped[2][0], hidden[0]


def expected(r, n, others):
  """`features.vector` of rollout r at n response tokens, by its definition; others: tokens of its siblings there."""
  text = np.zeros(28, np.int32)
  text[:len(r.prompt_tokens) + len(r.tokens)] = np.r_[r.prompt_tokens, r.tokens]
  first, second, hidden = map(np.asarray, layers_of(text))
  start = len(r.prompt_tokens) - 1
  here = slice(start, start + n)  # the positions that sampled response tokens 1 to n
  average, lowest = r.logprobs[0], r.logprobs[0]
  for x in r.logprobs[1:n]:
    average = average + (x - average) / 32
    lowest = min(lowest, average)
  count = lambda tokens: np.bincount(np.asarray(bucket_of(jnp.asarray(tokens))), minlength=256)
  own, rest = count(r.tokens[:n]), sum((count(t) for t in others), np.zeros(256))
  norm = np.linalg.norm(own) * np.linalg.norm(rest)
  return np.concatenate([hidden[here][-1], hidden[here].mean(0), first[here][-1], first[here].mean(0), second[here].mean(0),
                         first[start], [r.logprobs[:n].mean(), r.logprobs[:n].min()],
                         [average, lowest, np.mean(r.logprobs[:n] < -np.log(10))], [own @ rest / norm if norm else 0.0]])


def test_every_input_is_that_of_a_plain_forward(mesh):
  """At both decisions. All requests decode at once, so a row's siblings stand at as many tokens, or ended before."""
  rollouts, seen = run(mesh, rows=20), 0
  for r in rollouts:
    for which, found in enumerate(r.features):
      n = AT[which]
      others = [o.tokens[:n] for o in rollouts if o.prompt == r.prompt and o is not r]
      np.testing.assert_allclose(found, expected(r, n, others), atol=2e-4, rtol=2e-3)
      seen += 1
  assert seen > 15 and len({len(r.features) for r in rollouts}) == 3


def test_the_last_tokens_features_are_those_of_the_whole_response(mesh):
  for r in run(mesh, rows=20):
    wanted = expected(r, len(r.tokens), [])
    np.testing.assert_allclose(r.final_features[:-1], wanted[:-1], atol=2e-4, rtol=2e-3)  # the siblings' share has moved on


@pytest.mark.parametrize("inputs", [("mean@1/2", "logprobs"), ("prompt@1", "windows"), ("last",), ("siblings",)])
def test_what_is_kept_is_what_is_asked_for(inputs):
  """One layer, nothing else; a vector of the width that was promised."""
  taps = features.plan(inputs, C.layers)
  assert len(taps.states) == sum("@" in i and "prompt" not in i for i in inputs) and taps.counts == ("siblings" in inputs)
  sampling = Sampling(1.0, (), "float32", taps=taps)
  slots = programs.init_slots(C, 3, 16, sampling)
  assert features.vector(slots, inputs, C.layers).shape == (3, features.width(inputs, C.width))


@pytest.mark.parametrize("text", ["middle", "mean@0", "mean@1.5", "logprobs@1/2", "mean@1/0", "mean@x", ""])
def test_an_unknown_input_is_refused(text):
  with pytest.raises(ValueError, match="no input of a head"):
    features.parse((text,), 4)


def test_rows_are_scored_by_the_head_of_their_decision_and_at_last_by_its_own(mesh):
  """Each decision has weights of its own; a centred score has its group's mean from the other fit."""
  rng = np.random.default_rng(0)
  head = head_training.no_linear(WIDE, len(AT), True)[0]
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape) / WIDE**0.5, jnp.float32)
  head |= {"within": draw(head["within"]), "between": draw(head["between"]), "level": jnp.array([0.2, 0.5, 0.3]),
           "spread": jnp.array([0.1, 0.2, 0.4])}
  rollouts = run(mesh, head, rows=20)
  for r in rollouts:
    for c, x in enumerate(r.features):
      group = np.stack([o.features[c] for o in rollouts if o.prompt == r.prompt and len(o.features) > c])
      score = 0.0 + x @ head["within"][c] + (group @ (head["between"][c] - head["within"][c])).mean()
      assert r.scores[c] == pytest.approx(1.702 * float(score) / float(head["spread"][c]), abs=2e-3)
    assert r.final == pytest.approx(1.702 * float(r.final_features @ head["within"][2]) / 0.4, abs=2e-3)


def test_refilled_slots_bring_the_same_features(mesh):
  """Fewer slots than requests: who sits where and who left before makes no difference, but for siblings that are not there."""
  for a, b in zip(run(mesh, rows=20), run(mesh, rows=6), strict=True):
    np.testing.assert_array_equal(a.tokens, b.tokens)
    assert len(a.features) == len(b.features)
    for x, y in zip((*a.features, a.final_features), (*b.features, b.final_features), strict=True):
      np.testing.assert_allclose(x[:-1], y[:-1], atol=2e-4, rtol=2e-3)
