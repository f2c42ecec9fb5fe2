"""A vote by a linear head that reads all there is: its score where a stop string cut a trace is that of the last token kept."""

from helpers_serve import PROMPT, ask, serving, with_positions
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from arrol_jax.models.files.weights import load_policy
from arrol_jax.prune import Calibration
from arrol_jax.pruning import features

INPUTS = ("last", "mean", "last@1/3", "mean@2/3", "prompt@2/3", "logprobs", "windows", "siblings")
DETECT = 16


@pytest.fixture(scope="module")
def server(tmp_path_factory):
  """The shipped model with a head of one boundary and the last token; siblings weigh nothing in the last token's part, as what
  they had said by then is not known afterwards."""
  policy = load_policy("experiments/arithmetic/signs")
  count = features.width(INPUTS, policy.config.width)
  weights = lambda seed: jax.random.normal(jax.random.key(seed), (2, count)).at[1, -1].set(0.0) / count**0.5
  ones = jnp.ones(2)
  policy.head = {"mean": 0.1 * weights(0), "level": 0.5 * ones, "between": weights(1), "within": weights(2), "spread": ones}
  policy.head_inputs, policy.detect = INPUTS, (DETECT,)
  policy.calibration = Calibration(*(jnp.broadcast_to(x, (2, 128)) for x in (jnp.arange(128.0), jnp.arange(128.0)[::-1])))
  path = tmp_path_factory.mktemp("ridge") / "policy"
  policy.save(path)
  with serving(with_positions(path)) as out:
    yield out


def test_the_score_is_that_of_the_last_token_kept(server):
  """With max_tokens so that the engine ends where the stop string does, the score must be the same."""
  assert server.service.voters.inputs == INPUTS and server.limits.calibrated
  base = {"prompt": PROMPT, "n": 8, "seed": 3, "temperature": 1.2, "vote": "quality"}
  _, whole = ask(server.port, base)
  for stop in (";", "=1"):
    _, cut = ask(server.port, base | {"stop": stop})
    traces = cut["vote"]["traces"]
    assert sum(t["finish_reason"] == "stop" and stop not in t["text"] for t in traces) >= 5
    for i, trace in enumerate(traces):
      _, same = ask(server.port, base | {"max_tokens": trace["tokens"]})
      assert trace["score"] == pytest.approx(same["vote"]["traces"][i]["score"], abs=1e-3)
    assert any(abs(a["score"] - b["score"]) > 0.01 for a, b in zip(traces, whole["vote"]["traces"], strict=True))


def test_a_vote_ranks_by_these_scores(server):
  base = {"prompt": PROMPT, "n": 8, "seed": 3, "temperature": 1.2, "vote": "quality", "stop": "Z"}
  _, answer = ask(server.port, base)
  voters = [t for t in answer["vote"]["traces"] if t["answer"] is not None]
  assert len(voters) > 2
  order = np.argsort([t["score"] for t in voters])
  weights = [voters[i]["weight"] for i in order]  # equal traces share theirs
  assert (np.diff(weights) >= 0).all() and weights[-1] > 0.5 > weights[0]


def test_hopeless_traces_end_at_the_decision(server):
  base = {"prompt": PROMPT, "n": 8, "seed": 3, "temperature": 1.2, "vote": "quality"}
  _, free = ask(server.port, base)
  posterior = [t["posterior"] for t in free["vote"]["traces"]]
  _, some = ask(server.port, base | {"stop_below": float(np.median(posterior))})
  ended = [t for t in some["vote"]["traces"] if t["finish_reason"] == "hopeless"]
  assert 0 < len(ended) < 8 and all(t["tokens"] == DETECT and t["answer"] is None for t in ended)
