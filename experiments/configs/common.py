"""What configs share."""

import dataclasses

import ml_collections

from sleep_jax import config
from sleep_jax.lifecycle.recurrence import config as recurrence_config
from sleep_jax.runtime import sharding


def settings(cls: type, **changes) -> ml_collections.ConfigDict:
  """All fields of a typed config, so that each can be overridden by flag."""
  return ml_collections.ConfigDict(dataclasses.asdict(cls(**changes)))


def experiment(name: str) -> ml_collections.ConfigDict:
  """What every experiment has; none of it changes what a life becomes."""
  c = ml_collections.ConfigDict()
  c.name = name
  c.workers = 2  # Lives at a time.
  c.writers = ()  # Beside JSON lines and TensorBoard: wandb, trackio.
  # Devices by mesh axis; all 1 is no mesh.
  c.mesh = ml_collections.ConfigDict(dict.fromkeys(sharding.MESH_AXES, 1))
  c.profile = ml_collections.ConfigDict(dict(steps=''))  # Such as 10:15.
  return c


def puzzle(name: str, **changes) -> ml_collections.ConfigDict:
  """What every experiment with a puzzle has."""
  c = experiment(name)
  c.puzzle = ml_collections.ConfigDict(dict(name=name, **changes))
  c.recurrence = settings(recurrence_config.RecurrenceConfig, remat=False)
  c.training = settings(recurrence_config.TrainingConfig)
  c.seeds = (1, 2, 3)
  return c


def hybrid(dim: int, layers: int, hidden: int, **changes):
  """Attention and Gated DeltaNet in turn, one feed-forward level."""
  return ml_collections.ConfigDict(
    dict(
      dim=dim,
      layers=layers,
      heads=4,
      levels=(settings(config.LevelConfig, hidden=hidden),),
      mixers=('attention', 'gdn'),
      recurrent=settings(config.RecurrentConfig),
    )
    | changes
  )


def vary(c: ml_collections.ConfigDict, variant: str, **variants) -> None:
  """Makes `c` the named variant of its experiment; '' leaves it as it is."""
  if variant:
    c.name = f'{c.name}_{variant}'
    config.lookup(variant, variants, 'variant')(c)
