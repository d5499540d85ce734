"""The state of a life: one pytree, saved, restored and sharded as a whole."""

from typing import Any

from flax import struct
import jax
import jax.numpy as jnp

from sleep_jax import config
from sleep_jax import typing as t
from sleep_jax.data import contexts as contexts_lib
from sleep_jax.models import lora
from sleep_jax.models import memory as memory_lib


@struct.dataclass
class Clock:
  """Where a life stands."""

  tokens: t.Int[jax.Array, '']  # Read so far, per lane.
  rested: t.Int[jax.Array, '']  # `tokens` at the last awakening.
  nights: t.Int[jax.Array, '']


@struct.dataclass
class Life:
  """Everything that a life is.

  `rested` holds `memory.fast()` at the last awakening. Experts do not change
  while awake, so the *old self*, the model before this day, is `memory` with
  `rested` put in: it costs one copy of the fast weights.
  """

  params: t.Params
  memory: memory_lib.Memory
  rested: t.Tree
  clock: Clock
  rng: t.Key
  opt_state: Any  # Of a learner that trains `params`; else None.
  notes: Any  # What one kind of learner keeps: a context, a Fisher, a buffer.
  adapter: lora.Adapter | None = None  # Of a dreamer that keeps a LoRA.
  contexts: tuple[contexts_lib.Context, ...] = struct.field(
    pytree_node=False, default=()
  )

  def old_self(self) -> memory_lib.Memory:
    """The memory as it was before this day."""
    return self.memory.with_fast(self.rested)

  def backbone(self) -> t.Params:
    """The backbone as it thinks: with a LoRA of its own folded in."""
    if self.adapter is None:
      return self.params
    return lora.fold(self.params, self.adapter)


def born(
  cfg: config.ModelConfig,
  params: t.Params,
  rng: t.Key,
  *,
  opt_state: Any = None,
  notes: Any = None,
) -> Life:
  """A new life on a pretrained backbone."""
  memory = memory_lib.fresh_memory(cfg)
  return Life(
    params=params,
    memory=memory,
    rested=jax.tree.map(jnp.copy, memory.fast()),
    clock=Clock(*(jnp.zeros((), jnp.int32) for _ in range(3))),
    rng=rng,
    opt_state=opt_state,
    notes=notes,
  )
