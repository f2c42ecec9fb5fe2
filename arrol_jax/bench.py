"""Measures the engine, the update and a whole step on random weights: one JSON line a case.

  python -m arrol_jax.bench decode --shape=qwen3-1.7b --rows=256 --prompt=256 --max_new=1024
  python -m arrol_jax.bench update --shape=qwen3-1.7b --rows=128 --prompt=256 --max_new=1024
  python -m arrol_jax.bench step   --shape=qwen3-1.7b --rows=512 --prompt=256 --max_new=2048 --detect=512,256
  python -m arrol_jax.bench attention --shape=qwen3-1.7b --rows=256,64 --prompt=256 --max_new=1024
  python -m arrol_jax.bench gather --shape=qwen3-1.7b --rows=256 --prompt=256 --max_new=1024
Compiles and warms up first, waits for results, reports the median of --runs with minimum and maximum. The floor is what this
device's own measured read bandwidth and matrix rate allow; `floor` in the output says what was measured to get it.
--profile=DIR writes a JAX trace of the last run (of `decode`: two segments).
"""

import argparse
import json
import sys

import jax

from arrol_jax import config as configuration
from arrol_jax.benchmarks.decoding import decode
from arrol_jax.benchmarks.kernels import bench_attention, bench_gather
from arrol_jax.benchmarks.measuring import peak_bytes
from arrol_jax.benchmarks.training import bench_step, bench_update
from arrol_jax.engine import decode_attention
from arrol_jax.models import sharding, transformer
from arrol_jax.models.attention import IMPLEMENTATIONS
from arrol_jax.models.zoo import ZOO
from arrol_jax.running import hosts
from arrol_jax.types import UserError

CASES = {"decode": decode, "update": bench_update, "step": bench_step, "attention": bench_attention, "gather": bench_gather}


def main():
  hosts.check_devices()
  p = argparse.ArgumentParser(prog="python -m arrol_jax.bench", description=__doc__.partition("\n")[0])
  p.add_argument("case", choices=CASES)
  p.add_argument("--shape", default="tiny")
  p.add_argument("--rows", default="64", help="rollouts; for `attention` several row counts, separated by commas")
  p.add_argument("--detect", default="64", help="detection lengths of `step`, separated by commas")
  for name, default in dict(group=16, prompt=64, max_new=128, slots=0, segment=32, runs=3, row_buckets=4, length_buckets=6,
                            micro_tokens=16384, chunk_tokens=4096).items():
    p.add_argument(f"--{name}", type=int, default=default)
  p.add_argument("--lengths", choices=("full", "lognormal"), default="lognormal")
  p.add_argument("--static", action=argparse.BooleanOptionalAction, default=True, help="`decode`: also all rows to --max_new")
  p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32" if jax.default_backend() == "cpu" else "bfloat16")
  p.add_argument("--cache", choices=("int8",), default=None)
  p.add_argument("--attention", choices=IMPLEMENTATIONS, default="auto")
  p.add_argument("--decode_attention", choices=decode_attention.IMPLEMENTATIONS, default="auto")
  p.add_argument("--remat", choices=transformer.REMAT, default="dots")
  p.add_argument("--profile", default=None)
  a = p.parse_args(sys.argv[1:])
  if a.shape not in ZOO:
    raise UserError(f"--shape={a.shape} is not known; there are {', '.join(ZOO)}")
  try:
    a.attention_rows, a.detect = [int(x) for x in a.rows.split(",")], [int(x) for x in a.detect.split(",")]
  except ValueError as e:
    raise UserError("--rows and --detect take whole numbers, separated by commas") from e
  a.rows = a.attention_rows[0]
  for name in ("group", "prompt", "max_new", "segment", "runs", "row_buckets", "length_buckets", "micro_tokens", "chunk_tokens"):
    if getattr(a, name) < 1:
      raise UserError(f"--{name} is {getattr(a, name)}; it must be at least 1")
  if min(a.attention_rows) < 1:
    raise UserError(f"--rows is {min(a.attention_rows)}; it must be at least 1")
  if a.slots < 0:
    raise UserError(f"--slots is {a.slots}; it must be at least 1, or 0 for as many as there are rows")
  if a.case == "step" and any(d % a.segment or not 2 <= d < a.max_new for d in a.detect):
    raise UserError(f"--detect: each must be a multiple of --segment={a.segment} and less than --max_new={a.max_new}")
  mesh = sharding.make_mesh()
  with jax.set_mesh(mesh):
    results = CASES[a.case](a, ZOO[a.shape], mesh)
  line = {"case": a.case, "shape": a.shape, "rows": a.rows, "prompt": a.prompt, "max_new": a.max_new, "lengths": a.lengths,
          "dtype": a.dtype, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
  for result in results:
    print(json.dumps(line | result | {"peak_bytes": peak_bytes(),
                                      "command": "python -m arrol_jax.bench " + " ".join(sys.argv[1:])}), flush=True)


if __name__ == "__main__":
  configuration.run(main)
