"""Goodput: useful time over wall time, and what the rest went to.

Useful is what a life is for: reading, dreaming, teaching, training, trials.
"""

from collections import Counter
from collections.abc import Iterator
import contextlib
import time

import jax

_COMPILED = '/jax/core/compile/backend_compile_duration'
_compiling = Counter()  # Seconds of this process; JAX keeps its listeners.


def _listen(name: str, seconds: float, **_) -> None:
  if name == _COMPILED:
    _compiling['seconds'] += seconds


jax.monitoring.register_event_duration_secs_listener(_listen)


class Goodput:
  """Of one life, from now on."""

  def __init__(self):
    self._start = time.perf_counter()
    self._compiled = _compiling['seconds']
    self._lost = Counter()

  @contextlib.contextmanager
  def losing(self, cause: str) -> Iterator[None]:
    """Counts the block's seconds as lost to `cause`."""
    start = time.perf_counter()
    try:
      yield
    finally:
      self._lost[cause] += time.perf_counter() - start

  def report(self, phases: dict[str, float]) -> dict[str, float]:
    """Shares of wall time.

    Args:
      phases: seconds of this process by phase, compilation within them.

    Returns:
      `goodput`, and the shares lost to `compile`, `exam`, the causes given to
      `losing`, and `other`; they add up to 1.
    """
    wall = time.perf_counter() - self._start
    lost = dict(self._lost) | {'eval': phases.get('eval', 0.0)}
    # Most of compilation is inside a phase; none can be told from the clock of
    # an exam, which is lost anyway.
    worked = sum(s for phase, s in phases.items() if phase != 'eval')
    lost['compile'] = min(_compiling['seconds'] - self._compiled, worked)
    useful = worked - lost['compile']
    lost['other'] = max(wall - useful - sum(lost.values()), 0.0)
    whole = useful + sum(lost.values())
    shares = {f'lost_{cause}': s / whole for cause, s in lost.items()}
    return {'goodput': useful / whole} | shares
