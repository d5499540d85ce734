"""Base weights by name: our own files, or a checkpoint of llama2.c."""

import pathlib

import jax

from sleep_jax import config
from sleep_jax import typing as t
from sleep_jax.data import catalog
from sleep_jax.interop import llama2c
from sleep_jax.models import levels
from sleep_jax.runtime import weights


def load(
  base: str, cfg: config.ModelConfig, folder: str | None = None
) -> t.Params:
  """The weights that `--config.base` names; see `weights.load`.

  Args:
    base: a `.npz` or folder of ours; or a `.bin` of llama2.c, by its path or by
      a name that `catalog` lists.
    cfg: the model; a plain base gains the levels that it asks for.
    folder: the data folder, see `sources.data_dir`.

  Raises:
    ConfigError: if there is no such file, or it does not fit.
  """
  path = pathlib.Path(base)
  if path.suffix != '.bin':
    return weights.load(path, cfg)
  had, params = llama2c.parse(catalog.read(base, folder), path.name)
  try:
    # Always the same draw: a base is the same model in every life.
    return levels.adopt(had, params, cfg, jax.random.key(0))
  except config.ConfigError as e:
    raise config.ConfigError(f'{path.name}: {e}') from e
