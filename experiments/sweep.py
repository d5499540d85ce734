"""Tries settings: every point of a grid, for arms of a config, over seeds.

  python -m experiments.sweep --config=experiments/configs/facts.py:hard \\
      --grid=sleep.steps=100,200 --grid=sleep.learning_rate=0.03,0.06 \\
      --arms=sleep --seeds=101,102,103 --jobs=2

Each point is an arm of one experiment, so the same command resumes it, and
there is one table of all. With --share=I/N it lives every N-th life from the
I-th on, so that N jobs over one work directory share a sweep; the last to end
writes the table. Other flags are those of experiments.run.
"""

from collections.abc import Iterator, Sequence
import copy
import itertools
import json
import re
from typing import Any

from absl import app
from absl import flags

from experiments import command_line
from experiments import run
from sleep_jax import config
from sleep_jax.harness import build as build_lib

_GRID = flags.DEFINE_multi_string(
  'grid', [], 'SECTION.NAME=VALUE,VALUE...; with several, all combinations.'
)
_ARMS = flags.DEFINE_list('arms', [], 'Of the config; default all.')
_SEEDS = flags.DEFINE_list('seeds', [], "Default the config's.")
_JOBS = flags.DEFINE_integer('jobs', None, 'Lives at a time.')
_SHARE = flags.DEFINE_string('share', '1/1', 'I/N: which lives this job lives.')

Axis = tuple[str, list[Any]]  # A setting's name, and the values to try.


def parse_axis(text: str) -> Axis:
  """The axis that `sleep.steps=100,200` describes.

  Raises:
    ConfigError: if it has another form.
  """
  name, _, values = text.partition('=')
  if '.' not in name or not all(values.split(',')):
    raise config.ConfigError(
      f'--grid={text}: write SECTION.NAME=VALUE,VALUE, as in '
      '--grid=sleep.steps=100,200.'
    )
  return name, [_value(x) for x in values.split(',')]


def _value(text: str) -> Any:
  try:
    return json.loads(text)
  except json.JSONDecodeError:
    return {'True': True, 'False': False}.get(text, text)


def over_grid(
  c: build_lib.Settings, axes: Sequence[Axis], arms: Sequence[str] = ()
) -> build_lib.Settings:
  """The experiment whose arms are those of `c` at every point of a grid.

  Args:
    c: an experiment.
    axes: of the grid; their values outrank an arm's own.
    arms: of `c`; none is all.

  Raises:
    ConfigError: for an arm or a setting that `c` does not have.
  """
  out = {}
  for arm in arms or c['arms']:
    own = build_lib.arm_config(c, arm)
    names = [name for name, _ in axes]
    for point in itertools.product(*(values for _, values in axes)):
      values = list(zip(names, point, strict=True))
      changes = dict(config.lookup(arm, c['arms'], 'arm'))
      changes['learner'] = own['learner']
      for section, of_section in _sections(own, values):
        changes[section] = changes.get(section, {}) | of_section
      label = '-'.join([arm, *(_label(*pair) for pair in values)])
      out[label] = changes
  reference = c['reference'] if c['reference'] in out else next(iter(out))
  return c | {
    'name': f'{c["name"]}_sweep',
    'arms': out,
    'reference': reference,
  }


def _sections(
  own: build_lib.Settings, values: Sequence[tuple[str, Any]]
) -> Iterator[tuple[str, dict[str, Any]]]:
  """What a point changes, by section."""
  own = copy.deepcopy(own)
  node: Any
  for name, value in values:
    section, *path = name.split('.')
    node = own
    for part in (section, *path[:-1]):
      node = _child(node, part, name)
    _child(node, path[-1], name)
    node[_key(node, path[-1])] = value
    yield section, {path[0]: own[section][path[0]]}


def _child(node: Any, part: str, name: str) -> Any:
  try:
    return node[_key(node, part)]
  except (LookupError, TypeError, ValueError):
    raise config.ConfigError(
      f'--grid={name}: the config has no setting {part!r} there.'
    ) from None


def _key(node: Any, part: str) -> str | int:
  return int(part) if isinstance(node, list) else part


def _label(name: str, value: Any) -> str:
  """As it stands in the table, and in the names of folders."""
  text = json.dumps(value) if not isinstance(value, str) else value
  return f'{name.rpartition(".")[2]}={re.sub(r"[^A-Za-z0-9.,+-]", "_", text)}'


def main(_) -> None:
  run.execute(_swept, _SHARE.value)


def _swept(c: build_lib.Settings) -> build_lib.Settings:
  """The experiment that the flags describe."""
  c = over_grid(c, [parse_axis(x) for x in _GRID.value], _ARMS.value)
  if _SEEDS.value:
    c['seeds'] = [_value(seed) for seed in _SEEDS.value]
  if _JOBS.value is not None:
    c['workers'] = _JOBS.value
  return c


if __name__ == '__main__':
  app.run(main, flags_parser=command_line.parse)
