"""A life on disk, whole: weights, memory, clock, key, tokenizer, settings.

It is a folder of `weights.folder`, so that all that reads a model reads this
too, with what makes the model's life beside it: `life.npz`, `life.json`, and
`source/`, the tokenizer's and the licence's files. The weights do not change in
a life. Where they came from such a folder they are linked, not copied, if the
file system allows it.
"""

from collections.abc import Mapping
import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import untrusted
from sleep_jax.lifecycle import archive as archive_lib
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.models import model as model_lib
from sleep_jax.runtime import tree_paths
from sleep_jax.weights import folder as folder_lib
from sleep_jax.weights.export import companions

FORMAT = 1
NOTES, ARRAYS, SOURCE = 'life.json', 'life.npz', companions.FOLDER
_SPARE = 1 << 20  # Bytes beside the arrays.


def is_life(path: pathlib.Path) -> bool:
  """Whether a life was saved at `path`."""
  return (path / NOTES).is_file()


def save(
  path: pathlib.Path,
  life: life_lib.Life,
  notes: Mapping[str, Any],
  *,
  weights: pathlib.Path | None = None,
  source: pathlib.Path | None = None,
) -> None:
  """Writes a life as a new folder.

  Args:
    path: where; nothing is overwritten, or left half-written.
    life: one whose weights are those of its base.
    notes: JSON values to give back by `load`.
    weights: a folder of this package with the same weights, to link.
    source: the folder of the tokenizer's files.

  Raises:
    ConfigError: if `path` exists, or the disk has no room for it.
  """
  model = life.model
  life = life.with_memory(life.memory.with_all_slots(model.cfg))
  linked = {}
  if weights is not None:
    names = tree_paths.leaf_paths({'params': model.params})
    files = {name: weights / f'{name}.npy' for name in names}
    linked = {name: file for name, file in files.items() if file.is_file()}
  with folder_lib.atomic_dir(path) as part:
    _check_space(part, life, linked)
    for name, file in linked.items():
      _link(file, part / f'{name}.npy')
    folder_lib.fill(part, model.cfg, model.params, life.memory)
    arrays: dict[str, Any] = _arrays(life)
    np.savez(part / ARRAYS, **arrays)
    if source is not None and source.is_dir():
      companions.copy(source, part / SOURCE)
    notes = {'format': FORMAT, 'frames': life.frames, **notes}
    text = json.dumps(notes, indent=1)
    (part / NOTES).write_text(text, encoding='utf-8')


def load(path: pathlib.Path) -> tuple[life_lib.Life, dict[str, Any]]:
  """A life and its notes.

  Raises:
    ConfigError: naming the file that is missing, broken, or does not match the
      others.
  """
  saved = folder_lib.load(path)
  notes = untrusted.read_json(path / NOTES)
  if notes.get('format') != FORMAT:
    raise config.ConfigError(
      f'{path} has format {notes.get("format")!r}, and this version reads '
      f'format {FORMAT}; use the version that wrote it.'
    )
  if saved.memory is None:
    raise config.ConfigError(f'{path} holds no memory; save the life again.')
  file = untrusted.member(path, ARRAYS)
  arrays = untrusted.read_npz(file)
  model = model_lib.Model(
    saved.cfg, jax.tree.map(jnp.asarray, saved.params), saved.memory
  )
  own = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
  own = {'rng': own, 'clock': jax.ShapeDtypeStruct((3,), jnp.int32)}
  own = _restored(arrays, own, '', file)
  life = life_lib.init_life(model, jax.random.wrap_key_data(own['rng']))
  life = life.with_memory(saved.memory.trimmed())
  return life.replace(
    clock=life_lib.Clock(*own['clock']),
    fast_at_wake=_fast_at_wake(life, arrays, file),
    archive=_archive(arrays, saved.cfg.vocab, file),
    frames=_frames(notes.get('frames'), saved.cfg.vocab, path / NOTES),
  ), notes


def with_slots(life: life_lib.Life, level: int, slots: int) -> life_lib.Life:
  """The same life with room for more experts in one level (0 = fastest).

  Raises:
    ConfigError: if it has more slots already.
  """
  cfg = life.model.cfg
  if slots < cfg.levels[level].slots:
    raise config.ConfigError(
      f'slots={slots}: this life has {cfg.levels[level].slots} slots; it can '
      'have more, not fewer.'
    )
  levels = list(cfg.levels)
  levels[level] = dataclasses.replace(levels[level], slots=slots, top_k=slots)
  cfg = dataclasses.replace(cfg, levels=tuple(levels))
  return life.replace(model=life.model.replace(cfg=cfg))


def _arrays(life: life_lib.Life) -> dict[str, np.ndarray]:
  """What a life is beside its model, by name."""
  clock = life.clock
  arrays = {
    'rng': np.asarray(jax.random.key_data(life.rng)),
    'clock': np.array(
      [clock.tokens, clock.tokens_at_last_sleep, clock.nights], np.int32
    ),
  }
  # Between a night and the next day the two are the same.
  if int(clock.tokens) != int(clock.tokens_at_last_sleep):
    for name, leaf in tree_paths.leaf_paths(life.fast_at_wake).items():
      arrays[f'fast_at_wake.{name}'] = np.asarray(leaf)
  for name, leaf in tree_paths.leaf_paths(life.archive).items():
    arrays[f'archive.{name}'] = np.asarray(leaf)
  return arrays


def _restored(
  arrays: Mapping[str, np.ndarray],
  template: at.Tree,
  prefix: str,
  file: pathlib.Path,
) -> at.Tree:
  """The tree of these shapes and types, from its leaves by name."""
  values = []
  for name, leaf in tree_paths.leaf_paths(template).items():
    where = f'{file}: {prefix}{name}'
    if f'{prefix}{name}' not in arrays:
      raise config.ConfigError(f'{where} is missing; save the life again.')
    array = arrays[f'{prefix}{name}']
    folder_lib.check(array, leaf.shape, leaf.dtype, where)
    values.append(jnp.asarray(array))
  return jax.tree.unflatten(jax.tree.structure(template), values)


def _archive(
  arrays: Mapping[str, np.ndarray], vocab: int, file: pathlib.Path
) -> archive_lib.Archive | None:
  prefix = 'archive.'
  if not any(name.startswith(prefix) for name in arrays):
    return None
  best = arrays.get(f'{prefix}teacher.tokens', np.zeros(0))
  if best.ndim != 3:
    raise config.ConfigError(f'{file}: {prefix}teacher.tokens is no [N, T, K].')
  rows, length, top_k = best.shape
  template = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype),
    archive_lib.empty(length, top_k),
  )
  archive = _restored(arrays, template, prefix, file)
  for tokens in (archive.tokens, archive.teacher.tokens):
    if tokens.size and not 0 <= tokens.min() <= tokens.max() < vocab:
      raise config.ConfigError(f'{file}: its archive has ids beyond {vocab}.')
  return archive


def _fast_at_wake(
  life: life_lib.Life, arrays: Mapping[str, np.ndarray], file: pathlib.Path
) -> at.Tree:
  fast, prefix = life.memory.fast_state(), 'fast_at_wake.'
  if not any(name.startswith(prefix) for name in arrays):
    return jax.tree.map(jnp.copy, fast)
  return _restored(arrays, fast, prefix, file)


def _frames(
  frames: Any, vocab: int, file: pathlib.Path
) -> tuple[experience_lib.Frame, ...]:
  """Frames as JSON has them, checked."""
  where = f'{file}: frames'
  config.check_value(tuple[tuple[Any, ...], ...], frames, where)
  for part in (part for frame in frames for part in frame):
    config.check_value(tuple[int, ...], part, where)
    if max(part, default=0) >= vocab:
      raise config.ConfigError(f'{where} has ids beyond {vocab}.')
  return tuple(tuple(map(tuple, frame)) for frame in frames)


def _check_space(
  part: pathlib.Path, life: life_lib.Life, linked: Mapping[str, pathlib.Path]
) -> None:
  """Refuses to begin what the disk cannot hold: a mapped file would crash."""
  leaves = tree_paths.leaf_paths(
    {
      'params': life.model.params,
      'memory': life.memory,
      'archive': life.archive,
    }
  )
  needed = _SPARE + sum(
    x.nbytes for name, x in leaves.items() if name not in linked
  )
  if (free := shutil.disk_usage(part).free) < needed:
    raise config.ConfigError(
      f'{part.parent} has {free / 1e6:.0f} MB free, and the model needs '
      f'{needed / 1e6:.0f} MB; free some, or name another output.'
    )


def _link(source: pathlib.Path, target: pathlib.Path) -> None:
  try:
    os.link(source, target)
  except OSError:  # Another file system, or one without links.
    shutil.copyfile(source, target)
