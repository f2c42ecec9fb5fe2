"""A JSONL file of problems as a TFDS data set in array_record form, which needs no TensorFlow to write or read.

Importing this module imports TFDS: only sources.py does, and only where a source asks for it. The copy is made
once for each content of the file and keeps the file's order; drawing batches is data.batch_at's, on every path
the same. Left out: TFDS's own shuffling, splits and readers with an iterator's state.
"""

from collections.abc import Iterator
import contextlib
import hashlib
import logging
import os
import re
import sys

import tensorflow_datasets as tfds

from arrol_jax.data.problems import FIELDS, load_problems
from arrol_jax.types import UserError


class ArrolProblems(tfds.core.GeneratorBasedBuilder):
  """The problems of the JSONL file `path`, one example each, FIELDS as text. One split, called "train"."""

  VERSION = tfds.core.Version("1.0.0")

  def __init__(self, *, path: str, **builder):
    self.path = path
    super().__init__(**builder)

  def _info(self):
    features = tfds.features.FeaturesDict({name: tfds.features.Text() for name in FIELDS})
    return tfds.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

  def _split_generators(self, _):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for i, problem in enumerate(load_problems(self.path)):
      yield i, vars(problem)


def read(path: str, data_dir: str | None) -> Iterator[tuple[str, dict]]:
  """("FILE (TFDS), record N", record) of each problem of the JSONL file `path`, from its copy under `data_dir`.

  data_dir: as everywhere in TFDS; None is its default (TFDS_DATA_DIR, else ~/tensorflow_datasets).
  Makes the copy if there is none of this very content. Raises UserError as `load_problems` does, for a folder
  that cannot be written to, and for a copy that is damaged.
  """
  problems = load_problems(path)  # a fault of the file is told in our words, not in those of TFDS
  with open(path, "rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
  stem = re.sub(r"\W", "_", path.rpartition("/")[2].partition(".")[0])
  config = tfds.core.BuilderConfig(name=f"{stem}-{digest}", version="1.0.0")
  try:
    builder = _copy(path, data_dir, config)
  except OSError as e:
    raise UserError(f"tfds:{path}: no TFDS copy can be made or read: {e} (data.tfds_dir says where)") from e
  try:
    source = builder.as_data_source(split="train")
    records = source.__getitems__(range(len(source)))
    fault = "it differs from the file"  # not every flipped bit fails a checksum
    whole = [tuple(record[name] for name in FIELDS) for record in records] == [
      tuple(vars(problem)[name].encode() for name in FIELDS) for problem in problems]
  except RuntimeError as e:  # array_record's word for a checksum that is wrong, or a file that is gone
    whole, fault = False, e
  if not whole:
    raise UserError(f"tfds:{path}: its copy is damaged; delete {builder.data_path} and it is made anew ({fault})")
  for number, record in enumerate(records):
    yield f"{path} (TFDS), record {number}", {name: record[name].decode() for name in FIELDS}


def _copy(path: str, data_dir: str | None, config: tfds.core.BuilderConfig) -> ArrolProblems:
  """The data set, made if it is not there. Of several processes that make it at once, one is first and all use its copy."""
  for attempt in range(2):
    with _quiet():
      builder = ArrolProblems(path=path, data_dir=data_dir, config=config, file_format="array_record")
      try:
        builder.download_and_prepare()
        return builder
      except OSError:  # the folder came to be after we had looked, whole: it is moved into place
        if attempt or not os.path.isdir(builder.data_path):
          raise


@contextlib.contextmanager
def _quiet():
  """No progress bars, and what TFDS prints while it copies goes to stderr: stdout is the run's."""
  logger, level = logging.getLogger("absl"), logging.getLogger("absl").level
  tfds.disable_progress_bar()
  logger.setLevel(logging.ERROR)
  try:
    with contextlib.redirect_stdout(sys.stderr):
      yield
  finally:
    logger.setLevel(level)
    tfds.enable_progress_bar()
