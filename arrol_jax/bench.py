"""Measures the engine, the update and a whole step on random weights: one JSON line a case.

  arrol-bench decode --shape=qwen3-1.7b --rows=256 --prompt=256 --max_new=1024
  arrol-bench update --shape=qwen3-1.7b --rows=128 --prompt=256 --max_new=1024
  arrol-bench step   --shape=qwen3-1.7b --rows=512 --prompt=256 --max_new=2048 --detect=512,256
  arrol-bench step   --preset=gsm8k                  # a real GSM8K step of a 0.5B model, on random weights of its shape
  arrol-bench scale  --shape=qwen3-1.7b --rows=512 --prompt=256 --max_new=2048 --detect=512      # on 1, 2, 4, ... devices
  arrol-bench attention --shape=qwen3-1.7b --rows=256,64 --prompt=256 --max_new=1024
  arrol-bench gather --shape=qwen3-1.7b --rows=256 --prompt=256 --max_new=1024
Compiles and warms up first, waits for results, reports the median of --runs with minimum and maximum. The floor is what this
device's own measured read bandwidth and matrix rate allow; `floor` in the output says what was measured to get it.
--profile=DIR writes a JAX trace of the last run (of `decode`: two segments).
"""

import argparse
import functools
import json
import sys

import jax

from arrol_jax import config as configuration, usage
from arrol_jax.benchmarks.decoding import decode
from arrol_jax.benchmarks.kernels import bench_attention, bench_gather
from arrol_jax.benchmarks.measuring import PRESETS, peak_bytes
from arrol_jax.benchmarks.scaling import bench_scale
from arrol_jax.benchmarks.training import bench_step, bench_update
from arrol_jax.engine import decode_attention
from arrol_jax.models import sharding, transformer
from arrol_jax.models.attention import IMPLEMENTATIONS
from arrol_jax.models.zoo import ZOO
from arrol_jax.planning.chips import CHIPS
from arrol_jax.running import hosts
from arrol_jax.types import UserError

CASES = {"decode": decode, "update": bench_update, "step": bench_step, "scale": bench_scale, "attention": bench_attention,
         "gather": bench_gather}

COUNTS = {"group": (16, "rollouts a prompt"), "prompt": (64, "prompt tokens"), "max_new": (128, "response tokens at most"),
          "slots": (0, "rows that decode at once; 0: all"), "segment": (32, "decode steps between two looks of the host"),
          "runs": (3, "measured ones; their median is reported"),
          "lora": (0, "`update` and `step`: rank of adapters beside a base in --dtype; 0: all is trained"),
          "devices": (16, "`scale`: at most so many"),
          "row_buckets": (4, "compiled row counts"),
          "length_buckets": (6, "compiled cache lengths"), "tail_sizes": (2, "smaller sizes of the last micro-batch"),
          "micro_tokens": (16384, "tokens a micro-batch"),
          "chunk_tokens": (4096, "tokens whose logits exist at once")}


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
  """Defaults, and examples as they are written."""


def main():
  hosts.check_devices()
  p = usage.Parser(prog="arrol-bench", description=__doc__, formatter_class=Help)
  p.add_argument("case", choices=CASES, help="what to measure")
  p.add_argument("--shape", default="tiny", help=f"the model's: {', '.join(ZOO)}")
  p.add_argument("--rows", default="64", help="rollouts; for `attention` several row counts, separated by commas")
  p.add_argument("--detect", default="64", help="detection lengths of `step`, separated by commas")
  for name, (default, what) in COUNTS.items():
    p.add_argument(f"--{name}", type=int, default=default, help=what)
  p.add_argument("--mesh", default="1,1,1", help="devices along data, fsdp and tensor; `scale` takes its own")
  p.add_argument("--axis", choices=("data", "fsdp", "tensor"), default="fsdp", help="along which `scale` spreads")
  p.add_argument("--chip", choices=CHIPS, default=None, help="`scale` predicts for it; the one at hand if not given")
  p.add_argument("--lengths", choices=("full", "lognormal"), default="lognormal", help="of responses: --max_new, or spread")
  p.add_argument("--static", action=argparse.BooleanOptionalAction, default=True, help="`decode`: also all rows to --max_new")
  p.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32" if jax.default_backend() == "cpu" else "bfloat16",
                 help="activations, decoding weights and cache")
  p.add_argument("--cache", choices=("int8",), default=None, help="int8 halves the key-value cache")
  p.add_argument("--weights", choices=("int8",), default=None, help="int8: what `decode`, `step` and `scale` read is half")
  p.add_argument("--attention", choices=IMPLEMENTATIONS, default="auto", help="the update's")
  p.add_argument("--decode_attention", choices=decode_attention.IMPLEMENTATIONS, default="auto", help="over the cache")
  p.add_argument("--remat", choices=transformer.REMAT, default="dots", help="what the backward pass recomputes")
  p.add_argument("--scan_layers", action=argparse.BooleanOptionalAction, default=True, help="the update scans over its layers")
  p.add_argument("--profile", default=None, help="folder for a trace of the last run")
  p.add_argument("--preset", choices=PRESETS, default=None, help="`step`: settings, lengths and rewards of a step that was run")
  if chosen := p.parse_known_args(sys.argv[1:])[0].preset:
    p.set_defaults(**PRESETS[chosen])
  a = p.parse_args(sys.argv[1:])
  if a.preset and (a.case != "step" or any(str(vars(a)[k]) != str(PRESETS[a.preset][k]) for k in ("rows", "group", "max_new"))):
    raise UserError(f"--preset={a.preset} is for `step`, with the --rows, --group and --max_new that it brings")
  if a.shape not in ZOO:
    raise UserError(f"--shape={a.shape} is not known; there are {', '.join(ZOO)}")
  try:
    a.attention_rows, a.detect = [int(x) for x in a.rows.split(",")], [int(x) for x in a.detect.split(",")]
  except ValueError as e:
    raise UserError("--rows and --detect take whole numbers, separated by commas") from e
  a.rows = a.attention_rows[0]
  for name in ("group", "prompt", "max_new", "segment", "runs", "row_buckets", "length_buckets", "micro_tokens", "chunk_tokens",
               "devices"):
    if getattr(a, name) < 1:
      raise UserError(f"--{name} is {getattr(a, name)}; it must be at least 1")
  if min(a.attention_rows) < 1:
    raise UserError(f"--rows is {min(a.attention_rows)}; it must be at least 1")
  if a.weights and a.case not in ("decode", "step", "scale"):
    raise UserError(f"--weights={a.weights} is for `decode`, `step` and `scale`; `{a.case}` does not decode with them")
  if a.slots < 0:
    raise UserError(f"--slots is {a.slots}; it must be at least 1, or 0 for as many as there are rows")
  if not 0 <= a.lora <= 1024 or a.lora and a.case not in ("update", "step"):
    raise UserError(f"--lora is {a.lora}; it must lie between 0 and 1024, and goes with update and step")
  if a.case in ("step", "scale") and any(d % a.segment or not 2 <= d < a.max_new for d in a.detect):
    raise UserError(f"--detect: each must be a multiple of --segment={a.segment} and less than --max_new={a.max_new}")
  try:
    shape = [int(x) for x in a.mesh.split(",")]
    mesh = sharding.make_mesh(*shape) if len(shape) == 3 and min(shape) > 0 else None
  except ValueError as e:
    raise UserError(f"--mesh={a.mesh}: {e}") from e
  if mesh is None:
    raise UserError(f"--mesh={a.mesh}: it takes three whole numbers, devices along data, fsdp and tensor, such as 1,2,1")
  line = {"case": a.case, "shape": a.shape, "rows": a.rows, "prompt": a.prompt, "max_new": a.max_new, "lengths": a.lengths,
          "dtype": a.dtype, "mesh": a.mesh, "lora": a.lora, "device": jax.devices()[0].device_kind, "jax": jax.__version__}
  with jax.set_mesh(mesh):
    for result in CASES[a.case](a, ZOO[a.shape], mesh):  # each line as soon as it is known
      print(json.dumps(line | result | {"peak_bytes": peak_bytes(),
                                        "command": "python -m arrol_jax.bench " + " ".join(sys.argv[1:])}), flush=True)


command = functools.partial(configuration.run, main)

if __name__ == "__main__":
  command()
