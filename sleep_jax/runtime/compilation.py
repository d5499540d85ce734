"""The persistent cache of compiled XLA programs."""

import os
import pathlib

from absl import logging
import jax

_DEFAULT_CACHE = '~/.cache/sleep_jax/xla'


def folder() -> pathlib.Path:
  """`$JAX_COMPILATION_CACHE_DIR` if set, else `~/.cache/sleep_jax/xla`."""
  path = os.environ.get('JAX_COMPILATION_CACHE_DIR')
  return pathlib.Path(path or _DEFAULT_CACHE).expanduser()


def enable_cache() -> None:
  """Turns JAX's compilation cache on for this process.

  Programs that compile in less than 0.5 s are not cached.
  """
  logging.set_verbosity(logging.WARNING)
  jax.config.update('jax_compilation_cache_dir', str(folder()))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
