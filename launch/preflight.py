"""Is this machine ready? Every check says what it saw, and what to do.

  python -m launch.preflight --accelerator=v5e:4x4 --workdir=/bucket/runs/x

Exits with 1 if any check fails.
"""

import argparse
from collections.abc import Callable
import importlib.metadata
import os
import pathlib
import sys
import tempfile

import jax
import psutil

from launch import hardware
from sleep_jax import config
from sleep_jax.data.datasets import download

_LEAST = {'jax': (0, 10), 'flax': (0, 12), 'orbax-checkpoint': (0, 12)}
_PYTHON = (3, 11)


class Unready(Exception):
  """What is wrong, and the way out."""


def versions() -> str:
  """Python, the libraries, and that jax and jaxlib belong together."""
  if sys.version_info < _PYTHON:
    raise Unready(f'Python {sys.version.split()[0]}; 3.11 is needed.')
  found = {name: importlib.metadata.version(name) for name in _LEAST}
  for name, least in _LEAST.items():
    if tuple(map(int, found[name].split('.')[:2])) < least:
      wanted = '.'.join(map(str, least))
      raise Unready(
        f'{name} {found[name]}; {wanted} is needed: pip install -U {name}.'
      )
  jaxlib = importlib.metadata.version('jaxlib')
  if jaxlib.split('.')[:2] != found['jax'].split('.')[:2]:
    raise Unready(
      f'jax {found["jax"]} beside jaxlib {jaxlib}; install both together: '
      "pip install -U 'jax[tpu]', 'jax[cuda12]' or jax."
    )
  return ', '.join(f'{k} {v}' for k, v in found.items())


def devices(wanted: hardware.Accelerator, nodes: int) -> str:
  """The accelerator that JAX sees, and how many of it."""
  try:
    found = jax.local_devices()
  except RuntimeError as e:
    raise Unready(f'JAX finds no device: {e}') from e
  kind = 'gpu' if found[0].platform == 'cuda' else found[0].platform
  if kind != wanted.kind:
    raise Unready(
      f'JAX runs on {kind}, but {wanted.kind} was expected; install '
      f"'jax[{dict(gpu='cuda12').get(wanted.kind, wanted.kind)}]' and see "
      'that $JAX_PLATFORMS names it.'
    )
  count = {
    'cpu': len(found),
    'gpu': wanted.count,
    'tpu': wanted.chips_per_host if wanted.kind == 'tpu' else 0,
  }[kind]
  if len(found) != count:
    raise Unready(
      f'{len(found)} devices on this machine, but {count} were expected; '
      'another process may hold the rest.'
    )
  total = wanted.hosts * nodes
  return f'{len(found)} x {found[0].device_kind}, one of {total} machines'


def memory(least: float) -> str:
  """Free memory of the machine, in GiB; and of a device that tells it."""
  free = psutil.virtual_memory().available / 2**30
  if free < least:
    raise Unready(
      f'{free:.1f} GiB of memory are free, but {least:.1f} were asked for; '
      'end other processes, or lower --memory-gib.'
    )
  stats = jax.local_devices()[0].memory_stats() or {}
  if limit := stats.get('bytes_limit'):
    return f'{free:.1f} GiB free, {limit / 2**30:.1f} GiB a device'
  return f'{free:.1f} GiB free'


def work_directory(name: str, least: float) -> str:
  """A file can be written, renamed and read back; space in GiB is left."""
  folder = pathlib.Path(name)
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix='.preflight') as probe:
      part = pathlib.Path(probe) / 'part'
      part.mkdir()
      (part / 'bytes').write_bytes(b'sleep')
      # A checkpoint becomes visible by the rename of its folder.
      whole = part.replace(pathlib.Path(probe) / 'whole')
      if (whole / 'bytes').read_bytes() != b'sleep':
        raise Unready(f'{folder} does not give back what was written.')
  except OSError as e:
    raise Unready(
      f'{folder} cannot be written ({e}); give another --workdir, or mount '
      'its disk or bucket for writing.'
    ) from e
  disk = psutil.disk_usage(str(folder))
  if disk.free / 2**30 < least:
    raise Unready(
      f'{disk.free / 2**30:.1f} GiB are left at {folder}, but {least:.1f} '
      'were asked for; free some, or lower --disk-gib.'
    )
  return f'{folder}: written, {disk.free / 2**30:.1f} GiB left'


def data(name: str | None) -> str:
  """The data folder, if there is one, can be read."""
  try:
    folder = download.data_dir(name)
  except download.DataError as e:
    raise Unready(str(e)) from e
  if folder is None:
    return 'no folder; what a task needs is downloaded'
  if not os.access(folder, os.R_OK | os.X_OK):
    raise Unready(f'data folder {str(folder)!r} cannot be read; chmod it.')
  count = sum(1 for _ in folder.iterdir())
  if not count:
    raise Unready(f'data folder {str(folder)!r} is empty; mount or fill it.')
  return f'{folder}: {count} entries'


def checks(given: argparse.Namespace) -> dict[str, Callable[[], str]]:
  """The checks that a command line asks for, by name."""
  wanted = hardware.parse(given.accelerator)
  out = {
    'versions': versions,
    'devices': lambda: devices(wanted, given.nodes),
    'memory': lambda: memory(given.memory_gib),
    'data': lambda: data(given.data_dir),
  }
  if given.workdir:
    out['workdir'] = lambda: work_directory(given.workdir, given.disk_gib)
  return out


def parser() -> argparse.ArgumentParser:
  """The command line."""
  out = argparse.ArgumentParser('launch.preflight', description=__doc__)
  out.add_argument('--accelerator', default='cpu')
  out.add_argument('--nodes', type=int, default=1)
  out.add_argument('--workdir', default='')
  out.add_argument('--data-dir', default=None)
  out.add_argument('--memory-gib', type=float, default=2.0)
  out.add_argument('--disk-gib', type=float, default=1.0)
  return out


def main(argv: list[str] | None = None) -> int:
  """Runs all checks, prints a line each, and returns the exit status."""
  try:
    todo = checks(parser().parse_args(argv))
  except config.ConfigError as e:
    print(f'error: {e}', file=sys.stderr)
    return 2
  failed = 0
  for name, check in todo.items():
    try:
      print(f'ok    {name}: {check()}')
    except Unready as e:
      failed += 1
      print(f'FAIL  {name}: {e}')
  if failed:
    print(f'{failed} of {len(todo)} checks failed.', file=sys.stderr)
  return 1 if failed else 0


if __name__ == '__main__':
  sys.exit(main())
