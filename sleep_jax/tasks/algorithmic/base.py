"""sleep_jax.tasks.algorithmic.base."""

from typing import Any, Protocol

import numpy as np

from sleep_jax import config
from sleep_jax.data import windows


class WindowTask(Protocol):
  """A generator of batches that all have one shape."""

  vocab: int  # Tokens are below it.
  windows: int  # J.
  window: int  # L.
  prediction: int  # P.

  def batch(
    self, rng: np.random.Generator, rows: int, *, exam: bool = False
  ) -> windows.WindowBatch:
    """`rows` fresh sequences; a pure function of the generator's state."""
    ...

  def metrics(
    self, batch: windows.WindowBatch, chosen: np.ndarray, nll: np.ndarray
  ) -> dict[str, float]:
    """Named figures of one batch; one that has nothing to count is absent.

    Args:
      batch: what was asked.
      chosen: `[B, P]` int, the likeliest token at each input.
      nll: `[B, P]` nats, minus log-probability of each target.
    """
    ...

  def chance_level(self) -> dict[str, float]:
    """The same figures of one who knows the puzzle but not the context."""
    ...


def require_at_least(cfg: Any, **least: int) -> None:
  """Raises ConfigError where a field of `cfg` is below its `least`."""
  for name, bound in least.items():
    if getattr(cfg, name) < bound:
      raise config.ConfigError(
        f'puzzle.{name}={getattr(cfg, name)} must be at least {bound}.'
      )


def check_fits(tokens: int, windows: int, window: int, lower: str) -> None:
  """Raises ConfigError if a context of `tokens` can be too long.

  Args:
    tokens: the longest context.
    windows: how many there are.
    window: tokens of each.
    lower: the setting that makes contexts shorter, for the message.
  """
  if tokens > windows * window:
    raise config.ConfigError(
      f'puzzle: a context can have {tokens} tokens, but puzzle.windows='
      f'{windows} of puzzle.window={window} hold {windows * window}; raise one '
      f'of them or lower {lower}.'
    )


def shuffled_columns(rng: np.random.Generator, valid: np.ndarray) -> np.ndarray:
  """Random orders `[B, T]` of the columns, the `valid` ones first."""
  return np.argsort(np.where(valid, rng.random(valid.shape), 2.0), axis=1)
