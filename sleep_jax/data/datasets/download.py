"""Raw files from a local folder or from their origin, with checksums.

The project contains no data. `checksums.tsv` lists the files it reads. A file
is looked for, as it is or gzipped, under `data_dir` or `$SLEEP_JAX_DATA`, and
in the cache, `$SLEEP_JAX_CACHE` or `~/.cache/sleep_jax`; otherwise it is
downloaded. In each case its content must have the listed SHA-256, so that
results are over the same data.
"""

from collections.abc import Callable
import dataclasses
import gzip
import hashlib
import http.client
import importlib.resources
import os
import pathlib
import tempfile
from typing import Any
import urllib.request
import zlib

from absl import logging

from sleep_jax import config

TABLE = 'checksums.tsv'
_DEFAULT_CACHE = '~/.cache/sleep_jax'
_TIMEOUT = 60  # Seconds.
_MARGIN = 1 << 20  # Bytes, for what `prepare` takes away.


class DataError(config.ConfigError):
  """A raw file is missing, or is not the file it should be."""


@dataclasses.dataclass(frozen=True)
class RawFile:
  """A file by its path below the data folder, its origin and its content.

  Size in bytes and hash are those of the uncompressed content; `prepare`, if
  any, computes that from what the origin sends.
  """

  path: str
  url: str
  size: int
  sha256: str
  prepare: Callable[[bytes], bytes] | None = None


def _listed() -> dict[str, RawFile]:
  table = importlib.resources.files('sleep_jax.data.datasets') / TABLE
  lines = table.read_text(encoding='utf-8').splitlines()
  rows = [line.split('\t') for line in lines if not line.startswith('#')]
  return {
    path: RawFile(path, url, int(size), sha256)
    for url, size, sha256, path in rows
  }


FILES = _listed()  # By their paths.


def data_dir(given: str | None) -> pathlib.Path | None:
  """The local data folder: `given`, else `$SLEEP_JAX_DATA`, else none."""
  name = given or os.environ.get('SLEEP_JAX_DATA')
  if not name:
    return None
  path = pathlib.Path(os.path.expanduser(name))
  if not os.path.isdir(path):
    raise DataError(
      f'data folder {name!r} does not exist; correct --config.task.data_dir or '
      '$SLEEP_JAX_DATA, or leave both empty to download.'
    )
  return path


def cache_dir() -> pathlib.Path:
  """The folder of what has been fetched; it may not exist yet."""
  name = os.environ.get('SLEEP_JAX_CACHE') or _DEFAULT_CACHE
  return pathlib.Path(os.path.expanduser(name))


def cached(name: str, make: Callable[[pathlib.Path], Any]) -> pathlib.Path:
  """The folder `name` of the cache, which `make` writes if it is not there.

  Args:
    name: of the folder; may contain slashes.
    make: writes a folder to the path that it is given, and whatever it needs
      beside that; what is beside it is deleted. The folder is renamed when
      complete, so that a run that is killed leaves none.

  Raises:
    DataError: if the cache cannot be written.
  """
  target = cache_dir() / name
  if target.is_dir():
    return target
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    part = tempfile.TemporaryDirectory(dir=target.parent, prefix='part-')
  except OSError as e:
    raise unwritable(e) from e
  with part as temporary:
    made = pathlib.Path(temporary, 'made')
    make(made)
    try:
      made.rename(target)
    except OSError:
      if not target.is_dir():  # Else another process was faster.
        raise
  return target


def read(file: RawFile, folder: str | None = None) -> bytes:
  """The content of a raw file.

  Raises:
    DataError: if it is neither local nor at its origin, or its checksum is
      wrong.
  """
  content = local(file, folder)
  if content is not None:
    return content
  content = _download(file)
  try:
    content = file.prepare(content) if file.prepare else content
  except DataError as e:
    raise DataError(f'{file.url}: {e}') from e
  content = _checked(file, content, file.url)
  target = cache_dir() / file.path
  part = target.with_name(f'{target.name}.{os.getpid()}.part')
  try:
    target.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(content)
    part.replace(target)  # Atomic: a killed download leaves no partial file.
  except OSError as e:
    raise unwritable(e) from e
  return content


def local(file: RawFile, folder: str | None = None) -> bytes | None:
  """The content of a file of the data folder or the cache; None without one.

  Raises:
    DataError: if there is one that is not the listed file.
  """
  for root in filter(None, (data_dir(folder), cache_dir())):
    for path in (root / file.path, root / f'{file.path}.gz'):
      if os.path.lexists(path):
        return _checked(file, _content(path, file.size + 1), str(path))
  return None


def _content(path: pathlib.Path, limit: int) -> bytes:
  """At most `limit` bytes, whatever a gzip file may expand to."""
  if not os.path.isfile(path):  # A pipe would be waited for.
    raise DataError(f'{path} is not a file; replace it, or remove it.')
  try:
    with (gzip.open if path.suffix == '.gz' else open)(path, 'rb') as f:
      return f.read(limit)
  except (gzip.BadGzipFile, EOFError, zlib.error) as e:
    raise DataError(f'{path} is not a whole gzip file ({e}).') from e
  except OSError as e:
    raise DataError(f'{path} cannot be read ({e}).') from e


def _checked(file: RawFile, content: bytes, where: str) -> bytes:
  if len(content) > file.size:
    raise DataError(
      f'{where} has more than the {file.size} bytes that are expected; a local '
      'file that is removed is downloaded anew.'
    )
  sha256 = hashlib.sha256(content).hexdigest()
  if sha256 != file.sha256:
    raise DataError(
      f'{where}: SHA-256 is {sha256}, expected {file.sha256}. It is not the '
      'file that results are over; a local one that is removed is downloaded '
      'anew.'
    )
  return content


def _download(file: RawFile) -> bytes:
  logging.info('Downloading %s', file.url)
  try:
    with urllib.request.urlopen(file.url, timeout=_TIMEOUT) as response:
      return response.read(file.size + _MARGIN)
  except (OSError, http.client.HTTPException) as e:
    raise unreachable(file, e) from None


def unreachable(file: RawFile, reason: Exception) -> DataError:
  """The error of a file that is not local and cannot be downloaded."""
  return DataError(
    f'{file.path} is in no local folder and {file.url} cannot be reached '
    f'({reason}); set $SLEEP_JAX_DATA to a folder that holds {file.path}[.gz].'
  )


def unwritable(reason: Exception) -> DataError:
  """The error of a cache that takes no files."""
  return DataError(
    f'the cache {cache_dir()} cannot be written ({reason}); set '
    '$SLEEP_JAX_CACHE to a folder that can.'
  )
