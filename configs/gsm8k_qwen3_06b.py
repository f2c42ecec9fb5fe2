"""GSM8K with Qwen3-0.6B, thinking off: GRPO with online pruning on one GPU. The two other gsm8k_ recipes start from this one.

Command:  arrol-get gsm8k
          arrol-train --config=gsm8k_qwen3_06b
          The model comes from the hub (1.5 GB); one that is here: --config.model.path=FOLDER
          Without pruning, the same program: add --config.prune.enabled=False
Hardware: one GPU. Estimated (arrol-plan --config=gsm8k_qwen3_06b --topology=gpu:24GB), not measured:
          24 GB: --config.optim.chunk_tokens=1024 --config.optim.micro_tokens=8192: 22.4 GB, 112 rows decode at once
          40 GB: as it is: 35.4 GB, 256 rows; 80 GB: as it is: 59.8 GB, all 512 rows
          Qwen3-1.7B on 24 GB, with adapters:
          --config.model.path=Qwen/Qwen3-1.7B --config.model.lora.rank=16 --config.optim.chunk_tokens=1024
          --config.optim.micro_tokens=8192: 21.8 GB, 128 rows; its learning rate has to be found (1e-5 to 1e-4 to begin with)
Expected: not run. So no hours and no accuracy.
Chosen here: 512 response tokens (without thinking, answers to these problems are short), detection at 128, 32 prompts x 16
rollouts, a cold start of 10 steps, the learning rate of gsm8k_qwen05b; every 20 steps 256 of the 1,319 test problems.
"""

from configs import gsm8k_qwen05b


def get_config():
  c = gsm8k_qwen05b.get_config()
  c.model.path = "Qwen/Qwen3-0.6B"
  c.data.thinking = False
  c.rollout.max_prompt = 320
  c.rollout.max_new = 512
  c.eval.every = 20
  return c
