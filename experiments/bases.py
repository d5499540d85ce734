"""Base weights by file: our own `.npz`, or a checkpoint of llama2.c."""

import dataclasses
import pathlib

import numpy as np

from sleep_jax import config
from sleep_jax import typing as t
from sleep_jax.data import catalog
from sleep_jax.interop import llama2c
from sleep_jax.runtime import weights


def load(
  base: str, cfg: config.ModelConfig, folder: str | None = None
) -> t.Params:
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
    return weights.load(path, cfg)
  found, params = llama2c.parse(catalog.read(base, folder), path.name)
  fixed = dataclasses.replace(cfg, levels=cfg.levels[-1:])
  weights.check(path.name, dataclasses.asdict(found), fixed)
  return with_fast_levels(params, cfg)


def with_fast_levels(params: t.Params, cfg: config.ModelConfig) -> t.Params:
  """A plain Transformer with residual levels before its feed-forward part.

  That part becomes the slowest level. Each faster one begins with the features
  of its first `hidden` units, and with an output of zero: the logits stay the
  same, bit for bit, until it first updates.
  """
  blocks = dict(params['blocks'])
  own, norm = blocks.pop('level_1'), blocks.pop('level_1_norm')
  last = len(cfg.levels)
  for i, level in enumerate(cfg.levels[:-1], 1):
    if level.hidden > cfg.levels[-1].hidden:
      raise config.ConfigError(
        f'model.levels[{i - 1}].hidden={level.hidden}: a level that is added '
        f"borrows the base's features, and has at most its "
        f'{cfg.levels[-1].hidden}.'
      )
    blocks[f'level_{i}_norm'] = norm
    blocks[f'level_{i}'] = {
      'gate': own['gate'][..., : level.hidden],
      'up': own['up'][..., : level.hidden],
      'down': np.zeros_like(own['down'][:, : level.hidden]),
    }
  blocks |= {f'level_{last}_norm': norm, f'level_{last}': own}
  return params | {'blocks': blocks}
