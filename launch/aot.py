"""Does it fit? Compiles a full-size config for a TPU that is not there.

  python -m launch.aot --config=experiments/configs/backbones.py:llama3_2_1b \\
      --topology=v5e:4x4

Needs `pip install -e '.[tpu]'`, and no TPU. For each of a life's steps it
reports what one device holds, which collectives there are, the analytic FLOPs,
and the time below which no such TPU can do it. Exits with 1 if a step does not
fit.
"""

from collections.abc import Callable
import json
import pathlib
import sys

from absl import app
from absl import flags
import jax
from ml_collections import config_flags

from launch import hardware
from launch import programs
from sleep_jax import config
from sleep_jax.harness import build


def table(
  program: programs.Program,
  topology: str,
  names: list[str],
  write_line: Callable[[str], None],
  measure_fn: Callable[
    [programs.Step], programs.CompileResult | str
  ] = programs.compiled,
) -> bool:
  """Writes the table line by line, as steps are measured.

  Args:
    program: the steps.
    topology: of the slice, such as `v5e:4x4`.
    names: of the steps to measure.
    write_line: takes every line.
    measure_fn: `programs.compiled` or `programs.lowered`.

  Returns:
    Whether all steps fit.
  """
  machine = hardware.parse(topology)
  devices = program.mesh.size
  chip = machine.chip
  hbm = chip.hbm / chip.devices
  previous = program.previous_memory_bytes()
  sizes = ', '.join(f'{k}={v}' for k, v in program.mesh.shape.items() if v > 1)
  write_line(
    f'{topology}: {devices} devices ({sizes}), {_gib(hbm)} GiB each, '
    f'{chip.flops / 1e12:.0f} TFLOP/s and {chip.bandwidth / 1e9:.0f} GB/s a '
    f'chip ({chip.source}); the memory of the previous model takes '
    f'{_gib(previous)} GiB of a device beside every step.\n'
  )
  header = (
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
  write_line(f'| {" | ".join(header)} |')
  write_line('|' + '---|' * len(header))
  fits = True
  for name in names:
    step = program.step(name)
    result = measure_fn(step)
    if isinstance(result, str):
      empty = ' |' * (len(header) - 2)
      write_line(f'| {name} | does not fit: {result} |{empty}')
      fits = False
      continue
    # A life holds all of its memory, also what this step does not read.
    arguments = program.local_bytes(step.arguments())
    used = arguments + (result.outputs or 0) + (result.temporary or 0)
    used += previous
    fits &= used <= hbm
    cells = (
      name,
      *map(_gib, (arguments, result.outputs, result.temporary, used)),
      f'{used / hbm:.0%}' + ('' if used <= hbm else ', does not fit'),
      result.collectives,
      f'{step.flops / 1e12:.4g}',
      programs.bound(step, program.forward_bytes(), chip, devices),
      f'{result.seconds:.0f} s',
    )
    write_line(f'| {" | ".join(cells)} |')
  return fits


def _gib(size: float | None) -> str:
  """Bytes as GiB; ? if unknown."""
  return '?' if size is None else f'{size / 2**30:.2f}'


def define_flags() -> None:
  """Of the command line alone: other commands have flags of these names."""
  config_flags.DEFINE_config_file('config')
  flags.DEFINE_string(
    'topology', 'v5e:4x4', 'Generation and topology of one slice.'
  )
  flags.DEFINE_string(
    'mesh', '', 'Such as fsdp=2,tensor=8; default: tensor over the key heads.'
  )
  flags.DEFINE_list(
    'steps', ['wake', 'seeding', 'rollout', 'trials'], 'Which steps.'
  )
  flags.DEFINE_bool(
    'lower_only', False, 'Do not compile: seconds, but no temporary memory.'
  )
  flags.DEFINE_string('out', '', 'A file for the table.')


def main(_: list[str]) -> None:
  values = flags.FLAGS
  jax.config.update('jax_platforms', 'cpu')
  c = json.loads(values.config.to_json())
  lines = []

  def write_line(line: str) -> None:
    print(line, flush=True)
    lines.append(line)

  try:
    devices = programs.absent_devices(values.topology)
    cfg = build.model_config(c, absent=True)
    program = programs.Program(c, programs.mesh_of(cfg, values.mesh, devices))
    measure_fn = programs.lowered if values.lower_only else programs.compiled
    fits = table(program, values.topology, values.steps, write_line, measure_fn)
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
