"""Qwen3-1.7B-Base at the paper's settings, DAPO without pruning (Table 2), on a TPU slice of 256 chips.

Command:  python -m arrol_jax.train --config=configs/qwen3_1b7_dapo_unpruned.py --workdir=runs/qwen3_1b7_dapo_unpruned \\
            --config.model.path=DIR --config.data.train=dapo-math-17k.jsonl --config.data.eval=math500.jsonl
          The six benchmarks after it: python -m experiments.table2 --scale=paper prints the commands
Hardware: as configs/qwen3_1b7.py; not run here yet.
Hours:    unknown. Orientation: the paper's Table 5 on its own machine, 188.3 s a step, times our 200 steps
          is 10.5 hours, for GRPO; dynamic sampling adds rounds.
Expected: the paper's average accuracy 36.43 (with pruning 39.42), pruning 1.7x faster.
Open in the paper and chosen here: prompts a step, lengths and steps, as in configs/qwen3_1b7.py; dynamic sampling takes
up to 3 batches of prompts a step; clipping and overlong punishment as DAPO's authors set them (arrol_jax/learning/losses.py).
"""

from configs import qwen3_1b7_dapo


def get_config():
  c = qwen3_1b7_dapo.get_config()
  c.prune.enabled = False
  return c
