"""Lives on disk: an orbax checkpoint after every phase of every night.

A night's phases are functions of the life alone, its key included. A life that
is begun anew at the last phase that was saved ends as one that never stopped.
"""

import collections
from collections.abc import Callable, Mapping, Sequence
import dataclasses
import hashlib
import json
import math
import pathlib
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
FORMAT = 3  # Raised whenever older checkpoints can no longer be read.
_KEEP = 2
# Bytes below which leaves share an array. Of every array that is written,
# tensorstore (0.1.68 to 0.1.86 were tried) never frees its description.
_SMALL = 2**20


class SaveError(RuntimeError):
  """A checkpoint could not be written; the one before it is whole."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """A life just after `phase` of `night`.

  notes: what must be known beside it, such as figures of the night so far; of
    types that JSON knows.
  """

  night: int
  phase: str
  life: at.Tree
  notes: dict[str, Any]

  def __str__(self) -> str:
    return f'night {self.night} ({self.phase})'


class Checkpoints:
  """The checkpoints of one life; the newest two are kept.

  A save runs beside the next phase, and becomes visible only when it is whole.

  Args:
    folder: of this life alone.
    identity: names the config; a checkpoint of another one is refused.
  """

  def __init__(self, folder: pathlib.Path, identity: str):
    self._folder = folder.absolute()
    self._identity = identity
    self._lock = threading.Lock()
    self._manager = self._open()

  def _open(self) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
      self._folder,
      item_handlers={
        'life': ocp.StandardCheckpointHandler(),
        'meta': ocp.JsonCheckpointHandler(),
      },
      options=ocp.CheckpointManagerOptions(
        max_to_keep=_KEEP, cleanup_tmp_directories=True
      ),
    )

  def save(self, moment: Snapshot) -> None:
    """Saves in the background, once the save before has ended.

    Raises:
      SaveError: if this save cannot begin, or the one before has failed.
    """
    leaves = {
      name: _stored(leaf)
      for name, leaf in _leaf_names(moment.life).items()
      if np.size(leaf)  # The format knows no empty arrays; notes may be some.
    }
    meta = {
      'format': FORMAT,
      'identity': self._identity,
      'night': moment.night,
      'phase': moment.phase,
      'notes': moment.notes,
    }
    # No process sees all of a leaf that is sharded over several.
    meta['unseen'] = sorted(k for k, x in leaves.items() if not _visible(x))
    meta['leaves'] = _leaves_digest(leaves, meta['unseen'])
    arrays, meta['packed'] = _pack(leaves)
    meta['digest'] = _meta_digest(meta)
    distributed.check_agreement(meta['leaves'], str(moment))
    step = len(PHASES) * moment.night + PHASES.index(moment.phase)
    args = ocp.args.Composite(
      life=ocp.args.StandardSave(arrays), meta=ocp.args.JsonSave(meta)
    )
    self._guarded(lambda: self._manager.save(step, args=args, force=True))

  def finish(self) -> None:
    """Waits for the save under way.

    Raises:
      SaveError: if it failed.
    """
    self._guarded(self._manager.wait_until_finished)

  def _guarded(self, verb: Callable[[], Any]) -> None:
    # SIGTERM finishes a save from another thread.
    with self._lock:
      try:
        verb()
      except (OSError, ValueError, RuntimeError) as e:
        raise SaveError(
          f'{self._folder}: cannot save: {e}. The checkpoint before is whole; '
          'see to space and permissions, and run the same command again.'
        ) from e

  def newest(self, template: at.Tree) -> Snapshot | None:
    """The newest moment that is whole, or None if nothing was ever saved.

    A torn one is put aside as `torn-N`, with a warning.

    Args:
      template: a life of this config. Leaves come back where the template's
        are, on however many devices; a life's notes may differ in size.

    Raises:
      ConfigError: if checkpoints are of another config or version, or if there
        are some and none can be read.
    """
    torn = []
    for step in sorted(self._manager.all_steps(), reverse=True):
      try:
        meta, leaves = self._read(step, template)
      except config.ConfigError:
        raise
      except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        logging.error(
          'Checkpoint %s/%d is torn, and passed over: %s',
          self._folder,
          step,
          str(e).partition(' [tensorstore_spec')[0],
        )
        torn.append(step)
        continue
      self._put_aside(torn)
      life = serialization.from_state_dict(template, leaves)
      return Snapshot(meta['night'], meta['phase'], life, meta['notes'])
    if torn:
      raise config.ConfigError(
        f'{self._folder}: none of the checkpoints {sorted(torn)} can be read. '
        'Restore one from a copy, or, to begin this life again, delete its '
        'folder yourself.'
      )
    return None

  def _read(
    self, step: int, template: at.Tree
  ) -> tuple[dict[str, Any], at.Tree]:
    """One checkpoint's meta, and its life as a state dict."""
    json_args = ocp.args.Composite(meta=ocp.args.JsonRestore())
    meta = dict(self._manager.restore(step, args=json_args).meta)
    if meta.pop('digest') != _meta_digest(meta):
      raise ValueError('its meta data are not what was saved')
    self._check_identity(step, meta)
    arrays = dict(self._manager.item_metadata(step)['life'])
    wanted = _leaf_names(template)
    self._check_names(step, _described(arrays, meta['packed']), wanted)
    like = {
      name: _target(wanted.get(name), tuple(x.shape), x.dtype)
      for name, x in arrays.items()
    }
    arrays = self._manager.restore(
      step, args=ocp.args.Composite(life=ocp.args.StandardRestore(like))
    ).life
    leaves = unpack(arrays, meta['packed'])
    if meta['leaves'] != _leaves_digest(leaves, meta['unseen']):
      raise ValueError('its arrays are not what was saved')
    flat = serialization.to_state_dict(template)
    values = {
      name: _placed(leaves[name], leaf) if name in leaves else leaf
      for name, leaf in wanted.items()
    }
    structure = jax.tree.structure(flat)
    return meta, jax.tree.unflatten(structure, list(values.values()))

  def _check_identity(self, step: int, meta: dict[str, Any]) -> None:
    if meta['format'] != FORMAT:
      raise config.ConfigError(
        f'{self._folder}/{step} has format {meta["format"]}, and this version '
        f'of the code reads format {FORMAT}. Use the version that wrote it, or '
        'another --workdir.'
      )
    if meta['identity'] != self._identity:
      raise config.ConfigError(
        f'{self._folder}/{step} is of another config ({meta["identity"][:12]}; '
        f'this run is {self._identity[:12]}). Use another --workdir.'
      )

  def _check_names(self, step: int, saved, wanted: dict[str, Any]) -> None:
    lacking = {k for k, x in wanted.items() if np.size(x)} - set(saved)
    for names, what in (
      (set(saved) - set(wanted), 'which this learner does not have'),
      (lacking, 'missing, which this learner needs'),
    ):
      if names:
        raise config.ConfigError(
          f'{self._folder}/{step} has {sorted(names)[0]} {what}; it is of '
          'another model, learner or version. Use another --workdir.'
        )
    for name, x in saved.items():
      has, needs = (tuple(x.shape), x.dtype), _kind(wanted[name])
      if has != needs and not name.startswith("['notes']"):
        raise config.ConfigError(
          f'{self._folder}/{step}: {name} is {has[1]}{list(has[0])}, and this '
          f'model needs {needs[1]}{list(needs[0])}. Use another --workdir.'
        )

  def _put_aside(self, torn: list[int]) -> None:
    """Renames torn checkpoints, so that their steps can be saved again."""
    if not torn:
      return
    self._manager.close()
    if distributed.is_primary():
      for step in torn:
        aside = self._folder / f'torn-{step}'
        shutil.rmtree(aside, ignore_errors=True)
        (self._folder / str(step)).rename(aside)
    distributed.barrier('torn checkpoints put aside')
    self._manager = self._open()

  def close(self) -> None:
    """Waits for what is under way.

    Raises:
      SaveError: if it failed.
    """
    self.finish()
    self._manager.close()


def _leaf_names(life: at.Tree) -> dict[str, Any]:
  flat = serialization.to_state_dict(life)
  return {
    jax.tree_util.keystr(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(flat)
  }


def _is_distributed(leaf: Any) -> bool:
  """Whether a leaf has a place on several devices."""
  return isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1


def _visible(leaf: Any) -> bool:
  """Whether this process can read all of a leaf."""
  if not isinstance(leaf, jax.Array):
    return True
  return leaf.is_fully_addressable or leaf.is_fully_replicated


def _kind(leaf: Any) -> tuple[tuple[int, ...], np.dtype]:
  return tuple(leaf.shape), np.dtype(leaf.dtype)


def _stored(leaf: Any) -> Any:
  # A copy of our own: the next phase may donate the buffer.
  return leaf if _is_distributed(leaf) else np.array(leaf)


def _target(leaf: Any, shape: tuple[int, ...], dtype: np.dtype) -> Any:
  if not _is_distributed(leaf):
    return np.empty(shape, dtype)
  return jax.ShapeDtypeStruct(shape, dtype, sharding=leaf.sharding)


def _placed(value: Any, leaf: Any) -> Any:
  if _is_distributed(leaf):
    return jax.device_put(value, leaf.sharding)
  # Uncommitted, as a fresh life's leaves are: they go where they are needed.
  return jnp.array(value) if isinstance(leaf, jax.Array) else value


def _pack(
  leaves: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, tuple[str, int, list[int]]]]:
  """Small leaves of one type become one array.

  Returns:
    What is to be written, and of every packed leaf: in which array it is, from
    which element on, and its shape.
  """
  arrays, packed, parts = {}, {}, collections.defaultdict(list)
  for name, leaf in leaves.items():
    if _is_distributed(leaf) or leaf.nbytes >= _SMALL:
      arrays[name] = leaf
      continue
    pack = f'small {leaf.dtype}'
    start = sum(x.size for x in parts[pack])
    packed[name] = (pack, start, list(leaf.shape))
    parts[pack].append(leaf.ravel())
  return arrays | {k: np.concatenate(x) for k, x in parts.items()}, packed


def unpack(
  arrays: Mapping[str, Any], packed: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
  """The leaves of a life by name, from a checkpoint's arrays and meta data."""
  packs = {pack for pack, _, _ in packed.values()}
  leaves = {k: x for k, x in arrays.items() if k not in packs}
  for name, (pack, start, shape) in packed.items():
    flat = arrays[pack][start : start + math.prod(shape)]
    leaves[name] = flat.reshape(shape)
  return leaves


def _described(
  arrays: Mapping[str, Any], packed: Mapping[str, Sequence[Any]]
) -> dict[str, Any]:
  """`unpack` of what has shapes and types alone."""
  packs = {pack for pack, _, _ in packed.values()}
  return {k: x for k, x in arrays.items() if k not in packs} | {
    name: jax.ShapeDtypeStruct(shape, arrays[pack].dtype)
    for name, (pack, _, shape) in packed.items()
  }


def _meta_digest(meta: dict[str, Any]) -> str:
  return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _leaves_digest(leaves: dict[str, Any], unseen: list[str]) -> str:
  """SHA-256 of every leaf that one process can see.

  Orbax notices files that are missing or cut off, but not every flipped bit.
  """
  digest = hashlib.sha256()
  for name in sorted(set(leaves) - set(unseen)):
    # A leaf that was whole when it was saved may lie over processes now.
    whole = np.ascontiguousarray(sharding.fetch(leaves[name]))
    digest.update(f'{name}{whole.dtype}{whole.shape}'.encode())
    digest.update(whole.reshape(-1).view(np.uint8).data)
  return digest.hexdigest()
