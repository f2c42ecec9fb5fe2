"""Makes tests/fixtures: tiny random models as transformers saves them, and the logits that it computes with them.

  python tests/make_fixtures.py      # needs torch and transformers; the tests that read the fixtures need neither

Each folder is what `save_pretrained` writes, plus expected.npz: tokens i32[B,S], lengths i32[B], logits f32[B,S,V]
(float32, CPU, 0 past a row's length). Sizes are odd on purpose: head_dim is not width / heads, fewer KV heads than
heads, several files.
"""

from pathlib import Path
import shutil

import numpy as np
import torch
import transformers

OUT = Path(__file__).parent / "fixtures"
SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 28, "vocab_size": 37,
         "max_position_embeddings": 128}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 16, "rope_theta": 500.0}
MODELS = {
  "qwen3_tied": ("Qwen3", dict(num_attention_heads=4, num_key_value_heads=2, head_dim=10, tie_word_embeddings=True,
                               rope_parameters={"rope_type": "default", "rope_theta": 1e4}), 15_000),
  "qwen3_untied": ("Qwen3", dict(num_attention_heads=3, num_key_value_heads=1, head_dim=12, tie_word_embeddings=False,
                                 eos_token_id=[3, 5], pad_token_id=1), 10**9),
  "qwen2_untied": ("Qwen2", dict(num_attention_heads=6, num_key_value_heads=2, head_dim=8, tie_word_embeddings=False,
                                 rope_parameters={"rope_type": "default", "rope_theta": 1e6}), 12_000),
  "qwen2_tied": ("Qwen2", dict(num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True), 10**9),
  "llama_tied_scaled": ("Llama", dict(num_attention_heads=4, num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-5,
                                      tie_word_embeddings=True, rope_parameters=LLAMA3), 12_000),
  "llama_untied": ("Llama", dict(num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False), 10**9),
}
LENGTHS = (32, 1, 11)


def make(name: str, family: str, options: dict, shard_bytes: int) -> None:
  torch.manual_seed(sorted(MODELS).index(name))
  config = getattr(transformers, f"{family}Config")(**SIZES | options)
  model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
  with torch.no_grad():
    for key, p in model.named_parameters():  # far from the usual initialisation: every weight shows in the logits
      p.copy_(1.0 + 0.3 * torch.randn_like(p) if "norm" in key else 0.3 * torch.randn_like(p))
    tokens = torch.randint(0, SIZES["vocab_size"], (len(LENGTHS), max(LENGTHS)))
    lengths = torch.tensor(LENGTHS)
    mask = (torch.arange(tokens.shape[1])[None] < lengths[:, None])
    logits = model(input_ids=tokens, attention_mask=mask.long()).logits.float() * mask[:, :, None]
  folder = OUT / name
  shutil.rmtree(folder, ignore_errors=True)
  model.save_pretrained(folder, max_shard_size=shard_bytes)
  np.savez_compressed(folder / "expected.npz", tokens=tokens.int().numpy(), lengths=lengths.int().numpy(),
                      logits=logits.numpy())


if __name__ == "__main__":
  for name, model in MODELS.items():
    make(name, *model)
