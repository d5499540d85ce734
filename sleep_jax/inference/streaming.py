"""Reads a stream of any length in constant memory, piece by piece.

For models whose mixers all carry a state of constant size: what has been read
is that state, and the text is never held. A stream can be saved, gone on with
another day, and asked: `model_after` is the model with what was read as its
memory, whose prompts begin a new window.
"""

from collections.abc import Iterable, Iterator
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import tqdm

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import memory_init
from sleep_jax.models import model as model_lib
from sleep_jax.models import positions as positions_lib
from sleep_jax.runtime import files


class Stream(at.Pytree):
  """What is kept of B streams.

  layers: the mixers' states, see `Mixer.init_state`.
  tokens: how many each has.
  """

  layers: tuple[at.Tree, ...]
  tokens: at.Int[jax.Array, 'B']


def begin(model: model_lib.Model, rows: int) -> Stream:
  """Streams of which nothing is read; they begin with the model's states.

  Args:
    model: of mixers that carry a state of constant size.
    rows: B.

  Raises:
    ConfigError: a layer attends to all that was read.
  """
  cfg = model.cfg
  if not cfg.mixers or cfg.attention_layers:
    raise config.ConfigError(
      f'model.mixers={cfg.mixers}: attention keeps every token of a stream; '
      'use sliding_window or a recurrent mixer in each layer.'
    )
  cache = cache_lib.init_cache(cfg, rows, 0, model.memory)
  return Stream(cache.layers, jnp.zeros((rows,), jnp.int32))


def read(
  model: model_lib.Model,
  stream: Stream,
  pieces: Iterable[at.Int[np.ndarray, 'B _']],
  chunk: int = 1024,
  total: int | None = None,
) -> Stream:
  """The stream after more tokens.

  Args:
    model: who reads; its adapter is merged.
    stream: what was read before.
    pieces: token ids, any number at a time.
    chunk: tokens of a forward pass. The last may have fewer; what is kept does
      not depend on it.
    total: tokens that will come, for a progress bar; None = no bar.
  """
  bar = tqdm.tqdm(total=total, unit='token', disable=total is None)
  with bar:
    for tokens in _chunks(pieces, len(stream.tokens), chunk):
      stream = _read_chunk(model, stream, jnp.asarray(tokens))
      bar.update(tokens.shape[1])
  return stream


def model_after(model: model_lib.Model, stream: Stream) -> model_lib.Model:
  """The model with what the streams hold, as states of B rows."""
  memory = model.memory or memory_init.init_memory(model.cfg)
  states = cache_lib.recurrent_states(model.cfg, stream.layers)
  return model.with_memory(memory.replace(states=states))


def save(stream: Stream, path: pathlib.Path) -> None:
  """Writes a stream to an .npz, whole or not at all."""
  leaves = jax.device_get(jax.tree.leaves(stream))
  with files.atomic(path) as file:
    np.savez(file, *leaves)


def load(model: model_lib.Model, path: pathlib.Path) -> Stream:
  """The stream that `save` wrote.

  Raises:
    ConfigError: it is of another model, or no stream.
  """
  try:
    with np.load(path, allow_pickle=False) as file:
      leaves = [file[name] for name in file.files]
      rows = len(leaves[-1])
  except (OSError, ValueError, IndexError, TypeError) as e:
    raise config.ConfigError(f'{path} holds no stream: {e}') from e
  fresh = jax.eval_shape(functools.partial(begin, model, rows))
  want, structure = jax.tree.flatten(fresh)
  shapes = [(x.shape, x.dtype) for x in want]
  if [(x.shape, x.dtype) for x in leaves] != shapes:
    raise config.ConfigError(
      f'{path} holds the stream of another model: its arrays have shapes '
      f'{[x.shape for x in leaves]}, and not {[x.shape for x in want]}.'
    )
  return jax.tree.unflatten(structure, list(map(jnp.asarray, leaves)))


def _chunks(
  pieces: Iterable[np.ndarray], rows: int, chunk: int
) -> Iterator[np.ndarray]:
  """Tokens `[B, chunk]`, and at the end `[B, n]` for powers of two n.

  Not padded: a short convolution would read the padding.
  """
  held = np.zeros((rows, 0), np.int32)
  for piece in pieces:
    held = np.concatenate([held, piece], axis=1)
    while held.shape[1] >= chunk:
      yield held[:, :chunk]
      held = held[:, chunk:]
  while size := held.shape[1]:
    size = 1 << (size.bit_length() - 1)
    yield held[:, :size]
    held = held[:, size:]


@functools.partial(jax.jit, donate_argnums=1)
def _read_chunk(
  model: model_lib.Model, stream: Stream, tokens: jax.Array
) -> Stream:
  """One forward pass; nothing but states is computed."""
  rows, chunk = tokens.shape
  place = jnp.broadcast_to(jnp.arange(chunk), (rows, chunk))
  cache = cache_lib.Cache(
    layers=stream.layers,
    positions=jnp.full_like(place, positions_lib.PAD_POSITION),
    end_index=jnp.zeros((), jnp.int32),
  )
  out = model.forward(tokens, positions=place, cache=cache)
  assert out.cache is not None  # One was given.
  return Stream(out.cache.layers, stream.tokens + chunk)
