"""Tables of an experiment: means over seeds, paired differences, costs."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from sleep_jax.metrics import statistics

Life = dict[str, Any]

_COLUMNS = {
  'Arc': ('success', 'solved', 'icl', 'base'),
  'Bulletins': ('n1', 'n50', 'closed_book', 'base'),
  'Squad': ('n1', 'n1_f1', 'closed_book'),
  'Book': ('held_out_ppl', 'ahead_ppl', 'read_ppl', 'known_ppl', 'accuracy'),
  'Facts': ('first', 'recall', 'newest', 'base', 'answer_prob'),
  'ClassIncremental': ('accuracy', 'first', 'newest', 'answer_prob'),
}
_HEADLINE = {
  'Arc': ('success', 'solved', 'base'),
  'Bulletins': ('n1', 'n50', 'base'),
  'Squad': ('n1', 'n1_f1'),
  'Book': ('held_out_ppl', 'ahead_ppl', 'known_ppl'),
  'Facts': ('first', 'recall', 'base'),
  'ClassIncremental': ('accuracy',),
}


def cell(values: Sequence[float], sign: str = '') -> str:
  """Mean and half-width of the interval as text."""
  mean, half = statistics.interval(values)
  text = f'{mean:{sign}.3f}'
  return text if np.isnan(half) else f'{text} ± {half:.3f}'


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table."""
  lines = [header, ['---'] * len(header), *rows]
  return '\n'.join('| ' + ' | '.join(line) + ' |' for line in lines) + '\n'


def by_arm(lives: Sequence[Life]) -> dict[str, dict[int, Life]]:
  """Lives by arm and seed."""
  out = defaultdict(dict)
  for life in lives:
    out[life['learner']][life['seed']] = life
  return dict(out)


def common_columns(
  arms: dict[str, dict[int, Life]], columns: Sequence[str]
) -> list[str]:
  """The columns that every life has; a variant of a task may lack some."""
  finals = [
    life['final'] for of_arm in arms.values() for life in of_arm.values()
  ]
  return [c for c in columns if all(c in final for final in finals)]


def scores(arms: dict[str, dict[int, Life]], task: str) -> str:
  """Final marks: mean and 95% interval over seeds."""
  columns = (*common_columns(arms, _COLUMNS[task]), 'backward_transfer')
  rows = [
    [arm, *(cell([l['final'][c] for l in lives.values()]) for c in columns)]
    for arm, lives in arms.items()
  ]
  return markdown(['learner', *columns], rows)


def differences(
  arms: dict[str, dict[int, Life]], task: str, reference: str
) -> str:
  """`reference` minus every other arm, paired by seed."""
  columns = common_columns(arms, _HEADLINE[task])
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
      [arm, *(cell([a[c] - b[c] for a, b in pairs], '+') for c in columns)]
    )
  return markdown([f'{reference} minus', *columns], rows)


def _mean_costs(lives: dict[int, Life]) -> dict[str, dict[str, float]]:
  """Tokens, FLOPs, seconds and steps of every phase, means over seeds."""
  all_costs = [life['costs'] for life in lives.values()]
  return {
    phase: {
      key: float(np.mean([c[phase][key] for c in all_costs]))
      for key in ('tokens', 'flops', 'seconds', 'steps')
    }
    for phase in all_costs[0]
  }


def costs(arms: dict[str, dict[int, Life]]) -> str:
  """Tokens, FLOPs and seconds of a whole life, by phase."""
  rows, phases = [], ()
  for arm, lives in arms.items():
    mean = _mean_costs(lives)
    phases = tuple(mean)
    cells = [
      f'{c["tokens"] / 1e6:.2f}M {c["flops"] / 1e12:.2f}T {c["seconds"]:.0f}s'
      if c['tokens']
      else ''
      for c in mean.values()
    ]
    rows.append([arm, *cells])
  return markdown(['tokens, FLOPs, seconds', *phases], rows)


def step_costs(arms: dict[str, dict[int, Life]]) -> str:
  """What one optimizer step costs, all of its dreams and rewards included."""
  rows = []
  for arm, lives in arms.items():
    mean = _mean_costs(lives)
    at = 'update' if mean['update']['steps'] else 'wake'
    phases = (
      ('rollout', 'teacher', 'update', 'reward') if at == 'update' else (at,)
    )
    steps = mean[at]['steps']
    if not steps:
      continue
    seconds = sum(mean[p]['seconds'] for p in phases)
    flops = sum(mean[p]['flops'] for p in phases)
    rows.append(
      [
        arm,
        f'{steps:.0f}',
        f'{mean[at]["tokens"] / steps:.0f}',
        f'{1e3 * seconds / steps:.1f}',
        f'{1e6 * seconds / mean[at]["tokens"]:.1f}',
        f'{flops / steps / 1e9:.2f}',
        f'{1e9 * seconds / flops:.3f}',
      ]
    )
  header = [
    'per step',
    'steps',
    'tokens',
    'ms',
    'us per token',
    'GFLOPs',
    'seconds per GFLOP',
  ]
  return markdown(header, rows)


def report(lives: Sequence[Life], reference: str) -> str:
  """The whole report as Markdown."""
  arms, task = by_arm(lives), lives[0]['task']
  counts = sorted({len(of_arm) for of_arm in arms.values()})
  seeds = '-'.join(str(n) for n in counts)
  text = f'{task}, {len(lives[0]["matrix"])} nights, {seeds} seed(s)'
  text += (
    '.\n\n' if counts == [1] else '; ± is a 95% t interval over seeds.\n\n'
  )
  text += scores(arms, task)
  if reference in arms and len(arms) > 1:
    text += '\nPaired by seed:\n\n' + differences(arms, task, reference)
  text += '\nA whole life, by phase:\n\n' + costs(arms)
  return text + '\n' + step_costs(arms)
