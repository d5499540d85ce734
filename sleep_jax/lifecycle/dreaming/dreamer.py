"""sleep_jax.lifecycle.dreaming.dreamer."""

import dataclasses

from sleep_jax import config
from sleep_jax.data import contexts
from sleep_jax.data import tokenizers
from sleep_jax.lifecycle import life as life_lib
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.dreaming import config as dreaming_config
from sleep_jax.lifecycle.dreaming import trials
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import lora


@dataclasses.dataclass(frozen=True)
class Dreamer:
  """What dreaming is made of; `how.enabled` false leaves a life as it is."""

  cfg: config.ModelConfig
  how: dreaming_config.DreamingConfig
  lora: lora.LoraConfig
  trial: dreaming_config.TrialConfig
  retention: (
    consolidation_config.SeedingConfig
  )  # How documents of the old self are drawn.
  format: contexts.SelfEditFormat
  tokenizer: tokenizers.Tokenizer
  costs: costs_lib.CostTracker

  def lab(self, life: life_lib.Life) -> trials.Lab:
    """Where instances of `life` are tried."""
    return trials.Lab(
      self.cfg,
      life.merged_params(),
      life.memory,
      self.lora,
      self.trial,
      self.format,
      self.tokenizer.pad,
      self.costs,
    )
