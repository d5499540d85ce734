"""Jobs on a real Slurm: two nodes of a cluster on this machine.

Needs slurmctld, slurmd and the commands (Debian: slurm-wlm), and root.
"""

import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

from tests import launch_tools

_TOOLS = ('slurmctld', 'slurmd', 'sbatch', 'srun', 'squeue', 'scancel')
_MISSING = [tool for tool in _TOOLS if not shutil.which(tool)]

pytestmark = [
  pytest.mark.slow,
  pytest.mark.skipif(bool(_MISSING), reason=f'no {", ".join(_MISSING)}'),
]
_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/none
CredType=cred/none
SlurmUser=root
SlurmdUser=root
StateSaveLocation={folder}
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmdSpoolDir={folder}/spool-%n
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=1
NodeName=zz2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=1
PartitionName=long Nodes={host},zz2 Default=YES State=UP
"""


def _free_ports(count: int) -> list[int]:
  sockets = [socket.socket() for _ in range(count)]
  for s in sockets:
    s.bind(('127.0.0.1', 0))
  ports = [s.getsockname()[1] for s in sockets]
  for s in sockets:
    s.close()
  return ports


@pytest.fixture(name='cluster', scope='module')
def _cluster(tmp_path_factory):
  """The environment of its commands, while its daemons run."""
  folder, host = tmp_path_factory.mktemp('slurm'), socket.gethostname()
  conf = folder / 'slurm.conf'
  conf.write_text(_CONF.format(host=host, folder=folder, ports=_free_ports(3)))
  environment = os.environ | {'SLURM_CONF': str(conf)}
  environment.pop('XLA_FLAGS', None)  # A device a task.
  environment['PYTHONPATH'] = str(launch_tools.ROOT)
  daemons = [['slurmctld', '-D']]
  daemons += [['slurmd', '-D', '-N', node] for node in (host, 'zz2')]
  started = [
    subprocess.Popen(
      argv, env=environment, stderr=open(folder / f'{i}.log', 'w')
    )
    for i, argv in enumerate(daemons)
  ]
  yield environment
  for daemon in reversed(started):
    daemon.send_signal(signal.SIGTERM)
    daemon.wait(60)
  # What keeps a step alive outlives its daemon.
  for process in psutil.process_iter():
    if process.name() == 'slurmstepd' and str(conf) in _environment(process):
      process.kill()


def _environment(process: psutil.Process) -> set[str]:
  try:
    return set(process.environ().values())
  except psutil.Error:
    return set()  # It has ended.


@pytest.fixture(name='home')
def _home(tmp_path, monkeypatch) -> pathlib.Path:
  """A folder with the virtual environment that `create` makes."""
  for name in ('experiments', 'sleep_jax', 'tests'):
    (tmp_path / name).symlink_to(launch_tools.ROOT / name)
  (tmp_path / '.venv').symlink_to(sys.prefix)
  monkeypatch.chdir(tmp_path)
  return tmp_path


def submit(cluster, *argv: str) -> None:
  line = ['-m', 'launch.cli', '--platform=slurm', *argv]
  line += ['--config=tests/small_life.py:wake_only']
  done = subprocess.run(
    [sys.executable, *line],
    env=cluster,
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr


def wait_for(condition, what: str) -> None:
  for _ in range(600):
    if condition():
      return
    time.sleep(1)
  raise AssertionError(what)


def job(cluster) -> str:
  """What Slurm says of the last job."""
  return subprocess.run(
    ['scontrol', 'show', 'job'],
    env=cluster,
    capture_output=True,
    text=True,
    check=True,
  ).stdout.rpartition('JobId=')[2]


def test_two_nodes_live_one_life(cluster, home):
  folder = home / "it's 100%j"  # A pattern of Slurm, and a shell's quote.
  submit(cluster, 'run', '--nodes=2', f'--workdir={folder}')
  wait_for(lambda: 'JobState=COMPLETED' in job(cluster), 'not completed')
  assert '| wake_only |' in (folder / 'log').read_text()
  assert (folder / 'lives.json').exists()


def test_two_jobs_share_a_sweep(cluster, home):
  sweep = ('--grid=wake.batch=16,32', '--jobs=2', '--workdir=run')
  submit(cluster, 'run', *sweep)
  table = home / 'run' / 'table.md'
  wait_for(table.exists, 'no table')
  for batch in (16, 32):
    assert f'| wake_only-batch={batch} |' in table.read_text()
  logs = [(home / 'run' / f'log-{i}').read_text() for i in (1, 2)]
  assert any('1 of 2 lives have ended' in log for log in logs) or all(
    '| wake_only-batch=16 |' in log for log in logs
  )


def test_an_error_of_its_own_does_not_start_a_job_again(cluster, home):
  (home / 'run').mkdir()
  (home / 'run' / 'config.json').write_text('{"name": "other"}')
  submit(cluster, 'run', '--nodes=2', '--workdir=run')
  wait_for(lambda: 'JobState=FAILED' in job(cluster), 'not failed')
  assert 'Restarts=0' in job(cluster)
  assert 'holds a run of another config' in (home / 'run' / 'log').read_text()


def test_a_job_that_is_stopped_is_queued_again_unless_it_is_deleted(
  cluster, home
):
  argv = ('--nodes=2', '--workdir=run', '--config.task.episodes=30')
  submit(cluster, 'run', *argv)
  log = home / 'run' / 'log'
  wait_for(lambda: log.exists() and '2/30' in log.read_text(), 'no night')
  number = job(cluster).split()[0]
  subprocess.run(['scancel', '--signal=TERM', number], env=cluster, check=True)
  wait_for(lambda: 'Restarts=1' in job(cluster), 'not queued again')
  assert 'every completed phase is saved' in log.read_text()
  submit(cluster, 'delete')
  wait_for(lambda: 'JobState=CANCELLED' in job(cluster), 'not deleted')
