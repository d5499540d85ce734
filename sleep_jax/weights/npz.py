"""Weights and model config of a backbone in one `.npz` file."""

import dataclasses
import json
import os
import pathlib
from typing import Any
import zipfile

from flax import traverse_util
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config

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
    ConfigError: if there is no file, or it is truncated or was not written by
      `save`.
  """
  if not path.exists():
    raise config.ConfigError(
      f'base weights {str(path)!r} do not exist; train them with '
      'experiments.run (configs base_*.py), convert a checkpoint into them '
      '(sleep_jax.weights.convert), or correct --config.base.'
    )
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
