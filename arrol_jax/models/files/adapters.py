"""Adapters (models/lora.py) as a folder that the `peft` library loads: adapter_config.json and adapter_model.safetensors.

There A is stored as [R, inputs] and B as [outputs, R], in float32, under the names of Hugging Face's matrices. Left out: reading
such a folder; `Policy.save` writes the merged model, which everything reads.
"""

import json
import os
from pathlib import Path
import shutil
import tempfile

import jax
from jax.sharding import NamedSharding, PartitionSpec
import numpy as np

from arrol_jax.models import lora
from arrol_jax.models.files import folders, hf_config, safetensors
from arrol_jax.models.transformer import PolicyConfig


def save(path: str | os.PathLike, config: PolicyConfig, adapters: dict, base: str) -> None:
  """Writes the adapters {NAME_lora_a: [layers, inputs, R], NAME_lora_b: [layers, R, outputs]} of `config.lora`.

  base: name or path of the model that they belong to, for adapter_config.json. An existing folder of adapters is replaced once
  the new one is whole. With several processes all must call; the first writes. UserError: `path` holds other files.
  """
  target = Path(path).resolve()
  folders.check_replaceable(target)
  tensors = [(name, x.shape, x.dtype, lambda x=x: x) for name, x in _tensors(config, _whole(adapters)).items()]
  if jax.process_index() != 0:
    return
  target.parent.mkdir(parents=True, exist_ok=True)
  folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
  try:
    folder.chmod(0o755)  # mkdtemp makes it private
    (folder / "adapter_config.json").write_text(json.dumps(_about(config.lora, base), indent=2, sort_keys=True) + "\n")
    safetensors.write(folder / "adapter_model.safetensors", tensors)
    folders.swap(folder, target)
  finally:
    shutil.rmtree(folder, ignore_errors=True)


def _whole(adapters: dict) -> dict:
  """All of them on the host, of every process."""
  def whole(x):
    if isinstance(x.sharding, NamedSharding):
      x = jax.jit(lambda x: x, out_shardings=NamedSharding(x.sharding.mesh, PartitionSpec()))(x)
    return np.asarray(x, np.float32)
  return {name: whole(x) for name, x in adapters.items()}


def _tensors(config: PolicyConfig, adapters: dict) -> dict:
  """PEFT's name -> array."""
  out, rank = {}, config.lora.rank
  for layer in range(config.layers):
    for matrix in config.lora.targets:
      a, b = (adapters[name][layer] for name in lora.names(matrix))
      name = f"base_model.model.model.layers.{layer}.{hf_config.LAYER[matrix][0].removesuffix('.weight')}"
      out[f"{name}.lora_A.weight"] = a.reshape(-1, rank).T
      out[f"{name}.lora_B.weight"] = b.reshape(rank, -1).T
  return out


def _about(one: lora.Lora, base: str) -> dict:
  modules = [hf_config.LAYER[matrix][0].split(".")[1] for matrix in one.targets]
  return {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": one.rank, "lora_alpha": one.alpha,
          "target_modules": modules, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
          "use_rslora": False, "use_dora": False, "modules_to_save": None, "init_lora_weights": True}
