"""Rollouts whose tokens name their place, and where `pack` put them."""

import math

import numpy as np

from arrol_jax.types import Rollout


def rollout_of(index, prompt, prompt_length, length, **fields):
  """Tokens that name their place: the group's prompt 1000 * prompt + 1.., response tokens 1000 * index + 501.."""
  if fields.pop("decided", False):
    fields["scores"] = (fields.pop("score", 0.0),)
  fields.pop("score", None)
  logprobs = -0.001 * (1 + np.arange(length, dtype=np.float32))
  return Rollout(index, prompt, 1000 * prompt + 1 + np.arange(prompt_length, dtype=np.int32),
                 1000 * index + 501 + np.arange(length, dtype=np.int32), logprobs, **{"reward": 0.0} | fields)


def rows_of(batch):
  """The tokens of a micro-batch as attention's rows hold them, i32[B,S], -1 where nothing stands."""
  take = np.asarray(batch.layout.take)
  rows = [np.where(at < 0, -1, tokens[at]) for tokens, at in zip(np.asarray(batch.tokens), take, strict=True)]
  return np.reshape(rows, (-1, take.shape[2]))


def found(batches):
  """(batch, row) of every rollout in the batches, by its index."""
  places = {}
  for n, batch in enumerate(batches):
    mask = np.asarray(batch.response_mask)
    for row, tokens in enumerate(rows_of(batch)):
      if mask[row].any():
        index = int(tokens[np.argmax(mask[row])]) // 1000
        assert index not in places, "a rollout is there twice"
        places[index] = n, row
  return places


def some_rollouts(count=23, seed=0):
  """Of 4 groups, prompts of 2 to 6 tokens, responses of 1 to 26, about a third pruned."""
  rng = np.random.default_rng(seed)
  prompts, out = rng.integers(2, 7, 4), []
  for i in range(1, count + 1):
    length, pruned = int(rng.integers(1, 27)), rng.random() < 0.3
    out.append(rollout_of(i, i % 4, int(prompts[i % 4]), 8 if pruned else length, pruned=pruned,
                          decided=pruned or length > 8, reward=math.nan if pruned else float(rng.integers(0, 2))))
  return out
