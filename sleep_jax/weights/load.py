"""Loads the weights that `--config.base` names."""

import pathlib

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data.datasets import catalog
from sleep_jax.weights import llama2c
from sleep_jax.weights import npz


def load(
  base: str, cfg: config.ModelConfig, folder: str | None = None
) -> at.Params:
  """The weights in the file or folder `base`, for the model `cfg`.

  Args:
    base: a `.npz` file or a folder of this package; or a `.bin` of llama2.c,
      given as a path or as a name of `data.datasets.catalog`.
    cfg: the model; a base of one level gains the levels that it lacks.
    folder: the data folder, see `data.datasets.download.data_dir`.

  Raises:
    ConfigError: if there is no such file, or it does not match `cfg`.
  """
  path = pathlib.Path(base)
  if path.suffix != '.bin':
    return npz.load(path, cfg)
  source_cfg, params = llama2c.parse(catalog.read(base, folder), path.name)
  return npz.with_levels(path.name, source_cfg, params, cfg)
