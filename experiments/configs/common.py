"""What configs share."""

import dataclasses

import ml_collections


def settings(cls: type, **changes) -> ml_collections.ConfigDict:
  """All fields of a typed config, so that each can be overridden by flag."""
  return ml_collections.ConfigDict(dataclasses.asdict(cls(**changes)))
