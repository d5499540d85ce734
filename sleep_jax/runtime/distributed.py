"""Several processes as one: a thin frame around `jax.distributed`.

Every process lives the same life on devices of its own, and at each save they
make sure that it still is the same; the first process writes.
"""

import os
import sys
import threading

from absl import logging
import jax
from jax.experimental import multihost_utils
import numpy as np

from sleep_jax import config

AUTO = 'auto'
_GRACE = 60  # Seconds.


class PeerError(RuntimeError):
  """The processes did not come together, or no longer agree."""


def start(
  coordinator: str,
  processes: int | None = None,
  process_id: int | None = None,
  *,
  timeout: int = 300,
) -> None:
  """Joins the other processes; call it before anything asks for a device.

  Args:
    coordinator: host:port of process 0, or `auto`: then JAX finds out by
      itself on TPU VMs, GKE, Slurm and Open MPI.
    processes: how many there are.
    process_id: which of them this is, from 0.
    timeout: seconds to wait for the others, and until one that does not answer
      any more counts as lost; then JAX ends this process.

  If the others do not come in time, the process says so and exits with 1.

  Raises:
    ConfigError: for numbers that cannot be.
    PeerError: if JAX refuses.
  """
  if coordinator == AUTO:
    given = {}
    if (processes, process_id) != (None, None):
      raise config.ConfigError(
        '--coordinator=auto finds the number of processes by itself; leave '
        '--processes and --process_id out, or name host:port.'
      )
  else:
    _check(coordinator, processes, process_id)
    given = dict(
      coordinator_address=coordinator,
      num_processes=processes,
      process_id=process_id,
    )
  if process_id is None:
    name = 'this process'
  else:
    name = f'process {process_id} of {processes}'
  # JAX, when it gives up, aborts with a stack dump. We give up before it.
  late = threading.Timer(
    timeout,
    _give_up,
    (
      f'error: {name} has waited {timeout} s for the others at {coordinator}. '
      'Check that all of them run and can reach it, that their --processes are '
      'equal, and that their --process_id differ.',
    ),
  )
  late.daemon = True
  late.start()
  try:
    jax.distributed.initialize(
      **given,
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
    late.cancel()
  logging.info('Process %d of %d', jax.process_index(), jax.process_count())


def _give_up(message: str) -> None:
  print(message, file=sys.stderr, flush=True)
  os._exit(1)


def _check(
  coordinator: str, processes: int | None, process_id: int | None
) -> None:
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
  """Whether this process is the one that writes."""
  return jax.process_index() == 0


def barrier(name: str) -> None:
  """Waits until every process has come to the point of this name."""
  multihost_utils.sync_global_devices(name)


def check_agreement(digest: str, where: str) -> None:
  """Refuses to go on if the processes do not live the same life.

  Args:
    digest: of this process's life, in hexadecimal.
    where: for the message.

  Raises:
    PeerError: if another process has another digest.
  """
  if jax.process_count() == 1:
    return
  own = np.frombuffer(bytes.fromhex(digest), np.uint8)
  others = multihost_utils.process_allgather(own)
  if (others != own).any():
    odd = np.flatnonzero((others != own).any(axis=1)).tolist()
    raise PeerError(
      f'{where}: process {jax.process_index()} and processes {odd} no longer '
      'live the same life. Give all of them the same code, config, data and '
      'kind of device, and run the same command again.'
    )
