"""Problems from JSONL files, prompts from problems, batches as a pure function of (seed, step, host).

NumPy and plain Python; the tokenizer is passed in. Other sources of problems are in sources.py. Left out: any
state of an iterator (a resumed run asks for its step's batch and gets it, on however many hosts).
"""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import gzip
import hashlib
import json
import math
import os
import unicodedata
import zlib

import numpy as np

from arrol_jax.types import UserError

NOT_JSONL = ("problems are read from JSON lines: convert it (pandas: to_json(FILE, orient=\"records\", lines=True)), or give its "
             "folder as hf:FOLDER")
_AT_ONCE = 256  # problems that the tokenizer takes: on all cores, and it asks for Python's lock once
FIELDS = ("id", "problem", "answer", "source")


@dataclasses.dataclass(frozen=True)
class Problem:
  """A question with a checkable answer."""
  id: str
  problem: str
  answer: str
  source: str


@dataclasses.dataclass(frozen=True, eq=False)
class Prompt:
  """A problem as the policy sees it."""
  problem: Problem
  text: str
  tokens: np.ndarray  # i32[L]


def load_problems(path: str) -> list[Problem]:
  """Problems of a JSONL file, gzipped if it ends in .gz, or of several files separated by commas, in file
  order.

  A line is an object with the FIELDS as non-empty text (id and answer may be finite numbers); other fields are
  ignored, as are blank lines. Raises UserError with file and line for: a missing or empty file, what is not
  UTF-8, JSON or such an object, an id that occurred before (in any of the files), a truncated or damaged .gz.
  """
  return to_problems(record for one in path.split(",") for record in read_jsonl(one.strip()))


def read_jsonl(path: str) -> Iterator[tuple[str, dict]]:
  """("FILE, line N", record) of each line that is not blank; faults as in `load_problems`."""
  where = None
  for number, line in _lines(path):
    where = f"{path}, line {number}"
    yield where, _parse(where, line)
  if where is None:
    raise UserError(f"{path}: the data file is empty")


def to_problems(records: Iterable[tuple[str, dict]]) -> list[Problem]:
  """Problems from (place, record) pairs of any source, checked; a place is named in messages only.

  Raises UserError for a field that is missing, empty or not text, and for an id that occurred before.
  """
  problems, places = [], {}
  for where, record in records:
    problem = Problem(*(_field(where, record, name) for name in FIELDS))
    if problem.id in places:
      raise UserError(f"{where}: id {problem.id!r} was used before, in {places[problem.id]}")
    places[problem.id] = where
    problems.append(problem)
  return problems


def _lines(path: str) -> Iterator[tuple[int, str]]:
  """Lines that are not blank and their numbers from 1. Bytes are split: U+2028 in a problem ends no line."""
  lines = []
  if os.path.exists(path) and not os.path.isfile(path) and not os.path.isdir(path):  # opening a pipe waits for its writer
    raise UserError(f"{path}: a pipe or a device; write its lines to a file")
  try:
    with (gzip.open if path.endswith(".gz") else open)(path, "rb") as file:
      begins = file.read(4)
      if begins == b"PAR1":
        raise UserError(f"{path}: a Parquet file; {NOT_JSONL}")
      if begins[:2] == b"\x1f\x8b":
        raise UserError(f"{path}: compressed with gzip once more than its name says; add .gz to it, or decompress the file")
      file.seek(0)
      for line in file:  # all of it first: a damaged .gz yields wrong lines before its checksum tells
        lines.append(line)
  except FileNotFoundError:
    raise UserError(f"{path}: no such data file") from None
  except EOFError:
    raise UserError(f"{path}, line {len(lines) + 1}: the gzip file ends here, it is truncated") from None
  except (OSError, zlib.error) as error:
    raise UserError(f"{path}, line {len(lines) + 1}: cannot be read: {error}") from None
  for number, line in enumerate(lines, 1):
    try:
      text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
    except UnicodeDecodeError as error:
      raise UserError(f"{path}, line {number}: not UTF-8 ({error.reason}); convert the file to UTF-8") from None
    if text:
      yield number, text


def _parse(where: str, line: str) -> dict:
  try:
    record = json.loads(line, object_pairs_hook=_once, parse_float=_Real)
  except (ValueError, RecursionError) as error:  # ValueError: also an integer of more than 4300 digits
    raise UserError(f"{where}: not JSON: {error}") from None
  if not isinstance(record, dict):
    raise UserError(f"{where}: not a JSON object but {line[:40]!r}")
  return record


class _Real(str):
  """A number with a point or an exponent as the file writes it: a float may be another one."""


def _once(pairs: list[tuple]) -> dict:
  """A JSON object; ValueError where a key comes twice, of which a dict would keep the last."""
  out = dict(pairs)
  if len(out) < len(pairs):
    raise ValueError(f"the key {next(k for i, (k, _) in enumerate(pairs) if k in dict(pairs[:i]))!r} comes twice in one object")
  return out


def _field(where: str, record: dict, name: str) -> str:
  if name not in record:
    raise UserError(f"{where}: field {name!r} is missing (needed: {', '.join(FIELDS)})")
  value = record[name]
  if isinstance(value, _Real):
    value = str(value) if name in ("id", "answer") and math.isfinite(float(value)) else float(value)
  elif name in ("id", "answer") and isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value):
    value = str(value)  # NaN stands for a missing one, in files that pandas wrote
  if not isinstance(value, str) or not value.strip():
    raise UserError(f"{where}: field {name!r} must be text that is not empty, not {value!r}")
  try:
    value.encode("utf-8")
  except UnicodeEncodeError:
    raise UserError(f"{where}: field {name!r} holds half a character (an unpaired surrogate)") from None
  return value


def encode_prompts(problems: list[Problem], tokenizer, template: str, chat: bool, max_prompt: int,
                   system: str | None = None, thinking: bool = False,
                   spread: Callable = lambda work, items: [work(x) for x in items]) -> tuple[list[Prompt], list[Prompt]]:
  """Prompts of 1 to `max_prompt` tokens, and those left out for having more (or none).

  tokenizer: called with many texts at once, as those of transformers are; with `chat`, `apply_chat_template` and a chat template
    too.
  template: the user's text; "{problem}" stands for the problem, other braces (\\boxed{}) for themselves.
  chat: wraps that text as one user message in the tokenizer's chat template, which then writes all special
    tokens; without it the tokenizer adds its own (a BOS, where it has one).
  system: the chat's system message; None: whatever the chat template does without one.
  thinking: what the chat template hears as `enable_thinking` (Qwen3; others ignore it).
  spread(work, items): [work(x) for x in items], perhaps shared out (hosts.spread).
  Raises UserError for a template without {problem}, a `system` without `chat`, a tokenizer without chat template, and if no
    prompt is left.
  """
  if "{problem}" not in template:
    raise UserError(f"the prompt template {template!r} has no {{problem}}: every prompt would be the same")
  if system is not None and not chat:
    raise UserError("a system message needs the chat template: switch it on, or write it into the template")
  if chat and not getattr(tokenizer, "chat_template", None):
    raise UserError("the tokenizer has no chat template: switch chat off, or use an instruct model")

  def written(problem: Problem) -> str:
    text = template.replace("{problem}", problem.problem)
    if chat:
      messages = [] if system is None else [{"role": "system", "content": system}]
      messages.append({"role": "user", "content": text})
      try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, enable_thinking=thinking)
      except Exception as e:  # a template is a program: some refuse a system message
        raise UserError(f"the chat template refuses these messages ({e}); see data.system and data.chat") from e
    return text

  def encode(some: list[Problem]) -> list[Prompt]:
    texts = [written(problem) for problem in some]
    tokens = tokenizer(texts, add_special_tokens=not chat, return_attention_mask=False)["input_ids"]
    return [Prompt(*made, np.asarray(ids, np.int32)) for *made, ids in zip(some, texts, tokens, strict=True)]

  parts = [problems[i:i + _AT_ONCE] for i in range(0, len(problems), _AT_ONCE)]
  encoded = [prompt for part in spread(encode, parts) for prompt in part]
  prompts = [p for p in encoded if 0 < len(p.tokens) <= max_prompt]
  if not prompts:
    raise UserError(f"none of {len(problems)} prompts has at most rollout.max_prompt = {max_prompt} tokens")
  return prompts, [p for p in encoded if not 0 < len(p.tokens) <= max_prompt]


def lost(prompts: list[Prompt], tokenizer, system: str | None = None) -> list[str]:
  """What a chat template or the tokenizer leaves out of the prompts, a line each, from 256 of them; spaces do not count."""
  looked_at, out = spaced(prompts, 256), []
  bare = lambda text: "".join(unicodedata.normalize("NFKC", text).casefold().split())
  if system is not None and not any(bare(system) in bare(p.text) for p in looked_at):
    out.append("the chat template leaves the system message out: write it into data.template, or take data.system away")
  without = [p for p in looked_at if bare(p.problem.problem) not in bare(p.text)]
  if without:
    out.append(f"the chat template leaves the problem out, or a part of it, in {len(without)} of {len(looked_at)} prompts, first "
               f"{without[0].problem.id!r}: set data.chat to false, or mend the template")
  gone = [(p, missing) for p in looked_at if (missing := set(bare(p.text)) - set(bare(tokenizer.decode(p.tokens.tolist()))))]
  if gone:
    first, missing = gone[0]
    out.append(f"the tokenizer has no token for {', '.join(map(repr, sorted(missing)[:8]))} in {len(gone)} of {len(looked_at)} "
               f"prompts, first {first.problem.id!r}, and leaves that out: set data.template and data.train to what it reads")
  return out


def digests(prompts: list[Prompt]) -> tuple[str, str]:
  """Hashes of the problems in their order, and of what the tokenizer and templates make of them."""
  problems, tokens = hashlib.sha256(), hashlib.sha256()
  for p in prompts:
    problems.update(json.dumps(dataclasses.astuple(p.problem)).encode())
    tokens.update(json.dumps([p.text, p.tokens.tolist()]).encode())
  return problems.hexdigest()[:16], tokens.hexdigest()[:16]


def spaced(items: list, most: int | None) -> list:
  """At most `most` of the items, evenly spaced, as files may be sorted by subject; None: all."""
  count = len(items) if most is None else min(most, len(items))
  return [items[i * len(items) // count] for i in range(count)]


def batch_at(prompts: list[Prompt], step: int, seed: int, batch_size: int, host: int = 0, hosts: int = 1) -> list[Prompt]:
  """The prompts of 0-based `step` that are `host`'s, of `hosts`: a function of its arguments alone.

  Epoch e is the permutation that NumPy's default generator draws from (seed, e). Batches run through the
  epochs without a gap, so one may hold the end of an epoch and the start of the next: within an epoch no
  prompt is repeated or left out, whatever the batch size.
  A host gets its batch_size / hosts consecutive prompts of the step's `batch_size`: hosts in order make up the
  batch of one host, so a run may go on with another number of them.
  Raises ValueError for no prompts, step < 0, seed < 0, batch_size < 1, a host not in [0, hosts), and a
  batch_size that `hosts` does not divide.
  """
  if not prompts or step < 0 or seed < 0 or batch_size < 1:
    raise ValueError(f"batch_at: {len(prompts)} prompts, step {step}, seed {seed}, batch_size {batch_size}")
  if not 0 <= host < hosts or batch_size % hosts:
    raise ValueError(f"batch_at: host {host} of {hosts} hosts, batch_size {batch_size}")
  share = batch_size // hosts
  batch, position = [], step * batch_size + host * share
  end = position + share
  while position < end:
    epoch, start = divmod(position, len(prompts))
    order = np.random.default_rng((seed, epoch)).permutation(len(prompts))
    part = order[start:start + end - position]
    batch += [prompts[i] for i in part]
    position += len(part)
  return batch
