"""Typed configs. A frozen dataclass is hashable, so it can key a `jax.jit`.

What a model is, is here; every other config stands beside the code it
configures.
"""

from sleep_jax.config.base import Bounds as Bounds
from sleep_jax.config.base import ConfigError as ConfigError
from sleep_jax.config.base import Count as Count
from sleep_jax.config.base import Fraction as Fraction
from sleep_jax.config.base import Margin as Margin
from sleep_jax.config.base import Positive as Positive
from sleep_jax.config.base import Settings as Settings
from sleep_jax.config.base import check_fields as check_fields
from sleep_jax.config.base import check_mapping as check_mapping
from sleep_jax.config.base import check_value as check_value
from sleep_jax.config.base import from_mapping as from_mapping
from sleep_jax.config.base import lookup as lookup
from sleep_jax.config.model import DTYPES as DTYPES
from sleep_jax.config.model import MIXERS_PACKAGE as MIXERS_PACKAGE
from sleep_jax.config.model import LevelConfig as LevelConfig
from sleep_jax.config.model import ModelConfig as ModelConfig
from sleep_jax.config.model import RecurrentConfig as RecurrentConfig
from sleep_jax.config.model import RopeScaling as RopeScaling
