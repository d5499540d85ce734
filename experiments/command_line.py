"""Command lines of this package: a wrong one ends with one line.

--config takes a file, or the name of one in experiments/configs; both may have
a variant: --config=quickstart, --config=facts:hard, --config=mine.py:large.
"""

from collections.abc import Iterator, Sequence
import dataclasses
import difflib
import importlib.resources
import pathlib
import re
import sys
from typing import Any

from absl import flags
import ml_collections
from ml_collections.config_flags import config_flags
from ml_collections.config_flags import config_path

from experiments import configs
from sleep_jax import config
from sleep_jax.config import registry

_NO_CONFIGS = ('__init__', 'common')

# Flags are listed in the help of the command that defines them.
flags.disclaim_key_flags()


def define_config() -> flags.FlagHolder:
  """Defines --config, with an override for every setting; see `parse`."""
  holder = config_flags.DEFINE_config_file(
    'config', help_string='NAME[:VARIANT] or FILE.py[:VARIANT].'
  )
  flags.FLAGS['config'].parser = _Parser('config')
  return holder


def parse(argv: list[str]) -> list[str]:
  """The `flags_parser` of `app.run`: ends with one line if a flag is wrong."""
  try:
    left = flags.FLAGS(argv)
  except flags.Error as e:
    sys.exit(f'error: {" ".join(str(e).split())}')
  if len(left) > 1:
    sys.exit(f'error: {left[1]!r} is no flag; settings are --config.KEY=VALUE.')
  if 'config' in flags.FLAGS and flags.FLAGS.config is None:
    sys.exit(
      'error: --config is missing; give a file, or a name as in '
      f'--config=quickstart: {", ".join(names())}.'
    )
  return left


def names() -> list[str]:
  """The configs that are shipped."""
  files = [pathlib.PurePath(x.name) for x in _folder().iterdir()]
  return sorted(
    x.stem for x in files if x.suffix == '.py' and x.stem not in _NO_CONFIGS
  )


def find(value: str) -> str:
  """FILE[:VARIANT] of a config.

  Args:
    value: that, or NAME[:VARIANT] of a shipped one.

  Raises:
    ConfigError: if there is no such file; it names the nearest.
  """
  name, colon, variant = value.partition(':')
  if name in names():
    return f'{_folder() / name}.py{colon}{variant}'
  if pathlib.Path(name).is_file():
    return value
  near = difflib.get_close_matches(pathlib.PurePath(name).stem, names(), 1)
  raise config.ConfigError(
    f'there is no such file; is --config={near[0]} meant?'
    if near
    else f'there is no such file, nor such a name: {", ".join(names())}.'
  )


def with_flag(message: str, c: dict[str, Any]) -> str:
  """An error message, which begins with a flag if it did with a setting.

  Args:
    message: such as `sleep.steps=-5 must be at least 0.`
    c: the experiment's config.
  """
  name, _, _ = message.partition('=')
  try:
    value = config_path.get_value(name, c)
  except (KeyError, IndexError, TypeError, ValueError):
    return message
  is_setting = message.startswith(f'{name}={value!r}')
  return f'--config.{message}' if is_setting else message


def outranked(c: dict[str, Any], argv: Sequence[str]) -> Iterator[str]:
  """What to tell of flags that arms outrank: a line for each flag.

  Args:
    c: the experiment's config.
    argv: the command line.
  """
  for path in dict.fromkeys(_overrides(argv)):
    if path.startswith('arms.'):
      continue
    section, _, name = path.partition('.')
    key = re.split(r'[.[]', name)[0]
    arms = [
      a for a, changes in c['arms'].items() if _sets(changes, section, key)
    ]
    if arms:
      yield (
        f'--config.{path} does not reach the arms that have a '
        f'{section}.{key} of their own: {", ".join(arms)}; for these, set '
        f'--config.arms.{arms[0]}.{section}.{key} and so on.'
      )


def _sets(changes: Any, section: str, key: str) -> bool:
  own = changes.get(section) if isinstance(changes, dict) else None
  return isinstance(own, dict) and key in own


def _overrides(argv: Sequence[str]) -> list[str]:
  """The settings that flags name, such as sleep.steps."""
  found = (re.match(r'--?(?:no)?config\.([^=]*)', word) for word in argv)
  return [match[1] for match in found if match]


class _Parser(config_flags.ConfigFileFlagParser):
  """Also knows the shipped configs by name, and refuses unknown settings.

  absl puts the flag before the text of an error.
  """

  def parse(self, path: str) -> ml_collections.ConfigDict:
    file = find(path)
    # The library would run the file in the module of an earlier one, with what
    # that has defined.
    sys.modules.pop(f'{self.name}_config', None)
    try:
      c = super().parse(file)
    except Exception as e:  # A config file is code, and may raise anything.
      raise config.ConfigError(_reason(e)) from e
    if not isinstance(c, ml_collections.ConfigDict):
      raise config.ConfigError(
        'the file cannot be read, or its get_config() returns no ConfigDict.'
      )
    for path in _overrides(sys.argv):
      _add_default(path, c)
      _check_override(path, c)
    return c


def _folder() -> Any:
  return importlib.resources.files(configs)


def _add_default(path: str, c: Any) -> None:
  """Adds a setting of the model or the task that the config leaves out."""
  section, _, name = path.rpartition('.')
  task: Any = c.get('task', {})
  if section == 'model':
    cls = config.ModelConfig
  elif re.fullmatch(r'model\.levels\[\d+\]', section):
    cls = config.LevelConfig
  elif section == 'task' and 'name' in task:
    _, cls = registry.find(task.name, 'sleep_jax.tasks', 'task.name')
  else:
    return
  defaults = {f.name: f.default for f in dataclasses.fields(cls)}
  default = defaults.get(name)
  if not isinstance(default, (bool, int, float, str, tuple)):
    return
  try:
    values = config_path.get_value(section, c)
  except (AttributeError, KeyError, IndexError, TypeError, ValueError):
    return
  if name not in values:
    with values.unlocked():
      values[name] = default


def _check_override(path: str, c: ml_collections.ConfigDict) -> None:
  """Raises ConfigError, naming the nearest, if `c` has no setting `path`."""
  try:
    config_path.get_type(path, c)
  except (AttributeError, KeyError, IndexError, TypeError, ValueError):
    near = difflib.get_close_matches(path, _settings(c)[1:], 1)
    hint = f'; is --config.{near[0]} meant?' if near else '.'
    raise config.ConfigError(
      f'it has no setting for --config.{path}{hint}'
    ) from None


def _settings(value: Any, path: str = '') -> list[str]:
  """Paths of all settings below `path`, such as model.levels[0].chunk."""
  if isinstance(value, ml_collections.ConfigDict):
    below = {f'{path}.{k}' if path else k: v for k, v in value.items()}
  elif isinstance(value, (tuple, list)):
    below = {f'{path}[{i}]': v for i, v in enumerate(value)}
  else:
    return [path]
  return [path, *(x for k, v in below.items() for x in _settings(v, k))]


def _reason(e: Exception) -> str:
  """Why a config file has no config to give."""
  # The library puts the traceback of some errors into the text of another.
  e = e.__context__ if isinstance(e.__context__, Exception) else e
  if "no attribute 'get_config'" in str(e):
    return 'the file has no function get_config.'
  if 'get_config() takes 0 positional' in str(e):
    return 'this config has no variants.'
  if isinstance(e, config.ConfigError):
    return str(e)
  return f'{type(e).__name__}: {e}'
