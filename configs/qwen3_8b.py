"""Qwen3-8B-Base at the paper's settings (Table 1), on a TPU slice of 256 chips.

Command:  python -m arrol_jax.train --config=configs/qwen3_8b.py --workdir=runs/qwen3_8b \\
            --config.model.path=DIR --config.data.train=dapo-math-17k.jsonl --config.data.eval=math500.jsonl
Plan:     python -m arrol_jax.plan --config=configs/qwen3_8b.py --topology=v5e:16x16
Hardware: as configs/qwen3_1b7.py, which also says what the paper leaves open.
Expected: not run here yet. Paper: average accuracy 56.66 (GRPO) and 59.53 (pruned), 1.62x faster.
"""

from configs import qwen3_1b7


def get_config():
  c = qwen3_1b7.get_config()
  c.model.path = "models/Qwen3-8B-Base"
  c.optim.micro_tokens = 262144
  return c
