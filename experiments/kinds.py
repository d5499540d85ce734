"""What a config is about: a life lived, or a puzzle learnt."""

import types

from experiments import live
from experiments import puzzles


def of(c: live.Settings) -> types.ModuleType:
  """The module that builds, lives and tells what `c` describes."""
  return puzzles if 'puzzle' in c else live
