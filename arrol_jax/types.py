"""The pytrees and records that travel between modules, and the legend of their axes.

Array axes are capitals: `P` prompts, `G` rollouts per prompt, `B` rows (slots in the engine, sequences in a batch),
`L` prompt length, `T` response length, `S` row length, `V` vocabulary, `D` model width, `N`/`M` query/KV heads,
`H` head dimension, `F` feed-forward width, `Q` calibration bins, `C` detection lengths. Mesh axes are lowercase strings.

Rows are contiguous and right-padded: prompt, then response, then padding.
"""

import dataclasses
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

BINS = 128  # of a calibration table (paper)


class UserError(Exception):
  """A mistake of the user's: its message is one line that says what is wrong and what to do."""


@flax.struct.dataclass
class Batch:
  """One micro-batch of surviving rollouts (batching.py): `I` bins of U tokens, in which a group's prompt stands once, and B rows,
  one a rollout, as attention and the loss see them. Padded rows have response_mask 0 everywhere."""
  tokens: jax.Array            # i32[I,U]
  positions: jax.Array         # i32[I,U]  of each token in its row
  used: jax.Array              # i32[I]    tokens before the padding
  layout: object               # models.sharing.Layout: which token stands where in the rows
  response_mask: jax.Array     # f32[B,S]  1 where the token belongs to the response
  sampler_logprobs: jax.Array  # f32[B,S]  log-prob of the row's token s under the sampler, 0 outside the response
  old_logprobs: jax.Array      # f32[B,S]  the same under the policy that the batch's first step starts from, where it has several
  ref_logprobs: jax.Array      # f32[B,S]  the same under the reference policy (0 where the KL weight is 0)
  advantages: jax.Array        # f32[B]
  weights: jax.Array           # f32[B]    1, or 1 / keep probability at mean 1 (prune.weigh); advantages have it in them


@flax.struct.dataclass
class Examples:
  """What a step's graded survivors teach the quality head: features as the engine took them, one example a decision."""
  features: tuple              # pruning.head.Features, f32[M,...] each
  reward: jax.Array            # f32[M]  in {0, 1}: Rollout.success
  weight: jax.Array            # f32[M]  in the head's loss; 0 for padding


@flax.struct.dataclass
class Calibration:
  """Counts of past rollouts by score bin and success (here: reward 1 or 0) (appendix on online calibration).

  `Calibration()` is the empty table of 128 bins. The fields count rollouts with reward 1 and 0, or sum their
  weights where `update` is given weights. In float32 a bin stops growing by ones at 2^24 (16.7 million).
  """

  positive: jax.Array = flax.struct.field(default_factory=lambda: jnp.zeros(BINS, jnp.float32))  # f32[Q]
  negative: jax.Array = flax.struct.field(default_factory=lambda: jnp.zeros(BINS, jnp.float32))  # f32[Q]

  @classmethod
  def empty(cls, bins=BINS):
    """The empty table with `bins` bins."""
    return cls(positive=jnp.zeros(bins, jnp.float32), negative=jnp.zeros(bins, jnp.float32))


def join(base: dict | None, trained: dict) -> dict:
  """A policy's whole parameters: `trained`, or where there is a frozen base its weights with the adapters `trained` beside them
  (models/lora.py). Nothing is copied."""
  return trained if base is None else base | {"layers": base["layers"] | trained}


@flax.struct.dataclass
class TrainState:
  """All that an update changes; `params` is {"policy": what is trained of it, "head": ...}. `base` alone stays as it is."""
  params: dict
  opt_state: object
  calibration: Calibration     # one table [Q], or [C,Q], one a detection length
  step: jax.Array              # i32[]
  recent: object = None        # what the head's fit remembers: head_training.Recent, or ridge.Ridge; None: nothing
  prompts: object = None       # candidates.PromptModel, None where prompts are not chosen
  base: dict | None = None     # frozen weights beside which params["policy"] are adapters; None: all of the policy is trained

  @property
  def policy(self) -> dict:
    """The policy's whole parameters."""
    return join(self.base, self.params["policy"])

  @property
  def changing(self) -> "TrainState":
    """The state without its frozen part: what is saved, and what an optimizer step may overwrite."""
    return self.replace(base=None)


FAILED = frozenset({"timeout", "crashed", "error"})  # reasons of a reward that speak of the grader, not of the answer


@dataclasses.dataclass
class Rollout:
  """One finished or pruned rollout, on the host."""
  request: int                 # index in the step: prompt * G + member
  prompt: int                  # index of its prompt (group) in the step
  prompt_tokens: np.ndarray    # i32[L]
  tokens: np.ndarray           # i32[T]   response, the stop token included
  logprobs: np.ndarray         # f32[T]   under the policy that drew it
  stopped: bool = False        # ended with a stop token (False: cut by its limit, or pruned)
  pruned: bool = False
  stale: int = 0               # so many of its first tokens were drawn before the last update (rollout.ahead)
  problem: object = None       # data.Problem, where there is one
  scores: tuple = ()           # the head's logit at each detection length reached,
  posteriors: tuple = ()       # what the table made of it,
  keep_probabilities: tuple = ()  # and with which probability it was kept there
  features: tuple = ()         # what the head saw there (pruning.head.Features), where asked for
  final_features: tuple | None = None  # the same at its last token
  confidences: np.ndarray | None = None  # f32[T] DeepConf's token confidence, 0 where Sampling.confidence is off
  keep_probability: float = 1.0             # product of the probabilities p with which it was kept
  rule_probability: float = 1.0              # the same by the rule, where a held-out rollout's keep_probability is 1
  holdout: bool = False             # kept whatever the rule said
  final: float = float("nan")       # the head's logit at its last token, where a head was given
  reward: float = float("nan")      # any finite number; NaN where pruned
  success_at: float = 1.0           # reward.success: the least reward of a success
  reason: str = ""             # what the grader said
  text: str = ""

  @property
  def success(self) -> float:
    """The label of head, tables, votes and accuracy: 1.0 where the reward is at least reward.success, else 0.0, as where it could
    not be graded; NaN where there is no reward. Advantages, and what is reported as a reward, take the reward itself."""
    if math.isnan(self.reward):
      return self.reward
    return float(self.reward >= self.success_at and self.reason not in FAILED)

  @property
  def decided(self) -> bool:
    """Whether it reached a detection length and was scored there."""
    return bool(self.scores)

  @property
  def posterior(self) -> float:
    """q at the last detection length reached, METHOD section 3; NaN if none was."""
    return self.posteriors[-1] if self.posteriors else math.nan

  @property
  def score(self) -> float:
    """The head's logit at the last detection length reached, NaN if none was."""
    return self.scores[-1] if self.scores else float("nan")
