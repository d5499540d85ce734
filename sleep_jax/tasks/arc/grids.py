"""Grids of colours, puzzles of the ARC kind, and how to make more of one.

A grid is a small integer array `[H, W]` of colours 0..9. A puzzle shows pairs
of grids under one hidden rule, and asks for the output of further inputs.
"""

from collections.abc import Callable, Iterable, Iterator
import dataclasses
import itertools

import numpy as np

from sleep_jax import config

COLOURS = 10
LARGEST = 30  # Rows or columns; ARC's own limit.
_NEXT_ROW = '/'


@dataclasses.dataclass(frozen=True)
class Pair:
  """A grid before and after the rule."""

  input: np.ndarray
  output: np.ndarray

  def map(self, change: Callable[[np.ndarray], np.ndarray]) -> 'Pair':
    """The pair with both grids changed alike."""
    return Pair(change(self.input), change(self.output))


def pair(before: list[list[int]], after: list[list[int]]) -> Pair:
  """A pair from nested lists."""
  return Pair(np.array(before, int), np.array(after, int))


@dataclasses.dataclass(frozen=True)
class Puzzle:
  """Pairs that show a rule, and pairs that ask for it."""

  name: str
  train_pairs: tuple[Pair, ...]
  test_pairs: tuple[Pair, ...]


def text(grid: np.ndarray) -> str:
  """Colours as words, rows apart by a slash: `1 2 / 3 4`."""
  return f' {_NEXT_ROW} '.join(' '.join(map(str, row)) for row in grid.tolist())


def parse(words: str) -> np.ndarray | None:
  """The grid that `text` wrote; None if it is none."""
  rows = [row.split() for row in words.split(_NEXT_ROW)]
  known = {str(c) for c in range(COLOURS)}
  if len({len(row) for row in rows}) > 1 or not rows[0]:
    return None
  if not known.issuperset(itertools.chain(*rows)):
    return None
  return np.array(rows, int)


def double(grid: np.ndarray) -> np.ndarray:
  """Every cell as 2 x 2 cells."""
  return grid.repeat(2, axis=0).repeat(2, axis=1)


def _then(*changes):
  def change(grid: np.ndarray) -> np.ndarray:
    for one in changes:
      grid = one(grid)
    return grid

  return change


_TURNS = {
  'rotate_90': np.rot90,
  'rotate_180': lambda g: np.rot90(g, 2),
  'rotate_270': lambda g: np.rot90(g, 3),
  'flip_rows': np.flipud,
  'flip_columns': np.fliplr,
  'transpose': np.transpose,
}
# SEAL's four families of augmentations; a member changes every grid alike.
AUGMENTATIONS = {
  'basic': _TURNS,
  'size': {
    'double': double,
    'double_height': lambda g: g.repeat(2, axis=0),
    'double_width': lambda g: g.repeat(2, axis=1),
  },
  'chain': {f'{k}_double': _then(f, double) for k, f in _TURNS.items()},
  'repeat': {
    'repeat_down': lambda g: np.tile(g, (2, 1)),
    'repeat_right': lambda g: np.tile(g, (1, 2)),
    'repeat_both': lambda g: np.tile(g, (2, 2)),
  },
}


def leave_out(pairs: tuple[Pair, ...], left: int) -> Iterator[tuple[Pair, ...]]:
  """Pseudo-tasks of a puzzle: each pair once as the last one, the question.

  Before it stand the others, in order, but for `left - 1` of them: 1 is
  leave-one-out, 2 is leave-two-out, in all ways there are.
  """
  for i, last in enumerate(pairs):
    others = pairs[:i] + pairs[i + 1 :]
    if left <= len(others):
      for kept in itertools.combinations(others, len(others) - left + 1):
        yield *kept, last


def augmented(
  pairs: tuple[Pair, ...], families: Iterable[str]
) -> Iterator[tuple[Pair, ...]]:
  """The pseudo-task itself, then changed by each member of the families.

  A change after which a grid is larger than ARC's may be is left out.
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
  """The colours permuted, and the order of what comes before the question."""
  colour = rng.permutation(COLOURS)
  order = [*rng.permutation(len(pairs) - 1), len(pairs) - 1]
  return tuple(pairs[i].map(lambda g: colour[g]) for i in order)
