"""GSM8K with Llama-3.2-1B-Instruct: GRPO with online pruning on one GPU.

Command:  arrol-get gsm8k
          arrol-train --config=gsm8k_llama32_1b
          The model comes from the hub (2.5 GB), for those who accepted its licence there and ran `hf auth login`; one that is
          here: --config.model.path=FOLDER
          Without pruning, the same program: add --config.prune.enabled=False
Hardware: one GPU of 40 GB or more. By count, not measured: 1.24 G parameters x 18 bytes are 22.2 GB, the key-value cache takes
          32 KiB a token. A card of 24 GB cannot hold it. For 40 GB, untried: --config.optim.micro_tokens=8192
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
