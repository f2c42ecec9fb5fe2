"""arrol-get against a mirror of the hub with its real layouts, files that are here already, and models by their id."""

import gzip
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys

from helpers_hub import GATED, REPOSITORIES, mirror, write_hub, write_repository
import pytest

from arrol_jax.data import hub_sets, sources
from arrol_jax.models.files import hub
from arrol_jax.types import UserError

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "experiments" / "arithmetic" / "signs"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
  """The mirror: (address, paths asked for). Its only model is the shipped one."""
  folder = tmp_path_factory.mktemp("hub")
  write_hub(folder)
  shutil.copytree(MODEL, folder / "models" / "Tiny" / "Signs-1M")
  (folder / "models" / "Tiny" / "Signs-1M" / "pytorch_model.bin").write_bytes(b"not to be fetched")
  with mirror(folder) as server:
    yield server


def run(name, *argv, folder, home=None, **environment):
  """`python -m arrol_jax.NAME ARGV` in an empty folder, with a hub's cache of its own."""
  environment = os.environ | {"PYTHONPATH": str(ROOT), "HF_HOME": str(home or folder / "home")} | environment
  return subprocess.run([sys.executable, "-m", f"arrol_jax.{name}", *map(str, argv)], cwd=folder, capture_output=True, text=True,
                        env=environment)


def lines(path):
  return [json.loads(line) for line in Path(path).read_text().splitlines()]


def facts(path):
  return [(x["id"], x["problem"], x["answer"]) for x in lines(path)]


EXPECTED = {
  "gsm8k_train": [("gsm8k-train-0", "How many?", "72"), ("gsm8k-train-1", "And now?", "1200")],
  "gsm8k_test": [("gsm8k-test-0", "How much?", "18")],
  "math_train": [("math-train-0", "algebra train", r"\frac{0}{2}"), ("math-train-1", "geometry train", r"\frac{1}{2}")],
  "math_test": [("math-test-0", "algebra test", r"\frac{0}{2}"), ("math-test-1", "geometry test", r"\frac{1}{2}")],
  "math500": [("test/precalculus/807.json", "Convert $(0,3)$.", r"\left( 3, \frac{\pi}{2} \right)")],
  "dapo_math_17k": [("dapo-math-17k-0", "One?", "34"), ("dapo-math-17k-1", "Two?", "5")],
  "aime24": [("aime24-60", "Aya walks.", "204")],
  "aime25": [("aime25-0", "Find the sum.", "70"), ("aime25-1", "Find $b$.", "237")],
  "amc23": [("amc23-0", "Cities", "27"), ("amc23-1", "Towns", "2.5")],
  "minerva_math": [("minerva-0", "Each of the two telescopes", "4.5e33")],
  "olympiadbench": [("olympiadbench-1606", "Xenia", "2"), ("olympiadbench-1610", "Let $n$ be.\nSolve.", "$69$,$84$")],
}


@pytest.mark.parametrize("name", hub_sets.SETS)
def test_each_set_becomes_our_lines(name, tmp_path):
  """Its answers, without the other splits, languages, unanswered rows and repetitions; and data.folder finds it by its name."""
  one = hub_sets.SETS[name]
  write_repository(tmp_path / "raw", REPOSITORIES[one.repo])
  written = hub_sets.convert(name, str(tmp_path / "raw"), str(tmp_path / "data"))
  assert [Path(path).stem for path in written] == list(one.files)
  for path, (count, left_out) in written.items():
    assert facts(path) == EXPECTED[Path(path).stem] and count == len(EXPECTED[Path(path).stem])
    assert all(x["source"].startswith(one.repo) for x in lines(path))
    assert left_out == {"math": 2, "dapo-math-17k": 6, "olympiadbench": 1}.get(name, 0)
  known = next(key for key in sources.BENCHMARKS if key.replace("_", "-").removesuffix("-math") == name)
  assert sources.load_problems(known, "test", str(tmp_path / "data"))


@pytest.mark.parametrize("name", ["gsm8k", "math500"])
def test_files_that_lie_there_without_their_folder_do_too(name, tmp_path):
  one = hub_sets.SETS[name]
  for path, rows in REPOSITORIES[one.repo].items():
    if "socratic" not in path:
      write_repository(tmp_path / "raw", {Path(path).name: rows})
  for path in hub_sets.convert(name, str(tmp_path / "raw"), str(tmp_path / "data")):
    assert facts(path) == EXPECTED[Path(path).stem]


def test_files_in_our_form_are_checked_and_copied(tmp_path):
  """As arrol-get wrote them, gzipped or not, with the ids that they have; over themselves too. What is damaged is refused."""
  own = [{"id": f"mine-{i}", "problem": f"{i}?", "answer": str(i), "source": "me", "level": 3} for i in range(3)]
  text = "".join(json.dumps(x) + "\n" for x in own)
  (tmp_path / "gsm8k_train.jsonl").write_text(text)
  with pytest.raises(UserError, match="gsm8k_train.jsonl in our form, but not gsm8k_test.jsonl"):
    hub_sets.convert("gsm8k", str(tmp_path), str(tmp_path / "out"))
  with gzip.open(tmp_path / "gsm8k_test.jsonl.gz", "wt") as f:
    f.write(text)
  for out in (tmp_path / "out", tmp_path):
    written = hub_sets.convert("gsm8k", str(tmp_path), str(out))
    assert list(written.values()) == [(3, 0), (3, 0)]
    for path in written:
      assert facts(path) == [("mine-0", "0?", "0"), ("mine-1", "1?", "1"), ("mine-2", "2?", "2")]
  assert (tmp_path / "gsm8k_train.jsonl").read_text() == text  # with all that its lines hold
  (tmp_path / "out" / "gsm8k_train.jsonl").write_text("precious")
  with pytest.raises(UserError, match="out/gsm8k_train.jsonl is there and holds something else"):
    hub_sets.convert("gsm8k", str(tmp_path), str(tmp_path / "out"))
  assert (tmp_path / "out" / "gsm8k_train.jsonl").read_text() == "precious" and len(list((tmp_path / "out").iterdir())) == 2
  (tmp_path / "gsm8k_train.jsonl").write_text(text + text[:40] + "\n")
  with pytest.raises(UserError, match="gsm8k_train.jsonl, line 4"):
    hub_sets.convert("gsm8k", str(tmp_path), str(tmp_path / "out"))
  (tmp_path / "gsm8k_train.jsonl").write_text(text + text)
  with pytest.raises(UserError, match="'mine-0' was used before"):
    hub_sets.convert("gsm8k", str(tmp_path), str(tmp_path / "out"))


def test_what_the_hub_asks_to_be_fetched_is_what_is_read():
  """The patterns for the download cover the files that are converted, and leave other configs and languages alone."""
  from fnmatch import fnmatch
  for one in hub_sets.SETS.values():
    wanted = [f for f in REPOSITORIES[one.repo] if any(fnmatch(f, p) for p in hub_sets.patterns(one)) and "socratic" not in f]
    assert wanted and len(wanted) == len([f for f in REPOSITORIES[one.repo] if "socratic" not in f and "_zh_" not in f])


def test_sets_come_from_the_hub_and_then_from_its_cache(served, tmp_path):
  address, asked = served
  names = ["gsm8k", "math500", "dapo_math_17k", "minerva_math"]
  done = run("get", *names, "--dir=sets", folder=tmp_path, HF_ENDPOINT=address)
  assert done.returncode == 0, done.stderr
  assert "sets/gsm8k_train.jsonl: 2 problems\n" in done.stdout
  assert "sets/dapo_math_17k.jsonl: 2 problems (6 rows left out)" in done.stdout
  for file in ("gsm8k_train", "gsm8k_test", "math500", "dapo_math_17k", "minerva_math"):
    assert facts(tmp_path / "sets" / f"{file}.jsonl") == EXPECTED[file]
  assert not any("socratic" in path and "resolve" in path for path in asked)
  count = len(asked)
  again = run("get", "gsm8k", folder=tmp_path, HF_ENDPOINT=address, HF_HUB_OFFLINE="1")
  assert again.returncode == 0 and len(asked) == count and facts(tmp_path / "data" / "gsm8k_test.jsonl") == EXPECTED["gsm8k_test"]


@pytest.mark.parametrize("setting", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": "http://127.0.0.1:9"}])
@pytest.mark.parametrize("name, advice", [("gsm8k", "arrol-get gsm8k --from=FOLDER"),
                                          ("Tiny/Signs-1M", "arrol-get Tiny/Signs-1M --dir=DIR")])
def test_without_the_hub_one_line_says_how(tmp_path, setting, name, advice):
  done = run("get", name, folder=tmp_path, **setting)
  assert done.returncode == 2 and "Traceback" not in done.stderr
  last = done.stderr.splitlines()[-1]
  assert last.startswith("error: ") and "cannot be reached" in last and advice in last


@pytest.mark.parametrize("argv, words", [
  (["gsm9k"], ["gsm9k", "no such data set", "olympiadbench"]),
  (["gsm8k", "--from=none"], ["--from=none", "no such folder"]),
  (["gsm8k", "math", "--from=."], ["--from takes one data set"]),
  (["gsm8k", "--from=."], ["no file of gsm8k (openai/gsm8k)", "main/train*"]),
])
def test_a_mistake_is_one_line(tmp_path, argv, words):
  done = run("get", *argv, folder=tmp_path)
  assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
  assert all(word in done.stderr for word in words), done.stderr


def test_files_that_are_no_data_set_are_refused(tmp_path):
  raw = tmp_path / "test.jsonl"
  for text, word in (('{"question": "?"}\n', "no columns for problem and answer"), ("{", "not JSON"),
                     ('{"problem": "?", "answer": null, "unique_id": "a"}\n', "no row of math500")):
    raw.write_text(text)
    with pytest.raises(UserError, match=word):
      hub_sets.convert("math500", str(tmp_path), str(tmp_path / "out"))
  raw.unlink()
  (tmp_path / "test.parquet").write_bytes(b"PAR1 cut short")
  with pytest.raises(UserError, match="not a whole parquet file"):
    hub_sets.convert("math500", str(tmp_path), str(tmp_path / "out"))


# ---- models


def test_what_reads_as_an_id(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "runs").mkdir()
  assert hub.is_id("Qwen/Qwen3-0.6B") and hub.is_id("a/b")
  for path in ("runs/policy", "models/a/b", "/a/b", "~/a", "./a", "a", "a/model.gguf", "", "../a"):
    assert not hub.is_id(path), path
  assert hub.here("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B" and hub.here("experiments/arithmetic/signs") == str(MODEL)


def test_a_run_takes_its_model_from_the_hub(served, tmp_path):
  """By its id: weights, config and tokenizer come with a progress bar; then the cache serves, also offline."""
  address, asked = served
  tiny = ["--config=quickstart", "--config.model.path=Tiny/Signs-1M", "--config.eval.problems=2", "--config.rollout.slots=8"]
  done = run("evaluate", *tiny, folder=tmp_path, HF_ENDPOINT=address)
  assert done.returncode == 0, done.stderr
  assert json.loads(done.stdout.splitlines()[-1])["problems"] == 2
  assert "model.safetensors" in done.stderr or "Fetching" in done.stderr or "Download" in done.stderr
  fetched = {path.rpartition("/")[2] for path in asked if "GET /Tiny" in path}
  assert {"model.safetensors", "config.json", "tokenizer.json"} <= fetched and "pytorch_model.bin" not in fetched
  offline = run("evaluate", *tiny, folder=tmp_path, HF_HUB_OFFLINE="1")
  assert offline.returncode == 0 and offline.stdout.splitlines()[-1] == done.stdout.splitlines()[-1]


def test_a_model_into_a_folder(served, tmp_path):
  done = run("get", "Tiny/Signs-1M", "--dir=model", folder=tmp_path, HF_ENDPOINT=served[0])
  assert done.returncode == 0 and "--config.model.path=model" in done.stdout
  assert (tmp_path / "model" / "model.safetensors").read_bytes() == (MODEL / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name, words", [("No/Such", ["neither here nor a public model"]), (GATED, ["licence", "hf auth login"])])
def test_a_model_that_is_not_to_be_had_is_one_line(served, tmp_path, name, words):
  done = run("evaluate", "--config=quickstart", f"--config.model.path={name}", folder=tmp_path, HF_ENDPOINT=served[0])
  assert done.returncode == 2 and all(word in done.stderr.splitlines()[-1] for word in words), done.stderr
  assert "Traceback" not in done.stderr
