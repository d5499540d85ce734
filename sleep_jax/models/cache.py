"""sleep_jax.models.cache."""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import positions as positions_lib
from sleep_jax.models.mixers import deltanet


@struct.dataclass
class Cache:
  """Keys and values of what was read; `next` is the first free column."""

  # Of the layers that attend; `decoding` and hybrids have a tuple over L.
  k: at.Float[jax.Array, 'L B K E C']
  v: at.Float[jax.Array, 'L B K C E']
  positions: at.Int[jax.Array, 'B C']
  next: at.Int[jax.Array, '']
  # Of the layers that recur; their size does not grow with what was read.
  states: tuple[deltanet.State, ...] = ()


def init_cache(
  cfg: config.ModelConfig,
  rows: int,
  capacity: int,
  memory: memory_lib.Memory | None = None,
) -> Cache:
  """An empty cache for `rows` rows of up to `capacity` tokens.

  The recurrent layers of a hybrid begin with what `memory` holds.
  """
  layers = cfg.layers_with(attention=True)
  shape = (len(layers), rows, cfg.num_kv_heads)
  k = jnp.zeros((*shape, cfg.resolved_head_dim, capacity), cfg.dtype)
  v = jnp.zeros((*shape, capacity, cfg.resolved_head_dim), cfg.dtype)
  return Cache(
    k=tuple(k) if cfg.mixers else k,
    v=tuple(v) if cfg.mixers else v,
    positions=jnp.full((rows, capacity), positions_lib.PAD_POSITION, jnp.int32),
    next=jnp.zeros((), jnp.int32),
    states=init_states(cfg, rows, broadcast_states(memory, rows)),
  )


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


def init_states(
  cfg: config.ModelConfig, rows: int, states: tuple[jax.Array, ...] = ()
) -> tuple[deltanet.State, ...]:
  """How the recurrent layers begin a window; without `states`, empty."""
  layers = cfg.layers_with(attention=False)
  fresh = [deltanet.init_state(cfg, cfg.mixer(i), rows) for i in layers]
  if not states:
    return tuple(fresh)
  return tuple(f.replace(s=s) for f, s in zip(fresh, states, strict=True))


def interleave(cfg: config.ModelConfig, attended, recurred) -> tuple[Any, ...]:
  """One entry a layer, from those of either kind in their order."""
  kinds = {'attention': iter(attended)}
  recurred = iter(recurred)
  return tuple(
    next(kinds.get(cfg.mixer(i), recurred)) for i in range(cfg.layers)
  )


def split_by_mixer(cfg: config.ModelConfig, pasts: tuple[Any, ...]):
  """`by_layer` undone: keys and values if they were kept, and states."""
  attended = [pasts[i] for i in cfg.layers_with(attention=True)]
  k, v = tuple(zip(*filter(None, attended))) or ((), ())
  return k, v, tuple(pasts[i] for i in cfg.layers_with(attention=False))
