"""Which of a folder's files make the model, what is refused in a line, and folders that an export replaces."""

import json
from pathlib import Path
import shutil

import jax
import numpy as np
import pytest

from arrol_jax.models.files import folders, safetensors, tokenizers
from arrol_jax.models.files.weights import load_policy
from arrol_jax.types import UserError

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = Path(__file__).parent / "fixtures"
SHARDED, SINGLE = "llama_tied_scaled", "qwen2_tied"
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}"


def copy(name, folder) -> Path:
  return Path(shutil.copytree(FIXTURES / name, folder))


def message(path) -> str:
  with pytest.raises(UserError) as e:
    load_policy(path)
  assert "\n" not in str(e.value)
  return str(e.value)


def same(a, b):
  jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), np.asarray(y)), a, b)


# ---- reading


def test_one_file_goes_before_an_index_whose_files_are_gone(tmp_path):
  folder = copy(SINGLE, tmp_path / "m")
  shutil.copy(FIXTURES / SHARDED / folders.INDEX, folder)
  same(load_policy(folder).params, load_policy(FIXTURES / SINGLE).params)


def test_two_whole_models_in_a_folder_are_refused(tmp_path):
  folder = copy(SHARDED, tmp_path / "m")
  shutil.copy(FIXTURES / SINGLE / "model.safetensors", folder)
  assert "holds two models, model.safetensors and the 4 files of model.safetensors.index.json" in message(folder)
  (folder / "model.safetensors").unlink()
  load_policy(folder)


def test_an_index_of_one_file_is_that_file(tmp_path):
  folder = copy(SINGLE, tmp_path / "m")
  names = dict.fromkeys(safetensors.read_header(folder / "model.safetensors"), "model.safetensors")
  (folder / folders.INDEX).write_text(json.dumps({"weight_map": names}))
  same(load_policy(folder).params, load_policy(FIXTURES / SINGLE).params)


def test_an_unembedding_of_its_own_counts_whatever_the_configuration_says(tmp_path):
  """As in transformers; a copy of the embedding changes nothing."""
  folder = copy("qwen2_untied", tmp_path / "untied")
  said = json.loads((folder / "config.json").read_text())
  (folder / "config.json").write_text(json.dumps(said | {"tie_word_embeddings": True}))
  got = load_policy(folder)
  assert not got.config.tied
  same(got.params, load_policy(FIXTURES / "qwen2_untied").params)
  for factor in (1, 2):
    tied = copy(SINGLE, tmp_path / f"tied{factor}")
    arrays = {name: np.array(x.read()) for name, x in safetensors.read_header(tied / "model.safetensors").items()}
    arrays["lm_head.weight"] = factor * arrays["model.embed_tokens.weight"]
    safetensors.write(tied / "model.safetensors", [(n, a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()])
    assert load_policy(tied).config.tied == (factor == 1)


def test_weights_that_are_links_to_what_is_gone(tmp_path):
  """As in a cache of the hub's whose blobs were removed."""
  weights = copy(SINGLE, tmp_path / "m") / "model.safetensors"
  weights.unlink()
  weights.symlink_to("../blobs/0123")
  assert "model.safetensors: a link to ../blobs/0123, which is gone" in message(weights.parent)
  shard = next(copy(SHARDED, tmp_path / "s").glob("model-*.safetensors"))
  shard.unlink()
  shard.symlink_to("nowhere")
  assert f"{shard.name}: a link to what is gone" in message(shard.parent)


def test_adapters_single_files_and_other_formats_say_what_to_do(tmp_path):
  folder = tmp_path / "lora"
  folder.mkdir()
  (folder / "adapter_config.json").write_text("{}")
  (folder / "adapter_model.safetensors").write_bytes(b"")
  assert "LoRA adapter" in message(folder) and "merge it" in message(folder) and "policy" not in message(folder)
  (tmp_path / "policy").mkdir()
  (tmp_path / "policy/config.json").write_text("{}")
  assert f"{tmp_path}/policy is that of this run" in message(folder)
  shutil.copytree(FIXTURES / SINGLE, folder, dirs_exist_ok=True)  # beside its base model: transformers would add it
  assert "LoRA adapter" in message(folder)
  assert "give the folder that it is in" in message(FIXTURES / SINGLE / "model.safetensors")
  assert "give the folder that it is in" in message(FIXTURES / SINGLE / "config.json")
  other = copy(SINGLE, tmp_path / "bin")
  (other / "model.safetensors").rename(other / "pytorch_model.bin")
  assert "no weights here" in message(other) and "pytorch_model.bin is not read" in message(other)
  (other / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
  assert "is a Git LFS pointer" in message(other) and "git lfs pull" in message(other)


def test_a_name_on_the_hub_says_how_to_fetch_it():
  assert "no such model" in message("Qwen/Qwen3-1.7B")
  assert "hf download Qwen/Qwen3-1.7B --local-dir models/Qwen3-1.7B" in message("Qwen/Qwen3-1.7B")
  for path in ("/no/such", "./no/such", "no/such/model", "such", "no/such.gguf", "../such"):
    assert "hub" not in message(path)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name, tensor", [(SHARDED, "model.layers.1.mlp.up_proj.weight"), (SINGLE, "model.norm.weight"),
                                          (SINGLE, "model.embed_tokens.weight")])
def test_what_is_no_number_in_the_weights_is_named(tmp_path, name, tensor, value):
  folder = copy(name, tmp_path / "m")
  file = next(f for f in folder.glob("*.safetensors") if tensor in safetensors.read_header(f))
  arrays = {n: np.array(t.read()) for n, t in safetensors.read_header(file).items()}
  arrays[tensor].reshape(-1)[-1] = value
  safetensors.write(file, [(n, a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()])
  assert f"{file}: tensor {tensor} holds NaN or infinity; fetch the model again" in message(folder)


def test_a_dtype_too_small_for_the_weights_is_named(tmp_path):
  folder = copy(SINGLE, tmp_path / "m")
  file = folder / "model.safetensors"
  arrays = {n: np.array(t.read()) * 1e6 for n, t in safetensors.read_header(file).items()}
  safetensors.write(file, [(n, a.shape, a.dtype, lambda a=a: a) for n, a in arrays.items()])
  load_policy(folder)
  with pytest.raises(UserError, match="holds NaN or infinity as float16"):
    load_policy(folder, dtype="float16")


# ---- several chat templates


@pytest.fixture
def talkative():
  """A model whose tokenizer has a default chat template and two more."""
  model = load_policy(ROOT / "experiments/arithmetic/signs")
  model.tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>"]})
  model.tokenizer.chat_template = {"default": TEMPLATE, "rag": "{{ messages }}", "tool_use": "{{ tools }}"}
  return model


def test_several_chat_templates_go_out_again_and_again(talkative, tmp_path):
  for _ in range(3):  # into the folder that the last one wrote, also read from there
    talkative.save(tmp_path / "out")
    again = load_policy(tmp_path / "out")
    assert again.tokenizer.chat_template == talkative.tokenizer.chat_template
    talkative.tokenizer = again.tokenizer
  assert (tmp_path / "out" / "additional_chat_templates" / "rag.jinja").is_file()
  talkative.tokenizer.chat_template = TEMPLATE
  talkative.save(tmp_path / "out")
  assert not (tmp_path / "out" / "additional_chat_templates").exists()


def test_other_files_are_never_replaced(talkative, tmp_path):
  talkative.save(tmp_path / "out")
  for name in ("additional_chat_templates/notes.txt", "notes.txt", "mine/config.json", "mine/a.jinja"):
    file = tmp_path / "out" / name
    made = not file.parent.exists()
    file.parent.mkdir(exist_ok=True)
    file.write_text("mine")
    with pytest.raises(UserError, match=name.split("/")[0]):
      talkative.save(tmp_path / "out")
    assert file.read_text() == "mine"
    file.unlink()
    if made:
      file.parent.rmdir()
  talkative.save(tmp_path / "out")


def test_files_that_only_this_tokenizer_writes_are_known(tmp_path):
  class Odd:
    vocab_files_names = {"vocab_file": "spiece.model", "other": "normalizer.json"}
  for name in Odd.vocab_files_names.values():
    (tmp_path / name).write_text("")
  folders.check_replaceable(tmp_path, Odd())
  with pytest.raises(UserError, match="normalizer.json"):
    folders.check_replaceable(tmp_path)


def test_the_default_template_says_what_ends_a_turn(talkative):
  tokenizer = talkative.tokenizer
  end = tokenizer.convert_tokens_to_ids("<|im_end|>")
  assert end in tokenizers.stop_ids(tokenizer)
  tokenizer.chat_template = {"default": "{{ messages }}", "rag": TEMPLATE}
  assert end not in tokenizers.stop_ids(tokenizer)
