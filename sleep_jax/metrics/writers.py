"""Optional receivers of a life's scalars: Weights & Biases and trackio."""

import importlib
from typing import Any, Protocol, runtime_checkable

from sleep_jax import config

_KNOWN = ('trackio', 'wandb')


@runtime_checkable
class Sink(Protocol):
  """The methods of a run that both libraries have."""

  def log(self, scalars: dict[str, float], step: int) -> None: ...

  def finish(self) -> None: ...


def build(
  names: tuple[str, ...], project: str, life: str, settings: dict[str, Any]
) -> list[Sink]:
  """Starts a run of each library.

  Args:
    names: `trackio`, `wandb`, or both.
    project: the experiment's name.
    life: name of the run: arm and seed.
    settings: config that is stored with the run.

  Raises:
    ConfigError: for an unknown name, or a library that is not installed.
  """
  sinks: list[Sink] = []
  for name in names:
    config.lookup(name, dict.fromkeys(_KNOWN), 'writers')
    try:
      library = importlib.import_module(name)
    except ImportError as e:
      raise config.ConfigError(
        f'writers: {name} is not installed; pip install {name}, or leave it '
        'out of --config.writers.'
      ) from e
    sinks.append(library.init(project=project, name=life, config=settings))
  return sinks
