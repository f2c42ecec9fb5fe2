"""Llama-3.2-1B at the paper's settings, GRPO without pruning (Table 1), on a TPU slice of 256 chips.

Command:  python -m arrol_jax.train --config=configs/llama32_1b_unpruned.py --workdir=runs/llama32_1b_unpruned \\
            --config.model.path=DIR --config.data.train=dapo-math-17k.jsonl --config.data.eval=math500.jsonl
          The six benchmarks after it: python -m experiments.table1 --scale=paper prints the commands
Hardware: v5e-256 or v6e-256; v5p with 64 chips: add --config.mesh.fsdp=16; not run here yet.
Hours:    unknown.
Expected: the paper's average accuracy 14.63 (with pruning 17.49, 1.67x faster).
Open in the paper and chosen here: prompts a step, lengths and steps, as in configs/qwen3_1b7.py.
"""

from configs import llama32_1b


def get_config():
  c = llama32_1b.get_config()
  c.prune.enabled = False
  return c
