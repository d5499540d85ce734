"""What one transfer hands to seeding: who teaches what, and where it goes."""

import dataclasses

from flax import struct
import jax

from sleep_jax import array_typing as at
from sleep_jax.data import experience as experience_lib
from sleep_jax.data import tokenizers
from sleep_jax.lifecycle import archive as archive_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.consolidation import replay as replay_lib
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import memory as memory_lib
from sleep_jax.models import model as model_lib


class SlotId(at.Pytree):
  """Where an expert is: a level (0 = fastest, static), a slot of its bank."""

  level: int = struct.field(pytree_node=False)
  slot: int | jax.Array

  def put(
    self, model: model_lib.Model, expert: memory_lib.Expert
  ) -> model_lib.Model:
    """The model with `expert` there."""
    bank = model.bank(self.level).with_expert(self.slot, expert)
    return model.with_level(self.level, bank=bank)


@dataclasses.dataclass(frozen=True)
class SeedingJob:
  """Who teaches, by what settings, and which expert learns.

  cfg: the settings.
  teachers: never changed.
  target: the expert to train.
  nights: how many nights the previous model stands for.
  tokenizer: tells where rows, and their segments, begin and end.
  costs: where tokens, FLOPs and seconds are written down.
  frames: of the documents that the life has read.
  archive: dreams of earlier nights to rehearse beside D, if any are kept.
  """

  cfg: consolidation_config.SeedingConfig
  teachers: replay_lib.Teachers
  target: SlotId
  nights: int
  tokenizer: tokenizers.Tokenizer
  costs: costs_lib.CostTracker
  frames: tuple[experience_lib.Frame, ...] = ()
  archive: archive_lib.Archive | None = None
