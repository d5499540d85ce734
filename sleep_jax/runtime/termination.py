"""Handling of SIGTERM, as sent on preemption, and of Ctrl-C: save, then exit.

A life is saved at the end of every phase, and a phase that is run again gives
the same bits, so an unfinished phase is neither awaited nor saved.
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

EXIT_CODE = 143  # 128 + SIGTERM; the same command resumes the run.
EXIT_TIMEOUT = 8.0  # Seconds until the process exits in any case.

_callbacks: set[Callable[[], None]] = set()
_exiting = threading.Event()
_senders: dict[int, socket.socket] = {}  # To a process's thread, by its id.


@contextlib.contextmanager
def call_on_exit(callback: Callable[[], None]) -> Iterator[None]:
  """Within the block, a signal calls `callback` before the process exits."""
  _callbacks.add(callback)
  try:
    yield
  finally:
    _callbacks.discard(callback)


def install_handler() -> None:
  """Handles SIGTERM, Ctrl-C and, in a worker process, the end of its parent.

  The handling runs in a thread, because the main thread may be executing a
  compiled program. Call it in the main thread, and again after a library that
  has replaced it.
  """
  sender = _senders.get(os.getpid())
  if sender is None:
    receiver, sender = socket.socketpair()
    for end in (receiver, sender):
      end.setblocking(False)
    threading.Thread(target=_wait, args=(receiver,), daemon=True).start()
    _senders[os.getpid()] = sender

  def handler(number: int, _) -> None:
    with contextlib.suppress(BlockingIOError):  # Nobody reads after the first.
      sender.send(bytes([number]))

  # The wakeup descriptor is written even while the main thread runs XLA; the
  # handler is called even while an event loop has replaced the descriptor.
  signal.signal(signal.SIGTERM, handler)
  # A Ctrl-C reaches all processes of a terminal; workers hear from the first.
  in_worker = multiprocessing.parent_process() is not None
  signal.signal(signal.SIGINT, signal.SIG_IGN if in_worker else handler)
  signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)


def block() -> None:
  """Blocks forever if the process is exiting, so that no error is reported."""
  if _exiting.wait(0.5):
    threading.Event().wait()


def _wait(receiver: socket.socket) -> None:
  parent = multiprocessing.parent_process()
  sources = [receiver] + ([parent.sentinel] if parent else [])
  code = 0
  while not code:
    if receiver not in connection.wait(sources):
      code = EXIT_CODE  # The parent has ended; nothing reads the results.
      break
    received = receiver.recv(64)
    for number in (signal.SIGTERM, signal.SIGINT):
      code = 128 + number if number in received else code
  _exiting.set()
  _exit(code)


def _exit(code: int) -> None:
  deadline = time.monotonic() + EXIT_TIMEOUT
  timer = threading.Timer(EXIT_TIMEOUT, os._exit, (code,))
  timer.daemon = True
  timer.start()
  children = multiprocessing.active_children()
  for child in children:
    child.terminate()
  for callback in list(_callbacks):
    try:
      callback()
    except Exception as e:
      print(f'warning: {e}', file=sys.stderr)
  for child in children:
    child.join(max(0.0, deadline - time.monotonic()))
  print(
    '\nTerminated; every completed phase is saved. The same command resumes '
    'from there.',
    file=sys.stderr,
    flush=True,
  )
  sys.stdout.flush()
  os._exit(code)
