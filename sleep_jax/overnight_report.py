"""The table and the picture of a run of `sleep-jax sleep`."""

from collections.abc import Sequence
import json
import pathlib
from typing import Any

import matplotlib
import matplotlib.pyplot as plt  # noqa: E402  (the backend comes first)

matplotlib.use('Agg')

Records = Sequence[dict[str, Any]]

# Measurement -> its heading.
_COLUMNS = {
  'documents_ppl': 'perplexity of the documents',
  'neutral_ppl': 'perplexity of other text',
  'quiz': 'right answers',
}
_NOTE = 'context gone'  # After a night nothing but the experts is left.


def line(record: dict[str, Any]) -> str:
  """The measurements of one phase."""
  return ', '.join(
    f'{heading} {record[name]:.3g}'
    for name, heading in _COLUMNS.items()
    if name in record
  )


def table(records: Records) -> str:
  """All measurements, one phase a line, as Markdown."""
  columns = [name for name in _COLUMNS if name in records[0]]
  rows = [['', *(_COLUMNS[name] for name in columns)]]
  for record in records:
    rows.append([_label(record), *(f'{record[n]:.3g}' for n in columns)])
  widths = [max(map(len, column)) for column in zip(*rows)]
  lines = [
    '| '
    + ' | '.join(cell.ljust(w) for cell, w in zip(row, widths, strict=True))
    + ' |'
    for row in rows
  ]
  rule = '|' + '|'.join('-' * (w + 2) for w in widths) + '|'
  return '\n'.join([lines[0], rule, *lines[1:]])


def write(folder: pathlib.Path, records: Records) -> None:
  """Writes `report.json`, `report.md` and `sleep.png`."""
  text = json.dumps(list(records), indent=1)
  (folder / 'report.json').write_text(text, encoding='utf-8')
  text = table(records) + '\n'
  (folder / 'report.md').write_text(text, encoding='utf-8')
  picture(records, folder / 'sleep.png')


def picture(records: Records, path: pathlib.Path) -> None:
  """The measurements, phase by phase; nights are grey."""
  columns = [name for name in _COLUMNS if name in records[0]]
  figure, axes = plt.subplots(
    1,
    len(columns),
    figsize=(4 * len(columns), 3.4),
    squeeze=False,
    layout='constrained',
  )
  numbers = range(len(records))
  for axis, name in zip(axes[0], columns, strict=True):
    axis.plot(numbers, [r[name] for r in records], marker='o')
    for i, record in enumerate(records):
      if record['phase'].startswith('night'):
        axis.axvspan(i - 0.5, i + 0.5, color='0.9')
    axis.set_title(_COLUMNS[name], fontsize=10)
    axis.set_xticks(
      numbers, [r['phase'] for r in records], rotation=45, ha='right'
    )
    axis.grid(alpha=0.3)
    axis.set_ylim(bottom=0, top=1.05 if name == 'quiz' else None)
  figure.savefig(path, dpi=120)
  plt.close(figure)


def _label(record: dict[str, Any]) -> str:
  phase = record['phase']
  if phase.startswith('night'):
    failed = '' if record.get('transferred', True) else ', NOT transferred'
    return f'after {phase}, {_NOTE}{failed}'
  if phase == 'merged':
    return 'export: merged'
  return phase if phase == 'before' else f'after {phase}'
