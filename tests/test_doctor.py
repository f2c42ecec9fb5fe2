"""arrol-doctor: what it tells of a config, each warning and each refusal; it writes nothing and compiles nothing."""

import json
from pathlib import Path
import re
import shutil
from types import SimpleNamespace
from unittest import mock

from helpers_train import QUICKSTART, ROOT, SMALL, arguments, command, in_process
import jax
import pytest
from test_model_mistakes import changed, with_token

from arrol_jax import config, doctor
from arrol_jax.rewards.extract import extract_answer, response_with
from arrol_jax.running import workdir

LINES = (ROOT / "experiments/arithmetic/train.jsonl").read_text().splitlines()


def examined(folder, **overrides):
  """arrol-doctor in this process: exit status, page, warnings and errors."""
  keys = SMALL | {"data.eval": ""} | {k.replace("__", "."): v for k, v in overrides.items()}
  seen = in_process(doctor, QUICKSTART, f"--workdir={folder}", *(f"--config.{k}={v}" for k, v in keys.items()))
  said = [x for x in seen.err.splitlines() if not x.startswith("reward function ")]
  assert all(x.startswith(("warning: ", "error: ")) for x in said), said
  return SimpleNamespace(status=seen.status, page=seen.out, warnings=[x[9:] for x in said if x.startswith("warning: ")],
                         errors=[x[7:] for x in said if x.startswith("error: ")])


def refused(folder, *words, **overrides):
  """The page ends with status 2 and one error; train.py ends with the same line."""
  seen = examined(folder, **overrides)
  line, = seen.errors
  assert seen.status == 2 and all(word in line for word in words), line
  assert "ready to run" not in seen.page
  return seen, line


def warned(folder, *words, **overrides):
  """The page ends with status 0 and one warning."""
  seen = examined(folder, **overrides)
  assert (seen.status, seen.errors) == (0, [])
  line, = seen.warnings
  assert all(word in line for word in words), line
  assert "ready to run, with 1 warning" in seen.page
  return seen


def data(tmp_path, *changes, count=20, name="data.jsonl"):
  """A file of so many problems, the first of them changed."""
  records = [json.loads(x) for x in LINES[:count]]
  for record, change in zip(records, changes, strict=False):
    record |= change
  (tmp_path / name).write_text("".join(json.dumps(x) + "\n" for x in records))
  return tmp_path / name


# ---- what is told


def test_the_page_of_a_config_that_works(tmp_path):
  """Everything in one page, by name; no program is compiled and nothing written."""
  with mock.patch.object(jax.stages.Lowered, "compile", side_effect=AssertionError("compiled")):
    seen = examined(tmp_path / "run", data__eval="experiments/arithmetic/test.jsonl")
  assert (seen.status, seen.warnings, seen.errors) == (0, [], [])
  for words in ("2,000 read, of 10 to 10 tokens", "test.jsonl: 4 read", "5|+|5|-|7|-|9|+|1|>", "its answer: -5", "<eos> (18)",
                "max_prompt 16 + max_new 48", "the model has 64 positions", "right: 'A-5' for '-5' -> 1 (correct)",
                "wrong: 'A4' for '-5' -> 0 (wrong)", "4 prompts x 4 rollouts = 16 a step, in 16 slots",
                "micro-batches of tokens x rows x columns: 1,024 x", "programs to compile: 1 row counts x 1 cache lengths",
                "593,344 parameters", "weights 2.3 MiB, reference 2.3 MiB", "no run is there yet", "ready to run"):
    assert words in seen.page, words
  assert not (tmp_path / "run").exists()


def test_programs_are_as_many_as_the_run_compiles(begun):
  folder, settings, said = begun
  count = said.partition("compiled ")[2].partition(" programs")[0]
  assert count.isdigit() and f"{count} programs to compile" in examined(folder / "run", **settings).page


def test_what_was_skipped_is_named(tmp_path):
  path = data(tmp_path, {"problem": "1+2+3+4+5+6+7+8+9>", "id": "long"}, count=20)
  page = examined(tmp_path / "run", data__train=path).page
  assert "19 read" in page and "1 skipped, longer than rollout.max_prompt = 16 tokens: 'long' (18)" in page


def test_special_tokens_are_shown_as_such(tmp_path):
  page = examined(tmp_path / "run", data__template="<bos>{problem}", rollout__max_prompt=16).page
  assert "[<bos>]|5|+|5|-|7" in page


# ---- what looks wrong is a warning


def test_many_skipped_prompts(tmp_path):
  long = [{"problem": "1+2+3+4+5+6+7+8+9>"}] * 3
  warned(tmp_path / "run", "3 of 20 prompts (15%)", "rollout.max_prompt = 16", "18", data__train=data(tmp_path, *long))


def test_what_train_warns_of(tmp_path):
  """No stop token, prompts that are over, two BOS: train.py's own words."""
  without = {"eos_token_id": None}
  model = changed(tmp_path, generation_config=without, config=without, tokenizer_config={"eos_token": None})
  assert "stop tokens   none" in warned(tmp_path / "run", "no stop token", model__path=model).page
  warned(tmp_path / "run", "end with the stop token '<eos>'", data__template="{problem}<eos>")
  warned(tmp_path / "run", "begin with '<bos>' twice", data__template="<bos><bos>{problem}")


@pytest.mark.parametrize("template, overrides, words", [
  ("1+1=", {}, "the chat template leaves the problem out, or a part of it, in 256 of 256 prompts, first 'train-0'"),
  ("{{ messages[-1]['content'][:2] }}", {}, "leaves the problem out, or a part of it"),
  ("{{ messages[-1]['content'] }}", {"data__system": "1+1=2;"}, "leaves the system message out"),
  (None, {"data__template": "Sum {problem}"}, "no token for 'm', 's', 'u' in 256 of 256 prompts"),
])
def test_prompts_that_lose_a_part_of_what_was_meant(tmp_path, template, overrides, words):
  """By the chat template or by the tokenizer; where nothing is lost nothing is said."""
  if template:
    overrides |= {"data__chat": True, "model__path": changed(tmp_path, tokenizer_config={"chat_template": template})}
  warned(tmp_path / "run", words, **overrides)


def test_a_chat_that_keeps_everything(tmp_path):
  template = "{% for m in messages %}{{ m['content'] | trim }} {% endfor %}"
  model = changed(tmp_path, tokenizer_config={"chat_template": template})
  seen = examined(tmp_path / "run", model__path=model, data__chat=True, data__system="1+1=2;", rollout__max_prompt=22,
                  rollout__max_new=40)
  assert (seen.status, seen.warnings) == (0, [])


def test_a_tokenizer_with_more_ids_than_the_embedding(tmp_path):
  model = with_token(tmp_path)
  warned(tmp_path / "run", "20 ids", "19 rows", model__path=model)
  refused(tmp_path / "run", "'?', id 19", "its prompt holds", model__path=model, data__template="{problem}?")


@pytest.mark.parametrize("overrides, words", [
  ({"prune__keep": 0.4}, ["rollout.group_size 4 x prune.keep 0.4", "prune.enabled=False"]),
  ({"prune__cold_start": 5}, ["prune.cold_start is 5 and steps is 5"]),
  ({"prune__detect": (40,), "rollout__max_new": 44}, ["prune.detect is (40,) and rollout.max_new is 44", "almost to its end"]),
  ({"optim__lr": 0}, ["optim.lr is 0"]), ({"optim__warmup": 6}, ["optim.warmup is 6"]),
  ({"loss__clip_low": 0.2}, ["nothing comes of it"]),
  ({"model__lora__targets": "('q','v')"}, ["model.lora.targets: nothing comes of it without model.lora.rank"]),
  ({"model__lora__rank": 4, "optim__lr": 1e-6}, ["optim.lr is 1e-06", "1e-05 and more"]),
])
def test_settings_that_teach_little(overrides, words):
  """The section alone: it reads nothing but the config."""
  from arrol_jax.preflight import page as pages, settings
  keys = SMALL | {k.replace("__", "."): v for k, v in overrides.items()}
  c, _ = config.parse(["x", f"--config={ROOT}/configs/quickstart.py", *(f"--config.{k}={v}" for k, v in keys.items())])
  page = pages.Page()
  settings.settings(page, c)
  line, = page.warnings
  assert all(word in line for word in words), line


def test_data_that_contradict_themselves(tmp_path):
  path = data(tmp_path, {"problem": "1+1>", "answer": "2"}, {"problem": "1+1>", "answer": "3"})
  seen = warned(tmp_path / "run", "1 problems stand there with several answers", "'2' and '3'", "1+1>", data__train=path)
  assert "20 read" in seen.page
  few = data(tmp_path, count=3, name="few.jsonl")
  warned(tmp_path / "run", "3 prompts and a step takes 4", data__train=few)
  warned(tmp_path / "run", f"20 of 20 problems of {path} are in data.train", "not held out", data__train=data(tmp_path),
         eval__problems=0, data__eval=path)


@pytest.mark.parametrize("name, words", [
  ("same", ["all rewards are alike (0.5)"]),
  ("half", ["no answer the reward of a success (reward.success=1)", "0.5"]),
  ("generous", ["a wrong answer the reward of a success (1)"]),
  ("fussy", ["it returned None", "reward 0"]),
  ("fails", ["failed on all 7 answers that it was asked, right and wrong", "first: KeyError: 'gold'"]),
])
def test_reward_functions_that_teach_nothing_or_the_wrong_thing(tmp_path, functions, name, words):
  warned(tmp_path / "run", *words, reward__function=f"doctors_rewards.{name}")


def test_a_reward_in_another_form_than_the_pattern_is_found(tmp_path, functions):
  seen = examined(tmp_path / "run", reward__function="doctors_rewards.tagged")
  assert (seen.status, seen.warnings) == (0, [])
  assert "<answer>-5</answer>' for '-5' -> 1 (correct)" in seen.page and "<answer>4</answer>' for '-5' -> 0 (wrong)" in seen.page


@pytest.mark.parametrize("answers, pattern, words", [
  (["12 apples"], r"A(-?\d+)$", ["1 of 20 reference answers are not right against themselves", "'12 apples'",
                                   "does not find it"]),
  (["x"] * 20, r"A(-?\d+)$", ["finds none of 20 reference answers"]),
])
def test_reference_answers_that_nobody_can_give(tmp_path, answers, pattern, words):
  path = data(tmp_path, *({"answer": x} for x in answers))
  warned(tmp_path / "run", *words, data__train=path, reward__pattern=pattern)


@pytest.fixture
def functions(tmp_path, monkeypatch):
  (tmp_path / "doctors_rewards.py").write_text("""
def same(response, answer): return 0.5
def half(response, answer): return 0.5 * (answer in response)
def generous(response, answer): return 1.0 + response.endswith(answer)
def fussy(response, answer): return 1.0 if answer in response else None
def tagged(response, answer): return float(f"<answer>{answer}</answer>" in response)
def fails(response, answer): raise KeyError("gold")
def three(response, answer, more): return 1
""")
  monkeypatch.syspath_prepend(str(tmp_path))


# ---- what cannot work is refused


@pytest.mark.parametrize("overrides, words", [
  ({"rollout__group_size": 1}, ["rollout.group_size is 1"]),
  ({"rollout__max_new": 16}, ["detection must come before the end"]),
  ({"data__train": "none.jsonl"}, ["none.jsonl does not exist"]),
  ({"model__path": "no/such/model"}, ["no/such/model"]),
  ({"rollout__max_prompt": 17}, ["64 positions", "65 tokens"]),
  ({"mesh__data": 9}, ["needs 9 devices"]),
  ({"rollout__max_prompt": 4}, ["none of", "rollout.max_prompt = 4"]),
])
def test_refusals_are_trains_own(tmp_path, overrides, words):
  _, line = refused(tmp_path / "run", *words, **overrides)
  assert command(*arguments(tmp_path / "other", data__eval="", **overrides)).err == f"error: {line}\n"


def test_a_reward_function_that_cannot_be_called(tmp_path, functions):
  refused(tmp_path / "run", "nothing to give more", reward__function="doctors_rewards.three")


def test_the_rest_is_told_all_the_same(tmp_path, functions):
  """Two faults of two kinds: both are named, each in a line."""
  seen = examined(tmp_path / "run", mesh__data=9, reward__function="doctors_rewards.three")
  assert seen.status == 2 and len(seen.errors) == 2
  assert "needs 9 devices" in seen.errors[0] and "nothing to give more" in seen.errors[1]
  assert "2,000 read" in seen.page and "programs" not in seen.page


def test_what_is_not_there_hides_nothing_else(tmp_path):
  """Before the data are brought, and before the model is: the page goes on with what needs neither."""
  seen, _ = refused(tmp_path / "run", "none.jsonl does not exist", data__train="none.jsonl")
  assert "593,344 parameters" in seen.page and "programs to compile" in seen.page and "read" not in seen.page
  seen = examined(tmp_path / "run", data__train="none.jsonl", model__path="no/such/model")
  assert seen.status == 2 and len(seen.errors) == 2 and "devices       1 of" in seen.page


def test_adapters(tmp_path):
  """More numbers than the model has is a warning; what lies where they go is found before the run, as train.py finds it."""
  seen = warned(tmp_path / "run", "model.lora.rank is 256", model__lora__rank=256, rollout__weights="int8")
  assert "frozen weights 2.3 MiB" in seen.page
  small = examined(tmp_path / "run", model__lora__rank=4, rollout__weights="int8")
  assert small.warnings == [] and "decode weights 772" in small.page.replace("771.7", "772")
  (tmp_path / "run/adapter").mkdir(parents=True)
  (tmp_path / "run/adapter/mine.txt").touch()
  _, line = refused(tmp_path / "run", "mine.txt", model__lora__rank=4)
  assert command(*arguments(tmp_path / "run", data__eval="", model__lora__rank=4)).err == f"error: {line}\n"
  assert examined(tmp_path / "run").status == 0  # without adapters nothing is written there


def test_a_model_larger_than_the_memory(tmp_path):
  with mock.patch("arrol_jax.preflight.sizes.device_memory", lambda: (2**20, "a small one")):
    refused(tmp_path / "run", "a device are needed before any activation", "a small one has 1.0 MiB")


def test_what_runs_ahead_needs_its_cache_while_learning(tmp_path):
  seen = examined(tmp_path / "run", rollout__ahead=1, loss__correction="truncate")
  cache = re.search(r"weights .* and cache (.* MiB):", seen.page)[1]
  assert f"gradients 2.3 MiB and cache {cache}:" in seen.page


# ---- the folder of a run


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
  """A run of two steps of five on a model and problems of its own: (its folder, settings, what it said)."""
  folder = tmp_path_factory.mktemp("begun")
  settings = {"model__path": Path(shutil.copytree(ROOT / "experiments/arithmetic/signs", folder / "model")),
              "data__train": data(folder), "data__eval": "", "checkpoint__export": False, "steps": 2}
  ran = command(*arguments(folder / "run", **settings))
  assert ran.status == 0, ran.err
  return folder, settings | {"steps": 5}, ran.out


def test_a_run_that_goes_on(begun):
  """Keys that differ and may, keys that are new, fingerprints; the folder stays as it is."""
  folder, settings, _ = begun
  path = folder / "run" / "config.json"
  before = path.read_text()
  stored = json.loads(before)
  del stored["rollout"]["explore"]
  path.write_text(json.dumps(stored))
  seen = examined(folder / "run", **settings, optim__micro_tokens=512)
  assert (seen.status, seen.warnings, seen.errors) == (0, [], [])
  for words in ("a run, saved after step 2", "optim.micro_tokens 1024 -> 512", "steps 2 -> 5",
                "new in this version: rollout.explore=0.1", "fingerprints  problems ", "weights "):
    assert words in seen.page, words
  assert json.loads(path.read_text()) == stored
  path.write_text(before)
  assert "it is finished (2 steps)" in examined(folder / "run", **settings | {"steps": 2}).page


def test_a_run_that_cannot_go_on(begun, tmp_path):
  folder, settings, _ = begun
  refused(folder / "run", "other settings (seed)", **settings, seed=1)
  stopped = shutil.copytree(folder / "run", tmp_path / "stopped")
  (stopped / "summary.json").unlink()
  seen = examined(stopped, **settings | {"steps": 1})
  assert any("nothing is ever pruned" in x for x in seen.warnings)
  assert any("holds step 2 and steps is 1" in x for x in seen.errors)
  lines = settings["data__train"].read_text()
  try:
    settings["data__train"].write_text("".join(lines.splitlines(True)[::-1]))
    seen, _ = refused(folder / "run", "the problems of data.train", "changed since this run began", **settings)
    assert "(was " in seen.page
  finally:
    settings["data__train"].write_text(lines)
  with workdir.hold(str(folder / "run")):
    refused(folder / "run", "another run is writing there", **settings)
  lost = shutil.copytree(folder / "run", tmp_path / "lost")
  shutil.rmtree(lost / "checkpoints")
  refused(lost, "checkpoints are gone", **settings)
  (tmp_path / "file").write_text("mine")
  refused(tmp_path / "file", "--workdir=")
  (tmp_path / "other" / "policy").mkdir(parents=True)
  (tmp_path / "other" / "policy" / "thesis.tex").write_text("mine")
  refused(tmp_path / "other", "thesis.tex", "no part of a saved model")


# ---- a response that a pattern finds its answer in


@pytest.mark.parametrize("pattern", [
  None, "boxed", "answer", "hashes", "first_hashes", r"A(-?\d+)$", r"#### (.+)", r"(?i)the answer is:?\s*([^\n]+?)\.?$",
  r"<answer>(.*?)</answer>", r"\*\*Final:\*\* (\S+)", r"(?:Answer|ANSWER)\s*=\s+(-?[0-9]+)", r"^\[(\d+)\]$", r"(\d+)(?!.*\d)"])
def test_a_response_for_a_pattern(pattern):
  assert extract_answer(response_with("57", pattern), pattern) == "57"


def test_no_response_for_a_pattern_that_cannot_hold_the_answer():
  assert response_with("x", r"A(-?\d+)$") is None
  assert response_with("57", r"(?<n>\d)++(?|a|b)(") is None
