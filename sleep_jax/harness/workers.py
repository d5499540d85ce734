"""sleep_jax.harness.workers."""

import concurrent.futures
import json
import multiprocessing
import os
import pathlib
from typing import Any

from experiments import kinds
from sleep_jax import config
from sleep_jax.harness import build as build_lib
from sleep_jax.runtime import compilation
from sleep_jax.runtime import distributed
from sleep_jax.runtime import files
from sleep_jax.runtime import sharding
from sleep_jax.runtime import termination


def claim_workdir(workdir: pathlib.Path, c: build_lib.Settings) -> None:
  """Makes the work directory this config's own.

  Raises:
    ConfigError: if it holds a run of another config.
  """
  marker = workdir / 'config.json'
  # How many lives run at a time, say, is not part of what they are.
  identity = build_lib.config_identity(c)
  if marker.exists() and json.loads(marker.read_text('utf-8')) != identity:
    raise config.ConfigError(
      f'{workdir} holds a run of another config (see {marker}); give '
      'another --workdir, or delete that one yourself.'
    )
  workdir.mkdir(parents=True, exist_ok=True)
  files.write(marker, json.dumps(identity, indent=2))


def check(c: build_lib.Settings) -> None:
  """Builds every arm once, so that a bad setting stops before any life.

  Raises:
    ConfigError: for the first of them.
  """
  mesh = c.get('mesh', {})
  if sharding.is_distributed(mesh) and c['workers'] > 1:
    raise config.ConfigError(
      f'workers={c["workers"]}: on a mesh one life is lived after the other; '
      'set --config.workers=1.'
    )
  if sharding.is_distributed(mesh) and 'puzzle' in c:
    raise config.ConfigError(
      'mesh: a puzzle is learnt on one device; leave --config.mesh out.'
    )
  with sharding.use_mesh(mesh):
    for arm in c['arms']:
      kinds.of(c).build(build_lib.arm_config(c, arm), c['seeds'][0])


def _start_worker(counter, cores: list[int]) -> None:
  """Gives a worker process a core of its own, and a line for its bar."""
  global _worker
  with counter.get_lock():
    _worker = counter.value
    counter.value += 1
  if hasattr(os, 'sched_setaffinity'):
    os.sched_setaffinity(0, {cores[_worker % len(cores)]})
  termination.install_handler()
  compilation.enable_cache()


_worker = 0


def _live(
  c: build_lib.Settings, arm: str, seed: int, folder: str
) -> dict[str, Any]:
  return kinds.of(c).live(c, arm, seed, pathlib.Path(folder), _worker)


def live_all(
  c: build_lib.Settings, workdir: pathlib.Path
) -> list[dict[str, Any]]:
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
      termination.block()
      pool.shutdown(wait=False, cancel_futures=True)
      raise


def run(c: build_lib.Settings, workdir: pathlib.Path) -> str:
  """Lives, then tells: summary.json, table.md and pictures in `workdir`."""
  check(c)
  if distributed.is_primary():
    claim_workdir(workdir, c)
  finished = workdir / 'summary.json'
  if finished.exists():
    print(f'{workdir} is finished; nothing is left to run.')
  lives = live_all(c, workdir)
  if not distributed.is_primary():
    return ''
  files.write(finished, json.dumps(lives, indent=1))
  return kinds.of(c).tell(lives, c, workdir)
