"""Exports of a model with a memory: merged where exact, else in two files.

Merged: the fast change is added to the weights, and a plain checkpoint computes
the same logits. In two files: the plain checkpoint holds the backbone, and
`memory.safetensors` beside it everything that the life has changed or added.
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
  """A stack of weights plus a fast change, added layer by layer on demand.

  The sum is rounded as in `cms.Level`: added in float32, then cast.
  """

  def __init__(self, base: at.Array, changes: list[np.ndarray | None]):
    self._base, self._changes = base, changes
    self.shape, self.dtype = base.shape, base.dtype

  def __getitem__(self, layer: int) -> np.ndarray:
    base, change = np.asarray(self._base[layer]), self._changes[layer]
    if change is None or not change.any():
      return base  # Unchanged: adding zero would turn -0 into 0.
    return (base + change).astype(self.dtype)


def why_not_mergeable(
  cfg: config.ModelConfig, params: at.Params, memory: memory_lib.Memory | None
) -> str | None:
  """The reason why a model cannot be merged exactly, or None if it can."""
  for i in range(len(cfg.levels_per_block) - 1):
    down = params['blocks'][f'level_{i + 1}']['down']
    if not _output_is_zero(down, memory.levels[i].fast if memory else None):
      return (
        f'level {i + 1} adds a second MLP to every block, and a plain block '
        'has one'
      )
  for i, level in enumerate(memory.levels if memory else (), 1):
    unlocked = _count_unlocked(level.bank) if level.bank else 0
    if unlocked:
      return (
        f'level {i} uses {unlocked} of its experts, and the output of an '
        'expert is gated by the token'
      )
  dense = params['blocks'][f'level_{len(cfg.levels_per_block)}']
  for delta in memory.deltas() if memory else ():
    for key, change in (delta or {}).items():
      stored = dense[key].dtype
      exact = stored in (jnp.float32, jnp.dtype(cfg.dtype))
      if not exact and np.asarray(change).any():
        return (
          f'the weights are {stored} but the computation is in {cfg.dtype}, so '
          'the sum with the fast change would be rounded'
        )
  return None


def _count_unlocked(bank: memory_lib.Bank) -> int:
  return int((np.asarray(bank.status) != memory_lib.LOCKED).sum())


def _output_is_zero(down: at.Array, fast: memory_lib.Fast | None) -> bool:
  """Whether a level's output is zero for every input."""
  change = None if fast is None else np.asarray(fast.delta['down'])
  return not any(
    np.any(w if change is None else w + change[layer])
    for layer, w in enumerate(down)
  )


def merged(
  cfg: config.ModelConfig, params: at.Params, memory: memory_lib.Memory | None
) -> at.Params:
  """Weights of the plain model that computes the same function.

  Requires that `why_not_mergeable` gives None. The leaves that change are
  `LazySum`s, which `huggingface.save` accepts.
  """
  if memory is None:
    return params
  name = f'level_{len(cfg.levels_per_block)}'
  # Without a partition the output of the faster levels is zero.
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
  """Writes what the plain checkpoint of `cfg` does not contain."""
  plain = {slot.name for slot in huggingface.tensor_slots(cfg).values()}
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
  """Content of a memory file.

  Attributes:
    cfg: the model with its levels.
    params: parameters that the plain checkpoint lacks, by dotted name.
    memory: the memory of the life, or None.
  """

  cfg: config.ModelConfig
  params: Mapping[str, np.ndarray]
  memory: memory_lib.Memory | None


def load(path: pathlib.Path) -> SavedBank:
  """Reads a memory file, bit for bit as it was written.

  Raises:
    ConfigError: naming the file, or the tensor that does not match.
  """
  with huggingface.opened(path) as f:
    meta = f.metadata() or {}
    if meta.get('format') != folder_lib.FORMAT:
      raise config.ConfigError(f'{path} was not written by sleep_jax.')
    cfg = config.ModelConfig.from_mapping(json.loads(meta['model']))
    leaves: dict[str, dict[str, np.ndarray]] = {'params': {}, 'memory': {}}
    for key in f.keys():
      root, _, name = key.partition('.')
      leaves[root][name] = f.get_tensor(key)
  plain = {slot.name for slot in huggingface.tensor_slots(cfg).values()}
  folder_lib.check_params(cfg, leaves['params'], str(path), without=plain)
  memory = leaves['memory']
  return SavedBank(
    cfg,
    leaves['params'],
    folder_lib.restore(cfg, memory, str(path)) if memory else None,
  )
