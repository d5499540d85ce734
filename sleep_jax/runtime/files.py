"""Small files that are never half written, and folders with one owner."""

from collections.abc import Iterator
import contextlib
import fcntl
import os
import pathlib
import time

from sleep_jax import config

_PATIENCE = 10.0  # Seconds; workers of a killed run end within a moment.


def write(path: pathlib.Path, text: str) -> None:
  """Writes a text file; whoever reads it sees all of it, or the one before."""
  part = path.with_name(f'{path.name}.part')
  with part.open('w', encoding='utf-8') as f:
    f.write(text)
    f.flush()
    os.fsync(f.fileno())
  part.replace(path)


@contextlib.contextmanager
def lock_dir(folder: pathlib.Path) -> Iterator[None]:
  """Keeps other processes out of a folder; the lock dies with its process.

  Raises:
    ConfigError: if another process still owns it after ten seconds.
  """
  folder.mkdir(parents=True, exist_ok=True)
  with (folder / '.lock').open('w') as f:
    end = time.monotonic() + _PATIENCE
    while True:
      try:
        fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        break
      except BlockingIOError as e:
        if time.monotonic() > end:
          raise config.ConfigError(
            f'another process is at work in {folder}; wait for it or end it, '
            'or give another --workdir.'
          ) from e
        time.sleep(0.1)
    yield
