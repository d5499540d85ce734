"""Other places that a life's scalars go to: Weights & Biases, trackio."""

import importlib
from typing import Any, Protocol

from sleep_jax import config

_KNOWN = ('trackio', 'wandb')


class Sink(Protocol):
  """What a run of either library can do."""

  def log(self, scalars: dict[str, float], step: int) -> None: ...

  def finish(self) -> None: ...


def build(
  names: tuple[str, ...], project: str, life: str, settings: dict[str, Any]
) -> list[Sink]:
  """Starts a run of each library.

  Args:
    names: `trackio`, `wandb`, or both.
    project: the experiment's name.
    life: arm and seed.
    settings: kept beside the run.

  Raises:
    ConfigError: for another name, or a library that is not installed.
  """
  sinks = []
  for name in names:
    config.lookup(name, dict.fromkeys(_KNOWN), 'writers')
    try:
      library = importlib.import_module(name)
    except ImportError as e:
      raise config.ConfigError(
        f'writers: {name} is not installed; pip install {name}, or leave it '
        'out of --config.writers.'
      ) from e
    run = library.init(project=project, name=life, config=settings)
    # Both have `log` and `finish` on the run that `init` returns.
    sinks.append(run)
  return sinks
