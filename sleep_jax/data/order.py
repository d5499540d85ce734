"""Random orders of rows."""

import jax
import numpy as np

from sleep_jax import array_typing as at


def numpy_rng(key: at.Key) -> np.random.Generator:
  """A NumPy generator seeded by a JAX key."""
  return np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))


def shuffled(
  rows: np.ndarray, total: int, rng: np.random.Generator
) -> np.ndarray:
  """`total` of the rows `[N, ...]`: whole permutations, the last one cut.

  Counts of two rows differ by at most one.
  """
  order = [rng.permutation(len(rows)) for _ in range(-(-total // len(rows)))]
  return rows[np.concatenate(order)[:total]]
