"""Goodput: the share of wall time spent on useful work, and the other shares.

Useful work is every phase of a life except evaluation: wake, rollouts,
teacher passes, updates, rewards and trials, without their compilation.
"""

from collections import defaultdict
from collections.abc import Iterator
import contextlib
import time
from typing import Any

import jax

_COMPILE_EVENT = '/jax/core/compile/backend_compile_duration'
# Seconds of compilation in this process. JAX never removes a listener, so there
# is one for all lives.
_compile_time: defaultdict[str, float] = defaultdict(float)


def _listen(event: str, duration_secs: float, **_: Any) -> None:
  if event == _COMPILE_EVENT:
    _compile_time['seconds'] += duration_secs


jax.monitoring.register_event_duration_secs_listener(_listen)


class Goodput:
  """Goodput of one life, from the construction of this object on."""

  def __init__(self):
    self._start = time.perf_counter()
    self._compile_start = _compile_time['seconds']
    self._lost: defaultdict[str, float] = defaultdict(float)

  @contextlib.contextmanager
  def lost_to(self, cause: str) -> Iterator[None]:
    """Counts the block's seconds as lost to `cause`."""
    start = time.perf_counter()
    try:
      yield
    finally:
      self._lost[cause] += time.perf_counter() - start

  def report(self, phases: dict[str, float]) -> dict[str, float]:
    """Shares of wall time.

    Args:
      phases: seconds of this process by phase, including compilation.

    Returns:
      `goodput`, and `lost_CAUSE` for compile, eval, the causes given to
      `lost_to`, and other; they add up to 1.
    """
    wall = time.perf_counter() - self._start
    lost = dict(self._lost) | {'eval': phases.get('eval', 0.0)}
    # Compilation is subtracted from the other phases: its share within an
    # evaluation is unknown, and the time of an evaluation is lost either way.
    phase_time = sum(s for phase, s in phases.items() if phase != 'eval')
    compile_time = _compile_time['seconds'] - self._compile_start
    lost['compile'] = min(compile_time, phase_time)
    useful = phase_time - lost['compile']
    lost['other'] = max(wall - useful - sum(lost.values()), 0.0)
    total = useful + sum(lost.values())
    shares = {f'lost_{cause}': s / total for cause, s in lost.items()}
    return {'goodput': useful / total} | shares
