"""Checkpoints of a life: one orbax checkpoint after every phase of a night.

The phases of a night are functions of the life alone, its random key included.
A life resumed from its last checkpoint therefore ends with the same bits as one
that was never interrupted.

What a life never changes is not saved with it: where its learner leaves the
backbone alone, a checkpoint holds the other leaves, and names the base by
digest.
"""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import hashlib
import json
import math
import pathlib
import re
import shutil
import threading
from typing import Any

from absl import logging
from flax import serialization
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.runtime import distributed
from sleep_jax.runtime import sharding

PHASES = ('wake', 'sleep')
FORMAT = 5  # Raised whenever older checkpoints can no longer be read.
# Older formats, and the version of the package that reads them.
_READ_BY = dict.fromkeys((1, 2, 3), 'sleep_jax 0.1') | {4: 'sleep_jax 0.2'}
_MAX_TO_KEEP = 2
# Leaves below this many bytes share an array: tensorstore (0.1.68 to 0.1.86
# were tested) never frees the description of an array that it has written.
_PACK_BELOW_BYTES = 2**20
_BLOCK_BYTES = 2**28  # Of a leaf that is brought to every device to be hashed.
# Leaves at these paths may differ in size between checkpoint and template.
_RESIZABLE = re.compile(r"\['(learner_state|archive|bank)'\]")
# Leaves under this path are the base's where a checkpoint names one.
_BASE = "['model']['params']"
_ONE_LIFE = 'a life by itself'  # Identity of what `save_life` writes.


class SaveError(RuntimeError):
  """A checkpoint could not be written; the previous one is intact."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """The state of a life at the end of `phase` of `night`.

  Attributes:
    night: index of the night, from 0.
    phase: one of `PHASES`.
    life: pytree of arrays.
    notes: JSON-serializable values saved with it, such as the night's metrics.
  """

  night: int
  phase: str
  life: at.Tree
  notes: dict[str, Any]

  def __str__(self) -> str:
    return f'night {self.night} ({self.phase})'


class Checkpoints:
  """The checkpoints of one life; the newest two are kept.

  A save runs in the background, and is visible only once it is complete.

  Args:
    folder: a directory that holds the checkpoints of this life only.
    identity: digest of the config; checkpoints of another config are refused.
    base: digest of the backbone's weights, which are then not saved, and are
      taken from the template when a life is restored; '' saves all leaves.
  """

  def __init__(self, folder: pathlib.Path, identity: str, base: str = ''):
    self._folder = folder.absolute()
    self._identity, self._base = identity, base
    self._lock = threading.Lock()
    self._manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    # Orbax reads when each was written, which nothing needs; where that is
    # damaged it would open none of them.
    for found in ocp.path.step.standard_name_format().find_all(self._folder):
      try:
        found.commit_timestamp  # noqa: B018
      except (ValueError, TypeError, OverflowError, RecursionError):
        damaged = self._folder / str(found.step) / '_CHECKPOINT_METADATA'
        damaged.unlink(missing_ok=True)
    return ocp.CheckpointManager(
      self._folder,
      item_handlers={
        'life': ocp.StandardCheckpointHandler(),
        'meta': ocp.JsonCheckpointHandler(),
      },
      options=ocp.CheckpointManagerOptions(
        max_to_keep=_MAX_TO_KEEP, cleanup_tmp_directories=True
      ),
    )

  def save(self, snapshot: Snapshot) -> None:
    """Starts a background save, after the previous save has ended.

    Raises:
      SaveError: if this save cannot start, or the previous one has failed.
    """
    leaves = {
      name: _to_host(leaf)
      for name, leaf in _leaf_names(snapshot.life).items()
      # The format has no empty arrays.
      if np.size(leaf) and not self._is_base(name)
    }
    meta = {
      'format': FORMAT,
      'identity': self._identity,
      'base': self._base,
      'night': snapshot.night,
      'phase': snapshot.phase,
      'notes': snapshot.notes,
    }
    # A leaf sharded over several processes is not readable by any one of them.
    meta['not_addressable'] = sorted(
      k for k, x in leaves.items() if not _is_addressable(x)
    )
    meta['leaves'] = _leaves_digest(leaves, meta['not_addressable'])
    arrays, meta['packed'] = _pack(leaves)
    meta['digest'] = _meta_digest(meta)
    distributed.check_agreement(meta['leaves'], str(snapshot))
    step = len(PHASES) * snapshot.night + PHASES.index(snapshot.phase)
    args = ocp.args.Composite(
      life=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta)
    )
    self._guarded(lambda: self._manager.save(step, args=args, force=True))

  def _is_base(self, name: str) -> bool:
    """Whether a leaf is the base's, and so not a part of a checkpoint."""
    return bool(self._base) and name.startswith(_BASE)

  def wait(self) -> None:
    """Waits for the save in progress.

    Raises:
      SaveError: if it failed.
    """
    self._guarded(self._manager.wait_until_finished)

  def _guarded(self, action: Callable[[], Any]) -> None:
    # On SIGTERM, `wait` is called from another thread.
    with self._lock:
      try:
        action()
      except (OSError, ValueError, RuntimeError) as e:
        raise SaveError(
          f'{self._folder}: cannot save: {e}. The previous checkpoint is '
          'intact; check free space and permissions, and run the same command '
          'again.'
        ) from e

  def newest(self, template: at.Tree, phase: str = '') -> Snapshot | None:
    """The newest readable snapshot, or None if nothing was ever saved.

    A corrupt checkpoint is renamed to `corrupt-N`, with a warning.

    Args:
      template: a life of this config. Restored leaves take the sharding of the
        template's, on any number of devices; leaves of the learner state,
        the archive and the banks may differ in size.
      phase: if given, snapshots of the end of this phase alone count.

    Raises:
      ConfigError: if the checkpoints are of another config, base or version,
        or if checkpoints exist and none can be read.
    """
    corrupt = []
    for step in sorted(self._manager.all_steps(), reverse=True):
      if phase and PHASES[step % len(PHASES)] != phase:
        continue
      try:
        meta, leaves = self._read(step, template)
      except config.ConfigError:
        raise
      except (
        OSError, ValueError, LookupError, TypeError, AttributeError,
        RecursionError,
      ) as e:  # fmt: skip
        logging.error(
          'Checkpoint %s/%d is corrupt and is skipped: %s',
          self._folder,
          step,
          str(e).partition(' [tensorstore_spec')[0],
        )
        corrupt.append(step)
        continue
      self._set_aside(corrupt)
      life = serialization.from_state_dict(template, leaves)
      return Snapshot(meta['night'], meta['phase'], life, meta['notes'])
    if corrupt:
      raise config.ConfigError(
        f'{self._folder}: none of the checkpoints {sorted(corrupt)} can be '
        'read. Restore one from a copy, or, to start this life again, delete '
        'its folder yourself.'
      )
    return None

  def _read(
    self, step: int, template: at.Tree
  ) -> tuple[dict[str, Any], at.Tree]:
    """Metadata of one checkpoint, and its life as a state dict."""
    json_args = ocp.args.Composite(meta=ocp.args.JsonRestore())
    meta = dict(self._manager.restore(step, args=json_args)['meta'])
    if meta.pop('digest') != _meta_digest(meta):
      raise ValueError('its metadata differs from what was saved')
    self._check_identity(step, meta)
    arrays = dict(self._manager.item_metadata(step)['life'])
    expected = _leaf_names(template)
    self._check_names(step, _unpack_shapes(arrays, meta['packed']), expected)
    targets = {
      name: _restore_target(expected.get(name), tuple(x.shape), x.dtype)
      for name, x in arrays.items()
    }
    arrays = self._manager.restore(
      step, args=ocp.args.Composite(life=ocp.args.StandardRestore(targets))
    )['life']
    leaves = unpack(arrays, meta['packed'])
    if meta['leaves'] != _leaves_digest(leaves, meta['not_addressable']):
      raise ValueError('its arrays differ from what was saved')
    flat = serialization.to_state_dict(template)
    values = {
      name: _place_like(leaves[name], leaf) if name in leaves else leaf
      for name, leaf in expected.items()
    }
    structure = jax.tree.structure(flat)
    return meta, jax.tree.unflatten(structure, list(values.values()))

  def _check_identity(self, step: int, meta: dict[str, Any]) -> None:
    if meta['format'] != FORMAT:
      reader = _READ_BY.get(meta['format'], 'the version that wrote it')
      raise config.ConfigError(
        f'{self._folder}/{step} has format {meta["format"]}, and this version '
        f'of the code reads format {FORMAT}. Use {reader}, or another '
        '--workdir.'
      )
    if meta['identity'] != self._identity:
      raise config.ConfigError(
        f'{self._folder}/{step} is of another config ({meta["identity"][:12]}; '
        f'this run is {self._identity[:12]}). Use another --workdir.'
      )
    if meta['base'] != self._base:
      has, needs = (x[:12] or 'none' for x in (meta['base'], self._base))
      raise config.ConfigError(
        f'{self._folder}/{step} is what a life changed of the base with digest '
        f'{has}, but this run has the base {needs}; bring back the weights '
        'that it began with, or use another --workdir.'
      )

  def _check_names(
    self, step: int, saved: Mapping[str, Any], expected: Mapping[str, Any]
  ) -> None:
    """Compares names, shapes and types of the saved leaves and the template."""
    needed = {
      k for k, x in expected.items() if np.size(x) and not self._is_base(k)
    }
    missing = needed - set(saved)
    for names, what in (
      (set(saved) - set(expected), 'which this learner does not have'),
      (missing, 'missing, which this learner needs'),
    ):
      if names:
        raise config.ConfigError(
          f'{self._folder}/{step} has {sorted(names)[0]} {what}; it is of '
          'another model, learner or version. Use another --workdir.'
        )
    for name, x in saved.items():
      has, needs = (tuple(x.shape), x.dtype), _shape_dtype(expected[name])
      if has != needs and not _RESIZABLE.search(name):
        raise config.ConfigError(
          f'{self._folder}/{step}: {name} is {has[1]}{list(has[0])}, and this '
          f'model needs {needs[1]}{list(needs[0])}. Use another --workdir.'
        )

  def _set_aside(self, corrupt: list[int]) -> None:
    """Renames corrupt checkpoints, so that their steps can be saved again."""
    if not corrupt:
      return
    self._manager.close()
    if distributed.is_primary():
      for step in corrupt:
        target = self._folder / f'corrupt-{step}'
        shutil.rmtree(target, ignore_errors=True)
        (self._folder / str(step)).rename(target)
    distributed.barrier('corrupt checkpoints set aside')
    self._manager = self._open()

  def close(self) -> None:
    """Waits for the save in progress, and closes the manager.

    Raises:
      SaveError: if it failed.
    """
    self.wait()
    self._guarded(self._manager.close)


def save_life(
  folder: pathlib.Path, life: at.Tree, base: str = '', **notes: Any
) -> None:
  """Writes one life, without the leaves of a base that is named by digest.

  Args:
    folder: a new directory.
    life: what to write.
    base: see `Checkpoints`.
    **notes: JSON-serializable values that `load_life` returns.

  Raises:
    SaveError: if it could not be written; the folder may then be incomplete.
  """
  saved = Checkpoints(folder, _ONE_LIFE, base)
  saved.save(Snapshot(0, PHASES[-1], life, notes))
  saved.close()


def load_life(
  folder: pathlib.Path, template: at.Tree, base: str = ''
) -> tuple[at.Tree, dict[str, Any]]:
  """What `save_life` wrote: the life, and the notes.

  Args:
    folder: the directory.
    template: a life of the same shape; it holds the base's weights.
    base: their digest, as it was when the life was written.

  Raises:
    ConfigError: if there is no life in the folder, or it is another's.
  """
  if not folder.is_dir():
    raise config.ConfigError(f'{folder} does not exist; no life was saved.')
  saved = Checkpoints(folder, _ONE_LIFE, base)
  snapshot = saved.newest(template)
  saved.close()
  if snapshot is None:
    raise config.ConfigError(f'{folder} holds no life.')
  return snapshot.life, snapshot.notes


def saved_bytes(life: at.Tree, base: str = '') -> int:
  """Bytes of the arrays that a checkpoint of a life holds, uncompressed.

  Args:
    life: arrays, or their shapes alone.
    base: see `Checkpoints`; any text stands for a digest here.
  """
  return sum(
    math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
    for name, leaf in _leaf_names(life).items()
    if not (base and name.startswith(_BASE))
  )


def weights_digest(params: at.Params) -> str:
  """SHA-256 of weights: their names, types, shapes and bits.

  It is the same on any mesh; one leaf at a time is brought to the host.
  """
  return _leaves_digest(_leaf_names(params), [])


def _leaf_names(life: at.Tree) -> dict[str, Any]:
  flat = serialization.to_state_dict(life)
  return {
    jax.tree_util.keystr(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(flat)
  }


def _is_distributed(leaf: Any) -> bool:
  """Whether a leaf is placed on several devices."""
  return isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1


def _is_addressable(leaf: Any) -> bool:
  """Whether this process can read all of a leaf."""
  if not isinstance(leaf, jax.Array):
    return True
  return leaf.is_fully_addressable or leaf.is_fully_replicated


def _shape_dtype(leaf: Any) -> tuple[tuple[int, ...], np.dtype]:
  return tuple(leaf.shape), np.dtype(leaf.dtype)


def _to_host(leaf: Any) -> Any:
  # Copied, because the next phase may donate the buffer.
  return leaf if _is_distributed(leaf) else np.array(leaf)


def _restore_target(leaf: Any, shape: tuple[int, ...], dtype: np.dtype) -> Any:
  if not _is_distributed(leaf):
    return np.empty(shape, dtype)
  return jax.ShapeDtypeStruct(shape, dtype, sharding=leaf.sharding)


def _place_like(value: Any, leaf: Any) -> Any:
  if _is_distributed(leaf):
    return jax.device_put(value, leaf.sharding)
  # Uncommitted, as the leaves of a new life are: JAX may move them.
  return jnp.array(value) if isinstance(leaf, jax.Array) else value


def _pack(
  leaves: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, tuple[str, int, list[int]]]]:
  """Concatenates small leaves of one type into one array.

  Returns:
    The arrays to write by name; and for every packed leaf the name of its
    array, the index of its first element, and its shape.
  """
  arrays, packed = {}, {}
  flat_leaves = collections.defaultdict(list)
  for name, leaf in leaves.items():
    if _is_distributed(leaf) or leaf.nbytes >= _PACK_BELOW_BYTES:
      arrays[name] = leaf
      continue
    pack = f'small {leaf.dtype}'
    start = sum(x.size for x in flat_leaves[pack])
    packed[name] = (pack, start, list(leaf.shape))
    flat_leaves[pack].append(leaf.ravel())
  packs = {k: np.concatenate(x) for k, x in flat_leaves.items()}
  return arrays | packs, packed


def unpack(
  arrays: Mapping[str, Any], packed: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
  """The leaves of a life by name, from a checkpoint's arrays and metadata."""
  packs = {pack for pack, _, _ in packed.values()}
  leaves = {k: x for k, x in arrays.items() if k not in packs}
  for name, (pack, start, shape) in packed.items():
    flat = arrays[pack][start : start + math.prod(shape)]
    leaves[name] = flat.reshape(shape)
  return leaves


def _unpack_shapes(
  arrays: Mapping[str, Any], packed: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
  """`unpack` for arrays of which only shape and type are known."""
  packs = {pack for pack, _, _ in packed.values()}
  return {k: x for k, x in arrays.items() if k not in packs} | {
    name: jax.ShapeDtypeStruct(shape, arrays[pack].dtype)
    for name, (pack, _, shape) in packed.items()
  }


def _meta_digest(meta: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _leaves_digest(leaves: dict[str, Any], excluded: list[str]) -> str:
  """SHA-256 of all leaves except the `excluded` ones.

  Orbax detects missing and truncated files, but not every flipped bit.
  """
  digest = hashlib.sha256()
  for name in sorted(set(leaves) - set(excluded)):
    leaf = leaves[name]
    digest.update(f'{name}{leaf.dtype}{leaf.shape}'.encode())
    for part in _blocks(leaf):
      digest.update(part.reshape(-1).view(np.uint8).data)
  return digest.hexdigest()


def _blocks(leaf: at.Array) -> Iterator[np.ndarray]:
  """A leaf on the host, in the order of its bits.

  One that spans several processes is brought to every device of theirs, so it
  comes a block at a time.
  """
  if _is_addressable(leaf):
    yield np.ascontiguousarray(leaf)
    return
  size = len(leaf)
  rows = max(1, _BLOCK_BYTES * size // leaf.nbytes)
  for start in range(0, size, rows):
    block = jax.lax.slice_in_dim(leaf, start, min(start + rows, size))
    yield np.ascontiguousarray(sharding.fetch(block))
