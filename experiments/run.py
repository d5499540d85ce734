"""Runs an experiment: every arm of a config, over its seeds.

  python -m experiments.run --config=experiments/configs/quickstart.py

The same command resumes what was interrupted; --workdir names where it lives.
Exit codes: 0 done, 1 an error that the last line names, 143 ended by SIGTERM
with everything saved (docs/surviving.md). With --coordinator, --processes and
--process_id several processes live the same lives.
"""

import concurrent.futures
from concurrent.futures import process
import json
import multiprocessing
import os
import pathlib
import sys
from typing import Any

from absl import app
from absl import flags
from ml_collections import config_flags

from experiments import kinds
from experiments import live
from sleep_jax import config
from sleep_jax.runtime import checkpoint
from sleep_jax.runtime import compilation
from sleep_jax.runtime import distributed
from sleep_jax.runtime import files
from sleep_jax.runtime import health
from sleep_jax.runtime import sharding
from sleep_jax.runtime import termination

_CONFIG = config_flags.DEFINE_config_file('config')
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Where lives, tables and pictures go; default runs/NAME.'
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'host:port of process 0 of several; or auto.'
)
_PROCESSES = flags.DEFINE_integer('processes', None, 'How many there are.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Which one this is.')
_PEER_TIMEOUT = flags.DEFINE_integer(
  'peer_timeout', 300, 'Seconds to wait for a process that does not answer.'
)


def claim(workdir: pathlib.Path, c: live.Settings) -> None:
  """Makes the work directory this config's own.

  Raises:
    ConfigError: if it holds a run of another config.
  """
  marker = workdir / 'config.json'
  # How many lives run at a time, say, is not part of what they are.
  identity = live.identity(c)
  if marker.exists() and json.loads(marker.read_text('utf-8')) != identity:
    raise config.ConfigError(
      f'{workdir} holds a run of another config (see {marker}); give '
      'another --workdir, or delete that one yourself.'
    )
  workdir.mkdir(parents=True, exist_ok=True)
  files.write(marker, json.dumps(identity, indent=2))


def check(c: live.Settings) -> None:
  """Builds every arm once, so that a bad setting stops before any life.

  Raises:
    ConfigError: for the first of them.
  """
  mesh = c.get('mesh', {})
  if sharding.many(mesh) and c['workers'] > 1:
    raise config.ConfigError(
      f'workers={c["workers"]}: on a mesh one life is lived after the other; '
      'set --config.workers=1.'
    )
  if sharding.many(mesh) and 'puzzle' in c:
    raise config.ConfigError(
      'mesh: a puzzle is learnt on one device; leave --config.mesh out.'
    )
  with sharding.over(mesh):
    for arm in c['arms']:
      kinds.of(c).build(live.settings_of(c, arm), c['seeds'][0])


def _start_worker(counter, cores: list[int]) -> None:
  """Gives a worker process a core of its own, and a line for its bar."""
  global _worker
  with counter.get_lock():
    _worker = counter.value
    counter.value += 1
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {cores[_worker % len(cores)]})
  termination.watch()
  compilation.keep()


_worker = 0


def _live(c: live.Settings, arm: str, seed: int, folder: str) -> dict[str, Any]:
  return kinds.of(c).live(c, arm, seed, pathlib.Path(folder), _worker)


def live_all(c: live.Settings, workdir: pathlib.Path) -> list[dict[str, Any]]:
  """Every arm and seed, `c['workers']` lives at a time."""
  jobs = [
    (c, arm, seed, str(workdir / 'lives' / f'{arm}_{seed}'))
    for seed in c['seeds']
    for arm in c['arms']
  ]
  if c['workers'] <= 1:
    return [_live(*job) for job in jobs]
  context = multiprocessing.get_context('spawn')
  cores = (
    sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else [0]
  )
  with concurrent.futures.ProcessPoolExecutor(
    c['workers'], context, _start_worker, (context.Value('i', 0), cores)
  ) as pool:
    try:
      return list(pool.map(_live, *zip(*jobs)))
    except BaseException:
      termination.hold()
      pool.shutdown(wait=False, cancel_futures=True)
      raise


def run(c: live.Settings, workdir: pathlib.Path) -> str:
  """Lives, then tells: summary.json, table.md and pictures in `workdir`."""
  check(c)
  if distributed.primary():
    claim(workdir, c)
  finished = workdir / 'summary.json'
  if finished.exists():
    print(f'{workdir} is finished; nothing is left to run.')
  lives = live_all(c, workdir)
  if not distributed.primary():
    return ''
  files.write(finished, json.dumps(lives, indent=1))
  return kinds.of(c).tell(lives, c, workdir)


def _join_others(c: live.Settings) -> None:
  """Becomes one of several processes, if the flags say so.

  Raises:
    ConfigError: for flags that do not go together.
    PeerError: if the others do not come.
  """
  if not _COORDINATOR.value:
    if (_PROCESSES.value, _PROCESS_ID.value) != (None, None):
      raise config.ConfigError(
        '--processes and --process_id need --coordinator=host:port.'
      )
    return
  if c['workers'] > 1:
    raise config.ConfigError(
      f'workers={c["workers"]}: several processes (--coordinator) live one '
      'life after the other; set --config.workers=1.'
    )
  distributed.start(
    _COORDINATOR.value,
    _PROCESSES.value,
    _PROCESS_ID.value,
    timeout=_PEER_TIMEOUT.value,
  )


def main(_) -> None:
  c = json.loads(_CONFIG.value.to_json())
  workdir = pathlib.Path(_WORKDIR.value or f'runs/{c["name"]}')
  compilation.keep()
  try:
    _join_others(c)
    termination.watch()  # After JAX, which listens for SIGTERM as well.
    table = run(c, workdir)
  except (
    config.ConfigError,
    checkpoint.SaveError,
    distributed.PeerError,
    health.NotFinite,
    OSError,
  ) as e:
    sys.exit(f'error: {e}')
  except process.BrokenProcessPool as e:
    sys.exit(
      f'error: a worker process was killed, perhaps for want of memory ({e}). '
      'What it had saved is whole; the same command goes on.'
    )
  print(f'\n{table}\nEverything else: {workdir.absolute()}')


if __name__ == '__main__':
  app.run(main)
