"""How learners look in every picture, and axes that they share.

A learner is told from the others by colour, marker and line together, so that
pictures can be read without colours.
"""

from collections.abc import Sequence
import dataclasses
import itertools
import pathlib
from typing import Any

from matplotlib import axes as axes_lib
from matplotlib import figure as figure_lib
from matplotlib import ticker

_EMPHASIS = '#c1121f'
_BASE = '#777777'
# Okabe and Ito's colours, which all kinds of colour vision tell apart, but for
# the one that is close to `_EMPHASIS`; and two more.
_COLOURS = (
  '#0072b2',
  '#e69f00',
  '#009e73',
  '#cc79a7',
  '#56b4e9',
  '#5d3a9b',
  '#8c6d1f',
)
_MARKERS = 'osD^vPX<>hd'  # As many as have no divisor in common with colours.
_LINES = ('-', '--', ':', '-.')
# Usual arms look the same in the pictures of all experiments.
_USUAL = (
  *('sft', 'replay', 'ewc', 'wake_only', 'icl', 'joint', 'replay_archive'),
  *('seal', 'ttt', 'finetune_passage', 'distilled_replay'),
)
_UNCHANGED = 'frozen'  # The arm that is the base model on every night.
_DPI = 120


@dataclasses.dataclass(frozen=True)
class Style:
  """Arguments of `Axes.plot` for one learner."""

  color: str
  marker: str
  linestyle: str = '-'
  linewidth: float = 1.4
  markersize: float = 4.0
  zorder: float = 2.0

  def kwargs(self) -> dict[str, Any]:
    """By name."""
    return dataclasses.asdict(self)


def emphasized(arms: Sequence[str], reference: str = '') -> str:
  """The arm that a picture is about: `sleep`, else the reference."""
  return 'sleep' if 'sleep' in arms else reference


def styles(arms: Sequence[str], reference: str = '') -> dict[str, Style]:
  """The style of each arm, in the order in which they are drawn.

  No two are alike, up to 77 arms. The emphasized one is drawn last, on top of
  the others.
  """
  main, out = emphasized(arms, reference), {}
  others = [arm for arm in arms if arm not in (main, _UNCHANGED)]
  numbers = {arm: _USUAL.index(arm) for arm in others if arm in _USUAL}
  free = (n for n in itertools.count() if n not in numbers.values())
  numbers |= dict(zip((arm for arm in others if arm not in _USUAL), free))
  for arm in arms:
    if arm == _UNCHANGED:
      out[arm] = Style(_BASE, '', '--', 1.6, zorder=1.5)
    elif arm != main:
      number = numbers[arm]
      out[arm] = Style(
        _COLOURS[number % len(_COLOURS)],
        _MARKERS[number % len(_MARKERS)],
        _LINES[number // len(_COLOURS) % len(_LINES)],
      )
  if main in arms:
    out[main] = Style(_EMPHASIS, 'o', '-', 3.0, 6.0, 3.0)
  return out


def label(arm: str) -> str:
  """An arm's name in a legend."""
  return f'{arm} (the base model)' if arm == _UNCHANGED else arm


def nights_axis(axis: axes_lib.Axes, nights: int) -> None:
  """Makes x an axis of nights, which are whole numbers from 1."""
  axis.set_xlim(0.5, nights + 0.5)
  axis.xaxis.set_major_locator(night_ticks(nights))


def night_ticks(nights: int) -> ticker.Locator:
  """Ticks at whole nights."""
  if nights <= 10:
    return ticker.FixedLocator(range(1, nights + 1))
  return ticker.MaxNLocator(integer=True, steps=[1, 2, 5, 10])


def legend(
  figure: figure_lib.Figure,
  axis: axes_lib.Axes,
  vacant: axes_lib.Axes | None = None,
) -> None:
  """The legend of `axis`, in place of a vacant one, or else beside all.

  What is drawn last comes first.
  """
  handles, labels = axis.get_legend_handles_labels()
  if vacant is None:
    figure.legend(handles[::-1], labels[::-1], loc='outside right center')
    return
  vacant.axis('off')
  vacant.legend(handles[::-1], labels[::-1], loc='center')


def save(figure: figure_lib.Figure, path: pathlib.Path) -> None:
  """Writes a picture."""
  figure.savefig(path, dpi=_DPI)
