"""Checks whether this machine is ready for a run.

  python -m launch.preflight --accelerator=v5e:4x4 --workdir=/bucket/runs/x

Every check prints a line: its result, or the problem and what to do. Exits with
1 if any check fails.
"""

import argparse
from collections.abc import Callable, Mapping
import importlib.metadata
import os
import pathlib
import sys
import tempfile

import jax
import psutil

from launch import hardware
from launch import mesh as mesh_lib
from sleep_jax import config
from sleep_jax.data.datasets import download

_MIN_VERSIONS = {'jax': (0, 10), 'flax': (0, 12), 'orbax-checkpoint': (0, 12)}
_PYTHON = (3, 11)


class NotReady(Exception):
  """A failed check; the message names the problem and what to do."""


def check_versions() -> str:
  """Checks the versions of Python, the libraries, and jax against jaxlib."""
  if sys.version_info < _PYTHON:
    raise NotReady(f'Python {sys.version.split()[0]}; 3.11 is needed.')
  versions = {name: importlib.metadata.version(name) for name in _MIN_VERSIONS}
  for name, minimum in _MIN_VERSIONS.items():
    if tuple(map(int, versions[name].split('.')[:2])) < minimum:
      required = '.'.join(map(str, minimum))
      raise NotReady(
        f'{name} {versions[name]}; {required} is needed: pip install -U {name}.'
      )
  jaxlib = importlib.metadata.version('jaxlib')
  if jaxlib.split('.')[:2] != versions['jax'].split('.')[:2]:
    raise NotReady(
      f'jax {versions["jax"]} beside jaxlib {jaxlib}; install both together: '
      "pip install -U 'jax[tpu]', 'jax[cuda12]' or jax."
    )
  return ', '.join(f'{k} {v}' for k, v in versions.items())


def check_devices(expected: hardware.Accelerator, nodes: int) -> str:
  """Checks kind and number of the devices that JAX finds."""
  try:
    devices = jax.local_devices()
  except RuntimeError as e:
    raise NotReady(f'JAX finds no device: {e}') from e
  kind = 'gpu' if devices[0].platform == 'cuda' else devices[0].platform
  if kind != expected.kind:
    raise NotReady(
      f'JAX runs on {kind}, but {expected.kind} was expected; install '
      f"'jax[{dict(gpu='cuda12').get(expected.kind, expected.kind)}]' and see "
      'that $JAX_PLATFORMS names it.'
    )
  count = {
    'cpu': len(devices),
    'gpu': expected.count,
    'tpu': expected.chips_per_host if expected.kind == 'tpu' else 0,
  }[kind]
  if len(devices) != count:
    raise NotReady(
      f'{len(devices)} devices on this machine, but {count} were expected; '
      'another process may hold the rest.'
    )
  total = expected.hosts * nodes
  return f'{len(devices)} x {devices[0].device_kind}, one of {total} machines'


def check_mesh(text: str, expected: hardware.Accelerator, nodes: int) -> str:
  """Checks that a mesh uses the devices of all machines."""
  machines = expected.hosts * nodes
  devices = len(jax.local_devices()) * machines
  try:
    where = f'{machines} such machines'
    mesh_lib.check_size(mesh_lib.parse(text), devices, where)
  except config.ConfigError as e:
    raise NotReady(str(e)) from e
  return f'{text}, all {devices} devices'


def check_memory(minimum: float) -> str:
  """Checks the free memory of the machine, in GiB; prints that of a device."""
  free = psutil.virtual_memory().available / 2**30
  if free < minimum:
    raise NotReady(
      f'{free:.1f} GiB of memory are free, but {minimum:.1f} are needed; '
      'end other processes, or lower --memory-gib.'
    )
  stats = jax.local_devices()[0].memory_stats() or {}
  if limit := stats.get('bytes_limit'):
    return f'{free:.1f} GiB free, {limit / 2**30:.1f} GiB a device'
  return f'{free:.1f} GiB free'


def check_workdir(name: str, minimum: float) -> str:
  """Checks that files can be written and renamed, and the free GiB."""
  folder = pathlib.Path(name).absolute()
  while not folder.exists():  # The run makes it; nothing is left here.
    folder = folder.parent
  try:
    with tempfile.TemporaryDirectory(dir=folder, prefix='.preflight') as probe:
      part = pathlib.Path(probe) / 'part'
      part.mkdir()
      (part / 'bytes').write_bytes(b'sleep')
      # A checkpoint is completed by renaming its folder.
      renamed = part.replace(pathlib.Path(probe) / 'renamed')
      if (renamed / 'bytes').read_bytes() != b'sleep':
        raise NotReady(f'{folder} returns other data than was written.')
  except OSError as e:
    raise NotReady(
      f'{name} cannot be written ({e}); give another --workdir, or mount '
      'its disk or bucket for writing.'
    ) from e
  disk = psutil.disk_usage(str(folder))
  if disk.free / 2**30 < minimum:
    raise NotReady(
      f'{disk.free / 2**30:.1f} GiB are left at {name}, but {minimum:.1f} '
      'are needed; free some, or lower --disk-gib.'
    )
  return f'{name}: can be written, {disk.free / 2**30:.1f} GiB left'


def check_data(name: str | None) -> str:
  """Checks that the data folder, if there is one, can be read."""
  try:
    folder = download.data_dir(name)
  except download.DataError as e:
    raise NotReady(str(e)) from e
  if folder is None:
    return 'no folder; tasks download their data'
  if not os.access(folder, os.R_OK | os.X_OK):
    raise NotReady(f'data folder {str(folder)!r} cannot be read; chmod it.')
  count = sum(1 for _ in folder.iterdir())
  if not count:
    raise NotReady(f'data folder {str(folder)!r} is empty; mount or fill it.')
  return f'{folder}: {count} entries'


def checks(args: argparse.Namespace) -> dict[str, Callable[[], str]]:
  """The checks that the command line selects, by name."""
  expected = hardware.parse(args.accelerator)
  out = {
    'versions': check_versions,
    'devices': lambda: check_devices(expected, args.nodes),
    'memory': lambda: check_memory(args.memory_gib),
    'data': lambda: check_data(args.data_dir),
  }
  if args.mesh:
    out['mesh'] = lambda: check_mesh(args.mesh, expected, args.nodes)
  if args.workdir:
    out['workdir'] = lambda: check_workdir(args.workdir, args.disk_gib)
  return out


def parser() -> argparse.ArgumentParser:
  """The argument parser."""
  out = argparse.ArgumentParser('launch.preflight', description=__doc__)
  out.add_argument('--accelerator', default='cpu')
  out.add_argument('--nodes', type=int, default=1)
  out.add_argument('--mesh', default='')
  out.add_argument('--workdir', default='')
  out.add_argument('--data-dir', default=None)
  out.add_argument('--memory-gib', type=float, default=2.0)
  out.add_argument('--disk-gib', type=float, default=1.0)
  return out


def main(argv: list[str] | None = None) -> int:
  """Runs all checks, prints a line for each, and returns the exit status."""
  try:
    todo = checks(parser().parse_args(argv))
  except config.ConfigError as e:
    print(f'error: {e}', file=sys.stderr)
    return 2
  return report(todo)


def report(todo: Mapping[str, Callable[[], str]]) -> int:
  """Runs checks, prints a line for each; returns 1 if any failed."""
  failed = 0
  for name, check in todo.items():
    try:
      print(f'ok    {name}: {check()}')
    except (NotReady, config.ConfigError) as e:
      failed += 1
      print(f'FAIL  {name}: {e}')
  if failed:
    print(f'{failed} of {len(todo)} checks failed.', file=sys.stderr)
  return 1 if failed else 0


if __name__ == '__main__':
  sys.exit(main())
