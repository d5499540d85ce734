"""A grid of settings, whose points are the arms of one experiment."""

from collections.abc import Iterator, Sequence
import copy
import itertools
import json
import re
from typing import Any

from sleep_jax import config
from sleep_jax.harness import build as build_lib

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
  return name, [parse_value(x) for x in values.split(',')]


def parse_value(text: str) -> Any:
  """A number, True, False or another JSON value; else the text itself."""
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


def swept(
  c: build_lib.Settings,
  axes: Sequence[str],
  arms: Sequence[str] = (),
  seeds: Sequence[str] = (),
) -> build_lib.Settings:
  """The experiment that the flags --grid, --arms and --seeds describe.

  Args:
    c: an experiment.
    axes: of the grid, see `parse_axis`.
    arms: of `c`; none is all.
    seeds: in place of those of `c`, if there are any.

  Raises:
    ConfigError: see `parse_axis` and `over_grid`.
  """
  c = over_grid(c, [parse_axis(text) for text in axes], arms)
  return c | ({'seeds': [parse_value(text) for text in seeds]} if seeds else {})
