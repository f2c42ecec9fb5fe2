"""The device mesh and the tables that map logical axes of weights and activations to mesh axes.

The mesh is (data, fsdp, tensor). Training shards the model width over `fsdp`; decoding keeps it whole, because a
decode step reads every weight and would gather it each time. A logical axis whose size a mesh axis does not divide
(few KV heads on a wide tensor axis, say) is replicated, which is slower and never wrong.
"""

import math

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "tensor")
TRAIN = {"batch": ("data", "fsdp"), "vocab": "tensor", "embed": "fsdp", "heads": "tensor", "kv_heads": "tensor",
         "ffn": "tensor"}
DECODE = TRAIN | {"embed": None}


def make_mesh(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
  """A mesh over the first data * fsdp * tensor devices, with automatic (GSPMD) partitioning on every axis."""
  count = data * fsdp * tensor
  if count > jax.device_count():
    raise ValueError(f"a mesh of {data} x {fsdp} x {tensor} needs {count} devices and there are {jax.device_count()}")
  return jax.make_mesh((data, fsdp, tensor), AXES, axis_types=(AxisType.Auto,) * 3, devices=jax.devices()[:count])


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


def rows(mesh: Mesh) -> NamedSharding:
  """Sharding of an array whose first axis is rows."""
  return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())
