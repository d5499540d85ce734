"""Compiled programs are kept between runs."""

import pathlib

from absl import logging
import jax

_CACHE = pathlib.Path('~/.cache/sleep_jax/xla')


def keep() -> None:
  """Turns JAX's compilation cache on for this process."""
  logging.set_verbosity(logging.WARNING)
  jax.config.update('jax_compilation_cache_dir', str(_CACHE.expanduser()))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)
