"""Loads the weights that `--config.base` names."""

import pathlib

import jax

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import assets
from sleep_jax.data.datasets import catalog
from sleep_jax.weights import add_levels
from sleep_jax.weights import folder as folder_lib
from sleep_jax.weights import llama2c
from sleep_jax.weights import npz
from sleep_jax.weights import pretrained


def load(
  base: str, cfg: config.ModelConfig, folder: str | None = None
) -> at.Params:
  """The weights `base`, for the model `cfg`.

  Args:
    base: a `.npz` of this package; a `.bin` of llama2.c, given as a path or as
      a name of `data.datasets.catalog`; or a model of `pretrained.locate`: a
      known name, a folder, a `.gguf` file, a name on the Hugging Face hub.
    cfg: the model; a base of one level gains the levels that it lacks.
    folder: the data folder, see `data.datasets.download.data_dir`.

  Raises:
    ConfigError: if there is no such base, or it does not match `cfg`.
  """
  source_cfg, params = _read(base, folder)
  try:
    # A fixed key: a base is the same model in every life.
    return add_levels.add_levels(source_cfg, params, cfg, jax.random.key(0))
  except config.ConfigError as e:
    raise config.ConfigError(f'{pathlib.Path(base).name}: {e}') from e


def model_config(base: str, folder: str | None = None) -> config.ModelConfig:
  """The model that `base` was trained as; `load` has the arguments.

  Its levels may be replaced, and settings that no weight depends on.
  """
  if pathlib.Path(base).suffix in ('.npz', '.bin'):
    return _read(base, folder)[0]
  return folder_lib.read_config(pretrained.locate(base))[0]


def _read(
  base: str, folder: str | None
) -> tuple[config.ModelConfig, at.Params]:
  path = assets.find(base)
  if path.suffix == '.npz':
    return npz.read(path)
  if path.suffix == '.bin':
    return llama2c.parse(catalog.read(base, folder), path.name)
  saved = folder_lib.load(pretrained.locate(base))
  return saved.cfg, saved.params
