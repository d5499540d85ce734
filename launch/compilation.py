"""Compiles a step for absent devices, and reads what the compiler tells."""

import collections
import dataclasses
import re
import time

import jax

from launch import hardware
from launch import programs
from launch import schedule_cost

_KINDS = (
  'all-gather',
  'all-reduce',
  'reduce-scatter',
  'all-to-all',
  'collective-permute',
)
# Some modules with fused asynchronous collectives cannot be printed.
_PLAIN: dict[str, str | bool] = {
  'xla_tpu_enable_async_collective_fusion': 'false'
}


@dataclasses.dataclass(frozen=True)
class CompileResult:
  """What is known of a step; of one device, None if not compiled."""

  outputs: int | None  # Bytes.
  temporary: int | None  # Bytes.
  collectives: str
  seconds: float  # Of lowering and compilation.
  cost: schedule_cost.Cost | None = None  # None also if not of a TPU.


def lowered(step: programs.Step) -> CompileResult:
  """What is known without compiling: the arguments, and that it lowers."""
  start = time.perf_counter()
  step.lowered()
  seconds = time.perf_counter() - start
  return CompileResult(None, None, 'not compiled', seconds)


def compiled(
  step: programs.Step, chip: hardware.Chip | None = None
) -> CompileResult | str:
  """The compiler's figures; its message if a device's memory is too small.

  Args:
    step: what to compile.
    chip: the TPU that it is for; without it nothing is estimated.
  """
  start = time.perf_counter()
  unplaced = step.lowered()
  try:
    program = unplaced.compile()
    text = _text(unplaced, program)
  except jax.errors.JaxRuntimeError as e:
    if 'RESOURCE_EXHAUSTED' not in str(e):
      raise
    usage = re.search(r'Used [^.]*\.\w+ of [^.]*\.\w+ hbm', str(e))
    return usage[0] if usage else str(e).splitlines()[0]
  stats = program.memory_analysis()
  assert stats is not None  # XLA's own compilers all give them.
  kinds = re.findall(rf' ({"|".join(_KINDS)})(?:-start)?\(', text)
  return CompileResult(
    # What is donated is an argument and an output, but there once.
    outputs=stats.output_size_in_bytes - stats.alias_size_in_bytes,
    temporary=stats.temp_size_in_bytes,
    collectives=', '.join(
      f'{n} {kind}' for kind, n in sorted(collections.Counter(kinds).items())
    ),
    seconds=time.perf_counter() - start,
    cost=schedule_cost.estimate(text, chip, step.shares) if chip else None,
  )


def _text(unplaced: jax.stages.Lowered, program: jax.stages.Compiled) -> str:
  """The scheduled module."""
  try:
    return program.as_text() or ''
  except jax.errors.JaxRuntimeError as e:
    if 'RET_CHECK' not in str(e):
      raise
    return unplaced.compile(compiler_options=_PLAIN).as_text() or ''


@dataclasses.dataclass(frozen=True)
class Bound:
  """The roofline: no such TPU is faster, whatever the program."""

  compute: float  # Seconds.
  memory: float  # Seconds.

  def __str__(self) -> str:
    limit = 'compute' if self.compute > self.memory else 'memory'
    return f'{max(self.compute, self.memory):.3g} s, {limit}'


def bound(
  step: programs.Step, forward_bytes: int, chip: hardware.Chip, devices: int
) -> Bound:
  """The least time of a step.

  Args:
    step: its FLOPs, and how often it reads the model.
    forward_bytes: that a device reads in one pass.
    chip: the TPU.
    devices: of the mesh.
  """
  chips = devices / chip.devices
  size = step.passes * forward_bytes + step.cache_bytes
  return Bound(
    step.flops / (chips * chip.flops), size * chip.devices / chip.bandwidth
  )
