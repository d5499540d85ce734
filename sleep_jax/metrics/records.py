"""Files of a life to which lines of JSON are appended."""

import hashlib
import json
import os
import pathlib
from typing import Any

from sleep_jax import config
from sleep_jax.runtime import files

Mark = dict[str, Any]


class Records:
  """`metrics.jsonl`: one record a night.

  A checkpoint holds a mark in place of the records that precede it, so what a
  night costs does not grow with their number. Lines behind the mark are of
  nights whose checkpoint was lost; they are cut when the life goes on.

  Args:
    path: the file.
    mark: what `mark` returned at the checkpoint that the life goes on from, or
      the records themselves, as earlier checkpoints have them; None for a new
      life.
    quiet: leave the file alone; for all processes but the first.

  Attributes:
    num_before: lines that the file had, with those that were cut.

  Raises:
    ConfigError: if the file is not what it was at the mark.
  """

  def __init__(
    self,
    path: pathlib.Path,
    mark: Mark | list[dict[str, Any]] | None,
    *,
    quiet: bool = False,
  ):
    self._path, self._quiet = path, quiet
    found = path.read_bytes() if path.exists() else b''
    self.num_before = found.count(b'\n')
    kept = _until(path, found, mark)
    if kept != found and not quiet:
      files.write(path, kept.decode())
    self._records = [json.loads(line) for line in kept.splitlines()]
    self._size, self._digest = len(kept), hashlib.sha256(kept)

  def __iter__(self):
    return iter(self._records)

  def append(self, record: dict[str, Any]) -> None:
    """Adds a record; it is on the disk when this returns."""
    line = _line(record)
    self._records.append(record)
    self._size += len(line)
    self._digest.update(line)
    if self._quiet:
      return
    with self._path.open('ab') as f:
      f.write(line)
      f.flush()
      os.fsync(f.fileno())

  def mark(self) -> Mark:
    """Names the records so far, whatever is appended later."""
    return {'bytes': self._size, 'sha256': self._digest.hexdigest()}


def _line(record: dict[str, Any]) -> bytes:
  return (json.dumps(record) + '\n').encode()


def _until(
  path: pathlib.Path, found: bytes, mark: Mark | list[dict[str, Any]] | None
) -> bytes:
  """The part of a file that a mark names."""
  if mark is None:
    return b''
  if isinstance(mark, list):
    return b''.join(map(_line, mark))
  kept = found[: mark['bytes']]
  if hashlib.sha256(kept).hexdigest() != mark['sha256']:
    raise config.ConfigError(
      f'{path} is not what it was when the newest checkpoint was saved. Bring '
      f'it back from a copy, or, to begin again, delete {path.parent} yourself.'
    )
  return kept


class StepLog:
  """`steps.jsonl`: losses every few optimizer steps.

  A phase that is run again has the same steps with the same losses, so those
  that are in the file already are passed over.
  """

  def __init__(self, path: pathlib.Path):
    self._path, self._last = path, 0
    if not path.exists():
      return
    found = path.read_bytes()
    whole = found[: found.rfind(b'\n') + 1]  # A kill may cut the last line.
    if whole != found:
      files.write(path, whole.decode())
    if whole:
      self._last = json.loads(whole.splitlines()[-1])['step']

  def append(self, points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Adds points with a `step`; returns those that are new."""
    points = [p for p in points if p['step'] > self._last]
    if points:
      with self._path.open('ab') as f:
        f.write(b''.join(map(_line, points)))
      self._last = points[-1]['step']
    return points
