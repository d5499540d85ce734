"""Writes the tables and pictures of all lives that have ended so far.

python -m experiments.report --workdir=runs/facts --out=results/facts
"""

import json
import pathlib

from absl import app
from absl import flags

from experiments import kinds

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
  kinds.of(settings).tell(lives, settings, out)


if __name__ == '__main__':
  app.run(main)
