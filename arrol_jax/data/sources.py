"""Where problems come from. One source is one text; data.train, data.eval and eval.benchmarks take several, with commas.

  FILE.jsonl, FILE.jsonl.gz   a file, see data.load_problems
  gsm8k                       a benchmark (BENCHMARKS), or any FILE of the folder data.folder less its ending
  tfds:SOURCE                 either of these through TFDS: a copy in array_record form, see data/tfds.py
  hf:ID?KEY=VALUE&...         a Hugging Face data set: an id or a local folder. Keys: config, split (else "train" or "test",
                              as the problems are used); problem, answer, id, source: the columns they are in (dots reach
                              into nested ones: reward_model.ground_truth, prompt.0.content); pattern: the answer is what
                              this finds in its column ("boxed", "answer", "hashes", or a regular expression without
                              comma and &). Without id and source, rows are numbered and the ID is the source.
  reasoning_gym:TASK?size=N&seed=N&...   graded by rewards/gym.py; other keys are fields of the task's config

Every path ends in data.to_problems, with the same checks: the same problems give the same batches whatever the path.
TFDS, datasets and reasoning_gym are imported only where a source asks for them.
"""

from collections.abc import Iterator
import importlib.util
import json
import os
import re
import subprocess
import sys

from arrol_jax.data.hub_sets import SETS
from arrol_jax.data.problems import NOT_JSONL, Problem, read_jsonl, to_problems
from arrol_jax.rewards import extract_answer
from arrol_jax.rewards.extract import check_pattern
from arrol_jax.running import shipped
from arrol_jax.types import UserError

# name -> (file to train on, file to evaluate on), without ending
BENCHMARKS = {
  "gsm8k": ("gsm8k_train", "gsm8k_test"), "math": ("math_train", "math_test"),
  **{name: (file, file) for name, file in (
    ("dapo_math_17k", "dapo_math_17k_clean"), ("math500", "math500"), ("amc23", "amc23"), ("aime24", "aime24"),
    ("aime25", "aime25"), ("minerva_math", "minerva_math"), ("olympiadbench", "olympiadbench"))},
}
# prefix -> its modules; TFDS imports importlib_resources and does not ask for it
_MODULES = {"tfds": ("tensorflow_datasets", "importlib_resources"), "hf": ("datasets",), "reasoning_gym": ("reasoning_gym",)}
_OTHER_FORMATS = (".parquet", ".csv", ".tsv", ".arrow", ".feather", ".xlsx", ".pkl", ".zip", ".tar", ".zst")
_HF_KEYS = {"config", "split", "problem", "answer", "id", "source", "pattern"}


def split_list(sources: str) -> list[str]:
  """The sources of a text that holds several, separated by commas."""
  return [one.strip() for one in sources.split(",") if one.strip()]


def benchmark_names(listed: str) -> dict[str, str]:
  """Held-out sources by the name of their results: the file's without its ending, the whole source where two would share it."""
  paths = split_list(listed)
  names = [os.path.basename(path).partition(".")[0] for path in paths]
  return {name if names.count(name) == 1 else path: path for name, path in zip(names, paths, strict=True)}


def load_problems(sources: str, split: str, folder: str = "", tfds_dir: str | None = None) -> list[Problem]:
  """The problems of one or several sources, in order.

  split: what they are for, "train" or "test"; chooses where a source has both. folder: holds the benchmarks' files.
  tfds_dir: for tfds:, see `tfds.read`.
  Raises UserError, naming the place, for whatever is wrong with a source or a problem, and for an id met before.
  """
  return to_problems(record for source in split_list(sources) for record in _records(source, split, folder, tfds_dir))


def import_early(*listed: str) -> None:
  """Imports TFDS where a source asks for it; a command does so before its threads begin.

  While TFDS is imported, `import` itself is another function in the whole process, and what other threads import meanwhile may
  not be there when they use it.
  """
  if any(_parse(one)[0] == "tfds" for sources in listed for one in split_list(sources)):
    from arrol_jax.data import tfds  # noqa: F401


def check(source: str, split: str, folder: str = "") -> None:
  """Raises UserError where a look at names and files tells that `load_problems` must fail. Reads nothing."""
  kind, name, options = _parse(source)
  for module in _MODULES.get(kind, ()):
    if importlib.util.find_spec(module) is None:
      raise UserError(f"{source}: {module} is not installed: pip install {module.replace('_', '-')}")
  if kind in ("jsonl", "tfds"):
    _file(name, split, folder)


def _records(source: str, split: str, folder: str, tfds_dir: str | None) -> Iterator[tuple[str, dict]]:
  check(source, split, folder)
  kind, name, options = _parse(source)
  if kind == "hf":
    return _huggingface(source, name, {"split": split} | options)
  if kind == "reasoning_gym":
    return _reasoning_gym(source, name, options)
  path = _file(name, split, folder)
  if kind == "tfds":
    from arrol_jax.data import tfds  # imports TFDS

    return tfds.read(path, tfds_dir)
  return read_jsonl(path)


def _parse(source: str) -> tuple[str, str, dict[str, str]]:
  """(kind, name, options) of a source; kind is "jsonl" for files and benchmarks."""
  kind, colon, rest = source.partition(":")
  if not colon or kind not in _MODULES:
    return "jsonl", source, {}
  name, _, query = rest.partition("?")
  options = dict(part.partition("=")[::2] for part in query.split("&") if part)
  if kind in ("tfds", "hf") and not name:
    raise UserError(f"{source}: names nothing; write {'hf:OWNER/NAME or hf:FOLDER' if kind == 'hf' else 'tfds:FILE.jsonl'}")
  if kind == "tfds" and query:
    raise UserError(f"{source}: tfds: takes a file or a benchmark, no options")
  if kind == "hf" and not options.keys() <= _HF_KEYS:
    raise UserError(f"{source}: unknown {', '.join(sorted(options.keys() - _HF_KEYS))}; hf: takes {', '.join(sorted(_HF_KEYS))}")
  if "pattern" in options:
    try:
      check_pattern(options["pattern"])
    except ValueError as e:
      raise UserError(f"{source}: {e}") from e
  if kind == "reasoning_gym" and not {"size", "seed"} <= options.keys():
    raise UserError(f"{source}: say how many entries and from which seed: reasoning_gym:{name}?size=1000&seed=0")
  return kind, name, options


def _file(name: str, split: str, folder: str) -> str:
  """The JSONL file that a source without prefix means."""
  if name.endswith(_OTHER_FORMATS):
    raise UserError(f"data: {name} is no file of JSON lines; {NOT_JSONL}")
  if os.sep in name or name.endswith((".jsonl", ".jsonl.gz")):
    path = shipped.find(os.path.expanduser(name))
    if not os.path.exists(path):
      hub = f"; a data set of the Hugging Face hub is written hf:{name}" if re.fullmatch(r"[\w-]+/[\w.-]+", name) and not (
        name.endswith((".jsonl", ".gz"))) else ""
      raise UserError(f"data: {name} does not exist{hub}{_how_to_get(path)}")
    if os.path.isdir(path):
      raise UserError(f"data: {name} is a folder; give a .jsonl file in it, or hf:{name} for a data set's folder")
    return path
  if not folder:
    raise UserError(f"data: {name} is no .jsonl file; if it is a benchmark's name, say in data.folder where its file is")
  file = BENCHMARKS.get(name, (name, name))[split == "test"]
  for one in (file, name):  # arrol-get's dapo_math_17k is called by its name
    for ending in (".jsonl", ".jsonl.gz"):
      path = os.path.join(folder, one + ending)
      if os.path.exists(path):
        return path
  path = os.path.join(folder, f"{file}.jsonl")
  raise UserError(f"data: {path} does not exist (data.folder, benchmark {name!r}; known: {', '.join(BENCHMARKS)})"
                  f"{_how_to_get(path)}")


def _how_to_get(path: str) -> str:
  """The command that writes a file of this name there, where there is one."""
  folder, file = os.path.split(path)
  return next((f"; arrol-get {name}{'' if folder == 'data' else f' --dir={folder or os.curdir}'} writes it"
               for name, one in SETS.items() if file in {f"{ours}.jsonl" for ours in one.files}), "")


def _huggingface(source: str, name: str, options: dict[str, str]) -> Iterator[tuple[str, dict]]:
  import datasets

  try:
    rows = datasets.load_dataset(name, options.get("config"), split=options["split"])
  except Exception as e:  # network, cache, a dataset's own files: it raises a dozen kinds
    raise UserError(f"{source}: {type(e).__name__}: {e}") from e
  if not len(rows):
    raise UserError(f"{source}: the data set is empty")
  for i, row in enumerate(rows):
    where = f"{source}, row {i}"
    record = {field: _column(where, row, options.get(field, field)) for field in ("problem", "answer")}
    record["id"] = _column(where, row, options["id"]) if "id" in options else f"{name}-{i}"
    record["source"] = _column(where, row, options["source"]) if "source" in options else name
    if "pattern" in options:
      record["answer"] = extract_answer(str(record["answer"]), options["pattern"])
    yield where, record


def _column(where: str, row: dict, column: str) -> object:
  """The value at "name" or "name.inner.0"."""
  value = row
  for key in [column] if column in row else column.split("."):
    try:
      value = value[int(key) if isinstance(value, list) else key]
    except (KeyError, IndexError, TypeError, ValueError):
      raise UserError(f"{where}: no column {column!r} (there are: {', '.join(row)})") from None
  return value


def _reasoning_gym(source: str, task: str, options: dict[str, str]) -> Iterator[tuple[str, dict]]:
  """Each entry of the task; its answer says which one it is, for rewards/gym.py to make it again."""
  options = {key: _value(text) for key, text in options.items()}
  code = "import sys; from arrol_jax.rewards import gym; gym.print_entries(*sys.argv[1:])"
  path = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
  # In a process of its own: some tasks draw in the order of a set, which is the same only for the same hash seed.
  done = subprocess.run([sys.executable, "-P", "-c", code, task, json.dumps(options, sort_keys=True)], text=True,
                        capture_output=True, env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"})
  if done.returncode:
    raise UserError(f"{source}: {(done.stderr.strip().splitlines() or ['it ended without a word'])[-1]}")
  name = f"reasoning_gym:{task}"
  for i, (question, digest) in enumerate(json.loads(done.stdout)):
    answer = {"reasoning_gym": task, "options": options, "index": i, "question": digest}
    yield f"{name}, entry {i}", {"id": f"{name}-{options['seed']}-{i}", "problem": question, "source": name,
                                 "answer": json.dumps(answer, sort_keys=True)}


def _value(text: str) -> object:
  """A task's option: a number, true, a list, else the text itself."""
  try:
    return json.loads(text)
  except ValueError:
    return text
