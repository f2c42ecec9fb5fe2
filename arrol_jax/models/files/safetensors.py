"""Safetensors files, read and written one tensor at a time.

A file is an 8-byte little-endian header length, a JSON header {name: {dtype, shape, data_offsets}} and raw data. This
is the reader and writer of weights.py; the `safetensors` package is not used, because it maps a file as a whole and
writes only from a dict that holds every tensor at once. Reading maps one tensor's bytes and unmaps them with the array,
so that no file counts as resident memory as a whole. Left out: quantised data types (float8, packed integers).
"""

from collections.abc import Callable, Iterable
import json
import math
import os
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

from arrol_jax.types import UserError

DTYPES = {"F64": np.dtype(np.float64), "F32": np.dtype(np.float32), "F16": np.dtype(np.float16),
          "BF16": np.dtype(ml_dtypes.bfloat16), "I64": np.dtype(np.int64), "I32": np.dtype(np.int32),
          "U8": np.dtype(np.uint8), "BOOL": np.dtype(np.bool_)}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Stored(NamedTuple):
  """One tensor of a file: `read()` gives it as a NumPy array of `shape` and `dtype`."""
  file: Path
  shape: tuple
  dtype: np.dtype
  read: Callable[[], np.ndarray]


def read_header(path: Path) -> dict[str, Stored]:
  """The tensors of a safetensors file; nothing but the header is read.

  Raises UserError: no such file, not a safetensors file, an unknown data type, a tensor that ends past the file's end.
  """
  if not path.is_file():
    raise UserError(f"{path}: no such file")
  size = path.stat().st_size
  with open(path, "rb") as f:
    first = f.read(8)
    if first == b"version ":  # of a Git LFS pointer
      raise UserError(f"{path}: is a Git LFS pointer, not the file that it stands for: run `git lfs pull` in that folder, or "
                      "fetch the model again (arrol-get)")
    length = int.from_bytes(first, "little")
    if size < 8 or length > size - 8:
      raise UserError(f"{path}: truncated or not a safetensors file (its header should end at byte {8 + length}, "
                      f"the file ends at {size})")
    try:
      header = json.loads(f.read(length))
      entries = {k: (v["dtype"], v["shape"], *v["data_offsets"]) for k, v in header.items() if k != "__metadata__"}
      return {name: _stored(path, 8 + length, size, name, *entry) for name, entry in entries.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as e:
      raise UserError(f"{path}: not a safetensors file (its header cannot be read)") from e


def read_metadata(path: Path) -> dict[str, str]:
  """What a safetensors file that `read_header` accepts says of itself, {} where it says nothing."""
  with open(path, "rb") as f:
    return json.loads(f.read(int.from_bytes(f.read(8), "little"))).get("__metadata__", {})


def _stored(path: Path, data: int, size: int, name: str, dtype: str, shape: list, start: int, end: int) -> Stored:
  if dtype not in DTYPES:
    raise UserError(f"{path}: tensor {name} has data type {dtype}; only float32, float16 and bfloat16 are read")
  if min([*shape, start]) < 0 or end - start != math.prod(shape) * DTYPES[dtype].itemsize:
    raise UserError(f"{path}: tensor {name} of shape {shape} and type {dtype} does not fit bytes {start} to {end}")
  if data + end > size:
    raise UserError(f"{path}: truncated, tensor {name} ends {data + end - size} bytes past the end of the file")
  shape, offset = tuple(shape), data + start

  def read() -> np.ndarray:
    if start == end:
      return np.zeros(shape, DTYPES[dtype])  # an empty range cannot be mapped
    return np.asarray(np.memmap(path, np.uint8, "r", offset, (end - start,))).view(DTYPES[dtype]).reshape(shape)

  return Stored(path, shape, DTYPES[dtype], read)


def write(path: Path, tensors: Iterable[tuple[str, tuple, np.dtype, Callable[[], np.ndarray]]],
          metadata: dict[str, str] | None = None) -> None:
  """Writes (name, shape, dtype, read) tensors; each is read when its turn comes and dropped before the next."""
  header, end, tensors = {"__metadata__": {"format": "pt"} | (metadata or {})}, 0, list(tensors)
  for name, shape, dtype, _ in tensors:
    start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
    header[name] = {"dtype": NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [start, end]}
  text = json.dumps(header, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)  # data starts at a multiple of 8
  with open(path, "wb") as f:
    f.write(len(text).to_bytes(8, "little") + text)
    for name, shape, dtype, read in tensors:
      array = np.asarray(read(), order="C")
      if array.shape != tuple(shape) or array.dtype != np.dtype(dtype):
        raise ValueError(f"{name}: {array.dtype}{array.shape} was announced as {dtype}{tuple(shape)}")
      f.write(array.reshape(-1).view(np.uint8).data)
      del array
    f.flush()
    os.fsync(f.fileno())
