"""A stream in segments, with tokens of memory behind each of them.

For mixers that are `segmented`: the stack reads S tokens at a time, and behind
them M memory tokens, embeddings that are the same for every segment. They pass
through all layers, mixers and MLPs, leave in each layer's state what it keeps,
and are dropped. A segment depends on the earlier ones by these states alone, so
that to read the whole stack segment by segment is exact.

Segments are counted from the first token of a window, without padding. A piece
of a stream may begin and end within one; behind every piece stand the memory
tokens.
"""

from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from sleep_jax import config
from sleep_jax.models import block as block_lib
from sleep_jax.models import layer_stack
from sleep_jax.models import layers as layers_lib
from sleep_jax.models.mixers import base as mixers_base
from sleep_jax.models.mixers import slots as slots_lib

_Read = tuple[tuple[Any, ...], tuple[jax.Array, layer_stack.Routes]]


def stack(
  cfg: config.ModelConfig, per_layer: bool = False, name: str | None = None
) -> nn.Module:
  """The layers of any model, called as `LayerStack` is."""
  cls = SegmentedStack if cfg.segmented else layer_stack.LayerStack
  return cls(cfg, per_layer, name=name)


class SegmentedStack(nn.Module):
  """The layers of a model whose mixers are segmented; see `LayerStack`."""

  cfg: config.ModelConfig
  per_layer: bool = False

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    layers: block_lib.LayerInputs,
    inputs: mixers_base.MixerInputs,
    layer_range: range | None = None,
  ) -> tuple[jax.Array, tuple[Any, ...], layer_stack.Routes]:
    """One pass over the layers, always all of them; see `LayerStack`."""
    c, r = self.cfg, self.cfg.recurrent
    assert layer_range in (None, range(c.layers))
    memory = self.param(
      'memory_tokens', nn.initializers.normal(0.02), (r.memory, c.dim)
    )
    memory = memory.astype(x.dtype)
    inner = layer_stack.LayerStack(c, self.per_layer)
    nn.share_scope(self, inner)  # Its blocks are the model's.
    if self.is_initializing():
      return inner(*_piece(memory, x[:, :1], layers, inputs))
    weights = dict(self.variables['params'])
    inner = layer_stack.LayerStack(c, self.per_layer, parent=None)

    def read(caches: tuple[Any, ...], piece: tuple[jax.Array, ...]) -> _Read:
      x, real = piece
      args = _piece(
        memory,
        x,
        layers._replace(cache=caches),
        inputs._replace(token_mask=real > 0),
      )
      x, caches, routes = layers_lib.apply(inner, weights, *args)
      size = real.shape[1]
      routes = jax.tree.map(lambda logits: logits[:, :, :size], routes)
      return caches, (x[:, :size], routes)

    return _read_pieces(read, r.segment, x, layers.cache, inputs.token_mask)


def _piece(
  memory: jax.Array,
  x: jax.Array,
  layers: block_lib.LayerInputs,
  inputs: mixers_base.MixerInputs,
) -> tuple[jax.Array, block_lib.LayerInputs, mixers_base.MixerInputs]:
  """A piece of a segment with the memory tokens behind it.

  They are there for rows that have a token in it.
  """
  rows = len(x)
  x = jnp.concatenate([x, jnp.broadcast_to(memory, (rows, *memory.shape))], 1)
  real = inputs.token_mask[:, : x.shape[1] - len(memory)]
  behind = jnp.broadcast_to(real.any(1)[:, None], (rows, len(memory)))
  token_mask = jnp.concatenate([real, behind], axis=1)
  return x, layers, inputs._replace(token_mask=token_mask)


def _read_pieces(
  read: Any,
  segment: int,
  x: jax.Array,
  caches: tuple[Any, ...],
  token_mask: jax.Array,
) -> tuple[jax.Array, tuple[Any, ...], layer_stack.Routes]:
  """Segment by segment; one in which no row has a token costs nothing."""
  slots = slots_lib.of_pieces(caches[0].count, token_mask, segment)

  def split(x_BxTxX: jax.Array) -> jax.Array:
    return slots.split(x_BxTxX[:, None])[:, :, 0]

  pieces = split(x), split(token_mask.astype(jnp.float32)[..., None])[..., 0]
  shapes = jax.eval_shape(read, caches, jax.tree.map(lambda p: p[0], pieces))

  def skip(caches: tuple[Any, ...], piece: tuple[jax.Array, ...]) -> _Read:
    del piece
    return caches, jax.tree.map(
      lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes[1]
    )

  def step(caches: tuple[Any, ...], piece: tuple[jax.Array, ...]) -> _Read:
    return jax.lax.cond((piece[1] > 0).any(), read, skip, caches, piece)

  caches, (x, routes) = jax.lax.scan(step, caches, pieces)

  def join(y: jax.Array) -> jax.Array:
    """`[pieces, B, W, X]` to `[B, T, X]`."""
    return slots.join(y[:, :, None])[:, 0]

  # Of routes, the layers beside the entries of a token.
  routes = jax.tree.map(
    lambda logits: jax.vmap(join, in_axes=1)(logits), routes
  )
  return join(x), caches, routes
