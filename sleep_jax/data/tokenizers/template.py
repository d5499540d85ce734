"""Chat templates, rendered within limits of time and memory.

See `template_worker`: the process that renders is started for the first
template, serves all of them, and is replaced when one has made it end.
"""

import atexit
import json
import os
import pathlib
import signal
import subprocess
import sys
import threading
from typing import Any

from sleep_jax import config

_WORKER = pathlib.Path(__file__).with_name('template_worker.py')


class _Renderer:
  """The worker of this process."""

  def __init__(self):
    self._lock = threading.Lock()
    self._worker: subprocess.Popen | None = None
    self._owner = 0  # Not that of a process that was forked from this one.

  def render(self, template: str, variables: dict[str, Any]) -> str:
    request = json.dumps([template, variables]) + '\n'
    with self._lock:
      try:
        line = self._ask(request)
      except BaseException:
        self.close()  # Its answer would be taken for that of the next.
        raise
    answer = json.loads(line)
    if 'error' in answer:
      raise config.ConfigError(answer['error'])
    return answer['text']

  def _ask(self, request: str) -> str:
    if self._worker is None or self._owner != os.getpid():
      # -P: the modules beside the worker must not hide those of Python. Apart
      # from this session, it does not see a Ctrl-C.
      self._worker = subprocess.Popen(
        [sys.executable, '-P', str(_WORKER)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        encoding='utf-8',
        start_new_session=True,
      )
      self._owner = os.getpid()
    stdin, stdout = self._worker.stdin, self._worker.stdout
    assert stdin is not None and stdout is not None
    line = ''
    try:
      stdin.write(request)
      stdin.flush()
      line = stdout.readline()
    except BrokenPipeError:
      pass
    if not line.endswith('\n'):
      code = self._worker.wait()
      raise config.ConfigError(
        'it takes too long'
        if code == -signal.SIGPROF
        else f'the process that renders it ended with code {code}'
      )
    return line

  def close(self) -> None:
    """Ends the worker."""
    worker, self._worker = self._worker, None
    if worker is not None and self._owner == os.getpid():
      worker.kill()
      worker.communicate()


_renderer = _Renderer()
atexit.register(_renderer.close)


def render(template: str, variables: dict[str, Any]) -> str:
  """The text of a Jinja template.

  Args:
    template: its source; it may be hostile.
    variables: JSON values by name.

  Raises:
    ConfigError: if it cannot be rendered, or not within the limits of
      `template_worker`.
  """
  return _renderer.render(template, variables)
