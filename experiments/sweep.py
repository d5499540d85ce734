"""Tries settings: every point of a grid, for arms of a config, over seeds.

  python -m experiments.sweep --config=experiments/configs/facts.py:hard \\
      --grid=sleep.steps=100,200 --grid=sleep.learning_rate=0.03,0.06 \\
      --arms=sleep --seeds=101,102,103 --jobs=2

Each point is an arm of one experiment, so the same command resumes it, and
there is one table of all. With --share=I/N it lives every N-th life from the
I-th on, so that N jobs over one work directory share a sweep; the last to end
writes the table. Other flags are those of experiments.run.
"""

from absl import app
from absl import flags

from experiments import command_line
from experiments import grid
from experiments import run
from sleep_jax.harness import build as build_lib

_GRID = flags.DEFINE_multi_string(
  'grid', [], 'SECTION.NAME=VALUE,VALUE...; with several, all combinations.'
)
_ARMS = flags.DEFINE_list('arms', [], 'Of the config; default all.')
_SEEDS = flags.DEFINE_list('seeds', [], "Default the config's.")
_JOBS = flags.DEFINE_integer('jobs', None, 'Lives at a time.')
_SHARE = flags.DEFINE_string('share', '1/1', 'I/N: which lives this job lives.')


def main(_) -> None:
  run.execute(_swept, _SHARE.value)


def _swept(c: build_lib.Settings) -> build_lib.Settings:
  """The experiment that the flags describe."""
  c = grid.swept(c, _GRID.value, _ARMS.value, _SEEDS.value)
  if _JOBS.value is not None:
    c['workers'] = _JOBS.value
  return c


if __name__ == '__main__':
  app.run(main, flags_parser=command_line.parse)
