"""A model that does not fit what is asked of it, in every command: too few positions, tokens without an embedding, texts without
an end, prompts that are over before they begin."""

import json
import shutil
from unittest import mock

from helpers_train import QUICKSTART, ROOT, SMALL, arguments, assert_refused, command, in_process
import jax
import pytest
from test_gguf_files import write

from arrol_jax import evaluate, plan, serve
from arrol_jax.models.files.tokenizers import load_tokenizer
from arrol_jax.models.files.weights import load_policy
from arrol_jax.serving import prompts
from arrol_jax.serving.fields import Refused
from arrol_jax.serving.openai_api import Limits
from arrol_jax.types import UserError

SIGNS = ROOT / "experiments/arithmetic/signs"  # 64 positions, 19 tokens: <pad> 16, <bos> 17, <eos> 18
SHORT = {"steps": 1, "data__eval": "", "loss__kl_weight": 0.0, "checkpoint__export": False, "prune__cold_start": 0}


def run(module, *argv):
  """A command in this process: exit status and what it wrote."""
  return in_process(module, QUICKSTART, *(f"--config.{k}={v}" for k, v in SMALL.items()), *argv)


def changed(tmp_path, name="model", **files):
  """A copy of the small model in which JSON files have other keys; None takes a key out."""
  folder = tmp_path / name
  shutil.copytree(SIGNS, folder)
  for file, keys in files.items():
    path = folder / f"{file}.json"
    path.write_text(json.dumps({k: v for k, v in (json.loads(path.read_text()) | keys).items() if v is not None}))
  return folder


def with_token(tmp_path, text="?", index=19):
  """A tokenizer with a token more than the model has rows."""
  folder = changed(tmp_path)
  path = folder / "tokenizer.json"
  raw = json.loads(path.read_text())
  raw["added_tokens"].append(raw["added_tokens"][-1] | {"id": index, "content": text})
  path.write_text(json.dumps(raw))
  return folder


# ---- positions


@pytest.mark.parametrize("overrides", [{"rollout__max_prompt": 17}, {"rollout__max_new": 56}, {"eval__max_new": 49}])
def test_rows_longer_than_the_models_positions_are_not_trained_on(tmp_path, overrides):
  total = 16 + 48 + {"rollout__max_prompt": 1, "rollout__max_new": 8, "eval__max_new": 1}[next(iter(overrides))]
  assert_refused(command(*arguments(tmp_path / "run", **overrides)), "64 positions", f"{total} tokens", "rollout.max_prompt")
  assert not (tmp_path / "run" / "config.json").exists()


def test_an_evaluation_that_does_not_take_place_needs_no_positions(tmp_path):
  assert command(*arguments(tmp_path / "run", **SHORT, eval__max_new=1000)).status == 0


def test_evaluate_serve_and_plan_refuse_them_too():
  more = "--config.eval.max_new=49"
  for module, argv in ((evaluate, [more]), (serve, [more, "--port=0"]),
                       (plan, ["--config.rollout.max_new=56", "--topology=v5e:2x2"]), (plan, [more, "--topology=v5e:2x2"])):
    with mock.patch.object(jax.config, "update"):  # plan.py's, which are for a process of its own
      assert_refused(run(module, *argv), "64 positions")


def test_a_gguf_files_context_length_counts_as_well(tmp_path):
  path = write(tmp_path / "m.gguf", "qwen3_tied", context_length=40)
  assert load_policy(path, longest=40).config.max_length == 40
  with pytest.raises(UserError, match="40 positions.* 41 tokens"):
    load_policy(path, longest=41)


# ---- tokens without an embedding


def test_a_prompt_with_a_token_that_the_model_has_no_row_for_is_refused(tmp_path):
  """Met in the template here; the same tokenizer is fine where no prompt holds that token."""
  model = with_token(tmp_path)
  words = ["'?', id 19", "19 rows", "its prompt holds"]
  template = {"data__template": "{problem}?"}
  assert_refused(command(*arguments(tmp_path / "run", model__path=model, **template)), *words)
  assert_refused(run(evaluate, f"--config.model.path={model}", "--config.data.template={problem}?"), *words)
  assert command(*arguments(tmp_path / "run", **SHORT, model__path=model)).status == 0


@pytest.mark.parametrize("files", [{"generation_config": {"eos_token_id": [18, 19]}}, {"config": {"eos_token_id": 500}}])
def test_a_stop_token_that_the_model_has_no_row_for_is_refused(tmp_path, files):
  model = changed(tmp_path, **files)
  assert_refused(command(*arguments(tmp_path / "run", model__path=model)), "a response may end with", "19 rows")


def test_a_call_with_such_a_token_is_refused(tmp_path):
  """Of a text or of messages; the server goes on."""
  tokenizer = load_tokenizer(with_token(tmp_path))
  tokenizer.chat_template = "{{ messages[0]['content'] }}"
  limits = Limits("m", 16, 8, 4, 19, tokenizer, None, 8, False, False)
  assert prompts.prompts("1+2", limits) == [[1, 10, 2]]
  for ask in (lambda: prompts.prompts("1+?", limits),
              lambda: prompts.chat([{"role": "user", "content": "?"}], limits)):
    with pytest.raises(Refused, match="holds '\\?', which the tokenizer knows as 19") as e:
      ask()
    assert e.value.status == 400


# ---- texts without an end, prompts that are over


def warnings(result):
  assert result.status == 0, result.err
  return [line for line in result.err.splitlines() if line.startswith("warning: ")]


def test_the_shipped_model_is_warned_of_in_nothing(tmp_path):
  assert warnings(command(*arguments(tmp_path / "run", **SHORT))) == []


def test_a_model_without_a_stop_token_is_one_warning(tmp_path):
  without = {"eos_token_id": None}
  model = changed(tmp_path, generation_config=without, config=without, tokenizer_config={"eos_token": None})
  for result in (command(*arguments(tmp_path / "run", **SHORT, model__path=model)),
                 run(evaluate, f"--config.model.path={model}", "--config.eval.samples=1")):
    line, = warnings(result)
    assert "no stop token" in line and "generation_config.json" in line


@pytest.mark.parametrize("template, words", [
  ("{problem}<eos>", ["end with the stop token '<eos>'", "add_eos_token", "data.template"]),
  ("<bos><bos>{problem}", ["begin with '<bos>' twice", "add_bos_token", "data.template"])])
def test_prompts_that_are_over_or_begin_twice_are_one_warning(tmp_path, template, words):
  line, = warnings(command(*arguments(tmp_path / "run", **SHORT, data__template=template)))
  for word in words:
    assert word in line
  line, = warnings(run(evaluate, f"--config.data.template={template}"))
  assert words[0] in line
  assert not warnings(command(*arguments(tmp_path / "other", **SHORT, data__template="<bos>{problem}")))
