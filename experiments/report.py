"""Tables of an experiment: means over seeds, paired differences, costs."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

Life = dict[str, Any]

_COLUMNS = {
  'Facts': ('first', 'recall', 'newest', 'base', 'answer_prob'),
  'ClassIncremental': ('accuracy', 'first', 'newest', 'answer_prob'),
}
_HEADLINE = {
  'Facts': ('first', 'recall', 'base'),
  'ClassIncremental': ('accuracy',),
}


def interval(values: Sequence[float]) -> tuple[float, float]:
  """Mean and half-width of its 95% t interval; half-width nan for n = 1."""
  x = np.asarray(values, float)
  if len(x) < 2:
    return float(x.mean()), float('nan')
  spread = stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / len(x) ** 0.5
  return float(x.mean()), float(spread)


def _cell(values: Sequence[float], sign: str = '') -> str:
  mean, half = interval(values)
  text = f'{mean:{sign}.3f}'
  return text if np.isnan(half) else f'{text} ± {half:.3f}'


def _rows(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [header, ['---'] * len(header), *rows]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'


def by_arm(lives: Sequence[Life]) -> dict[str, dict[int, Life]]:
  """Lives by arm and seed."""
  out = defaultdict(dict)
  for life in lives:
    out[life['learner']][life['seed']] = life
  return dict(out)


def scores(arms: dict[str, dict[int, Life]], task: str) -> str:
  """Final marks: mean and 95% interval over seeds."""
  columns = (*_COLUMNS[task], 'backward_transfer')
  rows = [
    [arm, *(_cell([l['final'][c] for l in lives.values()]) for c in columns)]
    for arm, lives in arms.items()
  ]
  return _rows(['learner', *columns], rows)


def differences(
  arms: dict[str, dict[int, Life]], task: str, reference: str
) -> str:
  """`reference` minus every other arm, paired by seed."""
  columns = _HEADLINE[task]
  rows = []
  for arm, lives in arms.items():
    if arm == reference:
      continue
    pairs = [
      (arms[reference][seed]['final'], life['final'])
      for seed, life in lives.items()
      if seed in arms[reference]
    ]
    rows.append(
      [arm, *(_cell([a[c] - b[c] for a, b in pairs], '+') for c in columns)]
    )
  return _rows([f'{reference} minus', *columns], rows)


def costs(arms: dict[str, dict[int, Life]]) -> str:
  """Tokens, FLOPs and seconds of a life, by phase, means over seeds."""
  rows = []
  for arm, lives in arms.items():
    phases = next(iter(lives.values()))['costs']
    cells = []
    for p in phases:
      mean = {
        k: np.mean([l['costs'][p][k] for l in lives.values()])
        for k in ('tokens', 'flops', 'seconds')
      }
      cells.append(
        f'{mean["tokens"] / 1e6:.2f}M {mean["flops"] / 1e12:.2f}T '
        f'{mean["seconds"]:.0f}s'
        if mean['tokens']
        else ''
      )
    rows.append([arm, *cells])
  header = [
    'tokens, FLOPs, seconds',
    *next(iter(arms.values()))[next(iter(next(iter(arms.values()))))]['costs'],
  ]
  return _rows(header, rows)


def tables(lives: Sequence[Life], reference: str) -> str:
  """The whole report as Markdown."""
  arms, task = by_arm(lives), lives[0]['task']
  seeds = len(arms[next(iter(arms))])
  text = f'{task}, {len(lives[0]["matrix"])} nights, {seeds} seed(s)'
  text += '; ± is a 95% t interval over seeds.\n\n' if seeds > 1 else '.\n\n'
  text += scores(arms, task)
  if reference in arms and len(arms) > 1:
    text += '\n' + differences(arms, task, reference)
  return text + '\n' + costs(arms)
