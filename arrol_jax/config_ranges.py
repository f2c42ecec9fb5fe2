"""The numbers that a config may hold, key by key."""

import functools
import math

from ml_collections import ConfigDict

from arrol_jax.types import UserError

_WHOLE, _REAL = 2**31 - 1, 3e38  # the largest of int32 and, about, of float32
_MANY = 2**22  # rollouts, or tokens at a time: no machine holds more
# Every numeric key's smallest and largest value (_ABOVE: the smallest is too small itself). NaN lies in no range.
_RANGES = [
  (1, _WHOLE, "steps rollout.max_prompt rollout.max_new rollout.top_k rollout.resampling rollout.segment quality.passes "
              "optim.epochs optim.minibatches checkpoint.every checkpoint.keep eval.samples eval.window eval.every eval.subset "
              "mesh.data mesh.fsdp mesh.tensor"),
  (1, _MANY, "rollout.prompts rollout.candidates rollout.slots quality.buffer optim.micro_tokens optim.chunk_tokens"),
  (0, _WHOLE, "seed prune.cold_start prune.floor optim.warmup eval.problems eval.max_new eval.sampled log.rollouts"),
  (0, 16, "rollout.ahead"),
  (1, 64, "rollout.row_buckets rollout.length_buckets optim.length_buckets"),
  (1, 2**16, "prune.bins quality.hidden"), (1, 2**10, "reward.workers"), (1, 2**24, "reward.memory"), (0, 2, "optim.tail_sizes"),
  (0, 2**10, "model.lora.rank"),
  (0, 1, "rollout.explore prune.target prune.holdout loss.overlong eval.stop_below"),
  (0, _REAL, "optim.lr optim.head_lr optim.weight_decay quality.weight_decay loss.clip_low loss.clip_high loss.kl_weight "
             "loss.head_weight"),
  (0, 1 - 1e-5, "optim.b1 optim.b2"),  # nearer to 1 is 1 in float32, and divides by 0
  (-1e6, 1e6, "prune.strength"), (0, 100, "eval.temperature"),
  (-_REAL, _REAL, "reward.success prune.keep prune.p_min prune.p_max"),  # config.py says more of the last
]
_ABOVE = [
  (0, 1, "rollout.top_p rollout.min_p learn.keep"), (0, 100, "rollout.temperature"), (0, 2**16, "model.lora.alpha"),
  (0, 86400, "reward.timeout"),
  (0, _REAL, "prune.half_life quality.half_life quality.strength loss.correction_cap optim.clip_norm stop_seconds"),
]
_MAY_BE_NONE = """rollout.candidates rollout.slots rollout.top_k rollout.top_p rollout.min_p prune.half_life quality.half_life
  quality.buffer loss.clip_low loss.clip_high loss.overlong loss.kl_weight loss.head_weight eval.every eval.stop_below
  stop_seconds""".split()


def check_ranges(c: ConfigDict) -> None:
  """Numbers that would train the wrong way, or not at all, without a word; lists of what is neither text nor number."""
  _check_lists(c)
  _in_range(c, "rollout.group_size", 2, 4096, False)  # advantages are taken within a group
  for table, above in ((_RANGES, False), (_ABOVE, True)):
    for least, most, names in table:
      for name in names.split():
        _in_range(c, name, least, most, above)
  for name in ("rollout.temperature", "eval.temperature"):  # logits are divided by it
    need(value_of(c, name) == 0 or value_of(c, name) >= 1e-4, f"{name} is {value_of(c, name)}; it must be at least 0.0001")
  need(c.rollout.prompts * c.rollout.group_size <= _MANY, f"rollout.prompts is {c.rollout.prompts} and rollout.group_size "
       f"{c.rollout.group_size}; together they must be at most {_MANY} rollouts a step")
  need(c.optim.minibatches <= c.rollout.prompts, f"optim.minibatches is {c.optim.minibatches}; a minibatch holds whole groups, "
       f"of which a step has rollout.prompts ({c.rollout.prompts})")
  cap = c.loss.correction_cap
  need(c.loss.correction != "mask" or cap > 1, f"loss.correction_cap is {cap}; with loss.correction=mask it must be above 1, as "
       "a row whose ratio is above it teaches nothing, and ratios lie around 1")
  r = c.reward
  need(r.function is not None or 0 < r.success <= 1, f"reward.success is {r.success}; without reward.function rewards are 0 and "
       "1, so it must lie above 0 and be at most 1")


def _check_lists(c: ConfigDict, prefix: str = "") -> None:
  for name, value in c.items():
    if isinstance(value, ConfigDict):
      _check_lists(value, f"{prefix}{name}.")
    elif isinstance(value, tuple | list):
      need(all(isinstance(x, str | int | float) and not isinstance(x, bool) for x in value),
           f"{prefix}{name} is {value}; what it lists must be texts or numbers")


def value_of(c: ConfigDict, name: str):
  return functools.reduce(getattr, name.split("."), c)


def _in_range(c: ConfigDict, name: str, least: float, most: float, above: bool) -> None:
  value = value_of(c, name)
  if value is None and name in _MAY_BE_NONE:
    return
  number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
  fits = number and (least < value if above else least <= value) and value <= most
  high = most < _WHOLE or bool(number and value > most)  # of NumPy's numbers, which no list is multiplied by
  ends = [f"{'above' if above else 'at least'} {least}"] * (least > -_REAL) + [f"at most {most}"] * high
  need(fits, f"{name} is {value}; it must be a finite number {' and '.join(ends)}".rstrip())


def need(ok: bool, text: str) -> None:
  if not ok:
    raise UserError(text)
