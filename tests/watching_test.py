"""Goodput, the profiler's window, and receivers of what a life measures."""

import logging
import sys
import time
import types

import jax
import jax.numpy as jnp
from matplotlib import figure
import pytest
from tensorboard.backend.event_processing import event_accumulator
from tensorboard.summary.writer import event_file_writer

from sleep_jax import config
from sleep_jax.harness import live as live_lib
from sleep_jax.harness import workers
from sleep_jax.metrics import goodput as goodput_lib
from sleep_jax.metrics import table as table_lib
from sleep_jax.metrics import writers as writers_lib
from sleep_jax.runtime import profiling
from tests import harness_test
from tests import run_test


class Library(types.ModuleType):
  """A wandb that keeps its calls, and may fail in one of its functions."""

  def __init__(self, fails: str = ''):
    super().__init__('wandb')
    self.calls, self._fails = [], fails

  def init(self, **settings):
    self._fail('init')
    self.calls.append(settings)
    return types.SimpleNamespace(log=self.log, finish=self.finish)

  def log(self, values):
    self._fail('log')
    self.calls.append(values)

  def finish(self):
    self._fail('finish')
    self.calls.append('finished')

  def Table(self, columns, data):
    self._fail('Table')
    return columns, data

  def Image(self, path):
    return path

  def _fail(self, function):
    if function == self._fails:
      raise RuntimeError('there is no network')

  def nights(self, name='eval/accuracy'):
    return [c['night'] for c in self.calls if name in c]


def watched(monkeypatch, fails=''):
  """Settings of a small life with a library that is watched itself."""
  library = Library(fails)
  monkeypatch.setitem(sys.modules, 'wandb', library)
  return harness_test.settings(writers=['wandb']), library


def test_a_life_is_watched(tmp_path, monkeypatch):
  library = Library()
  monkeypatch.setitem(sys.modules, 'wandb', library)
  c = run_test.small_config()
  c |= {'writers': ['wandb'], 'profile': {'steps': '3:8'}}
  summary = live_lib.live(c, 'sleep', 1, tmp_path, 0)
  first, *logged, end = library.calls
  assert first['name'] == 'sleep_1' and end == 'finished'
  assert first['config']['sleep']['steps'] == 6
  assert library.nights() == [0, 1]
  # Curves within the nights: wake, then rounds of three seeding steps.
  kl = [c['steps'] for c in logged if 'steps/sleep/level2/kl' in c]
  assert kl == [5, 8, 13, 16]
  columns, dreams = next(c['dreams'] for c in logged if 'dreams' in c)
  assert columns == ['kind', 'dream'] and len(dreams) == 8
  shares = summary['goodput']
  assert 0 <= shares['goodput'] < 1 and shares['lost_compile'] > 0
  assert abs(sum(shares.values()) - 1) < 1e-6
  assert {'lost_checkpoint', 'lost_eval', 'lost_start'} <= set(shares)
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


def events(folder):
  accumulator = event_accumulator.EventAccumulator(str(folder))
  accumulator.Reload()
  return accumulator


def test_a_resumed_life_tells_no_night_and_no_step_twice(tmp_path, monkeypatch):
  c, library = watched(monkeypatch)
  with monkeypatch.context() as m:
    harness_test.dies_at(m, 1, 'wake')
    with pytest.raises(KeyboardInterrupt):
      live_lib.live(c, 'parrot', 1, tmp_path, 0)
  live_lib.live(c, 'parrot', 1, tmp_path, 0)
  assert library.nights() == [0, 1]
  steps = [c['steps'] for c in library.calls if 'steps/wake/loss' in c]
  assert steps == [1, 2, 3, 4]
  starts = [c for c in library.calls if 'project' in c]
  assert len({start['id'] for start in starts}) == 1 < len(starts)
  assert starts[1]['resume'] == 'allow'
  board = events(tmp_path)

  def steps_of(records) -> list[int]:
    # Two files of one second and one process are read in any order.
    return sorted(e.step for e in records)

  assert steps_of(board.Scalars('eval/accuracy')) == [0, 1]
  assert steps_of(board.Scalars('steps/wake/loss')) == [1, 2, 3, 4]
  assert steps_of(board.Tensors('dreams')) == [0, 1]


@pytest.mark.parametrize('fails', ['init', 'log', 'Table', 'finish'])
def test_a_writer_that_fails_warns_once_and_the_others_go_on(
  fails, tmp_path, monkeypatch, caplog
):
  c, _ = watched(monkeypatch, fails)
  with caplog.at_level(logging.WARNING):
    sinks = writers_lib.build(tmp_path, 'parrot_1', c)
    for night in (0, 1):
      sinks.scalars({'eval/accuracy': 0.5}, 'night', night)
      sinks.table('dreams', table_lib.Table('', ['kind'], [['a']]), night)
    sinks.close()
  (warning,) = (r for r in caplog.records if 'wandb' in r.getMessage())
  assert 'there is no network' in warning.getMessage()
  board = events(tmp_path)
  assert (
    len(board.Scalars('eval/accuracy')) == len(board.Tensors('dreams')) == 2
  )


def test_a_life_goes_on_where_all_writers_fail(tmp_path, monkeypatch, caplog):
  def full(self, event):
    raise OSError('No space left on device')

  c, library = watched(monkeypatch, 'log')
  monkeypatch.setattr(event_file_writer.EventFileWriter, 'add_event', full)
  with caplog.at_level(logging.WARNING):
    summary = live_lib.live(c, 'parrot', 1, tmp_path, 0)
  assert summary['matrix'] == [[1.0], [0.0, 1.0]]
  for name in ('tensorboard', 'wandb'):
    assert caplog.text.count(f'The writer {name} failed') == 1
  assert library.nights() == []
  assert len(harness_test.records_of(tmp_path)) == 2


def test_the_report_goes_to_the_writers_once(tmp_path, monkeypatch):
  c, library = watched(monkeypatch)
  c['seeds'] = [1]
  for _ in range(2):
    workers.run(c, tmp_path)
  board = events(tmp_path)
  assert {'report/retention', 'report/recall', 'report/cost'} == set(
    board.Tags()['images']
  )
  image = board.Images('report/cost')[0]
  assert image.encoded_image_string == (tmp_path / 'cost.png').read_bytes()
  (table,) = board.Tensors('report/table1')
  text = table.tensor_proto.string_val[0].decode()
  assert text.startswith('| learner | accuracy |') and table.step == 1
  reports = [c for c in library.calls if 'report/table1' in c]
  assert len(reports) == 1 and reports[0]['report/table1'][0][0] == 'learner'
  hparams = events(tmp_path / 'lives/parrot_1').PluginTagToContent('hparams')
  assert b'task.name' in next(iter(hparams.values()))


def test_a_dream_stays_in_its_cell():
  table = table_lib.Table('', ['kind', 'dream'], [['a', 'x | y\n# z\r\nw']])
  assert table.markdown().splitlines()[2] == '| a | x \\| y # z w |'


def test_settings_are_flat_in_a_board():
  c = {'a': {'b': 1, 'c': None}, 'levels': [{'d': 0.5}], 'seeds': [1, 2]}
  assert writers_lib.flatten(c) == {
    'a.b': 1,
    'a.c': 'None',
    'levels.0.d': 0.5,
    'seeds': '1, 2',
  }


@pytest.mark.parametrize('name', ['wandb', 'trackio'])
def test_the_real_library_takes_what_it_is_given(name, tmp_path, monkeypatch):
  pytest.importorskip(name, reason=f'{name} is not installed')
  monkeypatch.setenv('WANDB_MODE', 'offline')
  monkeypatch.setenv('WANDB_DIR', str(tmp_path))
  monkeypatch.setenv('TRACKIO_DIR', str(tmp_path))
  picture = tmp_path / 'a.png'
  figure.Figure().savefig(picture)
  for _ in range(2):  # Started, and resumed.
    sink = writers_lib.Library(name, 'test', tmp_path, 'sleep_1')
    sink.start({'sleep': {'steps': 3}, 'seeds': [1]})
    sink.scalars({'eval/accuracy': 0.5}, 'night', 0)
    sink.scalars({'wake/loss': 0.5}, 'steps', 10)
    sink.table('dreams', table_lib.Table('', ['kind'], [['<script>']]), 0)
    sink.picture('report/cost', picture, 0)
    sink.close()


def test_goodput_tells_compilation_from_work():
  spent = goodput_lib.Goodput()
  start = time.perf_counter()
  # A constant nobody else has: the program is not in any cache.
  f = jax.jit(lambda x: jnp.sin(x) + time.time())
  f(jnp.ones(3)).block_until_ready()
  time.sleep(0.3)
  worked = time.perf_counter() - start
  with spent.lost_to('checkpoint'):
    time.sleep(0.1)
  shares = spent.report({'update': worked, 'eval': 0.0})
  assert shares['lost_compile'] > 0
  assert shares['lost_checkpoint'] > 0.1
  assert shares['goodput'] > 0.3


@pytest.mark.parametrize('steps', ('5', '9:3', 'a:b', '4:4'))
def test_a_bad_window_is_refused(steps, tmp_path):
  with pytest.raises(config.ConfigError, match='profile.steps'):
    profiling.Window(steps, tmp_path)


def test_unknown_and_absent_writers_are_refused(monkeypatch, tmp_path):
  with pytest.raises(config.ConfigError, match="writers='mlflow'"):
    writers_lib.check(['mlflow'])
  monkeypatch.setitem(sys.modules, 'trackio', None)
  c = harness_test.settings(writers=['trackio'])
  with pytest.raises(config.ConfigError, match='pip install trackio'):
    workers.run(c, tmp_path / 'w')
  assert not (tmp_path / 'w').exists()
