"""The puzzles of SEAL's few-shot experiment, from ARC-AGI-1 (Apache-2.0)."""

import numpy as np

from sleep_jax.data import datasets
from sleep_jax.tasks.arc import grids

# Of 10 test puzzles in the files, the 8 in SEAL's `final_results.json` are put
# first, so that the first 8 are the paper's. Of 12 training puzzles the paper
# used 11; which one it left out is not published.
_LAST = ('358ba94e', 'af24b4cc')


def load(split: str, folder: str) -> list[grids.Puzzle]:
  """The 12 puzzles of split `train` or the 10 of `test`, in order of their id.

  Raises:
    DataError: if a file is absent or altered.
  """
  pairs: dict[str, dict[str, list[grids.Pair]]] = {}
  for record in datasets.load('seal_arc', split, folder):
    parts = pairs.setdefault(record['puzzle'], {'train': [], 'test': []})
    # Copies: the records are shared.
    pair = grids.Pair(np.array(record['input']), np.array(record['output']))
    parts[record['part']].append(pair)
  return [
    grids.Puzzle(name, tuple(parts['train']), tuple(parts['test']))
    for name, parts in sorted(
      pairs.items(), key=lambda item: (item[0] in _LAST, item[0])
    )
  ]
