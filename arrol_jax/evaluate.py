"""Accuracy on held-out problems, greedy or sampled, from a model or a run's newest checkpoint.

  python -m arrol_jax.evaluate --config=configs/NAME.py                      # the config's model
  python -m arrol_jax.evaluate --config=configs/NAME.py --workdir=DIR        # DIR's newest checkpoint of that run
Problems are data.eval and every file of eval.benchmarks; one JSON line a file on stdout. Left out: voting.
"""

import json
import os
import sys

import jax

from arrol_jax import assemble, config as configuration
from arrol_jax.checkpoint import Checkpoints
from arrol_jax.rewards import Grader
from arrol_jax.types import UserError


def main():
  c, flags = configuration.parse(sys.argv)
  configuration.check(c)
  paths = [p.strip() for p in f"{c.data.eval},{c.eval.benchmarks}".split(",") if p.strip()]
  if not paths:
    raise UserError("nothing to evaluate; set data.eval or eval.benchmarks to JSONL files")
  mesh = assemble.make_mesh(c)
  with jax.set_mesh(mesh):
    loaded = assemble.load(c, mesh)
    step = 0
    if any(a.startswith("--workdir") for a in sys.argv):
      loaded.params, step = from_checkpoint(c, loaded, mesh, flags.workdir)
    engine = assemble.eval_engine(c, loaded, mesh, loaded.params)
    with Grader(c.reward.workers, c.reward.pattern, c.reward.timeout) as grader:
      for path in dict.fromkeys(paths):
        prompts = assemble.prompts(c, loaded, path, c.eval.problems)
        result = assemble.accuracy(c, loaded, engine, prompts, grader, path)
        print(json.dumps({"benchmark": path, "step": step, "temperature": c.eval.temperature} | result), flush=True)


def from_checkpoint(c, loaded, mesh, workdir: str) -> tuple[dict, int]:
  """The policy's parameters in the newest checkpoint of `workdir`, and its step."""
  checkpoints = Checkpoints(workdir, c.checkpoint.keep, read_only=True) if os.path.isdir(f"{workdir}/checkpoints") else None
  step = checkpoints and checkpoints.latest()
  if step is None:
    raise UserError(f"{workdir} holds no checkpoint; train first, or leave --workdir out to evaluate model.path")
  like = assemble.init_state(c, loaded, assemble.optimizer(c), mesh, keep_params=False)
  try:
    state = checkpoints.restore(step, like)
  except (ValueError, KeyError, TypeError) as e:
    raise UserError(f"{workdir}: its checkpoint does not fit this config's model; give the config of that run") from e
  checkpoints.close()
  return state.params["policy"], step


if __name__ == "__main__":
  configuration.run(main)
