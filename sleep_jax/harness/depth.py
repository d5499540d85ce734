"""Marks against depth: how many steps of reasoning a sleep of N passes reaches.

A life's marks at a depth end in a letter and the depth: `exact_k4`. One life
has several of them (Depo), or one, and its arm's name ends with it (`_t4`).
"""

from collections import defaultdict
from collections.abc import Sequence
import pathlib
import re
from typing import Any

import matplotlib
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)
import numpy as np  # noqa: E402

from sleep_jax.harness import tables
from sleep_jax.metrics import statistics

matplotlib.use('Agg')

# By arm without its depth, depth, and seed.
Points = dict[str, dict[int, dict[int, float]]]


def _at_depths(marks: dict[str, float], mark: str) -> dict[int, float]:
  found = {k: re.fullmatch(rf'{re.escape(mark)}_[a-z]+(\d+)', k) for k in marks}
  return {int(m[1]): marks[k] for k, m in found.items() if m}


def points(lives: Sequence[dict[str, Any]], mark: str) -> Points:
  """What every life reached, at every depth that it was asked at."""
  out = defaultdict(lambda: defaultdict(dict))
  for life in lives:
    arm = re.sub(r'_t\d+$', '', life['learner'])
    for depth, value in _at_depths(life['final'], mark).items():
      out[arm][depth][life['seed']] = value
  return {arm: dict(sorted(of.items())) for arm, of in out.items()}


def chances(lives: Sequence[dict[str, Any]], mark: str) -> dict[int, float]:
  """What one who knows nothing of the context reaches, at every depth."""
  found = {}
  for life in lives:
    found |= _at_depths(life['chances'], mark)
  return dict(sorted(found.items()))


def report(lives: Sequence[dict[str, Any]], mark: str, reference: str) -> str:
  """Marks by depth; what arms gain over the first; `reference` minus others.

  The first arm is the baseline. Whether a gain grows is told by its difference
  between the deepest and the shallowest. Nothing if there is one depth alone.
  """
  found, chance = points(lives, mark), chances(lives, mark)
  if len(chance) < 2:
    return ''
  rows = [['(chance)', *(f'{p:.3f}' for p in chance.values())]]
  for arm, of in found.items():
    rows.append([arm, *(_cell(of.get(d, {})) for d in chance)])
  header = [f'{mark} at depth', *map(str, chance)]
  text = f'By depth:\n\n{tables.markdown(header, rows)}'
  baseline, *others = found
  pairs = [(arm, baseline) for arm in others]
  if reference in others:
    pairs += [(reference, arm) for arm in others if arm != reference]
  rows = [_gains(found, a, b, list(chance)) for a, b in pairs]
  header = ['gain', *map(str, chance), 'deepest minus shallowest']
  return text + (f'\n{tables.markdown(header, rows)}' if rows else '')


def _gains(found: Points, a: str, b: str, depths: Sequence[int]) -> list[str]:
  """A row: `a` minus `b`, paired by seed, at every depth that both have."""
  gains = []
  for depth in depths:
    one, other = found[a].get(depth, {}), found[b].get(depth, {})
    gains.append({s: one[s] - other[s] for s in one if s in other})
  first, last = gains[0], gains[-1]
  grows = {s: last[s] - first[s] for s in first if s in last}
  return [f'{a} - {b}', *(_cell(g, '+') for g in (*gains, grows))]


def _cell(by_seed: dict[int, float], sign: str = '') -> str:
  return tables.cell(list(by_seed.values()), sign) if by_seed else ''


def draw(
  lives: Sequence[dict[str, Any]], mark: str, path: pathlib.Path
) -> None:
  """Means and intervals over depth, and chance."""
  figure, axis = plt.subplots(figsize=(7, 4), layout='constrained')
  found, chance = points(lives, mark), chances(lives, mark)
  for index, (arm, of) in enumerate(found.items()):
    means = [statistics.interval(list(x.values())) for x in of.values()]
    mean, half = np.array(means).T
    # Side by side, lest intervals hide each other.
    at = np.arange(len(chance))[[list(chance).index(d) for d in of]]
    axis.errorbar(
      at + 0.06 * (index - len(found) / 2),
      mean,
      np.nan_to_num(half),
      marker='o',
      capsize=3,
      label=arm,
    )
  axis.plot(range(len(chance)), chance.values(), 'k--', label='chance')
  axis.set(xlabel='depth', ylabel=mark, ylim=(0, 1.05))
  axis.set_xticks(range(len(chance)), map(str, chance))
  axis.grid(alpha=0.3)
  figure.legend(loc='outside right center')
  figure.savefig(path, dpi=120)
  plt.close(figure)
