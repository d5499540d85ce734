"""Raw files from a local folder or from their origin, with checksums.

The project contains no data. A file is looked for, as it is or gzipped, under
`data_dir` or `$SLEEP_JAX_DATA`; otherwise it is downloaded once into the cache,
`$SLEEP_JAX_CACHE` or `~/.cache/sleep_jax`. In each case its content must have
the listed SHA-256, so that results are over the same data.
"""

from collections.abc import Callable
import dataclasses
import gzip
import hashlib
import os
import pathlib
import urllib.error
import urllib.request

from absl import logging

from sleep_jax import config

_DEFAULT_CACHE = '~/.cache/sleep_jax'
_TIMEOUT = 60  # Seconds.


class DataError(config.ConfigError):
  """A raw file is missing, or is not the file it should be."""


@dataclasses.dataclass(frozen=True)
class RawFile:
  """A file by its path below the data folder, its origin and its SHA-256.

  The hash is of the uncompressed content; `prepare`, if any, computes that from
  what the origin sends.
  """

  path: str
  url: str
  sha256: str
  prepare: Callable[[bytes], bytes] | None = None


def data_dir(given: str | None) -> pathlib.Path | None:
  """The local data folder: `given`, else `$SLEEP_JAX_DATA`, else none."""
  name = given or os.environ.get('SLEEP_JAX_DATA')
  if not name:
    return None
  path = pathlib.Path(name).expanduser()
  if not path.is_dir():
    raise DataError(
      f'data folder {name!r} does not exist; correct --config.data_dir or '
      '$SLEEP_JAX_DATA, or leave both empty to download.'
    )
  return path


def cache_dir() -> pathlib.Path:
  """The folder of what has been fetched; it may not exist yet."""
  name = os.environ.get('SLEEP_JAX_CACHE') or _DEFAULT_CACHE
  return pathlib.Path(name).expanduser()


def read(file: RawFile, folder: str | None = None) -> bytes:
  """The content of a raw file.

  Raises:
    DataError: if it is neither local nor at its origin, or its checksum is
      wrong.
  """
  local = data_dir(folder)
  for root in filter(None, (local, cache_dir())):
    for path in (root / file.path, root / f'{file.path}.gz'):
      if path.exists():
        return _checked(file, _content(path), str(path))
  content = _download(file)
  if file.prepare:
    content = file.prepare(content)
  content = _checked(file, content, file.url)
  target = cache_dir() / file.path
  target.parent.mkdir(parents=True, exist_ok=True)
  part = target.with_name(f'{target.name}.{os.getpid()}.part')
  part.write_bytes(content)
  part.replace(target)  # Atomic: a killed download leaves no partial file.
  return content


def _content(path: pathlib.Path) -> bytes:
  raw = path.read_bytes()
  try:
    return gzip.decompress(raw) if path.suffix == '.gz' else raw
  except (OSError, EOFError) as e:
    raise DataError(f'{path} is not a whole gzip file ({e}).') from e


def _checked(file: RawFile, content: bytes, where: str) -> bytes:
  sha256 = hashlib.sha256(content).hexdigest()
  if sha256 != file.sha256:
    raise DataError(
      f'{where}: SHA-256 is {sha256}, expected {file.sha256}. The file is '
      'not the one the splits are defined on; remove it to download it anew.'
    )
  return content


def _download(file: RawFile) -> bytes:
  logging.info('Downloading %s', file.url)
  try:
    with urllib.request.urlopen(file.url, timeout=_TIMEOUT) as response:
      return response.read()
  except (urllib.error.URLError, TimeoutError) as e:
    raise DataError(
      f'{file.path} is in no local folder and {file.url} cannot be reached '
      f'({e}); set $SLEEP_JAX_DATA to a folder that holds {file.path}[.gz].'
    ) from None
