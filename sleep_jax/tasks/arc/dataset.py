"""The puzzles of SEAL's few-shot experiment, from ARC-AGI-1 (Apache-2.0)."""

import json

from sleep_jax.data.datasets import download
from sleep_jax.tasks.arc import grids

_ORIGIN = (
  'https://raw.githubusercontent.com/Continual-Intelligence/SEAL/'
  '4cb1e7d4350c62403daee8c6723e6184886cb304/few-shot/data/'
)
_SPLITS = {
  'train': (
    'training',
    'filtered_1B_training_set.json',
    'e130bc1ee1cdcbf9ae7b802cf92c5e82fe0899227f9376630fdb1e8271ddacfd',
    '7ebeeb1ec8fe36d7ff90fbec9fe11d0eb93f02473158b8da5141fb9c44f6288f',
  ),
  'test': (
    'evaluation',
    'filtered_1B_eval_set.json',
    '0bdb42fdfb81b774cb65adc5b950c98878b795f8033f1c1086255107ef7d191a',
    'd66348ad7a938d27ff6dbc36ae9d4d571bea2da63b3d96e93e9953cfa2fda983',
  ),
}
# Of 10 test puzzles in the files, the 8 in SEAL's `final_results.json` are put
# first, so that the first 8 are the paper's. Of 12 training puzzles the paper
# used 11; which one it left out is not published.
_LAST = ('358ba94e', 'af24b4cc')


def load(split: str, folder: str) -> list[grids.Puzzle]:
  """The 12 puzzles of split `train` or the 10 of `test`, in order of their id.

  Raises:
    DataError: if a file is absent or altered.
  """
  part, suffix, *sha256 = _SPLITS[split]
  challenges, solutions = (
    json.loads(_read(f'arc-agi_{part}_{kind}_{suffix}', sha, folder))
    for kind, sha in zip(('challenges', 'solutions'), sha256)
  )
  all_puzzles = [
    grids.Puzzle(
      name,
      tuple(
        grids.pair(p['input'], p['output']) for p in challenges[name]['train']
      ),
      tuple(
        grids.pair(p['input'], output)
        for p, output in zip(
          challenges[name]['test'], solutions[name], strict=True
        )
      ),
    )
    for name in sorted(challenges)
  ]
  return sorted(all_puzzles, key=lambda p: p.name in _LAST)


def _read(name: str, sha256: str, folder: str) -> bytes:
  file = download.RawFile(f'seal_fewshot_arc/{name}', _ORIGIN + name, sha256)
  return download.read(file, folder)
