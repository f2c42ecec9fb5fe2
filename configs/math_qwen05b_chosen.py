"""MATH with Qwen2.5-Coder-0.5B-Instruct: GRPO on prompts chosen by their own states, with rollouts that run ahead; nothing is
pruned.

Command:  arrol-get math math500
          arrol-train --config=math_qwen05b_chosen --config.model.path=DIR/model.gguf
Hardware: one H200 (not run on an H100). 120 s of steps after some 40 s of loading and compiling
Result:   greedy 15.6% of 478 problems of MATH-500 (those of at most 256 tokens) after 120 s of steps, 3.8 ± 1.8 points above
          plain GRPO after as many; ten seeds: the trial's arm `chosen4_ahead4`, docs/results.md
Open:     of three learning rates the lowest was best; twice and four times as much undo what was learned.
"""

from configs import gsm8k_qwen05b


def get_config():
  c = gsm8k_qwen05b.get_config()
  c.steps = 100000
  c.stop_seconds = 120.0
  c.data.train = "data/math_train.jsonl"
  c.data.eval = "data/math500.jsonl"
  c.rollout.max_new = 1024
  c.prune.enabled = False
  c.loss.aggregate = "token"
  c.loss.overlong = 0.2
  c.optim.clip_norm = 10.0
  c.eval.sampled = 4
  c.checkpoint.every = 100000
  # What plain GRPO does not have.
  c.rollout.candidates = 128      # of which 32 are generated for
  c.quality.half_life = 8192.0    # of what is known about prompts, in rollouts
  c.rollout.ahead = 4
  c.loss.correction = "truncate"
  return c
