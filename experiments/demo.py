"""What the notebook shows: rollouts as they end or are cut, with their scores, and the vote over finished ones.

  python -m experiments.demo prune --config=configs/quickstart.py --config.model.path=runs/demo/policy [--problems=2]
  python -m experiments.demo vote  --config=configs/quickstart.py --config.model.path=runs/demo/policy [--problems=2]

model.path is the policy folder of a run, with its head and table; problems are the first of data.eval (or data.train).
"""

from collections.abc import Callable
import dataclasses
import sys

import jax
import numpy as np

from arrol_jax import assemble, config as configuration
from arrol_jax.learning.generation import Grading, generate
from arrol_jax.prune import Calibration
from arrol_jax.pruning import voting
from arrol_jax.pruning.decision import make_decide
from arrol_jax.pruning.rule import PruneRule
from arrol_jax.rewards import Grader, extract_answer
from arrol_jax.types import Rollout, UserError

SHOWN = 48  # last characters of a text


def sample(c, problems: int, prune: bool, progress: Callable | None = None) -> tuple[list, list[Rollout]]:
  """Graded rollouts of the first problems of data.eval; without `prune` whole responses are scored and nothing is cut."""
  mesh = assemble.make_mesh(c)
  with jax.set_mesh(mesh), Grader(c.reward.workers, c.reward.pattern, c.reward.timeout) as grader:
    loaded = assemble.load(c, mesh)
    if loaded.head is None:
      raise UserError(f"{c.model.path} has no quality head; give the policy folder of a run")
    assemble.follow_head(c, loaded)
    if prune:
      assemble.check_tables(c, loaded)
    prompts = assemble.prompts(c, loaded, c.data.eval or c.data.train, problems)
    engine = assemble.engine(c, loaded, mesh, c.rollout.max_new, loaded.params)
    engine.load(loaded.params, c.model.dtype)
    tables = Calibration() if loaded.calibration is None else loaded.calibration
    whole = PruneRule((c.rollout.max_new + 1,), inputs=assemble.linear_inputs(c))
    decide = make_decide(loaded.head, tables, assemble.prune_rule(c) if prune else whole, prune)
    sampling = dataclasses.replace(assemble.sampling(c, loaded, c.rollout.temperature), pool=assemble.pools(c, loaded.head))
    return prompts, generate(engine, dict(enumerate(prompts)), c.rollout.group_size, assemble.key(c, assemble.EVAL), sampling,
                             Grading(loaded.tokenizer, grader), decide, progress)[0]


def line(r: Rollout) -> str:
  """One rollout: prompt, length, what became of it, score, posterior, survival probability, the end of its text."""
  fate = "cut  " if r.pruned else "ended"
  numbers = "ended before it was scored"
  if r.decided:
    numbers = f"score {r.score:+.2f}  q {r.posterior:.2f}  p {r.keep_probability:.2f}"
  return f"prompt {r.prompt}  {fate} at {len(r.tokens):4d}  {numbers}  ...{r.text[-SHOWN:]!r}"


def show_pruning(c, problems: int) -> None:
  """Samples with pruning and prints each rollout when it leaves the engine, then what the survivors were worth."""
  prompts, rollouts = sample(c, problems, True, lambda r: print(line(r), flush=True))
  for p, prompt in enumerate(prompts):
    group = [r for r in rollouts if r.prompt == p]
    kept = [r.success for r in group if not r.pruned]
    right = f"{np.mean(kept):.2f} of them right" if kept else "none left to grade"
    print(f"{prompt.problem.problem!r} = {prompt.problem.answer}: {len(kept)} of {len(group)} kept, {right}")


def show_vote(c, problems: int) -> None:
  """Samples without pruning and prints each answer with the head's last score, and whose answer wins by each rule."""
  prompts, rollouts = sample(c, problems, False)
  for p, prompt in enumerate(prompts):
    group = [r for r in rollouts if r.prompt == p]
    answers, scores = [extract_answer(r.text, c.reward.pattern) for r in group], np.array([r.final for r in group])
    print(f"{prompt.problem.problem!r} = {prompt.problem.answer}")
    for answer, score, r in sorted(zip(answers, scores, group, strict=True), key=lambda x: -x[1]):
      print(f"  score {score:+.2f}  {'right' if r.success else 'wrong'}  {answer}")
    for rule in ("majority", "rank"):
      print(f"  {rule}: {voting.vote(answers, scores, rule)}")


def main():
  what = {"prune": show_pruning, "vote": show_vote}.get(sys.argv[1] if len(sys.argv) > 1 else "")
  if what is None:
    raise UserError("say what to show: python -m experiments.demo prune|vote --config=.. "
                    "--config.model.path=DIR/policy")
  c, flags = configuration.parse(sys.argv[1:], {"problems": ("2", "how many")}, __doc__)
  configuration.check(c)
  if not flags.problems.isdigit() or int(flags.problems) < 1:
    raise UserError(f"--problems={flags.problems}: it takes a whole number, at least 1")
  what(c, int(flags.problems))


if __name__ == "__main__":
  configuration.run(main)
