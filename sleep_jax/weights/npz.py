"""Backbone weights on disk: one `.npz`, or a folder for a large model."""

import dataclasses
import json
import os
import pathlib
import zipfile

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.weights import add_levels
from sleep_jax.weights import folder as folder_lib

_META = '__model__'


def save(
  path: pathlib.Path, params: at.Params, cfg: config.ModelConfig
) -> None:
  """Writes weights and model config; under its final name only when whole.

  Raises:
    ConfigError: for a type that the format does not know, such as bfloat16.
  """
  flat = traverse_util.flatten_dict(params, sep='/')
  for name, x in flat.items():
    if x.dtype.kind == 'V':
      raise config.ConfigError(
        f'{path.name}: tensor {name} is {x.dtype}, which .npz does not know; '
        'write a folder (a name without .npz).'
      )
  meta = json.dumps(dataclasses.asdict(cfg))
  part = path.with_name(f'{path.name}.{os.getpid()}.part')
  path.parent.mkdir(parents=True, exist_ok=True)
  with part.open('wb') as f:
    np.savez_compressed(
      f, **{k: np.asarray(v) for k, v in flat.items()}, **{_META: meta}
    )
  part.replace(path)


def read(path: pathlib.Path) -> tuple[config.ModelConfig, at.Params]:
  """Model config and weights as they were written to an `.npz`.

  Raises:
    ConfigError: if the file is cut off, or was not written by `save`.
  """
  try:
    with np.load(path) as archive:
      meta = json.loads(str(archive[_META]))
      flat = {k: archive[k] for k in archive.files if k != _META}
  except (OSError, ValueError, KeyError, zipfile.BadZipFile) as e:
    raise config.ConfigError(
      f'{path} is cut off or holds no weights of ours ({e}).'
    ) from e
  cfg = config.ModelConfig.from_mapping(meta)
  return cfg, traverse_util.unflatten_dict(flat, sep='/')


def load(path: pathlib.Path, cfg: config.ModelConfig) -> at.Params:
  """Weights for `cfg`; a plain base gains the levels that `cfg` asks for.

  Raises:
    ConfigError: naming the first setting or tensor that does not fit.
  """
  if not path.exists():
    raise config.ConfigError(
      f'base weights {str(path)!r} do not exist; train them with python -m '
      'experiments.pretrain, or correct --config.base.'
    )
  if path.is_dir():
    saved = folder_lib.load(path)
    had, params = saved.cfg, jax.tree.map(jnp.asarray, saved.params)
  else:
    had, params = read(path)
  return with_levels(path.name, had, params, cfg)


def with_levels(
  where: str,
  had: config.ModelConfig,
  params: at.Params,
  cfg: config.ModelConfig,
) -> at.Params:
  """Weights of the model `had` for the model `cfg`, see `levels.adopt`.

  Raises:
    ConfigError: naming `where`, the file, and what does not fit.
  """
  try:
    # Always the same draw: a base is the same model in every life.
    return add_levels.add_levels(had, params, cfg, jax.random.key(0))
  except config.ConfigError as e:
    raise config.ConfigError(f'{where}: {e}') from e
