"""A large model on disk: a folder with config.json and one .npy per tensor.

Tensors can be mapped into memory, so a model is written, and read, a tensor at
a time. Names begin with `params.`, or with `memory.` for what a life changed.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import transformer
from sleep_jax.runtime import tree_paths

FORMAT = 'sleep_jax'
# (name, shape, dtype) -> an array to fill.
Allocate = Callable[[str, tuple[int, ...], np.dtype], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Saved:
  """What a folder holds; `params` are mapped from their files, read-only."""

  cfg: config.ModelConfig
  params: at.Params
  memory: memory_lib.Memory | None


@contextlib.contextmanager
def atomic_dir(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A folder that takes the name `path` only when the block has succeeded.

  Raises:
    ConfigError: if `path` exists; nothing is ever overwritten.
  """
  if path.exists():
    raise config.ConfigError(
      f'{path} exists already; name another output, or delete it yourself.'
    )
  part = path.with_name(f'{path.name}.{os.getpid()}.part')
  part.mkdir(parents=True)
  try:
    yield part
  except BaseException:
    shutil.rmtree(part)
    raise
  part.replace(path)


def restore(
  cfg: config.ModelConfig, leaves: dict[str, np.ndarray], where: str
) -> memory_lib.Memory:
  """Memory of a life of `cfg` from its leaves by name (see `named`).

  Raises:
    ConfigError: naming the first leaf that is missing, unknown or misshapen.
  """
  template = jax.eval_shape(lambda: memory_lib.init_memory(cfg))
  wanted = tree_paths.leaf_paths(template)
  _check_names(wanted, leaves, where)
  for name, want in wanted.items():
    check(leaves[name], want.shape, want.dtype, f'{where}: {name}')
  values = [jnp.asarray(leaves[name]) for name in wanted]
  return jax.tree.unflatten(jax.tree.structure(template), values)


def check_params(
  cfg: config.ModelConfig,
  leaves: Mapping[str, np.ndarray],
  where: str,
  without: Collection[str] = (),
) -> None:
  """Refuses weights, by dotted name, that are not those of `cfg`.

  Args:
    cfg: the model.
    leaves: its weights, of any type.
    where: the file, for the message.
    without: names that are kept elsewhere.
  """
  wanted = tree_paths.leaf_paths(
    jax.eval_shape(lambda: transformer.init(cfg, jax.random.key(0)))
  )
  wanted = {k: v for k, v in wanted.items() if k not in without}
  _check_names(wanted, leaves, where)
  for name, want in wanted.items():
    check(leaves[name], want.shape, leaves[name].dtype, f'{where}: {name}')


def _check_names(
  wanted: Collection[str], found: Collection[str], where: str
) -> None:
  if odd := sorted(set(wanted) ^ set(found)):
    kind = 'lacks the' if odd[0] in wanted else 'has an unknown'
    raise config.ConfigError(f'{where} {kind} tensor {odd[0]}.')


def check(
  array: np.ndarray, shape: tuple[int, ...], dtype: np.dtype, where: str
) -> None:
  """Refuses an array of another shape or type, naming it by `where`."""
  if tuple(array.shape) != tuple(shape) or array.dtype != dtype:
    raise config.ConfigError(
      f'{where} is {array.dtype}{list(array.shape)}, but '
      f'{np.dtype(dtype)}{list(shape)} is expected.'
    )


def allocator(folder: pathlib.Path) -> Allocate:
  """Allocates tensors as files of `folder`, mapped into memory."""

  def allocate(name: str, shape: tuple[int, ...], dtype: np.dtype):
    mapped = np.lib.format.open_memmap(
      _file(folder, name), 'w+', _stored(dtype), shape
    )
    return mapped.view(dtype)

  return allocate


def _file(folder: pathlib.Path, name: str) -> pathlib.Path:
  return folder / f'{name}.npy'


def _stored(dtype: np.dtype) -> np.dtype:
  """The type NumPy's format knows: bfloat16 is kept as its bits."""
  dtype = np.dtype(dtype)
  return np.dtype(f'uint{8 * dtype.itemsize}') if dtype.kind == 'V' else dtype


def fill(
  folder: pathlib.Path,
  cfg: config.ModelConfig,
  params: at.Params,
  memory: memory_lib.Memory | None,
) -> None:
  """Writes what `folder` does not have yet: tensors, and config.json last.

  Tensors that came from `allocator(folder)` are there already.
  """
  allocate, tensors = allocator(folder), {}
  for name, x in tree_paths.leaf_paths(
    {'params': params, 'memory': memory}
  ).items():
    if not _file(folder, name).exists():
      allocate(name, x.shape, x.dtype)[...] = x
    tensors[name] = [str(x.dtype), list(x.shape)]
  meta = {'format': FORMAT, 'model': dataclasses.asdict(cfg)}
  text = json.dumps(meta | {'tensors': tensors}, indent=1)
  (folder / 'config.json').write_text(text, encoding='utf-8')


def save(
  path: pathlib.Path,
  cfg: config.ModelConfig,
  params: at.Params,
  memory: memory_lib.Memory | None = None,
) -> None:
  """Writes a model, and what its life has changed, as a new folder."""
  with atomic_dir(path) as part:
    fill(part, cfg, params, memory)


def load(path: pathlib.Path) -> Saved:
  """Reads a folder.

  Raises:
    ConfigError: naming the tensor's file that is missing, cut off, or not of
      the type and shape that config.json tells.
  """
  try:
    meta = json.loads((path / 'config.json').read_text(encoding='utf-8'))
    cfg = config.ModelConfig.from_mapping(meta['model'])
    tensors = meta['tensors'].items()
  except (OSError, ValueError, KeyError) as e:
    raise config.ConfigError(f'{path}/config.json cannot be read: {e}.') from e
  tree: dict[str, Any] = {'params': {}, 'memory': {}}
  for name, (dtype, shape) in tensors:
    file = _file(path, name)
    try:
      array = np.load(file, mmap_mode='r')
    except (OSError, ValueError) as e:
      raise config.ConfigError(
        f'tensor file {str(file)!r} cannot be read ({e}); convert the model '
        'again.'
      ) from e
    check(array, shape, _stored(jnp.dtype(dtype)), str(file))
    root, _, rest = name.partition('.')
    tree[root][rest] = array.view(jnp.dtype(dtype))
  check_params(cfg, tree['params'], str(path))
  memory = tree['memory']
  return Saved(
    cfg,
    traverse_util.unflatten_dict(tree['params'], sep='.'),
    restore(cfg, memory, str(path)) if memory else None,
  )
