"""GSM8K with Llama-3.2-1B-Instruct: GRPO with online pruning on one GPU.

Command:  arrol-get gsm8k
          arrol-train --config=gsm8k_llama32_1b
          The model comes from the hub (2.5 GB), for those who accepted its licence there and ran `hf auth login`; one that is
          here: --config.model.path=FOLDER
          Without pruning, the same program: add --config.prune.enabled=False
Hardware: one GPU. Estimated (arrol-plan --config=gsm8k_llama32_1b --topology=gpu:24GB), not measured, all 512 rows at once:
          24 GB: adapters alone: --config.model.lora.rank=16 --config.optim.chunk_tokens=1024: 21.5 GB
          40 GB: --config.optim.chunk_tokens=1024 --config.optim.micro_tokens=8192: 36.7 GB
          80 GB: as it is: 49.4 GB
Expected: not run. So no hours and no accuracy.
Chosen here: as in gsm8k_qwen3_06b. The model's chat template may write today's date into each prompt, so that runs of different
days see different prompts; a copy of the model whose template has a date of its own avoids that.
"""

from configs import gsm8k_qwen3_06b


def get_config():
  c = gsm8k_qwen3_06b.get_config()
  c.model.path = "meta-llama/Llama-3.2-1B-Instruct"
  c.optim.lr = 1e-6            # the paper's, for a model of this size
  return c
