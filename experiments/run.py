"""Runs an experiment: every arm of a config, over its seeds.

  python -m experiments.run --config=experiments/configs/quickstart.py

The same command resumes what was interrupted; --workdir names where it lives.
Exit codes: 0 done, 1 an error that the last line names, 143 ended by SIGTERM
with everything saved (docs/checkpointing.md). With --coordinator, --processes
and --process_id several processes run the same lives.
"""

from collections.abc import Callable
from concurrent.futures import process
import json
import pathlib
import sys

from absl import app
from absl import flags
from ml_collections import config_flags

from sleep_jax import config
from sleep_jax.harness import build as build_lib
from sleep_jax.harness import workers
from sleep_jax.runtime import checkpoint
from sleep_jax.runtime import compilation
from sleep_jax.runtime import distributed
from sleep_jax.runtime import finite
from sleep_jax.runtime import termination

_CONFIG = config_flags.DEFINE_config_file('config')
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


def _join_others(c: build_lib.Settings) -> None:
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
  if c.get('workers', 1) > 1:
    raise config.ConfigError(
      f'workers={c["workers"]}: several processes (--coordinator) run '
      'lives one after the other; set --config.workers=1.'
    )
  distributed.start(
    _COORDINATOR.value,
    _PROCESSES.value,
    _PROCESS_ID.value,
    timeout=_PEER_TIMEOUT.value,
  )


def parse(argv: list[str]) -> list[str]:
  """What is left of the command line; ends with one line if it is wrong.

  For `app.run`, of this program and of others that have its flags.
  """
  try:
    left = flags.FLAGS(argv)
    if _CONFIG.value is not None:
      _CONFIG.value.to_json()  # A file that does not exist is noticed here.
  except Exception as e:  # A config file is code, and may raise anything.
    sys.exit(f'error: {_in_one_line(e)}')
  if len(left) > 1:
    sys.exit(f'error: {left[1]!r} is no flag; settings are --config.KEY=VALUE.')
  if _CONFIG.value is None:
    sys.exit(
      'error: --config is missing; give a file such as '
      '--config=experiments/configs/quickstart.py.'
    )
  return left


def _in_one_line(e: BaseException) -> str:
  """What is wrong with the command line."""
  lines = str(e).strip().splitlines() or [type(e).__name__]
  # An error in a config file comes with its traceback as text.
  _, found, reason = lines[-1].partition('ConfigError: ')
  if found:
    return reason
  last = lines[-1].strip()
  if isinstance(e, flags.Error):
    return lines[0]
  if isinstance(e, (AttributeError, KeyError)) and 'get_config' not in last:
    return f'the config has no setting {last}.'
  return f'--config cannot be read: {last}'


def execute(
  change: Callable[[build_lib.Settings], build_lib.Settings] = lambda c: c,
  share: str = '1/1',
) -> None:
  """Runs what the flags say; ends with one line if that cannot be done.

  Args:
    change: makes another experiment of the config.
    share: of the lives, see `workers.parse_share`.
  """
  c = json.loads(_CONFIG.value.to_json())
  compilation.enable_cache()
  try:
    build_lib.check_sections(c)
    c, part = change(c), workers.parse_share(share)
    workdir = pathlib.Path(_WORKDIR.value or f'runs/{c["name"]}')
    _join_others(c)
    # After JAX, which listens for SIGTERM as well.
    termination.install_handler()
    table = workers.run(c, workdir, part)
  except (
    config.ConfigError,
    checkpoint.SaveError,
    distributed.PeerError,
    finite.NotFinite,
    OSError,
  ) as e:
    sys.exit(f'error: {e}')
  except process.BrokenProcessPool as e:
    sys.exit(
      f'error: a worker process was killed, perhaps for want of memory ({e}). '
      'What it had saved is intact; run the same command again.'
    )
  print(f'\n{table}\nEverything else: {workdir.absolute()}')


def main(_) -> None:
  execute()


if __name__ == '__main__':
  app.run(main, flags_parser=parse)
