"""Grids of colours, puzzles of the ARC kind, and their augmentations.

A grid is a small integer array `[H, W]` of colours 0..9. A puzzle has pairs of
grids under one rule, which is not given, and inputs whose output is to be
predicted.
"""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import itertools

import numpy as np

from sleep_jax import config

COLOURS = 10
LARGEST = 30  # Rows or columns; ARC's own limit.
_NEXT_ROW = '/'

Change = Callable[[np.ndarray], np.ndarray]  # Of a grid.


@dataclasses.dataclass(frozen=True)
class Pair:
  """A grid before and after the rule."""

  input: np.ndarray
  output: np.ndarray

  def map(self, change: Change) -> 'Pair':
    """The pair with the same change of both grids."""
    return Pair(change(self.input), change(self.output))


@dataclasses.dataclass(frozen=True)
class Puzzle:
  """Training pairs, and test pairs, whose outputs are to be predicted."""

  name: str
  train_pairs: tuple[Pair, ...]
  test_pairs: tuple[Pair, ...]


def text(grid: np.ndarray) -> str:
  """Colours as words, rows separated by a slash: `1 2 / 3 4`."""
  return f' {_NEXT_ROW} '.join(' '.join(map(str, row)) for row in grid.tolist())


def parse(words: str) -> np.ndarray | None:
  """The inverse of `text`; None for words that are no grid."""
  rows = [row.split() for row in words.split(_NEXT_ROW)]
  colours = {str(c) for c in range(COLOURS)}
  if len({len(row) for row in rows}) > 1 or not rows[0]:
    return None
  if not colours.issuperset(itertools.chain(*rows)):
    return None
  return np.array(rows, int)


def double(grid: np.ndarray) -> np.ndarray:
  """Each cell as 2 x 2 cells."""
  return grid.repeat(2, axis=0).repeat(2, axis=1)


def _compose(*changes: Change) -> Change:
  def change(grid: np.ndarray) -> np.ndarray:
    for step in changes:
      grid = step(grid)
    return grid

  return change


_SYMMETRIES: dict[str, Change] = {
  'rotate_90': np.rot90,
  'rotate_180': lambda g: np.rot90(g, 2),
  'rotate_270': lambda g: np.rot90(g, 3),
  'flip_rows': np.flipud,
  'flip_columns': np.fliplr,
  'transpose': np.transpose,
}
# SEAL's four families of augmentations; a member applies to all grids.
AUGMENTATIONS: dict[str, dict[str, Change]] = {
  'basic': _SYMMETRIES,
  'size': {
    'double': double,
    'double_height': lambda g: g.repeat(2, axis=0),
    'double_width': lambda g: g.repeat(2, axis=1),
  },
  'chain': {f'{k}_double': _compose(f, double) for k, f in _SYMMETRIES.items()},
  'repeat': {
    'repeat_down': lambda g: np.tile(g, (2, 1)),
    'repeat_right': lambda g: np.tile(g, (1, 2)),
    'repeat_both': lambda g: np.tile(g, (2, 2)),
  },
}


def leave_out(pairs: tuple[Pair, ...], left: int) -> Iterator[tuple[Pair, ...]]:
  """Pseudo-tasks of a puzzle: each pair is the last one, the test, in turn.

  The others precede it, in order, without `left - 1` of them, in all
  combinations: 1 is leave-one-out, 2 is leave-two-out.
  """
  for i, last in enumerate(pairs):
    others = pairs[:i] + pairs[i + 1 :]
    if left <= len(others):
      for subset in itertools.combinations(others, len(others) - left + 1):
        yield *subset, last


def augmented(
  pairs: tuple[Pair, ...], families: Iterable[str]
) -> Iterator[tuple[Pair, ...]]:
  """The pseudo-task, then changed by each member of the families.

  A change is left out if a grid exceeds ARC's largest size.
  """
  yield pairs
  for family in families:
    members = config.lookup(family, AUGMENTATIONS, 'augmentations')
    for change in members.values():
      changed = tuple(pair.map(change) for pair in pairs)
      sides = (max(*p.input.shape, *p.output.shape) for p in changed)
      if max(sides) <= LARGEST:
        yield changed


def permuted(
  pairs: tuple[Pair, ...], rng: np.random.Generator
) -> tuple[Pair, ...]:
  """With permuted colours, and permuted pairs before the last."""
  colour = rng.permutation(COLOURS)
  order = [*rng.permutation(len(pairs) - 1), len(pairs) - 1]
  return tuple(pairs[i].map(lambda g: colour[g]) for i in order)
