"""GSM8K with Qwen2.5-0.5B-Instruct, the model of verl's published baseline: GRPO with online pruning on one GPU.

Command:  arrol-get gsm8k
          arrol-train --config=gsm8k_qwen25_05b
          The model comes from the hub (1 GB); one that is here: --config.model.path=FOLDER
          Without pruning, the same program: add --config.prune.enabled=False
Hardware: one GPU. Estimated (arrol-plan --config=gsm8k_qwen25_05b --topology=gpu:24GB), not measured, all 512 rows at once:
          24 GB: --config.optim.chunk_tokens=1024 --config.optim.micro_tokens=8192: 18.7 GB
          40 GB: as it is: 30.3 GB; 80 GB: the same
Expected: not run. So no hours and no accuracy. verl reports 49.6% before and 56.7% after PPO on this model; its prompt, lengths
          and number of samples are not these, so compare the gain only, and only after a run of one's own.
Chosen here: as in gsm8k_qwen3_06b; gsm8k_qwen05b has results for the Coder model of this shape.
"""

from configs import gsm8k_qwen3_06b


def get_config():
  c = gsm8k_qwen3_06b.get_config()
  c.model.path = "Qwen/Qwen2.5-0.5B-Instruct"
  c.rollout.max_new = 400
  return c
