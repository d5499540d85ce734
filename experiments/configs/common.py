"""What configs share."""

import dataclasses

import ml_collections


def settings(cls: type, **changes) -> ml_collections.ConfigDict:
  """All fields of a typed config, so that each can be overridden by flag."""
  return ml_collections.ConfigDict(dataclasses.asdict(cls(**changes)))


def experiment(name: str) -> ml_collections.ConfigDict:
  """What every experiment has; none of it changes what a life becomes."""
  c = ml_collections.ConfigDict()
  c.name = name
  c.workers = 2  # Lives at a time.
  c.writers = ()  # Beside JSON lines and TensorBoard: wandb, trackio.
  c.profile = ml_collections.ConfigDict(dict(steps=''))  # Such as 10:15.
  return c
