"""Runs an experiment: every arm of a config, over its seeds.

  python -m experiments.run --config=experiments/configs/quickstart.py
  sleep-jax run --config=quickstart

The same command resumes what was interrupted; --workdir names where it lives.
Exit codes: 0 done, 1 an error that the last line names, 143 ended by SIGTERM
and 130 by Ctrl-C with everything saved (docs/checkpointing.md). With
--coordinator, --processes and --process_id several processes share lives on a
mesh. --dry_start builds every arm of shapes, without its devices and weights,
and lives nothing.
"""

from collections.abc import Callable
from concurrent.futures import process
import json
import pathlib
import sys

from absl import app
from absl import flags
import jax

from experiments import command_line
from sleep_jax import config
from sleep_jax.harness import build as build_lib
from sleep_jax.harness import workers
from sleep_jax.learners import collapse
from sleep_jax.runtime import checkpoint
from sleep_jax.runtime import compilation
from sleep_jax.runtime import distributed
from sleep_jax.runtime import finite
from sleep_jax.runtime import sharding
from sleep_jax.runtime import termination

_CONFIG = command_line.define_config()
_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'For lives, tables and pictures; default runs/NAME.'
)
_COORDINATOR = flags.DEFINE_string(
  'coordinator', None, 'host:port of process 0 of several; or auto.'
)
_PROCESSES = flags.DEFINE_integer('processes', None, 'How many there are.')
_PROCESS_ID = flags.DEFINE_integer('process_id', None, 'Which one this is.')
_PEER_TIMEOUT = flags.DEFINE_integer(
  'peer_timeout', 300, 'Seconds to wait for a process that does not answer.'
)
_DRY_START = flags.DEFINE_bool(
  'dry_start',
  False,
  'Check all settings by shapes, waiting for no other process; live nothing.',
)


def _check_processes(c: build_lib.Settings) -> None:
  """Refuses flags of several processes that do not go together.

  Raises:
    ConfigError: for the first of them.
  """
  if not _COORDINATOR.value:
    if (_PROCESSES.value, _PROCESS_ID.value) != (None, None):
      raise config.ConfigError(
        '--processes and --process_id need --coordinator=host:port.'
      )
    return
  if c['workers'] > 1:
    raise config.ConfigError(
      f'workers={c["workers"]}: several processes (--coordinator) run '
      'lives one after the other; set --config.workers=1.'
    )
  if not sharding.is_distributed(c.get('mesh', {})):
    raise config.ConfigError(
      'several processes (--coordinator) without a mesh would each live the '
      'same lives; set --config.mesh.data, or another axis, so that the mesh '
      'has all of their devices.'
    )
  distributed.check(_COORDINATOR.value, _PROCESSES.value, _PROCESS_ID.value)


def _join_others() -> None:
  """Becomes one of several processes, if the flags say so.

  Raises:
    PeerError: if the others do not come.
  """
  if _COORDINATOR.value:
    distributed.start(
      _COORDINATOR.value,
      _PROCESSES.value,
      _PROCESS_ID.value,
      timeout=_PEER_TIMEOUT.value,
    )


def _one_worker_on_accelerators(c: build_lib.Settings) -> build_lib.Settings:
  """Lives at a time are processes, and two of them cannot share a device."""
  if c['workers'] > 1 and (name := jax.default_backend()) != 'cpu':
    print(f'workers=1 in place of {c["workers"]}: lives share one {name}.')
    return c | {'workers': 1}
  return c


def execute(
  change: Callable[[build_lib.Settings], build_lib.Settings] = lambda c: c,
  share: str = '1/1',
) -> None:
  """Runs what the flags say; ends with one line if that cannot be done.

  Args:
    change: makes another experiment of the config.
    share: of the lives, see `workers.parse_share`.
  """
  termination.install_handler()
  c = json.loads(_CONFIG.value.to_json())
  compilation.enable_cache()
  try:
    build_lib.check_sections(c)
    for line in command_line.outranked(c, sys.argv):
      print(f'warning: {line}', file=sys.stderr)
    c, part = change(c), workers.parse_share(share)
    workdir = pathlib.Path(_WORKDIR.value or f'runs/{c["name"]}')
    _check_processes(c)
    if _DRY_START.value:
      jax.config.update('jax_platforms', 'cpu')
      workers.check(c, absent=True)
      print(f'ready: {len(c["arms"])} arms x {len(c["seeds"])} seeds')
      return
    _join_others()
    # Again after JAX, which listens for SIGTERM as well.
    termination.install_handler()
    table = workers.run(_one_worker_on_accelerators(c), workdir, part)
  except (
    config.ConfigError,
    checkpoint.SaveError,
    distributed.PeerError,
    finite.NotFinite,
    collapse.Collapsed,
    OSError,
  ) as e:
    sys.exit(f'error: {command_line.with_flag(str(e), c)}')
  except process.BrokenProcessPool as e:
    sys.exit(
      f'error: a worker process was killed, perhaps for want of memory ({e}). '
      'What it had saved is intact; run the same command again.'
    )
  print(f'\n{table}\nEverything else: {workdir.absolute()}')


def main(_) -> None:
  execute()


if __name__ == '__main__':
  app.run(main, flags_parser=command_line.parse)
