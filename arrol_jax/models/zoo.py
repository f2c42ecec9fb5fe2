"""Named shapes for benchmarks, plans and random weights; nothing is downloaded and no weights come with them.

The numbers are those of the published config.json files. A real model's shape is always read from its own files
(weights.py), never from here.
"""

from arrol_jax.models.transformer import PolicyConfig, RopeScaling


def _qwen3(width, layers, heads, ffn, tied):
  return PolicyConfig("qwen3", vocab=151936, width=width, layers=layers, heads=heads, kv_heads=8, head_dim=128, ffn=ffn,
                      qk_norm=True, tied=tied, rope_theta=1e6, max_length=40960)


def _qwen25(width, layers, heads, kv_heads, ffn, tied, vocab=151936):
  return PolicyConfig("qwen2", vocab=vocab, width=width, layers=layers, heads=heads, kv_heads=kv_heads,
                      head_dim=width // heads, ffn=ffn, qkv_bias=True, tied=tied, rope_theta=1e6, max_length=32768)


def _llama3(width, layers, heads, head_dim, ffn, tied, factor):
  return PolicyConfig("llama", vocab=128256, width=width, layers=layers, heads=heads, kv_heads=8, head_dim=head_dim,
                      ffn=ffn, tied=tied, rope_theta=5e5, rope_scaling=RopeScaling(factor, 1.0, 4.0, 8192),
                      norm_eps=1e-5, max_length=131072)


ZOO: dict[str, PolicyConfig] = {
  "qwen3-0.6b": _qwen3(1024, 28, 16, 3072, tied=True),
  "qwen3-1.7b": _qwen3(2048, 28, 16, 6144, tied=True),
  "qwen3-4b": _qwen3(2560, 36, 32, 9728, tied=True),
  "qwen3-8b": _qwen3(4096, 36, 32, 12288, tied=False),
  "qwen3-14b": _qwen3(5120, 40, 40, 17408, tied=False),
  "qwen3-32b": _qwen3(5120, 64, 64, 25600, tied=False),
  "qwen2.5-0.5b": _qwen25(896, 24, 14, 2, 4864, tied=True),
  "qwen2.5-0.5b-untied": _qwen25(896, 24, 14, 2, 4864, tied=False),  # as GGUF files of the Coder have it
  "qwen2.5-1.5b": _qwen25(1536, 28, 12, 2, 8960, tied=True),
  "qwen2.5-7b": _qwen25(3584, 28, 28, 4, 18944, tied=False, vocab=152064),
  "llama-3.2-1b": _llama3(2048, 16, 32, 64, 8192, tied=True, factor=32.0),
  "llama-3.2-3b": _llama3(3072, 28, 24, 128, 8192, tied=True, factor=32.0),
  "llama-3.1-8b": _llama3(4096, 32, 32, 128, 14336, tied=False, factor=8.0),
  "smollm2-135m": PolicyConfig("llama", vocab=49152, width=576, layers=30, heads=9, kv_heads=3, head_dim=64, ffn=1536,
                               rope_theta=1e5, norm_eps=1e-5, max_length=8192),
  # About 0.6 M parameters over characters: what the quickstart and the tests train.
  "tiny": PolicyConfig("qwen3", vocab=24, width=128, layers=3, heads=4, kv_heads=2, head_dim=32, ffn=384, qk_norm=True,
                       max_length=512),
}
