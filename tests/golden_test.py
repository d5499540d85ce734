"""Short lives end with the metrics that version 0.1 gave them.

`golden/figures.json` was recorded with version 0.1 in float32, with two cores
and eight host devices, as the tests have. Another processor, or another number
of threads, may add in another order, and hundreds of training steps amplify
that; so the file holds a digest of what the recording machine computed, and
elsewhere these tests are skipped. Each life has a process of its own, in which
programs are optimised as they are for users.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from tests import conftest

RECORDED = json.loads(
  (pathlib.Path(__file__).parent / 'golden/figures.json').read_text()
)
FIGURES = RECORDED['figures']
# Lives that together have every kind of wake; nights are behind the marker.
_DEFAULT = {
  ('rule110', 'passes_2'),
  ('both_sleeps', 'recurrence_brief'),
  ('quickstart', 'sft'),
}
# The digest does not tell all machines apart: on one that it knows, a loss
# differed by 1.6e-6 of itself.
_RELATIVE = 1e-5


def _cases():
  for name, arms in FIGURES.items():
    for arm in arms:
      slow = [] if (name, arm) in _DEFAULT else [pytest.mark.slow]
      yield pytest.param(name, arm, id=f'{name}-{arm}', marks=slow)


@pytest.mark.parametrize('name, arm', _cases())
def test_a_short_life_ends_as_it_did(name, arm):
  flags = os.environ['XLA_FLAGS'].replace(conftest.COMPILE_FAST, '')
  done = subprocess.run(
    [sys.executable, '-m', 'tests.golden_lives', name, arm],
    env=os.environ | {'XLA_FLAGS': flags},
    stdout=subprocess.PIPE,
    check=True,
    text=True,
  )
  result = json.loads(done.stdout.splitlines()[-1])
  if result['arithmetic'] != RECORDED['arithmetic']:
    pytest.skip('this machine computes other bits than the one that recorded')
  final, want = result['final'], FIGURES[name][arm]
  assert set(want) <= set(final)
  assert {k: final[k] for k in want} == pytest.approx(
    want, rel=_RELATIVE, abs=1e-9, nan_ok=True
  )
