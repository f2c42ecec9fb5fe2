"""How long a run takes from its command to its first finished step: with nothing compiled before, and again.

  python -m experiments.starts --config=quickstart --config.data.eval= [--out=FILE]   # a CPU, two minutes
  python -m experiments.starts --config=gsm8k_qwen05b --config.model.path=DIR/model.gguf --config.data.train=FILE ...

One start after another, each a process of its own over one compilation cache that begins empty: "cold", "kept" (programs that the
first kept whole, twice), "jax" (without those: JAX's own cache) and "after" (with what that one kept; on a CPU nothing). Seconds
are of the clock, to the first line of metrics.jsonl, looked for every 0.05 s. A JSON line each, with what arrol-train said of its
programs, and of each step its seconds and those spent compiling. All other flags go to arrol-train.
"""

import json
from pathlib import Path
import shutil
import subprocess
import sys
import tempfile
import time

import jax

from arrol_jax.running import kept
from arrol_jax.types import UserError

STARTS = ("cold", "kept", "kept", "jax", "after")
OFF = ("checkpoint.export=False", "checkpoint.last=False", "eval.before=False", "steps=4")
LIMIT = 300.0  # seconds that a start may take


def start(folder: Path, flags: list[str]) -> dict:
  """One run in a fresh `folder`: what its line says. UserError where it fails."""
  shutil.rmtree(folder, ignore_errors=True)
  argv = [sys.executable, "-m", "arrol_jax.train", *flags, f"--workdir={folder}"]
  with tempfile.TemporaryFile("w+") as said:
    begun = time.perf_counter()
    process = subprocess.Popen(argv, stdout=said, stderr=subprocess.STDOUT)
    lines, first = folder / "metrics.jsonl", None
    while process.poll() is None and time.perf_counter() - begun < LIMIT:
      if first is None and lines.exists() and lines.stat().st_size:
        first = time.perf_counter() - begun
      time.sleep(0.05)
    process.kill()
    said.seek(0)
    text = said.read().replace("\r", "\n")
  if process.wait() or first is None:
    raise UserError(f"arrol-train ended with status {process.returncode}: {' '.join(text.split()[-60:])}")
  steps = [json.loads(line) for line in lines.read_text().splitlines()]
  told = [line for line in text.splitlines() if " programs in " in line]
  return {"first_step_s": round(first, 2), "said": told[-1] if told else "", "sec_step": [round(x["sec_step"], 3) for x in steps],
          "sec_compile": [round(x["sec_compile"], 3) for x in steps], "reward": [x["reward"] for x in steps]}


def main():
  out = next((a.partition("=")[2] for a in sys.argv[1:] if a.startswith("--out=")), None)
  flags = [a for a in sys.argv[1:] if not a.startswith("--out=")]
  begins = lambda *names: any(a.startswith(names) for a in flags)
  if not begins("--config=") or begins("--workdir", "--compilation_cache"):
    raise UserError("give --config=NAME or FILE, and neither --workdir nor --compilation_cache")
  set_by_user = {a.removeprefix("--config.").partition("=")[0] for a in flags}
  flags += [f"--config.{setting}" for setting in OFF if setting.partition("=")[0] not in set_by_user]
  with tempfile.TemporaryDirectory() as folder:
    cache = Path(folder, "cache")
    for name in STARTS:
      if name == "jax":
        shutil.rmtree(cache / kept.FOLDER, ignore_errors=True)
      line = {"start": name} | start(Path(folder, "run"), [*flags, f"--compilation_cache={cache}"])
      text = json.dumps(line | {"jax": jax.__version__, "flags": [a for a in flags if "path" not in a and "data" not in a]})
      print(text, flush=True)
      if out:
        with open(out, "a") as file:
          file.write(text + "\n")


if __name__ == "__main__":
  from arrol_jax import config
  config.run(main)
