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
from typing import Any

from flax import traverse_util
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
  changes = _changes(cfg, memory)
  for i in range(len(cfg.levels_per_block) - 1):
    name = f'level_{i + 1}'
    down = params['blocks'][name]['down']
    if not _is_zero(down, changes.get(f'blocks.{name}.down')):
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


def _is_zero(stack: at.Array, changes: list[np.ndarray | None] | None) -> bool:
  """Whether a matrix is zero in every layer, its change added."""
  of_layers = changes or [None] * len(stack)
  return not any(
    np.any(w if change is None else w + change)
    for w, change in zip(stack, of_layers, strict=True)
  )


def with_fast_change(
  cfg: config.ModelConfig, params: at.Params, memory: memory_lib.Memory | None
) -> at.Params:
  """Weights with the fast change added; of blocks, those are `LazySum`s.

  If the computation is in a wider type than the weights, so is the sum, since
  rounding it would be an error of its own.
  """
  flat: dict[str, Any] = traverse_util.flatten_dict(params, sep='.')
  for name, changes in _changes(cfg, memory).items():
    base = flat[name]
    if not any(x is not None and x.any() for x in changes):
      continue
    dtype = np.dtype(jnp.promote_types(base.dtype, jnp.dtype(cfg.dtype)))
    if name.startswith('blocks.'):
      flat[name] = LazySum(base, changes, dtype)
    else:
      flat[name] = LazySum(base[None], changes, dtype)[0]
  return traverse_util.unflatten_dict(flat, sep='.')


def _changes(
  cfg: config.ModelConfig, memory: memory_lib.Memory | None
) -> dict[str, list[np.ndarray | None]]:
  """The dense changes of each layer, by dotted name of the weight.

  Of a weight that is not of a layer, such as the embedding, it is one change.
  """
  if memory is None:
    return {}
  out: dict[str, list[np.ndarray | None]] = {}
  delta = memory.backbone_delta() or {}
  for name, change in tree_paths.leaf_paths(delta).items():
    change = np.asarray(change)
    out[name] = list(change if name.startswith('blocks.') else change[None])
  for i, level in enumerate(memory.levels):
    block = f'blocks.level_{1 if cfg.partition else i + 1}'
    for key, stack in (level.dense_change() or {}).items():
      of_layers = out.setdefault(f'{block}.{key}', [None] * cfg.layers)
      for row, layer in enumerate(cfg.layers_of(i)):
        before, change = of_layers[layer], np.asarray(stack[row])
        of_layers[layer] = change if before is None else before + change
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
