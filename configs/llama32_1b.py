"""Llama-3.2-1B at the paper's settings, GRPO with pruning (Table 1), on a TPU slice of 256 chips.

Command:  python -m arrol_jax.train --config=configs/llama32_1b.py --workdir=runs/llama32_1b \\
            --config.model.path=DIR --config.data.train=dapo-math-17k.jsonl --config.data.eval=math500.jsonl
          The six benchmarks after it: python -m experiments.table1 --scale=paper prints the commands
Plan:     python -m arrol_jax.plan --config=configs/llama32_1b.py --topology=v5e:16x16   (fits: 3.7 of 15.75 GiB a chip)
Hardware: v5e-256 or v6e-256; v5p with 64 chips: add --config.mesh.fsdp=16; not run here yet.
Hours:    unknown.
Expected: the paper's average accuracy 17.49 (GRPO alone 14.63), 1.67x faster.
Open in the paper and chosen here: prompts a step, lengths and steps, as in configs/qwen3_1b7.py.
"""

from configs import qwen3_1b7


def get_config():
  c = qwen3_1b7.get_config()
  c.model.path = "models/Llama-3.2-1B"
  return c
