"""Receivers of what a life measures; a life does not depend on them."""

from collections.abc import Callable, Sequence
import functools
import importlib
import pathlib
from typing import Any, Protocol, runtime_checkable
import uuid

from absl import logging

from sleep_jax import array_typing as at
from sleep_jax import config
from sleep_jax.metrics import table as table_lib
from sleep_jax.metrics import tensorboard
from sleep_jax.runtime import files

_KNOWN = ('trackio', 'wandb')
_RUN_ID = 'run_id'  # File of a run's folder: one run, however often resumed.


@runtime_checkable
class Sink(Protocol):
  """What a receiver does; any of it may raise, see `Sinks`."""

  def scalars(self, values: at.Metrics, axis: str, position: int) -> None:
    """Values by name, at a position on an axis: a `night`, or `steps`."""
    ...

  def table(self, name: str, table: table_lib.Table, night: int) -> None: ...

  def picture(self, name: str, path: pathlib.Path, night: int) -> None: ...

  def close(self) -> None: ...


class Library:
  """A run of Weights & Biases or of trackio, which have the same methods.

  Its own counter of steps only ever rises, so nights and optimizer steps are
  values beside the others.
  """

  def __init__(self, name: str, project: str, folder: pathlib.Path, run: str):
    self._library = importlib.import_module(name)
    self._project, self._folder, self._name = project, folder, run

  def start(self, settings: dict[str, Any]) -> 'Library':
    """Begins the run, or goes on with it."""
    path = self._folder / _RUN_ID
    if not path.exists():
      files.write(path, uuid.uuid4().hex[:8])
    run_id = path.read_text('utf-8')
    own = {'name': self._name, 'id': run_id}
    if self._library.__name__ == 'trackio':  # Knows a run by its name alone.
      own = {'name': f'{self._name}-{run_id}'}
    self._run = self._library.init(
      project=self._project, config=settings, resume='allow', **own
    )
    if define := getattr(self._run, 'define_metric', None):
      define('*', step_metric='night')
      define('steps/*', step_metric='steps')
    return self

  def scalars(self, values: at.Metrics, axis: str, position: int) -> None:
    prefix = '' if axis == 'night' else f'{axis}/'
    named = {prefix + name: value for name, value in values.items()}
    self._run.log({axis: position, **named})

  def table(self, name: str, table: table_lib.Table, night: int) -> None:
    value = self._library.Table(
      columns=list(table.header), data=[list(row) for row in table.rows]
    )
    self._run.log({'night': night, name: value})

  def picture(self, name: str, path: pathlib.Path, night: int) -> None:
    self._run.log({'night': night, name: self._library.Image(str(path))})

  def close(self) -> None:
    self._run.finish()


class Sinks:
  """Receivers side by side; one that fails is left out from then on.

  Args:
    makers: of each receiver by name; one that cannot be made has failed.
  """

  def __init__(self, makers: dict[str, Callable[[], Sink]]):
    self._sinks: dict[str, Sink] = {}
    for name, make in makers.items():
      sink = self._guarded(name, make)
      if sink is not None:
        self._sinks[name] = sink

  def scalars(self, values: at.Metrics, axis: str, position: int) -> None:
    self._each('scalars', values, axis, position)

  def table(self, name: str, table: table_lib.Table, night: int) -> None:
    self._each('table', name, table, night)

  def picture(self, name: str, path: pathlib.Path, night: int) -> None:
    self._each('picture', name, path, night)

  def close(self) -> None:
    self._each('close')

  def _each(self, method: str, *args: Any) -> None:
    for name, sink in list(self._sinks.items()):
      self._guarded(name, functools.partial(getattr(sink, method), *args))

  def _guarded(self, name: str, call: Callable[[], Any]) -> Any:
    try:
      return call()
    except Exception as e:  # A library may raise anything; a life goes on.
      self._sinks.pop(name, None)
      logging.warning(
        'The writer %s failed and is left out from now on: %s: %s',
        name,
        type(e).__name__,
        e,
      )
      return None


def check(names: Sequence[str]) -> None:
  """Refuses writers that are unknown or not installed.

  Raises:
    ConfigError: naming it.
  """
  for name in names:
    config.lookup(name, dict.fromkeys(_KNOWN), 'writers')
    try:
      importlib.import_module(name)
    except ImportError as e:
      raise config.ConfigError(
        f'writers: {name} is not installed; pip install {name}, or leave it '
        'out of --config.writers.'
      ) from e


def build(folder: pathlib.Path, run: str, settings: dict[str, Any]) -> Sinks:
  """TensorBoard and the libraries that `settings['writers']` names.

  Args:
    folder: of the run.
    run: its name: arm and seed of a life.
    settings: the config, which is stored with the run.

  Raises:
    ConfigError: see `check`.
  """
  names = settings.get('writers', ())
  check(names)

  def tensor_board() -> Sink:
    return tensorboard.TensorBoard(folder, flatten(settings))

  def library(name: str) -> Sink:
    return Library(name, settings['name'], folder, run).start(settings)

  makers = {'tensorboard': tensor_board}
  return Sinks(makers | {n: functools.partial(library, n) for n in names})


def flatten(settings: Any, prefix: str = '') -> dict[str, Any]:
  """Nested settings as one level, `{'sleep.steps': 300}`; the rest as text."""
  if isinstance(settings, (list, tuple)):
    if all(isinstance(x, (str, int, float)) for x in settings):
      return {prefix: ', '.join(map(str, settings))}
    settings = dict(enumerate(settings))
  if not isinstance(settings, dict):
    plain = isinstance(settings, (bool, int, float, str))
    return {prefix: settings if plain else str(settings)}
  flat = {}
  for key, value in settings.items():
    flat |= flatten(value, f'{prefix}.{key}' if prefix else str(key))
  return flat
