"""sleep_jax.data.order."""

import jax
import numpy as np

from sleep_jax import array_typing as at


def numpy_rng(key: at.Key) -> np.random.Generator:
  """A NumPy generator that follows from a JAX key."""
  return np.random.default_rng(np.asarray(jax.random.bits(key, (4,))))


def shuffled(
  facts: np.ndarray, total: int, rng: np.random.Generator
) -> np.ndarray:
  """`total` facts: whole permutations, so that each comes equally often."""
  order = [rng.permutation(len(facts)) for _ in range(-(-total // len(facts)))]
  return facts[np.concatenate(order)[:total]]
