"""Writes what an experiment found: tables, all lives, pictures, a page."""

from collections.abc import Sequence
import json
import pathlib
from typing import Any

from sleep_jax import config
from sleep_jax.harness import build as build_lib
from sleep_jax.harness import depth
from sleep_jax.harness import page as page_lib
from sleep_jax.harness import plots
from sleep_jax.harness import summary as summary_lib
from sleep_jax.harness import tables
from sleep_jax.metrics import table as table_lib
from sleep_jax.metrics import writer as writer_lib
from sleep_jax.metrics import writers
from sleep_jax.runtime import files

PICTURES = (
  'retention.png',
  'cost.png',
  'recall.png',
  'curves.png',
  'depths.png',
)
Dreams = dict[str, dict[int, list[dict[str, str]]]]


def write_report(
  lives: Sequence[dict[str, Any]],
  reference: str,
  out: pathlib.Path,
  c: dict[str, Any] | None = None,
  dreams: Dreams | None = None,
) -> str:
  """Writes what lives of one task found into `out`.

  That is table.md; lives.json, the summaries, which tables and pictures can be
  made of again; and report.html, a page that has everything in it. The
  pictures are cost.png; recall.png and retention.png where episodes have a
  score of their own, else curves.png, over training; and depths.png where a
  metric is known at several depths.

  Args:
    lives: their summaries.
    reference: the arm that others are subtracted from.
    out: a folder that exists.
    c: the config, for the page.
    dreams: by arm and night, for the page.

  Returns:
    The text of table.md.
  """
  text = table(lives, reference)
  files.write(out / 'table.md', text)
  files.write(
    out / 'lives.json',
    '[\n' + ',\n'.join(json.dumps(life) for life in lives) + '\n]\n',
  )
  _draw(lives, reference, out)
  page = page_lib.Page(
    title=(c or {}).get('name', lives[0]['task']),
    headline=tables.headline(lives),
    tables=_tables(lives, reference),
    pictures=pictures(out),
    reference=reference,
    dreams=dreams or {},
    settings=writers.flatten(c or {}),
  )
  files.write(out / 'report.html', page.html())
  return text


def table(lives: Sequence[dict[str, Any]], reference: str) -> str:
  """The text of table.md, see `write_report`."""
  return f'{tables.headline(lives)}\n\n{tables.text(_tables(lives, reference))}'


def _tables(
  lives: Sequence[dict[str, Any]], reference: str
) -> list[table_lib.Table]:
  by_depth = depth.report(lives, lives[0]['headline'][0], reference)
  return tables.report(lives, reference, by_depth)


def _draw(
  lives: Sequence[dict[str, Any]], reference: str, out: pathlib.Path
) -> None:
  """Draws the pictures, and removes those of an earlier report."""
  metric = lives[0]['headline'][0]
  for path in pictures(out):
    path.unlink()
  if all(metric in life['final'] for life in lives):
    plots.cost(lives, out / 'cost.png', reference)
  if lives[0]['matrix']:
    plots.recall_matrices(lives, out / 'recall.png', reference)
    plots.retention(lives, out / 'retention.png', reference)
  else:
    plots.curves(lives, metric, out / 'curves.png', reference)
  if depth.report(lives, metric, reference):
    depth.draw(lives, metric, out / 'depths.png', reference)


def pictures(out: pathlib.Path) -> list[pathlib.Path]:
  """The pictures of a report, in the order of the page."""
  return [path for name in PICTURES if (path := out / name).exists()]


def read_dreams(
  workdir: pathlib.Path, lives: Sequence[dict[str, Any]]
) -> Dreams:
  """Dreams that were stored, of the first seed of each arm that has any."""
  out: Dreams = {}
  for life in lives:
    arm, seed = life['learner'], life['seed']
    path = workdir / 'lives' / f'{arm}_{seed}' / writer_lib.FILE
    if arm in out or not path.exists():
      continue
    nights = {r['night']: r.get('dreams') for r in _read(path)}
    if any(nights.values()):
      out[arm] = {night: dreams for night, dreams in nights.items() if dreams}
  return out


def read_config(workdir: pathlib.Path) -> dict[str, Any]:
  """The config of a work directory of `experiments.run`, for one worker.

  How lives are run is not kept there.

  Raises:
    ConfigError: if it is not one, or is damaged.
  """
  path = workdir / 'config.json'
  if not path.exists():
    raise config.ConfigError(
      f'{path} does not exist; give the --workdir of experiments.run.'
    )
  return {'workers': 1} | summary_lib.read_json(path)


def report_workdir(
  workdir: pathlib.Path, out: pathlib.Path, reference: str = ''
) -> str:
  """Reports all lives of a work directory that have ended so far.

  Others are subtracted from `reference`; if none is given from the config's,
  and while that has no life, from the first arm that has.

  Raises:
    ConfigError: if there are none, or none of `reference`, or one is damaged,
      or of another config or version.
  """
  c = read_config(workdir)
  ended = sorted(workdir.glob('lives/*/summary.json'))
  if not ended:
    raise config.ConfigError(f'{workdir}: no life has ended yet.')
  lives = [_summary(c, path) for path in ended]
  order = {arm: i for i, arm in enumerate(c['arms'])}
  lives.sort(key=lambda life: (order[life['learner']], life['seed']))
  arms = dict.fromkeys(life['learner'] for life in lives)
  if reference:
    config.lookup(reference, arms, '--reference')
  else:
    reference = c['reference'] if c['reference'] in arms else next(iter(arms))
  out.mkdir(parents=True, exist_ok=True)
  return write_report(lives, reference, out, c, read_dreams(workdir, lives))


def _summary(c: dict[str, Any], path: pathlib.Path) -> dict[str, Any]:
  """The summary of a life of this config, in the folder named after it."""
  arm, _, seed = path.parent.name.rpartition('_')
  if not seed.lstrip('-').isdecimal():
    raise config.ConfigError(f'{path.parent} is not named after arm and seed.')
  settings = build_lib.arm_config(c, arm)
  return summary_lib.read(path, build_lib.life_digest(settings, int(seed)))


def _read(path: pathlib.Path) -> list[dict[str, Any]]:
  """Lines of JSON.

  Raises:
    ConfigError: naming the file.
  """
  try:
    return [json.loads(line) for line in path.read_text('utf-8').splitlines()]
  except ValueError as e:
    raise config.ConfigError(
      f'{path} is damaged ({e}); bring it back from a copy, or delete its '
      'folder and run experiments.run again.'
    ) from None


def publish(
  lives: Sequence[dict[str, Any]],
  reference: str,
  out: pathlib.Path,
  sinks: writers.Sinks,
) -> None:
  """Gives a report that was written into `out` to writers."""
  night = max(len(life['curve']) for life in lives) - 1
  for number, table in enumerate(_tables(lives, reference), 1):
    sinks.table(f'report/table{number}', table, night)
  for path in pictures(out):
    sinks.picture(f'report/{path.stem}', path, night)
  sinks.close()
