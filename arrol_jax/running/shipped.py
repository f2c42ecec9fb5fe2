"""Files that come with the package: the configs and the arithmetic model with its data. From any folder, installed or not.

A checkout has them in configs/ and experiments/arithmetic/, an installed package in folders of its own (setup.py). Config files
import each other as `configs`, and so may a user's own: `from configs import base`. A path that a config names, such as
experiments/arithmetic/train.jsonl, means the file in the working directory where there is one, else the shipped one.
"""

import importlib.util
import os
from pathlib import Path
import sys

PACKAGE = Path(__file__).resolve().parents[1]
# Names of folders in a checkout -> where they are.
FOLDERS = {name: inside if (inside := PACKAGE / name.rpartition("/")[2]).is_dir() else PACKAGE.parent / name
           for name in ("configs", "experiments/arithmetic")}
CONFIGS = FOLDERS["configs"]


def find(path: str) -> str:
  """`path` itself, or the shipped file or folder of that name if nothing is there."""
  if path and not os.path.exists(path):
    for name, folder in FOLDERS.items():
      inside = os.path.relpath(path, name) if not os.path.isabs(path) else ".."
      if not inside.startswith("..") and (folder / inside).exists():
        return str(folder / inside)
  return path


def config_file(name: str) -> str:
  """The config file that --config=`name` means: a path, or the name of a shipped one."""
  shipped = CONFIGS / f"{name}.py"
  return str(shipped) if os.sep not in name and not os.path.isfile(name) and shipped.is_file() else find(name)


def names() -> list[str]:
  """Of the shipped configs that can be run."""
  return sorted(p.stem for p in CONFIGS.glob("*.py") if p.stem not in ("__init__", "base", "templates"))


def import_configs() -> None:
  """Makes `configs` importable: the shipped folder, after it the one in the working directory."""
  if "configs" in sys.modules:
    return
  spec = importlib.util.spec_from_file_location("configs", CONFIGS / "__init__.py",
                                                submodule_search_locations=[str(CONFIGS), os.path.abspath("configs")])
  module = importlib.util.module_from_spec(spec)
  sys.modules["configs"] = module
  spec.loader.exec_module(module)
