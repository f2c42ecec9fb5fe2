"""GSM8K with Qwen2.5-Coder-0.5B-Instruct: GRPO with online pruning on one GPU.

Command:  python -m arrol_jax.train --config=configs/gsm8k_qwen05b.py --workdir=runs/gsm8k \\
            --config.model.path=DIR/model.gguf --config.data.train=DIR/gsm8k_train.jsonl --config.data.eval=DIR/gsm8k_test.jsonl
          Without pruning, the same program: add --config.prune.enabled=False
Hardware: one H100 (80 GB). 100 steps took 142 s there, 204 s from the command to its end with nothing compiled before.
          Longer runs: --config.model.scan_layers=False, a tenth off a step for some 20 s of compiling and 8 GB more memory
Result:   held-out 26.8% before, 34.2% after (1,319 problems, greedy, +7.4 ± 3.5 points over problems, one seed):
          experiments/results/recipe/. Arms of 50 steps at two seeds: archive/gsm8k_arms/; longer, one seed: gsm8k_qwen05b/
Open in the paper and chosen here: learning rate (the paper's 1e-6 is for larger models and longer runs), 32 prompts a step,
400 response tokens, detection at 128 of them, a cold start of 10 steps.
"""

from configs import base, templates


def get_config():
  c = base.get_config()
  c.steps = 100
  c.model.path = "models/qwen2.5-coder-0.5b/model.gguf"
  c.data.train = "data/gsm8k_train.jsonl"
  c.data.eval = "data/gsm8k_test.jsonl"
  c.data.template = templates.BOXED
  c.data.chat = True
  c.rollout.max_prompt = 256
  c.rollout.max_new = 400
  c.rollout.segment = 16
  c.prune.detect = (128,)
  c.prune.cold_start = 10
  c.optim.lr = 3e-6
  c.optim.warmup = 5
  c.optim.length_buckets = 2
  c.optim.tail_sizes = 1
  c.checkpoint.every = 50
  return c
