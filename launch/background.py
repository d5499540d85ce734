"""A command in the background, which at most one runs in a folder.

  python -m launch.background start FOLDER COMMAND ...
  python -m launch.background stop FOLDER

FOLDER/pid holds the process and its start, and is removed when the command
ends. A process that only has the same number is neither waited for nor ended.
"""

from collections.abc import Sequence
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import psutil

_SAME_START = 2.0  # Seconds; the time of boot is known to a second.


def _running(file: pathlib.Path) -> psutil.Process | None:
  """The process that a file names, if it is still the one that was started."""
  try:
    record = json.loads(file.read_text(encoding='utf-8'))
    process = psutil.Process(record['pid'])
    moved = abs(process.create_time() - record['started'])
  except (OSError, ValueError, TypeError, KeyError, psutil.Error):
    return None
  alive = process.status() != psutil.STATUS_ZOMBIE
  return process if alive and moved < _SAME_START else None


def start(folder: pathlib.Path, argv: Sequence[str]) -> int:
  """Starts the command, detached from the terminal, with FOLDER/log as output.

  Returns:
    The exit status: 1 if one is running in the folder.
  """
  folder.mkdir(parents=True, exist_ok=True)
  file = folder / 'pid'
  if process := _running(file):
    print(f'{folder}: process {process.pid} runs already', file=sys.stderr)
    return 1
  file.unlink(missing_ok=True)
  with open(folder / 'log', 'ab') as log:
    watcher = subprocess.Popen(
      [sys.executable, '-m', 'launch.background', 'watch', str(folder), *argv],
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=subprocess.STDOUT,
      start_new_session=True,
    )
  while watcher.poll() is None and not file.exists():
    time.sleep(0.05)
  return 0


def watch(folder: pathlib.Path, argv: Sequence[str]) -> int:
  """Runs the command, and keeps FOLDER/pid while it runs."""
  file, part = folder / 'pid', folder / f'pid.{os.getpid()}'
  child = subprocess.Popen(argv)
  # The file is removed when the child has ended, and not before.
  signal.signal(signal.SIGTERM, lambda *_: child.terminate())
  record = {
    'pid': child.pid,
    'started': psutil.Process(child.pid).create_time(),
  }
  part.write_text(json.dumps(record), encoding='utf-8')
  part.replace(file)
  try:
    return child.wait()
  finally:
    file.unlink(missing_ok=True)


def stop(folder: pathlib.Path) -> int:
  """Sends SIGTERM to the command that runs in the folder.

  Returns:
    The exit status: 1 if none is running.
  """
  file = folder / 'pid'
  if process := _running(file):
    process.terminate()
    return 0
  file.unlink(missing_ok=True)
  print(f'{folder}: nothing runs', file=sys.stderr)
  return 1


def main(argv: Sequence[str]) -> int:
  """Runs one verb; returns the exit status."""
  verb, folder, *command = argv
  verbs = {
    'start': lambda path: start(path, command),
    'watch': lambda path: watch(path, command),
    'stop': stop,
  }
  return verbs[verb](pathlib.Path(folder))


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
