"""The diagnosis of a life's last night agrees with the life's own records."""

import json
import re

import jax
import numpy as np
import pytest

from experiments import diagnose
from experiments.configs import common
from experiments.configs import quickstart
from sleep_jax import config
from sleep_jax.data import experience as experience_lib
from sleep_jax.harness import live as live_lib
from sleep_jax.harness import report as report_lib
from sleep_jax.harness import workers
from sleep_jax.lifecycle.consolidation import generation

SMALL = {
  'task.episodes': 2,
  'task.rows': 64,
  'task.probes': 1,
  'sleep.steps': 40,
  'sleep.dreams': 64,
  'sleep.batch': 16,
  'sleep.lam': 0.0,
  'sleep.alpha': 1.0,
  'sleep.max_kl_share': 9.0,
  'model.levels[0].sleep_every': 8,
}


@pytest.fixture(name='lived', scope='module')
def _lived(tmp_path_factory):
  """A config, its work directory, and the summary of its life."""
  c = quickstart.get_config()
  c.update_from_flattened_dict({k: v for k, v in SMALL.items() if '[' not in k})
  c.model.levels[0].sleep_every = SMALL['model.levels[0].sleep_every']
  c.arms = {'sleep': {}, 'wake_only': common.WAKE_ONLY}
  c = json.loads(c.to_json())
  workdir = tmp_path_factory.mktemp('diagnose')
  folder = workdir / 'lives' / 'sleep_1'
  summary = live_lib.live(c, 'sleep', 1, folder, 0)
  workers.claim_workdir(workdir, c)
  return report_lib.read_config(workdir), workdir, summary


def test_marks_are_those_of_the_life(lived):
  c, workdir, summary = lived
  night = diagnose.load(c, 'sleep', 1, workdir / 'lives' / 'sleep_1')
  assert night.episode == 1
  marks = diagnose.marks(night)
  after = marks['after the night']
  np.testing.assert_allclose(after.by_episode, summary['matrix'][-1])
  # The model before the second day has not read it.
  assert (
    marks['before the day'].by_episode
    != marks['after the day (reading)'].by_episode
  )


def test_the_expert_takes_the_kl_away_where_it_was_seeded(lived):
  c, workdir, _ = lived
  night = diagnose.load(c, 'sleep', 1, workdir / 'lives' / 'sleep_1')
  left = diagnose.seeding_left(night, jax.random.key(0))
  assert left['day']['with'] < 0.9 * left['day']['without']
  assert all(0 < x['gate'] < 1 for x in left.values())


def test_the_report_has_a_row_of_every_stage(lived):
  c, workdir, _ = lived
  text = diagnose.diagnose(c, 'sleep_1', workdir)
  for name in ('before the day', 'after the night', 'after it', 'past'):
    (row,) = re.findall(rf'^\| {name} \|.*\|$', text, re.M)[-1:]
    assert re.search(r'\d\.\d{3}', row)


def test_dreams_are_audited_where_the_task_knows_the_truth(lived):
  c, workdir, _ = lived
  night = diagnose.load(c, 'sleep', 1, workdir / 'lives' / 'sleep_1')
  told = night.task.experience(1).tokens[:4]
  lengths = np.full(4, told.shape[1])
  documents = generation.Documents(told, lengths, lengths, lengths, lengths)
  (shares,) = diagnose.audit(night, {'the day': documents}).values()
  assert shares.pop('true') == 1.0 and np.isnan(shares.pop('believed'))
  assert not any(shares.values())


def test_coverage_counts_what_dreams_have_of_a_day():
  assert diagnose.ngrams(np.array([1, 2, 3, 4, 5])) == {
    (1, 2, 3, 4),
    (2, 3, 4, 5),
  }
  assert not diagnose.ngrams(np.array([1, 2, 3]))


@pytest.mark.parametrize(
  'life, message',
  [
    ('sleep', "--life='sleep' is not ARM_SEED"),
    ('nobody_1', "--life='nobody_1' is not ARM_SEED"),
    ('wake_only_1', 'wake_only has no nights'),
    ('sleep_7', 'does not hold both sides of a night'),
  ],
)
def test_a_life_that_cannot_be_diagnosed(lived, life, message):
  c, workdir, _ = lived
  with pytest.raises(config.ConfigError, match=re.escape(message)):
    diagnose.diagnose(c, life, workdir)


def test_of_many_days_means_of_several_are_shown():
  days = [float(i) for i in range(45)]
  answered = experience_lib.EvalResult(
    metrics={'accuracy': 0.5}, by_episode=days
  )
  dreamt = {'ended': 1.0, 'distinct': 1.0, 'of the days': days}
  text = diagnose.report({'after': answered}, {'after it': dreamt}, {}, {})
  header, _, cells = text.splitlines()[2:5]
  columns = [x.strip() for x in header.strip('|').split('|')]
  assert columns[1:3] == ['day 1 to 3', 'day 4 to 6'] and len(columns) == 17
  assert cells.split('|')[2].strip() == '1.000'
