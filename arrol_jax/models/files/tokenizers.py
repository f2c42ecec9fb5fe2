"""Tokenizers: from a Hugging Face folder, or built from a GGUF file's metadata. Also the ids that end a response.

`transformers` builds a tokenizer from GGUF only where torch is installed, and for some models drops the pre-tokenizer
(SmolLM2's single digits), so this module builds it from vocabulary, merges and the name of the pre-tokenizer. The name
is looked up, never guessed: an unknown one is an error. Left out: SentencePiece vocabularies (Llama 2).

`transformers` takes seconds to import, so it is imported where it is needed.
"""

import contextlib
import os
from pathlib import Path
import threading

from arrol_jax.running.imports import without_torch
from arrol_jax.types import UserError

CONTROL, USER_DEFINED = 3, 4  # of tokenizer.ggml.token_type; the other kinds need nothing

# The regular expressions that Qwen2 and Llama 3 publish in tokenizer.json; they differ in how digits are grouped.
_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|%s"
          r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
SPLITS = {"qwen2": _SPLIT % r"\p{N}", "llama-bpe": _SPLIT % r"\p{N}{1,3}"}

# Tokens that end a turn or a document wherever they are control tokens of the vocabulary.
TURN_ENDS = ("<|im_end|>", "<|eot_id|>")
TEXT_ENDS = ("<|endoftext|>", "<|end_of_text|>")


# It would tell every user that PyTorch is missing; read when it is imported.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")


_importing = threading.Lock()  # transformers puts another module in its place meanwhile: two threads must not import it at once


def import_early() -> None:
  """Imports transformers in a thread, while the caller does something else. What is wrong with it is told where it is needed."""
  def work():
    with _importing, without_torch(), contextlib.suppress(Exception):
      from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401
  threading.Thread(target=work, name="import transformers").start()


def load_tokenizer(folder: Path):
  """The tokenizer of a Hugging Face folder, or None where it has none. UserError: one that cannot be read."""
  if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
    return None
  with _importing:
    from transformers import AutoTokenizer
    from transformers.utils import logging
  verbosity = logging.get_verbosity()
  logging.set_verbosity_error()  # it warns of the model's config, which is checked elsewhere
  try:
    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
  except Exception as e:  # the tokenizers package raises bare Exception
    raise UserError(f"{folder}: the tokenizer cannot be loaded ({str(e).splitlines()[0] if str(e) else e!r})") from e
  finally:
    logging.set_verbosity(verbosity)


def gguf_tokenizer(path: Path, meta: dict):
  """A PreTrainedTokenizerFast from GGUF metadata, chat template included; None where the file has no tokenizer.

  UserError: a vocabulary that is not byte-level BPE, an unknown pre-tokenizer.
  """
  if "tokenizer.ggml.tokens" not in meta:
    return None
  model = meta.get("tokenizer.ggml.model")
  if model != "gpt2":
    raise UserError(f"{path}: tokenizer model {model!r} is not supported (only gpt2, byte-level BPE)")
  from tokenizers import AddedToken, Tokenizer, decoders, models
  with _importing:
    from transformers import PreTrainedTokenizerFast

  tokens, kinds = meta["tokenizer.ggml.tokens"], meta.get("tokenizer.ggml.token_type", [])
  pre = meta.get("tokenizer.ggml.pre", "gpt-2")
  merges = [tuple(m.split(" ", 1)) for m in meta.get("tokenizer.ggml.merges", [])]
  vocab = {token: i for i, token in enumerate(tokens)}
  try:
    tokenizer = Tokenizer(models.BPE(vocab, merges, ignore_merges=pre == "llama-bpe"))
  except Exception as e:  # the tokenizers package raises bare Exception
    raise UserError(f"{path}: corrupt tokenizer ({e})") from e
  tokenizer.normalizer, tokenizer.pre_tokenizer = _splitting(path, pre)
  tokenizer.decoder = decoders.ByteLevel()
  for kind, special in ((CONTROL, True), (USER_DEFINED, False)):
    chosen = [t for t, k in zip(tokens, kinds, strict=False) if k == kind]
    tokenizer.add_tokens([AddedToken(t, special=special, normalized=False) for t in chosen])
  named = {}
  for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
    index = meta.get(f"tokenizer.ggml.{key}_token_id")
    if index is not None and index < len(tokens):
      named[f"{name}_token"] = AddedToken(tokens[index], special=True, normalized=False)
  if meta.get("tokenizer.ggml.add_bos_token", pre == "llama-bpe") and "bos_token" in named:
    _prepend(tokenizer, tokens[meta["tokenizer.ggml.bos_token_id"]])
  fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, padding_side="right",
                                 **named)
  fast.chat_template = meta.get("tokenizer.chat_template")
  return fast


def _splitting(path: Path, pre: str):
  """(normalizer or None, pre-tokenizer) by llama.cpp's name of the pre-tokenizer."""
  from tokenizers import Regex, normalizers, pre_tokenizers
  if pre in SPLITS:
    split = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(SPLITS[pre]), "isolated"),
                                     pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return (normalizers.NFC() if pre == "qwen2" else None), split
  gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
  if pre == "smollm":
    return None, pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
  if pre == "gpt-2":
    return None, gpt2
  raise UserError(f"{path}: pre-tokenizer {pre!r} is not known (known: gpt-2, llama-bpe, qwen2, smollm)")


def _prepend(tokenizer, bos: str) -> None:
  from tokenizers import processors
  tokenizer.post_processor = processors.TemplateProcessing(
    single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))])


def stop_ids(tokenizer, *declared) -> tuple[int, ...]:
  """Ids that end a response: those `declared` (int, list or None each), the tokenizer's, and its chat template's.

  The first is the tokenizer's or else the first declared one. A turn end (<|im_end|>, <|eot_id|>) counts where the chat
  template writes it: a file's own eos is often only the end of a document.
  """
  ids = [] if tokenizer is None or tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
  for value in declared:
    ids += value if isinstance(value, (list, tuple)) else [] if value is None else [value]
  if tokenizer is not None:
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    templates = tokenizer.chat_template or ""
    if isinstance(templates, dict):  # several by name: chats take the default one
      templates = templates.get("default") or "".join(templates.values())
    ids += [special[t] for t in TURN_ENDS if t in special and t in templates]
    ids += [special[t] for t in TEXT_ENDS if t in special]
  strange = [repr(i) for i in ids if not isinstance(i, int) or isinstance(i, bool)]  # of generation_config.json
  if strange:
    raise UserError(f"eos_token_id {', '.join(strange)} in the model's files is no token id")
  return tuple(dict.fromkeys(ids))


def check_ids(where: str, tokenizer, ids, vocab: int, what: str) -> None:
  """UserError if one of the token ids has no row in the model's embedding of `vocab` rows; `what` goes before the token."""
  strange = next((int(i) for i in ids if not 0 <= i < vocab), None)
  if strange is not None:
    text = repr(tokenizer.convert_ids_to_tokens(strange)) if tokenizer is not None and strange >= 0 else "token"
    raise UserError(f"{where}: {what} {text}, id {strange}, and the model's embedding has {vocab} rows: the tokenizer is another "
                    "model's, or tokens were added to it and the embedding was not resized")
