"""Reads a compiled module's text: what its matrix products, memory traffic and collectives add up to on one device.

XLA's cost_analysis counts a loop's body once; here an instruction counts as often as the loops around it run. A loop whose
trips cannot be read off counts as often as the caller says; each branch of a conditional counts once.
"""

import dataclasses
import functools
import math
import re

COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "ragged-all-to-all",
               "reduce-scatter")
_BITS = {"pred": 8, "token": 0, "opaque": 0}
_ARRAY = re.compile(r"\b([a-z]+[\da-z]*)\[([\d,]*)\](\{[^}]*\})?")
# Instructions that move nothing themselves; of an asynchronous pair the start counts.
_FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all",
         "partition-id", "replica-id", "opt-barrier", "add-dependency")
_SLICES = ("dynamic-slice", "slice", "gather")


@dataclasses.dataclass
class Instruction:
  name: str
  type: str                   # as printed; a tuple in parentheses
  opcode: str
  inside: str                 # between its parentheses: operands, a constant's value, a parameter's number
  rest: str                   # the line after its operands

  @functools.cached_property
  def operands(self) -> list[str]:
    return re.findall(r"%([\w.\-]+)", self.inside)

  def attribute(self, name: str) -> str:
    """Value of name=value or name={value}, "" where there is none."""
    found = re.search(rf"\b{name}=(?:\{{([^}}]*)\}}|([^\s,]+))", self.rest)
    return (found.group(1) or found.group(2) or "") if found else ""


Module = dict[str, dict[str, Instruction]]  # computation -> its instructions by name, the root last; "ENTRY" is where it starts


def parse(text: str) -> Module:
  """The computations of `compiled.as_text()`. Raises ValueError where there is no entry computation."""
  module, here = {}, None
  for line in text.splitlines():
    if not line.startswith(" "):
      head = re.match(r"(ENTRY\s+)?%?([\w.\-]+)\s.*\{$", line)
      if head and not line.startswith("HloModule"):
        here = module.setdefault("ENTRY" if head.group(1) else head.group(2), {})
      continue
    if here is not None and (instruction := _instruction(line.strip())):
      here[instruction.name] = instruction
  if "ENTRY" not in module:
    raise ValueError("no ENTRY computation in the module's text")
  return module


def _instruction(line: str) -> Instruction | None:
  head = re.match(r"(?:ROOT )?%?([\w.\-]+) = ", line)
  if not head:
    return None
  at = head.end()
  end = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
  opens = line.index("(", end)
  closes = _closing(line, opens)
  return Instruction(head.group(1), line[at:end], line[end:opens].strip(),
                     line[opens + 1:closes], line[closes + 1:])


def _closing(text: str, start: int) -> int:
  """Index of the parenthesis that closes the one at `start`."""
  depth = 0
  for i in range(start, len(text)):
    depth += (text[i] == "(") - (text[i] == ")")
    if not depth:
      return i
  raise ValueError(f"a parenthesis is not closed: {text[start:start + 80]}")


def shape(type_text: str) -> tuple[int, ...]:
  """Dimensions of the first array in a type."""
  dims = _ARRAY.search(type_text).group(2)
  return tuple(int(n) for n in dims.split(",") if n)


def size(type_text: str, memory: bool = False) -> int:
  """Bytes of all arrays in a type, without tiles' padding; memory: of those in main memory (other spaces print as S(n))."""
  total = 0
  for dtype, dims, layout in _ARRAY.findall(type_text):
    if not (memory and re.search(r"S\([1-9]", layout)):
      bits = _BITS.get(dtype) if dtype in _BITS else int((re.search(r"\d+", dtype) or ["8"])[0])
      total += math.prod(int(n) for n in dims.split(",") if n) * bits // 8
  return total


def trips(module: Module, unknown: int = 1) -> dict[str, int]:
  """How often each computation runs. unknown: trips of loops whose number the compiler does not know."""
  count: dict[str, int] = {}

  def visit(name: str, times: int) -> None:
    count[name] = count.get(name, 0) + times
    for i in module[name].values():
      inner = times * (_trips(module, name, i) or unknown) if i.opcode == "while" else times
      for callee in _called(i):
        if callee in module:
          visit(callee, inner)

  visit("ENTRY", 1)
  return count


def _trips(module: Module, name: str, loop: Instruction) -> int | None:
  """Trips of a loop: what the compiler says, or the bound of a condition "index < bound" less where the index starts."""
  known = re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.rest)
  if known:
    return int(known.group(1))
  condition = module[loop.attribute("condition").lstrip("%")]
  test = list(condition.values())[-1]
  if test.opcode != "compare" or test.attribute("direction") != "LT":
    return None
  index, bound = (condition[n] for n in test.operands)
  if index.opcode != "get-tuple-element" or bound.opcode != "constant":
    return None
  carried = module[name].get(loop.operands[0])
  start = module[name].get(carried.operands[int(index.attribute("index"))]) if carried and carried.opcode == "tuple" else None
  return int(bound.inside) - (int(start.inside) if start and start.opcode == "constant" else 0)


def _called(i: Instruction) -> list[str]:
  """Computations that an instruction runs; a reduction's or sort's tiny ones are left out."""
  names = {"while": ("body",), "fusion": ("calls",), "call": ("to_apply",), "async-start": ("calls",),
           "conditional": ("branch_computations", "true_computation", "false_computation")}.get(i.opcode, ())
  return [n.strip().lstrip("%") for name in names for n in i.attribute(name).split(",") if n.strip()]


def flops(module: Module, count: dict[str, int]) -> float:
  """FLOPs of matrix products and convolutions, 2 a multiply-add; what happens inside kernels is not seen."""
  return float(sum(times * _flops(module[name], i) for name, times in count.items() for i in module[name].values()))


def _flops(computation: dict, i: Instruction) -> float:
  if i.opcode not in ("dot", "convolution"):
    return 0.0
  left, right, out = (shape(t) for t in (*(computation[name].type for name in i.operands[:2]), i.type))
  if i.opcode == "dot":
    return 2.0 * math.prod(out) * math.prod(left[int(d)] for d in i.attribute("lhs_contracting_dims").split(",") if d)
  lhs, rhs, result = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", i.rest).groups()
  groups = int(i.attribute("batch_group_count") or 1)
  products = right[rhs.index("i")] * out[result.index("f")] * out[result.index("b")] / groups
  for place in filter(str.isdigit, rhs):
    products *= _positions(i, int(place), left[lhs.index(place)], right[rhs.index(place)], out[result.index(place)])
  return 2.0 * products


def _positions(i: Instruction, place: int, size: int, kernel: int, out: int) -> int:
  """Pairs of output and kernel position along a spatial dimension that meet an input, not padding or a hole: a TPU's batched
  product is a convolution whose windows meet one input each."""
  def setting(name: str, default: str) -> str:
    found = re.search(rf"\b{name}=([\dx_\-]+)", i.attribute("window"))
    return found.group(1).split("x")[place] if found else default
  stride, holes, step = (int(setting(name, "1")) for name in ("stride", "lhs_dilate", "rhs_dilate"))
  before = int(setting("pad", "0_0").split("_")[0])
  at = (o * stride + k * step - before for o in range(out) for k in range(kernel))
  return sum(0 <= x <= (size - 1) * holes and x % holes == 0 for x in at)


def traffic(module: Module, count: dict[str, int]) -> float:
  """Bytes that cross main memory: operands and results outside fusions; of a slice or an update in place its own size."""
  fused = {c for body in module.values() for i in body.values() if i.opcode == "fusion" for c in _called(i)}
  return float(sum(times * sum(_traffic(module, name, i) for i in module[name].values())
                   for name, times in count.items() if name not in fused))


def roofline(module: Module, count: dict[str, int], flops_s: float, bytes_s: float) -> float:
  """Seconds of all operations one after another, each the longer of its products at flops_s and its traffic at bytes_s; what
  happens inside kernels takes their traffic alone, and collectives nothing."""
  fused = {c for body in module.values() for i in body.values() if i.opcode == "fusion" for c in _called(i)}

  def products(name: str, i: Instruction) -> float:
    inside = [products(c, j) for c in _called(i) for j in module[c].values()] if i.opcode == "fusion" else []
    return _flops(module[name], i) + sum(inside)

  moves = lambda i: i.opcode.removesuffix("-start") in COLLECTIVES
  return sum(times * max(products(name, i) / flops_s, _traffic(module, name, i) / bytes_s)
             for name, times in count.items() if name not in fused for i in module[name].values() if not moves(i))


def _traffic(module: Module, name: str, i: Instruction) -> int:
  if i.opcode in _FREE or i.opcode.endswith(("-done", "-update")) or i.opcode == "async-start":
    return 0
  types = [module[name][o].type for o in i.operands if o in module[name]]
  whole = lambda t: size(t, memory=True)
  if i.opcode == "slice-start":  # ((operand), slice, ...)
    return size([m.group(0) for m in _ARRAY.finditer(i.type)][1])
  if i.opcode.endswith("-start"):  # its result names operand and target
    return whole(i.type)
  if i.opcode in _SLICES:
    return 2 * whole(i.type)
  if i.opcode in ("dynamic-update-slice", "scatter"):
    return 2 * whole(types[1 if i.opcode == "dynamic-update-slice" else 2])
  if i.opcode != "fusion":
    return whole(i.type) + sum(map(whole, types))
  body = module[_called(i)[0]]
  root = list(body.values())[-1]
  out = whole(i.type)
  read = [min(whole(t), _reads(body, n)) for n, t in enumerate(types)]
  update = {"dynamic-update-slice": 1, "scatter": 2}.get(root.opcode)
  if update is not None:  # in place: the target is neither read nor written whole
    return 2 * size(body[root.operands[update]].type) + sum(r for r, t in zip(read, types) if shape(t) != shape(i.type))
  return out + sum(read)


def _reads(body: dict, number: int) -> int:
  """Bytes that a fusion reads of parameter `number`: those of the slices where nothing else reads it."""
  name = next((i.name for i in body.values() if i.opcode == "parameter" and i.inside == str(number)), None)
  names, total = {name}, 0
  for i in body.values():
    if not names & set(i.operands):
      continue
    if i.opcode == "bitcast":
      names.add(i.name)
    elif i.opcode in _SLICES and i.operands[0] in names:
      total += size(i.type)
    else:
      return 1 << 62
  return total


def collective_counts(module: Module, count: dict[str, int]) -> dict[str, list[int]]:
  """{kind: [times, bytes]} on one device: bytes of an operation's operands or its result, whichever is more.

  A TPU's compiler spreads one collective over several fusions that compute meanwhile: a channel counts once.
  """
  seen: dict[tuple, int] = {}
  for name, times in count.items():
    for i in module[name].values():
      kind = i.opcode.removesuffix("-start")
      if kind in COLLECTIVES:
        operands = sum(size(module[name][o].type) for o in i.operands if o in module[name])
        result = size(i.type) - (operands if i.opcode != kind and i.type.startswith("(") else 0)  # a start names both
        moved = max(operands, result)
        key = (kind, i.attribute("channel_id") or f"{name}/{i.name}", times)
        seen[key] = max(seen.get(key, 0), moved)
  out: dict[str, list[int]] = {}
  for (kind, _, times), moved in seen.items():
    entry = out.setdefault(kind, [0, 0])
    entry[0] += times
    entry[1] += times * moved
  return out
