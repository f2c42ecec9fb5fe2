"""Qwen3-8B-Base at the paper's settings, DAPO without pruning (as Table 2 for 1.7B), on a TPU slice of 256 chips.

Command:  python -m arrol_jax.train --config=configs/qwen3_8b_dapo_unpruned.py --workdir=runs/qwen3_8b_dapo_unpruned \\
            --config.model.path=DIR --config.data.train=dapo-math-17k.jsonl --config.data.eval=math500.jsonl
          The six benchmarks after it: python -m experiments.table2 --scale=paper prints the commands
Hardware: as configs/qwen3_1b7.py; not run here yet.
Hours:    unknown.
Expected: unknown; the paper gives no DAPO figure for this model.
Open in the paper and chosen here: prompts a step, lengths and steps, as in configs/qwen3_1b7.py; dynamic sampling takes
up to 3 batches of prompts a step; clipping and overlong punishment as DAPO's authors set them (arrol_jax/learning/losses.py).
"""

from configs import qwen3_8b_dapo


def get_config():
  c = qwen3_8b_dapo.get_config()
  c.prune.enabled = False
  return c
