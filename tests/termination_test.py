"""Signals end a run once, with what was saved, one message and a code."""

import os
import pathlib
import shutil
import signal
import subprocess
import sys

import pytest

# What a run does, as far as signals see it: a save that takes a while.
_RUN = """
import time
from sleep_jax.runtime import termination

def save():
  print('saving', flush=True)
  time.sleep(1)
  print('saved', flush=True)

termination.install_handler()
with termination.call_on_exit(save):
  print('running', flush=True)
  time.sleep(60)
"""


@pytest.mark.parametrize(
  'signals, code',
  [
    ([signal.SIGTERM], 143),
    ([signal.SIGTERM, signal.SIGTERM], 143),
    ([signal.SIGINT], 130),
    ([signal.SIGINT, signal.SIGINT, signal.SIGTERM], 130),
  ],
  ids=['term', 'term twice', 'int', 'int twice, term'],
)
def test_a_signal_ends_a_run_once_and_with_one_message(signals, code):
  process = subprocess.Popen(
    [sys.executable, '-c', _RUN],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout is not None
  assert process.stdout.readline() == 'running\n'
  process.send_signal(signals[0])
  assert process.stdout.readline() == 'saving\n'
  for number in signals[1:]:
    process.send_signal(number)
  out, err = process.communicate(timeout=120)
  assert (process.returncode, out) == (code, 'saved\n')
  assert err.count('The same command resumes') == 1
  assert 'Traceback' not in err


def test_a_handler_that_was_replaced_is_installed_again():
  """As by a library that listens for SIGTERM itself."""
  again = (
    'termination.install_handler()\n'
    'import signal\n'
    'signal.signal(signal.SIGTERM, signal.SIG_IGN)\n'
    'termination.install_handler()\n'
  )
  code = _RUN.replace('termination.install_handler()\n', again)
  assert _ended(_started([sys.executable, '-c', code])) == 143


@pytest.mark.skipif(
  subprocess.run(
    ['unshare', '--pid', '--fork', 'true'], capture_output=True, check=False
  ).returncode
  != 0
  if shutil.which('unshare')
  else True,
  reason='no namespaces of processes',
)
def test_sigterm_reaches_process_1():
  """Of a container: to it the kernel gives handled signals alone."""
  command = ['unshare', '--pid', '--fork', '--kill-child', sys.executable]
  outer = _started([*command, '-c', _RUN])
  [first] = pathlib.Path(
    f'/proc/{outer.pid}/task/{outer.pid}/children'
  ).read_text().split()  # fmt: skip
  assert _ended(outer, int(first)) == 143


def _started(command: list[str]) -> subprocess.Popen:
  process = subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
  )
  assert process.stdout is not None
  assert process.stdout.readline() == 'running\n'
  return process


def _ended(process: subprocess.Popen, pid: int = 0) -> int:
  """The exit code of a run after one SIGTERM."""
  os.kill(pid or process.pid, signal.SIGTERM)
  out, err = process.communicate(timeout=120)
  assert out == 'saving\nsaved\n' and 'Traceback' not in err
  return process.returncode


def test_a_ctrl_c_is_left_to_the_parent_of_a_worker():
  """The terminal sends it to both; the parent then ends its worker."""
  code = f"""
import multiprocessing

def work(queue):
  queue.put('ready')
  exec({_RUN.replace('install_handler()', 'install_handler(); queue.put(1)')!r},
       {{'queue': queue}})

if __name__ == '__main__':
  context = multiprocessing.get_context('fork')
  queue = context.Queue()
  worker = context.Process(target=work, args=(queue,))
  worker.start()
  assert queue.get() == 'ready' and queue.get() == 1
  from sleep_jax.runtime import termination
  termination.install_handler()
  print('ready', flush=True)
  worker.join()
  termination.block()  # As `workers.live_all` does.
"""
  process = subprocess.Popen(
    [sys.executable, '-c', code],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    start_new_session=True,
  )
  assert process.stdout is not None
  while process.stdout.readline() != 'ready\n':
    assert process.poll() is None
  os.killpg(process.pid, signal.SIGINT)
  out, err = process.communicate(timeout=120)
  assert process.returncode == 130 and out.count('saved') == 1
  assert 'Traceback' not in err and 'KeyboardInterrupt' not in err
