"""A grid of settings is one experiment, which several jobs can share."""

import json
import subprocess
import sys

import pytest

from experiments import grid
from experiments.configs import facts
from sleep_jax import config
from sleep_jax.harness import build as build_lib
from sleep_jax.harness import workers
from tests import harness_test
from tests import run_test


@pytest.fixture(name='settings')
def _settings():
  return json.loads(facts.get_config('hard').to_json())


def of_arm(c, arm):
  return build_lib.arm_config(c, arm)


def test_every_point_of_a_grid_is_an_arm(settings):
  axes = [
    grid.parse_axis('sleep.steps=100,200'),
    grid.parse_axis('model.levels.0.learning_rate=0.01,0.02'),
  ]
  c = grid.over_grid(settings, axes, ['sleep', 'replay_archive'])
  assert len(c['arms']) == 8
  arm = of_arm(c, 'sleep-steps=200-learning_rate=0.01')
  assert arm['sleep']['steps'] == 200
  assert [x['learning_rate'] for x in arm['model']['levels']] == [
    0.01,
    settings['model']['levels'][1]['learning_rate'],
  ]
  replay = of_arm(c, 'replay_archive-steps=100-learning_rate=0.01')
  assert replay['learner'] == 'replay'
  assert replay['learner_config'] == {'archive': 3000}
  assert settings['sleep']['steps'] not in (100, 200)


def test_a_grid_outranks_what_an_arm_sets(settings):
  axes = [grid.parse_axis('finetune.learning_rate=0.5')]
  c = grid.over_grid(settings, axes, ['replay_archive'])
  arm = of_arm(c, 'replay_archive-learning_rate=0.5')
  assert arm['finetune']['learning_rate'] == 0.5
  own = settings['arms']['replay_archive']['finetune']
  assert arm['finetune']['batch'] == own['batch']


@pytest.mark.parametrize(
  'axis, arms, message',
  [
    ('steps=1', '', 'write SECTION.NAME=VALUE'),
    ('sleep.steps=', '', 'write SECTION.NAME=VALUE'),
    ('sleep.stepz=1', '', "no setting 'stepz'"),
    ('slep.steps=1', '', "no setting 'slep'"),
    ('model.levels.7.rank=1', '', "no setting '7'"),
    ('sleep.steps=1', 'slep', "arm='slep' is unknown"),
  ],
)
def test_a_wrong_grid_is_refused(settings, axis, arms, message):
  with pytest.raises(config.ConfigError, match=message):
    grid.over_grid(settings, [grid.parse_axis(axis)], arms.split())


@pytest.mark.parametrize('text', ['0/2', '3/2', '1', 'a/b', '1/0'])
def test_a_wrong_share_is_refused(text):
  with pytest.raises(config.ConfigError, match='write I/N'):
    workers.parse_share(text)


def test_jobs_share_lives_and_the_last_writes_the_table(tmp_path):
  c = harness_test.settings()
  assert workers.run(c, tmp_path, (1, 2)).startswith('2 of 4 lives have ended')
  assert not (tmp_path / 'table.md').exists()
  table = workers.run(c, tmp_path, (0, 2))
  assert table.startswith('echo, 2 nights, 2 seed(s)')


@pytest.mark.slow
def test_a_sweep_of_two_jobs_as_a_user_types_it(tmp_path):
  """At the same time, as a cluster runs them."""
  small = [f'--config.{k}={v}' for k, v in run_test.SMALL.items()]
  jobs = [
    subprocess.Popen(
      [
        *(sys.executable, '-m', 'experiments.sweep'),
        '--config=experiments/configs/quickstart.py',
        *small,
        '--grid=task.probes=1,2',
        '--arms=icl',
        f'--share={share}',
        f'--workdir={tmp_path}',
      ],
      cwd=run_test.ROOT,
      stdout=subprocess.PIPE,
      text=True,
    )
    for share in ('1/2', '2/2')
  ]
  said = [job.communicate()[0] for job in jobs]
  assert [job.returncode for job in jobs] == [0, 0]
  table = (tmp_path / 'table.md').read_text()
  for probes in (1, 2):
    assert f'| icl-probes={probes} |' in table
    assert any(f'| icl-probes={probes} |' in text for text in said)
