"""Tokenizers built from GGUF metadata: pre-tokenizers by hand on tiny vocabularies, special tokens, round trips."""

import json
from pathlib import Path

import pytest

from arrol_jax.models.files import tokenizers
from arrol_jax.models.files.weights import load_policy
from arrol_jax.types import UserError

FIXTURES = Path(__file__).parent / "fixtures"
PATH = Path("m.gguf")
MERGES = ["1 2", "12 3", "123 4", "a b", "Ġ a", "Ġa b"]
TEMPLATE = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}" \
           "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def meta(pre, **changes):
  """Metadata of a byte-level vocabulary with a few merges, three control tokens and one user-defined token."""
  from tokenizers.pre_tokenizers import ByteLevel
  normal = sorted(ByteLevel.alphabet()) + [m.replace(" ", "") for m in MERGES]
  tokens = normal + ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>"]
  return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre, "tokenizer.ggml.tokens": tokens,
          "tokenizer.ggml.token_type": [1] * len(normal) + [3, 3, 3, 4], "tokenizer.ggml.merges": MERGES,
          "tokenizer.ggml.eos_token_id": len(normal), "tokenizer.ggml.bos_token_id": len(normal),
          "tokenizer.ggml.padding_token_id": len(normal), "tokenizer.chat_template": TEMPLATE} | changes


def pieces(pre, text, **changes):
  tokenizer = tokenizers.gguf_tokenizer(PATH, meta(pre, **changes))
  ids = tokenizer(text)["input_ids"]
  assert tokenizer.decode(ids, skip_special_tokens=True) == text
  return tokenizer.convert_ids_to_tokens(ids)


@pytest.mark.parametrize("pre, want", [
  ("gpt-2", ["Ġ", "ab", "Ġ", "1234"]),               # digits together
  ("smollm", ["Ġ", "ab", "Ġ", "1", "2", "3", "4"]),  # digits one by one
  ("qwen2", ["Ġ", "ab", "Ġ", "1", "2", "3", "4"]),   # digits one by one
  # Digits by threes, a beginning of text, and a piece that is a token is taken whole, whatever merge comes first.
  ("llama-bpe", ["<|endoftext|>", "Ġab", "Ġ", "123", "4"]),
])
def test_pre_tokenizers(pre, want):
  assert pieces(pre, " ab 1234") == want


def test_line_ends_join_what_is_before_them_in_the_newer_splits():
  assert pieces("qwen2", "a!\n\nb") == ["a", "!", "Ċ", "Ċ", "b"]
  extra = {"tokenizer.ggml.merges": ["! Ċ", "Ċ Ċ"]}
  base = meta("qwen2")
  tokens, kinds = base["tokenizer.ggml.tokens"] + ["!Ċ", "ĊĊ"], base["tokenizer.ggml.token_type"] + [1, 1]
  extra |= {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
  assert pieces("qwen2", "!\n", **extra) == ["!Ċ"]     # [punctuation][\r\n]* is one piece
  assert pieces("gpt-2", "!\n", **extra) == ["!", "Ċ"]


def test_a_beginning_of_text_is_added_only_where_the_file_says_so():
  assert pieces("qwen2", "ab", **{"tokenizer.ggml.add_bos_token": True}) == ["<|endoftext|>", "ab"]
  assert pieces("llama-bpe", "ab", **{"tokenizer.ggml.add_bos_token": False}) == ["ab"]


def test_special_tokens_and_chat_template():
  tokenizer = tokenizers.gguf_tokenizer(PATH, meta("qwen2"))
  end, stop, think = (tokenizer.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_end|>", "<think>"))
  assert (tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id) == (end, end, end)
  assert tokenizer("<think><|im_end|>")["input_ids"] == [think, stop]
  assert tokenizer.decode([think, stop], skip_special_tokens=True) == "<think>"  # user-defined: text; control: not
  chat = tokenizer.apply_chat_template([{"role": "a", "content": "b"}], add_generation_prompt=True, tokenize=False)
  assert chat == "<|im_start|>a\nb<|im_end|>\n<|im_start|>assistant\n"
  assert tokenizers.stop_ids(tokenizer) == (end, stop)  # the template's end of turn counts, although eos is another
  assert tokenizers.stop_ids(tokenizer, [7, end], None, 9) == (end, 7, 9, stop)
  tokenizer.chat_template = None
  assert tokenizers.stop_ids(tokenizer) == (end,)
  assert tokenizers.stop_ids(None, [3, 5], None, 3) == (3, 5) and tokenizers.stop_ids(None) == ()


def test_no_tokenizer_and_unknown_ones():
  assert tokenizers.gguf_tokenizer(PATH, {}) is None
  assert tokenizers.load_tokenizer(FIXTURES / "qwen3_tied") is None
  for changes, text in (({"tokenizer.ggml.model": "llama"}, "tokenizer model 'llama' is not supported"),
                        ({"tokenizer.ggml.pre": "default"}, "pre-tokenizer 'default' is not known"),
                        ({"tokenizer.ggml.merges": ["no such"]}, "corrupt tokenizer")):
    with pytest.raises(UserError, match=text) as e:
      tokenizers.gguf_tokenizer(PATH, meta("gpt-2") | changes)
    assert "\n" not in str(e.value) and "m.gguf" in str(e.value)


def test_a_broken_tokenizer_file_is_one_line(tmp_path):
  (tmp_path / "tokenizer.json").write_text("{}")
  (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
  with pytest.raises(UserError, match="tokenizer cannot be loaded") as e:
    tokenizers.load_tokenizer(tmp_path)
  assert "\n" not in str(e.value)


@pytest.mark.parametrize("name, pre", [
  ("llama_untied", "smollm"), ("qwen2_tied", "qwen2"), ("llama_untied", "llama-bpe")])
def test_tokenizer_goes_out_and_comes_back_with_the_model(name, pre, tmp_path):
  model = load_policy(FIXTURES / name)
  model.tokenizer = tokenizers.gguf_tokenizer(PATH, meta(pre))
  model.eos_ids = tokenizers.stop_ids(model.tokenizer)
  model.save(tmp_path / "out")
  again = load_policy(tmp_path / "out")
  text = "ab ab\n\n 1234 <|im_end|> <think>é it's"
  assert again.tokenizer(text)["input_ids"] == model.tokenizer(text)["input_ids"]
  assert again.tokenizer.chat_template == TEMPLATE and again.eos_ids == model.eos_ids
  assert again.pad_id == again.tokenizer.pad_token_id == model.tokenizer.pad_token_id
  model.save(tmp_path / "out")  # a folder with tokenizer files is replaceable
