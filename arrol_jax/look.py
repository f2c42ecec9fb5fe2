"""One HTML page of a run: curves, evaluations and votes, rollouts with who was cut, where and why. It needs nothing beside it.

  arrol-look runs/quickstart                  # writes runs/quickstart/look.html
  arrol-look runs/quickstart --out=FILE.html
A run that is under way or was stopped has a page too, of what it has logged so far; the same command makes it anew. Of long runs
400 logged rollouts are shown, those of evenly spaced steps, and texts are cut where they are long.
"""

import argparse
import functools
import os
from pathlib import Path

from arrol_jax import config as configuration, usage
from arrol_jax.reporting import page, run_folder
from arrol_jax.types import UserError


def main():
  parser = usage.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="arrol-look")
  parser.add_argument("run", help="the run's folder (what --workdir was)")
  parser.add_argument("--out", metavar="FILE", help="where the page goes (default: RUN/look.html)")
  asked = parser.parse_args()
  out = Path(asked.out or f"{asked.run}/look.html")
  text = page.page(run_folder.load(asked.run))
  part = out.with_name(out.name + ".part")
  try:
    part.write_text(text, encoding="utf-8")
    os.replace(part, out)  # who has the page open never reloads half of it
  except OSError as e:
    raise UserError(f"{out}: cannot be written ({e.strerror}); give another --out=FILE") from e
  print(f"{out}: written")


command = functools.partial(configuration.run, main)

if __name__ == "__main__":
  command()
