"""Configs that would train the wrong way are refused; several held-out sources keep their names; when a workdir was given."""

import contextlib
import json
from pathlib import Path
import sys
import warnings

import pytest

from arrol_jax import config, train
from arrol_jax.data import sources
from arrol_jax.preflight import remarks
from arrol_jax.types import UserError

QUICKSTART = "--config=configs/quickstart.py"


@pytest.mark.parametrize("override, words", [
  ("optim.lr=-1", "optim.lr is -1"),
  ("optim.lr=nan", "optim.lr is nan"),
  ("optim.head_lr=inf", "optim.head_lr is inf"),
  ("optim.weight_decay=-0.1", "optim.weight_decay is -0.1"),
  ("optim.clip_norm=0", "optim.clip_norm is 0"),  # no step at all, and below it steps up the loss
  ("optim.clip_norm=-1", "optim.clip_norm is -1"),
  ("optim.b1=1", "optim.b1 is 1"),
  ("optim.b2=1.5", "optim.b2 is 1.5"),
  ("loss.clip_low=-0.2", "loss.clip_low is -0.2"),
  ("loss.kl_weight=-1", "loss.kl_weight is -1"),
  ("prune.target=60", "prune.target is 60"),
  ("prune.target=nan", "prune.target is nan"),
  ("prune.strength=nan", "prune.strength is nan"),
  ("seed=99999999999999999999", "seed is 99999999999999999999"),
])
def test_numbers_that_would_train_the_wrong_way_are_refused(override, words):
  c, _ = config.parse(["train.py", QUICKSTART, f"--config.{override}"])
  with pytest.raises(UserError, match=words):
    config.check(c)


@pytest.mark.parametrize("said", ["table,head", "table, head", "('table','head')", "('table,head',)", "(table,head)",
                                  "[table, head]", "table,head,", "'table','head'"])
def test_a_list_of_words_needs_no_quotes(said):
  c, _ = config.parse(["p", "--config=quickstart", f"--config.prune.weigh={said}", "--config.prune.detect=8,16"])
  assert tuple(c.prune.weigh) == ("table", "head") and tuple(c.prune.detect) == (8, 16)
  config.check_ranges(c)


def test_a_list_of_words_may_be_empty():
  for said in ("", "()", "[]"):
    c, _ = config.parse(["p", "--config=quickstart", f"--config.prune.weigh={said}"])
    assert tuple(c.prune.weigh) == ()


def test_the_last_word_on_a_list_counts_as_on_all_else():
  argv = ["p", "--config=quickstart", "--config.prune.weigh=table", "--config.steps=3", "--config.prune.detect=8,16",
          "--config.prune.weigh=head,policy", "-config.prune.detect", "(24,)", "--config.steps=4"]
  c, _ = config.parse(argv)
  assert (tuple(c.prune.weigh), tuple(c.prune.detect), c.steps) == (("head", "policy"), (24,), 4)
  c, _ = config.parse([*argv, "--config.prune.weigh="])
  assert tuple(c.prune.weigh) == ()


@pytest.mark.parametrize("flag, words", [("prune.kep=0.4", "'kep' Did you mean \"keep\""), ("zzz=3", "'zzz'"),
                                         ("prune.keep.x=3", "Attempting to lookup: prune.keep.x")])
def test_a_misspelt_flag_is_not_blamed_on_the_config_file(flag, words):
  with pytest.raises(UserError) as e:
    config.parse(["p", "--config=quickstart", "--config.steps=3", f"--config.{flag}"])
  assert str(e.value).startswith("unknown config key: ") and words in str(e.value)


def test_a_key_that_a_config_file_misspells_is_one_short_line_with_the_files_name(tmp_path):
  (tmp_path / "mine.py").write_text("from configs import quickstart\ndef get_config():\n  c = quickstart.get_config()\n"
                                    "  c.promts = 3\n  return c\n")
  with pytest.raises(UserError) as e:
    config.parse(["p", f"--config={tmp_path}/mine.py", "--config.rollout.prompts=3", "--config.steps=1"])
  assert str(e.value).startswith(f'{tmp_path}/mine.py: unknown config key: Key "promts" does not exist')
  assert len(str(e.value)) < 400


@pytest.mark.parametrize("words", [["--config="], ["--config= "], ["--config"], ["--config=", "--config.steps=3"],
                                   ["--config=quickstart", "--config="]])
def test_an_empty_name_of_a_config_is_none(words):
  with pytest.raises(UserError, match="^no --config=NAME or --config=FILE given; shipped ones: "):
    config.parse(["p", *words])


@pytest.mark.parametrize("code", ["sys.exit()", "sys.exit(0)", "def get_config():\n  sys.exit('no GPU')"])
def test_a_config_file_that_ends_the_process_is_one_line(tmp_path, code):
  (tmp_path / "mine.py").write_text(f"import sys\n{code}\n")
  with pytest.raises(UserError, match=r"mine.py: it ends by sys.exit\((0|no GPU)?\) and gives no config"):
    config.parse(["p", f"--config={tmp_path}/mine.py"])


def test_numbers_of_numpy_are_plain_ones_and_true_is_none(tmp_path):
  (tmp_path / "mine.py").write_text(
    "import numpy as np\nfrom configs import quickstart\ndef get_config():\n  c = quickstart.get_config()\n"
    "  c.optim.lr, c.optim.b1, c.optim.warmup = np.float64(1e-5), np.float32(0.5), np.int64(3)\n"
    "  c.stop_seconds, c.prune.detect = np.float64(60), (np.int64(8),)\n  return c\n")
  c, _ = config.parse(["p", f"--config={tmp_path}/mine.py"])
  assert repr((c.optim.lr, c.optim.b1, c.optim.warmup, c.stop_seconds, c.prune.detect)) == "(1e-05, 0.5, 3, 60.0, (8,))"
  config.check(c, files=False)
  c, _ = config.parse(["p", f"--config={tmp_path}/mine.py", "--config.optim.lr=2e-5"])
  assert c.optim.lr == 2e-5
  for value in ("True", "np.bool_(True)", "'fast'"):
    (tmp_path / "mine.py").write_text("import numpy as np\nfrom configs import quickstart\ndef get_config():\n"
                                      f"  c = quickstart.get_config()\n  c.optim.lr = {value}\n  return c\n")
    with pytest.raises(UserError, match="mine.py: TypeError: Could not override field 'lr'"):
      config.parse(["p", f"--config={tmp_path}/mine.py"])


def test_a_config_key_given_as_a_flag_is_named(tmp_path):
  with pytest.raises(UserError, match=r"Unknown command line flag 'steps'. Did you mean --config.steps\?"):
    config.parse(["p", "--config=quickstart", "--steps=20"])


def test_prompts_are_read_at_one_depth():
  """A head reads their state at one; where prompts are chosen too, by that one."""
  parse = lambda *argv: config.parse(["p", "--config=quickstart", "--config.quality.fit=ridge", *argv])[0]
  with pytest.raises(UserError, match="quality.inputs: prompt@1/3, prompt@1: a prompt's state is kept of one layer"):
    config.check(parse("--config.quality.inputs=prompt@1/3,prompt@1"))
  config.check(parse("--config.quality.inputs=prompt@1/3,mean@1"))
  chosen = ("--config.rollout.candidates=64", "--config.quality.inputs=prompt@1/3,logprobs")
  assert remarks.of(parse(*chosen)) == [
    "rollout.candidate_layer is 2/3: prompts are chosen by the state that quality.inputs reads, prompt@1/3"]
  assert not remarks.of(parse(*chosen, "--config.rollout.candidate_layer=1/3")) and not remarks.of(parse(chosen[1]))


def test_greedy_samples_are_remarked_on():
  parse = lambda *argv: config.parse(["p", "--config=quickstart", "--config.eval.samples=4", *argv])[0]
  assert "greedy responses to a problem are all alike" in "".join(remarks.of(parse()))
  assert not remarks.of(parse("--config.eval.temperature=1.0")) and not remarks.of(parse("--config.eval.samples=1"))


def test_a_rate_that_never_arrives_and_thoughts_without_a_template_are_remarked_on():
  parse = lambda *argv: config.parse(["p", "--config=quickstart", "--config.steps=5", *argv])[0]
  assert remarks.of(parse("--config.optim.warmup=6")) == [
    "optim.warmup is 6 and steps is 5: the run ends before the learning rate is reached"]
  assert remarks.of_evaluation(parse("--config.data.thinking=True")) == remarks.of(parse("--config.data.thinking=True")) == [
    "data.thinking: prompts of data sets hear nothing of it without data.chat"]
  assert not remarks.of(parse("--config.optim.warmup=5", "--config.data.thinking=True", "--config.data.chat=True"))


def test_a_mask_with_a_cap_at_which_nothing_is_learned_is_refused():
  argv = ["p", "--config=quickstart", "--config.loss.correction=mask", "--config.loss.correction_cap="]
  for cap, fine in (("1.0", False), ("0.5", False), ("1.01", True)):
    c, _ = config.parse([*argv[:-1], argv[-1] + cap])
    with contextlib.nullcontext() if fine else pytest.raises(UserError, match="must be above 1"):
      config.check(c)


def test_two_words_on_which_share_is_learned_from_are_refused():
  """prune.rule=max_variance learns from prune.keep of what finished; while it does not prune, learn.keep alone counts."""
  argv = ["p", "--config=quickstart", "--config.prune.rule=max_variance", "--config.learn.keep=0.5"]
  with pytest.raises(UserError, match="learn.keep is 0.5; with prune.rule=max_variance it must be 1"):
    config.check(config.parse(argv)[0])
  config.check(config.parse([*argv, "--config.prune.enabled=False"])[0])
  config.check(config.parse(argv[:-1])[0])


def test_the_shipped_values_and_the_ends_of_their_ranges_are_fine():
  for overrides in ((), ("optim.lr=0", "loss.clip_high=0.28", "prune.target=0", "prune.strength=-1", "optim.b1=0")):
    config.check(config.parse(["train.py", QUICKSTART, *(f"--config.{x}" for x in overrides)])[0])


@pytest.mark.parametrize("old, new, value", [("prune.control", "prune.holdout", 0.25),
                                             ("rollout.rounds", "rollout.resampling", 3)])
def test_keys_of_a_release_ago_are_read_with_a_word(old, new, value, tmp_path, capsys):
  """On the command line and in a config file."""
  read = lambda c: c[new.split(".")[0]][new.split(".")[1]]
  c, _ = config.parse(["train.py", QUICKSTART, f"--config.{old}={value}"])
  assert read(c) == value and capsys.readouterr().out.count(f"{old} is called {new} now") == 1
  file = tmp_path / "old.py"
  file.write_text(f"from configs import quickstart\ndef get_config():\n  c = quickstart.get_config()\n"
                  f"  c.{old} = {value}\n  return c\n")
  c, _ = config.parse(["train.py", f"--config={file}"])
  names = (name.split(".")[1] for name in (old, new))
  assert read(c) == value and "{} is called {} now".format(*names) in capsys.readouterr().out


@pytest.mark.parametrize("spelling", [["--workdir=DIR"], ["-workdir=DIR"], ["--workdir", "DIR"]])
def test_a_workdir_is_known_to_be_given(spelling):
  _, flags = config.parse(["evaluate.py", QUICKSTART, *spelling])
  assert flags.workdir == "DIR" and flags["workdir"].present
  _, flags = config.parse(["evaluate.py", QUICKSTART])
  assert flags.workdir == "runs/quickstart" and not flags["workdir"].present


def test_each_held_out_source_has_a_result_of_its_own(monkeypatch, tmp_path, capsys):
  """Two files of four and six problems, and a run that holds more steps than are asked for."""
  assert sources.benchmark_names("a/test.jsonl,b/test.jsonl,amc23") == {
    "a/test.jsonl": "a/test.jsonl", "b/test.jsonl": "b/test.jsonl", "amc23": "amc23"}
  assert sources.benchmark_names("") == {}
  lines = Path("experiments/arithmetic/test.jsonl").read_text().splitlines(True)
  for name, some in (("some", lines[:4]), ("more", lines[4:10])):
    (tmp_path / f"{name}.jsonl").write_text("".join(some))

  def run(steps):
    monkeypatch.setattr(sys, "argv", [
      "train.py", QUICKSTART, f"--workdir={tmp_path}/run", f"--config.data.eval={tmp_path}/some.jsonl,{tmp_path}/more.jsonl",
      f"--config.steps={steps}", *(f"--config.{x}" for x in (
        "rollout.prompts=4", "rollout.group_size=4", "rollout.slots=16", "rollout.row_buckets=1", "rollout.length_buckets=1",
        "optim.micro_tokens=1024", "optim.length_buckets=1", "checkpoint.export=False", "log.backends=jsonl",
        "log.rollouts=40"))])
    config.run(train.main)

  run(2)
  summary = json.loads((tmp_path / "run" / "summary.json").read_text())
  for when in ("eval_before", "eval_after"):
    assert {k: v["problems"] for k, v in summary[when].items()} == {"some": 4, "more": 6}
  assert len((tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()) == 2 * 16  # 40 asked for, each of 16 once
  (tmp_path / "run" / "summary.json").unlink()  # as if killed before its end
  with pytest.raises(SystemExit) as e:
    run(1)
  assert e.value.code == 2 and "holds step 2 and steps is 1" in capsys.readouterr().err


@pytest.mark.parametrize("words, every", [(["eval.every=None"], None), (["eval.every=None", "eval.every=5"], 5),
                                          (["eval.every=5", "eval.every=None"], None), ([], 20)])
def test_what_a_recipe_sets_can_be_switched_off(words, every):
  """None takes back a number and a name, and the last word counts; a key that cannot be None stays what it was, or is refused."""
  c, _ = config.parse(["prog", "--config=gsm8k_qwen3_06b", "--config.checkpoint.best=held_out_accuracy",
                       "--config.checkpoint.best=None", "--config.stop_seconds=None", *(f"--config.{w}" for w in words)])
  assert (c.eval.every, c.checkpoint.best, c.stop_seconds, c.steps) == (every, None, None, 100)
  config.check(c, files=False)
  with pytest.raises(UserError, match="steps=None"):
    config.parse(["prog", "--config=gsm8k_qwen3_06b", "--config.steps=None"])


def test_a_value_may_stand_in_a_word_of_its_own():
  """For every kind of key, with one dash or two, also where the last word takes it back; a switch stands alone."""
  c, values = config.parse(["prog", "--config=gsm8k_qwen3_06b", "--config.stop_seconds", "5", "--config.stop_seconds=None",
                            "-config.eval.every", "None", "--config.prune.weigh", "table", "-config.prune.weigh", "head",
                            "--config.prune.enabled", "--config.steps", "7", "--workdir", "here"])
  assert (c.stop_seconds, c.eval.every, tuple(c.prune.weigh), c.steps, values.workdir) == (None, None, ("head",), 7, "here")
  with pytest.raises(UserError, match="Missing value for flag --config.steps"):
    config.parse(["prog", "--config=gsm8k_qwen3_06b", "--config.steps"])


@pytest.mark.parametrize("word, said", [
  ("prune.kep=0.4", "unknown config key: 'kep'"), ("prune.weigh.x=3", "--config.prune.weigh.x: TypeError"),
  ("prune.detect[0]=24", "--config.prune.detect[0]: IndexError")])
def test_what_a_command_line_gets_wrong_is_not_blamed_on_a_file(word, said, tmp_path):
  with open(tmp_path / "config.json", "w") as f:
    f.write(config.parse(["x", QUICKSTART])[0].to_json())
  for whole in ([QUICKSTART], [f"--workdir={tmp_path}"]):
    with pytest.raises(UserError) as e:
      config.parse(["prog", *whole, f"--config.{word}"])
    assert str(e.value).startswith(said) and "quickstart" not in str(e.value) and "config.json" not in str(e.value)


@pytest.mark.parametrize("section, key, look", [
  ("data", "template", config.check_data), ("model", "path", config.check_model), ("data", "template", config.check),
  ("prune", "floor", lambda c: config.check(c, files=False))])
def test_a_key_that_is_not_there_is_one_line_wherever_it_is_looked_for(section, key, look):
  """arrol-doctor checks the data and the model by themselves."""
  c = config.parse(["x", QUICKSTART])[0]
  with c.unlocked():
    del c[section][key]
  with pytest.raises(UserError, match=f"no key '{key}'; start from configs/base.py"):
    look(c)


def test_a_cache_that_cannot_be_written_is_one_line(tmp_path, monkeypatch, capsys):
  """JAX would warn of each program."""
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
  with warnings.catch_warnings(record=True) as told:
    config.keep_compilations("")
    assert not capsys.readouterr().out
    monkeypatch.setattr(config.os, "access", lambda *_: False)
    config.keep_compilations("")
    warnings.warn("Error writing persistent compilation cache entry for 'jit_x'", stacklevel=1)
  assert capsys.readouterr().out == f"{tmp_path} cannot be written: what is compiled is not kept for the next start\n"
  assert not told
