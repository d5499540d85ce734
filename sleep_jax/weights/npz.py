"""Weights and model config of a backbone in one `.npz` file."""

import dataclasses
import json
import pathlib
from typing import Any

from flax import traverse_util
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import untrusted
from sleep_jax.runtime import files
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
  path.parent.mkdir(parents=True, exist_ok=True)
  arrays: dict[str, Any] = {k: np.asarray(v) for k, v in flat.items()}
  arrays[_META] = np.asarray(meta)
  with files.atomic(path) as f:
    np.savez_compressed(f, **arrays)


def read(path: pathlib.Path) -> tuple[config.ModelConfig, at.Params]:
  """Model config and weights of an `.npz` file.

  Raises:
    ConfigError: if there is no file, it is truncated or was not written by
      `save`; or naming the tensor that its model does not have, or whose shape,
      type or values cannot be.
  """
  if not path.exists():
    raise config.ConfigError(
      f'base weights {str(path)!r} do not exist; train them with '
      'experiments.run (configs base_*.py), convert a checkpoint into them '
      '(sleep_jax.weights.convert), or correct --config.base.'
    )
  flat = untrusted.read_npz(path)
  meta = untrusted.parse_json(str(flat.pop(_META, '')), f'{path}: {_META}')
  cfg = folder_lib.parse_model(meta, str(path))
  leaves = {name.replace('/', '.'): x for name, x in flat.items()}
  folder_lib.check_params(cfg, leaves, str(path))
  return cfg, traverse_util.unflatten_dict(leaves, sep='.')
