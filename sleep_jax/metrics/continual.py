"""Metrics of continual learning, computed from the accuracy matrix."""

import numpy as np


def backward_transfer(matrix: list[list[float]]) -> dict[str, float]:
  """Backward transfer and forgetting of the scores `matrix[night][episode]`.

  Args:
    matrix: row n holds the scores of episodes 0..n after night n.

  Returns:
    `backward_transfer`: the mean over all but the last episode of the final
    score minus the score after the episode's own night (Lopez-Paz and Ranzato
    2017); `forgetting`: the mean of the best score minus the final score.
  """
  final = matrix[-1]
  if len(final) < 2:
    return {'backward_transfer': 0.0, 'forgetting': 0.0}
  earlier = range(len(final) - 1)
  transfer = np.mean([final[e] - matrix[e][e] for e in earlier])
  best = [max(row[e] for row in matrix[e:]) for e in earlier]
  return {
    'backward_transfer': float(transfer),
    'forgetting': float(np.mean([best[e] - final[e] for e in earlier])),
  }
