"""MATH with Qwen2.5-Coder-0.5B-Instruct: math_qwen05b_chosen, and of the chosen prompts' rollouts half are pruned at 128 tokens
by the batch's budget.

Command:  arrol-get math math500
          arrol-train --config=math_qwen05b_pruned --config.model.path=DIR/model.gguf
Hardware: one H200 (not run on an H100). 120 s of steps after some 40 s of loading and compiling
Result:   four samples 13.2%, greedy 14.5% of 478 problems of MATH-500 (those of at most 256 tokens) after 120 s of steps,
          3.0 ± 2.4 and 2.0 ± 2.5 points above plain GRPO after as many, in steps 1.5 times shorter than without pruning;
          five seeds: the trial's arm `budget_chosen4_ahead4`, docs/results.md
Open:     after as much time it is not above math_qwen05b_chosen, which prunes nothing (-1.0 ± 1.4 points greedily).
"""

from configs import math_qwen05b_chosen


def get_config():
  c = math_qwen05b_chosen.get_config()
  c.prune.enabled = True
  c.prune.rule = "budget"
  c.prune.cold_start = 2
  c.prune.draw = "systematic"
  c.prune.p_min, c.prune.p_max = 0.02, 1.0
  c.prune.half_life = 4096.0
  c.quality.fit = "ridge"
  c.quality.inputs = ("mean@2/3", "prompt@2/3", "logprobs", "windows", "siblings")
  return c
