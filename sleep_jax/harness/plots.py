"""Pictures of an experiment."""

from collections.abc import Callable, Sequence
import functools
import pathlib
from typing import Any

from matplotlib import axes as axes_lib
from matplotlib import figure as figure_lib
from matplotlib import ticker
import numpy as np

from sleep_jax.harness import style
from sleep_jax.harness import tables
from sleep_jax.metrics import statistics

Life = dict[str, Any]
Curve = Callable[[Life], list[float]]  # A value after every night.

_CELL = 0.21  # Inches of a cell with a number in it.
_MAX_NUMBERED = 30  # Nights; cells of more are too small for numbers.
_PICTURE_WIDTH = 15.0  # Inches, at most.


def recall_matrices(
  lives: Sequence[Life], path: pathlib.Path, reference: str = ''
) -> None:
  """One heat map per learner: score of each episode after each night, in %."""
  arms = tables.by_arm(lives)
  order = style.styles(list(arms), reference)
  nights = len(lives[0]['matrix'])
  side = min(max(2.2, _CELL * nights), _CELL * _MAX_NUMBERED)
  columns = min(len(arms), 4, max(1, int(_PICTURE_WIDTH / (side + 0.4))))
  rows = -(-len(arms) // columns)
  figure = figure_lib.Figure(
    figsize=((side + 0.4) * columns + 1.2, (side + 0.6) * rows + 0.4),
    layout='constrained',
  )
  axes = figure.subplots(rows, columns, squeeze=False)
  for axis in axes.flat[len(arms) :]:
    axis.axis('off')
  image: Any = None
  for axis, arm in zip(axes.flat, order):
    image = _heat_map(axis, _mean_matrix(list(arms[arm].values())))
    main = arm == style.emphasized(list(arms), reference)
    axis.set_title(arm, fontweight='bold' if main else 'normal')
  figure.supxlabel('episode', fontsize='medium')
  figure.supylabel('after night', fontsize='medium')
  figure.colorbar(
    image, ax=axes, label='closed-book score, %', aspect=30, shrink=0.8
  )
  style.save(figure, path)


def _heat_map(axis: axes_lib.Axes, matrix: np.ndarray) -> Any:
  nights = len(matrix)
  image = axis.imshow(
    100 * matrix,
    vmin=0,
    vmax=100,
    cmap='viridis',
    extent=(0.5, nights + 0.5, nights + 0.5, 0.5),
  )
  for of_axis in (axis.xaxis, axis.yaxis):
    of_axis.set_major_locator(style.night_ticks(nights))
  if nights > _MAX_NUMBERED:
    return image
  for night, row in enumerate(matrix, 1):
    for episode, score in enumerate(row[:night], 1):
      number = axis.text(
        episode,
        night,
        f'{100 * score:.0f}',
        ha='center',
        va='center',
        fontsize=6.5 if nights > 10 else 8,
        color='black' if score > 0.6 else 'white',
      )
      number.set_in_layout(False)  # Hundreds of them would take minutes.
  return image


def _mean_matrix(lives: Sequence[Life]) -> np.ndarray:
  """Mean over seeds of `[night, episode]`, nan where not yet read."""
  nights = len(lives[0]['matrix'])
  out = np.full((len(lives), nights, nights), np.nan)
  for i, life in enumerate(lives):
    for night, row in enumerate(life['matrix']):
      out[i, night, : len(row)] = row
  return out.mean(0)


def retention(
  lives: Sequence[Life], path: pathlib.Path, reference: str = ''
) -> None:
  """Over the nights: scores of episodes, and the headline metrics.

  Two panels are of the first episode and of all so far; a headline metric that
  is neither has its own, perplexity on a logarithmic scale. A dashed line is
  the level of a guess.
  """
  panels: dict[str, Curve] = {
    'the first episode': lambda life: [row[0] for row in life['matrix']],
    'all episodes so far': lambda life: [
      float(np.mean(row)) for row in life['matrix']
    ],
  }
  chances: dict[str, float | None] = dict.fromkeys(panels)
  for metric in _headline(lives):
    curve = functools.partial(_curve, metric)
    title = next((t for t, x in panels.items() if _same(lives, curve, x)), '')
    title = title or metric
    panels[title] = curve
    chances[title] = lives[0]['chance_level'].get(metric)
  rows = -(-len(panels) // 2)
  figure = figure_lib.Figure(figsize=(11, 3.7 * rows), layout='constrained')
  axes = figure.subplots(rows, 2, squeeze=False)
  for axis, (title, curve) in zip(axes.flat, panels.items()):
    _over_nights(axis, lives, curve, reference)
    axis.set(title=title, xlabel='after night')
    values = np.array([curve(life) for life in lives])
    _value_axis(axis, title, values, chances[title])
  vacant = list(axes.flat[len(panels) :])
  style.legend(figure, axes.flat[0], *vacant)
  style.save(figure, path)


def _headline(lives: Sequence[Life]) -> list[str]:
  """Headline metrics that every life has after every night."""
  return [
    metric
    for metric in lives[0]['headline']
    if all(metric in point for life in lives for point in life['curve'])
  ]


def _curve(metric: str, life: Life) -> list[float]:
  return [point[metric] for point in life['curve']]


def _same(lives: Sequence[Life], a: Curve, b: Curve) -> bool:
  return all(np.allclose(a(life), b(life)) for life in lives)


def _over_nights(
  axis: axes_lib.Axes, lives: Sequence[Life], curve: Curve, reference: str
) -> None:
  """A line per learner, with the interval over its seeds."""
  arms = tables.by_arm(lives)
  for arm, look in style.styles(list(arms), reference).items():
    curves = np.array([curve(life) for life in arms[arm].values()])
    nights = np.arange(1, curves.shape[1] + 1)
    mean = curves.mean(0)
    axis.plot(nights, mean, label=style.label(arm), **look.kwargs())
    if len(curves) > 1:
      half = np.array([statistics.interval(x)[1] for x in curves.T])
      axis.fill_between(
        nights, mean - half, mean + half, alpha=0.15, color=look.color, lw=0
      )
    style.nights_axis(axis, len(nights))


def _value_axis(
  axis: axes_lib.Axes, name: str, values: np.ndarray, chance: float | None
) -> None:
  """The range of y, its grid, and the level of a guess."""
  axis.grid(alpha=0.3)
  if tables.is_perplexity(name):
    axis.set_yscale('log')
    axis.set_ylabel('perplexity (lower is better)')
  elif values.min() >= 0 and values.max() <= 1:
    axis.set(ylim=(-0.03, 1.03), ylabel='closed-book score')
  if chance is not None:
    axis.axhline(chance, color='black', linestyle=':', label='chance')


def cost(
  lives: Sequence[Life], path: pathlib.Path, reference: str = ''
) -> None:
  """What is left of all episodes at the end, over the FLOPs that it took.

  Without scores of episodes, or where the task is text, it is the first
  headline metric. The FLOPs are those of a life without its evaluations; means
  and intervals over seeds. A learner that spends nothing stands at the left.
  """
  metric, arms = lives[0]['headline'][0], tables.by_arm(lives)
  name = metric
  if lives[0]['matrix'] and not tables.is_perplexity(metric):
    name = 'score of all episodes'
  flops = {
    arm: np.mean([_spent(life) for life in of_arm.values()])
    for arm, of_arm in arms.items()
  }
  least = min((x for x in flops.values() if x), default=1.0)
  figure = figure_lib.Figure(figsize=(7.5, 4), layout='constrained')
  axis = figure.subplots()
  finals = []
  for arm, look in style.styles(list(arms), reference).items():
    values = [
      life['final'][metric] if name == metric else np.mean(life['matrix'][-1])
      for life in arms[arm].values()
    ]
    mean, half = statistics.interval(values)
    finals += values
    kwargs: dict[str, Any] = look.kwargs()
    kwargs |= {'linestyle': '', 'marker': look.marker or 's'}
    kwargs['markersize'] += 4
    axis.errorbar(
      flops[arm] or least / 4,
      mean,
      np.nan_to_num(half),
      capsize=3,
      label=style.label(arm) + ('' if flops[arm] else ', no training'),
      **kwargs,
    )
  axis.set(xlabel='FLOPs of a life, evaluations left out')
  axis.set_xscale('log')
  axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
  axis.xaxis.set_major_formatter(ticker.EngFormatter())
  axis.xaxis.set_minor_formatter(ticker.NullFormatter())
  chance = lives[0]['chance_level'].get(metric)
  _value_axis(axis, metric, np.array(finals), chance)
  axis.set(ylabel=f'{name}, after the last night')
  style.legend(figure, axis)
  style.save(figure, path)


def _spent(life: Life) -> float:
  """FLOPs of a life without its evaluations."""
  return sum(
    c['flops'] for phase, c in life['costs'].items() if phase != 'eval'
  )


def curves(
  lives: Sequence[Life], metric: str, path: pathlib.Path, reference: str = ''
) -> None:
  """`metric` over training tokens and all FLOPs, mean over seeds.

  Evaluations are left out. Lives that an earlier version summarized know FLOPs
  of training alone.
  """
  figure = figure_lib.Figure(figsize=(11, 4), layout='constrained')
  axes = figure.subplots(1, 2, sharey=True)
  arms, values = tables.by_arm(lives), []
  for arm, look in style.styles(list(arms), reference).items():
    of_arm = list(arms[arm].values())
    curve = [[p[metric] for p in life['curve']] for life in of_arm]
    values += curve
    points = of_arm[0]['curve']
    tokens = [p['tokens'] for p in points]
    flops = [p.get('spent', p)['flops'] for p in points]
    for axis, position in zip(axes, (tokens, flops)):
      axis.plot(
        position,
        np.mean(curve, axis=0),
        label=style.label(arm),
        **look.kwargs(),
      )
  chance = lives[0]['chance_level'].get(metric)
  for axis, name in zip(axes, ('training tokens', 'FLOPs')):
    axis.set(xlabel=name)
    _value_axis(axis, metric, np.array(values), chance)
  axes[0].set(ylabel=metric)
  axes[1].set(ylabel='')
  style.legend(figure, axes[0])
  style.save(figure, path)
