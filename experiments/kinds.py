"""What a config is about: a life lived, or a puzzle learnt."""

import types

from experiments import puzzles
from sleep_jax.harness import build as build_lib
from sleep_jax.harness import live as live_lib


def of(c: build_lib.Settings) -> types.ModuleType:
  """The module that builds, lives and tells what `c` describes."""
  return puzzles if 'puzzle' in c else live_lib
