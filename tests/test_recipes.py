"""The GSM8K recipes: what they set, and the first one from raw files of the data set to an evaluated policy, on a tiny model."""

import dataclasses
import json
import os
from pathlib import Path
import subprocess
import sys

from helpers_hub import REPOSITORIES, write_repository
import jax
import pytest

from arrol_jax import assemble, config
from arrol_jax.data.problems import Problem, encode_prompts
from arrol_jax.models import transformer
from arrol_jax.models.files import hub
from arrol_jax.models.files.weights import Policy, load_policy
from arrol_jax.models.zoo import ZOO
from arrol_jax.running import shipped

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {"gsm8k_qwen3_06b": "qwen3-0.6b", "gsm8k_qwen25_05b": "qwen2.5-0.5b", "gsm8k_llama32_1b": "llama-3.2-1b"}
# Qwen3's in short: without thinking, the response starts after an empty thought.
TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
            "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  """A folder as the hub has Qwen3's: random weights of 64 wide, a tokenizer of bytes, the chat template."""
  import tokenizers
  from transformers import PreTrainedTokenizerFast

  bytes_only = tokenizers.Tokenizer(tokenizers.models.BPE(
    {c: i for i, c in enumerate(sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()))}, []))
  bytes_only.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  bytes_only.decoder = tokenizers.decoders.ByteLevel()
  tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                      additional_special_tokens=["<|im_start|>"], chat_template=TEMPLATE)
  shape = dataclasses.replace(ZOO["qwen3-0.6b"], vocab=len(tokenizer), width=64, layers=2, heads=4, kv_heads=2, head_dim=16,
                              ffn=96, max_length=1024)
  folder = tmp_path_factory.mktemp("model") / "tiny"
  params = transformer.init_params(shape, jax.random.key(0))
  Policy(shape, params, tokenizer, (tokenizer.eos_token_id,), tokenizer.pad_token_id).save(folder)
  return folder


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_holds_together(name):
  """Its model is known by its id, its shape by its name, thinking is off, and what it expects is said honestly."""
  c, flags = config.parse(["train.py", f"--config={name}"])
  config.check(c, files=False)
  assert flags.workdir == f"runs/{name}" and hub.is_id(c.model.path)
  assert c.model.path.rpartition("/")[2].lower().startswith(RECIPES[name])
  assert c.data.chat and not c.data.thinking and "\\boxed" in c.data.template and c.reward.pattern == "boxed"
  assert c.data.train == "data/gsm8k_train.jsonl" and c.data.eval == "data/gsm8k_test.jsonl"  # where arrol-get puts them
  assert assemble.detect(c)[-1] < c.rollout.max_new and c.rollout.max_prompt + c.rollout.max_new <= 1024
  text = (shipped.CONFIGS / f"{name}.py").read_text()
  assert f"--config={name}\n" in text and "not run" in text and "not measured" in text


def test_from_raw_files_to_an_evaluated_policy(model, tmp_path):
  """In an empty folder: arrol-get --from, arrol-train by the recipe's name, arrol-evaluate of what came of it."""
  write_repository(tmp_path / "raw", REPOSITORIES["openai/gsm8k"])
  small = ["--config=gsm8k_qwen3_06b", *(f"--config.{x}" for x in (
    "steps=2", "rollout.prompts=2", "rollout.group_size=2", "rollout.slots=4", "rollout.row_buckets=1",
    "rollout.length_buckets=1", "rollout.max_new=160", "prune.cold_start=1", "optim.micro_tokens=2048",
    "optim.length_buckets=1", "optim.tail_sizes=0", "eval.every=1", "log.backends=jsonl"))]

  def run(name, *argv):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", f"arrol_jax.{name}", *map(str, argv)], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout

  run("get", "gsm8k", "--from=raw")
  said = run("train", *small, f"--config.model.path={model}")
  assert "held-out accuracy after:  gsm8k_test" in said
  folder = tmp_path / "runs" / "gsm8k_qwen3_06b"
  lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
  assert [x["step"] for x in lines] == [1, 2] and all("held_out_accuracy" in x for x in lines)
  assert load_policy(folder).tokenizer.chat_template == TEMPLATE
  result = json.loads(run("evaluate", *small, f"--config.model.path={folder / 'policy'}").splitlines()[-1])
  assert result["problems"] == 1 and result["benchmark"] == "data/gsm8k_test.jsonl"


def test_thinking_is_off_in_the_prompt(model):
  c, _ = config.parse(["train.py", "--config=gsm8k_qwen3_06b"])
  problems, tokenizer = [Problem("1", "How many?", "72", "s")], load_policy(model).tokenizer
  (prompt,), _ = encode_prompts(problems, tokenizer, c.data.template, c.data.chat, c.rollout.max_prompt, c.data.system,
                                c.data.thinking)
  assert prompt.text.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n") and "How many?\nPlease reason" in prompt.text
