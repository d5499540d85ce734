"""A text that stands before many prompts is read once.

Its keys and values are copied to the rows of each batch of prompts. With N
prompts after a long text that is one pass over the text in place of N.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.inference import decoding
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import cms
from sleep_jax.models import model as model_lib
from sleep_jax.models import positions as positions_lib

_CHUNK = 512  # Tokens of a pass; scores of a long text in one would not fit.
_MULTIPLE = 64  # A shorter text is padded to it, so that few are compiled.
_BATCH_BYTES = 2**30  # Of the copies for one batch of prompts.


class Prefix(at.Pytree):
  """What a model keeps of a text.

  cache: of one row, one buffer per layer; it has no free column.
  length: tokens of the text, without padding.
  """

  cache: cache_lib.Cache
  length: at.Int[jax.Array, '']

  def broadcast(self, rows: int, free: int) -> cache_lib.Cache:
    """A cache per row, with `free` columns for what follows the text."""
    return cache_lib.broadcast(self.cache, rows, free)

  def batch_size(self, most: int) -> int:
    """How many prompts to process at once: a power of two up to `most`."""
    size = sum(x.nbytes for x in jax.tree.leaves(self.cache.layers))
    fitting = max(1, _BATCH_BYTES // max(1, size))
    return min(most, 1 << int(math.log2(fitting)))


def prefill(model: model_lib.Model, tokens: list[int], pad: int) -> Prefix:
  """Reads a text.

  Args:
    model: of attention alone and without adapter (`Model.merged`); its memory
      is used, not changed.
    tokens: of the text, BOS included.
    pad: the token that fills the first chunk.

  Raises:
    ConfigError: the text is empty, or longer than `model.max_len`; or the model
      is a hybrid, whose short convolution would read the padding of a prompt
      in place of the text's end.
  """
  if model.cfg.mixers:
    raise config.ConfigError(
      f'model.mixers={model.cfg.mixers}: a prefix is for models of attention '
      'alone; put the text before every prompt.'
    )
  if not 0 < len(tokens) <= model.cfg.max_len:
    raise config.ConfigError(
      f'A context of {len(tokens)} tokens must have at least 1, and at most '
      f'model.max_len={model.cfg.max_len}.'
    )
  chunk = min(_CHUNK, -(-len(tokens) // _MULTIPLE) * _MULTIPLE)
  chunks = -(-len(tokens) // chunk)
  padded = np.full((1, chunks * chunk), pad, np.int32)
  padded[0, -len(tokens) :] = tokens
  length = jnp.asarray(len(tokens), jnp.int32)
  return Prefix(_prefill(model, jnp.asarray(padded), length, chunk), length)


@functools.partial(jax.jit, static_argnums=3)
def _prefill(
  model: model_lib.Model, tokens_1xT: jax.Array, length: jax.Array, chunk: int
) -> cache_lib.Cache:
  """The cache after the text, which is right-aligned in whole chunks."""
  cfg, per_layer_memory = model.cfg, None
  if model.memory is not None:
    per_layer_memory = cms.per_layer_memory(model.memory)
  unstacked = decoding.unstack_layers(cfg, model.weights(), per_layer_memory)
  size = tokens_1xT.shape[1]
  positions = positions_lib.left_padded_positions(length[None], size)

  def read(cache, inputs):
    tokens, positions = inputs
    _, cache = decoding.decode(cfg, unstacked, tokens, positions, cache)
    return cache, None

  chunks = tuple(x.reshape(-1, 1, chunk) for x in (tokens_1xT, positions))
  cache = decoding.init_decode_cache(cfg, 1, size, model.memory)
  return jax.lax.scan(read, cache, chunks)[0]
