"""Memory: all that a life changes, as one explicit pytree.

The backbone's weights never change in here. Each level of the Continuum Memory
System owns a *fast* part (the change that Eq. 2 has made to its weights, with
the accumulator and optimizer state of the next change) and a *bank* of
low-rank experts (Sleep section 3), masked until unlocked. A bank has room for
the experts in use and at most as many again, since its empty slots are computed
too; it grows up to `LevelConfig.slots` (`Bank.grown`).

Every leaf that belongs to layers is stacked over those that have a part in its
level, `[L, ...]`: all of them, or under `partition` the level's own. A leading
axis over independent lives is added by `jax.vmap`, never here.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sleep_jax import array_typing as at
from sleep_jax import config

LOCKED, SEEDING, ACTIVE = 0, 1, 2  # Status of a slot.

# A slot under seeding must be on: a gate at zero would get no gradient.
_INIT_GATE_BIAS = 2.0


class Expert(at.Pytree):
  """Low-rank experts: `silu(x A) B`, gated by `sigmoid(x . router + bias)`.

  Leaves carry the layer axis, and in a bank the slot axis after it.
  """

  a: at.Float[jax.Array, 'L *S D R']
  b: at.Float[jax.Array, 'L *S R D']
  router: at.Float[jax.Array, 'L *S D']
  bias: at.Float[jax.Array, 'L *S']


class Bank(at.Pytree):
  """The experts of one level."""

  experts: Expert
  status: at.Int[jax.Array, 'S']
  # The night a slot was unlocked; -1 = never.
  created_night: at.Int[jax.Array, 'S']

  def expert(self, slot: jax.Array | int) -> Expert:
    """The expert in `slot`, leaves `[L, ...]`."""
    return jax.tree.map(lambda x: x[:, slot], self.experts)

  def with_expert(self, slot: jax.Array | int, expert: Expert) -> 'Bank':
    """This bank with `expert` in `slot`, every other leaf untouched."""
    return self.replace(
      experts=jax.tree.map(
        lambda x, e: x.at[:, slot].set(e), self.experts, expert
      )
    )

  def num_used(self) -> int:
    """How many slots are not locked."""
    return int((np.asarray(self.status) != LOCKED).sum())

  def free_slot(self) -> int | None:
    """The first locked slot, or None if the bank is full."""
    locked = np.flatnonzero(np.asarray(self.status) == LOCKED)
    return int(locked[0]) if len(locked) else None

  def required_free_slot(self) -> int:
    """The first locked slot.

    Raises:
      ValueError: if the bank is full.
    """
    slot = self.free_slot()
    if slot is None:
      raise ValueError(f'All {len(self.status)} slots are in use.')
    return slot

  def grown(self, slots: int) -> 'Bank':
    """This bank with room for `slots` experts; the new slots are locked."""
    more = slots - len(self.status)

    def pad(x: jax.Array, axis: int, fill: int = 0) -> jax.Array:
      width = [(0, more if i == axis else 0) for i in range(x.ndim)]
      return jnp.pad(x, width, constant_values=fill)

    return Bank(
      experts=jax.tree.map(lambda x: pad(x, 1), self.experts),
      status=pad(self.status, 0),
      created_night=pad(self.created_night, 0, fill=-1),
    )

  def trimmed(self) -> 'Bank':
    """This bank without what growing by doubling had not yet given it."""
    used = np.flatnonzero(np.asarray(self.status) != LOCKED)
    last = int(used[-1]) if len(used) else 0
    slots = min(1 << last.bit_length(), len(self.status))
    return Bank(
      experts=jax.tree.map(lambda x: x[:, :slots], self.experts),
      status=self.status[:slots],
      created_night=self.created_night[:slots],
    )

  def unlock(self, slot: int, night: jax.Array | int, rng: at.Key) -> 'Bank':
    """Draws a new expert into `slot` and sets its status to SEEDING.

    B is zero, so unlocking changes no logit (Sleep section 3, decision D).
    """
    a = self.experts.a[:, slot]
    expert = Expert(
      a=jax.random.normal(rng, a.shape) * a.shape[1] ** -0.5,
      b=jnp.zeros_like(self.experts.b[:, slot]),
      router=jnp.zeros_like(self.experts.router[:, slot]),
      bias=jnp.full_like(self.experts.bias[:, slot], _INIT_GATE_BIAS),
    )
    return self.with_expert(slot, expert).replace(
      status=self.status.at[slot].set(SEEDING),
      created_night=self.created_night.at[slot].set(night),
    )

  def set_status(self, slot: jax.Array | int, status: int) -> 'Bank':
    """This bank with the status of one slot changed."""
    return self.replace(status=self.status.at[slot].set(status))

  def prune(self) -> 'Bank':
    """Synaptic pruning: every slot locked and empty, its capacity free."""
    return jax.tree.map(jnp.zeros_like, self).replace(
      created_night=jnp.full_like(self.created_night, -1)
    )


class Fast(at.Pytree):
  """What Eq. 2 has done to one level's weights, and will do next.

  delta: change of its {gate, up, down}, stacked over layers; or, where it holds
    every weight (`LevelConfig.fast_weights`), {backbone: a tree like those}.
  """

  delta: at.Tree
  grads: at.Tree  # Sum of the gradients since the last update.
  chunks: at.Int[jax.Array, '']  # How many base chunks that sum holds.
  opt_state: Any

  @property
  def backbone_delta(self) -> at.Params | None:
    """The change of every weight; None where it is of the level's MLPs."""
    return self.delta.get('backbone')


class LevelMemory(at.Pytree):
  """One level: `fast` is None when it is frozen, `bank` when it has no slot.

  folded: change of {gate, up, down} by which the dense base has taken in what
    the experts knew; None where it never does (`LevelConfig.folds`).
  """

  fast: Fast | None
  bank: Bank | None
  folded: at.Tree | None = None

  def dense_change(self) -> at.Tree | None:
    """What is added to the level's MLPs: fast and folded; None is nothing."""
    if self.fast is None or self.fast.backbone_delta is not None:
      return self.folded
    if self.folded is None:
      return self.fast.delta
    return jax.tree.map(jnp.add, self.fast.delta, self.folded)


class Memory(at.Pytree):
  """All fast and grown state of a life; levels run from fast to slow."""

  levels: tuple[LevelMemory, ...]
  # What recurrent mixers hold of evicted windows, by layer: [H, K, V] each.
  states: tuple[jax.Array, ...] = ()

  def backbone_delta(self) -> at.Params | None:
    """The fast change of every weight, if a level holds one."""
    for level in self.levels:
      if level.fast and level.fast.backbone_delta is not None:
        return level.fast.backbone_delta
    return None

  def deltas(self) -> tuple[at.Tree | None, ...]:
    """The fast change of every level."""
    return tuple(l.fast.delta if l.fast else None for l in self.levels)

  def with_deltas(self, deltas: tuple[at.Tree | None, ...]) -> 'Memory':
    """This memory with other fast changes; None leaves a level as it is."""
    return self.replace(
      levels=tuple(
        l if d is None else l.replace(fast=self.fast(i).replace(delta=d))
        for i, (l, d) in enumerate(zip(self.levels, deltas, strict=True))
      )
    )

  def fast_state(self) -> at.Tree:
    """All that a night transfers or resets: fast changes and states."""
    return self.deltas(), self.states

  def with_fast_state(self, fast: at.Tree) -> 'Memory':
    """This memory with the `fast_state` of another."""
    deltas, states = fast
    return self.with_deltas(deltas).replace(states=states)

  def fast(self, level: int) -> Fast:
    """The fast part of level number `level` (0 = fastest).

    Raises:
      ValueError: if that level is frozen.
    """
    fast = self.levels[level].fast
    if fast is None:
      raise ValueError(f'Level {level + 1} is frozen.')
    return fast

  def bank(self, level: int) -> Bank:
    """The experts of level number `level` (0 = fastest).

    Raises:
      ValueError: if that level has no slots.
    """
    bank = self.levels[level].bank
    if bank is None:
      raise ValueError(f'Level {level + 1} has no slots.')
    return bank

  def with_all_slots(self, cfg: config.ModelConfig) -> 'Memory':
    """This memory with banks of all slots that they may ever have."""
    return self.replace(
      levels=tuple(
        l.replace(bank=l.bank.grown(level.slots)) if l.bank else l
        for l, level in zip(self.levels, cfg.levels, strict=True)
      )
    )

  def trimmed(self) -> 'Memory':
    """This memory with banks that have room for little more than they hold."""
    return self.replace(
      levels=tuple(
        l.replace(bank=l.bank.trimmed()) if l.bank else l for l in self.levels
      )
    )

  def with_level(self, index: int, **changes: Any) -> 'Memory':
    """The same memory with parts of one level replaced."""
    levels = list(self.levels)
    levels[index] = levels[index].replace(**changes)
    return self.replace(levels=tuple(levels))


def level_optimizer(level: config.LevelConfig) -> optax.GradientTransformation:
  """f(.) of Eq. 2 with its learning rate.

  Weight decay acts on the fast change alone, so it pulls a level back to its
  backbone weights.
  """
  scale = config.lookup(
    level.optimizer,
    {
      'sgd': optax.identity(),
      'momentum': optax.trace(0.9),
      'adam': optax.scale_by_adam(b2=0.99),
    },
    'model.levels[].optimizer',
  )
  return optax.chain(
    optax.clip_by_global_norm(level.clip),
    scale,
    optax.add_decayed_weights(level.weight_decay),
    optax.scale_by_learning_rate(level.learning_rate),
  )


def of_states(cfg: config.ModelConfig, states: tuple[jax.Array, ...]) -> Memory:
  """A memory of recurrent states alone: no level has a fast part or slots.

  Args:
    cfg: the model.
    states: of its recurrent layers, [H, K, V] each, or [B, H, K, V] for a
      forward pass of B rows.
  """
  return Memory(tuple(LevelMemory(None, None) for _ in cfg.levels), states)


def with_backbone_delta(
  cfg: config.ModelConfig, params: at.Params, memory: Memory | None
) -> at.Params:
  """The weights as they run: with the fast change of all of them, if any.

  Sums are float32, rounded to the type of the computation if the weights have
  it. What no change is of, such as a halting head, is as it was.
  """
  delta = None if memory is None else memory.backbone_delta()
  return params if delta is None else _add(params, delta, jnp.dtype(cfg.dtype))


def _add(weights: at.Tree, delta: at.Tree, dtype: np.dtype) -> at.Tree:
  if isinstance(weights, Mapping):
    return {
      k: _add(w, delta[k], dtype) if k in delta else w
      for k, w in weights.items()
    }
  return (weights + delta).astype(jnp.promote_types(weights.dtype, dtype))
