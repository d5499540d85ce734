"""Writes tables, pictures and a page of all lives that have ended so far.

python -m experiments.report --workdir=runs/facts --out=results/facts
"""

import pathlib
import sys

from absl import app
from absl import flags

from experiments import command_line
from sleep_jax import config
from sleep_jax.harness import report

_WORKDIR = flags.DEFINE_string(
  'workdir', None, 'Of experiments.run.', required=True
)
_OUT = flags.DEFINE_string('out', None, 'Where all of it goes.', required=True)
_REFERENCE = flags.DEFINE_string(
  'reference', '', "The arm that others are subtracted from; else the config's."
)


def main(_) -> None:
  workdir, out = pathlib.Path(_WORKDIR.value), pathlib.Path(_OUT.value)
  try:
    report.report_workdir(workdir, out, _REFERENCE.value)
  except config.ConfigError as e:
    sys.exit(f'error: {e}')
  print(out / 'report.html')


if __name__ == '__main__':
  app.run(main, flags_parser=command_line.parse)
