"""Pictures of an experiment."""

from collections.abc import Sequence
import pathlib
from typing import Any

import matplotlib
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)
import numpy as np  # noqa: E402

from sleep_jax.harness import tables
from sleep_jax.metrics import statistics

matplotlib.use('Agg')


def _mean_matrix(lives: Sequence[dict[str, Any]]) -> np.ndarray:
  """Mean over seeds of `[night, episode]`, nan where not yet read."""
  nights = len(lives[0]['matrix'])
  out = np.full((len(lives), nights, nights), np.nan)
  for i, life in enumerate(lives):
    for night, row in enumerate(life['matrix']):
      out[i, night, : len(row)] = row
  return out.mean(0)


def recall_matrices(
  lives: Sequence[dict[str, Any]], path: pathlib.Path
) -> None:
  """One heat map per learner: score of each episode after each night."""
  arms = tables.by_arm(lives)
  columns = min(4, len(arms))
  rows = -(-len(arms) // columns)
  figure, axes = plt.subplots(
    rows,
    columns,
    figsize=(3.1 * columns, 3 * rows),
    squeeze=False,
    layout='constrained',
  )
  for axis in axes.flat[len(arms) :]:
    axis.axis('off')
  for axis, (arm, of_arm) in zip(axes.flat, arms.items()):
    matrix = _mean_matrix(list(of_arm.values()))
    n = len(matrix)
    image = axis.imshow(
      matrix,
      vmin=0,
      vmax=1,
      cmap='viridis',
      extent=(0.5, n + 0.5, n + 0.5, 0.5),
    )
    axis.set(title=arm, xlabel='episode', ylabel='after night')
  figure.colorbar(image, ax=axes, label='closed-book score')
  figure.savefig(path, dpi=120)
  plt.close(figure)


def retention(lives: Sequence[dict[str, Any]], path: pathlib.Path) -> None:
  """Score of the first episode, and mean over all so far, after each night."""
  figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout='constrained')
  colours = plt.get_cmap('tab20')
  for index, (arm, of_arm) in enumerate(tables.by_arm(lives).items()):
    matrices = np.stack([_mean_matrix([l]) for l in of_arm.values()])
    nights = np.arange(1, matrices.shape[1] + 1)
    for axis, curves in zip(
      axes, (matrices[:, :, 0], np.nanmean(matrices, axis=2)), strict=True
    ):
      mean = curves.mean(0)
      line = axis.plot(
        nights, mean, marker='o', label=arm, color=colours(index % 20)
      )[0]
      if len(curves) > 1:
        half = [
          statistics.interval(curves[:, i])[1] for i in range(len(nights))
        ]
        axis.fill_between(
          nights, mean - half, mean + half, alpha=0.15, color=line.get_color()
        )
  axes[0].set(title='the first episode', ylabel='closed-book score')
  axes[1].set(title='all episodes so far')
  for axis in axes:
    axis.set(xlabel='after night', ylim=(-0.03, 1.03))
    axis.grid(alpha=0.3)
  handles, labels = axes[1].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside right center')
  figure.savefig(path, dpi=120)
  plt.close(figure)


def curves(
  lives: Sequence[dict[str, Any]], metric: str, path: pathlib.Path
) -> None:
  """`metric` over training tokens and FLOPs, mean over seeds."""
  figure, axes = plt.subplots(
    1, 2, figsize=(10, 4), sharey=True, layout='constrained'
  )
  colours = plt.get_cmap('tab20')
  for index, (arm, of_arm) in enumerate(tables.by_arm(lives).items()):
    curve = [[p[metric] for p in life['curve']] for life in of_arm.values()]
    mean, first = np.mean(curve, axis=0), next(iter(of_arm.values()))
    for axis, key in zip(axes, ('tokens', 'flops')):
      position = [p[key] for p in first['curve']]
      axis.plot(
        position, mean, marker='.', label=arm, color=colours(index % 20)
      )
  axes[0].set(xlabel='training tokens', ylabel=metric)
  axes[1].set(xlabel='training FLOPs')
  for axis in axes:
    axis.grid(alpha=0.3)
  handles, labels = axes[0].get_legend_handles_labels()
  figure.legend(handles, labels, loc='outside right center')
  figure.savefig(path, dpi=120)
  plt.close(figure)
