"""Test-time voting over N finished traces of one problem: majority, by rank, by posterior or its log-odds, DeepConf.

Each trace gives an answer (or none) and a score; the score becomes a weight by one of five rules, weights of
equivalent answers are summed, and the largest sum wins. Plain NumPy on the host: a vote is over a few hundred
strings. Also DeepConf's trace confidence, the baseline's score, from top-k log-probabilities.

Sources: ARRoL, arXiv 2603.24840, section on test-time scaling (rule "rank"); DeepConf, arXiv 2508.15260,
section 3 (rule "deepconf" and `trace_confidence`). Left out: answer extraction, and the test of mathematical
equality itself (pass it as `equal`); DeepConf's online stopping.
"""

import math

import numpy as np

RULES = ("majority", "rank", "posterior", "logit", "deepconf")
SUREST = 0.99  # posterior above which the log-odds grow no more
CONFIDENCES = ("mean", "bottom10", "lowest", "tail")


def vote(answers, scores=None, rule="majority", *, equal=None):
  """The winning answer of N traces.

  A trace whose answer is None takes no part: it has no rank. A tie goes to the answer that appears first.

  Args:
    answers: list of str or None (no answer found), length N.
    scores: list of N floats, or None for rule "majority", which does not read them.
    rule: what a trace weighs.
      "majority": 1.
      "rank": its rank by score mapped linearly to [0, 1], see `rank_weights`; any real scores do.
      "posterior": its score, a probability of being correct.
      "logit": the log-odds of such a probability against the vote's other answers, see `logit_weights`.
      "deepconf": its score, a trace confidence >= 0, see `trace_confidence`.
    equal: equal(a, b) -> bool, whether two answers are the same; an equivalence. An answer is compared with
      the first of each pool, in order of appearance. Default: equality of the strings without surrounding
      whitespace, which is also what counts as the same before `equal` is asked.
  Returns: the first answer of the winning pool, as given; None if all answers are None.
  Raises: ValueError for no traces, lengths that differ, an unknown rule, missing scores, or scores that
    are not finite or do not fit the rule.
  """
  _check(answers, scores, rule)
  voters = [i for i, answer in enumerate(answers) if answer is not None]
  if not voters:
    return None
  pools = pools_of([answers[i] for i in voters], equal)
  weights = _weights(None if scores is None else [scores[i] for i in voters], pools, rule)
  return _winner(zip([answers[i] for i in voters], pools, weights, strict=True))


def _check(answers, scores, rule):
  if rule not in RULES:
    raise ValueError(f"unknown rule {rule!r}; expected one of {', '.join(RULES)}")
  if not len(answers):
    raise ValueError("a vote needs at least one trace")
  if scores is not None and len(scores) != len(answers):
    raise ValueError(f"{len(answers)} answers but {len(scores)} scores")
  if scores is None and rule != "majority":
    raise ValueError(f"rule {rule!r} needs scores")


def trace_weights(answers, scores=None, rule="majority"):
  """What each trace weighs in `vote`, list of floats, 0 for one without an answer. These arguments and their errors are those of
  `vote`, without `equal`: for rule "logit" answers are the same where their texts are."""
  _check(answers, scores, rule)
  voters = [i for i, answer in enumerate(answers) if answer is not None]
  out = [0.0] * len(answers)
  if voters:
    pools = pools_of([answers[i] for i in voters])
    weights = _weights(None if scores is None else [scores[i] for i in voters], pools, rule)
    for i, weight in zip(voters, weights, strict=True):
      out[i] = weight
  return out


def _weights(scores, pools, rule):
  """One weight per voting trace, list of floats; pools: the number of each one's answer. Checks that the scores fit the rule."""
  if rule == "majority":
    return [1.0] * len(pools)
  scores = np.asarray(scores, np.float64)
  if not np.all(np.isfinite(scores)):
    raise ValueError("scores must be finite")
  if rule == "rank":
    return rank_weights(scores).tolist()
  if np.any(scores < 0.0) or (rule != "deepconf" and np.any(scores > 1.0)):
    wanted = "confidences >= 0" if rule == "deepconf" else "probabilities in [0, 1]"
    raise ValueError(f"rule {rule!r} wants {wanted}, got scores from {scores.min():g} to {scores.max():g}")
  return (logit_weights(scores, max(pools) + 1) if rule == "logit" else scores).tolist()


def rank_weights(scores):
  """Ranks by score mapped linearly to [0, 1]: the best 1, the worst 0; ties share their mean rank.

  A single score gets 1. Args: scores f64[N]. Returns: f64[N].
  """
  scores = np.asarray(scores, np.float64)
  if len(scores) == 1:
    return np.ones(1)
  _, which, counts = np.unique(scores, return_inverse=True, return_counts=True)
  below = np.cumsum(counts) - counts
  mean_rank = below + (counts - 1) / 2.0  # ranks 0 .. N-1, worst first
  return mean_rank[which] / (len(scores) - 1)


def logit_weights(posteriors, answers):
  """log(1 + max(K - 1, 1) q / (1 - q)) of posteriors q, for K different answers.

  Were traces independent, and wrong ones spread evenly over the K - 1 other answers, then the answer with the largest sum of
  log((K - 1) q / (1 - q)) would be the likeliest. The 1 keeps a weight above 0, where such a sum would turn against its answer; q
  counts as SUREST at most. Args: posteriors f64[N] in [0, 1]; answers: K >= 1. Returns: f64[N].
  """
  q = np.minimum(np.asarray(posteriors, np.float64), SUREST)
  return np.log1p(max(answers - 1, 1) * q / (1.0 - q))


def pools_of(answers, equal=None):
  """The number of each answer among the different ones, in order of appearance, None for no answer; `equal` as for `vote`."""
  pools, first, out = {}, [], []  # pools: stripped text -> number; spares `equal` for texts already seen
  for answer in answers:
    if answer is None:
      out.append(None)
      continue
    text = answer.strip()
    if text not in pools:
      same = (i for i, other in enumerate(first) if equal is not None and equal(other, answer))
      pools[text] = next(same, len(first))
      if pools[text] == len(first):
        first.append(answer)
    out.append(pools[text])
  return out


def _winner(ballots):
  """First answer of the pool with the largest weight; ballots: (answer, pool, weight) in order of appearance."""
  first, sums = {}, {}
  for answer, pool, weight in ballots:
    first.setdefault(pool, answer)
    sums.setdefault(pool, []).append(weight)
  totals = {pool: math.fsum(weights) for pool, weights in sums.items()}
  # Sums equal but for float rounding are a tie: 0.1 + 0.2 must not beat 0.3.
  highest = max(totals.values())
  return next(first[pool] for pool, total in totals.items() if math.isclose(total, highest, rel_tol=1e-12))


def trace_confidence(logprobs_topk, window=2048, kind="mean"):
  """DeepConf's confidence of one trace, from the top-k log-probabilities at each of its tokens.

  A token's confidence is -(1/k) sum of its top-k log-probabilities (higher: the mass sits on fewer tokens). A
  group's is the mean over `window` consecutive tokens; groups overlap, one for each place where a whole
  window fits, and a trace shorter than the window is one group.

  Args:
    logprobs_topk: f32[T,k], natural logarithms, of the full softmax: sampling masks make them -inf.
    window: tokens per group (2048 in the authors' code).
    kind: "mean" of all tokens; "bottom10", mean of the lowest tenth of the groups (at least one); "lowest"
      group; "tail", mean of the last `window` tokens.
  Returns: float.
  Raises: ValueError for an unknown kind, another shape, an empty trace, a window below 1 or infinite values.
  """
  logprobs = np.asarray(logprobs_topk, np.float64)
  if logprobs.ndim != 2 or 0 in logprobs.shape:
    raise ValueError(f"expected log-probabilities [T,k] with T, k >= 1, got shape {logprobs.shape}")
  if not np.all(np.isfinite(logprobs)):
    raise ValueError("log-probabilities must be finite: take them before top-k or top-p masks")
  return summarize_confidence(-logprobs.mean(axis=1), window, kind)


def summarize_confidence(token, window=2048, kind="mean"):
  """`trace_confidence` from the confidences of a trace's tokens, f[T]."""
  if kind not in CONFIDENCES:
    raise ValueError(f"unknown kind {kind!r}; expected one of {', '.join(CONFIDENCES)}")
  if window < 1:
    raise ValueError(f"window must be at least 1, got {window}")
  token = np.asarray(token, np.float64)
  if kind == "mean":
    return float(token.mean())
  if kind == "tail":
    return float(token[-window:].mean())
  width = min(window, len(token))
  total = np.concatenate([np.zeros(1), np.cumsum(token)])
  group = np.sort((total[width:] - total[:-width]) / width)
  lowest = 1 if kind == "lowest" else max(1, len(group) // 10)
  return float(group[:lowest].mean())
