"""Work directories: one config has one, and what is in it is its own."""

import json
import multiprocessing
import os
import pathlib
import resource
import shutil

import pytest

from sleep_jax import config
from sleep_jax.harness import build as build_lib
from sleep_jax.harness import live as live_lib
from sleep_jax.harness import report as report_lib
from sleep_jax.harness import workers
from sleep_jax.runtime import files
from tests import run_test


def _claim(barrier, root: str, trials: int, number: int, results) -> None:
  """Claims `trials` folders, each at the same moment as the other process."""
  for trial in range(trials):
    folder = pathlib.Path(root, str(trial))
    outcome = 'accepted'
    barrier.wait()
    try:
      workers.claim_workdir(folder, {'a': number})
    except config.ConfigError:
      outcome = 'refused'
    except BaseException as e:
      outcome = repr(e)
    results.put((trial, number, outcome))


def _claims(root: pathlib.Path, trials: int, numbers: tuple[int, ...]):
  """The outcomes of every trial, of processes with these configs."""
  context = multiprocessing.get_context('fork')
  barrier, results = context.Barrier(len(numbers)), context.Queue()
  started = [
    context.Process(
      target=_claim, args=(barrier, str(root), trials, number, results)
    )
    for number in numbers
  ]
  for process in started:
    process.start()
  out: dict[int, list[str]] = {}
  for _ in range(trials * len(numbers)):
    trial, _, outcome = results.get(timeout=300)
    out.setdefault(trial, []).append(outcome)
  for process in started:
    process.join()
  return list(out.values())


@pytest.mark.parametrize(
  'trials', [40, pytest.param(600, marks=pytest.mark.slow)]
)
@pytest.mark.filterwarnings('ignore:.*fork.*:RuntimeWarning')
@pytest.mark.filterwarnings('ignore:.*fork.*:DeprecationWarning')
def test_of_two_configs_at_one_moment_one_is_accepted(tmp_path, trials):
  for outcomes in _claims(tmp_path / 'two', trials, (1, 2)):
    assert sorted(outcomes) == ['accepted', 'refused']
  for outcomes in _claims(tmp_path / 'same', trials, (1, 1)):
    assert outcomes == ['accepted', 'accepted']
  assert not list(tmp_path.rglob('*.part'))


@pytest.mark.parametrize(
  'content, words',
  [
    ('', 'config.json cannot be read: Expecting value'),
    ('{"a": 1', 'config.json cannot be read'),
    ('null', 'holds a NoneType'),
    ('[]', 'holds a list'),
    ('{"wake": null}', 'another config'),
    ('{"wake": 3, "a": 1}', 'another config'),
    (None, 'no regular file'),
  ],
)
def test_a_damaged_config_of_a_work_directory_is_one_line(
  tmp_path, content, words
):
  workers.claim_workdir(tmp_path, {'a': 1})
  marker = tmp_path / 'config.json'
  marker.unlink()
  marker.mkdir() if content is None else marker.write_text(content)
  for function, args in (
    (workers.claim_workdir, (tmp_path, {'a': 1})),
    (report_lib.report_workdir, (tmp_path, tmp_path / 'out')),
  ):
    with pytest.raises(config.ConfigError) as error:
      function(*args)
    assert '\n' not in str(error.value)
  if content is None or words != 'another config':
    with pytest.raises(config.ConfigError, match=words):
      workers.claim_workdir(tmp_path, {'a': 1})


def summary(c, arm: str, seed: int, **changes) -> dict:
  """What a life that has ended leaves, with nothing in it."""
  digest = build_lib.life_digest(build_lib.arm_config(c, arm), seed)
  return {
    'task': 'facts', 'headline': ['accuracy'], 'columns': ['accuracy'],
    'final': {'accuracy': 1.0}, 'matrix': [], 'curve': [], 'learner': arm,
    'seed': seed, 'identity': digest,
  } | changes  # fmt: skip


@pytest.fixture(name='ended')
def _ended(tmp_path):
  """A work directory whose one life has ended: (config, its summary)."""
  c = run_test.small_config()
  c['seeds'] = [1]
  workers.claim_workdir(tmp_path / 'w', c)
  file = tmp_path / 'w' / 'lives' / 'sleep_1' / 'summary.json'
  file.parent.mkdir(parents=True)
  file.write_text(json.dumps(summary(c, 'sleep', 1)))
  return c, file


@pytest.mark.parametrize(
  'changes',
  [
    {'identity': 'x' * 64},
    {'identity': None},
    {'final': None},
  ],
)
def test_figures_of_another_life_are_not_reported(ended, changes):
  """They are told apart by a digest of config, arm, seed and version."""
  c, file = ended
  other = {**summary(c, 'sleep', 1), **changes}
  other = {k: v for k, v in other.items() if v is not None}
  file.write_text(json.dumps(other))
  workdir = file.parents[2]
  for function, args in (
    (live_lib.live, (c, 'sleep', 1, file.parent, 0)),
    (report_lib.report_workdir, (workdir, workdir / 'out')),
  ):
    with pytest.raises(config.ConfigError, match='another config or version'):
      function(*args)
  assert not (workdir / 'out').exists()


def test_every_life_has_an_identity_of_its_own(ended):
  c, file = ended
  assert live_lib.live(c, 'sleep', 1, file.parent, 0)['seed'] == 1
  other = json.loads(json.dumps(c))
  other['sleep']['steps'] += 1
  for settings, seed in ((c, 2), (other, 1)):
    with pytest.raises(config.ConfigError, match='another config or version'):
      live_lib.live(settings, 'sleep', seed, file.parent, 0)
  # The folder of another seed does not make it that seed's.
  shutil.copytree(file.parent, file.parents[1] / 'sleep_2')
  with pytest.raises(config.ConfigError, match='sleep_2/summary.json is of an'):
    report_lib.report_workdir(file.parents[2], file.parents[2] / 'out')


def test_a_finished_run_that_may_not_be_written_tells_its_table(
  ended, monkeypatch
):
  c, file = ended
  workdir = file.parents[2]
  before = {p: p.read_bytes() for p in workdir.rglob('*') if p.is_file()}
  monkeypatch.setattr(os, 'access', lambda *_: False)  # As of root, too.
  monkeypatch.setattr(
    report_lib, 'table', lambda lives, _: str([x['final'] for x in lives])
  )
  assert workers.run(c, workdir) == "[{'accuracy': 1.0}]"
  after = {p: p.read_bytes() for p in workdir.rglob('*') if p.is_file()}
  assert after == before
  with pytest.raises(config.ConfigError, match='another config'):
    c['sleep']['steps'] += 1
    workers.run(c, workdir)


@pytest.mark.parametrize('content', ['', '{"a"', 'null', '[]', '{}'])
def test_a_damaged_summary_is_one_line(ended, content):
  c, file = ended
  file.write_text(content)
  words = 'another config' if content == '{}' else 'cannot be read'
  workdir = file.parents[2]
  for function, args in (
    (live_lib.live, (c, 'sleep', 1, file.parent, 0)),
    (report_lib.report_workdir, (workdir, workdir / 'out')),
  ):
    with pytest.raises(config.ConfigError, match=words) as error:
      function(*args)
    assert '\n' not in str(error.value)


def test_files_are_written_through_no_link(tmp_path):
  """Whatever is in the folder already, under whatever name."""
  victim = tmp_path / 'victim'
  victim.write_text('precious')
  folder = tmp_path / 'w'
  folder.mkdir()
  (folder / 'a.json').symlink_to(victim)
  files.write(folder / 'a.json', 'new')
  assert (folder / 'a.json').read_text() == 'new'
  (folder / '.lock').symlink_to(victim)
  with pytest.raises(OSError):
    with files.lock_dir(folder):
      pass
  assert victim.read_text() == 'precious'


def test_a_part_is_made_anew_or_not_at_all(tmp_path, monkeypatch):
  monkeypatch.setattr(files.uuid, 'uuid4', lambda: files.uuid.UUID(int=1))
  part = tmp_path / f'a.json.{files.uuid.UUID(int=1).hex}.part'
  victim = tmp_path / 'victim'
  part.symlink_to(victim)
  with pytest.raises(FileExistsError):
    files.write(tmp_path / 'a.json', 'new')
  assert not victim.exists() and not (tmp_path / 'a.json').exists()


def test_a_write_that_fails_leaves_what_was_there(tmp_path):
  (tmp_path / 'a').write_text('old')
  with pytest.raises(KeyboardInterrupt):
    with files.atomic(tmp_path / 'a') as f:
      f.write(b'ne')
      raise KeyboardInterrupt
  assert (tmp_path / 'a').read_text() == 'old'
  assert [p.name for p in tmp_path.iterdir()] == ['a']


def test_a_full_disk_leaves_what_was_there(tmp_path):
  workers.claim_workdir(tmp_path, {'a': 1})
  before = (tmp_path / 'config.json').read_text()
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (4, hard))
  try:
    with pytest.raises(OSError, match='large'):
      workers.claim_workdir(tmp_path, {'a': 1})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert (tmp_path / 'config.json').read_text() == before
  assert not list(tmp_path.glob('*.part'))


def test_a_lock_of_a_deleted_folder_is_not_one(tmp_path, monkeypatch):
  """Who waits for the lock has the folder that is there afterwards."""
  folder, flock, calls = tmp_path / 'w', files.fcntl.flock, []

  def deleted_meanwhile(lock: int, kind: int) -> None:
    if not calls:
      shutil.rmtree(folder)
    calls.append(kind)
    flock(lock, kind)

  monkeypatch.setattr(files.fcntl, 'flock', deleted_meanwhile)
  with files.lock_dir(folder):
    assert os.path.samefile(folder / '.lock', folder / '.lock')
  assert len(calls) == 2
