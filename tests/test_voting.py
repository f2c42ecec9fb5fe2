"""Votes and trace confidences against numbers worked by hand."""

from fractions import Fraction
import math

from hypothesis import given, settings, strategies as st
import numpy as np
import pytest

from arrol_jax.pruning.voting import logit_weights, rank_weights, trace_confidence, trace_weights, vote

quick = settings(max_examples=60, deadline=None)


# ---- vote --------------------------------------------------------------------------------------------------


def test_majority():
  assert vote(["1", "2", "2"], None) == "2"
  assert vote(["1", "2", "2"], [9.0, 0.0, 0.0], rule="majority") == "2"  # scores are not read
  assert vote(["7"]) == "7"


def test_rules_disagree_where_they_should():
  # Majority: 3 for "a". Rank: scores .9 .5 .4 .3 .2 have weights 1, 3/4, 1/2, 1/4, 0: "b" 1 + 3/4, "a" 3/4.
  answers, scores = ["a", "a", "a", "b", "b"], [0.4, 0.3, 0.2, 0.9, 0.5]
  assert vote(answers, scores, rule="majority") == "a"
  assert vote(answers, scores, rule="rank") == "b"
  # Posterior: "a" 0.9, "b" 1.4. With b's at 0.5 and 0.35: "a" 0.9, "b" 0.85, though ranks still say "b".
  assert vote(answers, scores, rule="posterior") == "b"
  scores = [0.4, 0.3, 0.2, 0.5, 0.35]
  assert vote(answers, scores, rule="posterior") == "a"
  assert vote(answers, scores, rule="rank") == "b"  # 3/4 + 1/4 + 0 = 1 against 1 + 1/2


def test_rank_weights():
  np.testing.assert_array_equal(rank_weights([0.2, -3.0, 8.0]), [0.5, 0.0, 1.0])
  np.testing.assert_array_equal(rank_weights([5.0]), [1.0])
  # Ranks from the worst: 0, then 1 and 2 shared as 1.5, then 3; over 3.
  np.testing.assert_allclose(rank_weights([0.9, 0.5, 0.5, 0.1]), [1.0, 0.5, 0.5, 0.0])
  np.testing.assert_array_equal(rank_weights([2.0, 2.0, 2.0]), [0.5, 0.5, 0.5])


def test_logit_weighs_by_log_odds_against_the_other_answers():
  """With two answers log(1 + q / (1 - q)) = -log(1 - q): what counts is the chance that all traces of an answer are wrong."""
  assert trace_weights(["a", "b", None, "a"], [0.5, 0.75, 0.9, 0.0], "logit") == pytest.approx([math.log(2), math.log(4), 0, 0])
  sure = ["a", "b", "b"], [0.95, 0.6, 0.6]  # 0.05 < 0.4 * 0.4, but 0.95 < 0.6 + 0.6
  assert vote(*sure, rule="logit") == "a" and vote(*sure, rule="posterior") == "b"
  np.testing.assert_allclose(logit_weights([0.5, 0.9], 3), np.log([3, 19]))
  assert logit_weights([1.0], 2)[0] == logit_weights([0.99], 2)[0] == pytest.approx(math.log(100))
  # 1/2 and 0.5 are one: two answers, 0.3 against 0.6 * 0.6, then 0.5 * 0.5.
  said, equal = ["a", "1/2", "0.5"], lambda a, b: {a, b} == {"1/2", "0.5"}
  assert vote(said, [0.7, 0.4, 0.4], rule="logit", equal=equal) == "a"
  assert vote(said, [0.7, 0.5, 0.5], rule="logit", equal=equal) == "1/2"


def test_deepconf_weighs_by_confidence():
  answers, scores = ["a", "b", "a", "c", "a"], [4.0, 11.0, 4.0, 12.0, 4.0]
  assert vote(answers, scores, rule="deepconf") == "a"  # 12, 11, 12: a tie, and "a" came first


def test_no_answer_never_wins():
  assert vote([None, None, "3"]) == "3"
  assert vote([None, None], [0.1, 0.2], rule="rank") is None
  # Nor does it take a rank: "x" 1 against "y" 1/2 + 0. With two ranks below them it were 1 against 3/4 + 1/2.
  assert vote([None, "y", "x", "y", None], [0.1, 0.7, 0.9, 0.6, 0.1], rule="rank") == "x"
  assert vote([None, "x", "y", "x"], [None, 0.2, 0.3, 0.2], rule="posterior") == "x"


def test_ties_go_to_the_first():
  assert vote(["b", "a", "a", "b"]) == "b"
  assert vote(["a", "b", "b"], [0.3, 0.1, 0.2], rule="posterior") == "a"  # 0.1 + 0.2 > 0.3 in floats
  assert vote(["b", "b", "a"], [0.1, 0.2, 0.3], rule="posterior") == "b"
  assert vote(["a", "b"], [0.0, 0.0], rule="posterior") == "a"


def test_equivalent_answers_are_pooled():
  # Surrounding whitespace never counts; the first of the pool is returned as it is.
  assert vote(["1/2", " 3 ", "0.5", "3 "]) == " 3 "
  asked = []

  def same_number(a, b):
    asked.append((a, b))
    return Fraction(a) == Fraction(b)

  assert vote(["3", "1/2", "0.5", "0.5", "3"], equal=same_number) == "1/2"
  # "1/2" is asked about "3", "0.5" about both, and texts already seen about nothing.
  assert asked == [("3", "1/2"), ("3", "0.5"), ("1/2", "0.5")]


@pytest.mark.parametrize("args, kwargs, words", [
  ((["1"], [1.0], "plurality"), {}, "unknown rule"),
  (([], []), {}, "at least one"),
  ((["1", "2"], [0.5], "rank"), {}, "2 answers but 1 scores"),
  ((["1", "2"], [0.5]), {}, "2 answers but 1 scores"),
  ((["1"], None, "rank"), {}, "needs scores"),
  ((["1"], [float("nan")], "rank"), {}, "finite"),
  ((["1"], [1.5], "posterior"), {}, "probabilities"),
  ((["1"], [-0.5], "posterior"), {}, "probabilities"),
  ((["1"], [1.5], "logit"), {}, "probabilities"),
  ((["1"], [-0.5], "deepconf"), {}, "confidences"),
])
def test_mistakes_are_named(args, kwargs, words):
  with pytest.raises(ValueError, match=words):
    vote(*args, **kwargs)


traces = st.lists(
  st.tuples(st.sampled_from(["1", "2", "3", None]), st.integers(0, 8)), min_size=1, max_size=12
)


@quick
@given(traces, st.sampled_from(["majority", "rank", "posterior", "deepconf"]))
def test_the_winner_is_an_answer_and_agrees_with_a_plain_sum(rows, rule):
  answers, eighths = zip(*rows)
  winner = vote(list(answers), [n / 8 for n in eighths], rule=rule)
  votes = [(a, n) for a, n in rows if a is not None]
  if not votes:
    assert winner is None
    return
  if rule == "majority":
    votes = [(a, 1) for a, _ in votes]
  if rule == "rank":  # twice the mean rank: those below, plus those not above, less one
    votes = [(a, sum(m < n for _, m in votes) + sum(m <= n for _, m in votes) - 1) for a, n in votes]
  sums = {}
  for a, n in votes:
    sums[a] = sums.get(a, 0) + n
  assert winner == max(sums, key=sums.get)  # the first of equals, in order of appearance


@quick
@given(st.lists(st.integers(-20, 20), min_size=2, max_size=12))
def test_rank_weights_span_zero_to_one_and_reverse(scores):
  weights = rank_weights(scores)
  assert np.all((weights >= 0.0) & (weights <= 1.0))
  assert np.mean(weights) == pytest.approx(0.5)
  np.testing.assert_allclose(rank_weights([-s for s in scores]), 1.0 - weights)
  np.testing.assert_array_equal(rank_weights([7 * s + 3 for s in scores]), weights)  # only the order matters


# ---- trace confidence --------------------------------------------------------------------------------------


def test_trace_confidence_by_hand():
  # Means over k = 2, negated: token confidences 2, 4, 1, 3, 8.
  logprobs = -np.array([[1, 3], [4, 4], [0, 2], [1, 5], [6, 10]], np.float32)
  assert trace_confidence(logprobs) == pytest.approx(18 / 5)
  # Windows of two: 3, 2.5, 2, 5.5.
  assert trace_confidence(logprobs, window=2, kind="lowest") == pytest.approx(2.0)
  assert trace_confidence(logprobs, window=2, kind="bottom10") == pytest.approx(2.0)  # a tenth of four: one
  assert trace_confidence(logprobs, window=2, kind="tail") == pytest.approx(5.5)
  assert trace_confidence(logprobs, window=1, kind="lowest") == pytest.approx(1.0)
  for kind in ("mean", "bottom10", "lowest", "tail"):  # shorter than the window: one group
    assert trace_confidence(logprobs, kind=kind) == pytest.approx(18 / 5)


def test_bottom_tenth():
  # Token confidences 30, 29, ..., 1 in windows of one: the lowest three of thirty are 1, 2, 3.
  logprobs = -np.arange(30, 0, -1, dtype=np.float32)[:, None]
  assert trace_confidence(logprobs, window=1, kind="bottom10") == pytest.approx(2.0)
  # Windows of eleven: 20 of them, centred on 25 .. 6: the lowest two are 6 and 7.
  assert trace_confidence(logprobs, window=11, kind="bottom10") == pytest.approx(6.5)


def test_sure_traces_are_more_confident():
  # Top-2 of a sharp and of a flat distribution: (ln .99 + ln .01) / 2 = -2.31, ln .5 = -0.69.
  sharp, flat = np.log([[0.99, 0.01]] * 3), np.log([[0.5, 0.5]] * 3)
  assert trace_confidence(sharp) == pytest.approx(2.3076, abs=1e-4)
  assert trace_confidence(flat) == pytest.approx(np.log(2))


@pytest.mark.parametrize("logprobs, kwargs, words", [
  (np.zeros((3, 2)), {"kind": "median"}, "unknown kind"),
  (np.zeros((0, 2)), {}, "shape"),
  (np.zeros((3, 0)), {}, "shape"),
  (np.zeros(3), {}, "shape"),
  (np.zeros((3, 2)), {"window": 0}, "window"),
  (np.array([[-1.0, -np.inf]]), {}, "finite"),
])
def test_bad_log_probabilities_are_named(logprobs, kwargs, words):
  with pytest.raises(ValueError, match=words):
    trace_confidence(logprobs, **kwargs)


def test_trace_weights_are_what_vote_adds_up():
  answers, scores = ["1", None, "2", "1", "2"], [0.2, 9.0, 0.9, 0.1, 0.5]
  assert trace_weights(answers) == [1, 0, 1, 1, 1] and trace_weights([None, None], [1, 2], "rank") == [0, 0]
  np.testing.assert_allclose(trace_weights(answers, scores, "rank"), [1 / 3, 0, 1, 0, 2 / 3])
  assert trace_weights(answers, scores, "deepconf") == [0.2, 0, 0.9, 0.1, 0.5]
  for wrong in ((answers, scores, "bogus"), (answers, scores[:3], "rank"), (answers, None, "rank"), ([], [], "rank")):
    for ask in (vote, trace_weights):
      with pytest.raises(ValueError):
        ask(*wrong)
