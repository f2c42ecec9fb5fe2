"""The pytrees and records that travel between modules, and the legend of their axes.

Array axes are capitals: `P` prompts, `G` rollouts per prompt, `B` rows (slots in the engine, sequences in a batch),
`L` prompt length, `T` response length, `S` row length, `V` vocabulary, `D` model width, `N`/`M` query/KV heads,
`H` head dimension, `F` feed-forward width, `Q` calibration bins. Mesh axes are lowercase strings.

Rows are contiguous and right-padded: prompt, then response, then padding.
"""

import dataclasses

import flax.struct
import jax
import numpy as np


class UserError(Exception):
  """A mistake of the user's: its message is one line that says what is wrong and what to do."""


@flax.struct.dataclass
class Batch:
  """One micro-batch of surviving rollouts; padded rows have response_mask 0 everywhere."""
  tokens: jax.Array            # i32[B,S]
  response_mask: jax.Array     # f32[B,S]  1 where the token belongs to the response
  sampler_logprobs: jax.Array  # f32[B,S]  log-prob of tokens[b,s] under the sampler, 0 outside the response
  old_logprobs: jax.Array      # f32[B,S]  the same under the policy that the update starts from
  ref_logprobs: jax.Array      # f32[B,S]  the same under the reference policy (0 where the KL weight is 0)
  advantages: jax.Array        # f32[B]
  rewards: jax.Array           # f32[B]    in {0, 1}
  head_position: jax.Array     # i32[B]    position whose hidden state the quality head reads
  head_weight: jax.Array       # f32[B]    weight in the head loss; 0 for rows that give it no example


@flax.struct.dataclass
class TrainState:
  """All that an update changes; `params` is {"policy": ..., "head": ...}."""
  params: dict
  opt_state: object
  calibration: object          # prune.Calibration
  step: jax.Array              # i32[]


@dataclasses.dataclass
class Rollout:
  """One finished or pruned rollout, on the host."""
  request: int                 # index in the step: prompt * G + member
  prompt: int                  # index of its prompt (group) in the step
  prompt_tokens: np.ndarray    # i32[L]
  tokens: np.ndarray           # i32[T]   response, the stop token included
  logprobs: np.ndarray         # f32[T]
  stopped: bool = False        # ended with a stop token (False: cut by its limit, or pruned)
  pruned: bool = False
  decided: bool = False        # reached the detection length and was scored there
  score: float = float("nan")       # the head's logit at detection
  posterior: float = float("nan")   # q, METHOD section 3
  survival: float = 1.0             # p, the probability with which it was kept
  reward: float = float("nan")      # NaN where pruned
  reason: str = ""             # what the grader said
  text: str = ""
