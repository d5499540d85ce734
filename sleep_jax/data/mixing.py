"""Batches of a day's rows with rows of another kind beside them."""

from collections.abc import Iterator

import numpy as np

Rows = tuple[np.ndarray, np.ndarray]  # Tokens and weights, [N, T] each.


class Beside:
  """Rows that stand beside those of the day, `count` in every batch.

  Each comes once in every round, in an order of its own, endlessly.
  """

  def __init__(self, rows: Rows, count: int, rng: np.random.Generator):
    self._rows, self._count = rows, count
    self._order = _endless(len(rows[0]), rng)

  def batches(self, day: Rows, batch: int, pad: int) -> Rows:
    """Batches of rows of the day, then of these; the last may lack rows.

    Args:
      day: its rows.
      batch: rows of a batch, more than `count`.
      pad: the token that fills up rows.

    Returns:
      Rows `[N, T]`, T that of the longer kind.
    """
    per_batch = batch - self._count
    length = max(day[0].shape[1], self._rows[0].shape[1])
    batches = []
    for start in range(0, len(day[0]), per_batch):
      drawn = [next(self._order) for _ in range(self._count)]
      batches.append(
        [
          np.concatenate(
            [
              _widen(x[start : start + per_batch], length, per_batch, fill),
              _widen(other[drawn], length, self._count, fill),
            ]
          )
          for x, other, fill in zip(day, self._rows, (pad, 0.0), strict=True)
        ]
      )
    tokens, weight = (np.concatenate(x) for x in zip(*batches, strict=True))
    return tokens, weight


def _endless(rows: int, rng: np.random.Generator) -> Iterator[int]:
  while True:
    yield from rng.permutation(rows).tolist()


def _widen(
  array: np.ndarray, length: int, rows: int, fill: float
) -> np.ndarray:
  """`array` `[n, t]` filled up to `[rows, length]`."""
  extra = ((0, rows - array.shape[0]), (0, length - array.shape[1]))
  return np.pad(array, extra, constant_values=fill)
