"""Timing of interleaved runs, shared by all benchmarks."""

from collections.abc import Callable, Mapping
import dataclasses
import statistics
import time
from typing import Any


@dataclasses.dataclass(frozen=True)
class Plan:
  """Settings of a run of the suite.

  Attributes:
    threads: threads of XLA and of torch.
    repeats: timed rounds; in each round every side runs once.
    tiny: minimal shapes, for tests of the benchmarks.
  """

  threads: int = 2
  repeats: int = 7
  tiny: bool = False

  def choose(self, full: Any, tiny: Any) -> Any:
    """`tiny` or `full`, as this plan says."""
    return tiny if self.tiny else full


def spread(seconds: list[float]) -> dict[str, float]:
  """Median, minimum and maximum of the seconds."""
  return {
    'median': statistics.median(seconds),
    'low': min(seconds),
    'high': max(seconds),
    'n': len(seconds),
  }


def interleave(
  sides: Mapping[str, Callable[[], Any]], plan: Plan
) -> dict[str, dict[str, float]]:
  """The `spread` of the seconds of each side.

  The sides run in turn, and the first side rotates from round to round, so that
  other load on the machine affects all sides equally. A side must return only
  when its work is complete; its first call (compilation, allocation) is not
  counted.
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
  """Ratios of the other sides' median seconds to those of `ours`."""
  reference = seconds[ours]['median']
  return {k: v['median'] / reference for k, v in seconds.items() if k != ours}
