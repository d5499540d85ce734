"""SIGTERM, as preemption sends it: finish the save under way, and exit.

A life is saved at the end of every phase, and a phase that is begun anew ends
the same; so there is nothing else to save, and no need to wait for the phase.
"""

from collections.abc import Callable, Iterator
import contextlib
import multiprocessing
from multiprocessing import connection
import os
import signal
import socket
import sys
import threading
import time

EXIT = 143  # 128 + SIGTERM: ended from outside; the same command goes on.
LIMIT = 8.0  # Seconds until we exit, whatever is still under way.

_saves: set[Callable[[], None]] = set()
_begun = threading.Event()


@contextlib.contextmanager
def finishes(save: Callable[[], None]) -> Iterator[None]:
  """Within the block, SIGTERM calls `save` before the process exits."""
  _saves.add(save)
  try:
    yield
  finally:
    _saves.discard(save)


def watch() -> None:
  """Takes SIGTERM over; in a worker process also the end of its parent.

  A thread of its own reacts, because the main one may be deep in a compiled
  program. Call it once, in the main thread.
  """
  inside, outside = socket.socketpair()
  for end in (inside, outside):
    end.setblocking(False)

  def handler(*_) -> None:
    outside.send(bytes([signal.SIGTERM]))

  # The wakeup descriptor is written even while the main thread runs XLA, the
  # handler even while an event loop has borrowed the descriptor.
  signal.signal(signal.SIGTERM, handler)
  signal.set_wakeup_fd(outside.fileno(), warn_on_full_buffer=False)
  threading.Thread(target=_wait, args=(inside,), daemon=True).start()


def block() -> None:
  """Blocks if the process is about to exit: its failures are of no interest."""
  if _begun.wait(0.5):
    threading.Event().wait()


def _wait(inside: socket.socket) -> None:
  parent = multiprocessing.parent_process()
  sources = [inside] + ([parent.sentinel] if parent else [])
  while True:
    ready = connection.wait(sources)
    if inside not in ready:
      break  # The parent is gone; nobody would hear what this worker finds.
    if signal.SIGTERM in inside.recv(64):
      break
  _begun.set()
  _exit()


def _exit() -> None:
  end = time.monotonic() + LIMIT
  late = threading.Timer(LIMIT, os._exit, (EXIT,))
  late.daemon = True
  late.start()
  children = multiprocessing.active_children()
  for child in children:
    child.terminate()
  for save in list(_saves):
    try:
      save()
    except Exception as e:
      print(f'warning: {e}', file=sys.stderr)
  for child in children:
    child.join(max(0.0, end - time.monotonic()))
  print(
    '\nTerminated; every phase that had ended is saved. The same command '
    'goes on from there.',
    file=sys.stderr,
    flush=True,
  )
  sys.stdout.flush()
  os._exit(EXIT)
