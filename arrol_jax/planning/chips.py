"""What chips can do by their data sheets, and what share of it a step reaches.

The shares were fitted on an H100 (experiments/plan_check.py says on which lines, and how far off the others are). That they
hold on another chip, a TPU above all, is an assumption: nothing has been measured on one.
"""

from typing import NamedTuple


class Chip(NamedTuple):
  """Peak rates of one chip."""
  flops: float   # bfloat16 FLOP/s of dense matrix products
  memory: float  # bytes/s of its memory
  link: float    # bytes/s that it sends to others, all links together, one direction


CHIPS = {
  "h100": Chip(989e12, 3.35e12, 450e9),  # SXM, NVLink
  "h200": Chip(989e12, 4.8e12, 450e9),
  "a100-40": Chip(312e12, 1.555e12, 300e9),
  "a100-80": Chip(312e12, 2.039e12, 300e9),
  "l4": Chip(121e12, 0.3e12, 32e9),      # PCIe
  "v5e": Chip(197e12, 0.819e12, 200e9),
  "v5p": Chip(459e12, 2.765e12, 600e9),
  "v6e": Chip(918e12, 1.64e12, 448e9),
}
# How a device names itself (jax.Device.device_kind), the first that it contains.
KINDS = {"H100": "h100", "H200": "h200", "A100-SXM4-40GB": "a100-40", "A100-SXM4-80GB": "a100-80", "NVIDIA L4": "l4",
         "TPU v5 lite": "v5e", "TPU v5e": "v5e", "TPU v6": "v6e", "TPU v5": "v5p"}


class Shares(NamedTuple):
  """What is reached of a chip's peaks."""
  matrix: float = 0.471   # of `flops`, in matrix products
  memory: float = 0.87    # of `memory`: a long sum's, measured beside the lines
  cache: float = 0.757    # of `memory`, in attention over the cache
  link: float = 0.7       # of `link`: assumed, no line measures it
  layer: float = 43e-6    # seconds a decode step takes for each layer beside that: programs' starts
  hop: float = 5e-6       # seconds a collective takes beside its bytes: assumed
  rollout: float = 65e-6  # seconds of the host for each rollout of a step


FITTED = Shares()


class Rates(NamedTuple):
  """What a chip reaches, its peaks times the shares."""
  flops: float
  memory: float
  cache: float
  link: float
  layer: float
  hop: float
  rollout: float

  def collectives(self, counts: dict[str, list[float]]) -> float:
    """Seconds of {kind: [times, bytes]}; an all-reduce sends its bytes twice, to be summed and to be spread."""
    sent = sum(size * (2 if kind == "all-reduce" else 1) for kind, (_, size) in counts.items())
    return sent / self.link + self.hop * sum(times for times, _ in counts.values())


def rates(chip: str, shares: Shares = FITTED) -> Rates:
  """Raises KeyError for a chip that is not in the sheet."""
  c = CHIPS[chip]
  return Rates(c.flops * shares.matrix, c.memory * shares.memory, c.memory * shares.cache, c.link * shares.link, *shares[4:])


def chip_of(device_kind: str) -> str | None:
  """The sheet's name of a device, None where it is not there."""
  return next((name for kind, name in KINDS.items() if kind in device_kind), None)
