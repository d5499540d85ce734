"""Edit distances of token rows, against rapidfuzz."""

from typing import Any

import jax
import numpy as np

from benchmarks import timing
from sleep_jax.objectives import rewards


def run(plan: timing.Plan) -> list[dict[str, Any]]:
  """1000 pairs of 256 tokens, and of 24 as in seeding."""
  lengths = plan.choose((256, 24), (8,))
  return [_compare(plan, plan.choose(1000, 10), length) for length in lengths]


def _compare(plan: timing.Plan, pairs: int, length: int) -> dict[str, Any]:
  from rapidfuzz import process
  from rapidfuzz.distance import Levenshtein

  rng = np.random.default_rng(0)
  a, noise = rng.integers(0, 500, (2, pairs, length), np.int32)
  b = np.where(rng.random(a.shape) < 0.7, a, noise)
  sizes = np.full(pairs, length, np.int32)
  device = jax.device_put((a, sizes, b, sizes))
  distance = jax.jit(rewards.levenshtein)
  lists = a.tolist(), b.tolist()

  def fuzz(left, right):
    return process.cpdist(
      left, right, scorer=Levenshtein.distance, workers=plan.threads
    )

  sides = {
    'sleep_jax': lambda: np.asarray(distance(*device)),
    'rapidfuzz': lambda: fuzz(*lists),
    # Including the conversion from arrays, as after a rollout.
    'rapidfuzz, from arrays': lambda: fuzz(a.tolist(), b.tolist()),
  }
  if not np.array_equal(sides['sleep_jax'](), sides['rapidfuzz']()):
    raise AssertionError('levenshtein: distances differ from rapidfuzz.')
  seconds = timing.interleave(sides, plan)
  return {
    'bench': 'levenshtein',
    'pairs': pairs,
    'length': length,
    'parity': 'all distances equal',
    'seconds': seconds,
    'speedup': timing.speedup(seconds),
  }
