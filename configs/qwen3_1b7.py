"""Qwen3-1.7B-Base at the paper's settings (Table 1), on a TPU slice of 256 chips; the 4B and 8B configs start from this one.

Command:  python -m arrol_jax.train --config=configs/qwen3_1b7.py --workdir=runs/qwen3_1b7 \\
            --config.model.path=DIR --config.data.train=dapo-math-17k.jsonl --config.data.eval=math500.jsonl
          Without pruning, the same program: add --config.prune.enabled=False
Plan:     python -m arrol_jax.plan --config=configs/qwen3_1b7.py --topology=v5e:16x16
Hardware: v5e-256 or v6e-256; v5p with 64 chips: add --config.mesh.fsdp=16. What fits: experiments/results/plan/README.md
Expected: not run here yet, so no hours. Paper: average accuracy 34.79 (GRPO) and 37.09 (pruned), 1.61x faster.
The paper leaves prompts a step, lengths and steps open: 128 prompts and rows of 1,024 + 3,072 tokens are ours.
"""

from configs import base


def get_config():
  c = base.get_config()
  c.steps = 200
  c.model.path = "models/Qwen3-1.7B-Base"
  c.data.train = "data/dapo-math-17k.jsonl"
  c.data.eval = "data/math500.jsonl"
  c.data.template = "{problem}\nPlease reason step by step, and put your final answer within \\boxed{}."
  c.rollout.prompts = 128
  c.rollout.max_prompt = 1024
  c.rollout.max_new = 3072
  c.optim.micro_tokens = 524288  # two rows for each four chips
  c.mesh.fsdp = 64
  c.mesh.tensor = 4
  return c
