"""The alarm for policies that degenerate."""

import pytest

from sleep_jax.learners import collapse

_HEALTHY = dict(
  reward=0.5, entropy=1.0, length=20.0, truncated=0.1, repetition=0.1
)


def ring(now: dict[str, float], steps: int = 8) -> None:
  alarm = collapse.Alarm()
  for _ in range(8):
    alarm.tell(_HEALTHY)
  for _ in range(steps):
    alarm.tell(_HEALTHY | now)


@pytest.mark.parametrize(
  'name, value',
  [
    ('truncated', 0.9),
    ('repetition', 0.8),
    ('length', 3.0),
    ('entropy', 0.05),
    ('entropy', 3.5),
  ],
)
def test_it_rings_for_what_degenerates_as_the_reward_falls(name, value):
  with pytest.raises(collapse.Collapsed, match=f'{name} went from'):
    ring({name: value, 'reward': 0.2})
  ring({name: value, 'reward': 0.2}, steps=7)  # Not for a few steps.
  ring({name: value, 'reward': 0.6})  # Nor where it serves the reward.
  ring({'reward': 0.2})  # Nor for a reward alone.


def test_repetition_is_the_share_of_grams_that_occurred_before():
  assert collapse.repetition([[1, 2, 3, 4, 5, 6]]) == 0.0
  assert collapse.repetition([[1] * 9]) == pytest.approx(5 / 6)
  assert collapse.repetition([[1] * 9, [1, 2]]) == pytest.approx(5 / 12)
