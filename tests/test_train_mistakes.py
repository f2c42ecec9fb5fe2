"""A mistake in a training command is one line and status 2, and breaks nothing; the config reaches its parts."""

import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

from helpers_train import QUICKSTART, ROOT, arguments, assert_refused, command
import jax
import numpy as np
import pytest

from arrol_jax import assemble, config
from arrol_jax.learning.batching import PackShape
from arrol_jax.learning.losses import LossConfig
from arrol_jax.learning.update import Compute
from arrol_jax.pruning.rule import PruneRule
from arrol_jax.running.workdir import INPUTS, check_settings, claim, differing, fingerprint
from arrol_jax.types import UserError

# ---- a mistake is one line, status 2, and breaks nothing


@pytest.mark.parametrize("override, words", [
  ("stpes=3", ["unknown config key", "stpes", 'Did you mean "steps"']),
  ("prune.kep=0.3", ["unknown config key", "kep", 'Did you mean "keep"']),
  ("purne.keep=0.3", ["unknown config key", "purne"]),
  ("steps=many", ["--config.steps=many"]),
  ("steps=2.5", ["--config.steps=2.5"]),
  ("optim.lr=fast", ["--config.optim.lr=fast"]),
  ("prune.enabled=maybe", ["--config.prune.enabled=maybe"]),
  ("prune=3", ["--config.prune "]),
  ("loss.kl_weight=some", ["--config.loss.kl_weight=some"]),
  ("data.train=none.jsonl", ["data: none.jsonl does not exist"]),
  ("data.train=", ["data.train is empty"]),
  ("data.eval=none.jsonl", ["data: none.jsonl does not exist"]),
  ("data.template=x", ["data.template", "{problem}"]),
  ("model.path=", ["model.path is empty"]),
  ("model.path=no/such/model", ["model.path: no/such/model does not exist"]),
  ("model.dtype=float8", ["model.dtype", "float32 or bfloat16"]),
  ("model.attention=fast", ["model.attention is 'fast'", "must be one of auto, xla, cudnn"]),
  ("model.attention=cudnn", ["model.attention=cudnn needs an NVIDIA GPU and this is a cpu, which can run xla; auto"]),
  ("model.attention=splash", ["model.attention=splash needs a TPU and this is a cpu, which can run xla; auto"]),
  ("rollout.attention=tpu", ["rollout.attention=tpu needs a TPU and this is a cpu, which can run xla; auto"]),
  ("rollout.attention=triton", ["rollout.attention=triton needs an NVIDIA GPU and this is a cpu"]),
  ("rollout.group_size=1", ["rollout.group_size is 1", "at least 2"]),
  ("rollout.prompts=0", ["rollout.prompts is 0"]),
  ("rollout.row_buckets=0", ["rollout.row_buckets is 0"]),
  ("rollout.temperature=0", ["rollout.temperature is 0"]),
  ("rollout.top_k=0", ["rollout.top_k is 0"]),
  ("rollout.top_p=0", ["rollout.top_p is 0"]),
  ("rollout.min_p=1.5", ["rollout.min_p is 1.5"]),
  ("rollout.max_new=16", ["prune.detect is (16,) and rollout.max_new is 16"]),
  ("prune.detect=(64,)", ["prune.detect is (64,) and rollout.max_new is 48"]),
  ("prune.detect=(20,)", ["prune.detect is (20,)", "multiple of rollout.segment (8)"]),
  ("prune.detect=(16,8)", ["prune.detect is (16, 8)", "ascending"]),
  ("prune.detect=(-8,16)", ["prune.detect is (-8, 16)", "0 or more"]),
  ("prune.detect=()", ["prune.detect is ()", "ascending"]),
  ("prune.detect=('a',)", ["prune.detect is ('a',)", "ascending"]),
  ("prune.detect=(16.0,)", ["prune.detect is (16.0,)", "ascending"]),
  ("prune.keep=0.05", ["prune.keep is 0.05", "p_min (0.1)"]),
  ("prune.keep=0.95", ["prune.keep is 0.95", "p_max (0.9)"]),
  ("prune.p_min=0", ["p_min (0.0)"]),
  ("prune.p_max=1.5", ["p_max (1.5)"]),
  ("prune.half_life=-1", ["prune.half_life is -1"]),
  ("quality.short=first", ["quality.short", "'skip' or 'last'"]),
  ("loss.name=ppo", ["loss.name is 'ppo'", "grpo, dapo"]),
  ("loss.aggregate=mean", ["loss.aggregate is 'mean'"]),
  ("checkpoint.every=0", ["checkpoint.every is 0"]),
  ("optim.micro_tokens=0", ["optim.micro_tokens is 0"]),
  ("seed=-1", ["seed is -1"]),
  ("mesh.data=0", ["mesh.data is 0"]),
  ("mesh.data=9", ["mesh:", "needs 9 devices and there are 8"]),
  ("reward.pattern=A(", ["pattern"]),
  ("rollout.max_prompt=4", ["none of", "rollout.max_prompt = 4"]),
])
def test_a_wrong_value_is_one_line(tmp_path, override, words):
  workdir = tmp_path / "run"
  key, _, value = override.partition("=")
  assert_refused(command(*arguments(workdir, **{key: value})), *words)
  assert not (workdir / "config.json").exists()  # the folder is free for the same command without the mistake


@pytest.mark.parametrize("argv, words", [
  ([], ["no --config=NAME or --config=FILE given", "quickstart_clean"]),
  (["--workdir=x"], ["no --config=NAME or --config=FILE given", "quickstart_clean"]),
  (["--config=configs/none.py"], ["configs/none.py: no such config file"]),
  (["--config=configs"], ["configs: no such config file"]),
  ([QUICKSTART, "--workdri=x"], ["workdri", "workdir"]),
  ([QUICKSTART, "extra"], ["unexpected argument 'extra'"]),
])
def test_a_wrong_command_is_one_line(argv, words):
  assert_refused(command(*argv), *words)


@pytest.mark.parametrize("text, words", [
  ("def get_config(:\n", ["SyntaxError"]),
  ("import no_such_module\n", ["ModuleNotFoundError", "no_such_module"]),
  ("from configs import base\ndef get_config():\n  c = base.get_config()\n  c.steps = 'a'\n  return c\n",
   ["'steps'", "int"]),
  ("def get_config():\n  return {'steps': 3}\n", ["must return a ConfigDict"]),
  ("from ml_collections import ConfigDict\ndef get_config():\n  return ConfigDict({'steps': 3})\n",
   ["no key", "configs/base.py"]),
])
def test_a_broken_config_file_is_one_line(tmp_path, text, words):
  path = tmp_path / "mine.py"
  path.write_text(text)
  assert_refused(command(f"--config={path}"), *words)


@pytest.mark.parametrize("content, words", [
  ("", ["the data file is empty"]), ("\n\n", ["the data file is empty"]),
  ('{"id": "1", "problem": "1+1>", "answer": "2", "source": "t"}\n{"id": "2", "problem"\n', ["line 2", "not JSON"]),
  ('{"id": "1", "problem": "1+1>"}\n', ["line 1", "'answer' is missing"]),
])
@pytest.mark.parametrize("which", ["train", "eval"])
def test_bad_data_is_one_line(tmp_path, content, words, which):
  path = tmp_path / "bad.jsonl"
  path.write_text(content)
  assert_refused(command(*arguments(tmp_path / "run", **{f"data__{which}": path})), str(path), *words)
  assert not (tmp_path / "run" / "config.json").exists()


def test_a_model_folder_without_weights_is_one_line(tmp_path):
  model = tmp_path / "model"
  model.mkdir()
  assert_refused(command(*arguments(tmp_path / "run", model__path=model)), str(model), "config.json")
  shutil.copytree(ROOT / "experiments/arithmetic/signs", model, dirs_exist_ok=True)
  (model / "model.safetensors").unlink()
  result = command(*arguments(tmp_path / "run", model__path=model))
  assert_refused(result, str(model), "no weights", "model.safetensors")
  assert not (tmp_path / "run" / "config.json").exists()


def test_a_workdir_that_is_a_file_is_one_line(tmp_path):
  (tmp_path / "file").write_text("mine")
  assert_refused(command(*arguments(tmp_path / "file")), f"--workdir={tmp_path}/file")
  assert_refused(command(*arguments(tmp_path / "file" / "run")), f"--workdir={tmp_path}/file/run")
  assert (tmp_path / "file").read_text() == "mine"


def test_another_programs_log_is_not_wiped(tmp_path):
  """metrics.jsonl in a folder that no run of ours began in."""
  log = tmp_path / "metrics.jsonl"
  log.write_text('{"loss": 1}\n')
  assert_refused(command(*arguments(tmp_path)), "metrics.jsonl is there, and no config.json", "move it away")
  assert log.read_text() == '{"loss": 1}\n' and not (tmp_path / "config.json").exists()
  log.rename(tmp_path / "rollouts.jsonl")
  assert_refused(command(*arguments(tmp_path)), "rollouts.jsonl is there, and no config.json", "move it away")


def test_a_policy_that_no_run_of_the_folder_made_is_not_replaced(tmp_path):
  """The model to begin from among them: an export would take its place."""
  mine = shutil.copytree(ROOT / "experiments/arithmetic/signs", tmp_path / "policy")
  before = {f.name: f.read_bytes() for f in mine.iterdir()}
  assert_refused(command(*arguments(tmp_path)), "policy is there, and no config.json", "move it away")
  assert_refused(command(*arguments(tmp_path, model__path=mine)), "model.path is in", "would replace")
  assert {f.name: f.read_bytes() for f in mine.iterdir()} == before and not (tmp_path / "config.json").exists()


def test_a_mistake_at_the_real_command_line():
  result = subprocess.run([sys.executable, "-m", "arrol_jax.train", QUICKSTART, "--config.stpes=3"], cwd=ROOT,
                          text=True, capture_output=True)
  assert (result.returncode, result.stdout) == (2, "")
  assert_refused(SimpleNamespace(status=2, err=result.stderr), "stpes")


# ---- the config itself


def test_overrides_come_from_the_arguments_given():
  path = f"{ROOT}/configs/quickstart.py"
  c, flags = config.parse(["x", f"--config={path}", "--config.prune.detect=(24,)", "--config.prune.keep=0.3"])
  assert tuple(c.prune.detect) == (24,) and c.prune.keep == 0.3
  assert flags.workdir == os.path.join("runs", "quickstart")
  c, flags = config.parse(["x", "--config", path, "--workdir", "here", "--config.loss.kl_weight=0.1"])
  assert tuple(c.prune.detect) == (16,) and c.loss.kl_weight == 0.1 and flags.workdir == "here"


def test_the_config_reaches_its_parts():
  """Every value lands in the field it is meant for."""
  values = ("prune.keep=0.4", "prune.target=0.6", "prune.strength=0.7", "prune.p_min=0.2", "prune.p_max=0.8",
            "loss.name=dapo", "loss.kl_weight=0.1", "loss.clip_low=0.15", "loss.head_weight=0.0",
            "loss.normalize_std=False", "rollout.max_new=64", "optim.micro_tokens=999",
            "optim.length_buckets=5", "optim.tail_sizes=1", "optim.chunk_tokens=77", "model.attention=xla")
  c, _ = config.parse(["x", f"--config={ROOT}/configs/quickstart.py", *(f"--config.{v}" for v in values)])
  assert assemble.prune_rule(c) == PruneRule((16,), keep=0.4, target=0.6, strength=0.7, p_min=0.2, p_max=0.8,
                                               group_size=c.rollout.group_size)
  assert assemble.loss(c) == LossConfig(0.15, 0.28, "token", 0.1, normalize_std=False, head_weight=0.0, overlong=0.2,
                                        longest=64)
  assert assemble.pack_shape(c) == PackShape(c.rollout.max_prompt + 64, 999, 5, 1)
  assert assemble.compute(c) == Compute("float32", "xla", remat="none", chunk_tokens=77)


def test_random_keys_differ_by_seed_purpose_and_step():
  c, _ = config.parse(["x", f"--config={ROOT}/configs/quickstart.py"])
  other, _ = config.parse(["x", f"--config={ROOT}/configs/quickstart.py", "--config.seed=1"])
  uses = [(purpose, step) for purpose in (assemble.TRAIN, assemble.EVAL, assemble.INIT) for step in (0, 1)]
  keys = [jax.random.key_data(assemble.key(k, *use)) for k in (c, other) for use in uses]
  assert len({tuple(np.asarray(key).tolist()) for key in keys}) == 12
  np.testing.assert_array_equal(keys[0], jax.random.key_data(assemble.key(c, assemble.TRAIN, 0)))


def test_an_evaluation_stays_where_only_when_it_is_made_has_changed(tmp_path, capsys):
  parse = lambda *argv: config.parse(["x", f"--config={ROOT}/configs/quickstart.py", *argv])[0]
  inputs, there = dict.fromkeys((*INPUTS, "held_out"), "a"), ("eval_before", "eval_0002", "eval_all_0004")

  def claimed(*argv, **changed):
    claim(str(tmp_path), parse(*argv), inputs | changed)
    return [name for name in there if (tmp_path / f"{name}.json").exists()], capsys.readouterr()

  claimed("--config.eval.every=2")
  for name in there:
    (tmp_path / f"{name}.json").write_text("{}")
  kept, said = claimed("--config.eval.every=3", "--config.eval.before=False", "--config.eval.at_seconds=(5.0,)")
  assert kept == list(there) and "removed" not in said.out + said.err
  kept, said = claimed("--config.eval.subset=9")
  assert not kept
  assert "another way from now on (eval.subset): eval_0002, eval_all_0004, eval_before removed" in said.out + said.err
  (tmp_path / "eval_before.json").write_text("{}")
  kept, said = claimed("--config.eval.subset=9", held_out="b")
  assert not kept and "(the problems of data.eval): eval_before removed" in said.out + said.err


def test_more_steps_with_a_falling_rate_are_refused_with_the_reason(tmp_path):
  parse = lambda *argv: config.parse(["x", f"--config={ROOT}/configs/quickstart.py", "--config.optim.schedule=cosine", *argv])[0]
  claim(str(tmp_path), parse(), dict.fromkeys((*INPUTS, "held_out"), "a"))
  with pytest.raises(UserError, match=r"other settings \(steps\); with optim.schedule=cosine the rate depends on"):
    check_settings(str(tmp_path), parse("--config.steps=9"))


def test_what_belongs_to_a_run():
  """Its course is the same run; its length, saving, logging, evaluation and mesh are not part of it."""
  parse = lambda *argv: config.parse(["x", f"--config={ROOT}/configs/quickstart.py", *argv])[0]
  same = ("--config.steps=9", "--config.checkpoint.every=3", "--config.log.rollouts=0", "--config.eval.samples=4",
          "--config.mesh.data=2")
  assert fingerprint(parse()) == fingerprint(parse(*same))
  for other in ("seed=1", "optim.lr=1.0", "prune.keep=0.4", "data.train=x"):
    assert fingerprint(parse()) != fingerprint(parse(f"--config.{other}"))
  assert differing({"a": 1, "b": {"c": 2, "d": 3}}, {"a": 1, "b": {"c": 4, "d": 3}, "e": 5}) == ["b.c", "e"]
