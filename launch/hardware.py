"""Accelerators by name: `cpu`, `gpu:8` (of one machine), `v5e:4x4` (TPU).

A TPU is named by its generation and the topology of one slice.
"""

import dataclasses
import math

from sleep_jax import config

_DOCS = 'https://cloud.google.com/tpu/docs'


@dataclasses.dataclass(frozen=True)
class Chip:
  """A TPU generation; peak rates are of one chip, as published by Google.

  Attributes:
    source: URL of the figures.
    flops: bfloat16 operations per second.
    bandwidth: bytes per second between HBM and the chip.
    hbm: bytes of HBM.
    devices: JAX devices of one chip.
    gcloud: prefix of `--accelerator-type`.
    cores: TensorCores per chip, which `--accelerator-type` counts.
    runtime: image of the TPU VM.
    gke: node label `cloud.google.com/gke-tpu-accelerator`.
    machine: GKE machine type without its number of chips.
    axes: dimensions of a topology.
    clock: cycles per second, which Google does not publish: the peak divided
      by what the matrix units do in a cycle (two operations in each of the
      128 x 128 places, 256 x 256 of v6e, of all units of a chip).
    ici: bytes per second of all links of a chip, both directions together.
  """

  source: str
  flops: float
  bandwidth: float
  hbm: float
  devices: int
  gcloud: str
  cores: int
  runtime: str
  gke: str
  machine: str
  axes: int
  clock: float
  ici: float


CHIPS = {
  'v4': Chip(
    source=f'{_DOCS}/v4',
    flops=275e12,
    bandwidth=1228e9,
    hbm=32 * 2**30,
    devices=2,  # As libtpu describes an absent v4.
    gcloud='v4',
    cores=2,
    runtime='tpu-ubuntu2204-base',
    gke='tpu-v4-podslice',
    machine='ct4p-hightpu',
    axes=3,
    clock=275e12 / (8 * 2 * 128**2),
    ici=300e9,
  ),
  'v5e': Chip(
    source=f'{_DOCS}/v5e',
    flops=197e12,
    bandwidth=819e9,
    hbm=16 * 2**30,
    devices=1,
    gcloud='v5litepod',
    cores=1,
    runtime='v2-alpha-tpuv5-lite',
    gke='tpu-v5-lite-podslice',
    machine='ct5lp-hightpu',
    axes=2,
    clock=197e12 / (4 * 2 * 128**2),
    ici=400e9,
  ),
  'v5p': Chip(
    source=f'{_DOCS}/v5p',
    flops=459e12,
    bandwidth=2765e9,
    hbm=95e9,
    devices=1,
    gcloud='v5p',
    cores=2,
    runtime='v2-alpha-tpuv5',
    gke='tpu-v5p-slice',
    machine='ct5p-hightpu',
    axes=3,
    clock=459e12 / (8 * 2 * 128**2),
    ici=1200e9,
  ),
  'v6e': Chip(
    source=f'{_DOCS}/v6e',
    flops=918e12,
    bandwidth=1640e9,
    hbm=32e9,
    devices=1,
    gcloud='v6e',
    cores=1,
    runtime='v2-alpha-tpuv6e',
    gke='tpu-v6e-slice',
    machine='ct6e-standard',
    axes=2,
    clock=918e12 / (4 * 2 * 256**2),
    ici=800e9,
  ),
}


@dataclasses.dataclass(frozen=True)
class Accelerator:
  """The accelerators of one machine, or of one TPU slice."""

  kind: str  # cpu | gpu | tpu.
  count: int  # GPUs of a machine, chips of a slice; 1 of cpu.
  generation: str = ''  # Of a TPU.
  topology: str = ''  # Of a TPU, such as 4x4.

  @property
  def chip(self) -> Chip:
    """The TPU's generation."""
    return CHIPS[self.generation]

  @property
  def chips_per_host(self) -> int:
    """4 as on GKE's `-4t` machines, or 1 for a slice of one chip."""
    return 1 if self.count == 1 else 4

  @property
  def hosts(self) -> int:
    """Machines of a slice."""
    return self.count // self.chips_per_host if self.kind == 'tpu' else 1

  @property
  def gcloud(self) -> str:
    """`--accelerator-type` of gcloud, `--tpu-type` of xpk: v5litepod-16."""
    return f'{self.chip.gcloud}-{self.count * self.chip.cores}'

  @property
  def machine(self) -> str:
    """GKE's machine type: ct5lp-hightpu-4t."""
    return f'{self.chip.machine}-{self.chips_per_host}t'


def parse(name: str) -> Accelerator:
  """An accelerator by its name.

  Raises:
    ConfigError: if the name is unknown.
  """
  prefix, _, rest = name.partition(':')
  if prefix == 'cpu' and not rest:
    return Accelerator('cpu', 1)
  if prefix == 'gpu' and (rest or '1').isdigit() and int(rest or 1) > 0:
    return Accelerator('gpu', int(rest or 1))
  sizes = rest.split('x')
  valid = prefix in CHIPS and len(sizes) == CHIPS[prefix].axes
  if valid and all(s.isdigit() and int(s) > 0 for s in sizes):
    chips = math.prod(map(int, sizes))
    if chips == 1 or chips % 4 == 0:
      return Accelerator('tpu', chips, prefix, rest)
  raise config.ConfigError(
    f'accelerator={name!r} is unknown; write cpu, gpu:8, or a TPU generation '
    'and a topology of one chip or a multiple of four: '
    + ', '.join(f'{k}:{"x".join("4" * c.axes)}' for k, c in CHIPS.items())
    + '.'
  )
