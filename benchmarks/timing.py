"""How everything here is measured."""

from collections.abc import Callable, Mapping
import dataclasses
import statistics
import time
from typing import Any


@dataclasses.dataclass(frozen=True)
class Plan:
  """How thoroughly a bench runs.

  threads: for XLA and for torch alike.
  repeats: timed rounds; in each, every side runs once.
  tiny: shapes that only show that the bench runs.
  """

  threads: int = 2
  repeats: int = 7
  tiny: bool = False

  def choose(self, full: Any, tiny: Any) -> Any:
    """Shapes of this plan's size."""
    return tiny if self.tiny else full


def spread(seconds: list[float]) -> dict[str, float]:
  """Median and range."""
  return {
    'median': statistics.median(seconds),
    'low': min(seconds),
    'high': max(seconds),
    'n': len(seconds),
  }


def interleave(
  sides: Mapping[str, Callable[[], Any]], plan: Plan
) -> dict[str, dict[str, float]]:
  """Seconds of each side, its `spread`.

  The sides take turns, and who begins changes from round to round, so that
  what else the machine does hits all alike. A side returns when it is done; its
  first call (compilation, allocation) is not counted.
  """
  for side in sides.values():
    side()
  names = list(sides)
  seconds = {name: [] for name in names}
  for i in range(plan.repeats):
    first = i % len(names)
    for name in names[first:] + names[:first]:
      start = time.perf_counter()
      sides[name]()
      seconds[name].append(time.perf_counter() - start)
  return {name: spread(s) for name, s in seconds.items()}


def speedup(
  seconds: Mapping[str, Mapping[str, float]], ours: str = 'sleep_jax'
) -> dict[str, float]:
  """How many times as fast as each other side we are, by medians."""
  mine = seconds[ours]['median']
  return {k: v['median'] / mine for k, v in seconds.items() if k != ours}
