"""What dreaming is made of, beside the life that dreams."""

import dataclasses

from sleep_jax.data import contexts
from sleep_jax.data import tokenizers
from sleep_jax.lifecycle.consolidation import config as consolidation_config
from sleep_jax.lifecycle.dreaming import config as dreaming_config
from sleep_jax.metrics import costs as costs_lib
from sleep_jax.models import lora as lora_lib


@dataclasses.dataclass(frozen=True)
class Dreamer:
  """Settings and tools of dreaming; with `cfg.enabled` false nothing dreams.

  cfg: a night's dreaming.
  lora, trial: an isolated instance, and how it is fine-tuned.
  replay: how documents are sampled for the retention check.
  format: what the dreams of the task mean.
  tokenizer: of the task.
  costs: where tokens, FLOPs and seconds are written down.
  """

  cfg: dreaming_config.DreamingConfig
  lora: lora_lib.LoraConfig
  trial: dreaming_config.TrialConfig
  replay: consolidation_config.SeedingConfig
  format: contexts.SelfEditFormat
  tokenizer: tokenizers.Tokenizer
  costs: costs_lib.CostTracker
