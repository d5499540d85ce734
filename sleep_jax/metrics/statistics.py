"""Statistics over seeds."""

from collections.abc import Sequence

import numpy as np
from scipy import stats


def interval(
  values: Sequence[float] | np.ndarray,
) -> tuple[float, float]:
  """The mean of `values`, and the half-width of its 95% t interval.

  The half-width of a single value is nan.
  """
  x = np.asarray(values, float)
  if len(x) < 2:
    return float(x.mean()), float('nan')
  half_width = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5
  return float(x.mean()), float(half_width)
