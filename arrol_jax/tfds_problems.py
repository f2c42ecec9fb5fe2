"""A JSONL file of problems as a TFDS data set in array_record form, which needs no TensorFlow to write or read.

Importing this module imports TFDS: only sources.py does, and only where a source asks for it. The copy is made
once for each content of the file and keeps the file's order; drawing batches is data.batch_at's, on every path
the same. Left out: TFDS's own shuffling, splits and readers with an iterator's state.
"""

from collections.abc import Iterator
import contextlib
import hashlib
import logging
import re
import sys

import tensorflow_datasets as tfds

from arrol_jax.data import FIELDS, load_problems
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
  Makes the copy if there is none of this very content. Raises UserError as `load_problems` does, and for a
  folder that cannot be written to.
  """
  load_problems(path)  # a fault of the file is told in our words, not in those of TFDS
  with open(path, "rb") as file:
    digest = hashlib.file_digest(file, "sha256").hexdigest()[:12]
  stem = re.sub(r"\W", "_", path.rpartition("/")[2].partition(".")[0])
  config = tfds.core.BuilderConfig(name=f"{stem}-{digest}", version="1.0.0")
  try:
    with _quiet():
      source = tfds.data_source("arrol_problems", split="train", data_dir=data_dir,
                                builder_kwargs={"path": path, "config": config, "file_format": "array_record"})
  except OSError as e:
    raise UserError(f"tfds:{path}: no TFDS copy can be made or read: {e} (data.tfds_dir says where)") from e
  for number, record in enumerate(source.__getitems__(range(len(source)))):
    yield f"{path} (TFDS), record {number}", {name: record[name].decode() for name in FIELDS}


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
