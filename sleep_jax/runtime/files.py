"""Atomic writes of files, and exclusive locks of folders."""

from collections.abc import Iterator
import contextlib
import fcntl
import os
import pathlib
import time
from typing import BinaryIO
import uuid

from sleep_jax import config

_LOCK_TIMEOUT = 10.0  # Seconds; covers the exit of a killed run's workers.


@contextlib.contextmanager
def atomic(path: pathlib.Path) -> Iterator[BinaryIO]:
  """A new file that takes the name `path` when the block succeeds.

  Readers see the old or the new content, whole. Nothing is left if it fails.
  """
  # A name of its own, and no link is followed: several may write at once.
  part = path.with_name(f'{path.name}.{uuid.uuid4().hex}.part')
  try:
    with part.open('xb') as f:
      yield f
      f.flush()
      os.fsync(f.fileno())
    part.replace(path)
  finally:
    part.unlink(missing_ok=True)


def write(path: pathlib.Path, text: str) -> None:
  """Writes a text file atomically, see `atomic`."""
  with atomic(path) as f:
    f.write(text.encode('utf-8'))


@contextlib.contextmanager
def lock_dir(folder: pathlib.Path) -> Iterator[None]:
  """Locks a folder, which is created if absent, against other processes.

  The lock is released when the block or the process ends.

  Raises:
    ConfigError: if another process still holds the lock after ten seconds, or
      its file is not one of ours.
  """
  deadline = time.monotonic() + _LOCK_TIMEOUT
  while (lock := _try_lock(folder)) is None:
    if time.monotonic() > deadline:
      raise config.ConfigError(
        f'another process is using {folder}; wait for it or end it, or give '
        'another --workdir.'
      )
    time.sleep(0.1)
  try:
    yield
  finally:
    os.close(lock)


def _try_lock(folder: pathlib.Path) -> int | None:
  """The descriptor of the locked file, or None if another process has it."""
  folder.mkdir(parents=True, exist_ok=True)
  path = folder / '.lock'
  try:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
  except FileNotFoundError:  # The folder was just deleted.
    return None
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    # Whoever had the lock may have deleted the folder, and this file with it.
    if os.path.samestat(os.fstat(lock), os.stat(path)):
      return lock
  except (BlockingIOError, FileNotFoundError):
    pass
  except BaseException:
    os.close(lock)
    raise
  os.close(lock)
  return None
