"""MkDocs hook: reference pages whose content is in the code.

`<!-- modules: PACKAGE -->` becomes the documentation of all modules of a
package, or of one module, from their docstrings; `<!-- public names -->` a
table of what `sleep_jax` exports; `<!-- config fields: GROUP -->` a table of
each section of a group of `groups`. Type, default and bounds of a field are
those of the dataclass; its meaning is the comment above or beside it.
"""

import ast
import collections
import dataclasses
import functools
import inspect
import io
import pathlib
import pkgutil
import re
import textwrap
import tokenize
import types
import typing
from typing import Any, NamedTuple

import sleep_jax
from sleep_jax import config
from sleep_jax import learners
from sleep_jax.config import registry

_ROOT = pathlib.Path(__file__).parents[2]
_FIELDS = re.compile(r'^<!-- config fields: (\w+) -->$', re.MULTILINE)
_PUBLIC = '<!-- public names -->'
_MODULES = re.compile(r'^<!-- modules: ([\w.]+) -->$', re.MULTILINE)


class Section(NamedTuple):
  """A section of a config: some or all fields of a dataclass."""

  heading: str
  cls: Any
  names: list[str]


def groups() -> dict[str, list[Section]]:
  """The sections of every group, in the order of the page."""
  shared: dict[str, Any] = {}
  own: list[Section] = []
  for name, cls in _settings('sleep_jax.learners').items():
    hints = typing.get_type_hints(cls)
    sections = {k: v for k, v in hints.items() if dataclasses.is_dataclass(v)}
    shared |= sections
    if rest := [k for k in _names(cls) if k not in sections]:
      heading = f'{learners.OWN_SECTION}, for the learner {name}'
      own.append(Section(heading, cls, rest))
  return {
    'model': [
      _whole('model', config.ModelConfig),
      _whole('model.levels[]', config.LevelConfig),
      _whole('model.rope_scaling', config.RopeScaling),
      *_mixer_sections(),
    ],
    'learners': [_whole(k, cls) for k, cls in sorted(shared.items())] + own,
    'tasks': [
      _whole(f'task, where task.name is {name}', cls)
      for name, cls in _settings('sleep_jax.tasks').items()
    ],
  }


def table(section: Section) -> str:
  """A heading, what the section is for, and a table of its fields."""
  heading, cls, names = section
  summary = inspect.getdoc(cls) or ''
  lines = [
    f'### {heading}', '',
    summary.partition('\n\n')[0], '',
    '| field | type | default | bounds | meaning |',
    '|---|---|---|---|---|',
  ]  # fmt: skip
  hints = typing.get_type_hints(cls, include_extras=True)
  meanings = comments(cls)
  for name in names:
    cells = (
      f'`{name}`',
      f'`{_type_name(hints[name])}`',
      _default(cls.__dataclass_fields__[name]),
      _bounds(hints[name]),
      meanings.get(name, ''),
    )
    # A bar would end the cell, in code as well.
    row = ' | '.join(cell.replace('|', '&#124;') for cell in cells)
    lines.append(f'| {row} |')
  return '\n'.join(lines) + '\n'


@functools.cache
def comments(cls: type) -> dict[str, str]:
  """What stands above and beside each field of a dataclass, by its name."""
  found: dict[str, str] = {}
  for owner in reversed(cls.__mro__):
    if '__dataclass_fields__' in vars(owner):
      found |= _own_comments(owner)
  return found


def _own_comments(cls: type) -> dict[str, str]:
  source = textwrap.dedent(inspect.getsource(cls))
  above: dict[int, str] = {}
  beside: dict[int, str] = {}
  for token in tokenize.generate_tokens(io.StringIO(source).readline):
    if token.type == tokenize.COMMENT:
      alone = not token.line[: token.start[1]].strip()
      text = token.string.lstrip('#').strip()
      (above if alone else beside)[token.start[0]] = text
  found = {}
  (tree,) = ast.parse(source).body
  assert isinstance(tree, ast.ClassDef)
  for node in tree.body:
    if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
      first, end = node.lineno, node.end_lineno or node.lineno
      while first - 1 in above:
        first -= 1
      lines = [above[i] for i in range(first, node.lineno)]
      lines += [beside.get(i, '') for i in range(node.lineno, end + 1)]
      found[node.target.id] = ' '.join(filter(None, lines))
  return found


def modules(name: str) -> list[str]:
  """The module `name`, or all public modules of the package of that name."""
  folder = _ROOT.joinpath(*name.split('.'))
  if not folder.is_dir():
    return [name]
  found = [name] if (folder / '__init__.py').read_text() else []
  for info in sorted(pkgutil.iter_modules([str(folder)]), key=lambda x: x.name):
    if not info.name.startswith('_'):
      found += modules(f'{name}.{info.name}')
  return found


def public_names() -> str:
  """A table of the public names, each with its first line."""
  lines = ['| name | is | what it is |', '|---|---|---|']
  for name, (module, attribute) in sorted(sleep_jax._PUBLIC.items()):
    path = f'{module}.{attribute}' if attribute else module
    summary = inspect.getdoc(getattr(sleep_jax, name)) or ''
    first = summary.partition('\n\n')[0].replace('\n', ' ')
    lines.append(f'| `sleep_jax.{name}` | [`{path}`][{path}] | {first} |')
  return '\n'.join(lines)


def fill(markdown: str) -> str:
  """A page with its tables and directives in place of the markers."""
  if _PUBLIC in markdown:
    markdown = markdown.replace(_PUBLIC, public_names())
  markdown = _FIELDS.sub(
    lambda match: '\n'.join(map(table, groups()[match[1]])), markdown
  )
  return _MODULES.sub(
    lambda match: '\n\n'.join(f'::: {name}' for name in modules(match[1])),
    markdown,
  )


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
  """Fills the markers of a page."""
  return fill(markdown)


def _settings(package: str) -> dict[str, Any]:
  """The classes of settings of what `package` has, by name."""
  names = registry.names(package)
  return {n: registry.find(n, package, 'name')[1] for n in names}


def _names(cls: Any) -> list[str]:
  return [field.name for field in dataclasses.fields(cls)]


def _whole(heading: str, cls: Any) -> Section:
  return Section(heading, cls, _names(cls))


def _mixer_sections() -> list[Section]:
  of_class = collections.defaultdict(list)
  for name, cls in _settings(config.MIXERS_PACKAGE).items():
    if cls is not config.ModelConfig:
      of_class[cls].append(name)
  return [
    _whole(f'model.recurrent, for the mixers {", ".join(names)}', cls)
    for cls, names in of_class.items()
  ]


def _default(field: dataclasses.Field[Any]) -> str:
  if field.default is not dataclasses.MISSING:
    value = field.default
  elif field.default_factory is not dataclasses.MISSING:
    value = field.default_factory()
  else:
    return 'required'
  # The defaults of a section within another are in its own table.
  name = type(value).__name__
  return f'`{name}()`' if dataclasses.is_dataclass(value) else f'`{value!r}`'


def _type_name(hint: Any) -> str:
  """A type as it is written in Python, without its bounds."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin is typing.Annotated:
    return _type_name(args[0])
  if origin in (typing.Union, types.UnionType):
    return ' | '.join(map(_type_name, args))
  if origin is not None:
    return f'{origin.__name__}[{", ".join(map(_type_name, args))}]'
  if hint is Ellipsis:
    return '...'
  return 'None' if hint is type(None) else getattr(hint, '__name__', str(hint))


def _bounds(hint: Any) -> str:
  """What a number of this type may be; nothing for what is no number."""
  origin, args = typing.get_origin(hint), typing.get_args(hint)
  if origin is typing.Annotated:
    return ', '.join(map(_bound, args[1:]))
  if hint in (int, float):
    return _bound(config.Bounds())
  return next(filter(None, map(_bounds, args)), '')


def _bound(extra: Any) -> str:
  if not isinstance(extra, config.Bounds):
    return str(extra)
  least, most = extra.least, extra.most
  # `config.Positive` begins with the smallest number that there is.
  text = 'above 0' if 0 < least < 1e-300 else f'at least {least:g}'
  if most == float('inf'):
    return f'{text}, or inf'
  # What every number has: the largest float, or the largest index of an array.
  if most in (config.Bounds().most, typing.get_args(config.Count)[1].most):
    return text
  return f'{least:g} to {most:g}'
