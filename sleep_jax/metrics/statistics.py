"""sleep_jax.metrics.statistics."""

from collections.abc import Sequence

import numpy as np
from scipy import stats


def interval(values: Sequence[float]) -> tuple[float, float]:
  """Mean and half-width of its 95% t interval; half-width nan for n = 1."""
  x = np.asarray(values, float)
  if len(x) < 2:
    return float(x.mean()), float('nan')
  spread = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5
  return float(x.mean()), float(spread)
