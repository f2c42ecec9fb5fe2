"""How far the sampler's log-probs stand from the trainer's, with a full and with an int8 key-value cache.

  python -m experiments.cache_gap --model=MODEL.gguf --data=gsm8k_test.jsonl [--problems=16] [--max_new=64] [--dtype=float32]

Samples one response a problem at temperature 1 with each cache and compares each token's log-prob with the training
program's on the same tokens. Prints a JSON line a cache: mean and largest absolute difference, and tokens compared.
"""

import argparse
import json
import shlex
import sys

import jax
import numpy as np

from arrol_jax import config
from arrol_jax.data import problems
from arrol_jax.engine.sampling import Sampling
from arrol_jax.engine.scheduler import Engine, Request
from arrol_jax.learning import batching, update
from arrol_jax.learning.losses import LossConfig
from arrol_jax.models import sharding
from arrol_jax.models.files.weights import load_policy


def gap(policy, engine: Engine, requests: list, sampling: Sampling) -> np.ndarray:
  """Absolute differences of all sampled tokens."""
  engine.load(policy.params, sampling.dtype)
  done = engine.run(requests, jax.random.key(0), sampling)
  for r in done:
    r.reward = 0.0
  loss = LossConfig(kl_weight=1.0)  # leaves no row out
  u = update.UpdateConfig(policy.config, loss, update.Compute(sampling.dtype, "auto", "none"), fresh=False)
  batches, _ = batching.pack(done, batching.PackShape(engine.max_prompt + engine.max_new, 4096, 1), engine.mesh, loss)
  batches = update.fill_logprobs(u, policy.params, None, batches, np.float32(1))
  return np.concatenate([np.abs(b.old_logprobs - b.sampler_logprobs)[np.asarray(b.response_mask) > 0] for b in batches])


def main():
  p = argparse.ArgumentParser(prog="python -m experiments.cache_gap", description=__doc__.partition("\n")[0])
  p.add_argument("--model", required=True)
  p.add_argument("--data", required=True)
  p.add_argument("--problems", type=int, default=16)
  p.add_argument("--max_new", type=int, default=64)
  p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
  a = p.parse_args()
  mesh = sharding.make_mesh()
  with jax.set_mesh(mesh):
    policy = load_policy(a.model, dtype="float32", mesh=mesh)
    prompts, _ = problems.encode_prompts(problems.load_problems(a.data)[:a.problems], policy.tokenizer, "{problem}", True, 256)
    requests = [Request(i, i, x.tokens, a.max_new) for i, x in enumerate(prompts)]
    engine = Engine(policy.config, mesh, len(requests), 256, a.max_new, 32, row_buckets=1, length_buckets=1)
    for cache in (None, "int8"):
      difference = gap(policy, engine, requests, Sampling(1.0, tuple(policy.eos_ids), a.dtype, cache))
      print(json.dumps({"model": a.model.rpartition("/")[2], "cache": cache or a.dtype, "dtype": a.dtype,
                        "tokens": difference.size, "logprob_gap": float(difference.mean()), "largest": float(difference.max()),
                        "device": jax.devices()[0].device_kind,
                        "command": "python -m experiments.cache_gap " + shlex.join(sys.argv[1:])}), flush=True)


if __name__ == "__main__":
  config.run(main)
