"""Brings data sets and models from the Hugging Face hub.

  arrol-get gsm8k math500                   # data/gsm8k_train.jsonl, data/gsm8k_test.jsonl, data/math500.jsonl
  arrol-get gsm8k --from=FOLDER             # from files that are here: as in the hub's repository, or gsm8k_train.jsonl as below
  arrol-get Qwen/Qwen3-0.6B                 # a model, into the hub's cache: --config.model.path=Qwen/Qwen3-0.6B finds it
  arrol-get Qwen/Qwen3-0.6B --dir=DIR       # or into a folder, for a machine without access: --config.model.path=DIR
Lines are {"id", "problem", "answer", "source"}. HF_ENDPOINT names a mirror, HF_HOME another place for the cache.
"""

import argparse
import functools
import os
import sys

from arrol_jax import config as configuration, usage
from arrol_jax.data import hub_sets
from arrol_jax.models.files import hub
from arrol_jax.types import UserError


def main():
  p = usage.Parser(prog="arrol-get", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
  p.add_argument("names", nargs="+", metavar="NAME", help=f"{', '.join(hub_sets.SETS)}, or a model's OWNER/NAME")
  p.add_argument("--dir", help="folder to write to (default: data for data sets, the hub's cache for models)")
  p.add_argument("--from", dest="folder", help="folder that holds the data set's files (default: None, they are downloaded)")
  a = p.parse_args(sys.argv[1:])
  names = [name if "/" in name else name.replace("_", "-").removesuffix("-math") for name in a.names]
  for name in names:
    if name not in hub_sets.SETS and not hub.is_id(name):
      raise UserError(f"{name}: no such data set ({', '.join(hub_sets.SETS)}), and no model's OWNER/NAME")
  if a.folder and not os.path.isdir(a.folder):
    raise UserError(f"--from={a.folder}: no such folder")
  if a.folder and (len(names) > 1 or names[0] not in hub_sets.SETS):
    raise UserError("--from takes one data set; a model's folder needs no arrol-get: --config.model.path=FOLDER")
  for name in names:
    if name in hub_sets.SETS:
      written = hub_sets.convert(name, a.folder or download(name), a.dir or "data")
      for path, (count, left_out) in written.items():
        print(f"{path}: {count:,} problems" + (f" ({left_out:,} rows left out)" if left_out else ""))
    else:
      folder = hub.download(name, a.dir)
      print(f"{folder}\nuse it: --config.model.path={a.dir or name}")


def download(name: str) -> str:
  """The files of a data set in the hub's cache."""
  import huggingface_hub

  one = hub_sets.SETS[name]
  copy = f"bring its files here by other means, then arrol-get {name} --from=FOLDER"
  return hub.reached(one.repo, lambda: huggingface_hub.snapshot_download(
    one.repo, repo_type="dataset", allow_patterns=hub_sets.patterns(one), ignore_patterns=["socratic/*"]), "data set", copy)


command = functools.partial(configuration.run, main)

if __name__ == "__main__":
  command()
