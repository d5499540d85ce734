"""Weights and model config of a backbone in one `.npz` file."""

import dataclasses
import json
import os
import pathlib
from typing import Any
import zipfile

from flax import traverse_util
import jax
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.weights import add_levels
from sleep_jax.weights import folder as folder_lib

_META = '__model__'


def save(
  path: pathlib.Path, params: at.Params, cfg: config.ModelConfig
) -> None:
  """Writes weights and model config; the file is renamed when complete.

  Raises:
    ConfigError: for a type that the format does not have, such as bfloat16.
  """
  flat: dict[str, Any] = dict(traverse_util.flatten_dict(params, sep='/'))
  for name, x in flat.items():
    if x.dtype.kind == 'V':
      raise config.ConfigError(
        f'{path.name}: tensor {name} is {x.dtype}, which .npz does not '
        'support; write a folder (a name without .npz).'
      )
  meta = json.dumps(dataclasses.asdict(cfg))
  part = path.with_name(f'{path.name}.{os.getpid()}.part')
  path.parent.mkdir(parents=True, exist_ok=True)
  with part.open('wb') as f:
    arrays: dict[str, Any] = {k: np.asarray(v) for k, v in flat.items()}
    arrays[_META] = np.asarray(meta)
    np.savez_compressed(f, **arrays)
  part.replace(path)


def read(path: pathlib.Path) -> tuple[config.ModelConfig, at.Params]:
  """Model config and weights of an `.npz` file.

  Raises:
    ConfigError: if the file is truncated, or was not written by `save`.
  """
  try:
    with np.load(path) as archive:
      meta = json.loads(str(archive[_META]))
      flat = {k: archive[k] for k in archive.files if k != _META}
  except (OSError, ValueError, KeyError, zipfile.BadZipFile) as e:
    raise config.ConfigError(
      f'{path} is truncated or was not written by sleep_jax ({e}).'
    ) from e
  cfg = config.ModelConfig.from_mapping(meta)
  return cfg, traverse_util.unflatten_dict(flat, sep='/')


def load(path: pathlib.Path, cfg: config.ModelConfig) -> at.Params:
  """Weights for `cfg`, from a `.npz` file or a folder.

  A base of one level gains the levels of `cfg` that it lacks. Tensors of a
  folder are memory-mapped: whoever places them decides on which devices.

  Raises:
    ConfigError: naming the first setting or tensor that does not match.
  """
  if not path.exists():
    raise config.ConfigError(absent(path))
  if path.is_dir():
    saved = folder_lib.load(path)
    source_cfg, params = saved.cfg, saved.params
  else:
    source_cfg, params = read(path)
  return with_levels(path.name, source_cfg, params, cfg)


def absent(path: pathlib.Path) -> str:
  """What is said of a base that does not exist."""
  return (
    f'base weights {str(path)!r} do not exist; train them with '
    'experiments.run (configs base_*.py), convert a checkpoint into them '
    '(sleep_jax.weights.convert), or correct --config.base.'
  )


def with_levels(
  where: str,
  source_cfg: config.ModelConfig,
  params: at.Params,
  cfg: config.ModelConfig,
) -> at.Params:
  """Converts weights of `source_cfg` to `cfg`, see `add_levels.add_levels`.

  Raises:
    ConfigError: naming `where`, the file, and what does not match.
  """
  try:
    # A fixed key: a base is the same model in every life.
    return add_levels.add_levels(source_cfg, params, cfg, jax.random.key(0))
  except config.ConfigError as e:
    raise config.ConfigError(f'{where}: {e}') from e
