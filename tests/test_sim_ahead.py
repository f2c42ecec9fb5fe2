"""The simulation of slots where rollouts run ahead (experiments/sim_ahead.py)."""

import numpy as np
import pytest

from experiments import sim_ahead


@pytest.mark.parametrize("most, tokens, steps", [(0, 160, 176), (1, 160, 176), (1, 161, 192)])
def test_equal_lengths_by_hand(monkeypatch, most, tokens, steps):
  """As many slots as rollouts: all begin and end together, ten segments of 16 for 160 tokens, eleven for 161, and one more, which
  is under way when the host sees the end. No slot is left over for the next step before that."""
  monkeypatch.setattr(sim_ahead, "lengths", lambda longest, pruned, count: np.full((count, sim_ahead.ROLLOUTS), tokens))
  assert sim_ahead.decode_steps(tokens, False, most) == steps


@pytest.mark.parametrize("longest, pruned, most", sim_ahead.CASES)
def test_no_step_is_shorter_than_its_tokens_or_its_longest_response_allow(longest, pruned, most):
  tokens = sim_ahead.lengths(longest, pruned, sim_ahead.STEPS)[sim_ahead.SKIP:]
  found = sim_ahead.decode_steps(longest, pruned, most)
  assert found >= tokens.sum(1).mean() / sim_ahead.SLOTS * 0.98 and found >= tokens.max(1).mean() / (most + 1) * 0.98
  assert pruned is False or found < sim_ahead.decode_steps(longest, False, most)
