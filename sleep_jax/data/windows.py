"""Sequences that are read window by window, slept on, and then asked about.

A puzzle of "offline recurrence" (arXiv 2605.26099) is a context, cut in windows
of one length that are read one after the other and forgotten, and a prediction
window, in which alone something is asked for.

The paper does not tell how the first label is asked for. Under the usual shift
by one it would be predicted at the last token of the context, in a window that
is slept on. Here the prediction window begins with a token that asks (a
delimiter or a query), the gold labels follow it, and `targets` are shifted
already: nothing is predicted in the context, and no layout depends on how many
passes a sleep makes.
"""

from collections.abc import Mapping
import dataclasses
from typing import Any, Protocol

import jax
import numpy as np

from sleep_jax import config

PAD = 0  # Of every puzzle.


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Windows:
  """A batch of B sequences: J windows of L tokens, and the one that predicts.

  context: `[B, J, L]` int32, to be read and slept on.
  present: `[B, J, L]` bool, False on padding, which no layer may see.
  inputs: `[B, P]` int32, the prediction window.
  asked: `[B, P]` bool, `present` of the inputs.
  targets: `[B, P]` int32, the token that is right after each input.
  weight: `[B, P]` float32, 1 where the target is asked for.
  depth: `[B, P]` int32, steps of reasoning behind each weighted target; 0 where
    there are none, and where nothing is asked for.
  """

  context: np.ndarray
  present: np.ndarray
  inputs: np.ndarray
  asked: np.ndarray
  targets: np.ndarray
  weight: np.ndarray
  depth: np.ndarray


class Puzzle(Protocol):
  """A generator of batches that all have one shape."""

  vocab: int  # Tokens are below it.
  windows: int  # J.
  window: int  # L.
  prediction: int  # P.

  def batch(
    self, rng: np.random.Generator, rows: int, *, exam: bool = False
  ) -> Windows:
    """`rows` fresh sequences; a pure function of the generator's state."""
    ...

  def marks(
    self, batch: Windows, chosen: np.ndarray, nll: np.ndarray
  ) -> dict[str, float]:
    """Named figures of one batch; one that has nothing to count is absent.

    Args:
      batch: what was asked.
      chosen: `[B, P]` int, the likeliest token at each input.
      nll: `[B, P]` nats, minus log-probability of each target.
    """
    ...

  def chances(self) -> dict[str, float]:
    """The same figures of one who knows the puzzle but not the context."""
    ...


def build(name: str, settings: Mapping[str, Any]) -> Puzzle:
  """The puzzle called `name`, with its own settings.

  Raises:
    ConfigError: if there is no such puzzle or setting, or if it cannot work.
  """
  # Here, because each of them imports this module.
  from sleep_jax.data import depo
  from sleep_jax.data import rule110
  from sleep_jax.data import symbolic

  puzzles = {
    'depo': (depo.Depo, depo.DepoConfig),
    'rule110': (rule110.Rule110, rule110.Rule110Config),
    'symbolic': (symbolic.Symbolic, symbolic.SymbolicConfig),
  }
  cls, cfg = config.choose(name, puzzles, 'puzzle.name')
  return cls(config.from_mapping(cfg, settings, 'puzzle'))


def check_least(cfg: Any, **least: int) -> None:
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


def pack(
  tokens: np.ndarray, keep: np.ndarray, length: int, *, at_end: bool
) -> tuple[np.ndarray, np.ndarray]:
  """Closes the gaps of every row.

  Args:
    tokens: `[B, T]`.
    keep: `[B, T]` bool; the other tokens are gaps.
    length: of the result; what does not fit is cut off where padding would be.
    at_end: whether what is kept ends (or begins) the row.

  Returns:
    `[B, length]` int32 tokens with PAD for the rest, and where they are kept.
  """
  if (lack := length - tokens.shape[1]) > 0:
    sides = (0, 0), ((lack, 0) if at_end else (0, lack))
    tokens, keep = np.pad(tokens, sides), np.pad(keep, sides)
  order = np.argsort(keep if at_end else ~keep, axis=1, kind='stable')
  order = order[:, -length:] if at_end else order[:, :length]
  kept = np.take_along_axis(keep, order, axis=1)
  packed = np.take_along_axis(tokens, order, axis=1)
  return np.where(kept, packed, PAD).astype(np.int32), kept


def shuffled(rng: np.random.Generator, valid: np.ndarray) -> np.ndarray:
  """Random orders `[B, T]` of the columns, the `valid` ones first."""
  return np.argsort(np.where(valid, rng.random(valid.shape), 2.0), axis=1)
