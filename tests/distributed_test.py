"""Runs of two real processes: one life, the loss of a process, and errors."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time

import pytest

from experiments import run
from sleep_jax import config
from sleep_jax.runtime import distributed
from tests import dreaming_test
from tests import killing
from tests import trials_of_processes

# Takes seconds: neither rollouts nor dreams are compiled.
SHORT = '--config=tests/small_life.py:wake_only'
_MESH = ('--config.mesh.data=2',)


def free_port() -> int:
  with socket.socket() as s:
    s.bind(('127.0.0.1', 0))
    return s.getsockname()[1]


def start(
  workdir,
  port: int,
  process: int,
  *,
  processes=2,
  moment=None,
  timeout=60,
  more=(),
  config=SHORT,
) -> subprocess.Popen:
  flags = (
    config,
    f'--coordinator=127.0.0.1:{port}',
    f'--processes={processes}',
    f'--process_id={process}',
    f'--peer_timeout={timeout}',
    *more,
  )
  return subprocess.Popen(
    killing.command(workdir, moment, *flags),
    cwd=killing.ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


@pytest.fixture(autouse=True)
def _one_device_a_process(monkeypatch):
  monkeypatch.delenv('XLA_FLAGS')


def start_both(workdir, **options) -> list[subprocess.Popen]:
  port = free_port()
  return [start(workdir, port, i, more=_MESH, **options) for i in range(2)]


@pytest.mark.slow
def test_two_processes_run_one_life_and_resume_after_one_is_lost(tmp_path):
  for process in start_both(tmp_path / 'whole'):
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
  # Process 1 is killed in its second sleep, before the save.
  moment = killing.Moment('', 'sleep_jax.learners.sleep:Sleep.sleep', 2)
  port = free_port()
  survivor, victim = (
    start(tmp_path / 'both', port, i, timeout=20, moment=m, more=_MESH)
    for i, m in enumerate((None, moment))
  )
  victim.communicate(timeout=500)
  assert victim.returncode == -signal.SIGKILL
  lost = time.monotonic()
  output, _ = survivor.communicate(timeout=120)
  assert time.monotonic() - lost < 100
  assert survivor.returncode != 0 and 'another task died' in output

  for process in start_both(tmp_path / 'both'):
    output, _ = process.communicate(timeout=500)
    assert process.returncode == 0, output
    # The save in progress when the peer was lost is complete or absent.
    assert 'going on after night' in output
  # Both ran it, one wrote it, and it equals the life that was not interrupted.
  assert killing.fingerprint(tmp_path / 'both') == killing.fingerprint(
    tmp_path / 'whole'
  )
  assert len(list((tmp_path / 'both' / 'lives').glob('*/events*'))) <= 2


@pytest.mark.slow
def test_two_processes_try_dreams_as_one_device_does(monkeypatch):
  """Each trains instances of its own, and both know the answers of all."""
  # Gloo waits half a minute for a peer that still compiles.
  monkeypatch.setenv('XLA_FLAGS', '--xla_backend_optimization_level=0')
  port = free_port()
  command = [sys.executable, '-m', 'tests.trials_of_processes']
  both = [
    subprocess.Popen(
      [*command, f'127.0.0.1:{port}', '2', str(i)],
      cwd=killing.ROOT,
      stdout=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  outputs = [process.communicate(timeout=500)[0] for process in both]
  got = [json.loads(output.splitlines()[-1]) for output in outputs]
  alone = trials_of_processes.answers()
  for result in got:
    assert result.pop('devices') == 2
    assert result == alone
  assert all(alone['finite'])
  said = [answer[0] for (answer,) in alone['completions']]
  assert said[:4] == dreaming_test.VALUES[:4]  # Each what it dreamt.


@pytest.mark.slow
@pytest.mark.parametrize('life', ['recurrent', 'backbone'])
def test_a_life_that_loses_a_process_goes_on_with_one(tmp_path, life):
  """It ends as on one throughout, but for what rounding makes of it."""
  config = f'--config=tests/small_life.py:{life}'
  killing.live(tmp_path / 'alone', None, config)
  moment = killing.Moment('', 'sleep_jax.harness.live:_run_phase', 3)
  port = free_port()
  survivor, victim = (
    start(
      tmp_path / 'both',
      port,
      i,
      timeout=20,
      moment=m,
      more=_MESH,
      config=config,
    )
    for i, m in enumerate((None, moment))
  )
  output, _ = victim.communicate(timeout=500)
  assert victim.returncode == -signal.SIGKILL, output
  output, _ = survivor.communicate(timeout=120)
  assert survivor.returncode != 0 and 'another task died' in output
  resumed = killing.live(tmp_path / 'both', None, config)
  assert 'going on after night 0' in resumed
  alone, both = (
    killing.fingerprint(tmp_path / name)['summary']
    for name in ('alone', 'both')
  )
  assert both['steps'] == alone['steps'] and both['tokens'] == alone['tokens']
  for name, value in alone['final'].items():
    assert both['final'][name] == pytest.approx(value, abs=0.1), name


def test_a_process_whose_peers_do_not_connect_exits(tmp_path):
  for process in (0, 1):
    waiting = start(tmp_path, free_port(), process, timeout=3, more=_MESH)
    output, _ = waiting.communicate(timeout=100)
    assert waiting.returncode == distributed.LOST_CODE  # Starts it again.
    assert f'process {process} of 2 has wai' in output
    assert 'Traceback' not in output and 'Abort' not in output
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'given, words',
  [
    (('here', 2, 0), '--coordinator=here must be host:port'),
    (('h:1', 2, None), 'needs --processes and --process_id'),
    (('h:1', 2, 2), '--process_id=2 must be at least 0, and less'),
    (('h:1', 0, 0), 'less than --processes=0'),
    (('auto', 2, 0), 'detects the number of processes'),
  ],
)
def test_invalid_numbers_are_refused(given, words):
  with pytest.raises(config.ConfigError, match=words):
    distributed.start(*given)


def test_processes_with_different_states_stop(monkeypatch):
  monkeypatch.setattr(distributed.jax, 'process_count', lambda: 2)
  gathered = [[1, 2], [1, 3]]
  monkeypatch.setattr(
    distributed.multihost_utils,
    'process_allgather',
    lambda local: distributed.np.array(gathered),
  )
  with pytest.raises(distributed.PeerError, match=r'processes \[1\] differ'):
    distributed.check_agreement('0102', 'night 3 (wake)')


@pytest.mark.parametrize('ids, visible', [('', '0'), ('0,1,2,3', '0,1,2,3')])
def test_a_task_of_slurm_sees_the_gpus_that_it_is_told(ids, visible):
  """JAX makes that one GPU where nothing is said; no GPU is needed to ask."""
  slurm = dict(JOB_ID='1', STEP_NODELIST='localhost', NTASKS='1', PROCID='0')
  slurm |= dict(LOCALID='0', STEP_NUM_NODES='1')
  code = (
    'import logging\n'
    'logging.basicConfig(level=logging.INFO)\n'
    'from sleep_jax.runtime import distributed\n'
    "distributed.start('auto')\n"
  )
  environment = {f'SLURM_{k}': v for k, v in slurm.items()}
  environment |= dict(JAX_LOCAL_DEVICE_IDS=ids) if ids else {}
  done = subprocess.run(
    [sys.executable, '-c', code],
    cwd=killing.ROOT,
    env=os.environ | environment,
    capture_output=True,
    text=True,
    timeout=100,
    check=True,
  )
  assert re.findall(r'visible devices: (\S+)', done.stderr) == [visible]


def test_two_workers_do_not_share_an_accelerator(monkeypatch, capsys):
  c = {'workers': 2}
  assert run._one_worker_on_accelerators(c) == c
  monkeypatch.setattr(run.jax, 'default_backend', lambda: 'gpu')
  assert run._one_worker_on_accelerators(c) == {'workers': 1}
  assert (
    'workers=1 in place of 2: lives share one gpu' in capsys.readouterr()[0]
  )


def test_flags_need_each_other(tmp_path):
  for flags, words in (
    (('--processes=2',), 'need --coordinator'),
    (('--coordinator=h:1', '--config.workers=2'), 'set --config.workers=1'),
    (('--coordinator=auto',), 'without a mesh would each live the same lives'),
    (
      ('--coordinator=h:1', '--config.mesh.data=2', '--dry_start'),
      'needs --processes and --process_id',
    ),
  ):
    done = subprocess.run(
      killing.command(tmp_path / 'w', None, *flags),
      cwd=killing.ROOT,
      capture_output=True,
      text=True,
      timeout=100,
    )
    assert done.returncode == 1 and words in done.stderr
  assert not (tmp_path / 'w').exists()
