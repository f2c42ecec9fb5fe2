"""Math data sets as the Hugging Face hub has them, into our JSONL: {"id", "problem", "answer", "source"} a line.

`SETS` says where each is and what its rows hold; `convert` reads a folder with its files, laid out as in the hub's repository.
Left out: loading scripts, other splits and languages, and the removal of problems that training and evaluation sets share
(experiments/leakage.py tells of those).
"""

from collections.abc import Iterator
import dataclasses
import filecmp
from fnmatch import fnmatch
import json
import os
from pathlib import Path
import re

from arrol_jax.data.problems import FIELDS, read_jsonl, to_problems
from arrol_jax.rewards import extract_answer
from arrol_jax.running import streams
from arrol_jax.types import UserError

# What stands around a problem of DAPO-Math-17k.
_DAPO = re.compile(r"\ASolve the following math problem step by step\. The last line of your response should be of the form "
                   r"Answer: \$Answer \(without quotes\) where \$Answer is the answer to the problem\.\s*(.*?)\s*"
                   r"Remember to put your answer on its own line after \"Answer:\"\.?\s*\Z", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class HubSet:
  """One data set of the hub."""
  repo: str
  files: dict[str, tuple[str, ...]]  # our file -> patterns of the hub's files; the first that matches any counts
  pattern: str | None = None         # the answer is what this finds in its column (rewards/extract.py); None: all of it
  id: str | None = None              # column that makes the id; None: rows are numbered
  folded: bool = False               # rows come many times each: a problem is taken once, and not at all with several answers


SETS = {
  "gsm8k": HubSet("openai/gsm8k", {"gsm8k_train": ("main/train*", "train*"), "gsm8k_test": ("main/test*", "test*")}, "hashes"),
  "math": HubSet("EleutherAI/hendrycks_math", {"math_train": ("*/train*", "train*"), "math_test": ("*/test*", "test*")}, "boxed"),
  "math500": HubSet("HuggingFaceH4/MATH-500", {"math500": ("test*",)}, id="unique_id"),
  "dapo-math-17k": HubSet("BytedTsinghua-SIA/DAPO-Math-17k", {"dapo_math_17k": ("data/*", "*")}, folded=True),
  "aime24": HubSet("HuggingFaceH4/aime_2024", {"aime24": ("data/train*", "train*")}, id="id"),
  "aime25": HubSet("opencompass/AIME2025", {"aime25": ("aime2025-I*",)}),
  "amc23": HubSet("math-ai/amc23", {"amc23": ("test*", "data/test*")}),
  "minerva": HubSet("math-ai/minervamath", {"minerva_math": ("test*", "data/test*")}),
  "olympiadbench": HubSet("Hothan/OlympiadBench", {"olympiadbench": ("*OE_TO_maths_en_COMP*",)}, id="id"),
}


def patterns(one: HubSet) -> list[str]:
  """Of all files in the hub's repository that it may need."""
  return sorted({p for some in one.files.values() for p in some if p != "*"})


def convert(name: str, folder: str, out: str) -> dict[str, tuple[int, int]]:
  """Writes the JSONL files of the data set `name` from the hub's files in `folder`, or from such JSONL files that are there
  already (`in_our_form`), which are checked and keep their ids; FILE -> (problems, rows left out).

  Left out are rows without an answer and, where rows come many times each, repetitions and problems with several answers.
  Raises UserError where files or columns are missing, or a problem is not what data/problems.py takes.
  """
  one, written = SETS[name], {}
  os.makedirs(out, exist_ok=True)
  ready = {file: path for file in one.files if (path := in_our_form(folder, file))}
  for file, globs in one.files.items():
    if file in ready:
      problems, target = to_problems(read_jsonl(ready[file])), os.path.join(out, f"{file}.jsonl")
      itself = os.path.exists(target) and os.path.samefile(ready[file], target)
      written[target if itself else _write(out, file, problems)] = len(problems), 0
      continue
    if ready:
      raise UserError(f"{folder}: holds {os.path.basename(next(iter(ready.values())))} in our form, but not {file}.jsonl")
    split = file.rpartition("_")[2]
    source = f"{one.repo}:{split}" if split in ("train", "test") else one.repo
    label = file.replace("_", "-") if split in ("train", "test") else name
    found, rows, seen = [], 0, {}
    for where, row in _rows(folder, globs, f"{name} ({one.repo})"):
      rows += 1
      record = _record(where, row, one)
      if record["answer"] is None:
        continue
      if one.folded:
        first = seen.setdefault(record["problem"], record)
        if first is not record:
          first["several"] = first.get("several", False) or first["answer"] != record["answer"]
          continue
      found.append((where, record | {"source": source, "id": f"{label}-{len(found)}" if not one.id else _id(label, record)}))
    if one.folded:
      found = [(where, record) for where, record in found if not seen[record["problem"]].get("several")]
    problems = to_problems(found)
    if not problems:
      raise UserError(f"{folder}: no row of {name} has a problem and an answer")
    written[_write(out, file, problems)] = len(problems), rows - len(problems)
  return written


def in_our_form(folder: str, file: str) -> str | None:
  """FILE.jsonl or FILE.jsonl.gz in `folder` whose first line is a problem as this module writes it; None without one."""
  for path in (os.path.join(folder, f"{file}.jsonl{end}") for end in ("", ".gz")):
    if os.path.isfile(path) and set(FIELDS) <= set(next(read_jsonl(path))[1]):
      return path
  return None


def _write(out: str, file: str, problems: list) -> str:
  """FILE.jsonl of the problems, in one move; its path. UserError where a file of other content is there."""
  path = os.path.join(out, f"{file}.jsonl")
  with streams.naming(path), open(f"{path}.part", "w", encoding="utf-8") as f:
    f.writelines(json.dumps(dataclasses.asdict(p), ensure_ascii=False) + "\n" for p in problems)
  if os.path.exists(path) and not filecmp.cmp(path, f"{path}.part", shallow=False):
    os.remove(f"{path}.part")
    raise UserError(f"{path} is there and holds something else: move it away, or give another --dir")
  os.replace(f"{path}.part", path)
  return path


def _rows(folder: str, globs: tuple[str, ...], name: str) -> Iterator[tuple[str, dict]]:
  """Rows of the parquet and JSONL files that the first fitting pattern names, in the order of their names."""
  root = Path(folder)
  files = sorted(p for p in root.rglob("*") if p.name.endswith((".parquet", ".jsonl", ".jsonl.gz"))
                 and not {".cache", "socratic"} & set(p.relative_to(root).parts))
  chosen = next((some for glob in globs if (some := [p for p in files if fnmatch(p.relative_to(root).as_posix(), glob)])), None)
  if not chosen:
    raise UserError(f"{folder}: no file of {name} there; wanted as the hub has them: {' or '.join(globs)} (.parquet, .jsonl)")
  for path in chosen:
    yield from _parquet(path) if path.suffix == ".parquet" else read_jsonl(str(path))


def _parquet(path: Path) -> Iterator[tuple[str, dict]]:
  import pyarrow as pa  # only where there is such a file
  from pyarrow import parquet

  number = 0
  try:
    with parquet.ParquetFile(path) as file:
      columns = [c for c in file.schema_arrow.names if not c.startswith("image")]
      for batch in file.iter_batches(columns=columns):
        for row in batch.to_pylist():
          number += 1
          yield f"{path}, row {number}", row
  except (pa.ArrowException, OSError) as e:
    raise UserError(f"{path}: not a whole parquet file ({' '.join(str(e).split())[:100]})") from None


def _record(where: str, row: dict, one: HubSet) -> dict:
  """{"problem", "answer", "own"} of a row; answer None: it has none; own: its column for ids."""
  if "reward_model" in row:  # the form of verl
    try:
      problem, answer = row["prompt"][0]["content"], row["reward_model"]["ground_truth"]
    except (KeyError, IndexError, TypeError):
      raise UserError(f"{where}: no prompt.0.content or reward_model.ground_truth") from None
    match = _DAPO.match(problem)
    return {"problem": match[1] if match else problem.strip(), "answer": _answer(answer, one), "own": None}
  problem = next((row[c] for c in ("problem", "question") if c in row), None)
  answer = next((c for c in ("answer", "solution" if one.pattern else "final_answer") if c in row), None)
  if problem is None or answer is None:
    raise UserError(f"{where}: no columns for problem and answer (there are: {', '.join(row)})")
  problem = f"{row['context']}\n{problem}" if row.get("context") else problem
  return {"problem": str(problem).strip(), "answer": _answer(row[answer], one), "own": row.get(one.id)}


def _answer(value: object, one: HubSet) -> str | None:
  """An answer's text: of a list, its members; a whole number without .0; of a worked solution, what it ends in."""
  if isinstance(value, list | tuple):
    value = ", ".join(map(str, value)) if value else None
  if value is None:
    return None
  text = str(value).strip()
  if one.pattern:
    text = (extract_answer(text, one.pattern) or "").strip()
  if one.pattern == "hashes":
    text = text.replace(",", "")
  if re.fullmatch(r"\$[^$]*\$", text):
    text = text[1:-1].strip()
  return re.sub(r"\A(-?\d+)\.0\Z", r"\1", text) or None


def _id(label: str, record: dict) -> str:
  return record["own"] if isinstance(record["own"], str) else f"{label}-{record['own']}"
