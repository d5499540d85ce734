"""The raw files that the project uses, with their origins and hashes.

`stories260K` (260 thousand parameters, MIT) is a pretrained Llama; the books
are in the public domain. The name of a listed file is its path below the data
folder, as `download.read` looks for it.
"""

import pathlib

from sleep_jax.data.datasets import download
from sleep_jax.data.datasets import gutenberg

_STORIES = (
  'https://huggingface.co/karpathy/tinyllamas/resolve/main/stories260K/'
)
_TINYSTORIES = (
  'https://raw.githubusercontent.com/mines-opt-ml/decoding-gpt/'
  'b7753c9b80f5b19105f2f4833c135adebf62276b/data/'
)
_SEAL = (
  'https://raw.githubusercontent.com/Continual-Intelligence/SEAL/'
  '4cb1e7d4350c62403daee8c6723e6184886cb304/knowledge-incorporation/data/'
)
_FILES = {
  file.path: file
  for file in (
    *gutenberg.BOOKS.values(),
    download.RawFile(
      'stories260k/stories260K.bin',
      f'{_STORIES}stories260K.bin',
      'b0a507e7ad0f626624f17112325e66691f9076d622e1d3274d103d00299f2696',
    ),
    download.RawFile(
      'stories260k/tok512.bin',
      f'{_STORIES}tok512.bin',
      '037cb335abb25d1fa9e8ecae30ed2a3a8ace9302862ebcdc05d51a6bbb10c312',
    ),
    # The first ten thousand lines of TinyStories V2's training text.
    download.RawFile(
      'tinystories/tinystories_10k.txt',
      f'{_TINYSTORIES}tinystories_10k.txt',
      '5a19b936d7b53bbdac1eea03230b00161dceca24ae272f5bd8e9dbbc2a883418',
    ),
    # SEAL's copy of SQuAD 1.1: validation, and its two rounds' passages.
    download.RawFile(
      'seal_squad/squad_val.json',
      f'{_SEAL}squad_val.json',
      'f9a4538b00006b6bed12c00d1274807b11cc33ba5b1068d797e1457ed4f74992',
    ),
    download.RawFile(
      'seal_squad/synthetic__train__iter0_train.json',
      f'{_SEAL}synthetic_data/train/iter0_train.json',
      '8d292d69bcef111e15ca8d39c5c8cfe01dd28ee4240f17c57548e1793e889690',
    ),
    download.RawFile(
      'seal_squad/synthetic__train__iter1_train.json',
      f'{_SEAL}synthetic_data/train/iter1_train.json',
      '756cb6355bc2f9abdedaf76572ea6ccfa9ec8b5e91953d2130a8a121159c9ca0',
    ),
  )
}


def read(name: str, folder: str | None = None) -> bytes:
  """The content of a file.

  Args:
    name: the path of a file, or a listed name.
    folder: the data folder, see `download.data_dir`.

  Raises:
    DataError: if it is neither, or its origin or checksum fails.
  """
  path = pathlib.Path(name)
  if path.is_file():
    return path.read_bytes()
  if name not in _FILES:
    raise download.DataError(
      f'file {name!r} does not exist, and is none of the listed '
      f'{", ".join(sorted(_FILES))}.'
    )
  return download.read(_FILES[name], folder)
