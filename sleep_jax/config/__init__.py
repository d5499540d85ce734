"""Typed configs. A frozen dataclass is hashable, so it can key a `jax.jit`."""

from sleep_jax.config.lifecycle import DreamingConfig as DreamingConfig
from sleep_jax.config.lifecycle import FinetuneConfig as FinetuneConfig
from sleep_jax.config.lifecycle import LoraConfig as LoraConfig
from sleep_jax.config.lifecycle import RecurrenceConfig as RecurrenceConfig
from sleep_jax.config.lifecycle import SeedingConfig as SeedingConfig
from sleep_jax.config.lifecycle import TrainingConfig as TrainingConfig
from sleep_jax.config.lifecycle import TrialConfig as TrialConfig
from sleep_jax.config.lifecycle import WakeConfig as WakeConfig
from sleep_jax.config.model import MIXERS as MIXERS
from sleep_jax.config.model import LevelConfig as LevelConfig
from sleep_jax.config.model import ModelConfig as ModelConfig
from sleep_jax.config.model import RecurrentConfig as RecurrentConfig
from sleep_jax.config.model import RopeScaling as RopeScaling
from sleep_jax.config.reading import ConfigError as ConfigError
from sleep_jax.config.reading import choose as choose
from sleep_jax.config.reading import from_mapping as from_mapping
