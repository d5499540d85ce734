"""The decoder in the layout of a decode loop: separate buffers per layer.

A slice of a stacked array is a copy. A loop over tokens that scans stacked
layers copies every weight and the whole cache for each token; with a buffer per
layer it only reads them, and writes one column in place.
"""

import functools

import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.models import cache as cache_lib
from sleep_jax.models import cms
from sleep_jax.models import layers as layers_lib
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import transformer

PerLayerMemory = cms.PerLayerMemory


class PerLayerModel(at.Pytree):
  """Weights and memory of a model, layer by layer."""

  params: at.Params  # `block_0` and so on, in place of `blocks`.
  # One entry a layer, a `cms.LayerMemory` for each level it has a part in; or
  # None. A hybrid's has the fast changes; elsewhere the weights have them.
  memory: at.Tree

  def select_rows(self, ids: jax.Array) -> 'PerLayerModel':
    """The model of the rows `ids` of a batch: some gates may be of a row."""
    if self.memory is None:
      return self
    memory = tuple(
      tuple(cms.select_rows(level, ids) for level in layer)
      for layer in self.memory
    )
    return self.replace(memory=memory)


def unstack_layers(
  cfg: config.ModelConfig,
  params: at.Params,
  per_layer_memory: PerLayerMemory | None,
) -> PerLayerModel:
  """Takes layers apart, in the type of the computation.

  Args:
    cfg: the model.
    params: backbone weights.
    per_layer_memory: `cms.per_layer_memory` of a memory. Fast changes are added
      to the weights here, once and not for each token. A hybrid's weights have
      a buffer per layer as they are, and are left so.
  """
  memory, layers = per_layer_memory, range(cfg.layers)
  if cfg.mixers:
    if memory is not None:
      memory = tuple(cms.select_layer(memory, i) for i in layers)
    return PerLayerModel(params, memory)
  blocks = dict(params['blocks'])
  if memory is not None:
    for name, level_layers, delta in _changed_weights(cfg, memory):
      blocks[name] = jax.tree.map(
        functools.partial(_add, level_layers), blocks[name], delta
      )
    memory = tuple(level.replace(delta=None) for level in memory)
    memory = tuple(_layer_memory(cfg, memory, i) for i in layers)
  rest = {k: v for k, v in params.items() if k != 'blocks'}
  return PerLayerModel(
    params=rest
    | {'embed': _cast_matrices(cfg, params['embed'])}
    | {f'block_{i}': _cast_matrices(cfg, _select(blocks, i)) for i in layers},
    memory=memory,
  )


def _select(tree: at.Tree, layer: int) -> at.Tree:
  return jax.tree.map(lambda x: x[layer], tree)


def _cast_matrices(cfg: config.ModelConfig, tree: at.Tree) -> at.Tree:
  """Matrices in the type of the computation; norms compute in float32."""
  return jax.tree.map(lambda x: x.astype(cfg.dtype) if x.ndim > 1 else x, tree)


def _layer_memory(
  cfg: config.ModelConfig, per_layer_memory: PerLayerMemory, layer: int
) -> tuple[cms.LayerMemory, ...]:
  """What one layer sees: each level is stacked over its own layers."""
  return tuple(
    _select(per_layer_memory[i], layer - cfg.layers_of(i).start)
    for i in cfg.levels_at(layer)
  )


def _changed_weights(
  cfg: config.ModelConfig, per_layer_memory: PerLayerMemory
) -> list[tuple[str, range, at.Tree]]:
  """The fast changes there are: their weights' name, layers and value."""
  return [
    (f'level_{1 if cfg.partition else i + 1}', cfg.layers_of(i), level.delta)
    for i, level in enumerate(per_layer_memory)
    if level.delta is not None
  ]


def _add(layers: range, weights: jax.Array, delta: jax.Array) -> jax.Array:
  """`weights` with `delta` added to `layers`, in the wider type."""
  wide = weights.astype(jnp.result_type(weights, delta))
  return wide.at[layers.start : layers.stop].add(delta)


def init_decode_cache(
  cfg: config.ModelConfig,
  rows: int,
  capacity: int,
  memory: memory_lib.Memory | None = None,
) -> cache_lib.Cache:
  """An empty cache of one buffer per layer, which a loop updates in place."""
  return cache_lib.init_cache(cfg, rows, capacity, memory, per_layer=True)


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
  decoder = transformer.Decoder(cfg, per_layer=True)
  out = layers_lib.apply(
    decoder, model.params, tokens, model.memory, positions, cache
  )
  return out.logits[:, -1], out.cache


def unstack_per_row(
  cfg: config.ModelConfig,
  params: at.Params,
  per_layer_memory: PerLayerMemory,
  memory: memory_lib.Memory,
) -> tuple[PerLayerModel, PerLayerModel]:
  """`unstack_layers` for a memory per row, whose leaves are `[B, L, ...]`.

  Args:
    cfg: the model.
    params: backbone weights, shared by the rows.
    per_layer_memory: `cms.per_layer_memory` of the memory.
    memory: of each row, leaves `[B, ...]`.

  Returns:
    The model, and which of its leaves have the row axis (0) and which all rows
    share (None), for `decode_per_row`. Only what memory changes is per row.
  """
  if cfg.updates_backbone:

    def unstack_row(memory: memory_lib.Memory, per_layer: PerLayerMemory):
      weights = memory_lib.with_backbone_delta(cfg, params, memory)
      return unstack_layers(cfg, weights, per_layer)

    model = jax.vmap(unstack_row)(memory, per_layer_memory)
    return model, PerLayerModel(dict.fromkeys(model.params, 0), memory=0)
  changed = {name for name, _, _ in _changed_weights(cfg, per_layer_memory)}
  shared = dict.fromkeys(k for k in params if k != 'blocks')
  block = {k: 0 if k in changed else None for k in params['blocks']}
  axes = PerLayerModel(
    params=shared | {f'block_{i}': block for i in range(cfg.layers)}, memory=0
  )
  unstack = functools.partial(unstack_layers, cfg, params)
  return jax.vmap(unstack, out_axes=axes)(per_layer_memory), axes


def decode_per_row(
  cfg: config.ModelConfig,
  model: PerLayerModel,
  axes: PerLayerModel,
  tokens: at.Int[jax.Array, 'B T'],
  positions: at.Int[jax.Array, 'B T'],
  cache: cache_lib.Cache,
) -> tuple[jax.Array, cache_lib.Cache]:
  """`decode` of a model that differs per row, see `unstack_per_row`."""
  cache_axes = cache.replace(layers=0, positions=0, end_index=None)

  def decode_row(
    model: PerLayerModel,
    tokens: jax.Array,
    positions: jax.Array,
    cache: cache_lib.Cache,
  ) -> tuple[jax.Array, cache_lib.Cache]:
    cache = jax.tree.map(lambda x: x[None] if x.ndim else x, cache)
    logits, cache = decode(cfg, model, tokens[None], positions[None], cache)
    cache = jax.tree.map(lambda x: x[0] if x.ndim else x, cache)
    return logits[0], cache

  decode_rows = jax.vmap(
    decode_row, in_axes=(axes, 0, 0, cache_axes), out_axes=(0, cache_axes)
  )
  return decode_rows(model, tokens, positions, cache)
