"""What one transfer hands to seeding: who teaches what, and where it goes."""

import dataclasses

from flax import struct
import jax
import jax.numpy as jnp

from sleep_jax import array_typing as at
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import tokenizers
from sleep_jax.lifecycle import archive as archive_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import replay as replay_lib
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import model as model_lib
from sleep_jax.models import transformer


class SlotId(at.Pytree):
  """Where an expert is: a level (0 = fastest, static), a slot of its bank."""

  level: int = struct.field(pytree_node=False)
  slot: int | jax.Array

  def get(self, model: model_lib.Model) -> memory_lib.Expert:
    """The expert there."""
    return model.bank(self.level).expert(self.slot)

  def put(
    self, model: model_lib.Model, expert: memory_lib.Expert
  ) -> model_lib.Model:
    """The model with `expert` there."""
    bank = model.bank(self.level).with_expert(self.slot, expert)
    return model.with_level(self.level, bank=bank)

  def activate(self, model: model_lib.Model) -> model_lib.Model:
    """The model with the slot routed as it will be when in force.

    So that what the expert learns, and what it displaces, is what the next day
    finds.
    """
    bank = model.bank(self.level).set_status(self.slot, memory_lib.ACTIVE)
    return model.with_level(self.level, bank=bank)

  def gate_logits(
    self, out: transformer.Output
  ) -> at.Float[jax.Array, 'L B T'] | None:
    """The logits of the expert's gate."""
    return jnp.take(out.router_logits(self.level), self.slot, axis=-1)


class WholeBank(SlotId):
  """A new expert and all that are in force beside it; the gate is its own."""

  def get(self, model: model_lib.Model) -> memory_lib.Expert:
    """The experts of all slots and layers, as those of one slot of L S."""
    experts = model.bank(self.level).experts
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), experts)

  def put(
    self, model: model_lib.Model, expert: memory_lib.Expert
  ) -> model_lib.Model:
    """The model with the trained experts, where slots are in force."""
    bank = model.bank(self.level)
    active = bank.status == memory_lib.ACTIVE

    def merged(old: jax.Array, new: jax.Array) -> jax.Array:
      where = active.reshape(1, -1, *[1] * (old.ndim - 2))
      return jnp.where(where, new.reshape(old.shape), old)

    experts = jax.tree.map(merged, bank.experts, expert)
    return model.with_level(self.level, bank=bank.replace(experts=experts))


class DenseBase(at.Pytree):
  """The dense base of a level (0 = fastest, static), which always runs."""

  level: int = struct.field(pytree_node=False)

  def get(self, model: model_lib.Model) -> at.Tree:
    """The change that folding has made to it so far.

    Raises:
      ValueError: if that level does not fold.
    """
    folded = model.required_memory().levels[self.level].folded
    if folded is None:
      raise ValueError(f'Level {self.level + 1} does not fold.')
    return folded

  def put(self, model: model_lib.Model, change: at.Tree) -> model_lib.Model:
    """The model with `change` there."""
    return model.with_level(self.level, folded=change)

  def activate(self, model: model_lib.Model) -> model_lib.Model:
    """The model itself."""
    return model

  def gate_logits(self, out: transformer.Output) -> None:
    """None: it has no gate."""
    del out


# What a job trains: one expert, all of a bank, or a level's dense base.
Target = SlotId | WholeBank | DenseBase


@dataclasses.dataclass(frozen=True)
class SeedingJob:
  """Who teaches, by what settings, and what learns.

  cfg: the settings.
  teachers: never changed.
  target: what to train.
  nights: how many nights the previous model stands for.
  tokenizer: tells where rows, and their segments, begin and end.
  costs: where tokens, FLOPs and seconds are written down.
  frames: of the documents that the life has read.
  archive: dreams of earlier nights to rehearse beside D, if any are kept.
  """

  cfg: consolidation_config.SeedingConfig
  teachers: replay_lib.Teachers
  target: Target
  nights: int
  tokenizer: tokenizers.Tokenizer
  costs: costs_lib.CostTracker
  frames: tuple[experience_lib.Frame, ...] = ()
  archive: archive_lib.Archive | None = None
