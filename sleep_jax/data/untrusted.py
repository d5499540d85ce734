"""Files that others made: checkpoints, tokenizers, saved lives.

Their content may be anything, so a reader here either gives the right kind of
value or raises one error that names the file. Nothing outside the folder that
was given is read: the names in it are plain, and a symbolic link counts as what
it points to.
"""

import json
import pathlib
import re
from typing import Any
import zipfile

import numpy as np

from sleep_jax import config

_PLAIN_NAME = re.compile(r'\w[\w.+-]{0,200}', re.ASCII)
# Files are copied by parsers that recurse; of real ones the deepest has 9.
_MAX_DEPTH = 50
# What weights are never packed to: an archive of zeros is some 1000 times
# smaller than its content.
_MAX_RATIO, _SMALL = 100, 1 << 28


def reason(error: BaseException) -> str:
  """The first line of what a library says of a file that it cannot read."""
  return (str(error).splitlines() or [type(error).__name__])[0]


def member(folder: pathlib.Path, name: Any) -> pathlib.Path:
  """The path of the file `name` in a folder, whether or not it exists.

  In the Hugging Face hub's cache, the files of a snapshot are links into the
  `blobs` of the same model, and so these count as inside.

  Raises:
    ConfigError: if the name is not a plain file name, or if it is a link that
      leaves the folder.
  """
  if not isinstance(name, str) or not _PLAIN_NAME.fullmatch(name):
    raise config.ConfigError(
      f'{folder} names the file {name!r}, which is not a plain file name; '
      'nothing outside the folder is read.'
    )
  path = folder / name
  try:
    home, target = folder.resolve(), path.resolve()
  except (OSError, RuntimeError) as e:  # A link to itself.
    raise config.ConfigError(f'{path} cannot be read: {e}.') from None
  homes = [home]
  if home.parent.name == 'snapshots':
    homes.append((home.parent.parent / 'blobs').resolve())
  if not any(target.is_relative_to(h) for h in homes):
    raise config.ConfigError(
      f'{path} is a symbolic link out of its folder, to {target}; copy the '
      'file there if it belongs to the model.'
    )
  return path


def check_regular(path: pathlib.Path) -> None:
  """Refuses what is no regular file: a pipe would be waited for.

  Raises:
    ConfigError: if there is none, too.
  """
  if not path.is_file():
    raise config.ConfigError(
      f'{path} cannot be read: it is missing, or no regular file.'
    )


def read_text(path: pathlib.Path) -> str:
  """The text of a file in a folder that was given.

  Raises:
    ConfigError: naming the file, if it is not in its folder (see `member`), not
      a regular file, or not UTF-8.
  """
  check_regular(member(path.parent, path.name))
  try:
    return path.read_text(encoding='utf-8')
  except (OSError, UnicodeDecodeError) as e:
    raise config.ConfigError(f'{path} cannot be read: {e}.') from None


def parse_json(text: str, where: str) -> dict[str, Any]:
  """A JSON object.

  Raises:
    ConfigError: if the text is none, or too deeply nested; `where` names it.
  """
  try:
    value = json.loads(text)
  except (ValueError, RecursionError) as e:
    raise config.ConfigError(f'{where} cannot be read: {e}.') from None
  if not isinstance(value, dict):
    raise config.ConfigError(
      f'{where} cannot be read: it holds a {type(value).__name__}, and must be '
      'a JSON object.'
    )
  depth, level = 0, [value]
  while level and depth <= _MAX_DEPTH:
    depth += 1
    level = [
      x
      for outer in level
      for x in (outer.values() if isinstance(outer, dict) else outer)
      if isinstance(x, (dict, list))
    ]
  if level:
    raise config.ConfigError(
      f'{where} cannot be read: it is nested more than {_MAX_DEPTH} deep.'
    )
  return value


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """The JSON object in a file; see `read_text` and `parse_json`.

  Raises:
    ConfigError: naming the file.
  """
  return parse_json(read_text(path), str(path))


def read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
  """The arrays of an `.npz` file by name.

  Raises:
    ConfigError: if it is missing, truncated, or not such a file; or if it
      would be far larger when unpacked.
  """
  check_regular(path)
  try:
    with zipfile.ZipFile(path) as archive:
      unpacked = sum(info.file_size for info in archive.infolist())
    if unpacked > max(_SMALL, _MAX_RATIO * path.stat().st_size):
      raise ValueError(f'it would be {unpacked:,} bytes when unpacked')
    with np.load(path) as arrays:
      return {name: arrays[name] for name in arrays.files}
  except Exception as e:  # Of zipfile, zlib and numpy: many types.
    raise config.ConfigError(
      f'{path} is truncated or was not written by sleep_jax ({reason(e)}).'
    ) from None
