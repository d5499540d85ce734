"""Short lives end with the metrics that version 0.1 gave them.

`golden/figures.json` was recorded with version 0.1 in float32, with two cores
and eight host devices, as the tests have. Another processor, or another number
of threads, may add in another order, and hundreds of training steps amplify
that; so the file holds a digest of what the recording machine computed, and
elsewhere these tests are skipped, and where the compiler optimises less, as it
does for all other tests:

  XLA_FLAGS=--xla_backend_optimization_level=3 \\
      python -m pytest tests/golden_test.py
"""

import hashlib
import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import tasks
from sleep_jax.harness import live as live_lib
from tests import golden_lives

RECORDED = json.loads(
  (pathlib.Path(__file__).parent / 'golden/figures.json').read_text()
)
FIGURES = RECORDED['figures']
# All else is behind the marker.
_DEFAULT = {('both_sleeps', 'recurrence_brief')}
# The digest does not tell all machines apart: on one that it knows, a loss
# differed by 1.6e-6 of itself.
_RELATIVE = 1e-5


def arithmetic_digest() -> str:
  """SHA-256 of a short computation, and of how many threads there are."""

  @jax.jit
  def chain(x):
    for _ in range(8):
      x = jax.nn.softmax(3.0 * (x @ x.T)) @ x - jax.nn.silu(x)
    return x

  x = jnp.sin(jnp.arange(192 * 64.0)).reshape(192, 64)
  threads = f'{os.cpu_count()} {jax.device_count()}'
  bits = np.asarray(chain(x)).tobytes()
  return hashlib.sha256(threads.encode() + bits).hexdigest()


@pytest.fixture(name='same_arithmetic', scope='module')
def _same_arithmetic():
  if arithmetic_digest() != RECORDED['arithmetic']:
    pytest.skip('this machine computes other bits than the one that recorded')


def _cases():
  for name, arms in FIGURES.items():
    for arm in arms:
      slow = [] if (name, arm) in _DEFAULT else [pytest.mark.slow]
      yield pytest.param(name, arm, id=f'{name}-{arm}', marks=slow)


@pytest.mark.usefixtures('same_arithmetic')
@pytest.mark.parametrize('name, arm', _cases())
def test_a_short_life_ends_as_it_did(name, arm, tmp_path, monkeypatch):
  c = json.loads(golden_lives.get_config(name).to_json())
  if name == 'banking':
    _shorten(monkeypatch)
  final = live_lib.live(c, arm, 1, tmp_path, 0)['final']
  want = FIGURES[name][arm]
  assert set(want) <= set(final)
  assert {k: final[k] for k in want} == pytest.approx(
    want, rel=_RELATIVE, abs=1e-9, nan_ok=True
  )


def _shorten(monkeypatch) -> None:
  """The task has one episode; its stream is that of the whole data set."""
  build = tasks.build

  def build_one_episode(*args):
    task = build(*args)
    task.episodes = 1
    return task

  monkeypatch.setattr(tasks, 'build', build_one_episode)
