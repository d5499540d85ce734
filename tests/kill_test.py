"""Lives that end early go on to the same end, whatever ends them: all bits.

Each for a life that dreams, a hybrid's, and one whose base never changes.
"""

import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess

import jax
import pytest

from sleep_jax import config
from sleep_jax.harness import build as build_lib
from sleep_jax.harness import live as live_lib
from sleep_jax.runtime import checkpoint
from sleep_jax.runtime import files
from tests import killing
from tests import small_life

LIVES = ('', 'recurrent', 'backbone')
_PHASE = 'sleep_jax.harness.live:_run_phase'

pytestmark = pytest.mark.slow


def _flag(name: str) -> str:
  return f'--config=tests/small_life.py{":" if name else ""}{name}'


def _settings(name: str) -> build_lib.Settings:
  return json.loads(small_life.get_config(name).to_json())


def _live(name: str, workdir: pathlib.Path) -> None:
  """A life in this process, in the folder that the command gives it."""
  c = _settings(name)
  [arm] = c['arms']
  live_lib.live(c, arm, 1, workdir / 'lives' / f'{arm}_1', 0)


@pytest.fixture(name='whole', params=LIVES, scope='module')
def _whole(request, tmp_path_factory):
  """The name of a life, and a folder in which it has ended."""
  workdir = tmp_path_factory.mktemp(f'whole_{request.param}')
  _live(request.param, workdir)
  return request.param, workdir


def _folder(workdir: pathlib.Path) -> pathlib.Path:
  [folder] = (workdir / 'lives').iterdir()
  return folder


def test_a_life_killed_three_times_ends_as_if_it_never_was(tmp_path):
  killing.live(tmp_path / 'whole')
  for moment in (
    killing.Moment('', 'sleep_jax.models.memory:Bank.unlock', 1, after=True),
    killing.Moment(
      'in the save after the first night',
      'sleep_jax.runtime.checkpoint:Checkpoints.save',
      1,
      delay=0.03,
    ),
    killing.Moment('', 'sleep_jax.lifecycle.dreaming.propose:propose', 3),
  ):
    killing.live(tmp_path / 'cut', moment)
  killing.live(tmp_path / 'cut')
  assert killing.fingerprint(tmp_path / 'cut') == killing.fingerprint(
    tmp_path / 'whole'
  )


def test_twenty_lives_killed_at_random_moments_end_the_same():
  result = killing.prove(kills=20, seed=2)
  assert result['equal'] == 20, result


@pytest.mark.parametrize('name', small_life.VARIANTS)
def test_every_learner_is_killed_five_times_and_ends_the_same(name):
  [told] = killing.prove_all(5, 3, [name])
  assert told['equal'], told


@pytest.mark.parametrize(
  'signals, code',
  [((signal.SIGTERM, signal.SIGTERM), 143), ((signal.SIGINT,), 130)],
  ids=['term twice', 'ctrl-c'],
)
def test_a_life_that_is_told_to_end_goes_on(whole, signals, code, tmp_path):
  name, workdir = whole
  process = subprocess.Popen(
    killing.command(tmp_path, None, _flag(name)),
    cwd=killing.ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  while not list(tmp_path.glob('lives/*/checkpoints/[0-9]')):
    assert process.poll() is None
  for number in signals:
    process.send_signal(number)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == code and 'Traceback' not in out, out
  assert out.count('The same command resumes') == 1
  assert 'going on after' in killing.live(tmp_path, None, _flag(name))
  assert killing.fingerprint(tmp_path) == killing.fingerprint(workdir)


def test_a_worker_that_is_killed_is_named_in_the_last_line(tmp_path):
  flags = _flag('wake_only'), '--config.seeds=(1,2)', '--config.workers=2'
  process = subprocess.Popen(
    killing.command(tmp_path, None, *flags),
    cwd=killing.ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )
  while not list(tmp_path.glob('lives/*/checkpoints/[0-9]')):
    assert process.poll() is None
  tasks = pathlib.Path(f'/proc/{process.pid}/task').iterdir()
  children = [
    int(x) for t in tasks for x in (t / 'children').read_text().split()
  ]
  workers = [
    x for x in children
    if b'spawn_main' in pathlib.Path(f'/proc/{x}/cmdline').read_bytes()
  ]  # fmt: skip
  assert len(workers) == 2
  os.kill(workers[0], signal.SIGKILL)
  out, _ = process.communicate(timeout=100)
  assert process.returncode == 1
  assert out.splitlines()[-1].startswith('error: a worker process was killed')
  assert 'resource_tracker' not in out and 'Traceback' not in out
  killing.live(tmp_path, None, *flags)


def test_of_two_processes_in_one_folder_one_waits_and_is_refused(
  whole, tmp_path, monkeypatch
):
  monkeypatch.setattr(files, '_LOCK_TIMEOUT', 0.2)
  name, _ = whole
  [arm] = _settings(name)['arms']
  with files.lock_dir(tmp_path / 'lives' / f'{arm}_1'):
    with pytest.raises(config.ConfigError, match='another process is using'):
      _live(name, tmp_path)


@pytest.mark.parametrize('size', [500, 20_000])
def test_a_full_disk_ends_a_life_that_goes_on_with_room(whole, size, tmp_path):
  name, workdir = whole
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
  try:
    with pytest.raises((checkpoint.SaveError, OSError)) as error:
      _live(name, tmp_path)
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert 'arge' in str(error.value)  # 'File too large': the kernel's words.
  _live(name, tmp_path)
  assert killing.fingerprint(tmp_path) == killing.fingerprint(workdir)


def test_a_folder_that_is_read_only_is_refused_and_left(
  whole, tmp_path, monkeypatch
):
  name, _ = whole

  def mkdir(self, *args, **kwargs):
    raise PermissionError(13, 'Permission denied', str(self))

  monkeypatch.setattr(pathlib.Path, 'mkdir', mkdir)  # Root may write anywhere.
  with pytest.raises(PermissionError):
    _live(name, tmp_path)
  assert not list(tmp_path.iterdir())


def test_a_flipped_byte_in_any_file_of_the_newest_checkpoint_is_harmless(
  whole, tmp_path
):
  """What comes back is what was saved, then or before."""
  name, workdir = whole
  c = _settings(name)
  [arm] = c['arms']
  settings = build_lib.arm_config(c, arm)
  _, learner, _ = build_lib.build(settings, 1)
  template = learner.init(jax.random.PRNGKey(1))

  def newest(folder: pathlib.Path):
    saved = checkpoint.Checkpoints(
      folder,
      build_lib.life_digest(settings, 1),
      live_lib.base_digest(learner),
    )
    try:
      found = saved.newest(template)
      before = saved.newest(template, 'wake')
    finally:
      saved.close()
    return {
      str(x): checkpoint.weights_digest(x.life) for x in (found, before) if x
    }

  source = _folder(workdir) / 'checkpoints'
  known = newest(source)
  assert len(known) == 2
  last = max(int(p.name) for p in source.iterdir() if p.name.isdigit())
  for path in sorted((source / f'{last}').rglob('*')):
    if not path.is_file() or not path.stat().st_size:
      continue
    copy = tmp_path / 'copy'
    shutil.copytree(source, copy)
    damaged = copy / path.relative_to(source)
    raw = bytearray(damaged.read_bytes())
    raw[len(raw) // 2] ^= 1
    damaged.write_bytes(raw)
    assert newest(copy).items() <= known.items(), path
    shutil.rmtree(copy)
