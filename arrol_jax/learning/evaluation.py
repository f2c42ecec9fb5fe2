"""Held-out accuracy and test-time scaling: avg@k, pass@k, and what the votes of METHOD section 7 make of the same samples.

Nothing is pruned unless `stop` names a posterior below which a trace is hopeless: the head then ends it at the detection lengths
and the others vote without it. Left out: the rules of voting (voting.py), reading files and printing (evaluate.py).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from arrol_jax.engine.sampling import Sampling
from arrol_jax.engine.scheduler import Engine
from arrol_jax.learning.generation import Asked, Grading, generate
from arrol_jax.learning.metrics import bootstrap_interval, pass_at_k
from arrol_jax.pruning import voting
from arrol_jax.pruning.decision import NO_HEAD, Voters, make_decide
from arrol_jax.pruning.rule import PruneRule
from arrol_jax.pruning.table import Calibration, posterior
from arrol_jax.rewards import extract_answer, grade
from arrol_jax.types import FAILED, Rollout


def measure(engine: Engine, prompts: list, asked: Asked | int, key: jax.Array, sampling: Sampling, grading: Grading,
            voters: Voters = NO_HEAD, progress: Callable | None = None) -> tuple[dict, list[Rollout]]:
  """Accuracy on held-out prompts: metrics and the rollouts behind them.

  accuracy: share of successes (reward.success) among all samples that finished (avg@k); reward: their mean reward, where it is
  another; ci95: half-width of accuracy's normal interval over problems; pass: share of problems with at least one right answer;
  truncated: share that hit the length limit; tokens: response tokens a problem, stopped: share of traces that were ended as
  hopeless; ungraded: share of the others that could not be graded, where there are any. With several samples also the votes of
  `vote_accuracies` and, where all traces finished, pass@k for k = 1, 2, 4, ... (the unbiased estimator), each with a bootstrap
  interval over problems, "..._ci"; "..._gain_ci" is that of a vote's gain on the majority, paired.
  """
  v, samples = voters, asked.samples if isinstance(asked, Asked) else asked
  decide = None
  if v.head is not None and samples > 1:
    tables = Calibration() if v.tables is None else v.tables
    rule = PruneRule((engine.max_new + 1,), inputs=v.inputs) if v.stop is None else PruneRule(
      v.detect, keep=v.stop, kind="threshold", floor=1, inputs=v.inputs)
    decide = make_decide(v.head, tables, rule, v.stop is not None)
  rollouts, _ = generate(engine, dict(enumerate(prompts)), asked, key, sampling, grading, decide, progress)
  right = np.array([r.success for r in rollouts]).reshape(len(prompts), samples)  # NaN where stopped
  by_problem = np.nanmean(right, axis=1)
  out = {"accuracy": float(by_problem.mean()),
         "ci95": float(1.96 * by_problem.std(ddof=1) / np.sqrt(len(prompts))) if len(prompts) > 1 else float("nan"),
         "problems": len(prompts), "samples": samples, "pass": float((np.nanmax(right, axis=1) > 0).mean()),
         "response_len": float(np.mean([len(r.tokens) for r in rollouts])),
         "truncated": float(np.mean([not r.stopped for r in rollouts if not r.pruned])),
         "tokens": sum(len(r.tokens) for r in rollouts) / len(prompts), "stopped": float(np.mean([r.pruned for r in rollouts]))}
  if any(r.reward != r.success for r in rollouts if not r.pruned):
    out["reward"] = float(np.nanmean([r.reward for r in rollouts]))
  ungraded = [r.reason in FAILED for r in rollouts if not r.pruned]
  if any(ungraded):
    out["ungraded"] = float(np.mean(ungraded))
  if samples > 1:
    per_problem = {} if out["stopped"] else {
      f"pass@{k}": [pass_at_k(row, k) for row in right] for k in (2**i for i in range(samples.bit_length())) if k <= samples}
    votes = vote_accuracies(rollouts, right, v, sampling.confidence is not None, grading.pattern)
    for name, values in (per_problem | votes).items():
      out |= {name: float(np.mean(values)), f"{name}_ci": bootstrap_interval(values)}
    majority = votes.pop(f"maj@{samples}")
    out |= {f"{name}_gain_ci": bootstrap_interval(np.subtract(values, majority)) for name, values in votes.items()}
  return out, rollouts


def vote_accuracies(rollouts: list[Rollout], right: np.ndarray, voters: Voters, confident: bool,
                    pattern: str | None) -> dict[str, list[float]]:
  """By rule, whether each problem's voted answer is right, 1.0 or 0.0; right f[P,k], rollouts its P * k traces.

  maj@k; with a head rank@k (the paper's rule), posterior@k (the last table's posterior of the last score), logit@k (its log-odds,
  voting.logit_weights), best@k (the answer with the highest last score); with token confidences deepconf_mean@k,
  deepconf_bottom10@k, deepconf_lowest@k, deepconf_tail@k.
  """
  samples = right.shape[1]
  answers = [None if r.pruned else extract_answer(r.text, pattern) for r in rollouts]
  scores = {"maj": ("majority", np.zeros(len(rollouts)))}
  if voters.head is not None:
    final = np.array([r.final for r in rollouts])
    last = jax.tree.map(lambda x: jnp.atleast_2d(x)[-1], Calibration() if voters.tables is None else voters.tables)
    chance = np.asarray(posterior(last, final))
    scores |= {"rank": ("rank", final), "posterior": ("posterior", chance), "logit": ("logit", chance), "best": ("best", final)}
  if confident:
    scores |= {f"deepconf_{kind}": ("deepconf", np.array([voting.summarize_confidence(r.confidences, voters.window, kind)
                                                          for r in rollouts])) for kind in voting.CONFIDENCES}
  said = [answers[i:i + samples] for i in range(0, len(answers), samples)]
  return {f"{name}@{samples}": [voted_right(*row, rule) for row in zip(right, said, score.reshape(-1, samples), strict=True)]
          for name, (rule, score) in scores.items()}


def voted_right(right: np.ndarray, answers: list[str | None], scores: np.ndarray, rule: str) -> float:
  """Whether the answer is right that one problem's traces vote for; math-equal answers pool their votes, no answer is wrong. Rule
  "best" takes the answer with the highest score."""
  if rule == "best":
    voting_traces = [i for i, answer in enumerate(answers) if answer is not None]
    return float(right[max(voting_traces, key=lambda i: scores[i])]) if voting_traces else 0.0
  winner = voting.vote(answers, scores, rule, equal=lambda a, b: grade(f"\\boxed{{{b}}}", a) > 0)
  return 0.0 if winner is None else float(right[answers.index(winner)])
