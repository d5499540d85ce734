"""Metrics by depth, from lives of one depth each or of several."""

from sleep_jax.harness import depth
from sleep_jax.harness import tables


def life(arm, seed, metrics, chance=0.25):
  return {
    'learner': arm,
    'seed': seed,
    'final': metrics | {'exact': 0.5},
    'chance_level': dict.fromkeys(metrics, chance) | {'exact': chance},
  }


def test_arms_of_one_depth_each_become_one_series():
  lives = [
    life(f'{arm}_t{t}', seed, {f'exact_t{t}': value + seed / 100})
    for arm, values in (('a', (0.9, 0.8)), ('b', (0.9, 0.5)))
    for t, value in zip((8, 4), values[::-1])
    for seed in (1, 2)
  ]
  points = depth.points(lives, 'exact')
  assert list(points) == ['a', 'b'] and list(points['a']) == [4, 8]
  assert points['b'][8] == {1: 0.51, 2: 0.52}
  text = tables.text(depth.report(lives, 'exact', 'none'))
  assert '| (chance) | 0.250 | 0.250 |' in text
  # Level at depth 4, 0.3 behind at depth 8: the same on both seeds.
  gains = '+0.000 ± 0.000 | -0.300 ± 0.000 | -0.300 ± 0.000'
  assert f'| b - a | {gains} |' in text


def test_one_life_evaluated_at_several_depths(tmp_path):
  lives = [
    life('a', 1, {'exact_k1': 0.9, 'exact_k16': 0.3}),
    life('b', 1, {'exact_k1': 0.8, 'exact_k16': 0.4}),
  ]
  text = tables.text(depth.report(lives, 'exact', 'b'))
  assert '| a | 0.900 | 0.300 |' in text
  assert '| b - a | -0.100 | +0.100 | +0.200 |' in text
  depth.draw(lives, 'exact', tmp_path / 'depths.png')
  assert (tmp_path / 'depths.png').stat().st_size > 1000


def test_without_depths_there_is_no_report():
  assert depth.report([life('a', 1, {'exact_t4': 1.0})], 'exact', 'a') == []


def test_an_arm_that_lacks_a_depth_is_compared_at_the_others():
  lives = [
    life('a_t4', 1, {'exact_t4': 0.9}),
    life('a_t8', 1, {'exact_t8': 0.9}),
    life('long_t4', 1, {'exact_t4': 0.7}),
  ]
  lives.append(life('more_t4', 1, {'exact_t4': 0.8}))
  text = tables.text(depth.report(lives, 'exact', 'more'))
  assert '| long | 0.700 |  |' in text
  assert '| long - a | -0.200 |  |  |' in text
  assert '| more - long | +0.100 |  |  |' in text
