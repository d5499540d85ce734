"""The files that are read as they are: books, text, weights, tokenizers.

`stories260K` (260 thousand parameters, MIT) is a pretrained Llama; the books
are in the public domain. The name of a listed file is its path below the data
folder, as `download.read` looks for it.
"""

import os
import pathlib

from sleep_jax.data.datasets import download
from sleep_jax.data.datasets import gutenberg

_FILES = {book.path: book for book in gutenberg.BOOKS.values()} | {
  path: file
  for path, file in download.FILES.items()
  if path.startswith(('stories260k/', 'tinystories/'))
}


def read(name: str, folder: str | None = None) -> bytes:
  """The content of a file.

  Args:
    name: the path of a file, or a listed name.
    folder: the data folder, see `download.data_dir`.

  Raises:
    DataError: if it is neither or cannot be read, or the origin or checksum of
      a listed file fails.
  """
  if os.path.isfile(name):
    try:
      return pathlib.Path(name).read_bytes()
    except OSError as e:
      raise download.DataError(f'file {name!r} cannot be read ({e}).') from e
  if os.path.exists(name):
    raise download.DataError(f'{name!r} is not a file.')
  if name not in _FILES:
    raise download.DataError(
      f'file {name!r} does not exist, and is none of the listed '
      f'{", ".join(sorted(_FILES))}.'
    )
  return download.read(_FILES[name], folder)


def read_text(name: str, folder: str | None = None) -> str:
  """The text of a file, as `read`.

  Raises:
    DataError: as `read`, or if it is not UTF-8.
  """
  try:
    return read(name, folder).decode()
  except UnicodeDecodeError as e:
    raise download.DataError(
      f'file {name!r} is not UTF-8 ({e.reason} at byte {e.start}); convert it, '
      f'for example by `iconv -f latin1 -t utf-8 {name}`.'
    ) from e
