"""GRPO with online pruning on the shipped arithmetic model: the whole method on a CPU in minutes.

Command:  make quickstart   (python -m arrol_jax.train --config=configs/quickstart.py --workdir=runs/quickstart)
Hardware: 2 CPU cores.
Expected: held-out accuracy 35% -> about 75% (seed 0: 76.8%, seed 1: 74.2%), about half of the rollouts kept after step 5.
The task is built so that success shows early (experiments/make_arithmetic.py): it demonstrates the mechanism only.
"""

from configs import base


def get_config():
  c = base.get_config()
  c.steps = 40
  c.model.path = "experiments/arithmetic/signs"
  c.model.dtype = "float32"
  c.model.remat = "none"
  c.data.train = "experiments/arithmetic/train.jsonl"
  c.data.eval = "experiments/arithmetic/test.jsonl"
  c.reward.pattern = r"A(-?\d+)$"
  c.rollout.prompts = 16
  c.rollout.max_prompt = 16
  c.rollout.max_new = 48
  c.rollout.slots = 256
  c.rollout.segment = 8
  c.rollout.row_buckets = 2    # few shapes to compile
  c.rollout.length_buckets = 1
  c.optim.length_buckets = 1
  c.optim.tail_sizes = 0
  c.prune.detect = (16,)
  c.prune.cold_start = 5
  c.prune.half_life = 1024.0   # the tiny policy moves fast: old scores say little about new ones
  c.optim.lr = 5e-5
  c.optim.head_lr = 1e-2
  c.optim.micro_tokens = 1024
  c.checkpoint.every = 10
  return c
