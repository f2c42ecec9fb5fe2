"""Qwen3-8B-Base at the paper's settings, GRPO without pruning (Table 1), on a TPU slice of 256 chips.

Command:  python -m arrol_jax.train --config=configs/qwen3_8b_unpruned.py --workdir=runs/qwen3_8b_unpruned \\
            --config.model.path=DIR --config.data.train=dapo-math-17k.jsonl --config.data.eval=math500.jsonl
          The six benchmarks after it: python -m experiments.table1 --scale=paper prints the commands
Hardware: as configs/qwen3_1b7.py; not run here yet.
Hours:    unknown.
Expected: the paper's average accuracy 56.66 (with pruning 59.53, 1.62x faster).
Open in the paper and chosen here: prompts a step, lengths and steps, as in configs/qwen3_1b7.py.
"""

from configs import qwen3_8b


def get_config():
  c = qwen3_8b.get_config()
  c.prune.enabled = False
  return c
