"""Checks whether this machine can run `sleep_jax`, one line for each check."""

from collections.abc import Iterator
import importlib.metadata
import pathlib
import platform
import tempfile

import jax
from packaging import requirements

from sleep_jax import config
from sleep_jax.data.datasets import download
from sleep_jax.runtime import compilation


def main() -> int:
  """Prints every check; returns the exit status, 1 if one failed."""
  failed = 0
  for name, check in (
    ('packages', _packages),
    ('devices', _devices),
    ('data', _data),
    ('cache', lambda: _writable(download.cache_dir())),
    ('compilation cache', lambda: _writable(compilation.folder())),
  ):
    try:
      print(f'ok    {name}: {check()}')
    except (config.ConfigError, OSError, RuntimeError) as e:
      failed = 1
      print(f'FAIL  {name}: {e}')
  for extra, missing in _extras():
    print(
      f"--    extra '{extra}': {', '.join(missing)} missing; "
      f"pip install 'sleep_jax[{extra}]' if it is needed"
      if missing
      else f"ok    extra '{extra}'"
    )
  return failed


def _packages() -> str:
  """Python, and what `setup.py` requires."""
  try:
    missing = _missing('sleep_jax')
  except importlib.metadata.PackageNotFoundError:
    raise config.ConfigError(
      'sleep_jax is not installed here; pip install -e . in its folder.'
    ) from None
  if missing:
    raise config.ConfigError(
      f'{", ".join(missing)} missing, or too old; pip install -U sleep_jax.'
    )
  names = ('sleep_jax', 'jax', 'jaxlib', 'flax')
  versions = [f'{name} {importlib.metadata.version(name)}' for name in names]
  return ', '.join([f'Python {platform.python_version()}', *versions])


def _devices() -> str:
  """What JAX would compute on; a broken driver is a RuntimeError."""
  kinds = [d.device_kind for d in jax.local_devices()]
  return ', '.join(f'{kinds.count(k)} x {k}' for k in dict.fromkeys(kinds))


def _data() -> str:
  folder = download.data_dir(None)
  if folder is None:
    return '$SLEEP_JAX_DATA is not set; tasks download their data'
  return f'{folder}: {sum(1 for _ in folder.iterdir())} entries'


def _writable(folder: pathlib.Path | None) -> str:
  if folder is None:
    raise config.ConfigError('there is no home; set its environment variable.')
  folder.mkdir(parents=True, exist_ok=True)
  with tempfile.NamedTemporaryFile(dir=folder):
    return f'{folder} can be written'


def _extras() -> Iterator[tuple[str, list[str]]]:
  """Every extra of the package, and what of it is missing."""
  try:
    metadata = importlib.metadata.metadata('sleep_jax')
  except importlib.metadata.PackageNotFoundError:
    return
  for extra in metadata.get_all('Provides-Extra') or ():
    yield extra, _missing('sleep_jax', extra)


def _missing(package: str, extra: str = '') -> list[str]:
  """Packages that a package, or an extra of it, requires in vain."""
  out = []
  for text in importlib.metadata.requires(package) or ():
    needed = requirements.Requirement(text)
    # What is required without the extra is checked without it.
    if not _applies(needed, extra) or (extra and _applies(needed, '')):
      continue
    try:
      version = importlib.metadata.version(needed.name)
    except importlib.metadata.PackageNotFoundError:
      out.append(needed.name)
      continue
    if not needed.specifier.contains(version, prereleases=True):
      out.append(str(needed.name) + str(needed.specifier))
    for inner in needed.extras:
      out += _missing(needed.name, inner)
  return out


def _applies(needed: requirements.Requirement, extra: str) -> bool:
  """Whether it is required here, if this extra is wanted."""
  return not needed.marker or needed.marker.evaluate({'extra': extra})
