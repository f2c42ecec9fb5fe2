"""The evaluation command: what it prints is what the model does, and mistakes end in one line."""

import json
from pathlib import Path
import sys
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from arrol_jax import assemble, assemble_service, assemble_state, bench, config as configuration, evaluate
from arrol_jax.benchmarks import measuring, training
from arrol_jax.learning import batching, update
from arrol_jax.models import sharding
from arrol_jax.models.zoo import ZOO
from arrol_jax.prune import Calibration
from arrol_jax.pruning.head import init_head
from arrol_jax.running.checkpoint import Checkpoints
from arrol_jax.running.workdir import to_json
from arrol_jax.types import UserError
from tests import helpers_train

SMALL = ["--config=configs/quickstart.py", "--config.rollout.slots=8", "--config.rollout.row_buckets=1",
         "--config.rollout.length_buckets=1", "--config.rollout.prompts=4", "--config.eval.problems=8"]


def call(module, monkeypatch, capsys, *arguments):
  """(exit status, lines of stdout, stderr) of an entry point."""
  monkeypatch.setattr(sys, "argv", ["prog", *arguments])
  try:
    configuration.run(module.main)
    status = 0
  except SystemExit as e:
    status = e.code
  out = capsys.readouterr()
  return status, out.out.splitlines(), out.err


@pytest.fixture(scope="module")
def run_with_checkpoint(tmp_path_factory):
  """A workdir whose checkpoint holds the shipped model with its last norm at zero: it can only say one thing."""
  workdir = str(tmp_path_factory.mktemp("run"))
  c, _ = configuration.parse(["prog", *SMALL])
  mesh = assemble.make_mesh(c)
  state = assemble_state.init_state(c, assemble.load(c, mesh), assemble.optimizer(c), mesh, keep_params=False)
  state.params["policy"]["final_norm"] = jax.numpy.zeros_like(state.params["policy"]["final_norm"])
  checkpoints = Checkpoints(workdir, 1)
  checkpoints.save(3, state)
  checkpoints.close()
  return workdir


def test_a_model_and_a_checkpoint_are_told_apart(monkeypatch, capsys, run_with_checkpoint):
  status, lines, _ = call(evaluate, monkeypatch, capsys, *SMALL)
  model = json.loads(lines[-1])
  assert status == 0 and model["step"] == 0 and model["problems"] == 8 and model["samples"] == 1
  assert model["accuracy"] * 8 == round(model["accuracy"] * 8) and 0 < model["accuracy"] < 1
  status, lines, _ = call(evaluate, monkeypatch, capsys, *SMALL, f"--workdir={run_with_checkpoint}")
  broken = json.loads(lines[-1])
  assert status == 0 and broken["step"] == 3 and broken["accuracy"] == 0.0 and broken["truncated"] == 1.0


def test_problems_to_train_on_need_not_be_here(monkeypatch, capsys):
  status, lines, _ = call(evaluate, monkeypatch, capsys, *SMALL, "--config.data.train=gone.jsonl", "--config.eval.every=3")
  assert status == 0 and json.loads(lines[-1])["problems"] == 8
  status, _, err = call(evaluate, monkeypatch, capsys, *SMALL, "--config.data.eval=gone.jsonl")
  assert status == 2 and "gone.jsonl" in err.splitlines()[-1]


def test_a_runs_folder_is_enough(monkeypatch, capsys, run_with_checkpoint):
  """Its config is taken, flags go before it, keys that are no longer known are named; the results stand in a table too."""
  c, _ = configuration.parse(["prog", *SMALL])
  stored = json.loads(to_json(c))
  stored["prune"]["gone"] = 1
  Path(run_with_checkpoint, "config.json").write_text(json.dumps(stored))
  status, lines, err = call(evaluate, monkeypatch, capsys, f"--workdir={run_with_checkpoint}", "--config.eval.problems=4")
  result = json.loads(lines[-1])
  assert status == 0 and (result["step"], result["problems"], result["accuracy"]) == (3, 4, 0.0)
  assert lines[0] == f"{run_with_checkpoint}/config.json: prune.gone is not known here and is left out"
  header, row = err.splitlines()[-2:]
  assert header.split()[:2] == ["accuracy", "problems"] and row.split()[:4] == [result["benchmark"], "0.0%", "±0.0", "4"]
  assert "absl" not in err
  Path(run_with_checkpoint, "config.json").unlink()


def test_a_stored_config_comes_back_as_it_was(tmp_path):
  """Tuples, None and the old names of keys."""
  c, _ = configuration.parse(["prog", *SMALL, "--config.prune.detect=(8,16)", "--config.rollout.top_k=5"])
  stored = json.loads(to_json(c))
  stored["prune"]["control"] = stored["prune"].pop("holdout")
  (tmp_path / "config.json").write_text(json.dumps(stored))
  again, flags = configuration.parse(["prog", f"--workdir={tmp_path}"])
  assert to_json(again) == to_json(c) and again.prune.detect == (8, 16) and flags.workdir == str(tmp_path)
  with pytest.raises(UserError, match="and nowhere holds no run; shipped ones: .*quickstart"):
    configuration.parse(["prog", "--workdir=nowhere"])


def test_votes_and_early_stopping_from_a_checkpoint(monkeypatch, capsys, run_with_checkpoint):
  """The untrained head calls every trace as likely as not: below 0.6 all but a problem's best end at the detection length."""
  options = ["--config.eval.problems=4", "--config.eval.samples=8", "--config.eval.temperature=1.0",
             "--config.eval.deepconf=True", f"--workdir={run_with_checkpoint}"]
  _, lines, _ = call(evaluate, monkeypatch, capsys, *SMALL, *options)
  free = json.loads(lines[-1])
  assert {"maj@8", "rank@8", "posterior@8", "best@8", "deepconf_tail@8", "pass@8", "pass@8_ci"} <= set(free)
  _, lines, _ = call(evaluate, monkeypatch, capsys, *SMALL, *options, "--config.eval.stop_below=0.6")
  stopped = json.loads(lines[-1])
  assert stopped["stopped"] > 0 and free["stopped"] == 0.0 and stopped["tokens"] < free["tokens"]


def test_early_stopping_needs_a_head(monkeypatch, capsys):
  status, _, err = call(evaluate, monkeypatch, capsys, *SMALL, "--config.eval.stop_below=0.5")
  assert status == 2 and "eval.stop_below" in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("arguments, word", [
  (["--workdir=nowhere"], "no checkpoint"),
  (["--step=best"], "--workdir=DIR"),
  (["--config.data.eval="], "nothing to evaluate"),
  (["--config.data.eval=none.jsonl"], "none.jsonl"),
  (["--config.eval.benchmarks=amc23"], "data.folder"),
  (["--config.eval.benchmarks={empty}"], "empty.jsonl: the data file is empty"),
  (["--config.eval.benchmarks=reasoning_gym:basic_arithmetic?size=5&seed=1"], "set reward.function=arrol_jax.rewards.gym.score"),
])
def test_mistakes_end_in_one_line(monkeypatch, capsys, tmp_path, arguments, word):
  """Before anything is evaluated, also where the fault is in the last file of several."""
  (tmp_path / "empty.jsonl").touch()
  status, out, err = call(evaluate, monkeypatch, capsys, *SMALL, *(a.format(empty=tmp_path / "empty.jsonl") for a in arguments))
  assert status == 2 and not out and word in err and err.startswith("error:") and len(err.splitlines()) == 1


def test_tables_of_other_detection_lengths_are_refused(monkeypatch, capsys, tmp_path):
  """A policy whose head has one table, asked to stop traces at two lengths; without stopping, the last table serves."""
  c, _ = configuration.parse(["prog", *SMALL])
  loaded = assemble.load(c, assemble.make_mesh(c))
  loaded.head, loaded.calibration = init_head(loaded.config.width, 8, jax.random.key(0), ("last",)), Calibration()
  loaded.save(tmp_path / "policy")
  arguments = [*SMALL, f"--config.model.path={tmp_path}/policy", "--config.eval.samples=2", "--config.prune.detect=(8,16)",
               "--config.rollout.segment=8", "--config.eval.problems=1", "--config.eval.temperature=1.0"]
  status, out, err = call(evaluate, monkeypatch, capsys, *arguments, "--config.eval.stop_below=0.5")
  assert status == 2 and not out and "tables of 1 detection lengths and prune.detect is (8, 16)" in err
  status, out, _ = call(evaluate, monkeypatch, capsys, *arguments)
  assert status == 0 and "NaN" not in out[-1] and json.loads(out[-1])["ci95"] is None  # of one problem


def test_a_checkpoints_head_goes_before_that_of_the_policy_it_began_from(monkeypatch, capsys, tmp_path):
  """A second stage whose head reads something else, less wide: what evaluates or serves the run reads what its head reads."""
  ridge = {"steps": 1, "data__eval": "", "quality__fit": "ridge"}
  helpers_train.run(tmp_path / "one", quality__inputs="('mean@1/2','logprobs')", **ridge)
  helpers_train.run(tmp_path / "two", quality__inputs="('mean@2/2',)", model__path=tmp_path / "one" / "policy", **ridge)
  arguments = [f"--workdir={tmp_path / 'two'}", "--config.data.eval=experiments/arithmetic/test.jsonl", "--config.eval.samples=2"]
  status, lines, err = call(evaluate, monkeypatch, capsys, *arguments)
  assert status == 0 and "rank@2" in json.loads(lines[-1]), err
  c, _ = configuration.parse(["prog", arguments[0]])
  assemble_service.load(c, str(tmp_path / "two"), 8)
  assert c.quality.inputs == ("mean@2/2",) and c.quality.fit == "ridge"


def test_a_checkpoint_of_another_shape_is_refused(monkeypatch, capsys, run_with_checkpoint):
  status, _, err = call(evaluate, monkeypatch, capsys, *SMALL, f"--workdir={run_with_checkpoint}", "--config.quality.hidden=8")
  assert status == 2 and "does not fit" in err and "Traceback" not in err


def test_bench_decode_reports_what_it_measured(monkeypatch, capsys):
  status, lines, _ = call(bench, monkeypatch, capsys, "decode", "--rows=4", "--group=2", "--prompt=8", "--max_new=16",
                          "--segment=8", "--runs=2")
  line = json.loads(lines[-1])
  assert status == 0 and line["case"] == "decode" and line["shape"] == "tiny" and line["runs"] == 2
  assert line["min"] <= line["tok_s_static"] <= line["max"] and line["tok_s_useful"] > 0
  np.testing.assert_allclose(line["floor_share"], line["tok_s_static"] / line["floor"]["tok_s_static"])


def test_bench_lengths_are_the_workloads():
  lengths = measuring.target_lengths("lognormal", 256, 1024, 0.4, 0.6)
  assert lengths[0] == 1024 and lengths.min() >= 64 and lengths.max() <= 1024
  assert abs(np.median(lengths) - 0.4 * 1024) < 40
  assert measuring.target_lengths("full", 3, 7, 0.4, 0.6).tolist() == [7, 7, 7]


def test_bench_mistakes(monkeypatch, capsys):
  status, _, err = call(bench, monkeypatch, capsys, "decode", "--shape=qwen9")
  assert status == 2 and "qwen9" in err and "tiny" in err
  for wrong in ("--rows=0", "--group=0", "--segment=0", "--runs=0", "--slots=-1"):
    status, out, err = call(bench, monkeypatch, capsys, "decode", wrong)
    assert status == 2 and not out and err.startswith(f"error: {wrong.partition('=')[0]} is ") and len(err.splitlines()) == 1
  status, _, err = call(bench, monkeypatch, capsys, "update", "--attention=foo")
  assert status == 2 and "invalid choice: 'foo'" in err
  status, _, err = call(bench, monkeypatch, capsys, "update", "--weights=int8")
  assert status == 2 and "`update` does not decode" in err
  status, _, err = call(bench, monkeypatch, capsys, "step", "--detect=65")
  assert status == 2 and "--detect: each must" in err


def test_the_preset_runs_each_rollout_to_its_real_length_with_its_real_reward(monkeypatch, capsys):
  work = measuring.preset("gsm8k")
  assert len(work.prompts) == 32 and work.responses.shape == work.rewards.shape == (512,) and work.responses.max() <= 400
  wanted = measuring.requests(ZOO["tiny"], 16, work)
  assert [len(r.tokens) for r in wanted[::16]] == work.prompts and [r.max_tokens for r in wanted] == work.responses.tolist()
  small = measuring.Workload([5, 9], np.array([3, 32, 7, 20, 32, 32, 32, 32]), np.array([0, 1, 0, 1, 1, 1, 1, 1]))
  monkeypatch.setattr(training, "preset", lambda name: small)
  monkeypatch.setitem(measuring.PRESETS, "gsm8k", {"rows": "8", "group": 4, "prompt": 16, "max_new": 32, "detect": "16",
                                                   "segment": 16, "row_buckets": 1, "length_buckets": 1, "tail_sizes": 0})
  status, lines, _ = call(bench, monkeypatch, capsys, "step", "--preset=gsm8k", "--runs=1", "--micro_tokens=512")
  line = json.loads(lines[0])
  assert status == 0 and line["tokens_generated"] == 190 and line["rows"] == 8
  assert line["rows_trained"] == 4  # the second group is all right
  status, _, err = call(bench, monkeypatch, capsys, "step", "--preset=gsm8k", "--rows=16")
  assert status == 2 and "--rows" in err and len(err.splitlines()) == 1


def test_the_floor_of_decoding_counts_each_groups_own_prompt():
  """Two groups of four, prompts of 5 and 9 tokens, responses of 2 and 3: 3 steps read the weights, columns by hand."""
  a, c = SimpleNamespace(group=4, cache=None, dtype="float32", weights=None), ZOO["tiny"]
  work = measuring.Workload([5, 9], np.array([2] * 4 + [3] * 4))
  column, weights = measuring.cache_bytes(c, a), 4 * c.num_params()
  for shared, columns in ((False, 5 * 8 + 9 * 12), (True, 5 * 2 + 9 * 3)):
    floor = measuring.decode_floor(c, a, work, 8, {"read_bytes_s": 1.0}, shared)
    assert floor == (columns + 4 * 3 + 4 * 6) * column + 3 * weights
  for shape, parts in (((2, 1, 1), 1), ((1, 1, 2), 2)):  # devices share rows, or their heads; only the latter share weights
    with jax.set_mesh(sharding.make_mesh(*shape)):
      assert measuring.decode_floor(c, a, work, 8, {"read_bytes_s": 1.0}, True) == (37 + 36) * column / 2 + 3 * weights / parts


def test_a_benchmarks_state_lies_on_a_mesh_as_a_steps_result_does():
  """Or its first steps would compile for other shardings than the rest."""
  mesh = sharding.make_mesh(1, 2, 1)
  with jax.set_mesh(mesh):
    state, optimizer = measuring.fresh_state(ZOO["tiny"], mesh)
    grads, _ = update.zeros(ZOO["tiny"], state.params["policy"])
    taught = batching.empty_examples(state.params["head"], ZOO["tiny"].width, 2)
    scalars = dict.fromkeys(update.SCALARS, np.float32(1))
    before = [(x.sharding, x.ndim) for x in jax.tree.leaves(state.changing)]
    after, _ = update.apply(state.changing, grads, scalars, taught, head_weight=1.0, optimizer=optimizer)
  assert all(x.sharding.is_equivalent_to(*was) for x, was in zip(jax.tree.leaves(after), before, strict=True))


def test_bench_scale_compares_with_one_device(monkeypatch, capsys):
  options = "--rows=8 --group=4 --prompt=8 --max_new=32 --detect=16 --segment=16 --runs=1 --row_buckets=1 --length_buckets=1"
  options += " --tail_sizes=0 --micro_tokens=512 --devices=2 --chip=h100 --weights=int8"
  status, lines, _ = call(bench, monkeypatch, capsys, "scale", *options.split())
  one, weak, strong = map(json.loads, lines)
  assert status == 0 and [(x["scaling"], x["devices"], x["rows"]) for x in (one, weak, strong)] == [
    ("weak", 1, 8), ("weak", 2, 16), ("strong", 2, 8)]
  assert one["share_of_linear"]["step"] == 1.0 and strong["mesh"] == {"data": 1, "fsdp": 2, "tensor": 1}
  assert weak["share_of_linear"]["step"] == pytest.approx(one["sec_step"] / weak["sec_step"])
  assert one["bytes_moved"] == 0 < strong["bytes_moved_pruned"] < weak["bytes_moved"] and weak["weights"] == "int8"
  phases = ("generate", "logprob", "update", "rest")
  assert weak["prediction"]["sec_step"] == pytest.approx(sum(weak["prediction"][f"sec_{k}"] for k in phases))
  assert weak["prediction"]["chip"] == "h100" and 0 < strong["prediction"]["sec_step"] < weak["prediction"]["sec_step"]
  assert strong["share_of_linear"]["update_pruned"] == pytest.approx(one["sec_update_pruned"] / strong["sec_update_pruned"] / 2)


@pytest.mark.parametrize("mesh, word", [("2", "three whole numbers"), ("9,9,9", "needs 729 devices"), ("1,x,1", "literal")])
def test_a_mesh_that_cannot_be_is_refused(monkeypatch, capsys, mesh, word):
  status, _, err = call(bench, monkeypatch, capsys, "step", f"--mesh={mesh}")
  assert status == 2 and word in err and len(err.splitlines()) == 1
