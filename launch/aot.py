"""Does it fit, and how fast is it? Compiles a config for an absent TPU.

  python -m launch.aot --config=experiments/configs/backbones.py:llama3_2_1b \\
      --topology=v5e:4x4

Needs `pip install -e '.[tpu]'`, and no TPU. Programs, shapes and mesh are those
of the runner. For each of a life's steps it reports what one device holds,
which collectives there are, the analytic FLOPs, the time below which no such
TPU can do it, and the time, the utilisation and the most expensive operations
as estimated by the compiler. Exits with 1 if a step does not fit.
"""

from collections.abc import Callable
import importlib.metadata
import json
import pathlib
import sys

from absl import app
from absl import flags
import jax
from ml_collections import config_flags

from launch import compilation
from launch import hardware
from launch import programs
from sleep_jax import config

_TOP = 10  # Operations listed of each step.
_MEMORY = (
  'step',
  'arguments',
  'outputs',
  'temporary',
  'with previous model',
  'of HBM',
  'collectives',
  'TFLOP',
  'at least',
  'took',
)
_ESTIMATE = (
  'step',
  'tokens',
  'time',
  'a pass',
  'MFU',
  'tokens/s/chip',
  'HBM traffic',
  'of HBM bound',
  'links wait',
  'no estimate',
)

MeasureFn = Callable[[programs.Step], compilation.CompileResult | str]


def table(
  program: programs.Program,
  topology: str,
  names: list[str],
  write_line: Callable[[str], None],
  measure_fn: MeasureFn | None = None,
) -> bool:
  """Writes the tables line by line, as steps are measured.

  Args:
    program: the steps.
    topology: of the slice, such as `v5e:4x4`.
    names: of the steps to measure.
    write_line: takes every line.
    measure_fn: `compilation.lowered`; default: `compilation.compiled` for the
      chip, where the mesh is of a TPU.

  Returns:
    Whether all steps fit.
  """
  chip = hardware.parse(topology).chip
  if measure_fn is None:
    on_tpu = program.mesh.devices.flat[0].platform == 'tpu'
    measure_fn = lambda step: compilation.compiled(
      step, chip if on_tpu else None
    )
  write_line(_title(program, topology, chip))
  _write_row(write_line, _MEMORY)
  write_line('|' + '---|' * len(_MEMORY))
  fits, estimated = True, {}
  for name in names:
    step = program.step(name)
    result = measure_fn(step)
    if isinstance(result, str):
      empty = [''] * (len(_MEMORY) - 2)
      _write_row(write_line, (name, f'does not fit: {result}', *empty))
      fits = False
      continue
    cells, step_fits = _memory_row(program, chip, step, result)
    fits &= step_fits
    _write_row(write_line, (name, *cells))
    if result.cost is not None:
      estimated[name] = step, result.cost
  if estimated:
    _write_estimates(program, chip, estimated, write_line)
  return fits


def _title(
  program: programs.Program, topology: str, chip: hardware.Chip
) -> str:
  mesh = program.mesh
  sizes = ', '.join(f'{k}={v}' for k, v in mesh.shape.items() if v > 1)
  previous = program.previous_memory_bytes()
  return (
    f'{topology}: {mesh.size} devices ({sizes or "no mesh"}), '
    f'{_gib(chip.hbm / chip.devices)} GiB each, '
    f'{chip.flops / 1e12:.0f} TFLOP/s and {chip.bandwidth / 1e9:.0f} GB/s a '
    f'chip ({chip.source}); the memory of the previous model takes '
    f'{_gib(previous)} GiB of a device beside every step.\n'
  )


def _memory_row(
  program: programs.Program,
  chip: hardware.Chip,
  step: programs.Step,
  result: compilation.CompileResult,
) -> tuple[tuple[str, ...], bool]:
  """Cells of the first table, and whether the step fits."""
  hbm = chip.hbm / chip.devices
  # A life holds all of its memory, also what this step does not read.
  arguments = program.local_bytes(step.arguments())
  used = arguments + (result.outputs or 0) + (result.temporary or 0)
  used += program.previous_memory_bytes()
  fits = used <= hbm
  least = compilation.bound(
    step, program.forward_bytes(), chip, program.mesh.size
  )
  cells = (
    *map(_gib, (arguments, result.outputs, result.temporary, used)),
    f'{used / hbm:.0%}' + ('' if fits else ', does not fit'),
    result.collectives,
    f'{step.flops / 1e12:.4g}',
    str(least),
    f'{result.seconds:.0f} s',
  )
  return cells, fits


def _write_estimates(
  program: programs.Program,
  chip: hardware.Chip,
  estimated: dict[str, tuple[programs.Step, compilation.schedule_cost.Cost]],
  write_line: Callable[[str], None],
) -> None:
  version = importlib.metadata.version('libtpu')
  write_line(
    f'\nEstimated by the compiler (libtpu {version}), not measured; '
    'docs/tpu_estimates.md says what the columns mean, and what such an '
    'estimate does not see.\n'
  )
  _write_row(write_line, _ESTIMATE)
  write_line('|' + '---|' * len(_ESTIMATE))
  chips = program.mesh.size / chip.devices
  for name, (step, cost) in estimated.items():
    least = compilation.bound(
      step, program.forward_bytes(), chip, program.mesh.size
    )
    cells = (
      name,
      str(step.tokens),
      f'{cost.seconds:.4g} s',
      f'{cost.seconds / step.passes * 1e3:.4g} ms',
      f'{least.compute / cost.seconds:.0%}',
      f'{step.tokens / cost.seconds / chips:.4g}',
      f'{_gib(cost.hbm)} GiB',
      f'{least.memory / cost.seconds:.0%}',
      f'{cost.exposed / cost.seconds:.0%}',
      f'{cost.assumed / cost.seconds:.0%}',
    )
    _write_row(write_line, cells)
  for name, (_, cost) in estimated.items():
    write_line(f'\nMost expensive operations of {name}:\n')
    _write_row(write_line, ('of the time', 'operation', 'runs', 'source'))
    write_line('|' + '---|' * 4)
    for (source, kind), operation in cost.most_expensive(_TOP):
      share = f'{operation.seconds / cost.seconds:.1%}'
      runs = f'{operation.runs:.0f}'
      _write_row(write_line, (share, kind, runs, source or 'unknown'))


def _write_row(
  write_line: Callable[[str], None], cells: tuple[str, ...]
) -> None:
  write_line(f'| {" | ".join(cells)} |')


def _gib(size: float | None) -> str:
  """Bytes as GiB; ? if unknown."""
  return '?' if size is None else f'{size / 2**30:.2f}'


def define_flags() -> None:
  """Of the command line alone: other commands have flags of these names."""
  config_flags.DEFINE_config_file('config')
  flags.DEFINE_string('arm', 'sleep', 'Which arm of the config.')
  flags.DEFINE_string(
    'topology', 'v5e:4x4', 'Generation and topology of one slice.'
  )
  flags.DEFINE_string(
    'mesh', '', "Such as fsdp=2,tensor=8; default: the launcher's choice."
  )
  flags.DEFINE_list(
    'steps', ['wake', 'seeding', 'rollout', 'trials'], 'Which steps, or all.'
  )
  flags.DEFINE_bool(
    'lower_only', False, 'Do not compile: seconds, but no temporary memory.'
  )
  flags.DEFINE_string('out', '', 'A file for the table.')


def main(_: list[str]) -> None:
  values = flags.FLAGS
  jax.config.update('jax_platforms', 'cpu')
  # A program for an absent TPU can be written to the cache, and not be read.
  jax.config.update('jax_enable_compilation_cache', False)
  # Frames of libraries must not hide the source line of an operation.
  jax.config.update('jax_traceback_in_locations_limit', -1)
  c = json.loads(values.config.to_json())
  lines = []

  def write_line(line: str) -> None:
    print(line, flush=True)
    lines.append(line)

  try:
    devices = programs.absent_devices(values.topology)
    run = programs.build_run(c, values.arm)
    program = programs.Program(run, run.mesh(values.mesh, devices))
    names = values.steps
    if names == ['all']:
      names = list(program.steps())
    measure_fn = compilation.lowered if values.lower_only else None
    fits = table(program, values.topology, names, write_line, measure_fn)
  except config.ConfigError as e:
    sys.exit(f'error: {e}')
  if values.out:
    path = pathlib.Path(values.out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('\n'.join(lines) + '\n', encoding='utf-8')
  if not fits:
    sys.exit(
      f'{c["name"]} does not fit on {values.topology}; take a larger slice, '
      'another --mesh, or fewer rows.'
    )


if __name__ == '__main__':
  define_flags()
  app.run(main)
