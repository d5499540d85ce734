"""Writes the tables and pictures of all lives that have ended so far.

python -m experiments.report --workdir=runs/facts --out=results/facts
"""

import json
import pathlib

from absl import app
from absl import flags

from experiments import plots
from experiments import tables

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Of experiments.run.', required=True
)
_OUT = flags.DEFINE_string(
  'out', None, 'Where tables and pictures go.', required=True
)


def main(_) -> None:
  workdir, out = pathlib.Path(_WORKDIR.value), pathlib.Path(_OUT.value)
  settings = json.loads((workdir / 'config.json').read_text(encoding='utf-8'))
  ended = sorted(workdir.glob('lives/*/summary.json'))
  lives = [json.loads(path.read_text(encoding='utf-8')) for path in ended]
  order = {arm: i for i, arm in enumerate(settings['arms'])}
  lives.sort(key=lambda life: (order[life['learner']], life['seed']))
  out.mkdir(parents=True, exist_ok=True)
  (out / 'table.md').write_text(
    tables.report(lives, settings['reference']), encoding='utf-8'
  )
  (out / 'lives.json').write_text(
    '[\n' + ',\n'.join(json.dumps(life) for life in lives) + '\n]\n',
    encoding='utf-8',
  )
  plots.recall_matrices(lives, out / 'recall.png')
  plots.retention(lives, out / 'retention.png')


if __name__ == '__main__':
  app.run(main)
