"""Traces a range of optimizer steps with JAX's profiler, for xprof."""

import pathlib

import jax

from sleep_jax import config


class Window:
  """Traces from optimizer step `first` to `last`.

  A compiled program may hold many steps, so the trace starts before the first
  program that begins at or after `first`, and stops after the program that
  reaches `last`.

  Args:
    steps: `first:last`, such as `10:15`; empty for no trace.
    folder: output directory, to be opened with xprof or TensorBoard.

  Raises:
    ConfigError: if `steps` is not such a pair.
  """

  def __init__(self, steps: str, folder: pathlib.Path):
    self._folder, self._open = folder, False
    self._first, self._last = 0, -1  # No trace.
    if not steps:
      return
    first, colon, last = steps.partition(':')
    if not (colon and first.isdigit() and last.isdigit()) or (
      int(first) >= int(last)
    ):
      raise config.ConfigError(
        f'profile.steps={steps!r} must be two step numbers, the first below '
        'the second, such as 10:15.'
      )
    self._first, self._last = int(first), int(last)

  def at(self, step: int) -> None:
    """Starts or stops the trace, given that `step` steps have been made."""
    if self._open and step >= self._last:
      self.close()
    elif not self._open and self._first <= step < self._last:
      jax.profiler.start_trace(str(self._folder))
      self._open = True

  def close(self) -> None:
    """Stops the trace if it is running; it is not started again."""
    if self._open:
      jax.profiler.stop_trace()
      self._open, self._last = False, -1
