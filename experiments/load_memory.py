"""Peak host memory of `load_policy` on a folder of random weights, against the bound of one tensor plus one file.

  python -m experiments.load_memory                          # Qwen3-4B's shape in bfloat16: 8 GB of disk and of memory
  python -m experiments.load_memory --layers=8               # the same shape with fewer layers
  python -m experiments.load_memory --layers=8 --mesh=1,2,2  # onto a mesh of 4 forced CPU devices

Writes the folder under TMPDIR, loads it in a fresh process, deletes it, prints one JSON line and adds it to
experiments/results/load_memory/cpu.jsonl. On the CPU parameters are host memory too, so what is reported is peak
resident memory minus memory before the load minus the bytes of the parameters on their devices. Linux only (VmHWM).
Left out: accelerators, where parameters leave the host.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path
import shlex
import shutil
import subprocess
import sys
import tempfile
import time

import numpy as np

from arrol_jax.models.files import hf_config, safetensors, weights
from arrol_jax.models.zoo import ZOO

OUT = Path("experiments/results/load_memory/cpu.jsonl")


def make_folder(folder: Path, config, shard_bytes: int) -> list[Path]:
  """A Hugging Face folder of random bfloat16 weights; values repeat, shapes and bytes are the real ones."""
  block = np.random.default_rng(0).normal(size=1 << 22).astype(safetensors.DTYPES["BF16"])
  dtype = block.dtype
  tensors = [(name, place.stored, dtype, lambda shape=place.stored: np.resize(block, shape))
             for name, place in hf_config.layout(config).items()]
  weights.save_weights(folder, tensors, shard_bytes)
  (folder / "config.json").write_text(json.dumps(hf_config.config_to_json(config, "bfloat16", (), 0, None)))
  return sorted(folder.glob("*.safetensors"))


def memory(key: str) -> int:
  """VmRSS (now) or VmHWM (peak) of this process in bytes."""
  lines = Path("/proc/self/status").read_text().splitlines()
  return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))


def measure(folder: Path, dtype: str, axes: tuple[int, int, int] | None) -> dict:
  """Loads `folder` in this process and returns what it took."""
  import jax
  import jax.numpy as jnp

  from arrol_jax.models import sharding
  mesh = sharding.make_mesh(*axes) if axes else None
  jax.jit(lambda x: x + 1)(jnp.zeros(4)).block_until_ready()  # the runtime and compiler are part of the baseline
  Path("/proc/self/clear_refs").write_text("5")               # the peak starts again from here
  before, start = memory("VmRSS"), time.perf_counter()
  params = weights.load_policy(folder, dtype, mesh).params
  seconds, peak = time.perf_counter() - start, memory("VmHWM")
  held = sum(shard.data.nbytes for x in jax.tree.leaves(params) for shard in x.addressable_shards)
  return {"baseline_bytes": before, "peak_bytes": peak, "parameter_bytes": held, "over_bytes": peak - before - held,
          "after_bytes": memory("VmRSS") - before - held, "seconds": round(seconds, 1), "jax": jax.__version__}


def main(argv: list[str]) -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument("--shape", choices=ZOO, default="qwen3-4b")
  parser.add_argument("--layers", type=int, help="fewer layers than the shape has")
  parser.add_argument("--dtype", default="bfloat16", help="of the parameters; the files are bfloat16")
  parser.add_argument("--shard_gb", type=float, default=2.0)
  parser.add_argument("--mesh", help="data,fsdp,tensor over as many forced CPU devices")
  parser.add_argument("--folder", help=argparse.SUPPRESS)  # the child process measures here
  args = parser.parse_args(argv)
  axes = tuple(int(n) for n in args.mesh.split(",")) if args.mesh else None
  if args.folder:
    print(json.dumps(measure(Path(args.folder), args.dtype, axes)))
    return
  config = dataclasses.replace(ZOO[args.shape], layers=args.layers or ZOO[args.shape].layers)
  need, free = 2 * config.num_params(), shutil.disk_usage(tempfile.gettempdir()).free
  if free < 1.5 * need:
    sys.exit(f"{need / 1e9:.1f} GB of disk are needed, half as much again to be safe; {free / 1e9:.1f} GB are free")
  folder = Path(tempfile.mkdtemp(prefix="load_memory."))
  try:
    files = make_folder(folder, config, int(args.shard_gb * 1e9))
    sizes = [f.stat().st_size for f in files]
    flags = f"--xla_force_host_platform_device_count={np.prod(axes)}" if axes else ""
    command = [sys.executable, "-m", "experiments.load_memory", "--folder", str(folder), *argv]
    child = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True,
                           env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags})
  finally:
    shutil.rmtree(folder, ignore_errors=True)
  got = json.loads(child.stdout.splitlines()[-1])
  largest = max(2 * int(np.prod(p.stored)) for p in hf_config.layout(config).values())
  line = {"shape": args.shape, "layers": config.layers, "parameters": config.num_params(), "dtype": args.dtype,
          "mesh": args.mesh, "files": len(files), "largest_file_bytes": max(sizes), "largest_tensor_bytes": largest,
          **got,
          "bound_bytes": largest + max(sizes), "within_bound": got["over_bytes"] <= largest + max(sizes),
          "device": "cpu", "command": shlex.join(["python", "-m", "experiments.load_memory", *argv])}
  print(json.dumps(line))
  OUT.parent.mkdir(parents=True, exist_ok=True)
  with open(OUT, "a") as f:
    f.write(json.dumps(line) + "\n")


if __name__ == "__main__":
  main(sys.argv[1:])
