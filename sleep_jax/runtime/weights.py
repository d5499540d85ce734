"""Backbone weights in one `.npz` file, with the config that fits them."""

from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
from typing import Any

from flax import traverse_util
import numpy as np

from sleep_jax import config
from sleep_jax import typing as t

_META = '__model__'


def save(path: pathlib.Path, params: t.Params, cfg: config.ModelConfig) -> None:
  """Writes weights and model config; under its final name only when whole."""
  flat = traverse_util.flatten_dict(params, sep='/')
  meta = json.dumps(dataclasses.asdict(cfg))
  part = path.with_name(f'{path.name}.{os.getpid()}.part')
  path.parent.mkdir(parents=True, exist_ok=True)
  with part.open('wb') as f:
    np.savez_compressed(
      f, **{k: np.asarray(v) for k, v in flat.items()}, **{_META: meta}
    )
  part.replace(path)


def load(path: pathlib.Path, cfg: config.ModelConfig) -> t.Params:
  """Reads weights and checks every shape against `cfg`.

  Raises:
    ConfigError: naming the first setting or tensor that does not fit.
  """
  if not path.exists():
    raise config.ConfigError(
      f'base weights {str(path)!r} do not exist; train them with python -m '
      'experiments.pretrain, or correct --config.base.'
    )
  with np.load(path) as archive:
    meta = json.loads(str(archive[_META]))
    flat = {k: archive[k] for k in archive.files if k != _META}
  check(path.name, meta, cfg)
  return traverse_util.unflatten_dict(flat, sep='/')


def check(where: str, meta: Mapping[str, Any], cfg: config.ModelConfig) -> None:
  """Refuses weights of another model.

  Args:
    where: the file, for the message.
    meta: the config that the weights were trained with, as a mapping.
    cfg: the model that is wanted.
  """
  for name in ('vocab', 'dim', 'layers', 'heads', 'kv_heads', 'head_dim'):
    if meta[name] != getattr(cfg, name):
      raise config.ConfigError(
        f'{where} was trained with {name}={meta[name]}, but model.{name}'
        f"={getattr(cfg, name)}; use the base's own setting or another base."
      )
  hidden = [level['hidden'] for level in meta['levels']]
  wanted = [level.hidden for level in cfg.levels]
  if hidden != wanted:
    raise config.ConfigError(
      f'{where} was trained with levels of hidden width {hidden}, but '
      f'model.levels asks for {wanted}.'
    )
