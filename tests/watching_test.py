"""Goodput, the profiler's window, and writers that come from elsewhere."""

import sys
import time
import types

import jax
import jax.numpy as jnp
import pytest

from sleep_jax import config
from sleep_jax.harness import live as live_lib
from sleep_jax.metrics import goodput as goodput_lib
from sleep_jax.metrics import writers as writers_lib
from sleep_jax.runtime import profiling
from tests import run_test


class Library(types.ModuleType):
  """A wandb that keeps its calls."""

  def __init__(self):
    super().__init__('wandb')
    self.calls = []

  def init(self, **settings):
    self.calls.append(settings)
    return types.SimpleNamespace(
      log=lambda scalars, step: self.calls.append((step, scalars)),
      finish=lambda: self.calls.append('finished'),
    )


def test_a_life_is_watched(tmp_path, monkeypatch):
  library = Library()
  monkeypatch.setitem(sys.modules, 'wandb', library)
  c = run_test.small_config()
  c |= {'writers': ['wandb'], 'profile': {'steps': '3:8'}}
  summary = live_lib.live(c, 'sleep', 1, tmp_path, 0)
  first, *nights, end = library.calls
  assert first['name'] == 'sleep_1' and end == 'finished'
  assert [step for step, _ in nights] == [0, 1]
  assert 'eval/accuracy' in nights[0][1]
  shares = summary['goodput']
  assert 0 <= shares['goodput'] < 1 and shares['lost_compile'] > 0
  assert abs(sum(shares.values()) - 1) < 1e-6
  assert {'lost_checkpoint', 'lost_eval', 'lost_start'} <= set(shares)
  assert list((tmp_path / 'profile').rglob('*.xplane.pb'))


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


def test_unknown_and_absent_writers_are_refused(monkeypatch):
  with pytest.raises(config.ConfigError, match="writers='mlflow'"):
    writers_lib.build(('mlflow',), 'p', 'l', {})
  monkeypatch.setitem(sys.modules, 'trackio', None)
  with pytest.raises(config.ConfigError, match='pip install trackio'):
    writers_lib.build(('trackio',), 'p', 'l', {})
