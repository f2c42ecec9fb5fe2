"""What a trace's vote should weigh (experiments/vote_weights.py), on made-up traces whose truth is known."""

import json
import math
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from arrol_jax import prune, voting
from arrol_jax.learning import ridge
from arrol_jax.pruning import linear_head
from arrol_jax.rewards import grade
from configs import quickstart
from experiments import vote_fits, vote_rules, vote_samples, vote_weights
from experiments.vote_fits import FOLDS, Fit, Trainer
from experiments.vote_samples import Samples

TRAIN, TEST, GROUP, WIDE = 60, 60, 8, 6
FEW = [Fit(("mean@2/3",), center, 2.0) for center in (True, False)] + [
  Fit(("siblings", vote_fits.VOTES), True, 2.0, True, ("mean@2/3",))]


def made(signal: float, seed: int = 0) -> Samples:
  """Right traces (two in five) say 0, wrong ones 1 or 2, every ninth nothing; a state's first dimension is higher by `signal`
  deviations where a trace is right."""
  rng = np.random.default_rng(seed)
  shape = TRAIN + TEST, GROUP
  right = rng.random(shape) < 0.4
  answers = [[None if i % 9 == 8 and not r else "0" if r else str(1 + i % 2) for i, r in enumerate(row)] for row in right]
  x = rng.normal(size=(*shape, WIDE))
  x[..., 0] += signal * right
  tokens = rng.integers(5, 9, shape)
  return Samples(np.arange(shape[0]) >= TRAIN, right.astype(np.float32), answers,
                 {"mean@2/3": vote_samples.stored(x.reshape(-1, WIDE), TRAIN * GROUP).reshape(x.shape),
                  "siblings": rng.normal(size=(*shape, 1)).astype(np.float32)},
                 rng.gamma(9.0, 1.5, tokens.sum()).astype(np.float32), tokens.astype(np.int32), None, {"model": "none"})


def trainer_of(samples: Samples) -> Trainer:
  some = samples.part(~samples.test)
  return Trainer(some, vote_rules.pools_of(some.answers))


@pytest.fixture(scope="module")
def trainer():
  return trainer_of(made(2.0))


# ---- votes


def most_confident(answers, scores, share):
  """The answers of this share of the traces that have one, and of those that tie with the last of them; None for the others."""
  voters = sorted((s for s, a in zip(scores, answers, strict=True) if a is not None), reverse=True)
  last = voters[max(1, math.ceil(share * len(voters) - 1e-9)) - 1] if voters else 0.0
  return [a if s >= last else None for s, a in zip(scores, answers, strict=True)]


def test_many_votes_are_those_of_voting():
  """Ties, answers in two spellings, and traces without an answer included."""
  rng = np.random.default_rng(0)
  answers = [[rng.choice(["1", "2", "3", "0.5", "1/2", None]) for _ in range(7)] for _ in range(300)]
  answers[0] = [None] * 7
  pools, rules = vote_rules.pools_of(answers), vote_rules.rules()
  right = np.take_along_axis(rng.random((300, 7)), np.maximum(pools, 0), axis=1)  # names the answer
  scores = np.round(rng.random((300, 7)), 1)
  untied = scores + 1e-3 * rng.random((300, 7))  # where only the best vote: confidences are not rounded
  votes, same = vote_rules.ballots(pools, right), lambda a, b: grade(f"\\boxed{{{b}}}", a) > 0
  known = vote_rules.Known(scores, scores, scores)
  totals = {name: rules[name](known, pools) for name in ("majority", "rank", "posterior", "logit", "best")}
  totals |= {f"deepconf {top}": vote_rules.summed(vote_rules.tops(untied, pools >= 0, top), pools) for top in (None, 0.1, 0.5)}
  for name, total in totals.items():
    found = vote_rules.hits(total, votes)
    for row, said, score, hit in zip(right, answers, untied if "deepconf" in name else scores, found, strict=True):
      if name == "best":
        winner = max((i for i, a in enumerate(said) if a is not None), key=lambda i: score[i], default=None)
        winner = None if winner is None else said[winner]
      else:
        rule, _, top = name.partition(" ")
        if top not in ("", "None"):
          said = most_confident(said, score, float(top))
        winner = voting.vote(said, score.tolist(), rule, equal=same)
      assert hit == pytest.approx(0.0 if winner is None else row[said.index(winner)]), (name, said, score)


def test_weights_by_hand():
  """Answers a, b, a, b with z = 3, 0, 0, 2.5: sums of exp(z) 21.1 and 13.2, means 1.5 and 1.25, of the square roots 2.24 + 1 and
  1 + 1.87, of the ranks' squares 1 + 1/36 and 4/9 + 1/36."""
  pools = np.array([[0, 1, 0, 1]])
  z = np.array([[3.0, 0.0, 0.0, 2.5]])
  rules, known = vote_rules.rules(), vote_rules.Known(z, z / 4, z / 4)
  share = lambda name: (lambda t: t[0, 0] / t[0].sum())(rules[name](known, pools))
  assert share("exp(1 z)") == pytest.approx((np.exp(3) + 1) / (np.exp(3) + 2 + np.exp(2.5)))
  assert share("rank^2") == pytest.approx((1 + 1 / 36) / (1 + 4 / 9 + 2 / 36))
  pooled = rules["votes x exp(1 mean z)"](known, pools)
  np.testing.assert_allclose(pooled[0, :2], [np.log(2) + 1.5, np.log(2) + 1.25])
  assert np.isneginf(pooled[0, 2:]).all()


def test_some_traces_vote_among_themselves():
  votes = vote_rules.Ballots(np.array([[0, 1, 1]]), np.array([[1.0, 0.0, 0.0]]))
  one = lambda pools: vote_rules.summed(np.ones((1, 3)), pools)
  some = np.array([[True, True, False]])
  assert vote_rules.hits(one(votes.pools), votes)[0] == 0.0
  assert vote_rules.hits(one(np.where(some, votes.pools, -1)), votes, some)[0] == 1.0


# ---- fits


@pytest.mark.parametrize("center", [True, False])
def test_a_fit_is_the_ridge_of_training_and_its_scores_are_the_heads(center):
  rng = np.random.default_rng(1)
  x, y = rng.normal(size=(12, 5, 4)).astype(np.float32), (rng.random((12, 5)) < 0.4).astype(np.float32)
  counts = rng.random((12, 5)) < 0.8
  columns = np.array([3, 0, 2])
  made = vote_fits.head(vote_fits.together([vote_fits.moments(x[s], y[s], counts[s]) for s in (slice(0, 7), slice(7, 12))]),
                        columns, center, 2.0)
  flat, group = x[..., columns].reshape(60, 3), np.repeat(np.arange(12), 5)
  sums = ridge.add(ridge.empty(3, center), flat, y.reshape(-1), counts.reshape(-1).astype(np.float32), group)
  wanted = ridge.solve(sums, 2.0)
  for name in linear_head.NAMES:
    if getattr(wanted, name) is not None:
      np.testing.assert_allclose(getattr(made, name), getattr(wanted, name), atol=1e-5, err_msg=name)
  found = vote_fits.scores(made, x[..., columns], counts)
  score = linear_head.score(wanted, flat, group, counts.reshape(-1))
  np.testing.assert_allclose(found.levelled.reshape(-1), linear_head.to_logit(wanted, score), atol=1e-4)
  np.testing.assert_allclose(found.alone.reshape(-1), linear_head.alone(wanted, flat), atol=1e-4)


def test_a_fold_is_scored_by_what_did_not_see_it(trainer):
  """Fits, stacks on fits, and posteriors."""
  assert set(trainer.fold) == set(range(FOLDS))
  other = trainer_of(made(2.0))
  other.y = np.where((other.fold == 2)[:, None], 1 - other.y, other.y)
  for fit in FEW[:2]:
    one, two = (vote_fits.known(t, t.out_of_fold(fit)) for t in (trainer, other))
    for a, b in zip(one[1:], two[1:], strict=True):
      assert not np.array_equal(a[trainer.fold != 2], b[trainer.fold != 2])
    scored = [t.out_of_fold(fit).alone for t in (trainer, other)]
    np.testing.assert_array_equal(*(s[trainer.fold == 2] for s in scored))


def test_stored_states_fit_as_they_were():
  """Sixteenths of a deviation lose next to nothing, also where the mean is a thousand deviations."""
  rng = np.random.default_rng(2)
  x = 1000 + rng.normal(size=(800, 20))
  y = (rng.random(800) < 1 / (1 + np.exp(1000 - x[:, 0]))).astype(np.float32)
  x, stored = x.astype(np.float32), vote_samples.stored(x, 400)
  assert stored.dtype == np.int8 and abs(stored[:400].std(axis=0) - 16).max() < 0.5
  sums = lambda x: ridge.add(ridge.empty(20), x, y, np.ones(800, np.float32), np.arange(800) // 8)
  fit = lambda x: linear_head.alone(ridge.solve(sums(x)), x)
  assert np.corrcoef(fit(x), fit(stored.astype(np.float32)))[0, 1] > 0.999


# ---- the choice


def command(monkeypatch, folder, samples) -> tuple[dict, list[dict]]:
  vote_samples.save(samples, f"{folder}/samples")
  monkeypatch.setattr(sys, "argv", ["vote_weights", f"{folder}/samples", f"--out={folder}/out"])
  vote_weights.main()
  with open(f"{folder}/out/choice.json") as choice, open(f"{folder}/out/votes.jsonl") as lines:
    return json.load(choice), [json.loads(x) for x in lines]


@pytest.fixture
def few(monkeypatch):
  monkeypatch.setattr(vote_fits, "fits", lambda _: FEW)
  monkeypatch.setattr(vote_weights, "SIZES", (160,))
  monkeypatch.setattr(vote_weights, "DRAWS", 2)


def test_a_head_that_knows_wins_and_the_choice_never_reads_test_problems(few, monkeypatch, tmp_path, capsys):
  samples = made(2.0)
  choice, lines = command(monkeypatch, tmp_path, samples)
  chosen = next(x for x in lines if x["part"] == "chosen" and x["head"])
  assert chosen["gain"] > 0.15 and chosen["gain_ci"][0] > 0.05 and chosen["gain_deepconf_ci"][0] > 0
  problems = {x["which"]: x for x in lines if x["part"] == "problems"}
  assert problems["test"]["problems"] == TEST and problems["test"]["pass@1"] == pytest.approx(samples.success[TRAIN:].mean())
  assert chosen["accuracy"] - chosen["gain"] == pytest.approx(problems["test"]["majority"])
  head = next(x for x in lines if x["part"] == "head")
  assert head["auc_within"] == pytest.approx(0.92, abs=0.03)  # two deviations apart: 0.921
  sizes = [x for x in lines if x["part"] == "size"]
  assert [(x["size"], x["draws"]) for x in sizes] == [(160, 4), (480, 1)]
  assert sizes[-1]["accuracy"] == chosen["accuracy"]
  assert len({(x["head"], x["rule"]) for x in lines if x["part"] == "after"}) == sum(x["part"] == "after" for x in lines)
  assert (tmp_path / "out/votes.png").stat().st_size > 10_000
  # Other test problems: the same choice, other figures.
  success = samples.success.copy()
  success[TRAIN:] = 1 - success[TRAIN:]
  again, others = command(monkeypatch, tmp_path, samples._replace(success=success))
  assert again == choice and next(x for x in others if x["part"] == "chosen" and x["head"])["accuracy"] < chosen["accuracy"]
  # Other training problems: another.
  success[:TRAIN] = 1 - success[:TRAIN]
  assert command(monkeypatch, tmp_path, samples._replace(success=success))[0] != choice


def test_a_head_that_knows_nothing_gains_nothing(few, monkeypatch, tmp_path):
  """Over five draws of 60 problems."""
  def gain(seed):
    samples = made(0.0, seed)
    train = vote_weights.split(samples, False)
    trainer = Trainer(train.samples, train.votes.pools)
    choice, found = vote_weights.choose(train, trainer, FEW[:2])
    return vote_weights.Tested(vote_weights.split(samples, True), trainer, choice), choice

  gains = [tested.vote(tested.known(choice.fit)[0], choice.rule)["gain"] for tested, choice in map(gain, range(5))]
  assert abs(np.mean(gains)) < 0.06


# ---- collecting


def test_chunks_come_by_turns():
  order = [(kind, len(some)) for kind, some in vote_samples.turns([list(range(10)), list(range(4))], 2)]
  assert [kind for kind, _ in order] == [0, 0, 1, 0, 0, 1, 0] or [kind for kind, _ in order] == [0, 1, 0, 0, 0, 1, 0]
  assert sum(n for kind, n in order if kind == 0) == 10 and sum(n for kind, n in order if kind) == 4


def test_the_policys_own_head_is_asked_as_in_evaluation():
  """The last of a head's parts, on the inputs that it reads, through the last table."""
  head = {name: np.zeros((2, 3), np.float32) for name in ("mean", "between", "within")} | {
    "level": np.float32([0.0, 0.4]), "spread": np.float32([1.0, 0.5])}
  head["within"][1] = [1.0, 0.0, -1.0]
  tables = prune.Calibration(*(jnp.asarray(x, jnp.float32) for x in ([[9, 0], [0, 9]], [[0, 9], [9, 0]])))
  layout = vote_samples.parts_of(("siblings", "logprobs"), 4, 8)
  loaded = types.SimpleNamespace(head=head, head_inputs=("logprobs", "siblings"), calibration=tables)
  x = np.array([[5.0, 3.0, 1.0], [9.0, 3.0, 1.0]], np.float32)  # siblings, log-probs
  found = vote_samples.own_head(loaded, layout)(x)
  np.testing.assert_allclose(found[:, 0], 1.702 * np.array([3 - 5, 3 - 9]) / 0.5, rtol=1e-6)
  assert (found[:, 1] < 0.2).all()
  loaded.head_inputs = ("mean",)
  assert vote_samples.own_head(loaded, layout) is None


def test_the_command_samples_both_files(monkeypatch, tmp_path, capsys):
  """And what it writes is what it read: answers that are right where the grader says so, log-probs of what was drawn."""
  monkeypatch.setattr(vote_samples, "CHUNK", 1)
  c = ["--config=configs/quickstart.py", "--config.rollout.prompts=4", "--config.rollout.group_size=2",
       "--config.rollout.slots=8", "--config.rollout.row_buckets=1"]
  inputs = "mean@2/3,prompt@2/3,logprobs"
  monkeypatch.setattr(sys, "argv", ["vote_samples", *c, "--prompts=12", "--test=4", f"--inputs={inputs}", f"--out={tmp_path}"])
  vote_samples.main()
  samples = vote_samples.load(str(tmp_path))
  assert samples.test.tolist() == [False] * 12 + [True] * 4 and samples.success.shape == (16, 2)
  assert {name: x.shape for name, x in samples.inputs.items()} == {"mean@2/3": (16, 2, 128), "prompt@2/3": (16, 1, 128),
                                                                   "logprobs": (16, 2, 2)}
  assert len(samples.confidences) == samples.tokens.sum() and (samples.confidences > 0).mean() > 0.9
  for right, said in zip(samples.success, samples.answers, strict=True):
    assert not any(r and a is None for r, a in zip(right, said, strict=True))
  mean, lowest = np.moveaxis(samples.inputs["logprobs"], 2, 0)
  assert (mean < 0).any() and (lowest <= mean).all()
  # No time: a chunk of each.
  monkeypatch.setattr(sys, "argv", [*sys.argv[:-1], "--seconds=1e-9", f"--out={tmp_path}/short"])
  vote_samples.main()
  short = vote_samples.load(f"{tmp_path}/short")
  assert (~short.test).sum() < 12 and short.test.sum() == 4 and "left out" in capsys.readouterr().out


def test_what_is_saved_is_loaded(tmp_path, monkeypatch):
  samples = made(1.0)._replace(own=np.ones((TRAIN + TEST, GROUP, 2), np.float32))
  monkeypatch.setattr(vote_samples, "PART", 1500)  # several files
  assert len(vote_samples.save(samples, str(tmp_path))) > 3
  found = vote_samples.load(str(tmp_path))
  assert found.answers == samples.answers and found.about == samples.about
  np.testing.assert_allclose(found.confidences, samples.confidences, rtol=1e-3)
  for name, x in (found.inputs | {"own": found.own, "tokens": found.tokens, "success": found.success}).items():
    np.testing.assert_array_equal(x, samples.inputs.get(name, getattr(samples, name, None)))
  part = found.part(found.test)
  np.testing.assert_array_equal(part.confidences, found.confidences[found.tokens[:TRAIN].sum():])


def test_mistakes_are_one_line(monkeypatch, tmp_path, capsys):
  both = {vote_samples: [["--prompts=x"], ["--test=0"], ["--inputs=mean@2"], ["--config.data.eval="], ["--prompts=9600"]],
          vote_weights: [[], [str(tmp_path / "none")]]}
  words = iter(["numbers", "more than 0", "no input of a head", "data.eval", "holds 2000", "required", "no samples there"])
  for module, given in both.items():
    for flags in given:
      config = ["--config=configs/quickstart.py", f"--out={tmp_path}/out"] if module is vote_samples else []
      monkeypatch.setattr(sys, "argv", ["x", *config, *flags])
      with pytest.raises(SystemExit) as e:
        vote_weights.configuration.run(module.main)
      err = capsys.readouterr().err
      assert e.value.code == 2 and next(words) in err.splitlines()[-1] and "Traceback" not in err


def test_what_is_tried_holds_what_ships():
  c = quickstart.get_config()
  samples = made(0.0)
  wide = lambda: np.zeros((TRAIN + TEST, 1, 2), np.int8)
  full = samples._replace(inputs={"prompt@2/3": wide(), "logprobs": wide(), "windows": wide()} | samples.inputs)
  assert vote_weights.shipped(vote_fits.fits(full)) == Fit(vote_fits.SHIPPED, c.quality.center, c.quality.strength)
  assert vote_weights.shipped(vote_fits.fits(samples)) is None
