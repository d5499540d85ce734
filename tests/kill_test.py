"""A life that is killed, and goes on, ends as one that never was: all bits."""

import pytest

from tests import killing


@pytest.mark.slow
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


@pytest.mark.slow
def test_twenty_lives_killed_at_random_moments_end_the_same():
  result = killing.prove(kills=20, seed=2)
  assert result['equal'] == 20, result
