"""The persistent cache of compiled XLA programs."""

import gc
import os
import pathlib

from absl import logging
import jax

_DEFAULT_CACHE = '~/.cache/sleep_jax/xla'
_PROC = pathlib.Path('/proc')  # Of Linux; elsewhere there is no such limit.


def folder() -> pathlib.Path | None:
  """`$JAX_COMPILATION_CACHE_DIR` if set, else `~/.cache/sleep_jax/xla`.

  None for a user who has no home.
  """
  path = os.environ.get('JAX_COMPILATION_CACHE_DIR')
  try:
    return pathlib.Path(path or _DEFAULT_CACHE).expanduser()
  except RuntimeError:
    return None


def enable_cache() -> None:
  """Turns JAX's compilation cache on for this process.

  Programs that compile in less than 0.5 s are not cached.
  """
  logging.set_verbosity(logging.WARNING)
  if (cache := folder()) is not None:
    jax.config.update('jax_compilation_cache_dir', str(cache))
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.5)


def drop_programs_near_limit(proc: pathlib.Path = _PROC) -> bool:
  """Drops this process's compiled programs if it nears its memory maps' limit.

  Every program maps memory of its own, of which Linux grants a process
  65,530 by default; several lives with many programs reach that. What is
  dropped comes back from the persistent cache.

  Args:
    proc: where Linux tells the limit, and how many maps there are.

  Returns:
    Whether they were dropped.
  """
  maps, limit = proc / 'self/maps', proc / 'sys/vm/max_map_count'
  if not (maps.exists() and limit.exists()):
    return False
  with open(maps, encoding='utf-8', errors='replace') as lines:
    count = sum(1 for _ in lines)
  if count < int(limit.read_text(encoding='utf-8')) / 2:
    return False
  jax.clear_caches()
  gc.collect()
  return True
