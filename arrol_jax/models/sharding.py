"""The device mesh and the tables that map logical axes of weights and activations to mesh axes.

The mesh is (data, fsdp, tensor). Training shards the model width over `fsdp`; decoding keeps it whole, because a
decode step reads every weight and would gather it each time. A logical axis whose size a mesh axis does not divide
(few KV heads on a wide tensor axis, say) is replicated, which is slower and never wrong.
"""

import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
import numpy as np

AXES = ("data", "fsdp", "tensor")
TRAIN = {"batch": ("data", "fsdp"), "vocab": "tensor", "embed": "fsdp", "heads": "tensor", "kv_heads": "tensor",
         "ffn": "tensor"}
DECODE = TRAIN | {"embed": None}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, devices: list | None = None) -> Mesh:
  """A mesh over the first data * fsdp * tensor devices, with automatic (GSPMD) partitioning on every axis.

  devices: those to choose from, all by default. Raises ValueError where there are too few, where several processes would not
  all take part, or where the mesh cannot be spread over the slices.
  """
  shape, devices = (data, fsdp, tensor), jax.devices() if devices is None else devices
  count, name = math.prod(shape), f"a mesh of {data} x {fsdp} x {tensor}"
  if count > len(devices):
    raise ValueError(f"{name} needs {count} devices and there are {len(devices)}")
  if count < len(devices) and len({d.process_index for d in devices}) > 1:
    raise ValueError(f"{name} has {count} devices; with several processes it must take all {len(devices)}")
  return Mesh(device_grid(shape, devices[:count]), AXES, axis_types=(AxisType.Auto,) * 3)


def device_grid(shape: tuple, devices: list) -> np.ndarray:
  """Devices in the mesh's shape, neighbours near each other on the interconnect.

  Several slices lie along the outermost axes that they divide: what crosses the slower network between them is then the
  gradients' sum over `data` (or `fsdp`), not the activations of `tensor`.
  """
  slices = left = len({getattr(d, "slice_index", 0) for d in devices})
  if slices == 1:
    return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
  outer = []
  for size in shape:
    outer.append(math.gcd(size, left))
    left //= outer[-1]
  if left > 1:
    raise ValueError(f"a mesh of {' x '.join(map(str, shape))} cannot be spread over {slices} slices; make mesh.data or "
                     f"mesh.fsdp a multiple of {slices}")
  inner = [size // n for size, n in zip(shape, outer, strict=True)]
  return mesh_utils.create_hybrid_device_mesh(inner, outer, devices, allow_split_physical_axes=True)


def spec(axes: tuple, shape: tuple, mesh, table: dict) -> PartitionSpec:
  """PartitionSpec of an array with logical `axes` (None = replicated); axes that do not divide are replicated."""
  parts = []
  for name, size in zip(axes, shape, strict=True):
    part = table.get(name)
    names = (part,) if isinstance(part, str) else (part or ())
    parts.append(part if names and size % math.prod(mesh.shape[n] for n in names) == 0 else None)
  return PartitionSpec(*parts)


def shardings(axes_tree: dict, shape_tree: dict, mesh: Mesh, table: dict) -> dict:
  """A tree of NamedSharding for a tree of arrays (or ShapeDtypeStruct) and the matching tree of logical axes."""
  return jax.tree.map(lambda x, axes: NamedSharding(mesh, spec(axes, x.shape, mesh, table)), shape_tree, axes_tree)


def platform() -> str:
  """Platform that a program is built for, "cpu", "gpu" or "tpu": the mesh's, whose devices need not be here (plan.py)."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  name = device.platform if device else jax.default_backend()
  return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def constrain(x: jax.Array, *axes, table: dict = TRAIN) -> jax.Array:
  """Pins an activation's sharding inside a jitted program; does nothing without a mesh or inside a shard_map."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty or mesh.size == 1 or AxisType.Manual in mesh.axis_types:
    return x
  return jax.lax.with_sharding_constraint(x, spec(axes, x.shape, mesh, table))


def constrain_rows(tree):
  """Pins arrays [B,...] to lie with their rows over the batch axes."""
  return jax.tree.map(lambda x: constrain(x, "batch", *(None,) * (x.ndim - 1)), tree)


def rows_on_a_chip(count: int) -> int:
  """How many of `count` rows of a batch a chip of the current mesh holds: all of them where it does not divide them."""
  mesh = jax.sharding.get_abstract_mesh()
  shards = 1 if mesh.empty else math.prod(mesh.shape[n] for n in TRAIN["batch"])
  return count // shards if count % shards == 0 else count


def rows(mesh: Mesh) -> NamedSharding:
  """Sharding of an array whose first axis is rows."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


def following(tree, params: dict, mesh: Mesh):
  """NamedSharding of the leaves of `tree`, such as an optimizer's state: of the parameter whose path a leaf's path ends in, and
  everywhere where there is none. params: arrays, or shapes, with shardings."""
  at = {jax.tree_util.keystr(path): x.sharding for path, x in jax.tree_util.tree_leaves_with_path(params)}
  follow = lambda path: next((s for name, s in at.items() if jax.tree_util.keystr(path).endswith(name)), replicated(mesh))
  return jax.tree_util.tree_map_with_path(lambda path, _: follow(path), tree)


def put(tree, sharding: NamedSharding):
  """NumPy arrays, the same on every process, as one sharded array each; every process gives its own devices their part."""
  return jax.tree.map(lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree)
