"""Qwen3-1.7B-Base at the paper's settings, GRPO without pruning (Table 1), on a TPU slice of 256 chips.

Command:  python -m arrol_jax.train --config=configs/qwen3_1b7_unpruned.py --workdir=runs/qwen3_1b7_unpruned \\
            --config.model.path=DIR --config.data.train=dapo-math-17k.jsonl --config.data.eval=math500.jsonl
          The six benchmarks after it: python -m experiments.table1 --scale=paper prints the commands
Hardware: as configs/qwen3_1b7.py; not run here yet.
Hours:    unknown. Orientation: the paper's Table 5 on its own machine, 188.3 s a step, times our 200 steps
          is 10.5 hours.
Expected: the paper's average accuracy 34.79 (with pruning 37.09, 1.61x faster).
Open in the paper and chosen here: prompts a step, lengths and steps, as in configs/qwen3_1b7.py.
"""

from configs import qwen3_1b7


def get_config():
  c = qwen3_1b7.get_config()
  c.prune.enabled = False
  return c
