"""Atomic writes of text files, and exclusive locks of folders."""

from collections.abc import Iterator
import contextlib
import fcntl
import os
import pathlib
import time
import uuid

from sleep_jax import config

_LOCK_TIMEOUT = 10.0  # Seconds; covers the exit of a killed run's workers.


def write(path: pathlib.Path, text: str) -> None:
  """Writes a text file atomically: readers see the old or the new content."""
  # A name of its own, and no link is followed: several may write at once.
  part = path.with_name(f'{path.name}.{uuid.uuid4().hex}.part')
  try:
    with part.open('x', encoding='utf-8') as f:
      f.write(text)
      f.flush()
      os.fsync(f.fileno())
    part.replace(path)
  finally:
    part.unlink(missing_ok=True)


@contextlib.contextmanager
def lock_dir(folder: pathlib.Path) -> Iterator[None]:
  """Locks a folder, which is created if absent, against other processes.

  The lock is released when the block or the process ends.

  Raises:
    ConfigError: if another process still holds the lock after ten seconds.
  """
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / '.lock').open('w') as f:
    deadline = time.monotonic() + _LOCK_TIMEOUT
    while True:
      try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
      except BlockingIOError as e:
        if time.monotonic() > deadline:
          raise config.ConfigError(
            f'another process is using {folder}; wait for it or end it, or '
            'give another --workdir.'
          ) from e
        time.sleep(0.1)
    yield
