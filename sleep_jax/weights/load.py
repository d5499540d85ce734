"""Base weights by file: our own `.npz`, or a checkpoint of llama2.c."""

import pathlib

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data.datasets import catalog
from sleep_jax.weights import llama2c
from sleep_jax.weights import npz


def load(
  base: str, cfg: config.ModelConfig, folder: str | None = None
) -> at.Params:
  """The weights that `--config.base` names, as `cfg` wants them.

  Args:
    base: a `.npz` of ours; or a `.bin` of llama2.c, a path or a listed name.
    cfg: the model; a `.bin` gains the levels that it does not have.
    folder: the data folder, see `sources.data_dir`.

  Raises:
    ConfigError: if there is no such file, or it does not fit.
  """
  path = pathlib.Path(base)
  if path.suffix != '.bin':
    return npz.load(path, cfg)
  found, params = llama2c.parse(catalog.read(base, folder), path.name)
  return npz.with_levels(path.name, found, params, cfg)
