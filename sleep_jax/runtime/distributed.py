"""Multi-process runs: a thin wrapper of `jax.distributed`.

Every process runs the same life, each on its own devices. At each save they
compare digests of it, and process 0 writes the files.
"""

import os
import sys
import threading
from typing import Any

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np

from sleep_jax import config

AUTO = 'auto'
LOST_CODE = 134  # Of SIGABRT, by which JAX ends a process whose peer is lost.
_GRACE = 60  # Seconds that JAX waits longer than we do.


class PeerError(RuntimeError):
  """The processes could not connect, or their states differ."""


def start(
  coordinator: str,
  processes: int | None = None,
  process_id: int | None = None,
  *,
  timeout: int = 300,
) -> None:
  """Joins the other processes; must be called before JAX lists its devices.

  Args:
    coordinator: host:port of process 0; or `auto`, which JAX resolves on TPU
      VMs, GKE, Slurm and Open MPI.
    processes: number of processes.
    process_id: index of this process, from 0.
    timeout: seconds to wait for the others to connect, and until a process
      that stops responding counts as lost; JAX then ends this process.

  If the others do not connect in time, prints an error and exits with
  `LOST_CODE`.

  Raises:
    ConfigError: for invalid numbers.
    PeerError: if JAX cannot connect.
  """
  check(coordinator, processes, process_id)
  options: dict[str, Any] = {}
  if coordinator != AUTO:
    options = dict(
      coordinator_address=coordinator,
      num_processes=processes,
      process_id=process_id,
    )
  if process_id is None:
    name = 'this process'
  else:
    name = f'process {process_id} of {processes}'
  # On its own timeout JAX aborts with a stack dump; this timer fires first.
  timer = threading.Timer(
    timeout,
    _abort,
    (
      f'error: {name} has waited {timeout} s for the others at {coordinator}. '
      'Check that all of them run and can reach it, that their --processes are '
      'equal, and that their --process_id differ.',
    ),
  )
  timer.daemon = True
  timer.start()
  try:
    jax.distributed.initialize(
      **options,
      initialization_timeout=timeout + _GRACE,
      heartbeat_timeout_seconds=timeout,
    )
  except ValueError as e:
    raise config.ConfigError(
      f'--coordinator={coordinator}: {e} Name host:port, --processes and '
      '--process_id.'
    ) from e
  except RuntimeError as e:
    raise PeerError(
      f'{name} cannot join the others at {coordinator}: '
      f'{str(e).splitlines()[0]}'
    ) from e
  finally:
    timer.cancel()
  logging.info('Process %d of %d', jax.process_index(), jax.process_count())


def _abort(message: str) -> None:
  print(message, file=sys.stderr, flush=True)
  os._exit(LOST_CODE)


def check(
  coordinator: str, processes: int | None, process_id: int | None
) -> None:
  """Refuses arguments of `start` that do not go together.

  Raises:
    ConfigError: for the first of them.
  """
  if coordinator == AUTO:
    if (processes, process_id) != (None, None):
      raise config.ConfigError(
        '--coordinator=auto detects the number of processes; leave '
        '--processes and --process_id out, or name host:port.'
      )
    return
  host, _, port = coordinator.rpartition(':')
  if not host or not port.isdecimal():
    raise config.ConfigError(
      f'--coordinator={coordinator} must be host:port, or auto.'
    )
  if processes is None or process_id is None:
    raise config.ConfigError(
      f'--coordinator={coordinator} needs --processes and --process_id.'
    )
  if processes < 1 or not 0 <= process_id < processes:
    raise config.ConfigError(
      f'--process_id={process_id} must be at least 0, and less than '
      f'--processes={processes}.'
    )


def is_primary() -> bool:
  """Whether this process is process 0, which writes the files."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Waits until every process has reached the barrier of this name."""
  multihost_utils.sync_global_devices(name)


def check_agreement(digest: str, where: str) -> None:
  """Checks that all processes hold the same state.

  Args:
    digest: digest of this process's state, in hexadecimal.
    where: prefix of the error message.

  Raises:
    PeerError: if the digests differ.
  """
  if jax.process_count() == 1:
    return
  local = np.frombuffer(bytes.fromhex(digest), np.uint8)
  gathered = multihost_utils.process_allgather(local)
  if (gathered != local).any():
    different = np.flatnonzero((gathered != local).any(axis=1)).tolist()
    raise PeerError(
      f'{where}: the states of process {jax.process_index()} and of processes '
      f'{different} differ. Give all of them the same code, config, data and '
      'kind of device, and run the same command again.'
    )
