"""Datasets of `builders`, prepared once in the cache and read from there.

A prepared dataset is `datasets/NAME-VERSION-KEY` in the cache, KEY a hash of
its files' checksums.
"""

import contextlib
import functools
import hashlib
import io
import pathlib
from typing import Any

from absl import logging
import tensorflow_datasets as tfds

from sleep_jax import config
from sleep_jax.data.datasets import builders
from sleep_jax.data.datasets import download

_DIGEST = 'SHA256'  # A file of a prepared dataset: the hash of all others.


def load(name: str, split: str, folder: str) -> list[dict[str, Any]]:
  """See `datasets.load`."""
  download.data_dir(folder)  # Refused even if it is not needed.
  cls, variant = config.lookup(name, builders.by_name(), 'dataset')
  files = [download.FILES[p] for p in sum(cls.files(variant).values(), [])]
  hashes = ''.join(file.sha256 for file in files)
  key = hashlib.sha256(hashes.encode()).hexdigest()[:8]

  def prepare(out: pathlib.Path) -> None:
    logging.info('Preparing %s', name)
    try:
      _prepare(_builder(cls, variant, out), files, folder)
      (out / _DIGEST).write_text(_digest(out))
    except (OSError, RuntimeError) as e:  # The latter of array_record.
      raise download.unwritable(e) from e

  prepared = download.cached(
    f'datasets/{name.replace("/", "-")}-{cls.VERSION}-{key}', prepare
  )
  return list(_records(cls, variant, split, prepared))


def _builder(
  cls: type[builders.Builder], variant: str, folder: pathlib.Path
) -> builders.Builder:
  return cls(
    data_dir=folder, config=variant or None, file_format='array_record'
  )


def _prepare(
  builder: builders.Builder, files: list[download.RawFile], folder: str
) -> None:
  """Writes a dataset; local raw files are what its builder calls manual."""
  # Beside the dataset, and deleted with all that is.
  manual = builder.data_dir_root.with_name('manual')
  for file in files:
    content = download.local(file, folder)
    if content is not None:
      path = manual / file.path
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(content)
  tfds.disable_progress_bar()
  with contextlib.redirect_stdout(io.StringIO()):
    builder.download_and_prepare(
      download_dir=manual.with_name('downloads'),
      download_config=tfds.download.DownloadConfig(
        manual_dir=manual,
        force_checksums_validation=True,
        try_download_gcs=False,
      ),
    )


def _digest(folder: pathlib.Path) -> str:
  """SHA-256 over a dataset's files: its row counts stand in plain JSON."""
  sha256 = hashlib.sha256()
  for path in sorted(folder.rglob('*')):
    if path.is_file() and path.name != _DIGEST:
      sha256.update(path.read_bytes())
  return sha256.hexdigest()


@functools.lru_cache(maxsize=8)  # Ten thousand records take a second.
def _records(
  cls: type[builders.Builder], variant: str, split: str, folder: pathlib.Path
) -> tuple[dict[str, Any], ...]:
  try:
    intact = (folder / _DIGEST).read_text() == _digest(folder)
  except (OSError, UnicodeDecodeError):
    intact = False
  if not intact:
    raise download.DataError(
      f'the prepared dataset {folder} is damaged; remove it, and it will be '
      'prepared anew.'
    )
  builder: Any = _builder(cls, variant, folder)
  source = builder.as_data_source(split)
  return tuple(_as_text(x) for x in source.__getitems__(range(len(source))))


def _as_text(value: Any) -> Any:
  """A record with `str` in place of UTF-8."""
  if isinstance(value, dict):
    return {name: _as_text(part) for name, part in value.items()}
  if isinstance(value, list):
    return [_as_text(part) for part in value]
  return value.decode() if isinstance(value, bytes) else value
