"""The decoder laid out for a decode loop: each layer's buffers on their own.

A slice of a stacked array is a copy. A loop over tokens that scans stacked
layers copies every weight and the whole cache for each token; with a buffer per
layer it only reads them, and writes one column in place.
"""

import functools

from flax import struct
import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import cms
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import transformer

LayerMemories = tuple[cms.LayerMemory, ...]


@struct.dataclass
class PerLayerModel:
  """Weights and memory of a model, layer by layer."""

  params: at.Params  # `block_0` and so on, in place of `blocks`.
  # Per layer, without fast changes; of a hybrid, as they are.
  views: tuple[LayerMemories | None, ...] | LayerMemories | None


def unstack_layers(
  cfg: config.ModelConfig, params: at.Params, views: LayerMemories | None
) -> PerLayerModel:
  """Takes layers apart, in the type of the computation.

  Args:
    cfg: the model.
    params: backbone weights.
    views: `cms.views` of a memory. Fast changes are added to the weights here,
      once and not for each token.
  """
  if cfg.mixers:  # Its layers have their own buffers as it is.
    return PerLayerModel(params, views)
  blocks = dict(params['blocks'])
  if views is not None:
    for name, own, delta in _changed_weights(cfg, views):
      blocks[name] = jax.tree.map(
        functools.partial(_add, own), blocks[name], delta
      )
    views = tuple(view.replace(delta=None) for view in views)

  def layer(tree: at.Tree, i: int) -> at.Tree:
    return jax.tree.map(lambda x: x[i], tree)

  def matrices(tree: at.Tree) -> at.Tree:  # Norms compute in float32.
    return jax.tree.map(
      lambda x: x.astype(cfg.dtype) if x.ndim > 1 else x, tree
    )

  def seen_by(i: int) -> LayerMemories | None:
    if views is None:
      return None
    spans = [cfg.layers_of(level) for level in range(len(views))]
    return tuple(
      layer(view, i - own.start) for view, own in zip(views, spans) if i in own
    )

  rest = {k: v for k, v in params.items() if k != 'blocks'}
  layers = range(cfg.layers)
  return PerLayerModel(
    params=rest
    | {'embed': matrices(params['embed'])}
    | {f'block_{i}': matrices(layer(blocks, i)) for i in layers},
    views=tuple(seen_by(i) for i in layers),
  )


def _changed_weights(
  cfg: config.ModelConfig, views: LayerMemories
) -> list[tuple[str, range, at.Tree]]:
  """The fast changes there are: their weights' name, layers and value."""
  return [
    (f'level_{1 if cfg.partition else i + 1}', cfg.layers_of(i), view.delta)
    for i, view in enumerate(views)
    if view.delta is not None
  ]


def _add(own: range, weights: jax.Array, delta: jax.Array) -> jax.Array:
  """`weights` with `delta` added to the layers `own`, in the wider type."""
  wide = weights.astype(jnp.result_type(weights, delta))
  return wide.at[own.start : own.stop].add(delta)


def init_decode_cache(
  cfg: config.ModelConfig,
  rows: int,
  capacity: int,
  memory: memory_lib.Memory | None = None,
) -> cache_lib.Cache:
  """An empty cache of one buffer per layer, which a loop updates in place."""
  cache = cache_lib.init_cache(cfg, rows, capacity, memory)
  return cache.replace(k=tuple(cache.k), v=tuple(cache.v))


def decode(
  cfg: config.ModelConfig,
  model: PerLayerModel,
  tokens: at.Int[jax.Array, 'B T'],
  positions: at.Int[jax.Array, 'B T'],
  cache: cache_lib.Cache,
) -> tuple[jax.Array, cache_lib.Cache]:
  """Reads `tokens` after what the cache holds.

  Returns:
    The logits of the last column `[B, V]` (a sampler asks for no other), and
    the cache with the new columns.
  """
  out = transformer.Decoder(cfg, unrolled=True).apply(
    {'params': model.params}, tokens, model.views, positions, cache
  )
  return out.logits[:, -1], out.cache


def unstack_per_row(
  cfg: config.ModelConfig, params: at.Params, views: LayerMemories
) -> tuple[PerLayerModel, PerLayerModel]:
  """`unroll` for a memory per row: leaves of `views` are `[B, L, ...]`.

  Returns:
    The model, and which of its leaves have the row axis (0) and which all rows
    share (None), for `decode_each`. Only what memory changes is held per row.
  """
  moved = {name for name, _, _ in _changed_weights(cfg, views)}
  shared = dict.fromkeys(k for k in params if k != 'blocks')
  block = {k: 0 if k in moved else None for k in params['blocks']}
  axes = PerLayerModel(
    params=shared | {f'block_{i}': block for i in range(cfg.layers)}, views=0
  )
  take = functools.partial(unstack_layers, cfg, params)
  return jax.vmap(take, out_axes=axes)(views), axes


def decode_per_row(
  cfg: config.ModelConfig,
  model: PerLayerModel,
  axes: PerLayerModel,
  tokens: at.Int[jax.Array, 'B T'],
  positions: at.Int[jax.Array, 'B T'],
  cache: cache_lib.Cache,
) -> tuple[jax.Array, cache_lib.Cache]:
  """`decode` of a model that differs per row, see `unroll_each`."""
  columns = cache_lib.Cache(k=0, v=0, positions=0, next=None)

  def one(model, tokens, positions, cache):
    cache = jax.tree.map(lambda x: x[None] if x.ndim else x, cache)
    logits, cache = decode(cfg, model, tokens[None], positions[None], cache)
    cache = jax.tree.map(lambda x: x[0] if x.ndim else x, cache)
    return logits[0], cache

  rows = jax.vmap(one, in_axes=(axes, 0, 0, columns), out_axes=(0, columns))
  return rows(model, tokens, positions, cache)
