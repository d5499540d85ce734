"""Runs all lives of an experiment, one after the other or in processes."""

import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import re
from typing import Any

from sleep_jax import config
from sleep_jax.harness import build as build_lib
from sleep_jax.harness import live as live_lib
from sleep_jax.harness import report as report_lib
from sleep_jax.harness import summary as summary_lib
from sleep_jax.metrics import writers
from sleep_jax.runtime import compilation
from sleep_jax.runtime import distributed
from sleep_jax.runtime import files
from sleep_jax.runtime import profiling
from sleep_jax.runtime import sharding
from sleep_jax.runtime import termination


def claim_workdir(workdir: pathlib.Path, c: build_lib.Settings) -> None:
  """Reserves the work directory for this config.

  Raises:
    ConfigError: if it holds a run of another config, or of version 0.1, or its
      config.json is damaged.
  """
  marker = workdir / 'config.json'
  # Settings of how lives are run may differ between two runs.
  identity = json.loads(json.dumps(build_lib.config_identity(c)))
  with files.lock_dir(workdir):
    if marker.exists():
      saved = summary_lib.read_json(marker)
      if _is_of_version_0_1(saved):
        raise config.ConfigError(
          f'{workdir} was written by sleep_jax 0.1, whose settings have other '
          'names; use that version to go on with it, or give another --workdir.'
        )
      if saved != identity:
        raise config.ConfigError(
          f'{workdir} holds a run of another config (see {marker}); give '
          'another --workdir, or delete that one yourself.'
        )
    files.write(marker, json.dumps(identity, indent=2))


def _is_of_version_0_1(c: build_lib.Settings) -> bool:
  """Whether a config has settings that were renamed after version 0.1."""
  wake = c.get('wake')
  return 'puzzle' in c or (isinstance(wake, dict) and 'lanes' in wake)


def check(c: build_lib.Settings, *, absent: bool = False) -> None:
  """Builds every arm once, so that a bad setting stops before any life.

  Args:
    c: the config.
    absent: whether devices and weights are not here: arms are built of shapes.

  Raises:
    ConfigError: for the first of them.
  """
  build_lib.check_sections(c)
  _check_names(c)
  writers.check(c.get('writers', ()))
  profiling.Window(c.get('profile', {}).get('steps', ''), pathlib.Path())
  mesh = c.get('mesh', {})
  if sharding.is_distributed(mesh) and c['workers'] > 1:
    raise config.ConfigError(
      f'workers={c["workers"]}: on a mesh one life is lived after the other; '
      'set --config.workers=1.'
    )
  if c.get('export'):
    _check_export(c)
  use_mesh = sharding.use_absent_mesh if absent else sharding.use_mesh
  with use_mesh(mesh):
    for arm in c['arms']:
      settings = build_lib.arm_config(c, arm)
      build_lib.build(settings, c['seeds'][0], absent=absent)


def _check_names(c: build_lib.Settings) -> None:
  """Refuses names that are no folder's."""
  for name in (c['name'], *c['arms']):
    if not isinstance(name, str) or not re.fullmatch(r'\w[^/\x00-\x1f]*', name):
      raise config.ConfigError(
        f'{name!r} names a folder of a run; the name of a config or an arm '
        'begins with a letter or a digit, and has no /.'
      )


def _check_export(c: build_lib.Settings) -> None:
  """Refuses an export of several lives, or to another kind of file."""
  if len(c['arms']) > 1 or len(c['seeds']) > 1:
    raise config.ConfigError(
      f'export={c["export"]!r} holds the weights of one life, but there are '
      f'{len(c["arms"])} arms and {len(c["seeds"])} seeds; leave one of each, '
      'or set --config.export=.'
    )
  if not c['export'].endswith('.npz'):
    raise config.ConfigError(
      f'export={c["export"]!r} must be the path of an .npz file.'
    )
  above = pathlib.Path(c['export']).absolute().parents
  folder = next(x for x in above if x.exists())  # The others are made.
  if not folder.is_dir() or not os.access(folder, os.W_OK):
    raise config.ConfigError(
      f'export={c["export"]!r}: {folder} is no folder that can be written; '
      'choose another.'
    )


def _start_worker(counter: Any, cores: list[int]) -> None:
  """Pins a worker process to a core, and numbers its progress bar."""
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
  summary = live_lib.live(c, arm, seed, pathlib.Path(folder), _worker)
  compilation.drop_programs_near_limit()
  return summary


def parse_share(text: str) -> tuple[int, int]:
  """`I/N`, from 1, as an offset from 0 and a stride.

  Raises:
    ConfigError: if it has another form.
  """
  found = re.fullmatch(r'([0-9]+)/([0-9]+)', text)
  first, count = map(int, found.groups()) if found else (0, 0)
  if not 1 <= first <= count:
    raise config.ConfigError(
      f'--share={text}: write I/N with I from 1 to N, as in --share=1/4.'
    )
  return first - 1, count


def _folders(
  c: build_lib.Settings, workdir: pathlib.Path
) -> dict[pathlib.Path, tuple[str, int]]:
  """The folders of all lives, with arm and seed."""
  return {
    workdir / 'lives' / f'{arm}_{seed}': (arm, seed)
    for seed in c['seeds']
    for arm in c['arms']
  }


def live_all(
  c: build_lib.Settings,
  workdir: pathlib.Path,
  share: tuple[int, int] = (0, 1),
) -> list[dict[str, Any]]:
  """Every arm and seed, `c['workers']` lives at a time.

  Args:
    c: the experiment.
    workdir: of the experiment.
    share: offset and stride, if other jobs live the rest.

  Returns:
    The summaries of these lives.
  """
  jobs = [
    (c, arm, seed, str(folder))
    for folder, (arm, seed) in _folders(c, workdir).items()
  ]
  jobs = jobs[share[0] :: share[1]]
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


def run(
  c: build_lib.Settings,
  workdir: pathlib.Path,
  share: tuple[int, int] = (0, 1),
) -> str:
  """Lives and reports, see `report.write_report`.

  Args:
    c: the experiment.
    workdir: of the experiment; several jobs may share it.
    share: see `live_all`.

  Returns:
    The tables; or, while other jobs have not ended, what is missing.
  """
  check(c)
  folders = _folders(c, workdir)
  finished = all((f / 'summary.json').exists() for f in folders)
  if finished and not os.access(workdir, os.W_OK):  # A mount of an archive.
    print(f'{workdir} is finished, and cannot be written.')
    return report_lib.table(live_all(c, workdir), c['reference'])
  if distributed.is_primary():
    claim_workdir(workdir, c)
  if finished:
    print(f'{workdir} is finished; nothing is left to run.')
  lives = live_all(c, workdir, share)
  if not distributed.is_primary():
    return ''
  ended = [f for f in folders if (f / 'summary.json').exists()]
  if len(ended) < len(folders):
    return f'{len(ended)} of {len(folders)} lives have ended; no table yet.'
  if len(lives) < len(folders):
    lives = live_all(c, workdir)  # They have ended, and are read.
  table = report_lib.report_workdir(workdir, workdir)
  if not finished:
    sinks = writers.build(workdir, 'report', c)
    report_lib.publish(lives, c['reference'], workdir, sinks)
  return table
