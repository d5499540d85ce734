"""Compiled programs are kept between runs."""

import os
import pathlib

from absl import logging
import jax

_CACHE = '~/.cache/sleep_jax/xla'


def folder() -> pathlib.Path:
  """`$JAX_COMPILATION_CACHE_DIR`, or else a folder of the user's cache."""
  named = os.environ.get('JAX_COMPILATION_CACHE_DIR')
  return pathlib.Path(named or _CACHE).expanduser()


def enable_cache() -> None:
  """Turns JAX's compilation cache on for this process."""
  logging.set_verbosity(logging.WARNING)
  jax.config.update('jax_compilation_cache_dir', str(folder()))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
