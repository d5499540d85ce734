"""What a forward pass keeps of the tokens it has read, layer by layer."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import positions as positions_lib
from sleep_jax.models.mixers import base as mixers_base


class Cache(at.Pytree):
  """Columns of earlier tokens; `end_index` is the first free one.

  layers: the mixers' states, see `Mixer.init_state`. Of a plain model one,
    stacked over layers: keys `[L, B, K, E, C]` and values `[L, B, K, C, E]`.
    Of a hybrid, and for `inference.decoding`, a tuple over layers.
  """

  layers: Any
  positions: at.Int[jax.Array, 'B C']
  end_index: at.Int[jax.Array, '']


def init_cache(
  cfg: config.ModelConfig,
  rows: int,
  capacity: int,
  memory: memory_lib.Memory | None = None,
  *,
  per_layer: bool = False,
) -> Cache:
  """An empty cache for `rows` rows of up to `capacity` tokens.

  Args:
    cfg: the model.
    rows: B.
    capacity: C.
    memory: the recurrent layers of a hybrid begin with what it holds.
    per_layer: one buffer per layer, as hybrids have, for every model.
  """
  layers = [
    mixer.init_state(cfg, rows, capacity)
    for mixer in mixers_base.of_layers(cfg)
  ]
  if cfg.mixers:
    layers = with_states(cfg, layers, broadcast_states(memory, rows))
  elif not per_layer:
    layers = jax.tree.map(
      lambda x: jnp.broadcast_to(x, (cfg.layers, *x.shape)), layers[0]
    )
  return Cache(
    layers=tuple(layers),
    positions=jnp.full((rows, capacity), positions_lib.PAD_POSITION, jnp.int32),
    end_index=jnp.zeros((), jnp.int32),
  )


def broadcast(cache: Cache, rows: int, free: int) -> Cache:
  """The keys and values of one row for each of `rows` rows.

  Args:
    cache: of a model of attention alone, one buffer per layer, B = 1.
    rows: B of the result.
    free: columns to add, which hold nothing yet.
  """

  def widen(x: jax.Array, axis: int, fill: int = 0) -> jax.Array:
    extra = [(0, free if i == axis else 0) for i in range(x.ndim)]
    x = jnp.pad(x, extra, constant_values=fill)
    return jnp.broadcast_to(x, (rows, *x.shape[1:]))

  return cache.replace(
    layers=tuple((widen(k, 3), widen(v, 2)) for k, v in cache.layers),
    positions=widen(cache.positions, 1, positions_lib.PAD_POSITION),
  )


def stacked(cache: Cache) -> Cache:
  """A cache of one buffer per layer in the form that is stacked over layers."""
  return cache.replace(layers=jax.tree.map(_stack, *cache.layers))


def _stack(*layers: jax.Array) -> jax.Array:
  return jnp.stack(layers)


def broadcast_states(
  memory: memory_lib.Memory | None, rows: int
) -> tuple[jax.Array, ...]:
  """A memory's recurrent states for each of `rows` rows, [B, H, K, V].

  A life has one for all its rows; a memory may also hold one for each.
  """
  if memory is None:
    return ()
  return tuple(
    s if s.ndim == 4 else jnp.broadcast_to(s, (rows, *s.shape))
    for s in memory.states
  )


def init_layer_caches(
  cfg: config.ModelConfig, rows: int, states: tuple[jax.Array, ...] = ()
) -> tuple[Any, ...] | None:
  """The layers' caches of a forward pass that keeps no keys and values.

  Args:
    cfg: the model; None is returned if it is no hybrid.
    rows: B.
    states: what the recurrent layers begin with, [B, H, K, V] each; default
      the states of a layer that has read nothing.

  Returns:
    One entry a layer: None for one that attends, else the mixer's state.
  """
  if not cfg.mixers:
    return None
  caches = [
    mixer.init_state(cfg, rows, 0) if mixer.recurrent else None
    for mixer in mixers_base.of_layers(cfg)
  ]
  return with_states(cfg, caches, states)


def with_states(
  cfg: config.ModelConfig,
  layer_caches: Sequence[Any],
  states: tuple[jax.Array, ...],
) -> tuple[Any, ...]:
  """`layer_caches` whose recurrent layers go on from `states`, if given."""
  caches = list(layer_caches)
  if states:
    for i, s in zip(cfg.recurrent_layers, states, strict=True):
      caches[i] = caches[i].replace(s=s)
  return tuple(caches)


def with_kv_caches(
  cfg: config.ModelConfig, layer_caches: Sequence[Any], kv_caches: Sequence[Any]
) -> tuple[Any, ...]:
  """`layer_caches` with other keys and values in the layers that attend."""
  caches = list(layer_caches)
  for i, kv_cache in zip(cfg.attention_layers, kv_caches, strict=True):
    caches[i] = kv_cache
  return tuple(caches)


def recurrent_states(
  cfg: config.ModelConfig, layer_caches: Sequence[Any]
) -> tuple[jax.Array, ...]:
  """What the recurrent layers hold, [B, H, K, V] each."""
  return tuple(layer_caches[i].s for i in cfg.recurrent_layers)


def kv_caches(
  cfg: config.ModelConfig, layer_caches: Sequence[Any]
) -> tuple[Any, ...]:
  """Keys and values of the layers that attend; None where none are kept."""
  return tuple(layer_caches[i] for i in cfg.attention_layers)
