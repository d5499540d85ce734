"""The decoder laid out for a decode loop: each layer's buffers on their own.

A slice of a stacked array is a copy. A loop over tokens that scans stacked
layers copies every weight and the whole cache for each token; with a buffer per
layer it only reads them, and writes one column in place.
"""

import functools

from flax import struct
import jax
import jax.numpy as jnp

from sleep_jax import config
from sleep_jax import typing as t
from sleep_jax.models import cms
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import transformer

Views = tuple[cms.LevelView, ...]


@struct.dataclass
class Unrolled:
  """Weights and memory of a model, layer by layer."""

  params: t.Params  # `block_0` and so on, in place of `blocks`.
  # Per layer, without fast changes; of a hybrid, as they are.
  views: tuple[Views | None, ...] | Views | None


def unroll(
  cfg: config.ModelConfig, params: t.Params, views: Views | None
) -> Unrolled:
  """Takes layers apart, in the type of the computation.

  Args:
    cfg: the model.
    params: backbone weights.
    views: `cms.views` of a memory. Fast changes are added to the weights here,
      once and not for each token.
  """
  if cfg.mixers:  # Its layers have their own buffers as it is.
    return Unrolled(params, views)
  blocks = dict(params['blocks'])
  if views is not None:
    for name, own, delta in _moved(cfg, views):
      blocks[name] = jax.tree.map(
        functools.partial(_add, own), blocks[name], delta
      )
    views = tuple(view.replace(delta=None) for view in views)

  def layer(tree: t.Tree, i: int) -> t.Tree:
    return jax.tree.map(lambda x: x[i], tree)

  def matrices(tree: t.Tree) -> t.Tree:  # Norms compute in float32.
    return jax.tree.map(
      lambda x: x.astype(cfg.dtype) if x.ndim > 1 else x, tree
    )

  def seen_by(i: int) -> Views | None:
    if views is None:
      return None
    spans = [cfg.layers_of(level) for level in range(len(views))]
    return tuple(
      layer(view, i - own.start) for view, own in zip(views, spans) if i in own
    )

  rest = {k: v for k, v in params.items() if k != 'blocks'}
  layers = range(cfg.layers)
  return Unrolled(
    params=rest
    | {'embed': matrices(params['embed'])}
    | {f'block_{i}': matrices(layer(blocks, i)) for i in layers},
    views=tuple(seen_by(i) for i in layers),
  )


def _moved(
  cfg: config.ModelConfig, views: Views
) -> list[tuple[str, range, t.Tree]]:
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


def fresh_cache(
  cfg: config.ModelConfig,
  rows: int,
  capacity: int,
  memory: memory_lib.Memory | None = None,
) -> transformer.Cache:
  """An empty cache of one buffer per layer, which a loop updates in place."""
  cache = transformer.fresh_cache(cfg, rows, capacity, memory)
  return cache.replace(k=tuple(cache.k), v=tuple(cache.v))


def decode(
  cfg: config.ModelConfig,
  model: Unrolled,
  tokens: t.Int[jax.Array, 'B T'],
  positions: t.Int[jax.Array, 'B T'],
  cache: transformer.Cache,
) -> tuple[jax.Array, transformer.Cache]:
  """Reads `tokens` after what the cache holds.

  Returns:
    The logits of the last column `[B, V]` (a sampler asks for no other), and
    the cache with the new columns.
  """
  out = transformer.Decoder(cfg, unrolled=True).apply(
    {'params': model.params}, tokens, model.views, positions, cache
  )
  return out.logits[:, -1], out.cache


def unroll_each(
  cfg: config.ModelConfig, params: t.Params, views: Views
) -> tuple[Unrolled, Unrolled]:
  """`unroll` for a memory per row: leaves of `views` are `[B, L, ...]`.

  Returns:
    The model, and which of its leaves have the row axis (0) and which all rows
    share (None), for `decode_each`. Only what memory changes is held per row.
  """
  moved = {name for name, _, _ in _moved(cfg, views)}
  shared = dict.fromkeys(k for k in params if k != 'blocks')
  block = {k: 0 if k in moved else None for k in params['blocks']}
  axes = Unrolled(
    params=shared | {f'block_{i}': block for i in range(cfg.layers)}, views=0
  )
  take = functools.partial(unroll, cfg, params)
  return jax.vmap(take, out_axes=axes)(views), axes


def decode_each(
  cfg: config.ModelConfig,
  model: Unrolled,
  axes: Unrolled,
  tokens: t.Int[jax.Array, 'B T'],
  positions: t.Int[jax.Array, 'B T'],
  cache: transformer.Cache,
) -> tuple[jax.Array, transformer.Cache]:
  """`decode` of a model that differs per row, see `unroll_each`."""
  columns = transformer.Cache(k=0, v=0, positions=0, next=None)

  def one(model, tokens, positions, cache):
    cache = jax.tree.map(lambda x: x[None] if x.ndim else x, cache)
    logits, cache = decode(cfg, model, tokens[None], positions[None], cache)
    cache = jax.tree.map(lambda x: x[0] if x.ndim else x, cache)
    return logits[0], cache

  rows = jax.vmap(one, in_axes=(axes, 0, 0, columns), out_axes=(0, columns))
  return rows(model, tokens, positions, cache)
