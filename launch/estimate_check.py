"""Small programs by which the compiler's estimates are checked.

  python -m launch.estimate_check

Compiles each for absent TPUs and prints what the compiler estimates beside the
roofline and, where others have measured the same shape, beside their figure.
`tests/schedule_cost_test.py` holds the recorded cycles. Needs libtpu.
"""

from collections.abc import Callable
import dataclasses
import importlib.metadata

import jax
import jax.numpy as jnp
import numpy as np

from launch import hardware
from launch import programs
from launch import schedule_cost

VERSION = '0.0.42.1'  # Of libtpu, by which `Case.cycles` were recorded.
# XLA's matrix product of bfloat16 on one v5e chip, timed from Python, in the
# outputs of https://docs.jax.dev/en/latest/pallas/tpu/matmul.html.
_SECONDS_4096 = 0.827e-3
_SECONDS_8192 = 6.047e-3


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
  return a @ b


def _mlp(a: jax.Array, b: jax.Array, c: jax.Array) -> jax.Array:
  return jax.nn.silu(a @ b) @ c


def _layers(x: jax.Array, weights: jax.Array) -> jax.Array:
  return jax.lax.scan(lambda x, w: (jax.nn.relu(x @ w), None), x, weights)[0]


def _add(a: jax.Array, b: jax.Array) -> jax.Array:
  return a + b


@dataclasses.dataclass(frozen=True)
class Case:
  """A program of one chip.

  Attributes:
    name: of the row.
    generation: of the TPU.
    function: of bfloat16 arrays.
    shapes: of its arguments.
    flops: that it computes.
    cycles: recorded by `VERSION`.
    measured: seconds that others measured, if any.
  """

  name: str
  generation: str
  function: Callable[..., jax.Array]
  shapes: tuple[tuple[int, ...], ...]
  flops: float
  cycles: float
  measured: float | None = None

  @property
  def chip(self) -> hardware.Chip:
    """The TPU's generation."""
    return hardware.CHIPS[self.generation]

  def bound(self) -> float:
    """Seconds of the roofline: each array is read, or written, once."""
    args = [jax.ShapeDtypeStruct(x, jnp.bfloat16) for x in self.shapes]
    arrays = *args, jax.eval_shape(self.function, *args)
    size = sum(x.size * x.dtype.itemsize for x in arrays)
    return max(self.flops / self.chip.flops, size / self.chip.bandwidth)

  def estimate(self) -> schedule_cost.Cost:
    """Compiles the program, and sums what the compiler estimates."""
    devices = programs.absent_devices(
      f'{self.generation}:2x2' + 'x1' * (self.chip.axes == 3)
    )
    mesh = jax.sharding.Mesh(np.array(devices[:1]), ('x',))
    whole = jax.sharding.NamedSharding(mesh, jax.P())
    args = [
      jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=whole)
      for shape in self.shapes
    ]
    program = jax.jit(self.function).lower(*args).compile()
    return schedule_cost.estimate(program.as_text() or '', self.chip)


def _square(n: int) -> tuple[tuple[int, ...], ...]:
  return (n, n), (n, n)


_MLP = ((4096, 2048), (2048, 8192), (8192, 2048))
_MLP_FLOPS = 4.0 * 4096 * 2048 * 8192
_ROWS = ((8, 8192), (8192, 8192))

CASES = (
  Case(
    'a @ b, 4096',
    'v5e',
    _matmul,
    _square(4096),
    2.0 * 4096**3,
    1_144_646,
    _SECONDS_4096,
  ),
  Case(
    'a @ b, 8192',
    'v5e',
    _matmul,
    _square(8192),
    2.0 * 8192**3,
    9_557_312,
    _SECONDS_8192,
  ),
  *(
    Case('a @ b, 8192', gen, _matmul, _square(8192), 2.0 * 8192**3, cycles)
    for gen, cycles in (('v5p', 4_652_072), ('v6e', 2_977_840))
  ),
  *(
    Case('silu(a @ b) @ c', gen, _mlp, _MLP, _MLP_FLOPS, cycles)
    for gen, cycles in (
      ('v5e', 2_228_042),
      ('v5p', 1_156_197),
      ('v6e', 691_110),
    )
  ),
  *(
    Case('8 rows @ b', gen, _matmul, _ROWS, 2.0 * 8 * 8192**2, cycles)
    for gen, cycles in (('v5e', 330_209), ('v5p', 132_850), ('v6e', 168_078))
  ),
  Case(
    'scan of 12 layers',
    'v5e',
    _layers,
    ((2048, 2048), (12, 2048, 2048)),
    24.0 * 2048**3,
    2_841_837,
  ),
  Case('a + b, 8192', 'v5e', _add, _square(8192), 8192.0**2, 2_294_400),
)


def main() -> None:
  """Prints the table."""
  jax.config.update('jax_platforms', 'cpu')
  print(f'Estimated by the compiler of libtpu {_installed()}.\n')
  print('| program | chip | cycles | time | roofline | measured by others |')
  print('|---|---|---|---|---|---|')
  for case in CASES:
    cost = case.estimate()
    measured = ''
    if case.measured:
      ratio = cost.seconds / case.measured
      measured = f'{case.measured * 1e3:.3f} ms (estimate / it: {ratio:.2f})'
    share = f'{case.bound() / cost.seconds:.0%} of the estimate'
    cells = (
      case.name,
      case.generation,
      f'{cost.seconds * case.chip.clock:.0f}',
      f'{cost.seconds * 1e3:.3f} ms',
      f'{case.bound() * 1e3:.3f} ms ({share})',
      measured,
    )
    print(f'| {" | ".join(cells)} |', flush=True)


def _installed() -> str:
  return importlib.metadata.version('libtpu')


if __name__ == '__main__':
  main()
