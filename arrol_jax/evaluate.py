"""Accuracy on held-out problems, greedy or sampled, from a model, a run's newest checkpoint or its exported policy.

  arrol-evaluate --workdir=DIR                          # a run's newest checkpoint, or --step=best, --step=40
  arrol-evaluate --config=quickstart                    # the config's model
  arrol-evaluate --config=quickstart --config.model.path=DIR/policy --config.eval.samples=16 \\
      --config.eval.temperature=1.0                     # pass@k and votes, with the head exported there
Problems are the sources of data.eval and eval.benchmarks; --workdir without --config takes the run's own config. On stdout one
JSON line a source, its keys as in evaluation.measure; after them the same as a table, on stderr.
"""

import functools
import json
import sys

import jax

from arrol_jax import assemble, assemble_state, config as configuration
from arrol_jax.data import sources
from arrol_jax.models.files import tokenizers
from arrol_jax.preflight import remarks
from arrol_jax.reporting import evaluations
from arrol_jax.running import hosts
from arrol_jax.running.workdir import finite
from arrol_jax.types import UserError

FLAGS = {"step": ("newest", "which of --workdir's checkpoints: newest, best, or a step")}


def main():
  c, flags = configuration.parse(sys.argv, FLAGS, __doc__)
  hosts.connect()
  hosts.together(lambda: configuration.check(c, training=False))
  paths = sources.split_list(f"{c.data.eval},{c.eval.benchmarks}")
  if not paths:
    raise UserError("nothing to evaluate; set data.eval or eval.benchmarks to JSONL files or benchmarks")
  if flags["step"].present and not flags["workdir"].present:
    raise UserError("--step names one of a run's checkpoints: give its --workdir=DIR too")
  for path in paths:
    sources.check(path, "test", c.data.folder)
  for remark in remarks.of_evaluation(c):
    hosts.say(f"config: {remark}")
  sources.import_early(*paths)
  tokenizers.import_early()  # while JAX looks for its devices
  mesh = assemble.make_mesh(c)
  with jax.set_mesh(mesh), assemble.grader(c) as grader:  # before a model is loaded for nothing
    loaded = hosts.together(lambda: assemble.load(c, mesh))
    step = 0
    if flags["workdir"].present:
      step = assemble_state.from_checkpoint(c, loaded, mesh, flags.workdir, flags.step)
    if c.eval.stop_below is not None and (loaded.head is None or loaded.calibration is None):
      raise UserError(f"eval.stop_below needs a trained quality head; {c.model.path} has none")
    assemble.follow_head(c, loaded)
    if c.eval.stop_below is not None:
      assemble.check_tables(c, loaded)
    # All of them before the first is evaluated: a fault in the last must not cost the hours that the others take.
    prompts_of = {path: assemble.prompts(c, loaded, path, c.eval.problems) for path in paths}
    assemble.warn(c, loaded, [prompt for prompts in prompts_of.values() for prompt in prompts])
    engine, results = assemble.eval_engine(c, loaded, mesh, loaded.params), {}
    try:
      for path, prompts in prompts_of.items():
        result = finite(assemble.accuracy(c, loaded, engine, prompts, grader, path, loaded.head, loaded.calibration))
        results[path] = result
        if hosts.first():  # what this command is for: an error where it cannot be written
          print(json.dumps({"benchmark": path, "step": step, "temperature": c.eval.temperature} | result), flush=True)
    finally:
      if hosts.first() and results:
        tell(results)
    if c.reward.function and all(result.get("ungraded") == 1 for result in results.values()):
      problem = grader.first_problem
      raise UserError(f"reward.function={c.reward.function} failed on all answers{'; first: ' + problem if problem else ''}")


def tell(results: dict[str, dict]) -> None:
  """The results as tables for people, apart from the lines for programs."""
  tables = [evaluations.table(results.items()), evaluations.votes(results.items())]
  print("\n" + "\n\n".join(evaluations.text(rows) for rows in tables if rows), file=sys.stderr, flush=True)


command = functools.partial(hosts.process, functools.partial(configuration.run, main))

if __name__ == "__main__":
  command()
