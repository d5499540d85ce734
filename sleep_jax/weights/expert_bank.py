"""A model that has slept goes home: folded where that is exact, else in two.

Folded, the fast change is added to the weights and a plain checkpoint computes
the same logits. In two parts, the plain checkpoint holds the backbone, and
`memory.safetensors` beside it all that a life has changed or grown.
"""

from collections.abc import Mapping
import dataclasses
import json
import pathlib
from typing import Any

from flax import traverse_util
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.models import memory as memory_lib
from sleep_jax.runtime import tree_paths
from sleep_jax.weights import folder as folder_lib
from sleep_jax.weights import huggingface

FILE = 'memory.safetensors'


class LazySum:
  """A stack of weights plus a fast change, added up layer by layer on demand.

  The sum is rounded as `cms.Level` rounds it: added in float32, then cast.
  """

  def __init__(self, base: np.ndarray, changes: list[np.ndarray | None]):
    self._base, self._layers = base, changes
    self.shape, self.dtype = base.shape, base.dtype

  def __getitem__(self, layer: int) -> np.ndarray:
    base, change = np.asarray(self._base[layer]), self._layers[layer]
    if change is None or not change.any():
      return base  # As it is: adding zero would turn -0 into 0.
    return (base + change).astype(self.dtype)


def why_not_mergeable(
  cfg: config.ModelConfig, params: at.Params, memory: memory_lib.Memory | None
) -> str | None:
  """Why a model cannot be folded exactly; None if it can."""
  for i in range(len(cfg.levels_per_block) - 1):
    down = params['blocks'][f'level_{i + 1}']['down']
    if not _silent(down, memory and memory.levels[i].fast):
      return (
        f'level {i + 1} adds an MLP of its own to every block, and a plain '
        'block has one'
      )
  for i, level in enumerate(memory.levels if memory else (), 1):
    used = _used(level.bank) if level.bank else 0
    if used:
      return (
        f'level {i} uses {used} of its experts, and how much one adds depends '
        'on the token'
      )
  dense = params['blocks'][f'level_{len(cfg.levels_per_block)}']
  for delta in memory.deltas() if memory else ():
    for key, change in (delta or {}).items():
      stored = dense[key].dtype
      exact = stored in (jnp.float32, jnp.dtype(cfg.dtype))
      if not exact and np.asarray(change).any():
        return (
          f'the weights are {stored} but computed with in {cfg.dtype}, so the '
          'sum with the fast change would be rounded'
        )
  return None


def _used(bank: memory_lib.Bank) -> int:
  return int((np.asarray(bank.status) != memory_lib.LOCKED).sum())


def _silent(down: np.ndarray, fast: memory_lib.Fast | None) -> bool:
  """Whether a level's output is zero whatever comes in."""
  change = None if fast is None else np.asarray(fast.delta['down'])
  return not any(
    np.any(w if change is None else w + change[layer])
    for layer, w in enumerate(down)
  )


def merged(
  cfg: config.ModelConfig, params: at.Params, memory: memory_lib.Memory | None
) -> at.Params:
  """Weights that alone compute what the model computes, if nothing obstructs.

  The leaves that change are `Sum`s, which `huggingface.save` takes.
  """
  if memory is None:
    return params
  name = f'level_{len(cfg.levels_per_block)}'
  # Under `stack` the faster levels are silent, or something would obstruct.
  levels = range(len(cfg.levels)) if cfg.partition else [len(cfg.levels) - 1]
  dense = {}
  for key, base in params['blocks'][name].items():
    changes: list[Any] = []
    for i in levels:
      fast = memory.levels[i].fast
      none = [None] * cfg.num_layers(i)
      changes.extend(np.asarray(fast.delta[key]) if fast else none)
    dense[key] = LazySum(base, changes)
  return params | {'blocks': params['blocks'] | {name: dense}}


def save(
  path: pathlib.Path,
  cfg: config.ModelConfig,
  params: at.Params,
  memory: memory_lib.Memory | None,
) -> None:
  """Writes all that the plain checkpoint of `cfg` has no place for."""
  plain = {place.name for place in huggingface.tensor_slots(cfg).values()}
  tensors = {
    f'params.{name}': np.asarray(x, order='C')
    for name, x in traverse_util.flatten_dict(params, sep='.').items()
    if name not in plain
  }
  if memory is not None:
    tensors |= {
      f'memory.{name}': np.asarray(x, order='C')
      for name, x in tree_paths.leaf_paths(memory).items()
    }
  meta = {
    'format': folder_lib.FORMAT,
    'model': json.dumps(dataclasses.asdict(cfg)),
  }
  huggingface.write(path, tensors, meta)


@dataclasses.dataclass(frozen=True)
class SavedBank:
  """What a memory file holds.

  cfg: the model with its levels.
  params: the parameters that its plain checkpoint lacks, by dotted name.
  memory: the life's memory, or None if it had none.
  """

  cfg: config.ModelConfig
  params: Mapping[str, np.ndarray]
  memory: memory_lib.Memory | None


def load(path: pathlib.Path) -> SavedBank:
  """Reads a memory file; every bit is as it was.

  Raises:
    ConfigError: naming the file, or its tensor that does not fit.
  """
  with huggingface.opened(path) as f:
    meta = f.metadata() or {}
    if meta.get('format') != folder_lib.FORMAT:
      raise config.ConfigError(f'{path} was not written by sleep_jax.')
    cfg = config.ModelConfig.from_mapping(json.loads(meta['model']))
    parts: dict[str, dict[str, np.ndarray]] = {'params': {}, 'memory': {}}
    for key in f.keys():
      root, _, name = key.partition('.')
      parts[root][name] = f.get_tensor(key)
  plain = {place.name for place in huggingface.tensor_slots(cfg).values()}
  folder_lib.check_params(cfg, parts['params'], str(path), without=plain)
  memory = parts['memory']
  return SavedBank(
    cfg,
    parts['params'],
    folder_lib.restore(cfg, memory, str(path)) if memory else None,
  )
