"""The examples of docs/extending.md do what is said of them."""

import importlib
import json
from pathlib import Path
import re
import shutil
import sys

from helpers_train import FAST, arguments, command
import jax.numpy as jnp
import numpy as np
import pytest

from arrol_jax import load_policy, train
from arrol_jax.models import transformer
from arrol_jax.models.attention import causal_attention
from arrol_jax.models.files import hf_config
from arrol_jax.pruning.own_rule import own_rule
from arrol_jax.types import UserError

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs/extending.md").read_text()


def block(section):
  return re.search(r"```python\n(.*?)```", TEXT.partition(f"## {section}\n")[2], re.DOTALL)[1]


@pytest.fixture(scope="module", autouse=True)
def modules(tmp_path_factory):
  """The code blocks as modules that can be imported."""
  folder = tmp_path_factory.mktemp("mine")
  for name, section in (("my_rewards", "A reward"), ("my_rules", "A rule")):
    (folder / f"{name}.py").write_text(block(section))
  sys.path.insert(0, str(folder))
  yield
  sys.path.remove(str(folder))


@pytest.mark.parametrize("response, reward", [("A5", 1.0), (f"{'x' * 1000} A5", 0.8), ("A6", 0.0), (f"{'x' * 1000} A6", 0.0)])
def test_the_reward(response, reward):
  assert importlib.import_module("my_rewards").brief(response, "5", r"A(-?\d+)$") == reward


def test_the_rule():
  """Doubt q (1 - q) is 0.25 at 1/2, 0.09 at 0.1 and 0.9: around its mean over who decides, 0.17, and kappa; then the limits."""
  unsure = importlib.import_module("my_rules").unsure
  q, decided = np.array([0.5, 0.1, 0.9, 0.5, 0.7], np.float32), np.arange(5) < 4
  keep = lambda **limits: np.asarray(unsure(q, np.zeros(5, np.int32), decided, kappa=0.5, **limits))[:4]
  np.testing.assert_allclose(keep(p_min=0.1, p_max=0.9), [0.58, 0.42, 0.42, 0.58], atol=1e-6)
  np.testing.assert_allclose(keep(p_min=0.45, p_max=0.55), [0.55, 0.45, 0.45, 0.55], atol=1e-6)


def test_the_rule_prunes_a_run(tmp_path, monkeypatch):
  """Its probabilities are those that the run drew with: of one decision, between the limits and about kappa."""
  monkeypatch.setattr(sys, "argv", ["train", "--config=configs/quickstart.py", f"--workdir={tmp_path}", "--config.steps=2", *(
    f"--config.{x}" for x in ("prune.rule=my_rules.unsure", "prune.p_min=0.3", "prune.p_max=0.7", "prune.cold_start=1",
                              "data.eval=", "rollout.prompts=4", "rollout.group_size=8", "log.rollouts=32",
                              "checkpoint.export=False"))])
  monkeypatch.chdir(ROOT)
  train.main()
  lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
  p = [x["survival"] for x in lines if x["step"] == 2 and x["posterior"] is not None and x["survival"] < 1]
  assert p and all(0.3 - 1e-6 <= x <= 0.7 + 1e-6 for x in p) and abs(np.mean(p) - 0.5) < 0.1
  assert any(x["pruned"] for x in lines if x["step"] == 2)


@pytest.mark.parametrize("rule, words", [("my_rules.nothing", "cannot be imported"), ("not_there.rule", "cannot be imported"),
                                         ("math.sqrt", "failed under jit"), ("json.dumps", "failed under jit"),
                                         ("unsure", "or MODULE.FUNCTION")])
def test_a_rule_that_is_none_is_refused_in_one_line(rule, words):
  from arrol_jax import config
  c, _ = config.parse(["prog", "--config=configs/quickstart.py", f"--config.prune.rule={rule}"])
  with pytest.raises(UserError, match=words) as e:
    config.check(c)
  assert "\n" not in str(e.value)


@pytest.mark.parametrize("text, words", [("undefined_name\n", "NameError: name 'undefined_name'"),
                                         ("import sys\nsys.exit('needs a GPU')\n", "cannot be imported: SystemExit: needs a GPU"),
                                         ("open('not there')\n", "cannot be imported: FileNotFoundError")])
def test_a_rule_whose_module_fails_is_one_line(tmp_path, monkeypatch, text, words):
  from arrol_jax import config
  (tmp_path / "fails.py").write_text(text)
  monkeypatch.syspath_prepend(tmp_path)
  sys.modules.pop("fails", None)
  c, _ = config.parse(["prog", "--config=configs/quickstart.py", "--config.prune.rule=fails.f"])
  with pytest.raises(UserError, match=words):
    config.check(c)
  config.check(c, training=False)  # who evaluates, serves or chats prunes nothing
  for name in (".unsure", "./my_rules.unsure", "...f"):
    c.prune.rule = name
    with pytest.raises(UserError, match="prune.rule: "):
      config.check(c)


@pytest.mark.parametrize("body, words", [
  ("return jnp.full(8, kappa)", r"my_sizes.rule must give a number for each of f32\[16\] posteriors, and gave f32\[8\]"),
  ("return q if len(q) == 8 else kappa", r"for each of f32\[16\] posteriors, and gave f32\[\]"),
  ("return q + jnp.zeros(8)", "failed under jit on 16 rows: .*shapes")])
def test_a_rule_for_eight_rows_alone_is_one_line(tmp_path, monkeypatch, body, words):
  """Eight are what it is asked about before anything is loaded."""
  (tmp_path / "my_sizes.py").write_text(
    f"import jax.numpy as jnp\ndef rule(q, group, decided, *, kappa, p_min, p_max):\n  {body}\n")
  monkeypatch.syspath_prepend(tmp_path)
  sys.modules.pop("my_sizes", None)
  own_rule.cache_clear()
  said = command(*arguments(tmp_path / "run", prune__rule="my_sizes.rule", **FAST))
  line = said.err.splitlines()[-1]
  assert said.status == 2 and line.startswith("error: prune.rule: ") and re.search(words, line) and "Traceback" not in said.err


def test_a_rule_that_gives_no_number_keeps_such_rows_with_kappa(tmp_path, monkeypatch):
  """A z-score within the group is NaN where all posteriors are equal."""
  (tmp_path / "scores.py").write_text("""
import jax.numpy as jnp

def by_group(q, group, decided, *, kappa, p_min, p_max):
  same = (group[:, None] == group[None, :]) & decided[None, :]
  mean = jnp.sum(jnp.where(same, q[None, :], 0.0), 1) / jnp.sum(same, 1)
  deviation = jnp.sqrt(jnp.sum(jnp.where(same, (q[None, :] - mean[:, None]) ** 2, 0.0), 1) / jnp.sum(same, 1))
  return kappa + 0.2 * (q - mean) / deviation
""")
  monkeypatch.syspath_prepend(tmp_path)
  rule = own_rule("scores.by_group")
  p = rule(jnp.array([0.2, 0.6, 0.3, 0.3]), jnp.array([0, 0, 1, 1]), jnp.ones(4, bool), kappa=0.5, p_min=0.1, p_max=0.9)
  np.testing.assert_allclose(p, [0.3, 0.7, 0.5, 0.5], atol=1e-6)


def test_the_model(tmp_path, monkeypatch):
  """A Mistral without a sliding window is a Llama by another name; with one it is refused."""
  folder = tmp_path / "tiny"
  shutil.copytree(ROOT / "tests/fixtures/llama_untied", folder)
  raw = json.loads((folder / "config.json").read_text())
  plain = load_policy(folder)
  (folder / "config.json").write_text(json.dumps(raw | {"model_type": "mistral", "sliding_window": None}))
  with pytest.raises(UserError, match="model_type 'mistral' is not supported"):
    load_policy(folder)
  monkeypatch.setattr(hf_config, "FAMILIES", dict(hf_config.FAMILIES))
  exec(block("A model"), {})
  named = load_policy(folder)
  assert named.config.family == "mistral"
  tokens = np.array([[1, 5, 3, 2]], np.int32)
  logits = lambda policy: np.asarray(transformer.unembed(policy.params, transformer.forward(
    policy.config, policy.params, tokens, transformer.default_positions(tokens), causal_attention("xla"))[0]))
  np.testing.assert_array_equal(logits(named), logits(plain))
  named.save(tmp_path / "saved")
  assert json.loads((tmp_path / "saved/config.json").read_text())["architectures"] == ["MistralForCausalLM"]
  (folder / "config.json").write_text(json.dumps(raw | {"model_type": "mistral", "sliding_window": 4096}))
  with pytest.raises(UserError, match="sliding_window is set"):
    load_policy(folder)
