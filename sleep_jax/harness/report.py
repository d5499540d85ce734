"""Writes what an experiment found: tables, all lives, pictures."""

from collections.abc import Sequence
import json
import pathlib
from typing import Any

from sleep_jax import config
from sleep_jax.harness import depth
from sleep_jax.harness import plots
from sleep_jax.harness import tables
from sleep_jax.runtime import files


def write_report(
  lives: Sequence[dict[str, Any]], reference: str, out: pathlib.Path
) -> str:
  """Writes table.md, lives.json and pictures of lives of one task into `out`.

  The pictures are recall.png and retention.png where episodes have a score of
  their own, else curves.png, over training; and depths.png where a metric is
  known at several depths.

  Args:
    lives: their summaries.
    reference: the arm that others are subtracted from.
    out: a folder that exists.

  Returns:
    The text of table.md.
  """
  metric = lives[0]['headline'][0]
  by_depth = depth.report(lives, metric, reference)
  table = tables.report(lives, reference, by_depth)
  files.write(out / 'table.md', table)
  files.write(
    out / 'lives.json',
    '[\n' + ',\n'.join(json.dumps(life) for life in lives) + '\n]\n',
  )
  if lives[0]['matrix']:
    plots.recall_matrices(lives, out / 'recall.png')
    plots.retention(lives, out / 'retention.png')
  else:
    plots.curves(lives, metric, out / 'curves.png')
  if by_depth:
    depth.draw(lives, metric, out / 'depths.png')
  return table


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
  """The config of a work directory of `experiments.run`, for one worker.

  How lives are run is not kept there.

  Raises:
    ConfigError: if it is not one.
  """
  path = workdir / 'config.json'
  if not path.exists():
    raise config.ConfigError(
      f'{path} does not exist; give the --workdir of experiments.run.'
    )
  return {'workers': 1} | json.loads(path.read_text(encoding='utf-8'))


def report_workdir(workdir: pathlib.Path, out: pathlib.Path) -> str:
  """Reports all lives of a work directory that have ended so far.

  Raises:
    ConfigError: if there are none, or they are of another version.
  """
  c = read_config(workdir)
  ended = sorted(workdir.glob('lives/*/summary.json'))
  if not ended:
    raise config.ConfigError(f'{workdir}: no life has ended yet.')
  lives = [json.loads(path.read_text(encoding='utf-8')) for path in ended]
  for path, life in zip(ended, lives, strict=True):
    if 'headline' not in life:
      raise config.ConfigError(
        f'{path} is of sleep_jax 0.1; use that version to report it.'
      )
  order = {arm: i for i, arm in enumerate(c['arms'])}
  lives.sort(key=lambda life: (order[life['learner']], life['seed']))
  out.mkdir(parents=True, exist_ok=True)
  return write_report(lives, c['reference'], out)
