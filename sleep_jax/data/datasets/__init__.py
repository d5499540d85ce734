"""Raw files, and the datasets that are prepared from them."""

from typing import Any


def load(name: str, split: str, folder: str = '') -> list[dict[str, Any]]:
  """All records of a split of a dataset, in the order of its file.

  The dataset is prepared once, in the cache.

  Args:
    name: of a builder of `builders`, and of its config if it has some: `gsm8k`,
      `babi/qa1`.
    split: see the builder.
    folder: the data folder, see `download.data_dir`.

  Returns:
    Records of the builder's features, text as `str`. They are shared by all
    calls: do not change them.

  Raises:
    DataError: if a raw file is neither local nor at its origin, or is not the
      listed one, or the cache cannot be written or is damaged.
  """
  # Imports tensorflow_datasets, which takes a second.
  from sleep_jax.data.datasets import prepared

  return prepared.load(name, split, folder)
