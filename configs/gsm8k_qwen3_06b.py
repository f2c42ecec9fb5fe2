"""GSM8K with Qwen3-0.6B, thinking off: GRPO with online pruning on one GPU. The two other gsm8k_ recipes start from this one.

Command:  arrol-get gsm8k
          arrol-train --config=gsm8k_qwen3_06b
          The model comes from the hub (1.5 GB); one that is here: --config.model.path=FOLDER
          Without pruning, the same program: add --config.prune.enabled=False
Hardware: one GPU. By count, not measured: 0.60 G parameters x 16 bytes (float32 weights, gradient, two moments) and 2 (bfloat16
          to decode with) are 10.7 GB; the rest holds the key-value cache (112 KiB a token) and a micro-batch. rollout.slots is
          set by what is free. For 24 GB, untried: --config.optim.micro_tokens=4096 --config.optim.chunk_tokens=2048
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
