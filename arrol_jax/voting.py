"""Test-time voting under its public name, `arrol_jax.voting`; it lives in `arrol_jax.pruning.voting`."""

from arrol_jax.pruning.voting import (
  CONFIDENCES,
  RULES,
  logit_weights,
  rank_weights,
  summarize_confidence,
  trace_confidence,
  trace_weights,
  vote,
)

__all__ = ["CONFIDENCES", "RULES", "logit_weights", "rank_weights", "summarize_confidence", "trace_confidence", "trace_weights",
           "vote"]
