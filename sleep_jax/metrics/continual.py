"""sleep_jax.metrics.continual."""

import numpy as np


def backward_transfer(matrix: list[list[float]]) -> dict[str, float]:
  """Transfer and forgetting of the recall matrix `matrix[night][episode]`.

  backward_transfer: mean over earlier episodes of final minus just-learned
  score (Lopez-Paz and Ranzato 2017); forgetting: of best-ever minus final.
  """
  last = matrix[-1]
  if len(last) < 2:
    return {'backward_transfer': 0.0, 'forgetting': 0.0}
  earlier = range(len(last) - 1)
  learned = np.mean([last[e] - matrix[e][e] for e in earlier])
  best = [max(row[e] for row in matrix[e:]) for e in earlier]
  return {
    'backward_transfer': float(learned),
    'forgetting': float(np.mean([best[e] - last[e] for e in earlier])),
  }
