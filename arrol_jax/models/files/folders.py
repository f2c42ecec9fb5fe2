"""A model's folder: which of its files count, what stands in them, and how a new one takes an old one's place.

As transformers does, one model.safetensors goes before an index of several files. Left out: downloads, LoRA adapters.
"""

import fnmatch
import json
from pathlib import Path
import re
import shutil

from arrol_jax.models.files import safetensors as safetensors_files
from arrol_jax.models.files.safetensors import Stored
from arrol_jax.types import UserError

INDEX = "model.safetensors.index.json"
HEAD = "quality_head.safetensors"
TEMPLATES = "additional_chat_templates"  # where transformers puts a tokenizer's chat templates beyond the default one
# Files that Policy.save and transformers write. A folder that holds anything else is never replaced.
OURS = ("config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors", INDEX, HEAD,
        "adapter_config.json", "adapter_model.safetensors", "tokenizer*", "special_tokens_map.json", "added_tokens.json",
        "vocab.*", "merges.txt", "chat_template*", f"{TEMPLATES}/*.jinja")


def how_to_fetch(path: str) -> str:
  """What to add to "no such model" where the path may be a name on the Hugging Face hub; "" where it cannot."""
  if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", path) or path.endswith(".gguf"):
    return ""
  return (f". If it is a model's name on the Hugging Face hub, fetch it first: hf download {path} --local-dir models/"
          f"{path.partition('/')[2]}, and give that folder")


def check_is_model(folder: Path) -> None:
  """UserError for a folder or a file that is no whole model."""
  if folder.is_file():
    if folder.suffix in (".safetensors", ".bin", ".pt", ".pth", ".json"):
      raise UserError(f"{folder}: is one file of a model; give the folder that it is in")
  elif (folder / "adapter_config.json").is_file():
    raise UserError(f"{folder}: holds a LoRA adapter (adapter_config.json), and only whole models are read: merge it into its "
                    "base model (PEFT's merge_and_unload, then save_pretrained to a new folder) and give that folder" +
                    f"; {folder.parent}/policy is that of this run" * (folder.parent / "policy/config.json").is_file())


def read_json(file: Path) -> dict:
  if not file.is_file():
    raise UserError(f"{file}: no such file; a Hugging Face folder holds config.json and *.safetensors")
  try:
    value = json.loads(file.read_text())
  except ValueError as e:
    raise UserError(f"{file}: not valid JSON ({str(e).splitlines()[0]})") from e
  if not isinstance(value, dict):
    raise UserError(f"{file}: not a JSON object")
  return value


def open_folder(folder: Path) -> tuple[Path, dict[str, Stored]]:
  """The file that says what there is, and all tensors in the order of the folder's files; only headers are read."""
  index, single = folder / INDEX, folder / "model.safetensors"
  names = _weight_map(index) if index.is_file() else {}
  files = sorted(set(names.values()))
  if single.is_file() and set(files) != {single.name}:
    if files and all((folder / name).is_file() for name in files):
      raise UserError(f"{folder}: holds two models, model.safetensors and the {len(files)} files of {INDEX}; remove the one that "
                      "is not meant")
    return single, safetensors_files.read_header(single)  # an index whose files are gone is of an earlier model
  if single.is_symlink() and not single.exists():
    raise UserError(f"{single}: a link to {single.readlink()}, which is gone; fetch the model again")
  if not names:
    other = next((f.name for p in ("*.bin", "*.pt", "*.pth", "*.gguf", "*.safetensors") for f in sorted(folder.glob(p))
                  if f.is_file()), None)
    raise UserError(f"{folder}: no weights here (model.safetensors or {INDEX}); " + (
      f"{other} is not read: save the model as safetensors (transformers' save_pretrained), or give a .gguf file itself"
      if other else "other formats are not read"))
  stored = {}
  for name in files:
    if not (folder / name).is_file():
      gone = "a link to what is gone" if (folder / name).is_symlink() else "no such file"
      raise UserError(f"{folder / name}: {gone}, but {INDEX} says it holds "
                      f"{next(k for k, v in names.items() if v == name)}; fetch the model again")
    stored |= {k: v for k, v in safetensors_files.read_header(folder / name).items() if names.get(k) == name}
  for tensor, name in names.items():
    if tensor not in stored:
      raise UserError(f"{folder / name}: tensor {tensor} is missing, but {INDEX} says it is there")
  return index, stored


def _weight_map(index: Path) -> dict[str, str]:
  names = read_json(index).get("weight_map")
  if not isinstance(names, dict) or not names or not all(isinstance(x, str) for x in names.values()):
    raise UserError(f"{index}: no weight_map")
  return names


def check_replaceable(target: Path, tokenizer=None) -> None:
  """UserError where `target` holds anything but a model that was saved there, with files that this tokenizer writes."""
  if target.is_dir():
    known = OURS + tuple(getattr(tokenizer, "vocab_files_names", {}).values())
    held = [f.relative_to(target).as_posix() for f in target.rglob("*") if not f.is_dir() or f.name != TEMPLATES]
    other = sorted(name for name in held if not any(fnmatch.fnmatch(name, p) and name.count("/") == p.count("/") for p in known))
    if other:
      raise UserError(f"{target}: holds {other[0]}, which is no part of a saved model; save to a new folder")
  elif target.exists():
    raise UserError(f"{target}: is a file; save to a new folder")


def swap(folder: Path, target: Path) -> None:
  """Renames `folder` to `target`; what was there goes away only once the new one is in its place."""
  if not target.exists():
    folder.rename(target)
    return
  old = target.with_name(f".{target.name}.old")
  shutil.rmtree(old, ignore_errors=True)
  target.rename(old)
  try:
    folder.rename(target)
  except OSError:
    old.rename(target)
    raise
  shutil.rmtree(old, ignore_errors=True)
