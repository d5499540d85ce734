"""Tables of an experiment: means over seeds, paired differences, costs."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from sleep_jax.metrics import statistics
from sleep_jax.metrics import table as table_lib

Life = dict[str, Any]


def cell(values: Sequence[float], sign: str = '') -> str:
  """Mean and half-width of the interval as text."""
  mean, half = statistics.interval(values)
  text = f'{mean:{sign}.3f}'
  return text if np.isnan(half) else f'{text} ± {half:.3f}'


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table."""
  return table_lib.Table('', header, rows).markdown()


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


def _columns(lives: Sequence[Life]) -> list[str]:
  """Columns of the first table.

  The task's, as far as every life has them; after its headline, where some life
  was evaluated with N passes, `metric@N` of the first headline metric; at the
  end transfer, if episodes have scores of their own.
  """
  columns = common_columns(by_arm(lives), lives[0]['columns'])
  headline = lives[0]['headline']
  metric = headline[0]
  names = {k for life in lives for k in life['final']}
  extra = {k for k in names if k.split('@')[0] == metric} - {metric, *columns}
  after = max(
    (columns.index(c) + 1 for c in headline if c in columns), default=0
  )
  columns[after:after] = sorted(extra)
  return columns + ['backward_transfer'] * ('backward_transfer' in names)


def scores(lives: Sequence[Life]) -> table_lib.Table:
  """Final metrics: chance level if known, mean and 95% interval over seeds."""
  columns, rows = _columns(lives), []
  chance = lives[0]['chance_level']
  if chance and all(life['chance_level'] == chance for life in lives):
    cells = [f'{chance[c]:.3f}' if c in chance else '' for c in columns]
    rows.append(['(chance)', *cells])
  for arm, of_arm in by_arm(lives).items():
    finals = [life['final'] for life in of_arm.values()]
    cells = [
      cell([f[c] for f in finals]) if all(c in f for f in finals) else ''
      for c in columns
    ]
    rows.append([arm, *cells])
  return table_lib.Table('', ['learner', *columns], rows)


def differences(lives: Sequence[Life], reference: str) -> table_lib.Table:
  """`reference` minus every other arm, over the seeds that both have."""
  arms = by_arm(lives)
  columns = common_columns(arms, lives[0]['headline'])
  rows = []
  for arm, of_arm in arms.items():
    pairs = [
      (arms[reference][seed]['final'], life['final'])
      for seed, life in of_arm.items()
      if seed in arms[reference]
    ]
    if arm != reference and pairs:
      cells = (cell([a[c] - b[c] for a, b in pairs], '+') for c in columns)
      rows.append([arm, *cells])
  header = [f'{reference} minus', *columns]
  return table_lib.Table('Paired by seed', header, rows)


def training(arms: dict[str, dict[int, Life]]) -> table_lib.Table:
  """Parameters, and what they were trained with."""
  rows = []
  for arm, lives in arms.items():
    life = next(iter(lives.values()))
    seconds = np.mean([life['seconds'] for life in lives.values()])
    rows.append(
      [
        arm,
        f'{life["parameters"]:,}',
        f'{life["steps"]}',
        f'{life["tokens"] / 1e6:.2f}M',
        f'{life["flops"] / 1e12:.2f}T',
        f'{seconds:.0f}',
      ]
    )
  header = ['learner', 'parameters', 'steps', 'tokens', 'FLOPs', 'seconds']
  return table_lib.Table('Training, mean over seeds', header, rows)


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


def costs(arms: dict[str, dict[int, Life]]) -> table_lib.Table:
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
  header = ['tokens, FLOPs, seconds', *phases]
  return table_lib.Table('A whole life, by phase', header, rows)


def step_costs(arms: dict[str, dict[int, Life]]) -> table_lib.Table:
  """Cost of one optimizer step, its share of dreams and rewards included."""
  rows = []
  for arm, lives in arms.items():
    mean = _mean_costs(lives)
    phase = 'update' if mean['update']['steps'] else 'wake'
    phases = (
      ('rollout', 'teacher', 'update', 'reward')
      if phase == 'update'
      else (phase,)
    )
    steps = mean[phase]['steps']
    if not steps:
      continue
    seconds = sum(mean[p]['seconds'] for p in phases)
    flops = sum(mean[p]['flops'] for p in phases)
    rows.append(
      [
        arm,
        f'{steps:.0f}',
        f'{mean[phase]["tokens"] / steps:.0f}',
        f'{1e3 * seconds / steps:.1f}',
        f'{1e6 * seconds / mean[phase]["tokens"]:.1f}',
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
  return table_lib.Table('', header, rows)


def is_perplexity(metric: str) -> bool:
  """Whether less of it is better, and it has no upper end."""
  return metric.endswith('ppl')


class _Curve:
  """Mean score of an arm after every night, and what it had spent by then."""

  def __init__(self, lives: dict[int, Life], metric: str):
    curves = [life['curve'] for life in lives.values()]
    sign = -1 if is_perplexity(metric) else 1
    self.scores = sign * np.mean([[p[metric] for p in c] for c in curves], 0)
    self._spent = {
      key: np.mean([[p['spent'][key] for p in c] for c in curves], 0)
      for key in ('seconds', 'flops')
    }

  def until(self, score: float) -> str:
    """Seconds and FLOPs until a night after which the score was as good."""
    reached = np.flatnonzero(self.scores >= score)
    if not len(reached):
      return 'never'
    seconds, flops = (x[reached[0]] for x in self._spent.values())
    return f'{seconds:.0f}s {flops / 1e12:.2f}T'


def equal_scores(
  lives: Sequence[Life], reference: str
) -> table_lib.Table | None:
  """What `reference` and every other arm spent until they scored the same.

  None where an earlier version summarized the lives, which did not say.
  """
  metric = lives[0]['headline'][0]
  points = [p for life in lives for p in life['curve']]
  if not all('spent' in p and metric in p for p in points):
    return None
  curves = {arm: _Curve(x, metric) for arm, x in by_arm(lives).items()}
  ours = curves[reference]
  rows = [
    [
      arm,
      f'{abs(curve.scores[-1]):.3f}',
      curve.until(curve.scores[-1]),
      ours.until(curve.scores[-1]),
      curve.until(ours.scores[-1]),
    ]
    for arm, curve in curves.items()
    if arm != reference
  ]
  header = [
    'seconds, FLOPs',
    metric,
    'to reach it',
    f'{reference} to reach it',
    f'to reach {abs(ours.scores[-1]):.3f} of {reference}',
  ]
  return table_lib.Table(
    'Until a score was first reached, evaluations left out', header, rows
  )


def report(
  lives: Sequence[Life],
  reference: str,
  by_depth: Sequence[table_lib.Table] = (),
) -> list[table_lib.Table]:
  """All tables.

  Args:
    lives: of one task.
    reference: the arm that others are subtracted from; skipped if absent.
    by_depth: tables by depth, see `depth.report`.
  """
  arms = by_arm(lives)
  out = [scores(lives)]
  if reference in arms and len(arms) > 1:
    out.append(differences(lives, reference))
  out += [*by_depth, costs(arms)]
  if lives[0]['matrix']:
    return [*out, step_costs(arms)]
  out.append(training(arms))
  if reference in arms and len(arms) > 1:
    equal = equal_scores(lives, reference)
    out += [step_costs(arms), equal] if equal else []
  return out


def headline(lives: Sequence[Life]) -> str:
  """What was lived: the task, how many nights and seeds."""
  counts = sorted({len(of_arm) for of_arm in by_arm(lives).values()})
  nights = len(lives[0]['matrix'])
  text = f'{lives[0]["task"]}, ' + (f'{nights} nights, ' if nights else '')
  text += f'{"-".join(map(str, counts))} seed(s)'
  return text + (
    '.' if counts == [1] else '; ± is a 95% t interval over seeds.'
  )


def text(tables: Sequence[table_lib.Table]) -> str:
  """Tables as Markdown, each under its title."""
  return '\n'.join(
    (f'{t.title}:\n\n' if t.title else '') + t.markdown() for t in tables
  )
