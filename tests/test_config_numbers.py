"""Every numeric key of the config, whichever there are: NaN, infinities, negative numbers and nonsense are one line."""

import math
from pathlib import Path

from ml_collections import ConfigDict
import numpy as np
import pytest

from arrol_jax import config, config_ranges
from arrol_jax.types import UserError
from configs import base, quickstart

ROOT = Path(__file__).resolve().parents[1]


def numeric(c, prefix=""):
  """{name: type} of all whole and real numbers, those that are None by default among them."""
  out = {}
  for name in c:
    if isinstance(c[name], ConfigDict):
      out |= numeric(c[name], f"{prefix}{name}.")
    elif c.get_type(name) in (int, float):
      out[prefix + name] = c.get_type(name)
  return out


NAMES = numeric(base.get_config())
MAY_BE_NEGATIVE = {"prune.strength", "reward.success"}
OPTIONAL = {name for name in NAMES if config_ranges.value_of(base.get_config(), name) is None}


def refused(name, value, **others):
  """The message where the quickstart with this value is refused; fails where it is not."""
  c = quickstart.get_config()
  for key, x in {name: value, **others}.items():
    section, _, last = key.rpartition(".")
    (config_ranges.value_of(c, section) if section else c)[last] = x
  with pytest.raises(UserError) as e:
    config.check(c, files=False)
  assert "\n" not in str(e.value)
  return str(e.value)


def test_there_are_as_many_as_there_were():
  some = {"quality.weight_decay", "rollout.temperature", "reward.timeout", "steps", "loss.overlong"}
  assert len(NAMES) > 65 and some <= set(NAMES)


def test_a_number_of_numpy_has_a_range_too():
  config_ranges._in_range(ConfigDict({"lr": np.float64(1e-5)}), "lr", 0, 3e38, False)
  with pytest.raises(UserError, match="lr is -1.0; it must be a finite number at least 0$"):
    config_ranges._in_range(ConfigDict({"lr": np.float64(-1)}), "lr", 0, 3e38, False)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39])
@pytest.mark.parametrize("name", [name for name, kind in NAMES.items() if kind is float])
def test_a_real_number_is_finite(name, value):
  assert f"{value}" in refused(name, value) and name.rpartition(".")[2] in refused(name, value)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in MAY_BE_NEGATIVE])
def test_numbers_have_a_sense(name):
  """Not below 0; a whole number neither beyond 32 bits nor True."""
  for value in (-1, -(10**12), 10**12, True) if NAMES[name] is int else (-1.0, -1e-9, -1e30):
    assert name.rpartition(".")[2] in refused(name, value)


@pytest.mark.parametrize("name", sorted(set(NAMES) - OPTIONAL))
def test_none_is_no_number_unless_it_means_off(name):
  refused(name, None)


@pytest.mark.parametrize("name, value, words", [
  ("quality.weight_decay", -1.0, "quality.weight_decay is -1.0; it must be a finite number at least 0"),
  ("rollout.temperature", math.inf, "rollout.temperature is inf; it must be a finite number above 0 and at most 100"),
  ("reward.timeout", math.nan, "reward.timeout is nan; it must be a finite number above 0 and at most 86400"),
  ("rollout.temperature", 1e-30, "must be at least 0.0001"), ("eval.temperature", 1e-30, "must be at least 0.0001"),
  ("prune.half_life", math.inf, "prune.half_life is inf"), ("rollout.group_size", 1, "at least 2"),
  ("optim.b2", 1 - 1e-9, "optim.b2"), ("reward.success", 0.0, "without reward.function"),
  ("reward.success", 1.5, "without reward.function"), ("reward.success", math.nan, "reward.success is nan"),
  ("seed", 2**31, "at most 2147483647"), ("rollout.prompts", 10**6, "at most 4194304 rollouts a step"),
  ("rollout.slots", 2**31 - 1, "at most 4194304"), ("prune.weigh", (["policy"],), "what it lists must be texts or numbers"),
  ("quality.inputs", ({},), "quality.inputs is"), ("prune.detect", (True, 16), "texts or numbers"),
  ("model.lora.targets", (("q",),), "model.lora.targets is")])
def test_the_message_says_what_would_be_right(name, value, words):
  assert words in refused(name, value)


def test_a_depth_that_is_none_is_refused():
  for value in ("5/2", "x", "0", "1/0"):
    assert "rollout.candidate_layer" in refused("rollout.candidate_layer", value)


def test_shipped_configs_and_the_ends_of_ranges_are_fine():
  for path in sorted((ROOT / "configs").glob("*.py")):
    if path.stem not in ("__init__", "templates"):
      c, _ = config.parse(["x", f"--config={path}"])
      config.check(c, files=False)
  c = quickstart.get_config()
  c.eval.temperature, c.prune.strength, c.optim.b1, c.optim.tail_sizes, c.eval.stop_below = 0.0, -2.0, 0.0, 0, 1.0
  c.reward.function, c.reward.success = "some.function", -0.5
  config.check(c, files=False)
