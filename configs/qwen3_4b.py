"""Qwen3-4B-Base at the paper's settings (Table 1), on a TPU slice of 256 chips.

Command:  python -m arrol_jax.train --config=configs/qwen3_4b.py --workdir=runs/qwen3_4b \\
            --config.model.path=DIR --config.data.train=dapo-math-17k.jsonl --config.data.eval=math500.jsonl
Plan:     python -m arrol_jax.plan --config=configs/qwen3_4b.py --topology=v5e:16x16
Hardware: as configs/qwen3_1b7.py, which also says what the paper leaves open.
Expected: not run here yet. Paper: average accuracy 51.01 (GRPO) and 53.54 (pruned), 1.63x faster.
"""

from configs import qwen3_1b7


def get_config():
  c = qwen3_1b7.get_config()
  c.model.path = "models/Qwen3-4B-Base"
  c.optim.micro_tokens = 262144
  return c
