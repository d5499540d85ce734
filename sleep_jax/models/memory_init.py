"""The memory that a new life begins with: no change, all slots locked."""

import functools

import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import transformer
from sleep_jax.models.mixers import base as mixers_base


@functools.lru_cache
def weight_shapes(cfg: config.ModelConfig) -> at.Tree:
  """Shapes and types of the backbone's weights."""
  return jax.eval_shape(lambda: transformer.init(cfg, jax.random.key(0)))


def init_change(cfg: config.ModelConfig, level: int) -> dict[str, jax.Array]:
  """No change of a level's dense weights; new buffers at every call."""
  layers, hidden = cfg.num_layers(level), cfg.levels[level].hidden
  wide, back = (layers, cfg.dim, hidden), (layers, hidden, cfg.dim)
  return {k: jnp.zeros(wide) for k in ('gate', 'up')} | {
    'down': jnp.zeros(back)
  }


def init_delta(cfg: config.ModelConfig, level: int) -> dict[str, at.Tree]:
  """No change of what a level holds, see `memory.Fast.delta`."""
  if cfg.levels[level].fast_weights == 'mlp':
    return init_change(cfg, level)
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), weight_shapes(cfg))
  return {'backbone': zeros}


def init_fast(cfg: config.ModelConfig, level: int) -> memory_lib.Fast:
  """The fast part of level number `level` (0 = fastest) before any update."""
  optimizer = memory_lib.level_optimizer(cfg.levels[level])
  return memory_lib.Fast(
    delta=init_delta(cfg, level),
    grads=init_delta(cfg, level),
    chunks=jnp.zeros((), jnp.int32),
    opt_state=optimizer.init(init_delta(cfg, level)),
  )


def init_bank(
  cfg: config.ModelConfig, level: int, slots: int
) -> memory_lib.Bank:
  """So many slots of level number `level` (0 = fastest), locked."""
  l, d = cfg.num_layers(level), cfg.dim
  s, r = slots, cfg.levels[level].rank
  return memory_lib.Bank(
    experts=memory_lib.Expert(
      a=jnp.zeros((l, s, d, r)),
      b=jnp.zeros((l, s, r, d)),
      router=jnp.zeros((l, s, d)),
      bias=jnp.zeros((l, s)),
    ),
    status=jnp.zeros((s,), jnp.int32),
    created_night=jnp.full((s,), -1, jnp.int32),
  )


def init_recurrent_states(cfg: config.ModelConfig) -> tuple[jax.Array, ...]:
  """The fast weights of all recurrent mixers, empty."""
  mixers = mixers_base.of_layers(cfg)
  return tuple(
    mixers[i].init_state(cfg, 1, 0).s[0] for i in cfg.recurrent_layers
  )


def init_memory(
  cfg: config.ModelConfig, slots: int | None = None
) -> memory_lib.Memory:
  """The memory of a new life: all changes zero, all slots locked.

  Args:
    cfg: the model.
    slots: of each bank at most; None = all that it may ever have.
  """
  return memory_lib.Memory(
    states=init_recurrent_states(cfg),
    levels=tuple(
      memory_lib.LevelMemory(
        fast=init_fast(cfg, i) if level.chunk else None,
        bank=(
          init_bank(cfg, i, min(slots or level.slots, level.slots))
          if level.slots
          else None
        ),
        folded=init_change(cfg, i) if level.folds else None,
      )
      for i, level in enumerate(cfg.levels)
    ),
  )
