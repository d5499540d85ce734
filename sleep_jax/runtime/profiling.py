"""A window of a life under JAX's profiler, readable by xprof."""

import pathlib

import jax

from sleep_jax import config


class Window:
  """Traces from optimizer step `first` to `last`.

  A compiled program may hold many steps, so the window opens before the first
  program that begins at or after `first` and closes after the one that reaches
  `last`.

  Args:
    steps: `first:last`, such as `10:15`; empty for none.
    folder: where the trace goes; point xprof or TensorBoard at it.

  Raises:
    ConfigError: if `steps` is no such pair.
  """

  def __init__(self, steps: str, folder: pathlib.Path):
    self._folder, self._open = folder, False
    self._first = self._last = None
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
    """Tells that `step` optimizer steps were made so far."""
    if self._last is None:
      return
    if self._open and step >= self._last:
      self.close()
    elif not self._open and self._first <= step < self._last:
      jax.profiler.start_trace(str(self._folder))
      self._open = True

  def close(self) -> None:
    """Ends the trace; it is not opened again."""
    if self._open:
      jax.profiler.stop_trace()
      self._open, self._last = False, None
