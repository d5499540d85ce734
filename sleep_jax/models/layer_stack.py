"""The layers of a decoder as runs of equal layers, each scanned or unrolled.

A plain model is one run, scanned over stacked weights. Under `partition` and
with a memory it is one scan per level, because the memory of one level differs
in shape from the next one's. A hybrid, and a model taken apart for a decode
loop, is one run per layer, unrolled: each layer has parameters of its own,
`block_0`, `block_1` and so on, in place of the stack.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from flax import linen as nn
import jax
import jax.numpy as jnp

from sleep_jax import config
from sleep_jax.models import block as block_lib
from sleep_jax.models import cms
from sleep_jax.models import layers as layers_lib
from sleep_jax.models.kernels import flash
from sleep_jax.models.mixers import base as mixers_base

Routes = tuple[jax.Array | None, ...]
_RunOutput = tuple[jax.Array, tuple[Any, Routes]]


class _Run(NamedTuple):
  """Equal layers that follow each other, and the levels they have part in."""

  layers: range
  levels: tuple[int, ...]


class LayerStack(nn.Module):
  """All blocks, from the embedded tokens to what the final norm reads.

  cfg: the model.
  per_layer: the memory is a tuple over layers, and so are the weights, see
    `inference.decoding`.
  """

  cfg: config.ModelConfig
  per_layer: bool = False

  @nn.compact
  def __call__(
    self,
    x: jax.Array,
    layers: block_lib.LayerInputs,
    inputs: mixers_base.MixerInputs,
    layer_range: range | None = None,
  ) -> tuple[jax.Array, Any, Routes]:
    """One pass over the layers.

    Args:
      x: `[B, T, D]`.
      layers: memory (`cms.per_layer_memory`), caches
        (`cache.init_layer_caches`) and adapter of all layers.
      inputs: what the layers share.
      layer_range: the layers to apply, of a partition a whole number of levels;
        default all.

    Returns:
      `[B, T, D]`; the new caches, where layers outside `layer_range` keep
      theirs; and for every level its router logits `[L, B, T, S]` over the
      layers applied that have a part in it, None where it has no bank.

    Raises:
      config.ConfigError: an adapter for a hybrid.
    """
    c = self.cfg
    if self.per_layer or c.mixers:
      if layer_range is None:
        layer_range = range(c.layers)
      return self._unrolled(x, layers, inputs, layer_range)
    runs = self._runs(layers.memory is not None)
    step = self._scan_run if len(runs) == 1 else self._scan_indexed
    if layer_range is not None:
      runs = [run for run in runs if run.layers.start in layer_range]
    caches, routes = [], [[] for _ in c.levels]
    for run in runs:
      x, (cache, logits) = step(run, x, layers, inputs)
      caches.append(cache)
      for level, route in zip(run.levels, logits, strict=True):
        routes[level].append(route)
    return x, _join(_concatenate, caches), _routes(_concatenate, routes)

  def _runs(self, has_memory: bool) -> list[_Run]:
    """The runs of layers whose weights are stacked."""
    c = self.cfg
    if c.partition and has_memory:
      runs = [_Run(c.layers_of(i), (i,)) for i in range(len(c.levels))]
      return sorted(runs, key=lambda run: run.layers.start)
    return [_Run(range(c.layers), tuple(range(len(c.levels_per_block))))]

  def _block(self) -> type[block_lib.Block]:
    if self.cfg.remat:
      return nn.remat(
        block_lib.Block, prevent_cse=False, policy=_saved(self.cfg)
      )
    return block_lib.Block

  def _scan_run(
    self,
    run: _Run,
    x: jax.Array,
    layers: block_lib.LayerInputs,
    inputs: mixers_base.MixerInputs,
  ) -> _RunOutput:
    """All layers as one scan over stacked weights and memory."""
    c = self.cfg
    block = nn.scan(
      self._block(),
      variable_axes={'params': 0},
      split_rngs={'params': True},
      in_axes=(0, nn.broadcast),  # pyright: ignore[reportArgumentType] Stub: int.
      length=len(run.layers),
      unroll=min(c.unroll, len(run.layers)),
    )(c, c.levels_per_block, mixers_base.of_layers(c)[0], name='block')
    nn.share_scope(self, block)  # The stack's parameters are the block's.
    return block(x, layers, inputs)

  def _scan_indexed(
    self,
    run: _Run,
    x: jax.Array,
    layers: block_lib.LayerInputs,
    inputs: mixers_base.MixerInputs,
  ) -> _RunOutput:
    """Some of the layers as one scan.

    The weights stay one stack that the scan indexes: a slice of it would be a
    copy.
    """
    c, (i,) = self.cfg, run.levels
    stack = self.variables['params']
    block = block_lib.Block(
      c, (c.levels[i],), mixers_base.of_layers(c)[0], parent=None
    )

    def body(x: jax.Array, scanned: tuple[Any, ...]) -> _RunOutput:
      layer, level_memory, *rest = scanned
      params = jax.tree.map(
        lambda w: jax.lax.dynamic_index_in_dim(w, layer, keepdims=False), stack
      )
      inputs_of_layer = block_lib.LayerInputs((level_memory,), *rest)
      return layers_lib.apply(block, params, x, inputs_of_layer, inputs)

    if c.remat:
      body = jax.checkpoint(body, prevent_cse=False, policy=_saved(c))
    selected = slice(run.layers.start, run.layers.stop)
    rest = jax.tree.map(
      lambda leaf: leaf[selected], (layers.cache, layers.adapter)
    )
    return jax.lax.scan(
      body,
      x,
      (jnp.arange(c.layers)[selected], layers.memory[i], *rest),
      unroll=min(c.unroll, len(run.layers)),
    )

  def _unrolled(
    self,
    x: jax.Array,
    layers: block_lib.LayerInputs,
    inputs: mixers_base.MixerInputs,
    layer_range: range,
  ) -> tuple[jax.Array, tuple[Any, ...], Routes]:
    """Layer by layer, each with parameters `block_i` and buffers of its own."""
    c = self.cfg
    if layers.adapter is not None:
      raise config.ConfigError(
        f'model.mixers={c.mixers}: low-rank adapters are for models of '
        'attention alone; leave out dreaming, or the mixers.'
      )
    memory, caches = layers.memory, list(layers.cache)
    routes = [[] for _ in c.levels]
    for i in layer_range:
      layer_memory = None
      if memory is not None and self.per_layer:
        layer_memory = memory[i]
      elif memory is not None:
        layer_memory = cms.select_layer(memory, i)
      levels = c.levels_at(i)
      x, (caches[i], logits) = self._block()(
        c,
        tuple(c.levels[level] for level in levels),
        mixers_base.of_layers(c)[i],
        name=f'block_{i}',
      )(x, block_lib.LayerInputs(layer_memory, caches[i], None), inputs)
      for level, route in zip(levels, logits, strict=True):
        routes[level].append(route)
    return x, tuple(caches), _routes(_stack, routes)


def _saved(cfg: config.ModelConfig) -> Callable[..., bool] | None:
  """What rematerialisation does not compute again; None is everything."""
  if cfg.remat_saves == 'nothing':
    return None
  policies = jax.checkpoint_policies
  return policies.save_from_both_policies(
    policies.dots_with_no_batch_dims_saveable,
    policies.save_only_these_names(flash.RESIDUALS),
  )


def _concatenate(*parts: jax.Array) -> jax.Array:
  return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def _stack(*parts: jax.Array) -> jax.Array:
  return jnp.stack(parts)


def _join(join: Callable[..., jax.Array], parts: list[Any]) -> Any:
  """Trees of equal form as one; None where there is none."""
  return jax.tree.map(join, *parts) if parts else None


def _routes(
  join: Callable[..., jax.Array], routes: list[list[jax.Array | None]]
) -> Routes:
  return tuple(_join(join, parts) for parts in routes)
