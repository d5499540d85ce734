"""Metrics by depth: how many steps of reasoning N passes reach.

A metric at a depth is named by the metric, a letter and the depth: `exact_k4`.
One life has several of them (Depo); or one, and then the name of its arm ends
in the depth (`_t4`).
"""

from collections import defaultdict
from collections.abc import Sequence
import pathlib
import re
from typing import Any

from matplotlib import figure as figure_lib
import numpy as np

from sleep_jax.harness import style
from sleep_jax.harness import tables
from sleep_jax.metrics import statistics
from sleep_jax.metrics import table as table_lib

# By arm without its depth, depth, and seed.
Points = dict[str, dict[int, dict[int, float]]]


def _at_depths(metrics: dict[str, float], metric: str) -> dict[int, float]:
  pattern = rf'{re.escape(metric)}_[a-z]+(\d+)'
  matches = {name: re.fullmatch(pattern, name) for name in metrics}
  return {int(m[1]): metrics[name] for name, m in matches.items() if m}


def points(lives: Sequence[dict[str, Any]], metric: str) -> Points:
  """Final `metric` of every arm, depth and seed."""
  out = defaultdict(lambda: defaultdict(dict))
  for life in lives:
    arm = re.sub(r'_t\d+$', '', life['learner'])
    for depth, value in _at_depths(life['final'], metric).items():
      out[arm][depth][life['seed']] = value
  return {arm: dict(sorted(of.items())) for arm, of in out.items()}


def chance_levels(
  lives: Sequence[dict[str, Any]], metric: str
) -> dict[int, float]:
  """Chance level of `metric` by depth."""
  out = {}
  for life in lives:
    out |= _at_depths(life['chance_level'], metric)
  return dict(sorted(out.items()))


def report(
  lives: Sequence[dict[str, Any]], metric: str, reference: str
) -> list[table_lib.Table]:
  """Metric by depth; gains over the first arm; `reference` minus the others.

  The last column, the gain at the deepest depth minus that at the shallowest,
  says whether a gain grows with depth. No table if there are fewer than two
  depths.
  """
  values, chance = points(lives, metric), chance_levels(lives, metric)
  if len(chance) < 2:
    return []
  rows = [['(chance)', *(f'{p:.3f}' for p in chance.values())]]
  for arm, of_arm in values.items():
    rows.append([arm, *(_cell(of_arm.get(d, {})) for d in chance)])
  header = [f'{metric} at depth', *map(str, chance)]
  out = [table_lib.Table('By depth', header, rows)]
  baseline, *others = values
  pairs = [(arm, baseline) for arm in others]
  if reference in others:
    pairs += [(reference, arm) for arm in others if arm != reference]
  rows = [_gains(values, a, b, list(chance)) for a, b in pairs]
  header = ['gain', *map(str, chance), 'deepest minus shallowest']
  return out + ([table_lib.Table('', header, rows)] if rows else [])


def _gains(values: Points, a: str, b: str, depths: Sequence[int]) -> list[str]:
  """A row: `a` minus `b`, paired by seed, at every depth that both have."""
  gains = []
  for depth in depths:
    of_a, of_b = values[a].get(depth, {}), values[b].get(depth, {})
    gains.append({s: of_a[s] - of_b[s] for s in of_a if s in of_b})
  first, last = gains[0], gains[-1]
  growth = {s: last[s] - first[s] for s in first if s in last}
  return [f'{a} - {b}', *(_cell(g, '+') for g in (*gains, growth))]


def _cell(by_seed: dict[int, float], sign: str = '') -> str:
  return tables.cell(list(by_seed.values()), sign) if by_seed else ''


def draw(
  lives: Sequence[dict[str, Any]],
  metric: str,
  path: pathlib.Path,
  reference: str = '',
) -> None:
  """A picture of means and intervals over depth, and of the chance level."""
  figure = figure_lib.Figure(figsize=(8, 4), layout='constrained')
  axis = figure.subplots()
  values, chance = points(lives, metric), chance_levels(lives, metric)
  looks = style.styles(list(values), re.sub(r'_t\d+$', '', reference))
  for index, (arm, look) in enumerate(looks.items()):
    of_arm = values[arm]
    means = [statistics.interval(list(x.values())) for x in of_arm.values()]
    mean, half = np.array(means).T
    position = np.arange(len(chance))[[list(chance).index(d) for d in of_arm]]
    axis.errorbar(
      # Shifted, so that intervals do not cover one another.
      position + 0.06 * (index - len(values) / 2),
      mean,
      np.nan_to_num(half),
      capsize=3,
      label=style.label(arm),
      **look.kwargs(),
    )
  axis.plot(range(len(chance)), list(chance.values()), 'k--', label='chance')
  axis.set(xlabel='depth', ylabel=metric, ylim=(0, 1.05))
  axis.set_xticks(range(len(chance)), map(str, chance))
  axis.grid(alpha=0.3)
  style.legend(figure, axis)
  style.save(figure, path)
