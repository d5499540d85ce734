"""A large model on disk: a folder with config.json and one .npy per tensor.

Tensors are memory-mapped, so a model is written and read one tensor at a time.
Names begin with `params.`, or with `memory.` for the memory of a life.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import pathlib
import shutil
import sys
from typing import Any
import uuid

from flax import traverse_util
import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import untrusted
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import memory_init
from sleep_jax.runtime import files
from sleep_jax.runtime import tree_paths

FORMAT = 'sleep_jax'
_DIGEST = 'digest.json'  # The digest, and of which files.
_ROOTS = ('params', 'memory')  # First parts of the tensors' names.
# Of weights, and of what else a memory holds.
_DTYPES: dict[str, None] = dict.fromkeys(
  (*config.DTYPES, 'int32', 'uint32', 'bool')
)
# (name, shape, dtype) -> an array to fill.
Allocate = Callable[[str, tuple[int, ...], np.dtype], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Saved:
  """Content of a folder; `params` are memory-mapped, read-only."""

  cfg: config.ModelConfig
  params: at.Params
  memory: memory_lib.Memory | None


def check_absent(path: pathlib.Path) -> None:
  """Raises ConfigError if `path` exists."""
  if path.exists():
    raise config.ConfigError(
      f'{path} exists already; name another output, or delete it yourself.'
    )


@contextlib.contextmanager
def atomic_dir(path: pathlib.Path) -> Iterator[pathlib.Path]:
  """A temporary folder that is renamed to `path` when the block succeeds.

  Everybody may read what is in it then, whatever the mode of the libraries'
  temporary files was: folders are 0755 and files 0644.

  Raises:
    ConfigError: if `path` exists, since nothing is overwritten; or if it cannot
      be written, since the disk is full, say. Nothing is left then.
  """
  check_absent(path)
  part = path.with_name(f'{path.name}.{uuid.uuid4().hex}.part')
  try:
    part.mkdir(parents=True)
    yield part
    _make_readable(part)
    part.replace(path)
  except OSError as e:
    shutil.rmtree(part, ignore_errors=True)
    raise config.ConfigError(
      f'{path} could not be written: {e}. Nothing is left of it; free space or '
      'name another output.'
    ) from e
  except BaseException:
    shutil.rmtree(part, ignore_errors=True)
    raise


def _make_readable(folder: pathlib.Path) -> None:
  folder.chmod(0o755)
  for path in folder.rglob('*'):
    path.chmod(0o755 if path.is_dir() else 0o644)


def restore(
  cfg: config.ModelConfig, leaves: dict[str, np.ndarray], where: str
) -> memory_lib.Memory:
  """The memory of a life of `cfg`, from its leaves by name (`leaf_paths`).

  Raises:
    ConfigError: naming the first leaf that is missing, unknown, or of another
      shape or type.
  """
  _check_depth(cfg, leaves, where)
  template = _shapes(_memory_shapes, cfg, where)
  expected = tree_paths.leaf_paths(template)
  _check_names(expected, leaves, where)
  for name, leaf in expected.items():
    check(leaves[name], leaf.shape, leaf.dtype, f'{where}: {name}')
    check_finite(leaves[name], f'{where}: {name}')
  values = [jnp.asarray(leaves[name]) for name in expected]
  return jax.tree.unflatten(jax.tree.structure(template), values)


def check_params(
  cfg: config.ModelConfig,
  leaves: Mapping[str, np.ndarray],
  where: str,
  without: Collection[str] = (),
) -> None:
  """Checks names, shapes, types and values of the weights of `cfg`.

  Args:
    cfg: the model.
    leaves: its weights by dotted name.
    where: the file, for the message.
    without: names that are stored elsewhere.

  Raises:
    ConfigError: naming the first tensor that does not match, is not of
      `config.DTYPES`, or holds a NaN or an infinite number.
  """
  _check_depth(cfg, leaves, where)
  expected = tree_paths.leaf_paths(
    _shapes(memory_init.weight_shapes, cfg, where)
  )
  expected = {k: v for k, v in expected.items() if k not in without}
  _check_names(expected, leaves, where)
  for name, leaf in expected.items():
    array, place = leaves[name], f'{where}: {name}'
    check(array, leaf.shape, array.dtype, place)
    config.lookup(
      str(array.dtype), dict.fromkeys(config.DTYPES), f'{place}: type'
    )
    check_finite(array, place)


@functools.lru_cache(8)
def _memory_shapes(cfg: config.ModelConfig) -> at.Tree:
  """Shapes and types of an empty memory."""
  return jax.eval_shape(lambda: memory_init.init_memory(cfg))


def _shapes(
  of: Callable[[config.ModelConfig], at.Tree],
  cfg: config.ModelConfig,
  where: str,
) -> at.Tree:
  """`of(cfg)`, if there can be such a model."""
  try:
    return of(cfg)
  except Exception as e:  # JAX has many, for dimensions that cannot be.
    raise config.ConfigError(
      f'{where}: there is no model of these dimensions ({untrusted.reason(e)}).'
    ) from None


def _check_depth(
  cfg: config.ModelConfig, leaves: Mapping[str, np.ndarray], where: str
) -> None:
  """Refuses more layers than tensors have rows, before work for each."""
  rows = sum(x.shape[0] for x in leaves.values() if x.ndim and x.size)
  if cfg.layers > rows:
    raise config.ConfigError(
      f'{where}: model.layers={cfg.layers}, but its tensors have {rows} rows.'
    )


def _check_names(
  expected: Collection[str], actual: Collection[str], where: str
) -> None:
  if different := sorted(set(expected) ^ set(actual)):
    verb = 'lacks the' if different[0] in expected else 'has an unknown'
    raise config.ConfigError(f'{where} {verb} tensor {different[0]}.')


def check(
  array: np.ndarray, shape: tuple[int, ...], dtype: np.dtype, where: str
) -> None:
  """Checks the shape and type of an array; `where` names it in the error."""
  if tuple(array.shape) != tuple(shape) or array.dtype != dtype:
    raise config.ConfigError(
      f'{where} is {array.dtype}{list(array.shape)}, but '
      f'{np.dtype(dtype)}{list(shape)} is expected.'
    )


def check_finite(array: np.ndarray, where: str) -> None:
  """Refuses a NaN or an infinite number; nothing is allocated.

  Raises:
    ConfigError: `where` names the array.
  """
  if not array.size or not jnp.issubdtype(array.dtype, jnp.inexact):
    return
  # Read as whole numbers, these are the largest of their sign: in them all bits
  # of the exponent are set.
  infinity = np.array(np.inf, array.dtype)
  for kind, bound in (('int', infinity), ('uint', -infinity)):
    view = f'{kind}{8 * array.itemsize}'
    if array.view(view).max() >= bound.view(view):
      raise config.ConfigError(
        f'{where} holds a NaN or an infinite number; the file is damaged, or '
        'its training diverged.'
      )


def allocator(folder: pathlib.Path) -> Allocate:
  """Allocates tensors as memory-mapped files in `folder`."""

  def allocate(
    name: str, shape: tuple[int, ...], dtype: np.dtype
  ) -> np.ndarray:
    file = _file(folder, name)
    mapped = np.lib.format.open_memmap(file, 'w+', _file_dtype(dtype), shape)
    if hasattr(os, 'posix_fallocate'):
      # A mapped page that the disk has no block for would kill the process.
      with file.open('r+b') as f:
        os.posix_fallocate(f.fileno(), 0, file.stat().st_size)
    return mapped.view(dtype)

  return allocate


def _file(folder: pathlib.Path, name: str) -> pathlib.Path:
  return folder / f'{name}.npy'


def _file_dtype(dtype: np.dtype) -> np.dtype:
  """The type in the .npy file: bfloat16 is stored as unsigned integers."""
  dtype = np.dtype(dtype)
  return np.dtype(f'uint{8 * dtype.itemsize}') if dtype.kind == 'V' else dtype


def fill(
  folder: pathlib.Path,
  cfg: config.ModelConfig,
  params: at.Params,
  memory: memory_lib.Memory | None,
) -> None:
  """Writes the tensors that `folder` lacks, and config.json last.

  Tensors that were allocated by `allocator(folder)` exist already.
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
  """Writes a model and its memory as a new folder."""
  with atomic_dir(path) as part:
    fill(part, cfg, params, memory)


def load(path: pathlib.Path) -> Saved:
  """Reads a folder.

  Raises:
    ConfigError: naming the tensor file that is missing, truncated, or not of
      the type and shape in config.json, or a value that is not finite.
  """
  cfg, tensors = read_config(path)
  tree: dict[str, Any] = {root: {} for root in _ROOTS}
  for name, (dtype, shape) in tensors.items():
    array = _open(path, name)
    where = str(_file(path, name))
    check(array, tuple(shape), _file_dtype(jnp.dtype(dtype)), where)
    root, _, rest = name.partition('.')
    tree[root][rest] = array.view(jnp.dtype(dtype))
  check_params(cfg, tree['params'], str(path))
  memory = tree['memory']
  return Saved(
    cfg,
    traverse_util.unflatten_dict(tree['params'], sep='.'),
    restore(cfg, memory, str(path)) if memory else None,
  )


def _open(path: pathlib.Path, name: str) -> np.ndarray:
  """A tensor of a folder, mapped into memory."""
  file = untrusted.member(path, f'{name}.npy')
  if not file.is_file():
    raise config.ConfigError(f'tensor file {str(file)!r} is missing.')
  try:
    return np.lib.format.open_memmap(file, 'r')
  except Exception as e:  # Of the header's parser: many types.
    raise config.ConfigError(
      f'tensor file {str(file)!r} cannot be read ({untrusted.reason(e)}); '
      'convert the model again.'
    ) from None


def read_config(
  path: pathlib.Path,
) -> tuple[config.ModelConfig, dict[str, list[Any]]]:
  """The model of a folder, and the type and shape of each tensor by name.

  Raises:
    ConfigError: if config.json is missing, or was not written by `fill`.
  """
  file = path / 'config.json'
  meta = untrusted.read_json(file)
  tensors: Any = meta.get('tensors')
  config.check_mapping(tensors, f'{file}: tensors')
  for name, entry in tensors.items():
    where = f'{file}: tensors.{name}'
    if name.partition('.')[0] not in _ROOTS:
      raise config.ConfigError(f'{where} is unknown.')
    if not isinstance(entry, list) or len(entry) != 2:
      raise config.ConfigError(f'{where}={entry!r} is no type and shape.')
    config.check_value(str, entry[0], where)
    config.lookup(entry[0], _DTYPES, where)
    config.check_value(tuple[int, ...], entry[1], where)
  return parse_model(meta.get('model'), str(file)), tensors


def parse_model(values: Any, where: str) -> config.ModelConfig:
  """The model that a file says it is of.

  Args:
    values: what the file has in place of a config's section `model`.
    where: the file, for messages.

  Raises:
    ConfigError: if there is no such model; or if one of its mixers is a class
      of a module that was not imported, since weights must not run code.
  """
  try:
    config.check_mapping(values, 'model')
    mixers = values.get('mixers', ())
    config.check_value(tuple[str, ...], mixers, 'model.mixers')
    for mixer in mixers:
      module, colon, _ = mixer.partition(':')
      if colon and module not in sys.modules:
        raise config.ConfigError(
          f'model.mixers names {mixer!r}; import {module} first if you trust '
          'it, since weights may not.'
        )
    return config.ModelConfig.from_mapping(values)
  except config.ConfigError as e:
    raise config.ConfigError(f'{where}: {e}') from None


def digest(path: pathlib.Path) -> str:
  """SHA-256 of names, types, shapes and content of a folder's tensors.

  It is kept in the folder, for as long as size and time of the files stay the
  same; otherwise every file is read once.
  """
  _, tensors = read_config(path)
  state = {}
  for name in tensors:
    stat = _file(path, name).stat()
    state[name] = [stat.st_size, stat.st_mtime_ns]
  with contextlib.suppress(config.ConfigError):  # None yet, or a damaged one.
    kept = untrusted.read_json(path / _DIGEST)
    if kept.get('files') == state and isinstance(kept.get('sha256'), str):
      return kept['sha256']
  sha256 = hashlib.sha256()
  for name in sorted(tensors):
    sha256.update(json.dumps([name, *tensors[name]]).encode())
    sha256.update(_open(path, name).reshape(-1).view(np.uint8).data)
  kept = {'sha256': sha256.hexdigest(), 'files': state}
  # In a folder that is read-only it is computed every time.
  with contextlib.suppress(OSError):
    files.write(path / _DIGEST, json.dumps(kept))
  return kept['sha256']
