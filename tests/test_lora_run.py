"""Training adapters by the command: a run that is resumed is the uninterrupted one, the best step is exported, files add up."""

import shutil
from unittest import mock

from helpers_train import arguments, assert_refused, command, in_process, read, run, timeless
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from arrol_jax import assemble, assemble_state, config, evaluate, load_policy
from arrol_jax.running import hosts
from arrol_jax.running.checkpoint import Checkpoints
from arrol_jax.running.workdir import claim

# Held-out accuracy by evaluation, in the order of a run of three steps: before, after steps 1 to 3, after.
SAID = {"eval before": 0.0, "eval 0001": 0.25, "eval 0002": 0.75, "eval 0003": 0.5, "eval after": 0.9}
WITH = {"model__lora__rank": 4, "optim__lr": 1e-2, "eval__every": 1, "checkpoint__best": "held_out_accuracy",
        "checkpoint__every": 2, "checkpoint__keep": 1, "quality__hidden": 8, "prune__cold_start": 1}


def accuracy(c, loaded, engine, prompts, grader, name, head, tables):
  assert "q_lora_a" in loaded_layers(engine) or "qkv_lora_a" in loaded_layers(engine)
  return {"accuracy": SAID[name], "problems": len(prompts)}


def loaded_layers(engine):
  return engine.params["layers"][0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """(an uninterrupted run of three steps, one that ended after two and went on)."""
  folder = tmp_path_factory.mktemp("runs")
  with mock.patch.object(assemble, "accuracy", accuracy):
    said = [run(folder / "whole", steps=3, **WITH).out]
    run(folder / "parts", steps=2, **WITH)
    said.append(run(folder / "parts", steps=3, **WITH).out)
  return folder / "whole", folder / "parts", said


def checkpoint(folder, step=None):
  c, _ = config.parse(["train.py", *arguments(folder, steps=3, **WITH)])
  mesh = assemble.make_mesh(c)
  with jax.set_mesh(mesh):
    loaded = assemble.load(c, mesh)
    state, at = assemble_state.restored(c, loaded, mesh, str(folder), "newest" if step is None else str(step))
  return state, at, loaded


def test_resumed_is_uninterrupted(runs):
  whole, parts, said = runs
  assert "going on after step 2" in said[1]
  assert timeless(read(whole / "metrics.jsonl")) == timeless(read(parts / "metrics.jsonl"))
  assert [x["held_out_accuracy"] for x in read(whole / "metrics.jsonl")] == [0.25, 0.75, 0.5]
  jax.tree.map(np.testing.assert_array_equal, *(jax.device_get(checkpoint(x)[0].changing) for x in (whole, parts)))


def test_checkpoints_hold_adapters_and_the_fingerprint_of_their_base(runs):
  whole, _, _ = runs
  state, step, loaded = checkpoint(whole)
  assert step == 3 and set(state.params["policy"]) == {f"{m}_lora_{x}" for m in loaded.config.lora.targets for x in "ab"}
  assert all(np.any(x) for x in state.params["policy"].values())  # B started at zero
  reader = Checkpoints(str(whole), 1, read_only=True)
  shapes = [tuple(x.shape) for x in jax.tree.leaves(reader.manager.metadata(3).item_metadata)]
  assert loaded.params["embed"].shape not in shapes and loaded.params["layers"]["up"].shape not in shapes
  assert reader._notes(3)["base"] == read(whole / "inputs.json")["weights"]


def test_the_reference_is_the_base(runs):
  """The KL term is 0 before the first update and not after it, without a second copy of the weights."""
  kl = [x["kl"] for x in read(runs[0] / "metrics.jsonl")]
  assert kl[0] == pytest.approx(0, abs=1e-6) and kl[2] > 1e-5


def test_the_best_step_is_kept_and_exported(runs):
  """Step 2 had the highest held-out accuracy: it stays beside the newest, and policy/ and adapter/ are its."""
  for folder, said in zip(runs[:2], runs[2]):
    reader = Checkpoints(str(folder), 1, read_only=True, best=assemble_state.scored_by(folder))
    assert (reader.steps(), reader.best()) == ([2, 3], 2)
    assert "step 2 has the best held_out_accuracy: evaluated and exported" in said
    reader = Checkpoints(str(folder), 1, read_only=True)  # scores of something else are none
    assert reader.best() is None
    state, _, loaded = checkpoint(folder, 2)
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.mlp.up_proj.lora_B.weight"
    np.testing.assert_array_equal(stored[name], np.asarray(state.params["policy"]["up_lora_b"][0]).T)
    assert np.any(stored[name] != np.asarray(checkpoint(folder, 3)[0].params["policy"]["up_lora_b"][0]).T)
    a, b = (np.asarray(state.params["policy"][f"up_lora_{x}"]) for x in "ab")
    want = np.asarray(loaded.params["layers"]["up"], np.float32) + 32.0 / 4 * a @ b
    np.testing.assert_allclose(load_policy(folder).params["layers"]["up"], want, atol=1e-5)
    assert read(folder / "summary.json")["best_step"] == 2


def test_an_evaluation_that_a_signal_cut_off_counts_when_the_run_goes_on(runs, tmp_path):
  """Told to stop in that of the best step, which is saved without a score: line, score and what is exported are the same."""
  folder, told = tmp_path / "cut", []

  def cut_off(*args):
    if "eval 0002" in args and not told:
      told.append(args)
      raise hosts.Preempted("SIGTERM")
    return accuracy(*args)

  with mock.patch.object(assemble, "accuracy", cut_off):
    assert "step 2 is saved" in run(folder, steps=3, **WITH).out
    assert [x.get("held_out_accuracy") for x in read(folder / "metrics.jsonl")] == [0.25, None]
    best = lambda: Checkpoints(str(folder), 1, read_only=True, best=assemble_state.scored_by(folder)).best()
    assert best() == 1
    assert "step 2 has the best held_out_accuracy: evaluated and exported" in run(folder, steps=3, **WITH).out
  assert timeless(read(folder / "metrics.jsonl")) == timeless(read(runs[0] / "metrics.jsonl"))
  assert best() == read(folder / "summary.json")["best_step"] == 2
  stored = [load_file(x / "adapter" / "adapter_model.safetensors") for x in (folder, runs[0])]
  for name in stored[1]:
    np.testing.assert_array_equal(stored[0][name], stored[1][name])
  (folder / "eval_0002.json").unlink()
  assert best() == 3  # the second checkpoint says nothing of itself


def test_scores_of_other_evaluations_are_none(runs, tmp_path):
  """Accuracy on other problems, or of other sampling, says nothing of which step is the best."""
  folder = shutil.copytree(runs[0], tmp_path / "run")
  inputs = read(folder / "inputs.json")
  best = lambda: Checkpoints(str(folder), 1, read_only=True, best=assemble_state.scored_by(folder)).best()
  ways = [({"eval__every": 3, "eval__before": False}, 2), ({"eval__subset": 3}, None), ({}, 2)]  # these say it of themselves
  for more, step in ways:
    claim(str(folder), config.parse(["train.py", *arguments(folder, steps=3, **WITH | more)])[0], inputs)
    assert best() == step
  claim(str(folder), config.parse(["train.py", *arguments(folder, steps=3, **WITH)])[0], inputs | {"held_out": "others"})
  assert best() is None
  said = in_process(evaluate, f"--workdir={folder}", "--step=best")
  assert_refused(said, "--step=best", "2, 3, newest", "of which none has a score")


@pytest.mark.parametrize("overrides, words", [
  ({"model__lora__rank": 8}, ["other settings (model.lora.rank)"]),
  ({"model__lora__targets": "('q','x')"}, ["model.lora.targets", "gate"]),
  ({"model__lora__alpha": 0.0}, ["model.lora.alpha is 0.0"]),
  ({"checkpoint__best": "accuracy"}, ["checkpoint.best is 'accuracy'", "held_out_accuracy"]),
  ({"eval__every": None}, ["checkpoint.best", "set eval.every"])])
def test_mistakes_are_one_line(runs, overrides, words):
  settings = {k: v for k, v in (WITH | overrides).items() if v is not None}
  assert_refused(command(*arguments(runs[0], steps=3, **settings)), *words)


def test_a_run_of_a_version_without_adapters_has_none():
  """Whatever the config says that it is evaluated with."""
  c, _ = config.parse(["evaluate", *arguments("none", **WITH)])
  assert assemble.lora(c) and assemble_state._as_trained(c, None, {"model": {"dtype": "float32"}}) == {}
  assert assemble.lora(c) is None


def test_another_base_is_refused(runs, tmp_path):
  """Adapters of a checkpoint beside a model that is not theirs."""
  c, _ = config.parse(["train.py", *arguments(tmp_path, steps=3, **WITH)])
  mesh = assemble.make_mesh(c)
  with jax.set_mesh(mesh):
    loaded = assemble.load(c, mesh)
    loaded.params["final_norm"] = loaded.params["final_norm"].at[3].add(1)
    with pytest.raises(config.UserError, match="run with another base"):
      assemble_state.restored(c, loaded, mesh, str(runs[0]))


