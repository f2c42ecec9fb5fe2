"""Learning without a model: whom the rules keep, what the head may believe, and that a policy learns."""

import json
import sys

import numpy as np
import pytest

from experiments import sim_learning as sim


@pytest.fixture(scope="module")
def batch():
  """Chances, posteriors and groups of many batches."""
  rng = np.random.default_rng(0)
  chance = sim.sigmoid(rng.normal(-1.5, 1.5, (40, sim.BATCH * sim.GROUP)))
  groups = np.repeat(np.arange(sim.BATCH, dtype=np.int32), sim.GROUP)
  return rng, chance, np.array([sim.posteriors(rng, x) for x in chance]), groups


def test_posteriors_are_calibrated_and_know_something(batch):
  rng, chance, q, _ = batch
  right = rng.random(chance.shape) < chance
  for low, high in ((0.0, 0.1), (0.1, 0.3), (0.3, 0.6), (0.6, 1.0)):
    inside = (q >= low) & (q < high)
    assert right[inside].mean() == pytest.approx(q[inside].mean(), abs=0.03)
  assert np.corrcoef(q.ravel(), chance.ravel())[0, 1] > 0.5


@pytest.mark.parametrize(("arm", "more"), [("random", (-0.02, 0.02)), ("published", (-0.2, -0.02)), ("budget", (0.05, 0.3))])
def test_each_rule_keeps_half_and_whom_it_favours(batch, arm, more):
  """Where most are wrong the published rule keeps who promises little, the budget who promises much."""
  rng, chance, q, groups = batch
  kept = [sim.keep(rng, arm, x.astype(np.float32), groups) for x in q]
  assert np.mean(kept) == pytest.approx(0.5, abs=0.02)
  low, high = more
  assert low < np.mean([x[k].mean() - x.mean() for x, k in zip(chance, kept, strict=True)]) < high


def test_a_policy_learns_and_lines_are_written(tmp_path, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["sim_learning", f"--out={tmp_path}", "--seeds=2", "--steps=4"])
  sim.main()
  lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
  assert [(x["arm"], x["baseline"]) for x in lines] == [
    ("plain", "survivors"), ("eight", "survivors"), *((arm, b) for arm in sim.ARMS[2:] for b in ("survivors", "started"))]
  assert all(x["gained"][0] > 0 for x in lines) and (tmp_path / "sim_learning.png").exists()
  assert "--steps=4" in lines[0]["command"] and "minus_plain" not in lines[0] and "minus_plain" in lines[-1]
