"""What a life has made of a model's weights, and its memory in a file.

The fast and the folded change can be added to the weights
(`with_fast_change`); if no expert is in use that is all, and a plain checkpoint
computes the same (`why_not_plain`).
`memory.safetensors` beside an export holds what a life needs to go on.
"""

from collections.abc import Mapping
import dataclasses
import json
import pathlib

import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import untrusted
from sleep_jax.models import memory as memory_lib
from sleep_jax.runtime import tree_paths
from sleep_jax.weights import folder as folder_lib
from sleep_jax.weights import huggingface

FILE = 'memory.safetensors'


class LazySum:
  """A stack of weights plus a fast change, added layer by layer on demand.

  The sum is rounded as in `cms.Level`: added in float32, then cast.

  base: `[L, ...]`.
  changes: of each layer; None where there is none.
  dtype: of the sum.
  """

  def __init__(
    self, base: at.Array, changes: list[np.ndarray | None], dtype: np.dtype
  ):
    self._base, self._changes = base, changes
    self.shape, self.dtype = base.shape, dtype

  def changes_layer(self, layer: int) -> bool:
    """Whether there is a change in `layer` that is not zero."""
    change = self._changes[layer]
    return change is not None and bool(change.any())

  def __getitem__(self, layer: int) -> np.ndarray:
    base = np.asarray(self._base[layer])
    if not self.changes_layer(layer):
      return base.astype(self.dtype)  # Adding zero would turn -0 into 0.
    return (base + self._changes[layer]).astype(self.dtype)


def why_not_plain(
  cfg: config.ModelConfig, params: at.Params, memory: memory_lib.Memory | None
) -> str | None:
  """Why no plain checkpoint computes the same function; None if one does."""
  for i in range(len(cfg.levels_per_block) - 1):
    down = params['blocks'][f'level_{i + 1}']['down']
    if not _output_is_zero(down, memory.levels[i] if memory else None):
      return (
        f'level {i + 1} adds a second MLP to every block, and a plain block '
        'has one'
      )
  for i, level in enumerate(memory.levels if memory else (), 1):
    used = len(used_slots(level.bank)) if level.bank else 0
    if used:
      return (
        f'level {i} uses {used} of its experts, and the output of an expert is '
        'gated by the token'
      )
  return None


def used_slots(bank: memory_lib.Bank) -> list[int]:
  """The slots of a bank that may change a logit."""
  return np.flatnonzero(np.asarray(bank.status) != memory_lib.LOCKED).tolist()


def _output_is_zero(
  down: at.Array, level: memory_lib.LevelMemory | None
) -> bool:
  """Whether a level's output is zero for every input."""
  dense = level.dense_change() if level else None
  change = None if dense is None else np.asarray(dense['down'])
  return not any(
    np.any(w if change is None else w + change[layer])
    for layer, w in enumerate(down)
  )


def with_fast_change(
  cfg: config.ModelConfig, params: at.Params, memory: memory_lib.Memory | None
) -> at.Params:
  """Weights with the fast change added; those that change are `LazySum`s.

  If the computation is in a wider type than the weights, so is the sum, since
  rounding it would be an error of its own.
  """
  blocks = dict(params['blocks'])
  for name, changes in _changes(cfg, memory).items():
    dense = dict(blocks[name])
    for key, of_layers in changes.items():
      base = dense[key]
      change = LazySum(base, of_layers, base.dtype)
      if any(change.changes_layer(i) for i in range(cfg.layers)):
        dtype = np.dtype(jnp.promote_types(base.dtype, jnp.dtype(cfg.dtype)))
        dense[key] = LazySum(base, of_layers, dtype)
    blocks[name] = dense
  return params | {'blocks': blocks}


def _changes(
  cfg: config.ModelConfig, memory: memory_lib.Memory | None
) -> dict[str, dict[str, list[np.ndarray | None]]]:
  """The dense changes by module of a block, matrix and layer."""
  out: dict[str, dict[str, list[np.ndarray | None]]] = {}
  for i, level in enumerate(memory.levels if memory else ()):
    delta = level.dense_change()
    name = f'level_{1 if cfg.partition else i + 1}'
    for key, stack in (delta or {}).items():
      of_layers = out.setdefault(name, {}).setdefault(key, [None] * cfg.layers)
      for row, layer in enumerate(cfg.layers_of(i)):
        of_layers[layer] = np.asarray(stack[row])
  return out


def save(
  path: pathlib.Path,
  cfg: config.ModelConfig,
  memory: memory_lib.Memory | None,
  base: Mapping[str, np.ndarray],
) -> None:
  """Writes a memory.

  Args:
    path: of the file.
    cfg: the model with its levels.
    memory: of the life, or None.
    base: weights as they were before the fast change, by the names that the
      changed ones have in the checkpoint beside the file.
  """
  tensors = {f'base.{name}': x for name, x in base.items()}
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
    base: weights before the fast change, by name in the checkpoint beside it.
    params: parameters that the checkpoint lacks, by dotted name; files of
      version 0.2 alone have any.
    memory: the memory of the life, or None.
  """

  cfg: config.ModelConfig
  base: Mapping[str, np.ndarray]
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
    values = untrusted.parse_json(meta.get('model', ''), f'{path}: model')
    cfg = folder_lib.parse_model(values, str(path))
    leaves: dict[str, dict[str, np.ndarray]] = {
      'base': {},
      'params': {},
      'memory': {},
    }
    for key in f.keys():
      root, _, name = key.partition('.')
      config.lookup(root, leaves, f'{path}: tensor {key}: its kind')
      leaves[root][name] = f.get_tensor(key)
  memory = leaves['memory']
  return SavedBank(
    cfg,
    leaves['base'],
    leaves['params'],
    folder_lib.restore(cfg, memory, str(path)) if memory else None,
  )
